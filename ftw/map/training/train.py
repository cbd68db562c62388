"""Train a lens pack from an encyclopedia: everything `ftw train` does once states are there, and the same from Python.

Axes: N lenses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.pooling import STATE_POOLS
from ftw.hat.store import LensStack
from ftw.map.collect import CollectConfig, collect
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig, Evaluation
from ftw.map.leaks import LeakConfig, LeakReport, check_leaks
from ftw.map.pack import LensPack
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.text_control import TextConfig
from ftw.map.training.callbacks import LensBankCallback, log_evaluation, log_pack, quiet_lightning, quiet_trainer
from ftw.map.training.data import EncyclopediaDataModule, Pool
from ftw.map.training.finish import Fitted, finish
from ftw.map.training.fit import build_task, fit_shuffled, fitting, with_percentiles
from ftw.map.training.graduation import GraduationConfig
from ftw.map.training.lens_rows import lens_rows
from ftw.map.training.lens_task import LensTask, TrainingConfig
from ftw.map.training.recipe import shuffled_recipe, solve_recipe
from ftw.map.training.refined import check_refinement, refined
from ftw.map.training.sequence_pack import train_sequence_pack
from ftw.map.training.siblings import SiblingConfig
from ftw.map.training.solver import choose_shrinkage, solve_shuffled
from ftw.map.training.sparse import read_sparse_pool
from ftw.map.training.temporal_task import SequenceTrainingConfig
from ftw.substrate.model import Substrate

EPOCHS = 80
SOLVERS = ("logistic", "adamw", "lda")


@dataclass(kw_only=True)
class FitConfig:
    """Everything that decides a fit, besides the states.

    Attributes:
        head: family. training: how it is fitted. text: the text lenses. evaluate: figures and intervals.
        sequences: how sequence lenses are fitted. leaks: what is looked for before.
        graduation, siblings: how lenses grow, and are told apart, where `training` asks for it.
        pack_id, version: of the pack. seed: of folds, batches, initial weights and controls.
    """

    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sequences: SequenceTrainingConfig = field(default_factory=SequenceTrainingConfig)
    leaks: LeakConfig = field(default_factory=LeakConfig)
    graduation: GraduationConfig = field(default_factory=GraduationConfig)
    siblings: SiblingConfig = field(default_factory=SiblingConfig)
    pack_id: str = "lenses"
    version: str = "0.1.0"
    seed: int = 0


def train_pack(
    encyclopedia: Encyclopedia,
    config: FitConfig,
    *,
    substrate: Substrate,
    concepts: ConceptPack | None = None,
    trainer: Callable[[list[pl.Callback]], pl.Trainer] | None = None,
    folder: Path | None = None,
    checkpoint: Path | None = None,
    provenance: dict[str, Any] | None = None,
    watch_prompt: str | None = None,
    step: Callable[[str], None] = lambda _: None,
    leaks: LeakReport | None = None,
    validation: Encyclopedia | None = None,
) -> tuple[LensPack, Evaluation | None]:
    """Fit, calibrate, control and evaluate the lenses of an encyclopedia.

    Args:
        trainer: makes the Lightning trainer from the callbacks it must have; default: a quiet one.
        folder: where the pack is saved. checkpoint: of a run to go on with.
        watch_prompt: read during training, for the loggers. step: told what is being done.
        leaks: of the table, where they were looked for already.
        validation: whose test texts decide on graduation and refinement, where those are asked for.

    Returns:
        The pack, and its evaluation; None where the table has no test rows.

    Raises:
        EncyclopediaError: the states are of another substrate. DataError: a concept of one class, or no training rows.
        LeakError: texts or groups on both sides of the split, and `config.leaks` does not allow them.
        KeyboardInterrupt: on Ctrl-C; with a checkpoint callback the run can go on.
    """
    encyclopedia.check_substrate(substrate.name, substrate.fingerprint)
    quiet_lightning()
    run = _Run(
        encyclopedia=encyclopedia,
        config=config,
        substrate=substrate,
        concepts=concepts,
        trainer=trainer,
        folder=folder,
        checkpoint=checkpoint,
        provenance=provenance or {},
        watch_prompt=watch_prompt,
        step=step,
        validation=validation,
    )
    _check_family(run)
    if leaks is None:
        leaks = check_leaks(encyclopedia.table, leak_config(config, sampled=encyclopedia.spec.sampling is not None))
    if config.head.reads_sequences:
        pack, evaluation = run.sequences()
    else:
        pack, evaluation = run.by_descent() if solver_of(config) == "adamw" else run.in_closed_form()
    if evaluation is not None:
        evaluation.notes.append(leaks.line())
    return pack, evaluation


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The arguments of `train_pack`, and the three ways from states to a pack."""

    encyclopedia: Encyclopedia
    config: FitConfig
    substrate: Substrate
    concepts: ConceptPack | None
    trainer: Callable[[list[pl.Callback]], pl.Trainer] | None
    folder: Path | None
    checkpoint: Path | None
    provenance: dict[str, Any]
    watch_prompt: str | None
    step: Callable[[str], None]
    validation: Encyclopedia | None

    def sequences(self) -> tuple[LensPack, Evaluation | None]:
        """Sequence lenses on sampled answers."""
        return train_sequence_pack(
            self.encyclopedia,
            self.config,
            substrate=self.substrate,
            concepts=self.concepts,
            trainer=self.trainer,
            folder=self.folder,
            checkpoint=self.checkpoint,
            provenance=self.provenance,
            step=self.step,
        )

    def in_closed_form(self) -> tuple[LensPack, Evaluation | None]:
        """The recipe, or discriminants: no epochs."""
        config, solver = self.config, solver_of(self.config)
        if self.checkpoint is not None:
            raise ConfigError(
                f"resume: map.training.solver={solver} takes a moment and leaves no checkpoint; leave resume out, "
                "or take the solver that the checkpoint was made with"
            )
        # Built first: what is wrong with its options should be said before the work.
        loggers = [] if self.trainer is None else self.trainer([]).loggers
        if not config.training.pools:
            pools = ["mean"] if self.concepts is not None else list(STATE_POOLS)
            config = replace(config, training=replace(config.training, pools=pools))
        fitted = _recipe(self.encyclopedia, config, self.step) if solver == "logistic" else _closed_form(self, config)
        pack, evaluation = self._finish(fitted, config)
        if self.folder is not None:
            pack.save(self.folder)
            log_pack(loggers, self.folder, pack)
        if evaluation is not None:
            log_evaluation(loggers, evaluation)
        return pack, evaluation

    def by_descent(self) -> tuple[LensPack, Evaluation | None]:
        """Heads of any family, by Lightning."""
        config = self.config

        def of_task(stack: LensStack, pool: Pool, task: LensTask) -> tuple[LensPack, Evaluation | None]:
            return self._finish(Fitted(stack, "adamw", lambda: _shuffled_by_descent(pool, task, config)), config)

        data = EncyclopediaDataModule(self.encyclopedia, config.training, seed=config.seed)
        task = build_task(data.pool, config.head, config.training, seed=config.seed)
        callback = LensBankCallback(
            self.encyclopedia, of_task, folder=self.folder, watch_prompt=self.watch_prompt, substrate=self.substrate
        )
        built = self.trainer([callback]) if self.trainer else quiet_trainer(EPOCHS, callbacks=[callback])
        with fitting():
            built.fit(task, datamodule=data, ckpt_path=None if self.checkpoint is None else str(self.checkpoint))
        assert callback.pack is not None  # made when fitting ends
        if self.folder is not None:
            log_pack(built.loggers, self.folder, callback.pack)
        return callback.pack, callback.evaluation

    def _finish(self, fitted: Fitted, config: FitConfig) -> tuple[LensPack, Evaluation | None]:
        return finish(
            fitted,
            self.encyclopedia,
            config,
            substrate=self.substrate,
            concepts=self.concepts,
            provenance=self.provenance,
            step=self.step,
        )


