"""The training rows of one lens: which texts, what they say, how much they count, and how they are folded.

Axes: S rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ftw.map.samples import SampleTable


@dataclass(frozen=True)
class LensRows:
    """Rows of one lens.

    Attributes:
        name: concept. rows: indices of texts. labels: 0 or 1, float32. weights: > 0, float32; a negative that is a
            sibling's positive weighs more than 1. groups: what folds go by.
    """

    name: str
    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_positive(self) -> int:
        return int((self.labels > 0).sum())

    @property
    def num_negative(self) -> int:
        return len(self) - self.num_positive

    @property
    def fewest_groups(self) -> int:
        """Groups that hold the rarer class."""
        return min(len(np.unique(self.groups[self.labels == label])) for label in (0, 1))

    @property
    def has_siblings(self) -> bool:
        """Whether positives of sibling concepts are among the negatives."""
        return bool((self.weights[self.labels == 0] > 1).any())

    def balanced(self, weights_S: np.ndarray) -> np.ndarray:
        """Weights scaled so that both classes count alike and the rows sum to their number, float32."""
        total = {label: weights_S[self.labels == label].sum() for label in (0, 1)}
        share_S = np.where(self.labels > 0, 0.5 / total[1], 0.5 / total[0])
        return (weights_S * share_S * len(self)).astype(np.float32)

    def sibling_weights(self) -> np.ndarray:
        """Weights of positives and of siblings' positives alone, where there are such; else all."""
        if not self.has_siblings:
            return self.weights
        return np.where((self.labels > 0) | (self.weights > 1), self.weights, 0).astype(np.float32)

    def folds(self, num_folds: int, seed: int) -> np.ndarray:
        """Fold of each row, 0 to num_folds - 1: groups with positives are dealt out first, then the others.

        Dealt in the order of a hash, so that folds are even and each has both classes.
        """
        if num_folds < 2:
            return np.zeros(len(self), dtype=np.int64)
        positive = set(self.groups[self.labels > 0].tolist())
        names = sorted(set(self.groups.tolist()), key=lambda group: (group not in positive, _draw(seed, group), group))
        dealt = {group: place % num_folds for place, group in enumerate(names)}
        return np.array([dealt[group] for group in self.groups.tolist()], dtype=np.int64)

    def columns(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights side by side `num` times, [S, num]."""
        return tuple(np.repeat(values[:, None], num, axis=1) for values in (self.labels, self.weights))  # pyright: ignore[reportReturnType]

    def take(self, places: np.ndarray) -> "LensRows":
        """Some of the rows."""
        return LensRows(self.name, self.rows[places], self.labels[places], self.weights[places], self.groups[places])


def lens_rows(table: SampleTable, split: str = "train") -> list[LensRows]:
    """The rows of every concept of a table in one split."""
    inside = np.asarray(table.splits) == split
    kept = np.flatnonzero(inside[table.rows] & (table.weights > 0))
    kept = kept[np.argsort(table.cols[kept], kind="stable")]
    edges = np.searchsorted(table.cols[kept], np.arange(len(table.concepts) + 1))
    groups = np.asarray(table.groups, dtype=object)
    made = []
    for lens, name in enumerate(table.concepts):
        marks = kept[edges[lens] : edges[lens + 1]]
        rows = table.rows[marks].astype(np.int64)
        labels, weights = table.labels[marks].astype(np.float32), table.weights[marks].astype(np.float32)
        made.append(LensRows(name, rows, labels, weights, groups[rows]))
    return made


def with_rows(table: SampleTable, lenses: Sequence[LensRows], split: str = "train") -> SampleTable:
    """The table with the marks of one split replaced by these rows; concepts in the lenses' order."""
    column = {rows.name: lens for lens, rows in enumerate(lenses)}
    inside = np.asarray(table.splits) == split
    place_N = np.array([column.get(name, -1) for name in table.concepts])
    kept = np.flatnonzero(~inside[table.rows] & (place_N[table.cols] >= 0))
    return replace(
        table,
        concepts=[rows.name for rows in lenses],
        rows=np.concatenate([table.rows[kept], *(each.rows for each in lenses)]).astype(np.int32),
        cols=np.concatenate(
            [place_N[table.cols[kept]], *(np.full(len(each), lens) for lens, each in enumerate(lenses))]
        ).astype(np.int32),
        labels=np.concatenate([table.labels[kept], *(each.labels for each in lenses)]).astype(np.int8),
        weights=np.concatenate([table.weights[kept], *(each.weights for each in lenses)]).astype(np.float32),
    )


def _draw(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
