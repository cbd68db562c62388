"""Lightning's own objects from configuration: trainer, loggers, callbacks, by `_target_`, from an allow-list."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ftw.cli import _run
from ftw.errors import ConfigError
from ftw.map.training.checkpoints import FileCheckpointIO
from ftw.map.training.interpreter import mixed_precision
from ftw.ui.steps import Step

# A configuration names classes to be built; only Lightning's, and these of ours, may be.
ALLOWED = ("pytorch_lightning.", "ftw.map.training.checkpoints.")
CHECKPOINTS = "checkpoints"  # folder of a run


class EpochProgress(pl.Callback):
    """Moves a step's bar on with every epoch, of the most there may be; an epoch itself takes a moment."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step.advance(1, total=trainer.max_epochs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step.close()


def make_trainer(job: Any, callbacks: list[pl.Callback], step: Step) -> pl.Trainer:
    """The trainer of a job with its loggers and callbacks, writing into the run's folder.

    Args:
        callbacks: what the job needs. step: shows the progress; a progress bar of Lightning's in `job.callbacks` is
            shown as well, on a terminal.

    Raises:
        ConfigError: a `_target_` outside the allow-list, a package that is not installed, or options that the machine
            or Lightning does not know.
    """
    if all(entry.get("offline") for entry in (job.logger or {}).values() if entry):
        # Offline, wandb has nothing to say that the run's own table does not; online it shows the run's address.
        os.environ.setdefault("WANDB_SILENT", "true")
    folder = _run.run_folder()
    loggers = _build_all(job.logger, save_dir=str(folder))
    further = _build_all(job.callbacks, dirpath=str(folder / CHECKPOINTS))
    if not step.console.is_terminal:
        further = [one for one in further if not isinstance(one, ProgressBar)]
    options = dict(job.trainer)
    if options.get("precision") == "auto":
        options["precision"] = mixed_precision()
    _allowed(options)
    bar = any(isinstance(one, ProgressBar) for one in further)
    return _build(
        options,
        logger=loggers or False,
        # The progress first: its bar must be gone before what the others do when the fit ends.
        callbacks=[EpochProgress(step), *callbacks, *further],
        enable_progress_bar=bar,
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in further),
        plugins=[FileCheckpointIO()],
        default_root_dir=str(folder),
    )


@contextlib.contextmanager
def loggers_closed() -> Iterator[None]:
    """Close what loggers keep open in the process: wandb would write the next run of a sweep into this one's."""
    try:
        yield
    finally:
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish()


def _build_all(group: Mapping[str, Any] | None, **places: str) -> list[Any]:
    """One object for each entry of a group; a place is given to those entries that leave that key null."""
    built = []
    for entry in (group or {}).values():
        if entry is None:
            continue
        _allowed(entry)
        filled = {key: places.get(key, value) if value is None else value for key, value in entry.items()}
        one = _build(filled)
        if isinstance(one, WandbLogger):
            # Lightning 2.6.6 passes on an option that wandb 0.31 warns about, whether it was given or not.
            one._wandb_init.pop("anonymous", None)
        built.append(one)
    return built


def _build(entry: Mapping[str, Any], **places: Any) -> Any:
    """The object, or a sentence about why Lightning does not make it."""
    try:
        return instantiate(entry, **places)
    except (InstantiationException, MisconfigurationException) as error:
        words = str(error.__cause__ or error).strip().splitlines()[0]
        if isinstance(error.__cause__, ImportError):
            raise ConfigError(f"{words}; install what is missing with: pip install 'ftw-lenses[all]'") from error
        raise ConfigError(f"{entry['_target_']}: {words}") from error


def _allowed(entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        if key == "_target_" and not str(value).startswith(ALLOWED):
            raise ConfigError(
                f"_target_={value!r} is not allowed; only classes of {', '.join(ALLOWED)} are built from configuration"
            )
        if isinstance(value, Mapping):
            _allowed(value)
