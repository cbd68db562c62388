"""`ftw train` with a model: an interpreter instead of lenses, and its figures beside those of what it must beat."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger, WandbLogger

from ftw.cli import _run
from ftw.cli._lightning import loggers_closed, make_trainer
from ftw.cli._samples import Samples, prepare
from ftw.cli._schema_train import TrainJob
from ftw.cli._sources import Sources
from ftw.errors import ConfigError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter, calibrated
from ftw.map.collect import collect
from ftw.map.descriptions import DescriptionsConfig
from ftw.map.estimate import estimate
from ftw.map.interpreter_figures import SYSTEM, confusions, figures, most_confused
from ftw.map.leaks import check_leaks, find_leaks
from ftw.map.training.interpreter import InterpreterFit, read_logits, train_interpreter
from ftw.map.training.interpreter_baselines import baselines
from ftw.map.training.interpreter_data import TEST, InterpreterRows, read_rows, with_further, without_held_out
from ftw.ui.interpreter import confusion_picture, figures_table
from ftw.ui.steps import Steps

FOLDER = "interpreter"  # of a run


@dataclass
class TrainedInterpreter:
    """What a run made; `figures` is empty where there are no test rows."""

    interpreter: Interpreter
    figures: dict[str, Any]
    folder: Path


def first_rank() -> bool:
    """Whether this process is the one that the user started; Lightning starts the others with their rank."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def interpreter_run(job: TrainJob, run_steps: Steps, *, folder: Path) -> TrainedInterpreter | None:
    """All of `ftw train experiment=interpreter`; None for a dry run, and on every rank but the first."""
    sources = Sources()
    substrate, made = prepare(job, sources, run_steps)
    config = job.map.encyclopedia
    if job.dry_run:
        cost = estimate(made.table, config.spec(substrate), substrate, measure=True)
        run_steps.console.print("\n".join(cost.lines()), highlight=False)
        return None
    with run_steps.step("Look for leaks") as step:
        # Of the texts that FTW makes itself, near-copies are left out of what is judged; the user's own are refused.
        own = isinstance(job.data, DescriptionsConfig)
        leaks = find_leaks(made.table, job.map.leaks.similarity) if own else check_leaks(made.table, job.map.leaks)
        copies = {made.table.texts[held] for _, held in leaks.pairs} if own else set()
        step.note(leaks.line())
    with run_steps.step("Collect states") as step:
        encyclopedia = collect(substrate, made.table, config)
        step.note(f"{len(made.table):,} texts, layers {', '.join(map(str, encyclopedia.spec.layers))}")
    with encyclopedia:
        rows = read_rows(encyclopedia, pools=job.map.interpreter.pools).with_validation(job.seed)
    if made.further is not None and job.model.similarity:
        with run_steps.step("Collect states of further concepts"), collect(substrate, made.further, config) as more:
            rows = with_further(rows, more)
    rows = without_held_out(rows, copies)
    tree, loggers = tree_of(made), list[Logger]()
    with run_steps.step("Train and calibrate") as step, loggers_closed():

        def trainer(callbacks: list[Any]) -> Any:
            built = make_trainer(job, callbacks, step)
            loggers.extend(built.loggers)
            return built

        fit = InterpreterFit(model=job.model, training=job.map.interpreter, seed=job.seed)
        checkpoint = None if job.resume is None else Path(job.resume)
        interpreter = train_interpreter(
            rows, fit, tree=tree, trainer=trainer, folder=folder / FOLDER, checkpoint=checkpoint
        )
        if not first_rank():
            return None
        step.note(f"{len(interpreter.names):,} concepts, temperature {float(interpreter.temperature):.2f}")
        found = evaluate_run(job, run_steps, interpreter, rows, loggers, folder)
    _run.write_json(folder / "run.json", _run.provenance(job, sources.fetched))
    if found:
        _run.write_json(folder / "metrics.json", found)
        run_steps.console.print(figures_table(found))
    _run.point_latest(folder)
    return TrainedInterpreter(interpreter, found, folder)


def tree_of(made: Samples) -> ConceptTree | None:
    """The tree that the samples' concepts stand in: their categories, else the hierarchy of their pack."""
    if made.categories:
        return ConceptTree.of_categories(made.table.concepts, made.categories)
    if made.concepts is None:
        return None
    paths = {name: made.concepts.path(name) for name in made.table.concepts}
    return ConceptTree(made.table.concepts, {low: up for path in paths.values() for up, low in pairwise(path)})


def evaluate_run(
    job: TrainJob,
    run_steps: Steps,
    interpreter: Interpreter,
    rows: InterpreterRows,
    loggers: list[Logger],
    folder: Path,
) -> dict[str, Any]:
    """Figures on the test rows, told to the loggers; with a tree, a picture of the confusions beside them."""
    test = rows.select(rows.where(TEST))
    if not len(test):
        return {}
    chance_SC = calibrated(read_logits(interpreter, test), interpreter.temperature).numpy()
    systems = {SYSTEM: chance_SC}
    if job.map.interpreter.baselines:
        with run_steps.step("Fit the baselines"):
            systems |= baselines(rows, seed=job.seed)
    labels_S = test.labels_S.numpy()
    found = figures(systems, labels_S, test.kinds, draws=job.evaluate.draws, seed=job.seed)
    found["confused"] = [list(pair) for pair in most_confused(chance_SC, labels_S, interpreter.names)]
    for logger in loggers:
        logger.log_metrics(
            {
                f"test/{kind}_{name}": entry["systems"][SYSTEM][name]
                for kind, entry in found.items()
                if kind != "confused"
                for name in ("top1", "top5", "ece")
            }
        )
    if interpreter.tree is not None and interpreter.tree.categories:
        _picture_confusions(interpreter, chance_SC, labels_S, loggers, folder)
    return found


def _picture_confusions(
    interpreter: Interpreter, chance_SC: np.ndarray, labels_S: np.ndarray, loggers: list[Logger], folder: Path
) -> None:
    """Which categories are taken for which, as a picture in the run's folder and in wandb."""
    tree = interpreter.tree
    assert tree is not None  # the caller has seen to it
    groups = [_root(name, tree.parents) for name in interpreter.names]
    path = confusion_picture(*confusions(chance_SC, labels_S, groups), folder / "confusions.png")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("test/confusions", [str(path)])


def _root(name: str, parents: dict[str, str]) -> str:
    while name in parents:
        name = parents[name]
    return name.strip("[]")


def check_model(job: TrainJob) -> None:
    """Refuse options that an interpreter has no use for."""
    if job.watch_prompt is not None:
        raise ConfigError("watch_prompt: an interpreter is watched after training, with: ftw interpret prompt=...")
