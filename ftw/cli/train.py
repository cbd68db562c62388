"""`ftw train`: train, calibrate and evaluate lenses, and write a pack. Collects what is missing."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from ftw import paths
from ftw.cli import _run
from ftw.cli._interpreter import check_model, first_rank, interpreter_run
from ftw.cli._lightning import CHECKPOINTS, loggers_closed, make_trainer
from ftw.cli._samples import Samples, capture, prepare, samples
from ftw.cli._schema_train import DATA, TrainJob
from ftw.cli._sources import Sources
from ftw.cli._verb import verb
from ftw.errors import ConfigError
from ftw.hat.timeline import Timeline
from ftw.map.collect import CollectConfig, collect
from ftw.map.compose import ComposeConfig
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.estimate import estimate
from ftw.map.evaluate import Evaluation
from ftw.map.leaks import check_leaks
from ftw.map.pack import LensPack
from ftw.map.sequences import SequencesConfig
from ftw.map.training.train import FitConfig, leak_config, train_pack
from ftw.substrate.model import Substrate
from ftw.ui.report import write_report
from ftw.ui.steps import Steps, steps
from ftw.ui.terminal import evaluation_table, overview

OBJECTIVES = ("auto", "out_of_fold", "heldout")


@dataclass
class Trained:
    """What a training run made."""

    pack: LensPack
    evaluation: Evaluation | None
    substrate: Substrate
    sources: Sources
    samples: Samples
    folder: Path


def train_run(job: TrainJob, run_steps: Steps) -> Trained | None:
    """All of `ftw train` but the report; None for a dry run."""
    console, sources = run_steps.console, Sources()
    folder = _run.run_folder() if job.dry_run else _run.begin(job)
    if job.model is not None:
        raise ConfigError("model: interpreters are trained by ftw train; leave model out here")
    _check_resume(job)
    substrate, made = prepare(job, sources, run_steps)
    config = capture(job.map.encyclopedia, made.table, job.data, job.seed)
    _check_kept(job, config)
    if job.dry_run:
        cost = estimate(made.table, config.spec(substrate), substrate, measure=True)
        console.print("\n".join(cost.lines()), highlight=False)
        return None
    fit = fit_config(job)
    with run_steps.step("Look for leaks between the splits") as step:
        leaks = check_leaks(made.table, leak_config(fit, sampled=isinstance(job.data, SequencesConfig)))
        step.note(leaks.line())
    with run_steps.step("Collect states") as step:
        encyclopedia = collect(substrate, made.table, config)
        step.note(f"{len(made.table):,} texts, layers {', '.join(map(str, encyclopedia.spec.layers))}")
    validation = validation_texts(job, made, substrate, sources, config, run_steps)
    with encyclopedia, run_steps.step("Train, calibrate, evaluate") as step, _resumable(job, folder), loggers_closed():
        pack, evaluation = train_pack(
            encyclopedia,
            fit,
            substrate=substrate,
            concepts=made.concepts,
            trainer=lambda callbacks: make_trainer(job, callbacks, step),
            folder=folder / "pack",
            checkpoint=None if job.resume is None else Path(job.resume),
            provenance=_run.provenance(job, sources.fetched),
            watch_prompt=job.watch_prompt,
            leaks=leaks,
            validation=validation,
        )
        step.note(f"{len(pack.names):,} lenses")
    return Trained(pack, evaluation, substrate, sources, made, folder)


def validation_texts(
    job: TrainJob,
    made: Samples,
    substrate: Substrate,
    sources: Sources,
    config: CollectConfig,
    run_steps: Steps,
) -> Encyclopedia | None:
    """Articles of the part kept for choices, where graduation or refinement decides on them.

    Raises:
        ConfigError: the test texts are of that part themselves.
    """
    training, data = job.map.training, job.data
    if not (training.graduate or training.refine_siblings) or not isinstance(data, ComposeConfig):
        return None
    if data.heldout_part != "test":
        raise ConfigError(
            f"data.heldout_part={data.heldout_part}: graduation and refinement decide on the part dev; judge on test"
        )
    of_dev = replace(job, data=replace(data, heldout_part="dev"))
    with run_steps.step("Collect articles that decide on growth and siblings") as step:
        table = samples(of_dev, substrate, sources, concepts=made.concepts).table
        table = table.select(table.where("test"), table.concepts)
        step.note(f"{len(table):,} texts")
        return collect(substrate, table, config)


def fit_config(job: TrainJob) -> FitConfig:
    """What decides the fit, of a job."""
    return FitConfig(
        head=job.hat.lens,
        training=job.map.training,
        text=job.map.text,
        sequences=job.map.sequences,
        leaks=job.map.leaks,
        graduation=job.map.graduation,
        siblings=job.map.siblings,
        evaluate=job.evaluate,
        pack_id=job.pack_id,
        version=job.version,
        seed=job.seed,
    )


def _check_kept(job: TrainJob, config: CollectConfig) -> None:
    """Lenses read what is collected: found out before, not after."""
    family, sampled = job.hat.lens.family, isinstance(job.data, SequencesConfig)
    if sampled and not job.hat.lens.reads_sequences:
        raise ConfigError(
            f"hat.lens.family={family!r} reads pooled states, of which data=sequences keeps none; choose "
            "hat/lens=trunk_lstm (or lstm, gru, attention, token_max), or data=wordnet"
        )
    kept = [config.tokens_per_text.get(split, 0) for split in ("train", "test")]
    if job.hat.lens.reads_sequences and kept != [-1, -1]:
        raise ConfigError(
            f"hat.lens.family={family!r} reads the state of every token; take data=sequences, or keep those of texts "
            "with map.encyclopedia.tokens_per_text.train=-1 map.encyclopedia.tokens_per_text.test=-1"
        )


def _check_resume(job: TrainJob) -> None:
    if job.resume is not None and not Path(job.resume).is_file():
        known = sorted(paths.runs().glob(f"**/{CHECKPOINTS}/*.ckpt"))
        there = f"the newest is {_run.shown(known[-1])}" if known else f"{_run.shown(paths.runs())} has none"
        raise ConfigError(f"resume={job.resume}: no such checkpoint; {there}")


@contextlib.contextmanager
def _resumable(job: TrainJob, folder: Path) -> Iterator[None]:
    """Say, when stopped by Ctrl-C, how to go on from the last checkpoint; and when a checkpoint does not fit."""
    try:
        yield
    except KeyboardInterrupt as stop:
        checkpoint = folder / CHECKPOINTS / "last.ckpt"
        if not checkpoint.is_file():
            raise
        raise KeyboardInterrupt(
            f"stopped; go on with the same command and resume={_run.shown(checkpoint)}, or start anew without"
        ) from stop
    except RuntimeError as error:
        if job.resume is not None and "loading state_dict" in str(error):
            raise ConfigError(
                f"resume={job.resume} is the checkpoint of another training (other concepts, layers or lenses); "
                "give the configuration it was made with, or leave resume out"
            ) from error
        raise


def leave_results(
    job: TrainJob, trained: Trained, run_steps: Steps, *, title: str, timeline: Timeline | None = None
) -> None:
    """Write metrics, configuration and report into the run's folder, and print the table."""
    folder, evaluation = trained.folder, trained.evaluation
    _run.write_json(folder / "run.json", _run.provenance(job, trained.sources.fetched))
    if evaluation is not None:
        _run.write_json(folder / "metrics.json", evaluation.to_json())
        run_steps.console.print(evaluation_table(evaluation, where=f"{_run.shown(folder)}/metrics.json"))
    pack = trained.pack
    write_report(
        folder / "report.html",
        title=title,
        timelines=[] if timeline is None else [timeline],
        evaluation=evaluation,
        recipe=vars(pack.recipe),
        inputs=_run.inputs_table(trained.sources.fetched),
        config_yaml=_run.config_yaml(job),
        versions=_run.versions(),
        command=_run.command(),
        timings=run_steps.seconds,
        notes=[*trained.samples.lines, *(evaluation.notes if evaluation else [])],
        paths=None if pack.concepts is None else {name: pack.concepts.path(name) for name in pack.names},
    )
    _run.point_latest(folder)


