"""The last words of a text that is being written, read by all text lenses at a cost that depends on what changed.

A token is often a piece of a word, and a word alone says little; so the text side of a monitor reads a window over the
last tokens, as text. The window keeps the counts of its grams and the sums of their rows: a step counts the grams that
enter and leave, and adds or takes away their rows.

Axes: T tokens, N lenses.
"""

import re
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError
from ftw.hat.floor import chance_floor
from ftw.hat.readout import TextLenses
from ftw.hat.text import WORDS, TextBank, char_runs, frequency
from ftw.hat.text_embedding import AnyText, EmbeddingWindow
from ftw.hat.timeline import Timeline

TINY = 1e-30  # a norm that every gram's idf of 0 would make 0
TOKENS_AT_ONCE = 256  # percentiles of a long timeline are computed this many tokens at a time, to bound memory
CHUNK = re.compile(r"\S+")
LETTER, SIGN = re.compile(r"\w"), re.compile(r"\S")


@dataclass
class _Chunk:
    """Text between two spaces, as far as it is known and still in the window.

    Attributes:
        start: place of its first character in the stream. text: with one character before the window, if it is cut.
        words, runs: what of it is counted.
    """

    start: int
    text: str
    words: list[str]
    runs: list[str]

    @property
    def stop(self) -> int:
        return self.start + len(self.text)


class TextWindow:
    """A sliding window over decoded pieces, and what a text bank says about it.

    The window's text is what the last `tokens` pieces spell. A word that is not finished yet counts as it stands; a
    word whose beginning has left the window is dropped whole, because the rest of it would be another word.

    Args:
        tokens: pieces held.
    """

    def __init__(self, bank: TextBank, *, tokens: int = 32) -> None:
        if tokens < 1:
            raise ConfigError(f"a text window of {tokens} tokens holds nothing; give at least 1 (32 by default)")
        self.bank, self.tokens = bank, tokens
        # Where runs of characters count, the words that a cut must not go through are the chunks between spaces.
        self._inner = SIGN if bank.chars else LETTER
        self.clear()

    def clear(self) -> None:
        """Forget everything, as between two turns of a chat."""
        self._pieces: deque[str] = deque()
        self._left = self._stop = 0  # places in the stream: first character held, end of the text
        self._chunks: deque[_Chunk] = deque()
        self._words: deque[str] = deque()
        self._counts: dict[int, int] = {}
        self._before: dict[int, int] = {}  # counts, as they were summed, of the rows that changed since
        self._sums_N, self._square = np.zeros(len(self.bank)), 0.0

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def text(self) -> str:
        """What is read: the pieces held, without a word that is cut at the left."""
        whole = "".join(self._pieces)
        if not self._chunks or self._chunks[0].start >= self._left:
            return whole
        first = self._chunks[0]
        return whole[first.start + len(first.text) - len(self._visible(first)) - self._left :]

    @property
    def counts(self) -> dict[int, int]:
        """Rows of the known grams in the window, and how often each stands there; equal to the bank's for `text`."""
        return dict(self._counts)

    @property
    def has_words(self) -> bool:
        """Whether the window holds any gram that a lens knows."""
        return bool(self._counts)

    def push(self, piece: str) -> None:
        """Take the next decoded piece; the oldest one leaves a full window."""
        self._pieces.append(piece)
        for match in CHUNK.finditer(piece):
            start = self._stop + match.start()
            if not (self._chunks and self._chunks[-1].stop == start):
                self._chunks.append(_Chunk(start, "", [], []))
            self._chunks[-1].text += match.group()
            self._recount(self._chunks[-1], last=True)
        self._stop += len(piece)
        if len(self._pieces) > self.tokens:
            self._drop(len(self._pieces.popleft()))

    def logits(self) -> Tensor:
        """Logit of every lens for the window's text, float32 [N]; equal to the bank's `score` of it."""
        bank = self.bank
        if bank.idf is None:
            # Norms per lens would leave rounding behind where none of its grams is left; sum anew.
            return bank.score_counts([self._counts])[0]
        before = np.fromiter(self._before.values(), np.int64, len(self._before))
        row_M = np.fromiter(self._before, np.int64, len(self._before))
        now = np.array([self._counts.get(row, 0) for row in self._before], dtype=np.int64)
        old_M, new_M = (np.where(count > 0, frequency(count.clip(1), bank.sublinear_tf), 0) for count in (before, now))
        for row, change in zip(row_M.tolist(), (new_M - old_M).tolist(), strict=True):
            if change:
                bank.numerator_rows.add(self._sums_N, row, change)
        self._square += float(((new_M**2 - old_M**2) * bank.idf[row_M].astype(np.float64) ** 2).sum())
        self._before.clear()
        if not self._counts:
            self._sums_N[:], self._square = 0.0, 0.0  # what is left is rounding, and the norm of nothing is no divisor
            return torch.from_numpy(bank.bias.copy())
        return torch.from_numpy((self._sums_N / max(self._square, TINY) ** 0.5 + bank.bias).astype(np.float32))

    def _drop(self, num_characters: int) -> None:
        """Let characters leave at the left."""
        self._left += num_characters
        while self._chunks and self._chunks[0].start < self._left:
            first = self._chunks[0]
            # An unfinished chunk stays, even cut to nothing: what it goes on with is cut too.
            growing = len(self._chunks) == 1 and first.stop == self._stop
            if first.stop > self._left or (first.stop == self._left and growing):
                # One character before the window is kept: it tells whether the cut goes through a word.
                first.text = first.text[self._left - 1 - first.start :]
                first.start = self._left - 1
                self._recount(first, last=False)
                return
            first.text = ""
            self._recount(first, last=False)
            self._chunks.popleft()

    def _visible(self, chunk: _Chunk) -> str:
        """The part of a chunk that is in the window and begins with the beginning of a word."""
        cut = max(0, self._left - chunk.start)
        if cut and self._inner.match(chunk.text, cut - 1):
            while cut < len(chunk.text) and self._inner.match(chunk.text, cut):
                cut += 1
        return chunk.text[cut:]

    def _recount(self, chunk: _Chunk, *, last: bool) -> None:
        """Count the last or the first chunk of the window as it is now, instead of as it was."""
        pop, append = self._words.pop, self._words.append
        if not last:
            pop, append = self._words.popleft, self._words.appendleft
        # Lower case of the whole chunk at once: a Greek sigma looks at its neighbours.
        lower = self._visible(chunk).lower()
        words = WORDS.findall(lower) if self.bank.ngrams else []
        if words != chunk.words:
            for _ in chunk.words:
                self._count_end(-1, last=last)
                pop()
            for word in words if last else reversed(words):
                append(word)
                self._count_end(+1, last=last)
            chunk.words = words
        if self.bank.chars is not None:
            runs = char_runs(lower, *self.bank.chars) if lower else []
            for by, counted in ((-1, chunk.runs), (+1, runs)):
                for run in counted:
                    self._count(run, by)
            chunk.runs = runs

    def _count_end(self, by: int, *, last: bool) -> None:
        """Count the runs of words that the outermost word at one end belongs to."""
        words = self._words
        for size in range(1, min(self.bank.ngrams, len(words)) + 1):
            run = [words[place] for place in (range(-size, 0) if last else range(size))]
            self._count(run[0] if size == 1 else " ".join(run), by)

    def _count(self, gram: str, by: int) -> None:
        row = self.bank.rows.get(gram)
        if row is None:
            return
        count = self._counts.get(row, 0)
        self._before.setdefault(row, count)
        if count + by:
            self._counts[row] = count + by
        else:
            del self._counts[row]


