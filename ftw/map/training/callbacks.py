"""Lightning callbacks: the one that turns a trained task into a bank, and the one that stops waiting lenses' runs.

`LensBankCallback` builds the calibrated stack when fitting ends, evaluates it, saves the pack, and logs figures, table,
picture and pack to whatever loggers the trainer has. During training it can read a prompt with the lenses as they are.

Axes: T tokens, L layers, N lenses.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from ftw.hat.bank import LensBank, build_bank
from ftw.hat.monitor import Monitor
from ftw.hat.store import LensStack
from ftw.hat.timeline import Timeline
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import Evaluation
from ftw.map.pack import LensPack
from ftw.map.training.data import EncyclopediaDataModule, Pool
from ftw.map.training.fit import calibrated_stack
from ftw.map.training.lens_task import LensTask
from ftw.substrate.model import Substrate


class LensBankCallback(pl.Callback):
    """Builds the bank from the task.

    Args:
        encyclopedia: where background tokens and test rows are.
        finish: makes the pack (and its evaluation) from the calibrated stack and the task's pool.
        folder: where the pack is saved; None saves nothing.
        watch_prompt: a prompt read after every `watch_every` epochs, its picture sent to the loggers.
        substrate: needed by `watch_prompt` alone.

    After fitting, `stack`, `pack` and `evaluation` hold the results.
    """

    def __init__(
        self,
        encyclopedia: Encyclopedia,
        finish: Callable[[LensStack, Pool, LensTask], tuple[LensPack, Evaluation | None]],
        *,
        folder: Path | None = None,
        watch_prompt: str | None = None,
        watch_every: int = 10,
        substrate: Substrate | None = None,
    ) -> None:
        self._encyclopedia, self._finish, self._folder = encyclopedia, finish, folder
        self._watch_prompt, self._watch_every, self._substrate = watch_prompt, watch_every, substrate
        self.stack: LensStack | None = None
        self.pack: LensPack | None = None
        self.evaluation: Evaluation | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self._watch_prompt and self._substrate and (trainer.current_epoch + 1) % self._watch_every == 0
        if not due or trainer.sanity_checking:
            return
        assert self._watch_prompt is not None  # both are part of `due`
        assert self._substrate is not None
        timeline = Monitor(self._substrate, current_bank(_task(pl_module), _pool(trainer))).read(self._watch_prompt)
        log_timeline(trainer.loggers, f"watch/epoch_{trainer.current_epoch + 1}", timeline)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task, pool = _task(pl_module), _pool(trainer)
        self.stack = calibrated_stack(task, pool, self._encyclopedia)
        self.pack, self.evaluation = self._finish(self.stack, pool, task)
        if self._folder is not None:
            self.pack.save(self._folder)
        if self.evaluation is not None:
            log_evaluation(trainer.loggers, self.evaluation)


def current_bank(task: LensTask, pool: Pool) -> LensBank:
    """The lenses as they are in mid-training, not calibrated: layers averaged as they come."""
    num_layers, rows = len(pool.layers), torch.arange(task.num_lenses)
    heads = pool.fold([head.rows(rows) for head in task.heads])  # pyright: ignore[reportCallIssue] (a ModuleList of heads)
    scale_LN = torch.full((num_layers, task.num_lenses), 1 / num_layers)
    return build_bank(
        names=pool.names,
        layers=pool.layers,
        heads=heads,
        scale_LN=scale_LN,
        offset_N=torch.zeros(task.num_lenses),
        basis=pool.basis,
    )


def log_evaluation(loggers: list[Logger], evaluation: Evaluation) -> None:
    """Means as numbers for every logger; figures of each concept as a table where there are tables."""
    means = {f"test/{name}": float(value) for name, value in evaluation.mean.items() if isinstance(value, int | float)}
    for logger in loggers:
        logger.log_metrics(means)
        if isinstance(logger, WandbLogger):
            columns = sorted(
                {
                    key
                    for figures in evaluation.concepts.values()
                    for key, value in figures.items()
                    if not isinstance(value, list)
                }
            )
            rows = [[name, *(figures.get(key) for key in columns)] for name, figures in evaluation.concepts.items()]
            logger.log_table("test/concepts", columns=["concept", *columns], data=rows)


def log_timeline(loggers: list[Logger], name: str, timeline: Timeline) -> None:
    """The heat map of a timeline, to loggers that take pictures."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger | TensorBoardLogger):
            continue
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = timeline.plot()
        canvas = FigureCanvasAgg(figure)
        if isinstance(logger, WandbLogger):
            import wandb

            # wandb knows a figure by its class being matplotlib's own; ours is a child of it.
            canvas.draw()
            logger.experiment.log({name: wandb.Image(np.asarray(canvas.buffer_rgba()))})
        else:
            logger.experiment.add_figure(name, figure)


def log_pack(loggers: list[Logger], folder: Path, pack: LensPack) -> None:
    """The pack's folder as a wandb artifact."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(
                pack.pack_id, type="lens-pack", metadata={"version": pack.version, "lenses": len(pack.names)}
            )
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)


def quiet_lightning() -> None:
    """Lightning's own start-up lines (devices, tips) tell an FTW user nothing."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_trainer(max_epochs: int, **options: Any) -> pl.Trainer:
    """A trainer that leaves no file and draws no bar: for controls and for the Python API."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            **{
                "max_epochs": max_epochs,
                "accelerator": "auto",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                **options,
            }
        )


def _task(module: pl.LightningModule) -> LensTask:
    assert isinstance(module, LensTask)
    return module


def _pool(trainer: pl.Trainer) -> Pool:
    module = getattr(trainer, "datamodule", None)
    assert isinstance(module, EncyclopediaDataModule)
    return module.pool
