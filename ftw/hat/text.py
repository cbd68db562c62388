"""The text lenses: what the written words alone say about each concept, for all concepts at once.

A text lens is TF-IDF over words and word pairs (if wanted, runs of characters too) with logistic regression: the
control of every activation lens, and the other half of dissonance. All lenses are one table with a row per gram, so a
text touches only the rows of its own grams; nothing here needs the library that fitted them.

Axes: N lenses, B texts, V grams (words, word pairs, runs of characters), E entries (gram, lens), M matches (text,
gram), F rows kept dense, Q quantiles.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import PackError
from ftw.hat.percentile import interpolate

# Words of two letters and more, as scikit-learn's vectorisers cut them.
WORDS = re.compile(r"(?u)\b\w\w+\b")
# Stands before runs of characters, so that the run "cat" and the word "cat" are two grams; no word begins with it.
CHARS_MARK = "#"
FORMAT, READABLE = 2, (1, 2)  # format 1 knew no runs of characters and no quantiles
LONGEST_GRAM = 16

# Numbers touched at once: float64 sums of this length stay in the processor's cache.
ENTRIES_AT_ONCE = 300_000
# A gram that a quarter of the lenses know is kept as a dense row: read from end to end it costs less than its entries
# cost to scatter, and at most twice their bytes. Short rows are not worth it, and there is a limit to all of them.
DENSE_SHARE, DENSE_ENTRIES, DENSE_BYTES = 0.25, 256, 64_000_000

_ARRAYS = ("row_starts", "lenses", "numerators", "bias", "idf", "squares", "quantiles_NQ", "levels_Q")


def word_runs(words: Sequence[str], ngrams: int) -> list[str]:
    """Words, then their runs of 2 … `ngrams` joined by spaces, repeats kept; nothing for `ngrams` 0."""
    runs = list(words) if ngrams else []
    for size in range(2, ngrams + 1):
        runs += [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]
    return runs


def char_runs(chunk: str, shortest: int, longest: int) -> list[str]:
    """Marked runs of `shortest` … `longest` characters of a chunk with a space on either side; a shorter one whole."""
    padded, runs = f" {chunk} ", []
    for size in range(shortest, longest + 1):
        runs += [CHARS_MARK + padded[start : start + size] for start in range(max(1, len(padded) - size + 1))]
        if size >= len(padded):  # a whole chunk counts once, whatever further sizes there are
            break
    return runs


def grams(text: str, ngrams: int = 2, chars: tuple[int, int] | None = None) -> list[str]:
    """Lower-case words of a text, their runs up to `ngrams` words, and runs of characters within chunks between spaces.

    These are scikit-learn's analyzers "word" and "char_wb" side by side. Runs of characters tie a piece of a word to
    the word: "felin" shares most of its runs with "feline".
    """
    lower = text.lower()
    found = word_runs(WORDS.findall(lower), ngrams)
    return found if chars is None else found + [run for chunk in lower.split() for run in char_runs(chunk, *chars)]


def frequency(counts_M: np.ndarray, sublinear: bool) -> np.ndarray:
    """Term frequency, float64: 1 + ln c of a gram met c times, or c."""
    return 1 + np.log(counts_M) if sublinear else counts_M.astype(np.float64)


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


class GramRows:
    """V rows of N numbers, most of them sparse: what the sums of a text are made of.

    Args:
        row_starts: int64 [V + 1]. lenses: int32 [E], each once a row. values: float32 [E]. num_lenses: N.
    """

    def __init__(self, row_starts: np.ndarray, lenses: np.ndarray, values: np.ndarray, num_lenses: int) -> None:
        self._starts, self._lenses, self._values, self._num = row_starts, lenses, values, num_lenses
        length_V = np.diff(row_starts)
        common = np.flatnonzero(length_V >= max(DENSE_ENTRIES, DENSE_SHARE * num_lenses))
        common = common[np.argsort(-length_V[common], kind="stable")][: DENSE_BYTES // (4 * max(num_lenses, 1))]
        self._place_V = np.full(len(length_V), -1, dtype=np.int64)
        self._place_V[common] = np.arange(len(common))
        dense_FN = np.zeros((len(common), num_lenses), dtype=np.float32)
        for place, row in enumerate(common):
            entries = slice(row_starts[row], row_starts[row + 1])
            dense_FN[place, lenses[entries]] = values[entries]
        self._dense_FN = torch.from_numpy(dense_FN)

    def scattered(self, row_M: np.ndarray) -> np.ndarray:
        """Entries that a sum has to scatter for each of these rows, [M]: none for a dense one."""
        return np.where(self._place_V[row_M] < 0, self._starts[row_M + 1] - self._starts[row_M], 0)

    def sums(self, text_M: np.ndarray, row_M: np.ndarray, factor_M: np.ndarray, num_texts: int) -> np.ndarray:
        """Σ factor · row over the matches of each text, float64 [num_texts, N]; matches come in order of text."""
        place_M = self._place_V[row_M]
        is_dense = place_M >= 0
        rest = ~is_dense
        sums_BN = self._scatter(text_M[rest], row_M[rest], factor_M[rest], num_texts)
        if is_dense.any():
            num_B = np.bincount(text_M[is_dense], minlength=num_texts)
            dense_BN = torch.nn.functional.embedding_bag(
                torch.from_numpy(place_M[is_dense]),
                self._dense_FN,
                torch.from_numpy(np.cumsum(num_B) - num_B),
                mode="sum",
                per_sample_weights=torch.from_numpy(factor_M[is_dense].astype(np.float32)),
            )
            sums_BN += dense_BN.numpy()
        return sums_BN

    def _scatter(self, text_M: np.ndarray, row_M: np.ndarray, factor_M: np.ndarray, num_texts: int) -> np.ndarray:
        if not len(row_M):
            return np.zeros((num_texts, self._num))
        start_M, stop_M = self._starts[row_M], self._starts[row_M + 1]
        length_M = stop_M - start_M
        parts = [slice(start, stop) for start, stop in zip(start_M.tolist(), stop_M.tolist(), strict=True)]
        cell_E = np.concatenate([self._lenses[part] for part in parts])
        if num_texts > 1:
            cell_E = cell_E + np.repeat(text_M * self._num, length_M)
        value_E = np.concatenate([self._values[part] for part in parts]) * np.repeat(factor_M, length_M)
        return np.bincount(cell_E, value_E, minlength=num_texts * self._num).reshape(num_texts, -1)

    def add(self, sums_N: np.ndarray, row: int, factor: float) -> None:
        """Add factor · one row to float64 sums, in place."""
        place = self._place_V[row]
        if place >= 0:
            # In float64, so that adding a row and taking it away later leaves nothing behind.
            sums_N += np.multiply(self._dense_FN[place].numpy(), factor, dtype=np.float64)
            return
        entries = slice(self._starts[row], self._starts[row + 1])
        sums_N[self._lenses[entries]] += np.multiply(self._values[entries], factor, dtype=np.float64)


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
        ngrams: longest run of words, 0 for none. chars: shortest and longest run of characters, or None for none.
        sublinear_tf: a gram met c times counts 1 + ln c instead of c.
        is_calibrated: σ(logit) is a probability, comparable with that of an activation lens.
        quantiles_NQ, levels_Q: float32, quantiles of each lens's logits on background text and the probabilities they
            stand for; None without.

    Raises:
        PackError: parts of unequal length, or that point outside of each other.
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
    chars: tuple[int, int] | None = None
    sublinear_tf: bool = True
    is_calibrated: bool = False
    quantiles_NQ: np.ndarray | None = None
    levels_Q: np.ndarray | None = None

    def __post_init__(self) -> None:
        num_grams, num_entries, num_lenses = len(self.vocabulary), len(self.lenses), len(self.names)
        num_levels = 0 if self.levels_Q is None else self.levels_Q.size
        shapes = {
            "row_starts": (num_grams + 1,),
            "numerators": (num_entries,),
            "bias": (num_lenses,),
            "idf": (num_grams,),
            "squares": (num_entries,),
            "quantiles_NQ": (num_lenses, num_levels),
            "levels_Q": (num_levels,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise PackError(f"text bank: {name} has shape {array.shape}, expected {shape}")
        if (self.idf is None) == (self.squares is None):
            raise PackError("text bank: needs either idf (one vocabulary) or squares (a vocabulary per lens)")
        if self.row_starts[0] != 0 or self.row_starts[-1] != num_entries or (np.diff(self.row_starts) < 0).any():
            raise PackError(f"text bank: row_starts do not rise from 0 to the {num_entries} entries")
        if num_entries and not (self.lenses.min() >= 0 and self.lenses.max() < num_lenses):
            raise PackError(f"text bank: an entry names a lens outside of the {num_lenses}")
        if len(self.rows) != num_grams:
            raise PackError("text bank: a gram is listed twice in the vocabulary")
        if (self.quantiles_NQ is None) != (self.levels_Q is None):
            raise PackError("text bank: needs both quantiles and their levels, or neither")
        if self.quantiles_NQ is not None and not (np.diff(self.quantiles_NQ, axis=1) >= 0).all():
            raise PackError("text bank: the background quantiles of a lens do not rise")
        shortest, longest = self.chars or (1, 1)
        if not (0 <= self.ngrams <= LONGEST_GRAM and 1 <= shortest <= longest <= LONGEST_GRAM):
            raise PackError(f"text bank: ngrams={self.ngrams}, chars={self.chars}; runs have 1 to {LONGEST_GRAM} parts")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each gram."""
        return {gram: row for row, gram in enumerate(self.vocabulary)}

    @cached_property
    def numerator_rows(self) -> GramRows:
        """The table of numerators, ready to be summed; made when it is first needed."""
        return GramRows(self.row_starts, self.lenses, self.numerators, len(self))

    @cached_property
    def _square_rows(self) -> GramRows:
        assert self.squares is not None
        return GramRows(self.row_starts, self.lenses, self.squares, len(self))

    def score(self, texts: Sequence[str]) -> Tensor:
        """Logit of every lens for every text, float32 [B, N]; a text without known grams gets the biases."""
        return self.score_counts([self.counts(text) for text in texts])

    def counts(self, text: str) -> dict[int, int]:
        """Rows of the known grams of a text, and how often each stands in it."""
        rows, found = self.rows, dict[int, int]()
        for gram in grams(text, self.ngrams, self.chars):
            if (row := rows.get(gram)) is not None:
                found[row] = found.get(row, 0) + 1
        return found

    def score_counts(self, counts: Sequence[Mapping[int, int]]) -> Tensor:
        """Logit of every lens for texts given as `counts` gives them, float32 [B, N]."""
        num_B = np.array([len(found) for found in counts], dtype=np.int64)
        gram_M = np.fromiter(chain.from_iterable(counts), np.int64, num_B.sum())
        count_M = np.fromiter(chain.from_iterable(found.values() for found in counts), np.int64, num_B.sum())
        tf_M, text_M = frequency(count_M, self.sublinear_tf), np.repeat(np.arange(len(counts)), num_B)
        if len(counts) == 1:
            return torch.from_numpy(self._logits(text_M, gram_M, tf_M, 1).astype(np.float32))
        logits_BN = np.empty((len(counts), len(self)), dtype=np.float32)
        touched_B = np.bincount(text_M, self.numerator_rows.scattered(gram_M), minlength=len(counts)) + len(self)
        total_B, ends_B, start = np.cumsum(touched_B), np.cumsum(num_B), 0
        while start < len(counts):
            # As many texts as fit the budget, at least one: matches come in order of text.
            limit = ENTRIES_AT_ONCE + (total_B[start - 1] if start else 0)
            stop = max(start + 1, int(np.searchsorted(total_B, limit, side="right")))
            part = slice(ends_B[start - 1] if start else 0, ends_B[stop - 1])
            logits_BN[start:stop] = self._logits(text_M[part] - start, gram_M[part], tf_M[part], stop - start)
            start = stop
        return torch.from_numpy(logits_BN)

    def _logits(self, text_M: np.ndarray, gram_M: np.ndarray, tf_M: np.ndarray, num_texts: int) -> np.ndarray:
        """Logits of a few texts from their matches, float64 [texts, N]."""
        # A norm of 0 means that nothing matched; the sum is 0 too, and the bias is what remains.
        if self.idf is not None:
            norm_B = np.sqrt(np.bincount(text_M, (tf_M * self.idf[gram_M]) ** 2, minlength=num_texts))
            factor_M = tf_M / np.where(norm_B > 0, norm_B, 1)[text_M]
            return self.numerator_rows.sums(text_M, gram_M, factor_M, num_texts) + self.bias
        norms_BN = self._square_rows.sums(text_M, gram_M, tf_M**2, num_texts)
        sums_BN = self.numerator_rows.sums(text_M, gram_M, tf_M, num_texts)
        return self.bias + sums_BN / np.sqrt(np.where(norms_BN > 0, norms_BN, 1))

    def percentile(self, logits_BN: Tensor) -> Tensor:
        """Share of background text that each logit exceeds, in [0, 1], as an activation lens gives it; NaN without."""
        if self.quantiles_NQ is None or self.levels_Q is None:
            return torch.full_like(logits_BN, torch.nan)
        quantiles_NQ = torch.from_numpy(np.ascontiguousarray(self.quantiles_NQ))
        levels_Q = torch.from_numpy(self.levels_Q)
        return interpolate(logits_BN.T.contiguous(), quantiles_NQ, levels_Q).T

    def calibrated(self, scale_N: np.ndarray, offset_N: np.ndarray) -> "TextBank":
        """The bank whose logits are scale · logit + offset.

        Raises:
            PackError: the bank has background quantiles, which are of the logits as they were.
        """
        if self.quantiles_NQ is not None:
            raise PackError("text bank: calibrate the logits first, take their background quantiles then")
        scale_N, offset_N = np.asarray(scale_N, dtype=np.float64), np.asarray(offset_N, dtype=np.float64)
        numerators = (self.numerators * scale_N[self.lenses]).astype(np.float32)
        bias = (self.bias * scale_N + offset_N).astype(np.float32)
        return replace(self, numerators=numerators, bias=bias, is_calibrated=True)

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
            quantiles_NQ=None if self.quantiles_NQ is None else self.quantiles_NQ[chosen],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, for a safetensors file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def description(self) -> dict[str, Any]:
        """The words and options, for a JSON file."""
        options = {"ngrams": self.ngrams, "chars": None if self.chars is None else list(self.chars)}
        options |= {"sublinear_tf": self.sublinear_tf, "is_calibrated": self.is_calibrated, "words": WORDS.pattern}
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
        if description["format"] not in READABLE or description["words"] != WORDS.pattern:
            raise PackError(
                f"text bank: format {description['format']} with words {description['words']!r}; this FTW reads "
                f"formats {READABLE} with {WORDS.pattern!r}. Use the FTW that wrote the pack"
            )
        chars = description.get("chars")
        if chars is not None and (len(chars) != 2 or not all(isinstance(size, int) for size in chars)):
            raise PackError(
                f"text bank: chars={chars!r}; expected the shortest and the longest run, for example [3, 5]"
            )
        dtypes = needed | {name: np.float32 for name in _ARRAYS if name in tensors and name not in needed}
        return cls(
            names=[str(name) for name in description["names"]],
            vocabulary=[str(gram) for gram in description["vocabulary"]],
            ngrams=int(description["ngrams"]),
            chars=None if chars is None else (chars[0], chars[1]),
            sublinear_tf=bool(description["sublinear_tf"]),
            is_calibrated=bool(description.get("is_calibrated", False)),
            **{name: tensors[name].cpu().numpy().astype(dtype, copy=False) for name, dtype in dtypes.items()},
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