Window = TextWindow | EmbeddingWindow


def open_window(bank: AnyText, *, tokens: int = 32) -> Window:
    """A window for text lenses of any family.

    Raises:
        ConfigError: a window of no tokens.
    """
    return TextWindow(bank, tokens=tokens) if isinstance(bank, TextBank) else EmbeddingWindow(bank, tokens=tokens)


def text_timeline(timeline: Timeline, bank: AnyText, *, tokens: int = 32) -> Timeline:
    """What the text lenses say at every token of a timeline, from the words up to and including that token.

    The window is emptied at special tokens and where the answer begins: what the model has written is set against what
    it thinks, not what it was asked. Special tokens are no text; their readings are NaN.

    Args:
        tokens: of the window; 1 reads bare tokens.

    Returns:
        A timeline of the same tokens with the bank's concepts; percentiles are NaN if the bank has no background.
    """
    window, width = open_window(bank, tokens=tokens), len(bank)
    logits_TN = torch.full((len(timeline), width), torch.nan)
    for position, piece in enumerate(timeline.tokens):
        begins = position > 0 and timeline.is_prompt[position - 1] and not timeline.is_prompt[position]
        if timeline.is_special[position] or begins:
            window.clear()
        if not timeline.is_special[position]:
            window.push(piece)
            logits_TN[position] = window.logits()
    meta = {**timeline.meta, "reading": "text", "window_tokens": tokens, "is_calibrated": bank.is_calibrated}
    percentiles_TN = torch.cat([bank.percentile(part_TN) for part_TN in logits_TN.split(TOKENS_AT_ONCE)])
    lenses, readings = TextLenses(bank), {"logits_TN": logits_TN.numpy(), "percentiles_TN": percentiles_TN.numpy()}
    if lenses.calibrated:
        readings |= {"rank_TN": lenses.rank(logits_TN).numpy(), "floor": chance_floor(lenses)}
    else:
        readings |= {"rank_TN": None, "floor": None}
    return replace(timeline, concepts=lenses.names, ms_per_token=None, meta=meta, **readings)
