"""What `ftw train hat/lens=lstm` (or gru, attention, trunk_lstm) makes: sequence lenses with controls, as a pack.

Axes: S answers, N lenses.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from ftw.hat.store import LensStack
from ftw.hat.text_embedding import AnyText
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import Evaluation
from ftw.map.pack import LensPack, Recipe, head_fields
from ftw.map.recipe import SEQUENCE
from ftw.map.samples import SampleTable
from ftw.map.sequences import NEGATED
from ftw.map.text_control import fit_text_bank
from ftw.map.training.callbacks import log_evaluation, log_pack, quiet_trainer
from ftw.map.training.temporal import evaluate_sequences, fit_and_control
from ftw.substrate.model import Substrate

if TYPE_CHECKING:
    from ftw.map.training.train import FitConfig

EPOCHS = 40
CALIBRATION = (
    "Platt drawn towards that of all lenses, per layer on held-out prompts; mean over layers; again; balanced prior"
)


def train_sequence_pack(
    encyclopedia: Encyclopedia,
    config: "FitConfig",
    *,
    substrate: Substrate,
    concepts: ConceptPack | None,
    trainer: Callable[[list[pl.Callback]], pl.Trainer] | None,
    folder: Path | None,
    checkpoint: Path | None,
    provenance: dict[str, Any],
    step: Callable[[str], None],
) -> tuple[LensPack, Evaluation | None]:
    """Fit, calibrate, control and evaluate sequence lenses (arguments as `train_pack`)."""
    trainers = _Trainers(trainer)
    step("lenses")
    fitted = fit_and_control(
        encyclopedia,
        config.head,
        config.sequences,
        folds=config.training.folds,
        basis_rank=config.training.basis_rank,
        trainer=trainers.of_group,
        quiet=trainers.quiet,
        with_shuffled=config.training.num_shuffles > 0,
        seed=config.seed,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    step("text lenses")
    words = spoken(encyclopedia, substrate)
    text = fit_text_bank(words, config.text, progress=False)
    evaluation = None
    if len(encyclopedia.table.where("test")):
        step("evaluate")
        evaluation = evaluate_sequences(
            fitted.stack,
            encyclopedia,
            config=config.evaluate,
            concepts=concepts,
            words=words,
            text=text,
            controls=fitted.controls,
            shuffled=fitted.shuffled,
        )
    recipe = _recipe(fitted.stack, encyclopedia, config, substrate)
    pack = _pack(fitted.stack, config, recipe, concepts=concepts, text=text, evaluation=evaluation, origin=provenance)
    if folder is not None:
        pack.save(folder)
        log_pack(trainers.loggers, folder, pack)
    if evaluation is not None:
        log_evaluation(trainers.loggers, evaluation)
    return pack, evaluation


class _Trainers:
    """Trainers for groups of lenses: loggers and checkpoints are those of the first, epochs of all."""

    def __init__(self, make: Callable[[list[pl.Callback]], pl.Trainer] | None) -> None:
        self._make, self._first = make, list[pl.Trainer]()

    @property
    def loggers(self) -> list[Logger]:
        return self._first[0].loggers if self._first else []

    def of_group(self, number: int) -> pl.Trainer:
        if self._make is None or number:
            return self.quiet(number)
        self._first.append(self._make([]))
        return self._first[0]

    def quiet(self, _: int) -> pl.Trainer:
        epochs = self._first[0].max_epochs if self._first else None
        return quiet_trainer(epochs or EPOCHS)


def _pack(
    stack: LensStack,
    config: "FitConfig",
    recipe: Recipe,
    *,
    concepts: ConceptPack | None,
    text: AnyText,
    evaluation: Evaluation | None,
    origin: dict[str, Any],
) -> LensPack:
    figures = {} if evaluation is None else evaluation.to_json()
    return LensPack(
        pack_id=config.pack_id,
        version=config.version,
        stack=stack,
        recipe=recipe,
        levels={name: concepts[name].level if concepts is not None and name in concepts else 0 for name in stack.names},
        concepts=concepts,
        text=text,
        metrics=figures.get("concepts", {}),
        mean_metrics=figures.get("mean", {}),
        provenance=origin,
    )


def spoken(encyclopedia: Encyclopedia, substrate: Substrate) -> SampleTable:
    """The table with the words of the answers in place of the prompts; answers to negated prompts have no marks."""
    table = encyclopedia.table
    if not encyclopedia.spec.sampling:
        return table
    ids = encyclopedia.answers(np.arange(len(table)))
    texts = substrate.tokenizer.batch_decode(ids, skip_special_tokens=True)
    kept = np.array([table.sources[row] != NEGATED for row in table.rows], dtype=bool)
    marks = {name: getattr(table, name)[kept] for name in ("rows", "cols", "labels", "weights")}
    return replace(table, texts=[text.strip() for text in texts], **marks)


def _recipe(stack: LensStack, encyclopedia: Encyclopedia, config: "FitConfig", substrate: Substrate) -> Recipe:
    spec, table = encyclopedia.spec, encyclopedia.table
    longest = int((spec.sampling or {}).get("max_new_tokens", spec.max_tokens))
    return Recipe(
        substrate=substrate.name,
        fingerprint=substrate.fingerprint,
        width=substrate.width,
        dtype=substrate.dtype,
        precision=spec.precision,
        layers=list(spec.layers),
        pooling=SEQUENCE,
        max_tokens=longest,
        basis_rank=config.training.basis_rank,
        calibration=CALIBRATION,
        solver="adamw",
        folds=config.training.folds,
        seed=config.seed,
        num_texts=len(table),
        encyclopedia=table.content_hash(),
        **head_fields(stack),
    )
