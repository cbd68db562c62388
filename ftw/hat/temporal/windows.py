"""Sliding windows over sequences that grow: every `stride` tokens the lenses read the last `window` of them.

At the start windows are truncated, as short as what there is; the end of a sequence is read whatever the stride. What
lenses need of a token is computed once, for all tokens since the window before together; all windows that are due are
one batch, and of one that is due alone the forward direction is carried on. A window is read from its own tokens alone:
a recorded text and the same text live give the same logits.

Axes: N lenses, B sequences, t new tokens, L layers, D model width, K windows, X leading axis of parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftw.errors import ConfigError
from ftw.hat.temporal.bank import SequenceReader
from ftw.hat.temporal.carry import Carry, carry_of

TOKENS_AT_ONCE = 64  # of a long text: bounds the memory for what lenses need of each token


class WindowReader:
    """Lenses over sliding windows, as the recorder's bank.

    Args:
        lenses: what reads a window. window, stride: in tokens.

    Raises:
        ConfigError: a window or a stride below one, or a stride beyond the window, which would leave tokens unread.
    """

    def __init__(self, lenses: SequenceReader, *, window: int = 20, stride: int = 5) -> None:
        if window < 1 or not 1 <= stride <= window:
            raise ConfigError(f"window={window}, stride={stride}: a window has 1 token or more, a stride 1 to {window}")
        self.lenses, self.window, self.stride = lenses, window, stride
        self.names, self.layers, self.width = list(lenses.names), lenses.layers, lenses.width
        self.calibrated = lenses.calibrated
        self.rows_of, self.rank, self.percentile = lenses.rows_of, lenses.rank, lenses.percentile
        self.background = lenses.background
        self._carry = carry_of(lenses, window, stride)
        self.begin()

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, states_BLD: Tensor, /) -> Tensor:
        """Logits of single states as windows of one token, [B, N]."""
        return self._read(self.lenses.tokens(states_BLD.unsqueeze(1)), [(0, 1)])[:, 0]

    def begin(self) -> None:
        """Forget the sequences before."""
        self._states: list[Tensor] = []  # all of them: a sequence that ended between two windows is read at the end
        self._parts: list[Tensor] = []  # of the last tokens, as many as a window needs
        self.num_tokens = self._num_prepared = self._num_carried = 0
        if self._carry is not None:
            self._carry.begin()

    def is_end(self, num_tokens: int) -> bool:
        """Whether a window ends after so many tokens."""
        return num_tokens > 0 and num_tokens % self.stride == 0

    def start(self, end: int) -> int:
        """First token of the window that ends before token `end`."""
        return max(0, end - self.window)

    def push(self, states_BtLD: Tensor) -> Tensor:
        """Logits of the windows that end at each of some new tokens, [B, t, N]; NaN where none ends."""
        batch, num_new = states_BtLD.shape[:2]
        logits_BtN = torch.full((batch, num_new, len(self)), torch.nan, device=states_BtLD.device)
        for at in range(0, num_new, TOKENS_AT_ONCE):
            part_BtLD = states_BtLD[:, at : at + TOKENS_AT_ONCE]
            self._states.append(part_BtLD)
            before, self.num_tokens = self.num_tokens, self.num_tokens + part_BtLD.shape[1]
            ends = [end for end in range(before + 1, self.num_tokens + 1) if self.is_end(end)]
            if not ends:
                continue
            first = self._prepare()
            if len(ends) == 1 and self._carry is not None:
                read_BKN = self._carried(self._carry, ends[0], first).unsqueeze(1)
            else:
                read_BKN = self._read(self._parts, [(self.start(end) - first, end - first) for end in ends])
            places = torch.tensor([at + end - before - 1 for end in ends], device=logits_BtN.device)
            logits_BtN[:, places] = read_BKN
            # The next window starts after the first of those that were due now.
            kept = min(self.window, self.num_tokens)
            self._parts = [part[:, :, -kept:] for part in self._parts]
        return logits_BtN

    def tails(self, lengths: Sequence[int]) -> dict[int, Tensor]:
        """By sequence, the logits [N] of the window at its end, for those that end where no window was due.

        Args:
            lengths: tokens of each sequence, at most as many as were pushed.
        """
        rows = [row for row, num in enumerate(lengths) if num > 0 and not self.is_end(num)]
        if not rows:
            return {}
        states_BTLD = torch.cat(self._states, dim=1)
        size = max(lengths[row] - self.start(lengths[row]) for row in rows)
        padded_BTLD = states_BTLD.new_zeros(len(rows), size, *states_BTLD.shape[2:])
        held = torch.tensor([lengths[row] - self.start(lengths[row]) for row in rows], device=states_BTLD.device)
        for place, row in enumerate(rows):
            window = states_BTLD[row, self.start(lengths[row]) : lengths[row]]
            padded_BTLD[place, : len(window)] = window
        return dict(zip(rows, self.lenses.pooled(self.lenses.tokens(padded_BTLD), held), strict=True))

    def _carried(self, carry: Carry, end: int, first: int) -> Tensor:
        """Logits [B, N] of the one window that is due; `first` is the token that the parts begin with."""
        if self._num_carried != end - self.stride:  # windows before this one were read together: catch up
            carry.begin()
            for at in range(self.start(end), end - self.stride, self.stride):
                carry.move([part[:, :, at - first : at - first + self.stride] for part in self._parts])
        self._num_carried = end
        return carry.read([part[:, :, self.start(end) - first : end - first] for part in self._parts])

    def _prepare(self) -> int:
        """Bring the parts up to the newest token; returns the token that they begin with."""
        num_due, waiting, place = self.num_tokens - self._num_prepared, list[Tensor](), len(self._states)
        while sum(part.shape[1] for part in waiting) < num_due:
            place -= 1
            waiting.insert(0, self._states[place])
        fresh = self.lenses.tokens(torch.cat(waiting, dim=1)[:, -num_due:])
        old = self._parts or [part[:, :, :0] for part in fresh]
        self._parts = [torch.cat(pair, dim=2) for pair in zip(old, fresh, strict=True)]
        self._num_prepared = self.num_tokens
        return self.num_tokens - self._parts[0].shape[2]

    def _read(self, parts_XBTF: list[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
        """Logits of some windows of every sequence, [B, K, N]; all in one batch, short ones padded."""
        batch, num = parts_XBTF[0].shape[1], len(spans)
        size = max(stop - start for start, stop in spans)
        device = parts_XBTF[0].device
        starts_K1 = torch.tensor([[start] for start, _ in spans], device=device)
        lengths_K = torch.tensor([stop - start for start, stop in spans], device=device)
        last = parts_XBTF[0].shape[2] - 1
        places_KT = (starts_K1 + torch.arange(size, device=device)).clamp_max(last)
        windows = [part[:, :, places_KT].flatten(1, 2) for part in parts_XBTF]
        return self.lenses.pooled(windows, lengths_K.repeat(batch)).unflatten(0, (batch, num))
