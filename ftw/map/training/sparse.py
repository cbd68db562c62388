"""What lenses are solved from without ever making a dense table: states in fold order and marks lens by lens.

`LensTask` holds labels and weights as [S, N]; at 52,000 texts and 8,000 concepts that is 3.3 GB of mostly zeros. Here
the E marks stay a list. Texts are put into the order of their folds, so that a fold is a slice of the states, and marks
into the order of their lenses, so that a lens is a slice of the marks.

Axes: S training texts, N lenses, n lenses of one part, L layers, D model width, K folds, E marks, e marks of one part,
M marks of the fullest lens of a part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from ftw.errors import DataError
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.samples import SampleTable
from ftw.map.training.data import group_folds


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Which texts each lens learns from, and how.

    Attributes:
        rows_E: place of the text in fold order, ascending within a lens.
        positive_E: whether the mark is a positive. weights_E: float32, > 0.
        starts_N: N + 1 bounds: the marks of lens n are `starts_N[n]` to `starts_N[n + 1]`.
    """

    rows_E: np.ndarray
    positive_E: np.ndarray
    weights_E: np.ndarray
    starts_N: np.ndarray

    @property
    def num_lenses(self) -> int:
        return len(self.starts_N) - 1

    @property
    def counts_N(self) -> np.ndarray:
        """Marks of each lens."""
        return np.diff(self.starts_N)

    def part(self, start: int, stop: int) -> "Marks":
        """The marks of consecutive lenses, sharing memory."""
        span = slice(self.starts_N[start], self.starts_N[stop])
        return Marks(
            rows_E=self.rows_E[span],
            positive_E=self.positive_E[span],
            weights_E=self.weights_E[span],
            starts_N=self.starts_N[start : stop + 1] - self.starts_N[start],
        )

    def lenses(self, index_n: np.ndarray) -> "Marks":
        """The marks of some lenses, in that order."""
        counts_n = self.counts_N[index_n]
        starts_n = np.concatenate([[0], np.cumsum(counts_n)])
        at_e = np.arange(starts_n[-1]) + np.repeat(self.starts_N[index_n] - starts_n[:-1], counts_n)
        return Marks(
            rows_E=self.rows_E[at_e],
            positive_E=self.positive_E[at_e],
            weights_E=self.weights_E[at_e],
            starts_N=starts_n,
        )

    def permuted(self, *, seed: int, first_lens: int = 0) -> "Marks":
        """The same marks, labels shuffled within each lens; a lens is shuffled alike whatever part it stands in."""
        positive_E = np.zeros_like(self.positive_E)
        num_positive_N = np.add.reduceat(self.positive_E, self.starts_N[:-1], dtype=np.int64)
        for lens, (start, count, num) in enumerate(zip(self.starts_N, self.counts_N, num_positive_N, strict=False)):
            random = np.random.default_rng([seed, first_lens + lens])
            positive_E[start + random.choice(count, num, replace=False, shuffle=False)] = True
        return Marks(rows_E=self.rows_E, positive_E=positive_E, weights_E=self.weights_E, starts_N=self.starts_N)


@dataclass(frozen=True, kw_only=True)
class SparsePool:
    """Training rows of an encyclopedia, ready to be solved.

    Attributes:
        states_SLD: float16, texts in fold order. marks: of all lenses.
        fold_starts_K: K + 1 bounds of the folds among the texts; [0, S] without folds.
        names: N concepts. layers: L layers of the substrate. pool: what the states are.
    """

    states_SLD: np.ndarray
    marks: Marks
    fold_starts_K: np.ndarray
    names: list[str]
    layers: tuple[int, ...]
    pool: str = "mean"

    @property
    def num_folds(self) -> int:
        """K; 0 where every text is judged by a lens that was trained on it."""
        return len(self.fold_starts_K) - 1 if len(self.fold_starts_K) > 2 else 0

    def fold_of(self, rows_e: np.ndarray) -> np.ndarray:
        """Fold of texts given by their place."""
        return np.searchsorted(self.fold_starts_K, rows_e, side="right") - 1


