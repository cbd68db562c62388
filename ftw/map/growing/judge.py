"""How sure a reader is of each concept, and what it takes it for: what decides where further contexts go.

All concepts are judged alike: on sentences that nothing is learnt from (`ftw.map.growing.rounds.add_judging`). Two
judges. "interpreter" trains some on the training samples (`ftw.map.training.interpreter`), with those sentences as
their validation. "nearest_mean" trains nothing: the posterior over the concepts' means at one layer.

Axes: S samples, N concepts, L layers, D model width, B samples of a block.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.interpreter import Interpreter, Slot, calibrated
from ftw.map.growing.rows import Rows
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.training.interpreter import InterpreterFit, read_logits, train_interpreter
from ftw.map.training.interpreter_data import DEV, TEST, TRAIN, InterpreterRows

JUDGES = ("interpreter", "nearest_mean")
MOST_CONFUSED = 5
BLOCK_ROWS = 2048
TEMPERATURES = torch.logspace(-2, 2, 41)


@dataclass(frozen=True)
class Judgement:
    """What a reader makes of each concept.

    Attributes:
        confidence_N: mean over the concept's samples of 1 - H / ln N.
        doubt_N: mean over them of the entropy H, of several readers that of their disagreement, in nats: what is
            refined first.
        confused_with: for each concept the others that its samples are taken for, most first.
        judged: words about the reader.
    """

    confidence_N: np.ndarray
    doubt_N: np.ndarray
    confused_with: list[list[int]]
    judged: dict[str, Any] = field(default_factory=dict)


Judge = Callable[[GrowingEncyclopedia, int], Judgement]  # of an encyclopedia, with a seed


def judge_of(kind: str, fit: InterpreterFit, readers: int = 1) -> Judge:
    """The judge of a name, for "interpreter" so many of them.

    Raises:
        ConfigError: there is no such judge, or none of them.
    """
    if readers < 1:
        raise ConfigError(f"readers={readers}: give one or more; two or more also tell where they disagree")
    if kind == "nearest_mean":
        return lambda growing, seed: nearest_mean(growing)
    if kind == "interpreter":
        return lambda growing, seed: by_interpreter(growing, fit, seed, readers=readers)
    raise ConfigError(f"confidence={kind!r} is unknown; choose from {', '.join(JUDGES)}")


def judge(growing: GrowingEncyclopedia, judge: Judge, seed: int = 0) -> Judgement:
    """Let a judge read the encyclopedia, and keep what it says in it."""
    found = judge(growing, seed)
    growing.set_confidence(found.confidence_N, found.doubt_N, found.confused_with, **found.judged)
    return found


# --- nearest mean ---------------------------------------------------------------------------------------------------


def nearest_mean(growing: GrowingEncyclopedia, layer: int | None = None) -> Judgement:
    """The judgement of the nearest mean, at one layer (default: the middle one).

    p(concept | x) is a softmax of -|x - mean|² / s over standardised states; what all sentences have more than the
    means is taken off first, and s is the likeliest.
    """
    layer = growing.layers[len(growing.layers) // 2] if layer is None else layer
    moments, rows = growing.moments(layer), judging_rows(growing)
    known = moments.count > 0
    scale_D = moments.mean[known].std(axis=0).clip(1e-4)
    mean_ND = torch.from_numpy((moments.mean - moments.mean[known].mean(axis=0)) / scale_D).float()
    states_SD = growing.states(rows, [layer])[:, 0].astype(np.float64)
    x_SD = torch.from_numpy((states_SD - states_SD.mean(axis=0)) / scale_D).float()
    label_S, unknown_N = torch.from_numpy(rows.concept.astype(np.int64)), torch.from_numpy(~known)

    def square(part: slice) -> Tensor:
        return (torch.cdist(x_SD[part], mean_ND) ** 2).masked_fill(unknown_N, torch.inf)

    scale = _likeliest_scale(square(slice(BLOCK_ROWS)), label_S[:BLOCK_ROWS])
    sums = _Sums.empty(len(growing))
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        sums.add(*together([(-square(part) / scale).softmax(dim=1)]), label_S[part])
    return sums.judgement(by="nearest_mean", layer=layer)


def judging_rows(growing: GrowingEncyclopedia) -> Rows:
    """The sentences that concepts are judged on.

    Raises:
        DataError: there are none.
    """
    rows = growing.rows(split="background")
    if not len(rows):
        raise DataError(f"encyclopedia {growing.name!r} has no sentences to judge by; run ftw encyclopedia judge")
    return rows


def _likeliest_scale(square_BN: Tensor, label_B: Tensor) -> float:
    """The scale of squared distances at which the samples are likeliest."""
    typical = square_BN.gather(1, label_B[:, None]).median().clamp_min(1e-6)
    losses = [torch.nn.functional.cross_entropy(-square_BN / (typical * t), label_B) for t in TEMPERATURES]
    return float(typical * TEMPERATURES[int(torch.stack(losses).argmin())])


# --- interpreter ----------------------------------------------------------------------------------------------------


def by_interpreter(growing: GrowingEncyclopedia, fit: InterpreterFit, seed: int = 0, *, readers: int = 1) -> Judgement:
    """Train interpreters of different seeds on the samples so far, and judge by all of them."""
    rows = interpreter_rows(growing, growing.rows(), dev=judging_rows(growing))
    trained = [train_interpreter(rows, replace(fit, seed=seed + number)) for number in range(readers)]
    return judgement_of(trained, rows.select(rows.where(DEV)))


def judgement_of(interpreters: Sequence[Interpreter], rows: InterpreterRows) -> Judgement:
    """What interpreters make of each concept on some rows."""
    sums = _Sums.empty(len(rows.names))
    for start in range(0, len(rows), BLOCK_ROWS):
        part = rows.select(np.arange(start, min(start + BLOCK_ROWS, len(rows))))
        chances = (calibrated(read_logits(reader, part), reader.temperature) for reader in interpreters)
        sums.add(*together(chances), part.labels_S)
    return sums.judgement(by="interpreter", readers=len(interpreters))


def interpreter_rows(
    growing: GrowingEncyclopedia, rows: Rows, *, dev: Rows | None = None, test: Rows | None = None
) -> InterpreterRows:
    """Samples of a growing encyclopedia as an interpreter takes them: those to learn from, then dev, then test."""
    parts = {TRAIN: rows, **{name: part for name, part in ((DEV, dev), (TEST, test)) if part is not None}}
    every = Rows.joined(list(parts.values()))
    return InterpreterRows(
        names=growing.concepts,
        slots=[Slot(layer, "mean") for layer in growing.layers],
        states_STD=torch.from_numpy(growing.states(every)),
        labels_S=torch.from_numpy(every.concept.astype(np.int64)),
        groups=every.groups,
        parts=[name for name, part in parts.items() for _ in range(len(part))],
        kinds=["named" if named else "unnamed" for named in every.named],
        texts=every.texts,
        fingerprint=growing.spec.fingerprint,
    )


# --- both -----------------------------------------------------------------------------------------------------------


def together(chances: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of several readers' posteriors [B, N], and how they doubt, [B] in nats.

    Doubt is the entropy of the mean that is not in the members, their disagreement; of one reader it is its entropy.

    Source: Houlsby et al. 2011, Bayesian active learning for classification and preference learning.
    """
    num, sum_BN, within_B = 0, torch.zeros(()), torch.zeros(())
    for chance_BN in chances:
        num, sum_BN, within_B = num + 1, sum_BN + chance_BN, within_B + entropy(chance_BN)
    mean_BN = sum_BN / num
    doubt_B = entropy(mean_BN)
    return mean_BN, doubt_B if num == 1 else (doubt_B - within_B / num).clamp_min(0)


