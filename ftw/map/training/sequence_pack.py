"""What `ftw train hat/lens=lstm` (or gru, attention, trunk_lstm) makes: sequence lenses with controls, as a pack.

Axes: S answers, N lenses.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl

from ftw.hat.store import LensStack
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import Evaluation
from ftw.map.pack import LensPack, Recipe, head_fields
from ftw.map.samples import SampleTable
from ftw.map.sequences import NEGATED
from ftw.map.text_control import fit_text_bank
from ftw.map.training.callbacks import log_evaluation, log_pack, quiet_trainer
from ftw.map.training.temporal import evaluate_sequences, fit_and_control
from ftw.substrate.model import Substrate

if TYPE_CHECKING:
    from ftw.map.training.train import FitConfig

EPOCHS = 40
CALIBRATION = "Platt per layer on held-out prompts, mean over layers, Platt again; balanced prior"


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
    built: list[pl.Trainer] = []

    def make(number: int) -> pl.Trainer:
        if trainer is None or number:  # loggers and checkpoints are those of the first group
            epochs = built[0].max_epochs if built else EPOCHS
            return quiet_trainer(epochs or EPOCHS)
        built.append(trainer([]))
        return built[0]

    step("lenses")
    stack, controls, shuffled = fit_and_control(
        encyclopedia,
        config.head,
        config.sequences,
        folds=config.training.folds,
        basis_rank=config.training.basis_rank,
        trainer=make,
        quiet=lambda _: quiet_trainer((built[0].max_epochs if built else EPOCHS) or EPOCHS),
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
            stack,
            encyclopedia,
            config=config.evaluate,
            concepts=concepts,
            words=words,
            text=text,
            controls=controls,
            shuffled=shuffled,
        )
    pack = LensPack(
        pack_id=config.pack_id,
        version=config.version,
        stack=stack,
        recipe=_recipe(stack, encyclopedia, config, substrate),
        levels={name: concepts[name].level if concepts is not None and name in concepts else 0 for name in stack.names},
        concepts=concepts,
        text=text,
        metrics={} if evaluation is None else evaluation.to_json()["concepts"],
        provenance=provenance,
    )
    if folder is not None:
        pack.save(folder)
    if built and evaluation is not None:
        log_evaluation(built[0].loggers, evaluation)
    if built and folder is not None:
        log_pack(built[0].loggers, folder, pack)
    return pack, evaluation


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
        pooling="sequence",
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
