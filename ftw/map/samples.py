"""The sample table: which texts there are, and what each says about each concept.

One pool of texts serves all concepts. A text is stored once; a sparse list of *marks* (text, concept, label, weight)
says for which concepts it is a positive (1) or a negative (0) and how much it counts. A pair without a mark is not
used. Everything downstream (encyclopedia, training, evaluation) reads this table and nothing else.

Axes: S texts, N concepts, E marks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftw.errors import DataError

SPLITS = ("train", "test", "background")


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Texts with their groups and splits, and the marks that tie them to concepts.

    Attributes:
        texts: S distinct texts.
        groups: S names of what a text was made from (synset, template, article). Splits and folds go by group.
        splits: S of "train", "test" or "background" (text of the kind to be monitored, for percentiles).
        sources: S words for the make of a text ("definition", "example", "context", "generated", "neutral", ...).
        concepts: N concept names.
        rows, cols, labels, weights: E marks: text index, concept index, label 0 or 1, weight > 0.
        columns: further columns by name, S values each; kept, never read by training.
    """

    texts: list[str]
    groups: list[str]
    splits: list[str]
    sources: list[str]
    concepts: list[str]
    rows: np.ndarray
    cols: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    columns: Mapping[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_texts, num_marks = len(self.texts), len(self.rows)
        for name in ("groups", "splits", "sources"):
            if len(getattr(self, name)) != num_texts:
                raise DataError(f"sample table: {len(getattr(self, name))} {name} for {num_texts} texts")
        for name in ("cols", "labels", "weights"):
            if len(getattr(self, name)) != num_marks:
                raise DataError(f"sample table: {len(getattr(self, name))} {name} for {num_marks} marks")
        if unknown := set(self.splits) - set(SPLITS):
            raise DataError(f"unknown split {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        if len(set(self.concepts)) != len(self.concepts):
            raise DataError("sample table: a concept is listed twice")
        for name, values in self.columns.items():
            if len(values) != num_texts:
                raise DataError(f"sample table: column {name!r} has {len(values)} values for {num_texts} texts")
        self._check_marks()

    def _check_marks(self) -> None:
        for name, limit in (("rows", len(self.texts)), ("cols", len(self.concepts))):
            places = np.asarray(getattr(self, name))
            if len(places) and not (places.min() >= 0 and places.max() < limit):
                raise DataError(f"sample table: {name} of marks must lie in 0-{limit - 1}")
        if not np.isin(self.labels, (0, 1)).all():
            raise DataError("sample table: a mark is labelled neither 0 nor 1")
        weights = np.asarray(self.weights)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise DataError("sample table: the weight of a mark is negative or not finite")

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, split: str) -> np.ndarray:
        """Indices of the texts of one split, ascending."""
        return np.flatnonzero(np.asarray(self.splits) == split)

    def matrices(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dense labels and weights of some texts.

        Args:
            texts: T text indices.

        Returns:
            labels_TN: float32, 0 or 1. weights_TN: float32, 0 where the pair has no mark.
        """
        place = np.full(len(self.texts), -1, dtype=np.int64)
        place[texts] = np.arange(len(texts))
        kept = place[self.rows] >= 0
        labels_TN = np.zeros((len(texts), len(self.concepts)), dtype=np.float32)
        weights_TN = np.zeros_like(labels_TN)
        at = (place[self.rows[kept]], self.cols[kept])
        labels_TN[at] = self.labels[kept]
        weights_TN[at] = self.weights[kept]
        return labels_TN, weights_TN

    def select(self, texts: np.ndarray, concepts: Sequence[str]) -> "SampleTable":
        """The table of some texts and concepts, in the given order.

        Raises:
            DataError: no text is left.
        """
        if len(texts) == 0:
            raise DataError("no texts are left; are there rows of the split that is asked for?")
        row = np.full(len(self.texts), -1, dtype=np.int64)
        row[texts] = np.arange(len(texts))
        place = {name: index for index, name in enumerate(concepts)}
        col = np.array([place.get(name, -1) for name in self.concepts], dtype=np.int64)
        kept = (row[self.rows] >= 0) & (col[self.cols] >= 0)

        def pick(values: list[str]) -> list[str]:
            return [values[index] for index in texts]

        return SampleTable(
            texts=pick(self.texts),
            groups=pick(self.groups),
            splits=pick(self.splits),
            sources=pick(self.sources),
            concepts=list(concepts),
            rows=row[self.rows[kept]].astype(np.int32),
            cols=col[self.cols[kept]].astype(np.int32),
            labels=self.labels[kept],
            weights=self.weights[kept],
            columns={name: pick(list(values)) for name, values in self.columns.items()},
        )

    def content_hash(self) -> str:
        """sha256 over everything in the table; equal tables give equal hashes on every machine."""
        digest = hashlib.sha256()
        for words in (self.texts, self.groups, self.splits, self.sources, self.concepts):
            digest.update(_framed(words))
        for array, dtype in ((self.rows, "<i4"), (self.cols, "<i4"), (self.labels, "<i1"), (self.weights, "<f4")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        for name in sorted(self.columns):
            digest.update(_framed([name, *self.columns[name]]))
        return digest.hexdigest()


def _framed(words: Sequence[str]) -> bytes:
    """Words with their lengths before them, so that no two lists give the same bytes."""
    encoded = [word.encode("utf-8", "surrogatepass") for word in words]
    return b"".join(len(word).to_bytes(4, "little") + word for word in [str(len(words)).encode(), *encoded])


class SampleTableBuilder:
    """Collects texts and marks one at a time; a text met again is the same text, a mark met again must agree."""

    def __init__(self, concepts: Sequence[str]) -> None:
        self._concepts = list(concepts)
        self._column = {name: index for index, name in enumerate(concepts)}
        self._index: dict[tuple[str, str], int] = {}
        self._texts: list[tuple[str, str, str, str]] = []
        self._extra: list[Mapping[str, str]] = []
        self._marks: dict[tuple[int, int], tuple[int, float]] = {}

    def text(self, text: str, *, group: str, split: str, source: str, columns: Mapping[str, str] | None = None) -> int:
        """Index of a text in a split, added if new."""
        key = (text, split)
        if key not in self._index:
            self._index[key] = len(self._texts)
            self._texts.append((text, group, split, source))
            self._extra.append(columns or {})
        return self._index[key]

    def mark(self, row: int, concept: str, label: int, weight: float = 1.0) -> None:
        """Say that text `row` is (1) or is not (0) about `concept`; the first weight stays.

        Raises:
            DataError: no such concept, or the text is marked the other way already.
        """
        if concept not in self._column:
            raise DataError(f"no concept {concept!r} in this sample table, which has {len(self._concepts)}")
        key = (row, self._column[concept])
        known = self._marks.setdefault(key, (int(label), float(weight)))
        if known[0] != label:
            raise DataError(f"text {self._texts[row][0][:60]!r} is marked both 0 and 1 for {concept!r}")

    def build(self) -> SampleTable:
        """The finished table, marks in order of text and concept."""
        names = sorted({name for extra in self._extra for name in extra})
        marks = sorted(self._marks.items())
        return SampleTable(
            texts=[row[0] for row in self._texts],
            groups=[row[1] for row in self._texts],
            splits=[row[2] for row in self._texts],
            sources=[row[3] for row in self._texts],
            concepts=self._concepts,
            rows=np.array([key[0] for key, _ in marks], dtype=np.int32),
            cols=np.array([key[1] for key, _ in marks], dtype=np.int32),
            labels=np.array([value[0] for _, value in marks], dtype=np.int8),
            weights=np.array([value[1] for _, value in marks], dtype=np.float32),
            columns={name: [str(extra.get(name, "")) for extra in self._extra] for name in names},
        )
