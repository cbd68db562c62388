"""Linear lenses in closed form: thousands at once, in minutes, without a dense table of labels.

1. States are standardised by the training rows. Σ is their covariance, λ̄ the mean of its eigenvalues; one
   eigen-decomposition a layer and fold serves all lenses.
2. A lens is the direction w = (Σ + κ/m λ̄ I)⁻¹ (μ₊ − μ₋): Fisher's discriminant, shrunk. μ₊ and μ₋ are the weighted
   means of its marked texts and m is how many they are worth, 1/m = 1/m₊ + 1/m₋. In Ledoit and Wolf's terms Σ is shrunk
   to λ̄ I with intensity κ/(κ + m): a lens of three examples is close to the difference of its means, one of a thousand
   close to Fisher's. The rule is Σ⁻¹ times the posterior mean of μ₊ − μ₋, observed in noise Σ/m under a prior of
   covariance Σ²/(κλ̄); κ is one number for all lenses, chosen by out-of-fold AUROC on training rows.
3. The total covariance serves where Fisher has the one within classes: they differ by a multiple of δδᵀ, which changes
   the length of w and not its direction (Sherman and Morrison 1950). Length and offset are set so that a lens reads its
   negatives as mean 0 and unit variance, which makes copies of a lens comparable across folds.
4. Each mark is scored by the copy that was fitted without its fold. Platt's calibration per layer, mean over layers,
   Platt's calibration again, thresholds: as for `LensTask`, on marked pairs alone. A lens with few out-of-fold
   positives borrows from a calibration shared by all (its own has weight n/(n + 20), n of them).

Sources: Fisher 1936, The use of multiple measurements in taxonomic problems; Ledoit & Wolf 2004, A well-conditioned
estimator for large-dimensional covariance matrices; Platt 1999, Probabilistic outputs for support vector machines;
Efron & Morris 1973, Stein's estimation rule and its competitors.

Axes: S training texts, N lenses, n lenses of one part, L layers, D model width, K folds, E marks, e marks of one part,
M marks of the fullest lens of a part, C shrinkages tried.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from ftw.errors import DataError
from ftw.hat.lens import Head
from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.map.calibrate import best_f1_threshold, fit_platt, fpr_threshold
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc, usable, weights_at_prior
from ftw.map.training.sparse import (
    ClassSums,
    Marks,
    SparsePool,
    class_sums,
    padded_parts,
    read_sparse_pool,
    score_marks,
)

# Prior strengths tried, in texts; the best lay at 40 to 80 for 3, for 3 to 10 and for 60 and more positives a concept.
SHRINKAGES = (5.0, 15.0, 40.0, 100.0, 250.0, 1000.0)
DEFAULT_SHRINKAGE = 50.0
# Lenses that decide on shrinkage and on the shared calibration: enough for a mean AUROC good to 0.001.
SAMPLE_LENSES = 256
# A lens of this many out-of-fold positives trusts its own calibration as much as the shared one: between 10 and 30 the
# Brier score is lowest on training folds that the calibration has not seen, with 3, 3 to 10 and 60 positives alike.
SHARED_EXAMPLES = 20.0
# Memory of one part beside states and marks.
BUDGET_BYTES = 256 << 20


def solve_stack(
    source: Encyclopedia | SparsePool,
    *,
    folds: int = 4,
    shrinkage: float | None = None,
    pool: str = "mean",
    seed: int = 0,
    budget_bytes: int = BUDGET_BYTES,
    progress: bool = True,
) -> LensStack:
    """Calibrated linear lenses with thresholds for every concept of an encyclopedia; no percentiles yet.

    Args:
        source: an encyclopedia, or a pool read from it (then `folds`, `pool` and `seed` are the pool's).
        folds: groups of texts left out in turn; 0 calibrates on the training rows.
        shrinkage: κ, in texts; None lets `choose_shrinkage` choose.
        budget_bytes: memory of intermediate tables, beside 2·S·L·D bytes of states and 21 bytes a mark with its logits.

    Returns:
        A stack whose heads read layer-normed states. `ftw.map.training.fit.with_percentiles` adds percentiles.

    Raises:
        DataError: as `read_sparse_pool` and `fit_platt` say, or a shrinkage below 0.
    """
    ready = _ready(source, folds, pool, seed)
    with _progress("solving lenses", progress, ready, rounds=1) as advance:
        chosen = choose_shrinkage(ready, seed=seed) if shrinkage is None else shrinkage
        logits_LE = np.empty((len(ready.layers), len(ready.marks.rows_E)), dtype=np.float32)
        heads: list[Head] = []
        for layer in range(len(ready.layers)):
            space = _space(ready, layer)
            weight_ND, bias_N = np.empty((len(ready.names), space.width), dtype=np.float32), np.empty(len(ready.names))
            for start, stop in _parts(ready, budget_bytes):
                marks = ready.marks.part(start, stop)
                positive, negative = _two_sums(space.x_SD, marks, ready)
                weight_ND[start:stop], bias_N[start:stop], _ = _direction(space, None, positive, negative, chosen)
                span = slice(ready.marks.starts_N[start], ready.marks.starts_N[stop])
                logits_LE[layer, span] = _out_of_fold(space, marks, ready, positive, negative, chosen)
                advance(stop - start)
            heads.append(space.head(weight_ND, bias_N))
    return _calibrated(ready, heads, logits_LE, budget_bytes, seed)


def solve_shuffled(
    source: Encyclopedia | SparsePool,
    *,
    num_shuffles: int = 5,
    shrinkage: float = DEFAULT_SHRINKAGE,
    pool: str = "mean",
    seed: int = 0,
    budget_bytes: int = BUDGET_BYTES,
    progress: bool = True,
) -> list[list[Head]]:
    """Control lenses: the same solution on labels permuted among the marked texts of each concept.

    A permutation costs only the sums over its new positives: the sum over all marks of a lens stays. Marks count alike,
    for a weight belongs to a true negative.

    Returns:
        `num_shuffles` lists of one head a layer, reading layer-normed states; not calibrated.
    """
    ready = _ready(source, 0, pool, seed)
    heads: list[list[Head]] = [[] for _ in range(num_shuffles)]
    with _progress("solving controls", progress, ready, rounds=num_shuffles) as advance:
        for layer in range(len(ready.layers)):
            space, num_lenses = _space(ready, layer), len(ready.names)
            weight_PND = np.empty((num_shuffles, num_lenses, space.width), dtype=np.float32)
            bias_PN = np.empty((num_shuffles, num_lenses))
            for start, stop in _parts(ready, budget_bytes):
                marks = ready.marks.part(start, stop)
                marks = Marks(
                    rows_E=marks.rows_E,
                    positive_E=marks.positive_E,
                    weights_E=np.ones_like(marks.weights_E),
                    starts_N=marks.starts_N,
                )
                every = class_sums(space.x_SD, marks, ready, positives_only=False)
                for p in range(num_shuffles):
                    permuted = marks.permuted(seed=seed + 1 + p, first_lens=start)
                    positive = class_sums(space.x_SD, permuted, ready, positives_only=True)
                    solved = _direction(space, None, positive, every.minus(positive), shrinkage)
                    weight_PND[p, start:stop], bias_PN[p, start:stop], _ = solved
                    advance(stop - start)
            for p in range(num_shuffles):
                heads[p].append(space.head(weight_PND[p], bias_PN[p]))
    return heads


def choose_shrinkage(
    source: Encyclopedia | SparsePool,
    *,
    folds: int = 4,
    pool: str = "mean",
    seed: int = 0,
    candidates: tuple[float, ...] = SHRINKAGES,
) -> float:
    """The κ of highest out-of-fold AUROC on training rows, mean over layers and up to 256 lenses drawn by seed.

    Only lenses with positives and negatives in two folds or more can tell; without any (or without folds) it is 50.
    """
    ready = _ready(source, folds, pool, seed)
    index_n = _sampled_lenses(ready, seed)
    if not len(index_n) or not ready.num_folds:
        return DEFAULT_SHRINKAGE
    marks = ready.marks.lenses(index_n)
    area_C = np.zeros(len(candidates))
    for layer in range(len(ready.layers)):
        space = _space(ready, layer)
        positive, negative = _two_sums(space.x_SD, marks, ready)
        for place, candidate in enumerate(candidates):
            logits_e = _out_of_fold(space, marks, ready, positive, negative, candidate)
            area_C[place] += _mean_auroc(marks, logits_e)
    return candidates[int(area_C.argmax())]


@dataclass(frozen=True)
class _Eigen:
    """Covariance of the rows that one copy is fitted on: values_D ascending, vectors_DD in columns."""

    values_D: np.ndarray
    vectors_DD: np.ndarray


@dataclass(frozen=True)
class _Space:
    """Standardised states of one layer, and the covariance without each fold (by number) and of all rows (None)."""

    x_SD: np.ndarray
    center_D: np.ndarray
    scale_D: np.ndarray
    eigen: dict[int | None, _Eigen]

    @property
    def width(self) -> int:
        return self.x_SD.shape[1]

    def head(self, weight_ND: np.ndarray, bias_N: np.ndarray) -> Head:
        """The head that reads layer-normed states."""
        head = LinearHead(len(weight_ND), self.width)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight_ND))
            head.bias.copy_(torch.from_numpy(bias_N))
        return head.fold_inputs(torch.from_numpy(self.center_D), torch.from_numpy(self.scale_D))


def _space(ready: SparsePool, layer: int) -> _Space:
    x_SD = ready.states_SLD[:, layer].astype(np.float32)
    center_D = x_SD.mean(axis=0, dtype=np.float64).astype(np.float32)
    # The floor that `build_pool` has: a feature that never moves stays as it is instead of becoming noise.
    scale_D = x_SD.std(axis=0, dtype=np.float64).astype(np.float32).clip(1e-4)
    x_SD -= center_D
    x_SD /= scale_D
    folds = [x_SD[start:stop] for start, stop in zip(ready.fold_starts_K[:-1], ready.fold_starts_K[1:], strict=True)]
    grams = [(part.T @ part).astype(np.float64) for part in folds]
    sums = [part.sum(axis=0, dtype=np.float64) for part in folds]
    eigen: dict[int | None, _Eigen] = {}
    for fold in (None, *range(ready.num_folds)):
        kept = [each for each in range(len(folds)) if each != fold]
        count = max(1, sum(len(folds[each]) for each in kept))
        mean_D = np.sum([sums[each] for each in kept], axis=0) / count
        covariance_DD = np.sum([grams[each] for each in kept], axis=0) / count - np.outer(mean_D, mean_D)
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
        eigen[fold] = _Eigen(values_D.clip(0).astype(np.float32), vectors_DD.astype(np.float32))
    return _Space(x_SD, center_D, scale_D, eigen)


def _two_sums(x_SD: np.ndarray, marks: Marks, ready: SparsePool) -> tuple[ClassSums, ClassSums]:
    """Sums over positives and over negatives."""
    positive = class_sums(x_SD, marks, ready, positives_only=True)
    return positive, class_sums(x_SD, marks, ready, positives_only=False).minus(positive)


def _direction(
    space: _Space, fold: int | None, positive: ClassSums, negative: ClassSums, shrinkage: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [n, D] and bias [n] of the copy without a fold, and which lenses have both classes there; else 0."""
    if shrinkage < 0:
        raise DataError(f"shrinkage={shrinkage}: it counts texts and is 0 or more (50 is usual)")
    high_nD, high_n, high_square_n = positive.without(fold)
    low_nD, low_n, low_square_n = negative.without(fold)
    # Weights are above 0, but differences of float32 sums are not exact.
    both_n = (high_n > 1e-6) & (low_n > 1e-6)
    low_mean_nD = low_nD / np.where(both_n, low_n, 1)[:, None].astype(np.float32)
    gap_nD = high_nD / np.where(both_n, high_n, 1)[:, None].astype(np.float32) - low_mean_nD
    worth_n = 1 / np.where(both_n, high_square_n / high_n.clip(1e-6) ** 2 + low_square_n / low_n.clip(1e-6) ** 2, 1)
    eigen = space.eigen[fold]
    mean_value = max(float(eigen.values_D.mean()), 1e-12)
    ridge_n1 = (shrinkage / worth_n)[:, None].astype(np.float32) * mean_value
    # 1e-6: with shrinkage 0, directions in which no text moves must not blow up.
    turned_nD = (gap_nD @ eigen.vectors_DD) / (eigen.values_D + ridge_n1 + 1e-6 * mean_value)
    spread_n = np.sqrt((turned_nD**2 * eigen.values_D).sum(axis=1)).clip(1e-12)
    weight_nD = (turned_nD @ eigen.vectors_DD.T) / spread_n[:, None]
    weight_nD[~both_n] = 0
    return weight_nD, -(weight_nD * low_mean_nD).sum(axis=1), both_n


def _out_of_fold(
    space: _Space, marks: Marks, ready: SparsePool, positive: ClassSums, negative: ClassSums, shrinkage: float
) -> np.ndarray:
    """Logit of every mark by the copy without its fold, NaN where that copy has one class only: float32 [e]."""
    copies: list[int | None] = list(range(ready.num_folds)) or [None]
    solved = [_direction(space, fold, positive, negative, shrinkage) for fold in copies]
    weight_KnD, bias_Kn, both_Kn = (np.stack(each) for each in zip(*solved, strict=True))
    logits_e = score_marks(space.x_SD, marks, ready, weight_KnD, bias_Kn)
    if not both_Kn.all():
        lens_e = np.repeat(np.arange(marks.num_lenses), marks.counts_N)
        logits_e[~both_Kn[ready.fold_of(marks.rows_E), lens_e]] = np.nan
    return logits_e


def _sampled_lenses(ready: SparsePool, seed: int) -> np.ndarray:
    """Lenses drawn by seed from those with out-of-fold positives and negatives."""
    marks, num_lenses, num_folds = ready.marks, len(ready.names), max(ready.num_folds, 1)
    bag_E = np.repeat(np.arange(num_lenses, dtype=np.int32), marks.counts_N) * num_folds + ready.fold_of(marks.rows_E)
    enough_N = np.ones(num_lenses, dtype=bool)
    for class_E in (marks.positive_E, ~marks.positive_E):
        counts_NK = np.bincount(bag_E[class_E], minlength=num_lenses * num_folds).reshape(num_lenses, num_folds)
        enough_N &= (counts_NK > 0).sum(axis=1) >= min(2, num_folds)
    able = np.flatnonzero(enough_N)
    return np.sort(np.random.default_rng(seed).permutation(able)[:SAMPLE_LENSES])


def _mean_auroc(marks: Marks, logits_e: np.ndarray) -> float:
    areas = []
    for _, place_Mn, used_Mn in padded_parts(marks, budget_bytes=BUDGET_BYTES):
        table = _Table.of(marks, logits_e[None], place_Mn, used_Mn)
        areas.append(auroc(table.logits_LMn[0], table.labels_Mn, table.weights_Mn))
    area_n = np.concatenate(areas)
    return float(area_n[np.isfinite(area_n)].mean()) if np.isfinite(area_n).any() else 0.0


# --- calibration --------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Calibrated logit = scale x logit + offset."""

    scale_n: np.ndarray
    offset_n: np.ndarray


@dataclass(frozen=True)
class _Table:
    """Out-of-fold logits of some lenses, marks in columns; weight 0 where a column has ended or a logit is missing."""

    logits_LMn: np.ndarray
    labels_Mn: np.ndarray
    weights_Mn: np.ndarray

    @classmethod
    def of(cls, marks: Marks, logits_LE: np.ndarray, place_Mn: np.ndarray, used_Mn: np.ndarray) -> "_Table":
        logits_LMn = logits_LE[:, place_Mn]
        scored_Mn = used_Mn & np.isfinite(logits_LMn).all(axis=0)
        return cls(
            np.where(scored_Mn, logits_LMn, 0),
            (marks.positive_E[place_Mn] & used_Mn).astype(np.float32),
            np.where(scored_Mn, marks.weights_E[place_Mn], 0),
        )

    def own(self, logits_Mn: np.ndarray, shared: _Line) -> _Line:
        """Platt's line of each lens, drawn to the shared one the more, the fewer positives it has."""
        able_n = usable(logits_Mn, self.labels_Mn, self.weights_Mn)
        if not able_n.any():
            return _Line(np.repeat(shared.scale_n, len(able_n)), np.repeat(shared.offset_n, len(able_n)))
        fit = fit_platt(logits_Mn, self.labels_Mn, self.weights_Mn, prior=0.5)
        num_positive_n = ((self.weights_Mn > 0) & (self.labels_Mn > 0)).sum(axis=0)
        trust_n = np.where(fit.fitted_N, num_positive_n / (num_positive_n + SHARED_EXAMPLES), 0)
        return _Line(
            trust_n * fit.scale_N + (1 - trust_n) * shared.scale_n,
            trust_n * fit.offset_N + (1 - trust_n) * shared.offset_n,
        )

    def together(self, logits_Mn: np.ndarray) -> _Line:
        """One line for all lenses, each counting alike and both its classes too."""
        able_n = usable(logits_Mn, self.labels_Mn, self.weights_Mn)
        share_Mn = weights_at_prior(self.labels_Mn, self.weights_Mn, 0.5) * able_n
        fit = fit_platt(*(each.reshape(-1, 1) for each in (logits_Mn, self.labels_Mn, share_Mn)), prior=0.5)
        return _Line(fit.scale_N, fit.offset_N)


def _calibrated(ready: SparsePool, heads: list[Head], logits_LE: np.ndarray, budget_bytes: int, seed: int) -> LensStack:
    shared = _shared_lines(ready, logits_LE, seed)
    num_lenses, num_layers = len(ready.names), len(ready.layers)
    scale_NL, offset_NL = np.empty((num_lenses, num_layers)), np.empty((num_lenses, num_layers))
    threshold_N, threshold_1fpr_N = np.empty(num_lenses), np.empty(num_lenses)
    for index_n, place_Mn, used_Mn in padded_parts(ready.marks, budget_bytes=budget_bytes):
        table = _Table.of(ready.marks, logits_LE, place_Mn, used_Mn)
        lines, mean_Mn = _layer_lines(table, shared[:-1])
        last = table.own(mean_Mn, shared[-1])
        logits_Mn = (last.scale_n * mean_Mn + last.offset_n).astype(np.float32)
        # mean over layers of (scale x head + offset), then the last line: its offset is shared out evenly.
        scale_NL[index_n] = np.stack([last.scale_n * line.scale_n for line in lines], axis=1)
        offset_NL[index_n] = np.stack([last.scale_n * line.offset_n + last.offset_n for line in lines], axis=1)
        threshold_N[index_n] = best_f1_threshold(logits_Mn, table.labels_Mn, table.weights_Mn)
        threshold_1fpr_N[index_n] = _fpr_threshold(logits_Mn, table)
    return LensStack(
        names=list(ready.names),
        layers=ready.layers,
        heads=heads,
        scale_NL=_tensor(scale_NL),
        offset_NL=_tensor(offset_NL),
        # A lens without out-of-fold positives fires at even odds.
        threshold_N=_tensor(np.nan_to_num(threshold_N)),
        threshold_1fpr_N=_tensor(np.nan_to_num(threshold_1fpr_N, nan=np.inf)).clamp_max(1e30),
    )


def _shared_lines(ready: SparsePool, logits_LE: np.ndarray, seed: int) -> list[_Line]:
    """A calibration for each layer and one for their mean, from the sampled lenses as if they were one."""
    index_n = _sampled_lenses(ready, seed)
    if not len(index_n):
        raise DataError(
            f"none of {len(ready.names)} lenses can be calibrated: each has its positives (or negatives) in one fold; "
            "give concepts texts of several groups, or set map.training.folds=0"
        )
    marks = ready.marks
    counts_n = marks.counts_N[index_n]
    step_M1 = np.arange(counts_n.max())[:, None]
    used_Mn = step_M1 < counts_n
    table = _Table.of(marks, logits_LE, np.where(used_Mn, marks.starts_N[index_n] + step_M1, 0), used_Mn)
    shared = [table.together(logits_Mn) for logits_Mn in table.logits_LMn]
    _, mean_Mn = _layer_lines(table, shared)
    return [*shared, table.together(mean_Mn)]


def _layer_lines(table: _Table, shared: list[_Line]) -> tuple[list[_Line], np.ndarray]:
    """Line of each layer, and the mean over layers of the calibrated logits."""
    lines = [table.own(logits_Mn, line) for logits_Mn, line in zip(table.logits_LMn, shared, strict=True)]
    calibrated = [line.scale_n * x_Mn + line.offset_n for line, x_Mn in zip(lines, table.logits_LMn, strict=True)]
    return lines, np.mean(calibrated, axis=0)


def _fpr_threshold(logits_Mn: np.ndarray, table: _Table) -> np.ndarray:
    """Threshold that 1 % of the negatives exceed; a lens needs no out-of-fold positive for it."""
    # `fpr_threshold` asks for both classes and looks at the negatives only: one positive more changes nothing else.
    extra_1n = np.zeros((1, logits_Mn.shape[1]), dtype=np.float32)
    return fpr_threshold(
        np.concatenate([logits_Mn, extra_1n]),
        np.concatenate([table.labels_Mn, extra_1n + 1]),
        np.concatenate([table.weights_Mn, extra_1n + 1]),
    )


# --- parts --------------------------------------------------------------------------------------------------------


def _ready(source: Encyclopedia | SparsePool, folds: int, pool: str, seed: int) -> SparsePool:
    return source if isinstance(source, SparsePool) else read_sparse_pool(source, folds=folds, pool=pool, seed=seed)


def _parts(ready: SparsePool, budget_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of lenses whose scores, sums and weights stay within the budget; at least one lens."""
    num_texts, _, width = ready.states_SLD.shape
    copies = len(ready.fold_starts_K)
    step = max(1, budget_bytes // (4 * (num_texts + 8 * copies * width)))
    for start in range(0, len(ready.names), step):
        yield start, min(start + step, len(ready.names))


@contextmanager
def _progress(label: str, shown: bool, ready: SparsePool, *, rounds: int) -> Iterator[Callable[[int], None]]:
    with Progress(transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=len(ready.names) * len(ready.layers) * rounds)
        yield lambda count: bar.advance(task, count)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