def entropy(chance_BN: Tensor) -> Tensor:
    """Entropy of each posterior, [B] in nats."""
    return torch.special.entr(chance_BN).sum(dim=1)


@dataclass
class _Sums:
    """Sums over the samples of each concept: confidence, doubt, number; and chances given to other concepts."""

    figures_3N: np.ndarray
    confused: list[dict[int, float]]

    @classmethod
    def empty(cls, num: int) -> "_Sums":
        return cls(np.zeros((3, num)), [{} for _ in range(num)])

    def add(self, chance_BN: Tensor, doubt_B: Tensor, label_B: Tensor) -> None:
        """Count the posteriors of some samples, and how they are doubted."""
        confidence_B = 1 - entropy(chance_BN) / np.log(max(2, chance_BN.shape[1]))
        best = chance_BN.topk(min(MOST_CONFUSED + 1, chance_BN.shape[1]), dim=1)
        label = label_B.numpy()
        for number, values_B in enumerate((confidence_B.clamp(0, 1), doubt_B, torch.ones(len(label)))):
            np.add.at(self.figures_3N[number], label, values_B.double().numpy())
        for own, others, chances in zip(label.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
            for other, chance in zip(others, chances, strict=True):
                if other != own:
                    self.confused[own][other] = self.confused[own].get(other, 0.0) + chance

    def judgement(self, **judged: Any) -> Judgement:
        """Means over the samples."""
        count_N = np.where(self.figures_3N[2] > 0, self.figures_3N[2], np.nan)
        ranked = [sorted(found, key=lambda other, found=found: (-found[other], other)) for found in self.confused]
        confidence_N, doubt_N = self.figures_3N[0] / count_N, self.figures_3N[1] / count_N
        return Judgement(confidence_N, doubt_N, [others[:MOST_CONFUSED] for others in ranked], judged)