def read_sparse_pool(encyclopedia: Encyclopedia, *, folds: int = 4, pool: str = "mean", seed: int = 0) -> SparsePool:
    """Read states and marks of the training texts; folds go by group (`group_folds`).

    Raises:
        DataError: no training texts, one fold, states that are not finite, a concept with one class, a mark made twice.
    """
    if folds == 1 or folds < 0:
        raise DataError(f"map.training.folds={folds}: choose 2 or more, or 0 to calibrate on the training rows")
    table = encyclopedia.table
    rows = table.where("train")
    if len(rows) == 0:
        raise DataError("no training texts; give rows with split 'train'")
    fold_S = group_folds([table.groups[row] for row in rows], folds, seed)
    order = np.argsort(fold_S, kind="stable")
    rows = rows[order]
    layers = encyclopedia.spec.layers
    states_SLD = np.empty((len(rows), len(layers), encyclopedia.spec.width), dtype=np.float16)
    for place, layer in enumerate(layers):
        states_SLD[:, place] = encyclopedia.pooled(layer, pool, rows)
        finite_S = np.isfinite(states_SLD[:, place]).all(axis=1)
        if not finite_S.all():
            text = table.texts[rows[int(np.argmin(finite_S))]]
            raise DataError(f"states of text {text[:60]!r} are not finite; collect again with precision=float32")
    return SparsePool(
        states_SLD=states_SLD,
        marks=marks_by_lens(table, rows),
        fold_starts_K=np.searchsorted(fold_S[order], np.arange(max(folds, 1) + 1)),
        names=list(table.concepts),
        layers=tuple(layers),
        pool=pool,
    )


