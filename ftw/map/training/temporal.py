"""From sampled answers to a pack of sequence lenses: fit, calibrate, control, evaluate.

1. The lenses are fitted group by group, as many at once as memory holds, each stopping by its own held-out prompts.
2. Platt's calibration on those prompts, drawn towards the one that all lenses share, layer by layer and once more on
   the mean over layers; thresholds; percentiles on everyday answers, whole and as the truncated windows that a
   generation begins with.
3. Controls: words alone on the same answers, linear lenses on every token of which the highest counts, and the same
   family on shuffled labels.
4. All are judged on the prompts of split "test", which nothing above has seen.

Axes: S answers, N lenses, L layers, T tokens, W input width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.store import LensStack
from ftw.hat.temporal.bank import SequenceBank
from ftw.hat.temporal.trunk import Trunk
from ftw.hat.text_embedding import AnyText
from ftw.map import sequence_figures
from ftw.map.calibrate import background_quantiles, best_f1_threshold, fit_platt_together, fpr_threshold
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig, Evaluation, evaluate
from ftw.map.samples import SampleTable
from ftw.map.sequences import mark_kinds, near_kin
from ftw.map.training.fit import fitting
from ftw.map.training.sequence_data import SequenceDataModule, SequencePool, build_sequence_pool
from ftw.map.training.temporal_task import SequenceTask, SequenceTrainingConfig, joined

ANSWERS_AT_ONCE = 256
LONGEST_TRUNCATED = 5  # tokens of the first window of a generation
CONTROL = "token_max"
MakeTrainer = Callable[[int], pl.Trainer]


@dataclass(frozen=True)
class FittedSequences:
    """Calibrated lenses, other lenses by name that they are held against, and the same family on shuffled labels."""

    stack: LensStack
    controls: dict[str, LensStack] = field(default_factory=dict)
    shuffled: LensStack | None = None


def fit_sequences(
    pool: SequencePool,
    head: HeadConfig,
    training: SequenceTrainingConfig,
    *,
    trainer: MakeTrainer,
    seed: int = 0,
    checkpoint: str | None = None,
) -> LensStack:
    """The fitted and calibrated lenses of a pool.

    Args:
        trainer: makes a trainer for a group of lenses, by its number. checkpoint: of a run of one group to go on with.

    Raises:
        ConfigError: a checkpoint for several groups. DataError: no held-out prompts.
    """
    if not (pool.weights_SN[pool.held_out_S] > 0).any():
        raise DataError("no held-out prompts to stop and calibrate by; raise map.training.folds to 2 or more")
    size = len(pool.names) if head.family == "trunk_lstm" else max(1, training.lenses_at_once)
    groups = [slice(at, at + size) for at in range(0, len(pool.names), size)]
    if checkpoint is not None and len(groups) > 1:
        raise ConfigError(
            f"resume: {len(pool.names)} lenses are trained in {len(groups)} groups of {size}, which do not resume; "
            f"raise map.sequences.lenses_at_once to {len(pool.names)} or start anew"
        )
    parts = []
    for number, lenses in enumerate(groups):
        part = pool.of_lenses(lenses)
        task = SequenceTask(part, head=head, training=training, seed=seed)
        own = head.family != "trunk_lstm"
        data = SequenceDataModule(part, own=own, batch=training.batch if own else training.trunk_batch, seed=seed)
        with fitting():
            trainer(number).fit(task, datamodule=data, ckpt_path=checkpoint)
        parts.append((*task.cpu().held_out(), *task.fitted()))
    logits_SLN, used_SN = (torch.cat([part[place] for part in parts], dim=-1).numpy() for place in (0, 1))
    heads = [joined([part[2][layer] for part in parts]) for layer in range(len(pool.layers))]
    return _calibrated(pool, logits_SLN, used_SN, heads, parts[0][3])


def _calibrated(
    pool: SequencePool, logits_SLN: np.ndarray, used_SN: np.ndarray, heads: list[Head], trunk: Trunk | None
) -> LensStack:
    """The lenses with calibration and thresholds from their logits on held-out prompts."""
    kept_S = used_SN.any(axis=1)  # nothing hangs on the other answers
    logits_SLN, used_SN = logits_SLN[kept_S], used_SN[kept_S]
    marks = pool.labels_SN.cpu().numpy()[kept_S], np.where(used_SN, pool.weights_SN.cpu().numpy()[kept_S], 0)
    layers = [fit_platt_together(logits_SLN[:, at], *marks, prior=0.5) for at in range(len(pool.layers))]
    mean_SN = np.mean([fit.scale_N * logits_SLN[:, at] + fit.offset_N for at, fit in enumerate(layers)], axis=0)
    last = fit_platt_together(mean_SN, *marks, prior=0.5)
    final_SN = last.scale_N * mean_SN + last.offset_N
    alarm_N = np.nan_to_num(fpr_threshold(final_SN, *marks), nan=np.inf).clip(max=1e30)
    return LensStack(
        names=pool.names,
        layers=pool.layers,
        heads=heads,
        scale_NL=_tensor(np.stack([last.scale_N * fit.scale_N for fit in layers], axis=1)),
        offset_NL=_tensor(np.stack([last.scale_N * fit.offset_N + last.offset_N for fit in layers], axis=1)),
        threshold_N=_tensor(np.nan_to_num(best_f1_threshold(final_SN, *marks))),
        threshold_1fpr_N=_tensor(alarm_N),
        basis=pool.basis,
        trunk=trunk,
    )


def read_answers(bank: SequenceBank, encyclopedia: Encyclopedia, rows: np.ndarray, *, most: int = 0) -> np.ndarray:
    """Logits of some answers, [S, N]; NaN for empty ones.

    Args:
        most: only the first so many tokens of each are read; 0: all.
    """
    parts = []
    for at in range(0, len(rows), ANSWERS_AT_ONCE):
        part = rows[at : at + ANSWERS_AT_ONCE]
        states = [encyclopedia.token_states(layer, part) for layer in bank.layers]
        offsets: Tensor = torch.from_numpy(states[0][1])
        lengths_S = offsets.diff().clamp_max(most) if most else offsets.diff()
        x_TLD = torch.stack([torch.from_numpy(layer_TD[0]).float() for layer_TD in states], dim=1)
        size = max(1, int(lengths_S.max()))
        padded = torch.zeros(len(part), size, *x_TLD.shape[1:])
        for row, (start, length) in enumerate(zip(offsets.tolist(), lengths_S.tolist(), strict=False)):
            padded[row, :length] = x_TLD[start : start + length]
        with torch.inference_mode():
            parts.append(bank.logits(padded, lengths_S).numpy())
    return np.concatenate(parts) if parts else np.zeros((0, len(bank)), dtype=np.float32)


def with_window_percentiles(stack: LensStack, encyclopedia: Encyclopedia) -> LensStack:
    """The stack with quantiles of its logits on everyday answers; as it is where there are none."""
    rows = encyclopedia.table.where("background")
    if not len(rows):
        return stack
    bank = stack.sequence_bank().stored()
    logits = [read_answers(bank, encyclopedia, rows, most=most) for most in (0, LONGEST_TRUNCATED)]
    logits_SN = np.concatenate(logits)
    logits_SN = logits_SN[np.isfinite(logits_SN).all(axis=1)]
    if not len(logits_SN):
        return stack
    quantiles_NQ, levels_Q = background_quantiles(logits_SN)
    return replace(stack, quantiles_NQ=_tensor(quantiles_NQ), levels_Q=_tensor(levels_Q))


def shuffled_stack(
    pool: SequencePool, head: HeadConfig, training: SequenceTrainingConfig, *, trainer: MakeTrainer, seed: int
) -> LensStack:
    """The same fit on labels permuted among the answers of each concept."""
    generator = torch.Generator().manual_seed(seed + 1)
    labels_SN = pool.labels_SN.clone()
    for held_out in (False, True):
        for lens, rows_K in enumerate(pool.rows_of_lenses(held_out=held_out)):
            labels_SN[rows_K, lens] = labels_SN[rows_K[torch.randperm(len(rows_K), generator=generator)], lens]
    return fit_sequences(replace(pool, labels_SN=labels_SN), head, training, trainer=trainer, seed=seed)


def evaluate_sequences(
    stack: LensStack,
    encyclopedia: Encyclopedia,
    *,
    config: EvaluateConfig,
    concepts: ConceptPack | None = None,
    words: SampleTable | None = None,
    text: AnyText | None = None,
    controls: dict[str, LensStack] | None = None,
    shuffled: LensStack | None = None,
) -> Evaluation:
    """Figures on the test prompts of an encyclopedia, beside the controls; accuracies by kind of negative as notes.

    Args:
        concepts: whose siblings tell the kinds of negatives apart.
        words: the table with the answers' words, for `text`. controls: further lenses by name.
        shuffled: lenses trained on permuted labels.

    Raises:
        DataError: there are no test answers.
    """
    table = encyclopedia.table
    rows = table.where("test")
    rows = rows[np.diff(encyclopedia.token_states(stack.layers[0], rows)[1]) > 0] if len(rows) else rows
    if not len(rows):
        raise DataError("no test answers to evaluate on; collect with data.test_fraction above 0")
    labels_SN, weights_SN = table.matrices(rows)
    kinds_SN = mark_kinds(table, rows, _siblings(table, concepts))
    scores: dict[str, Any] = {"activation": read_answers(stack.sequence_bank().stored(), encyclopedia, rows)}
    if text is not None and words is not None:
        scores["text"] = text.score([words.texts[row] for row in rows]).numpy()
    for name, control in (controls or {}).items():
        scores[name] = read_answers(control.sequence_bank().stored(), encyclopedia, rows)
    groups = [table.groups[row] for row in rows]
    marks = {"labels_SN": labels_SN, "weights_SN": weights_SN, "kinds_SN": kinds_SN, "groups": groups}
    by_kind = sequence_figures.accuracies(scores, **marks, draws=config.draws, seed=config.seed)
    if shuffled is not None:
        scores["shuffled"] = read_answers(shuffled.sequence_bank().stored(), encyclopedia, rows)[None]
    judged_SN = np.where(kinds_SN == sequence_figures.KINDS.index("negated"), 0, weights_SN)
    evaluation = evaluate(
        scores,
        labels=labels_SN,
        weights=judged_SN,
        groups=groups,
        concepts=stack.names,
        probabilities=1 / (1 + np.exp(-scores["activation"])),
        thresholds={"threshold": stack.threshold_N.numpy(), "threshold_1": stack.threshold_1fpr_N.numpy()},
        config=config,
    )
    evaluation.mean.update(sequence_figures.flat(by_kind))
    evaluation.notes.extend(sequence_figures.lines(by_kind))
    return evaluation


def fit_and_control(
    encyclopedia: Encyclopedia,
    head: HeadConfig,
    training: SequenceTrainingConfig,
    *,
    folds: int,
    basis_rank: int,
    trainer: MakeTrainer,
    quiet: MakeTrainer,
    with_shuffled: bool,
    seed: int,
    checkpoint: str | None = None,
) -> FittedSequences:
    """The lenses with percentiles; the token-wise control (unless they are that) and shuffled labels, for test rows."""
    pool = build_sequence_pool(encyclopedia, folds=folds, basis_rank=basis_rank, seed=seed)
    stack = fit_sequences(pool, head, training, trainer=trainer, seed=seed, checkpoint=checkpoint)
    stack = with_window_percentiles(stack, encyclopedia)
    if not len(encyclopedia.table.where("test")):
        return FittedSequences(stack)
    controls = {}
    if head.family != CONTROL:
        controls[CONTROL] = fit_sequences(pool, HeadConfig(family=CONTROL), training, trainer=quiet, seed=seed)
    control = shuffled_stack(pool, head, training, trainer=quiet, seed=seed) if with_shuffled else None
    return FittedSequences(stack, controls, control)


def _siblings(table: SampleTable, concepts: ConceptPack | None) -> list[list[int]]:
    place = {name: index for index, name in enumerate(table.concepts)}
    if concepts is None:
        return [[] for _ in table.concepts]
    return [[place[name] for name in near_kin(concepts, one) if name in place] for one in table.concepts]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
