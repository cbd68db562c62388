"""The text lenses: what the written words alone say about each concept, for all concepts at once.

A text lens is TF-IDF over words and word pairs with logistic regression: the control of every activation lens, and the
other half of dissonance. All lenses are one table with a row per gram, so a text touches only the rows of its own
grams; nothing here needs the library that fitted them.

Axes: N lenses, B texts, V grams (words and word pairs), E entries (gram, lens), M matches (text, gram).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import PackError

# Words of two letters and more, as scikit-learn's vectorisers cut them.
WORDS = re.compile(r"(?u)\b\w\w+\b")
FORMAT = 1

# Entries touched at once: two float64 arrays of this length are 64 MB.
ENTRIES_AT_ONCE = 4_000_000

_NO_ENTRY, _NO_VALUE = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)


def grams(text: str, ngrams: int = 2) -> list[str]:
    """Lower-case words of a text, then its runs of 2 … `ngrams` words joined by spaces, repeats kept."""
    words = WORDS.findall(text.lower())
    runs = [words[start : start + size] for size in range(2, ngrams + 1) for start in range(len(words) - size + 1)]
    return words + [" ".join(run) for run in runs]


@dataclass(frozen=True, kw_only=True)
class TextLens:
    """One text lens with a vocabulary of its own, as another library fitted it.

    Attributes:
        vocabulary: grams. idf, coefficients: one number a gram. bias: the intercept.
    """

    name: str
    vocabulary: Sequence[str]
    idf: np.ndarray
    coefficients: np.ndarray
    bias: float


@dataclass(frozen=True, eq=False, kw_only=True)
class TextBank:
    """N text lenses; logit = bias + Σ_g tf_g · idf_g · c_g / ‖tf · idf‖₂ over the grams g of a text.

    The entries of gram v are those from `row_starts[v]` to `row_starts[v + 1]`. When all lenses share one vectoriser
    (the default) the norm of a text is one number, from `idf`. Lenses that each have a vocabulary and idf of their own
    keep idf² beside every entry (`squares`), and the norm is a second sum over the same entries.

    Attributes:
        names: N concept names. vocabulary: V grams.
        row_starts: int64 [V + 1]. lenses: int32 [E], ascending within a gram. numerators: float32 [E], idf ·
            coefficient.
        bias: float32 [N].
        idf: float32 [V], or None with vocabularies per lens. squares: float32 [E] then, else None.
        ngrams: longest run of words. sublinear_tf: a gram met c times counts 1 + ln c instead of c.
    """

    names: list[str]
    vocabulary: list[str]
    row_starts: np.ndarray
    lenses: np.ndarray
    numerators: np.ndarray
    bias: np.ndarray
    idf: np.ndarray | None = None
    squares: np.ndarray | None = None
    ngrams: int = 2
    sublinear_tf: bool = True

    def __post_init__(self) -> None:
        num_grams, num_entries = len(self.vocabulary), len(self.lenses)
        shapes = {
            "row_starts": (self.row_starts, num_grams + 1),
            "numerators": (self.numerators, num_entries),
            "bias": (self.bias, len(self.names)),
            "idf": (self.idf, num_grams),
            "squares": (self.squares, num_entries),
        }
        for name, (array, length) in shapes.items():
            if array is not None and array.shape != (length,):
                raise PackError(f"text bank: {name} has shape {array.shape}, expected ({length},)")
        if (self.idf is None) == (self.squares is None):
            raise PackError("text bank: needs either idf (one vocabulary) or squares (a vocabulary per lens)")
        if self.row_starts[0] != 0 or self.row_starts[-1] != num_entries or (np.diff(self.row_starts) < 0).any():
            raise PackError(f"text bank: row_starts do not rise from 0 to the {num_entries} entries")
        if num_entries and not (self.lenses.min() >= 0 and self.lenses.max() < len(self.names)):
            raise PackError(f"text bank: an entry names a lens outside of the {len(self.names)}")
        rows = {gram: row for row, gram in enumerate(self.vocabulary)}
        if len(rows) != num_grams:
            raise PackError("text bank: a gram is listed twice in the vocabulary")
        object.__setattr__(self, "_rows", rows)

    def __len__(self) -> int:
        return len(self.names)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Logit of every lens for every text, float32 [B, N]; a text without known grams gets the biases."""
        logits_BN = np.empty((len(texts), len(self)), dtype=np.float32)
        text_M, gram_M, count_M = self._matches(texts)
        entries_M = np.diff(self.row_starts)[gram_M]
        ends_B = np.searchsorted(text_M, np.arange(len(texts)), side="right")
        start = 0
        while start < len(texts):
            # As many texts as fit the budget, at least one: matches come in order of text.
            first = ends_B[start - 1] if start else 0
            touched_M = np.cumsum(entries_M[first:])
            last = first + int(np.searchsorted(touched_M, ENTRIES_AT_ONCE, side="right"))
            stop = max(start + 1, int(np.searchsorted(ends_B, last, side="right")))
            part = slice(first, ends_B[stop - 1])
            logits_BN[start:stop] = self._logits(text_M[part] - start, gram_M[part], count_M[part], stop - start)
            start = stop
        return torch.from_numpy(logits_BN)

    def _matches(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which known gram stands in which text, and its term frequency, in order of text."""
        rows: dict[str, int] = self.__dict__["_rows"]
        found: list[tuple[int, int, int]] = []
        for number, text in enumerate(texts):
            counts = Counter(grams(text, self.ngrams))
            found += [(number, rows[gram], count) for gram, count in counts.items() if gram in rows]
        text_M, gram_M, count_M = np.array(found, dtype=np.int64).reshape(-1, 3).T
        return text_M, gram_M, 1 + np.log(count_M) if self.sublinear_tf else count_M.astype(np.float64)

    def _logits(self, text_M: np.ndarray, gram_M: np.ndarray, tf_M: np.ndarray, num_texts: int) -> np.ndarray:
        """Logits of a few texts from their matches, [texts, N]."""
        size = num_texts * len(self)
        starts, stops = self.row_starts[gram_M].tolist(), self.row_starts[gram_M + 1].tolist()
        # Slices, not a gather: a common gram has an entry for nearly every lens, and those lie side by side.
        entries = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        length_M = self.row_starts[gram_M + 1] - self.row_starts[gram_M]
        cell_E = np.concatenate([_NO_ENTRY, *(self.lenses[part] for part in entries)])
        cell_E = cell_E + np.repeat(text_M * len(self), length_M)
        tf_E = np.repeat(tf_M, length_M)

        def total(values: np.ndarray, factor_E: np.ndarray) -> np.ndarray:
            value_E = np.concatenate([_NO_VALUE, *(values[part] for part in entries)])
            return np.bincount(cell_E, value_E * factor_E, minlength=size).reshape(num_texts, -1)

        sums = total(self.numerators, tf_E)
        if self.squares is not None:
            norms = total(self.squares, tf_E**2)
        else:
            assert self.idf is not None
            norms = np.bincount(text_M, (tf_M * self.idf[gram_M]) ** 2, minlength=num_texts)[:, None]
        # A norm of 0 means that nothing matched; the sum is 0 too, and the bias is what remains.
        return self.bias + sums / np.sqrt(np.where(norms > 0, norms, 1))

    def calibrated(self, scale_N: np.ndarray, offset_N: np.ndarray) -> "TextBank":
        """The bank whose logits are scale · logit + offset."""
        scale_N, offset_N = np.asarray(scale_N, dtype=np.float64), np.asarray(offset_N, dtype=np.float64)
        numerators = (self.numerators * scale_N[self.lenses]).astype(np.float32)
        return replace(self, numerators=numerators, bias=(self.bias * scale_N + offset_N).astype(np.float32))

    def subset(self, names: Sequence[str]) -> "TextBank":
        """The bank of some lenses, in the order named; the vocabulary stays whole, because norms are taken over it."""
        place = {name: index for index, name in enumerate(self.names)}
        if unknown := [name for name in names if name not in place]:
            raise PackError(f"text bank: no lens {unknown[0]!r} among its {len(self)}")
        chosen = np.array([place[name] for name in names], dtype=np.int64)
        number_N = np.full(len(self), -1, dtype=np.int32)
        number_N[chosen] = np.arange(len(chosen))
        kept_E = number_N[self.lenses] >= 0
        gram_E = np.repeat(np.arange(len(self.vocabulary)), np.diff(self.row_starts))[kept_E]
        return replace(
            self,
            names=list(names),
            row_starts=_row_starts(gram_E, len(self.vocabulary)),
            lenses=number_N[self.lenses[kept_E]],
            numerators=self.numerators[kept_E],
            bias=self.bias[chosen],
            squares=None if self.squares is None else self.squares[kept_E],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, for a safetensors file."""
        arrays = {
            name: getattr(self, name) for name in ("row_starts", "lenses", "numerators", "bias", "idf", "squares")
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def description(self) -> dict[str, Any]:
        """The words and options, for a JSON file."""
        options = {"ngrams": self.ngrams, "sublinear_tf": self.sublinear_tf, "words": WORDS.pattern}
        return {"format": FORMAT, "names": self.names, "vocabulary": self.vocabulary, **options}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> "TextBank":
        """Read what `tensors` and `description` gave.

        Raises:
            PackError: a part is missing, has another shape, or points outside of the others.
        """
        needed = {"row_starts": np.int64, "lenses": np.int32, "numerators": np.float32, "bias": np.float32}
        keys = {"format", "names", "vocabulary", "ngrams", "sublinear_tf", "words"}
        if missing := sorted((set(needed) - set(tensors)) | (keys - set(description))):
            raise PackError(f"text bank: {', '.join(missing)} is missing; the pack is incomplete, fetch it again")
        if description["format"] != FORMAT or description["words"] != WORDS.pattern:
            raise PackError(
                f"text bank: format {description['format']} with words {description['words']!r}; this FTW reads format "
                f"{FORMAT} with {WORDS.pattern!r}. Use the FTW that wrote the pack"
            )
        optional = {name: np.float32 for name in ("idf", "squares") if name in tensors}
        return cls(
            names=[str(name) for name in description["names"]],
            vocabulary=[str(gram) for gram in description["vocabulary"]],
            ngrams=int(description["ngrams"]),
            sublinear_tf=bool(description["sublinear_tf"]),
            **{name: tensors[name].cpu().numpy().astype(dtype) for name, dtype in (needed | optional).items()},
        )

    @classmethod
    def from_lenses(cls, lenses: Sequence[TextLens], *, ngrams: int = 2, sublinear_tf: bool = False) -> "TextBank":
        """One bank of lenses that each have a vocabulary of their own."""
        vocabulary = sorted({gram for lens in lenses for gram in lens.vocabulary})
        rows = {gram: row for row, gram in enumerate(vocabulary)}
        gram_E = np.array([rows[gram] for lens in lenses for gram in lens.vocabulary], dtype=np.int64)
        lens_E = np.repeat(np.arange(len(lenses), dtype=np.int32), [len(lens.vocabulary) for lens in lenses])
        idf_E = np.concatenate([np.empty(0), *(np.asarray(lens.idf, dtype=np.float64) for lens in lenses)])
        weight_E = np.concatenate([np.empty(0), *(np.asarray(lens.coefficients, np.float64) for lens in lenses)])
        order_E = np.argsort(gram_E, kind="stable")
        return cls(
            names=[lens.name for lens in lenses],
            vocabulary=vocabulary,
            row_starts=_row_starts(gram_E, len(vocabulary)),
            lenses=lens_E[order_E],
            numerators=(idf_E * weight_E)[order_E].astype(np.float32),
            bias=np.array([lens.bias for lens in lenses], dtype=np.float32),
            squares=(idf_E**2)[order_E].astype(np.float32),
            ngrams=ngrams,
            sublinear_tf=sublinear_tf,
        )


def _row_starts(gram_E: np.ndarray, num_grams: int) -> np.ndarray:
    """Where the entries of each gram start once they are in order of gram."""
    return np.concatenate([[0], np.cumsum(np.bincount(gram_E, minlength=num_grams))]).astype(np.int64)