def _check_family(run: _Run) -> None:
    """Refuse what lenses of this family cannot be trained on, before the work."""
    head, training = run.config.head, run.config.training
    if head.reads_sequences:
        return
    if run.encyclopedia.spec.sampling:
        raise ConfigError(
            f"hat.lens.family={head.family!r} reads pooled states, and sampled answers have none; "
            "choose hat/lens=lstm, gru, attention, trunk_lstm or token_max"
        )
    check_refinement(training, solver_of(run.config), run.concepts, run.validation)


def leak_config(config: FitConfig, *, sampled: bool) -> LeakConfig:
    """What is looked for; prompts are alike by construction, and their answers are what lenses read."""
    return replace(config.leaks, similarity=0.0) if sampled else config.leaks


def solver_of(config: FitConfig) -> str:
    """The solver of a configuration, "auto" resolved: the recipe for linear heads on full states, else descent.

    Raises:
        ConfigError: no such solver, or one that does not fit such heads.
    """
    training, solver = config.training, config.training.solver
    plain = config.head.family == "linear" and not config.head.hidden and not training.basis_rank
    if solver == "auto":
        return "logistic" if plain else "adamw"
    if solver not in SOLVERS:
        raise ConfigError(f"map.training.solver={solver!r}; choose auto, {', '.join(SOLVERS)}")
    if solver != "adamw" and not plain:
        raise ConfigError(
            f"map.training.solver={solver} fits linear heads on full states; leave out hidden units and basis_rank, "
            "or take map.training.solver=adamw"
        )
    return solver


