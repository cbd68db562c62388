"""Train a lens pack from an encyclopedia: everything `ftw train` does once states are there, and the same from Python.

Axes: N lenses.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.store import LensStack
from ftw.map.collect import CollectConfig, collect
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig, Evaluation
from ftw.map.pack import LensPack, Recipe, head_fields
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.text_control import TextConfig, fit_text_bank
from ftw.map.training.callbacks import LensBankCallback, log_pack, quiet_trainer
from ftw.map.training.data import EncyclopediaDataModule, Pool
from ftw.map.training.fit import build_task, evaluate_stack, fit_shuffled, fitting, with_percentiles
from ftw.map.training.lens_task import LensTask, TrainingConfig
from ftw.map.training.solver import choose_shrinkage, solve_shuffled, solve_stack
from ftw.map.training.sparse import read_sparse_pool
from ftw.substrate.model import Substrate

EPOCHS = 80
SOLVERS = ("adamw", "lda")
Shuffled = Callable[[], list[list[Head]]]


@dataclass(kw_only=True)
class FitConfig:
    """Everything that decides a fit, besides the states.

    Attributes:
        head: family. training: how it is fitted. text: the text lenses. evaluate: figures and intervals.
        pack_id, version: of the pack. seed: of folds, batches, initial weights and controls.
    """

    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
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
) -> tuple[LensPack, Evaluation | None]:
    """Fit, calibrate, control and evaluate the lenses of an encyclopedia.

    Args:
        trainer: makes the Lightning trainer from the callbacks it must have; default: a quiet one.
        folder: where the pack is saved. checkpoint: of a run to go on with.
        watch_prompt: read during training, for the loggers. step: told what is being done.

    Returns:
        The pack, and its evaluation; None where the table has no test rows.

    Raises:
        EncyclopediaError: the states are of another substrate. DataError: a concept of one class, or no training rows.
        KeyboardInterrupt: on Ctrl-C; with a checkpoint callback the run can go on.
    """
    encyclopedia.check_substrate(substrate.name, substrate.fingerprint)
    if config.training.solver not in SOLVERS:
        raise ConfigError(f"map.training.solver={config.training.solver!r}; choose {' or '.join(SOLVERS)}")

    def pack_of(stack: LensStack, shuffled: Shuffled, shrinkage: float = 0.0) -> tuple[LensPack, Evaluation | None]:
        made = replace(config, training=replace(config.training, shrinkage=shrinkage))
        return _finish(stack, shuffled, encyclopedia, made, substrate, concepts, provenance or {}, step)

    if config.training.solver == "lda":
        pack, evaluation = _solve(encyclopedia, config, pack_of, step)
        if folder is not None:
            pack.save(folder)
        return pack, evaluation

    def finish(stack: LensStack, pool: Pool, task: LensTask) -> tuple[LensPack, Evaluation | None]:
        return pack_of(stack, lambda: _shuffled_by_descent(pool, task, config))

    quiet_lightning()
    data = EncyclopediaDataModule(encyclopedia, config.training, seed=config.seed)
    task = build_task(data.pool, config.head, config.training, seed=config.seed)
    callback = LensBankCallback(encyclopedia, finish, folder=folder, watch_prompt=watch_prompt, substrate=substrate)
    built = trainer([callback]) if trainer else quiet_trainer(EPOCHS, callbacks=[callback])
    with fitting():
        built.fit(task, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    assert callback.pack is not None  # made when fitting ends
    if folder is not None:
        log_pack(built.loggers, folder, callback.pack)
    return callback.pack, callback.evaluation


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
    capture = collect_config or CollectConfig()
    if not len(table.where("background")):
        # Percentiles need tokens to rank against; without a background split a few of each training text serve.
        capture = replace(capture, tokens_per_text={**capture.tokens_per_text, "train": 4})
    with collect(substrate, table, capture, progress=progress) as encyclopedia:
        return train_pack(encyclopedia, config or FitConfig(), substrate=substrate)[0]


def quiet_lightning() -> None:
    """Lightning's own start-up lines (devices, tips) tell an FTW user nothing."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _solve(
    encyclopedia: Encyclopedia, config: FitConfig, pack_of: Callable[..., Any], step: Callable[[str], None]
) -> tuple[LensPack, Evaluation | None]:
    """Linear lenses in closed form: no epochs, no checkpoint, memory for marked pairs only."""
    training = config.training
    if config.head.family != "linear" or config.head.hidden or training.basis_rank:
        raise ConfigError(
            "map.training.solver=lda fits linear heads on full states; leave out hidden units and basis_rank"
        )
    pool = read_sparse_pool(encyclopedia, folds=training.folds, pool=training.pool, seed=config.seed)
    step("shrinkage")
    shrinkage = training.shrinkage or choose_shrinkage(pool, seed=config.seed)
    step("lenses")
    stack = with_percentiles(solve_stack(pool, shrinkage=shrinkage, seed=config.seed), encyclopedia)

    def shuffled() -> list[list[Head]]:
        return solve_shuffled(pool, num_shuffles=training.num_shuffles, shrinkage=shrinkage, seed=config.seed)

    return pack_of(stack, shuffled, shrinkage)


def _shuffled_by_descent(pool: Pool, task: LensTask, config: FitConfig) -> list[list[Head]]:
    epochs = max(1, int(task.best_epoch.float().mean()) + 1)
    return fit_shuffled(pool, config.head, config.training, epochs=epochs, trainer=quiet_trainer, seed=config.seed)


def _finish(
    stack: LensStack,
    shuffled: Shuffled,
    encyclopedia: Encyclopedia,
    config: FitConfig,
    substrate: Substrate,
    concepts: ConceptPack | None,
    provenance: dict[str, Any],
    step: Callable[[str], None],
) -> tuple[LensPack, Evaluation | None]:
    spec, table, evaluation = encyclopedia.spec, encyclopedia.table, None
    step("text lenses")
    text = fit_text_bank(table, config.text, progress=False)
    if len(table.where("test")):
        step("shuffled labels")
        control = shuffled() if config.training.num_shuffles else None
        step("evaluate")
        evaluation = evaluate_stack(
            stack, encyclopedia, config=config.evaluate, pool=config.training.pool, text=text, shuffled=control
        )
    recipe = Recipe(
        substrate=substrate.name,
        fingerprint=substrate.fingerprint,
        width=substrate.width,
        dtype=substrate.dtype,
        precision=spec.precision,
        layers=list(spec.layers),
        pooling=config.training.pool,
        max_tokens=spec.max_tokens,
        basis_rank=config.training.basis_rank,
        solver=config.training.solver,
        l2=0.0 if config.training.solver == "lda" else config.training.l2,
        shrinkage=config.training.shrinkage,
        folds=config.training.folds,
        seed=config.seed,
        num_texts=len(table),
        encyclopedia=table.content_hash(),
        **head_fields(stack),
    )
    levels = {name: concepts[name].level if concepts is not None and name in concepts else 0 for name in stack.names}
    pack = LensPack(
        pack_id=config.pack_id,
        version=config.version,
        stack=stack,
        recipe=recipe,
        levels=levels,
        concepts=concepts,
        text=text,
        metrics={} if evaluation is None else evaluation.to_json()["concepts"],
        provenance=provenance,
    )
    return pack, evaluation


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