def train(job: TrainJob) -> float | None:
    """Train a pack; returns what sweepers maximise (of an interpreter: top-1)."""
    if job.objective not in OBJECTIVES:
        raise ConfigError(f"objective={job.objective!r}; choose {', '.join(OBJECTIVES)}")
    run_steps = steps(console=Console(quiet=not first_rank()))
    if job.model is not None:
        return train_model(job, run_steps)
    trained = train_run(job, run_steps)
    if trained is None:
        return None
    leave_results(job, trained, run_steps, title=f"Lens pack {trained.pack.pack_id}")
    folder = _run.shown(trained.folder)
    windows = " mode=timeline" if job.hat.lens.reads_sequences else ""
    rows = {"report": f"{folder}/report.html", "pack": f"{folder}/pack"}
    rows["read with"] = f'ftw monitor prompt="..."{windows}'
    if any(trained.folder.glob("wandb/offline-*")):
        rows["to wandb"] = f"wandb sync {folder}/wandb/offline-*"
    run_steps.console.print(overview("Written", rows))
    return objective(job.objective, trained.pack, trained.evaluation)


def objective(kind: str, pack: LensPack, evaluation: Evaluation | None) -> float | None:
    """Mean AUROC that a sweep compares: of training rows out of fold, where the solver tells it, or of held-out rows.

    Raises:
        ConfigError: out-of-fold figures are asked for, and the solver gives none.
    """
    choices = [figures["choice"]["evidence"]["combined"] for figures in pack.metrics.values() if "choice" in figures]
    if choices and kind != "heldout":
        return float(np.nanmean(np.asarray(choices, dtype=float)))
    if kind == "out_of_fold":
        raise ConfigError(
            f"objective=out_of_fold: map.training.solver={pack.recipe.solver} tells no such figure; take "
            "solver=logistic, or objective=heldout (with data.heldout_part=dev, for instance)"
        )
    return None if evaluation is None else float(evaluation.mean["auroc"])


def train_model(job: TrainJob, run_steps: Steps) -> float | None:
    """Train an interpreter; returns the share of test texts whose concept it names first."""
    check_model(job)
    folder = _run.run_folder() if job.dry_run else _run.begin(job)
    _check_resume(job)
    with _resumable(job, folder):
        trained = interpreter_run(job, run_steps, folder=folder)
    if trained is None:
        return None
    shown = _run.shown(trained.folder)
    rows = {"figures": f"{shown}/metrics.json", "interpreter": f"{shown}/interpreter"}
    run_steps.console.print(overview("Written", {**rows, "read with": 'ftw interpret text="..."'}))
    kinds = [entry for kind, entry in trained.figures.items() if kind != "confused"]
    return float(kinds[0]["systems"]["interpreter"]["top1"]) if kinds else None


def main() -> None:
    """The verb, from the command line."""
    verb("train", train, TrainJob, data=DATA)


if __name__ == "__main__":
    main()
