"""How sure a reader is of each concept, and what it takes it for: what decides where further contexts go.

Two judges. "interpreter" trains one (`ftw.map.training.interpreter`) and asks it about the training samples that it did
not learn from; where a concept has none of those, about all its samples. "nearest_mean" trains nothing: the posterior
over the concepts' means at one layer, each sample left out of its own mean.

Axes: S samples, N concepts, L layers, D model width, B samples of a block, K confused concepts kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.interpreter import Interpreter, Slot, calibrated
from ftw.map.growing.store import GrowingEncyclopedia, Rows
from ftw.map.training.interpreter import InterpreterFit, read_logits, train_interpreter
from ftw.map.training.interpreter_data import TEST, TRAIN, InterpreterRows

JUDGES = ("interpreter", "nearest_mean")
MOST_CONFUSED = 5
BLOCK_ROWS = 2048
TEMPERATURES = torch.logspace(-2, 2, 41)


@dataclass(frozen=True)
class Judgement:
    """What a reader makes of each concept.

    Attributes:
        confidence_N: mean over the concept's samples of 1 - H / ln N.
        margin_N: mean of the largest posterior minus the second.
        confused_with: for each concept the others that its samples are taken for, most first.
        judged: words about the reader.
    """

    confidence_N: np.ndarray
    margin_N: np.ndarray
    confused_with: list[list[int]]
    judged: dict[str, Any] = field(default_factory=dict)


Judge = Callable[[GrowingEncyclopedia, int], Judgement]  # of an encyclopedia, with a seed


def judge_of(kind: str, fit: InterpreterFit) -> Judge:
    """The judge of a name.

    Raises:
        ConfigError: there is no such judge.
    """
    if kind == "nearest_mean":
        return lambda growing, seed: nearest_mean(growing)
    if kind == "interpreter":
        return lambda growing, seed: by_interpreter(growing, fit, seed)
    raise ConfigError(f"confidence={kind!r} is unknown; choose from {', '.join(JUDGES)}")


def judge(growing: GrowingEncyclopedia, judge: Judge, seed: int = 0) -> Judgement:
    """Let a judge read the encyclopedia, and keep what it says in it."""
    found = judge(growing, seed)
    growing.set_confidence(found.confidence_N, found.confused_with, **found.judged)
    return found


# --- nearest mean ---------------------------------------------------------------------------------------------------


def nearest_mean(growing: GrowingEncyclopedia, layer: int | None = None) -> Judgement:
    """The judgement of the nearest mean, at one layer (default: the middle one).

    p(concept | x) is a softmax of -|x - mean|² / 2s over standardised states, s chosen by likelihood. A concept's only
    sample cannot be left out of its mean: there the typical distance of a sample from its concept's mean stands in,
    which is measured on concepts with more, or else taken from the nearest other mean.
    """
    layer = growing.layers[len(growing.layers) // 2] if layer is None else layer
    moments, rows = growing.moments(layer), growing.rows()
    if not len(rows):
        raise DataError(f"encyclopedia {growing.name!r} has no samples to judge; run ftw encyclopedia bootstrap")
    known = moments.count > 0
    scale_D = moments.mean[known].std(axis=0).clip(1e-4)
    mean_ND = torch.from_numpy(moments.mean / scale_D).float()
    x_SD = torch.from_numpy(growing.states(rows, [layer])[:, 0] / scale_D).float()
    label_S, count_N = torch.from_numpy(rows.concept.astype(np.int64)), torch.from_numpy(moments.count)
    spread = (moments.m2 / scale_D**2).sum(axis=1)[moments.count > 1] / (moments.count[moments.count > 1] - 1)
    typical = float(np.median(spread)) if len(spread) else None
    distances = _Distances(mean_ND, count_N, torch.from_numpy(known), typical)
    scale = _likeliest_scale(distances, x_SD, label_S)
    sums = _Sums.empty(len(growing))
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        chance_BN = (-distances.of(x_SD[part], label_S[part]) / (2 * scale)).softmax(dim=1)
        sums.add(chance_BN, label_S[part])
    return sums.judgement(by="nearest_mean", layer=layer)


@dataclass(frozen=True)
class _Distances:
    """Squared distances of samples from the means, own samples left out of their own."""

    mean_ND: Tensor
    count_N: Tensor
    known_N: Tensor
    typical: float | None

    def of(self, x_BD: Tensor, label_B: Tensor) -> Tensor:
        square_BN = torch.cdist(x_BD, self.mean_ND) ** 2
        square_BN[:, ~self.known_N] = torch.inf
        rows, count_B = torch.arange(len(x_BD)), self.count_N[label_B].float()
        # x - mean without x = (x - mean) n / (n - 1)
        own_B = square_BN[rows, label_B] * (count_B / (count_B - 1).clamp_min(1)) ** 2
        alone_B = count_B < 2
        if alone_B.any():
            others_BN = square_BN.clone()
            others_BN[rows, label_B] = torch.inf
            near_B = others_BN.min(dim=1).values if self.typical is None else torch.full_like(own_B, self.typical)
            own_B = torch.where(alone_B, near_B, own_B)
        square_BN[rows, label_B] = own_B
        return square_BN


def _likeliest_scale(distances: _Distances, x_SD: Tensor, label_S: Tensor) -> float:
    """The scale s at which some of the samples, evenly spaced, are likeliest."""
    chosen = torch.arange(0, len(x_SD), max(1, len(x_SD) // BLOCK_ROWS))[:BLOCK_ROWS]
    square_BN = distances.of(x_SD[chosen], label_S[chosen])
    typical = square_BN.gather(1, label_S[chosen, None]).median().clamp_min(1e-6)
    losses = [torch.nn.functional.cross_entropy(-square_BN / (2 * typical * t), label_S[chosen]) for t in TEMPERATURES]
    return float(typical * TEMPERATURES[int(torch.stack(losses).argmin())])


# --- interpreter ----------------------------------------------------------------------------------------------------


def by_interpreter(growing: GrowingEncyclopedia, fit: InterpreterFit, seed: int = 0) -> Judgement:
    """Train an interpreter on the samples so far, and judge by it."""
    rows = interpreter_rows(growing, growing.rows()).with_validation(seed)
    interpreter = train_interpreter(rows, replace(fit, seed=seed))
    return judgement_of(interpreter, rows)


def judgement_of(interpreter: Interpreter, rows: InterpreterRows) -> Judgement:
    """What an interpreter makes of each concept, on unseen rows where a concept has some, else on all."""
    unseen_S = np.asarray(rows.parts) != TRAIN
    has_unseen_N = np.bincount(rows.labels_S[torch.from_numpy(unseen_S)].numpy(), minlength=len(rows.names)) > 0
    used = np.flatnonzero(unseen_S | ~has_unseen_N[rows.labels_S.numpy()])
    sums = _Sums.empty(len(rows.names))
    for start in range(0, len(used), BLOCK_ROWS):
        part = rows.select(used[start : start + BLOCK_ROWS])
        sums.add(calibrated(read_logits(interpreter, part), interpreter.temperature), part.labels_S)
    return sums.judgement(by="interpreter", unseen=int(has_unseen_N.sum()))


def interpreter_rows(growing: GrowingEncyclopedia, rows: Rows, *, test: Rows | None = None) -> InterpreterRows:
    """Samples of a growing encyclopedia as an interpreter takes them, test rows behind those to learn from."""
    every = rows if test is None else Rows.joined([rows, test])
    return InterpreterRows(
        names=growing.concepts,
        slots=[Slot(layer, "mean") for layer in growing.layers],
        states_STD=torch.from_numpy(growing.states(every)),
        labels_S=torch.from_numpy(every.concept.astype(np.int64)),
        groups=every.groups,
        parts=[TRAIN] * len(rows) + [TEST] * (len(every) - len(rows)),
        kinds=["named" if named else "unnamed" for named in every.named],
        texts=every.texts,
        fingerprint=growing.spec.fingerprint,
    )


# --- both -----------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over the samples of each concept: confidence, margin, number; and chances given to other concepts."""

    figures_3N: np.ndarray
    confused: list[dict[int, float]]

    @classmethod
    def empty(cls, num: int) -> "_Sums":
        return cls(np.zeros((3, num)), [{} for _ in range(num)])

    def add(self, chance_BN: Tensor, label_B: Tensor) -> None:
        """Count the posteriors of some samples."""
        entropy_B = -(chance_BN * chance_BN.clamp_min(1e-30).log()).sum(dim=1)
        confidence_B = 1 - entropy_B / np.log(max(2, chance_BN.shape[1]))
        best = chance_BN.topk(min(MOST_CONFUSED + 1, chance_BN.shape[1]), dim=1)
        margin_B = best.values[:, 0] - best.values[:, 1] if chance_BN.shape[1] > 1 else torch.ones(len(chance_BN))
        label = label_B.numpy()
        for number, values_B in enumerate((confidence_B.clamp(0, 1), margin_B, torch.ones(len(label)))):
            np.add.at(self.figures_3N[number], label, values_B.double().numpy())
        for own, others, chances in zip(label.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
            for other, chance in zip(others, chances, strict=True):
                if other != own:
                    self.confused[own][other] = self.confused[own].get(other, 0.0) + chance

    def judgement(self, **judged: Any) -> Judgement:
        """Means over the samples."""
        count_N = np.where(self.figures_3N[2] > 0, self.figures_3N[2], np.nan)
        ranked = [sorted(found, key=lambda other, found=found: (-found[other], other)) for found in self.confused]
        confidence_N, margin_N = self.figures_3N[0] / count_N, self.figures_3N[1] / count_N
        return Judgement(confidence_N, margin_N, [others[:MOST_CONFUSED] for others in ranked], judged)
