"""From fitted lenses to a pack: text lenses, states and words together, controls, figures, recipe.

Every solver ends here, so that all are judged alike.

Axes: N lenses.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ftw.hat.lens import Head
from ftw.hat.store import LensStack
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import Evaluation
from ftw.map.metrics import auroc
from ftw.map.pack import PER_LENS, LensPack, Recipe, head_fields
from ftw.map.text_control import fit_text_lenses
from ftw.map.training.combine import Choice
from ftw.map.training.fit import evaluate_stack
from ftw.map.training.lens_rows import LensRows
from ftw.map.training.stacked import stack_with_text
from ftw.substrate.model import Substrate


@dataclass(frozen=True)
class Fitted:
    """What a solver gives.

    Attributes:
        stack: calibrated, with thresholds and percentiles. solver: its name.
        shuffled: makes the controls: for each permutation of the labels one head a layer.
        lenses, held_out, choices: of the recipe: rows of each lens, its out-of-fold logits on them, what was chosen.
        shrinkage: of the closed form, in texts. details: of graduation and siblings, by lens. notes: the same told.
    """

    stack: LensStack
    solver: str
    shuffled: Callable[[], list[list[Head]]]
    lenses: list[LensRows] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    shrinkage: float = 0.0
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def finish(
    fitted: Fitted,
    encyclopedia: Encyclopedia,
    config: Any,
    *,
    substrate: Substrate,
    concepts: ConceptPack | None,
    provenance: dict[str, Any],
    step: Callable[[str], None],
) -> tuple[LensPack, Evaluation | None]:
    """The pack of fitted lenses, and its figures on the test rows where there are some.

    Args:
        config: a `FitConfig`. step: told what is being done.
    """
    table, training, evaluation, stack = encyclopedia.table, config.training, None, fitted.stack
    step("text lenses")
    texts = visible_texts(encyclopedia, substrate)
    text = fit_text_lenses(replace(table, texts=texts), config.text, progress=False)
    if stack.pooling is not None:
        both_N3 = stack_with_text(fitted.lenses, fitted.held_out, text.held_out)
        stack = replace(stack, pooling=replace(stack.pooling, both_N3=both_N3))
        fitted = replace(fitted, choices=_with_words(fitted, text.held_out, both_N3))
    if len(table.where("test")):
        step("shuffled labels")
        control = fitted.shuffled() if training.num_shuffles else None
        step("evaluate")
        evaluation = evaluate_stack(
            stack,
            encyclopedia,
            config=config.evaluate,
            pool=training.pool,
            text=text.bank,
            texts=texts,
            shuffled=control,
        )
        for name, choice in fitted.choices.items():
            evaluation.concepts[name]["choice"] = asdict(choice)
        for name, found in fitted.details.items():
            evaluation.concepts[name] |= found
        evaluation.notes += fitted.notes
    pack = LensPack(
        pack_id=config.pack_id,
        version=config.version,
        stack=stack,
        recipe=_recipe(fitted, encyclopedia, config, substrate),
        levels={name: concepts[name].level if concepts and name in concepts else 0 for name in stack.names},
        concepts=concepts,
        text=text.bank,
        metrics=_metrics(fitted, evaluation),
        mean_metrics={} if evaluation is None else evaluation.to_json()["mean"],
        provenance=provenance,
    )
    return pack, evaluation


def _with_words(fitted: Fitted, held_out: list[np.ndarray], both_N3: Tensor) -> dict[str, Choice]:
    """The choices with what the words alone are worth out of fold, and what weight they got beside the states."""
    choices = {}
    for rows, logits_S, both in zip(fitted.lenses, held_out, both_N3.tolist(), strict=True):
        choice, known_S = fitted.choices[rows.name], np.isfinite(logits_S)
        columns = (values[known_S, None] for values in (logits_S, rows.labels, rows.sibling_weights()))
        area = float(auroc(*columns)[0]) if known_S.any() else float("nan")
        choices[rows.name] = replace(choice, evidence={**choice.evidence, "text": area}, text_weight=both[1])
    return choices


def visible_texts(encyclopedia: Encyclopedia, substrate: Substrate) -> list[str]:
    """The texts as far as the substrate read them: words that it never saw must not help the text lenses."""
    table, limit = encyclopedia.table, encyclopedia.spec.max_tokens
    texts = list(table.texts)
    for row in np.flatnonzero(encyclopedia.num_tokens >= limit - 1).tolist():
        token_ids = substrate.encode(texts[row], max_tokens=limit)
        texts[row] = str(substrate.tokenizer.decode(token_ids[1:]))
    return texts


def _metrics(fitted: Fitted, evaluation: Evaluation | None) -> dict[str, dict[str, Any]]:
    if evaluation is not None:
        return evaluation.to_json()["concepts"]
    return fitted.details or {name: {"choice": asdict(choice)} for name, choice in fitted.choices.items()}


def _recipe(fitted: Fitted, encyclopedia: Encyclopedia, config: Any, substrate: Substrate) -> Recipe:
    spec, table, training = encyclopedia.spec, encyclopedia.table, config.training
    per_lens = fitted.stack.pooling is not None
    return Recipe(
        substrate=substrate.name,
        fingerprint=substrate.fingerprint,
        width=substrate.width,
        dtype=substrate.dtype,
        precision=spec.precision,
        layers=list(spec.layers),
        pooling=PER_LENS if per_lens else training.pool,
        max_tokens=spec.max_tokens,
        basis_rank=training.basis_rank,
        solver=fitted.solver,
        l2=training.l2 if fitted.solver == "adamw" else 0.0,
        penalties=list(training.penalties) if per_lens else [],
        shrinkage=fitted.shrinkage,
        folds=training.folds,
        seed=config.seed,
        num_texts=len(table),
        encyclopedia=table.content_hash(),
        **head_fields(fitted.stack),
    )