def train_lenses(
    substrate: Substrate,
    data: SampleTable | tuple[Sequence[str], Sequence[int]],
    *,
    concept: str = "concept",
    collect_config: CollectConfig | None = None,
    config: FitConfig | None = None,
    progress: bool = True,
) -> LensPack:
    """Train lenses from a sample table, or one lens from texts and labels.

    Args:
        data: a table, or (texts, labels 0/1); every fourth of the latter's texts is held out for the figures.
        concept: name of the lens when texts and labels are given.

    Returns:
        A lens pack; `pack.metrics` has its held-out figures. States are kept under `$FTW_HOME` and used again.

    Raises:
        DataError: texts and labels of unequal length, or of one class.
    """
    table = data if isinstance(data, SampleTable) else _table(*data, concept=concept)
    config, capture = config or FitConfig(), collect_config or CollectConfig()
    leaks = check_leaks(table, config.leaks)
    if not len(table.where("background")) and not capture.tokens_per_text.get("train"):
        # Percentiles need tokens to rank against; without a background split a few of each training text serve.
        capture = replace(capture, tokens_per_text={**capture.tokens_per_text, "train": 4})
    with collect(substrate, table, capture, progress=progress) as encyclopedia:
        return train_pack(encyclopedia, config, substrate=substrate, leaks=leaks)[0]


def _recipe(encyclopedia: Encyclopedia, config: FitConfig, step: Callable[[str], None]) -> Fitted:
    """Penalty and pools chosen for each lens."""
    training, lenses = config.training, lens_rows(encyclopedia.table)
    step("lenses")
    solved = solve_recipe(
        encyclopedia,
        lenses,
        pools=training.pools,
        combine=training.combine,
        penalties=training.penalties,
        folds=training.folds,
        seed=config.seed,
    )

    def shuffled() -> list[list[Head]]:
        return shuffled_recipe(encyclopedia, lenses, solved.choices, num=training.num_shuffles, seed=config.seed)

    stack = with_percentiles(solved.stack, encyclopedia)
    return Fitted(stack, "logistic", shuffled, lenses, solved.held_out, solved.choices)


def _closed_form(run: _Run, config: FitConfig) -> Fitted:
    """Linear lenses in closed form: no epochs, no checkpoint, memory for marked pairs only."""
    training, encyclopedia = config.training, run.encyclopedia
    check_refinement(training, "lda", run.concepts, run.validation)
    pool = read_sparse_pool(encyclopedia, folds=training.folds, pool=training.pool, seed=config.seed)
    run.step("shrinkage")
    shrinkage = training.shrinkage or choose_shrinkage(pool, seed=config.seed)
    run.step("lenses")
    made = refined(
        pool,
        encyclopedia,
        config,
        shrinkage=shrinkage,
        concepts=run.concepts,
        validation=run.validation,
        step=run.step,
    )

    def shuffled() -> list[list[Head]]:
        return solve_shuffled(made.pool, num_shuffles=training.num_shuffles, shrinkage=shrinkage, seed=config.seed)

    stack = with_percentiles(made.stack, encyclopedia)
    return Fitted(stack, "lda", shuffled, shrinkage=shrinkage, details=made.details, notes=made.notes)


def _shuffled_by_descent(pool: Pool, task: LensTask, config: FitConfig) -> list[list[Head]]:
    epochs = max(1, int(task.best_epoch.float().mean()) + 1)
    return fit_shuffled(pool, config.head, config.training, epochs=epochs, trainer=quiet_trainer, seed=config.seed)


def _table(texts: Sequence[str], labels: Sequence[int], *, concept: str) -> SampleTable:
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels; give one label a text")
    builder, seen = SampleTableBuilder([concept]), {0: 0, 1: 0}
    splits: dict[str, str] = {}  # a text given twice must not be trained on and tested on
    for text, label in zip(texts, labels, strict=True):
        if label not in (0, 1):
            raise DataError(f"label {label!r} of text {text[:40]!r}: labels are 0 and 1")
        if text not in splits:
            splits[text] = "test" if seen[int(label)] % 4 == 3 else "train"
            seen[int(label)] += 1
        row = builder.text(text, group=text, split=splits[text], source="given")
        builder.mark(row, concept, int(label))
    return builder.build()