def marks_by_lens(table: SampleTable, rows: np.ndarray) -> Marks:
    """The marks of some texts, by lens and then by the texts' place in `rows`.

    Raises:
        DataError: a concept has marks of one class only, or a pair is marked twice.
    """
    place = np.full(len(table), -1, dtype=np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    local_E = place[table.rows]
    kept_E = np.flatnonzero((local_E >= 0) & (table.weights > 0)).astype(np.int32)
    # Two counting sorts, first by text and then by lens: linear in E, where a comparison sort of 32 M marks takes 10 s.
    shape = (len(rows), len(table.concepts))
    listed = scipy.sparse.coo_array((kept_E, (local_E[kept_E], table.cols[kept_E])), shape=shape)
    pairs = scipy.sparse.csc_array(listed.tocsr())
    if pairs.nnz != len(kept_E):
        raise DataError(f"{len(kept_E) - pairs.nnz} pairs of text and concept are marked twice; keep one mark of each")
    mark_E = np.asarray(pairs.data, dtype=np.int32)
    marks = Marks(
        rows_E=pairs.indices.astype(np.int32),
        positive_E=table.labels[mark_E] > 0,
        weights_E=table.weights[mark_E].astype(np.float32),
        starts_N=pairs.indptr.astype(np.int64),
    )
    _refuse_one_class(table.concepts, marks)
    return marks


@dataclass(frozen=True)
class ClassSums:
    """Sums over the marks of each lens in each fold, from which every copy's class means follow by subtraction.

    Attributes:
        states_KnD: Σ w x. weight_Kn: Σ w. square_Kn: Σ w², for the effective number of texts (Σw)²/Σw².
    """

    states_KnD: np.ndarray
    weight_Kn: np.ndarray
    square_Kn: np.ndarray

    def without(self, fold: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over all folds but one (None: over all): [n, D], [n], [n]."""
        kept_K = np.array([each != fold for each in range(len(self.weight_Kn))])
        states_nD = np.einsum("knd,k->nd", self.states_KnD, kept_K.astype(np.float32))
        return states_nD, self.weight_Kn[kept_K].sum(axis=0), self.square_Kn[kept_K].sum(axis=0)

    def minus(self, other: "ClassSums") -> "ClassSums":
        """Sums over the marks that `other` lacks."""
        return ClassSums(
            self.states_KnD - other.states_KnD, self.weight_Kn - other.weight_Kn, self.square_Kn - other.square_Kn
        )


def class_sums(x_SD: np.ndarray, marks: Marks, pool: SparsePool, *, positives_only: bool) -> ClassSums:
    """Weighted sums of states by lens and fold: E gathered rows, no dense matrix."""
    num_folds, num_lenses = len(pool.fold_starts_K) - 1, marks.num_lenses
    lens_e = np.repeat(np.arange(num_lenses), marks.counts_N)
    rows_e, weights_e = marks.rows_E, marks.weights_E
    if positives_only:
        lens_e, rows_e, weights_e = (each[marks.positive_E] for each in (lens_e, rows_e, weights_e))
    # Marks of a lens ascend in fold order, so each (lens, fold) is one run: a bag.
    bag_e = lens_e * num_folds + pool.fold_of(rows_e)
    num_bags = num_lenses * num_folds
    ends = np.cumsum(np.bincount(bag_e, minlength=num_bags))
    sums = torch.nn.functional.embedding_bag(
        torch.from_numpy(rows_e.astype(np.int64)),
        torch.from_numpy(x_SD),
        torch.from_numpy(np.concatenate([[0], ends]).astype(np.int64)),
        mode="sum",
        per_sample_weights=torch.from_numpy(np.ascontiguousarray(weights_e)),
        include_last_offset=True,
    ).numpy()

    def counted(values_e: np.ndarray) -> np.ndarray:
        return np.bincount(bag_e, values_e, minlength=num_bags).reshape(num_lenses, num_folds).T

    states_KnD = sums.reshape(num_lenses, num_folds, -1).transpose(1, 0, 2)
    return ClassSums(states_KnD, counted(weights_e), counted(weights_e.astype(np.float64) ** 2))


def score_marks(
    x_SD: np.ndarray, marks: Marks, pool: SparsePool, weight_KnD: np.ndarray, bias_Kn: np.ndarray
) -> np.ndarray:
    """Logit of every mark by the copy that did not see its fold: float32 [e].

    One dense product a fold and then a gather: at 4 % density that is faster than E dot products of gathered rows.
    """
    logits_nS = np.empty((marks.num_lenses, len(x_SD)), dtype=np.float32)
    for fold, (start, stop) in enumerate(zip(pool.fold_starts_K[:-1], pool.fold_starts_K[1:], strict=True)):
        np.matmul(weight_KnD[fold], x_SD[start:stop].T, out=logits_nS[:, start:stop])
        logits_nS[:, start:stop] += bias_Kn[fold][:, None]
    return logits_nS[np.repeat(np.arange(marks.num_lenses), marks.counts_N), marks.rows_E]


def padded_parts(marks: Marks, *, budget_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Lenses of like numbers of marks, their marks side by side in columns for `ftw.map.calibrate`.

    Yields:
        index_n: the lenses. place_Mn: places among the marks (0 where a column has ended). used_Mn: whether it has not.
    """
    order = np.argsort(marks.counts_N, kind="stable")
    # A rank metric or a Newton step holds about ten float64 copies of its table.
    cells = max(1, budget_bytes // 80)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(marks.counts_N[order[stop]]) <= cells:
            stop += 1
        index_n = order[start:stop]
        counts_n = marks.counts_N[index_n]
        step_M1 = np.arange(counts_n.max())[:, None]
        used_Mn = step_M1 < counts_n
        yield index_n, np.where(used_Mn, marks.starts_N[index_n] + step_M1, 0), used_Mn
        start = stop


def _refuse_one_class(names: list[str], marks: Marks) -> None:
    lens_E = np.repeat(np.arange(len(names)), marks.counts_N)
    positive_N = np.bincount(lens_E[marks.positive_E], minlength=len(names))
    negative_N = marks.counts_N - positive_N
    poor = np.flatnonzero((positive_N < 1) | (negative_N < 1))
    if len(poor):
        shown = ", ".join(f"{names[n]!r} ({positive_N[n]} positive, {negative_N[n]} negative)" for n in poor[:5])
        raise DataError(
            f"{len(poor)} of {len(names)} concepts have training rows of one class only: {shown}; "
            "add the other class or leave them out"
        )
