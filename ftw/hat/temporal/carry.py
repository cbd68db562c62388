"""The forward direction of recurrent lenses, carried on from token to token through windows that overlap.

A window of 20 tokens every 5 is one of four that are open at any time. All four are moved on together by every 5 new
tokens, so in the forward direction the recurrent weights, whose reading is what a step costs, are read 5 times a window
and not 20. The backward direction begins at the newest token; it is read anew for each window.

Axes: N lenses (or the layers of a trunk), B sequences, T tokens, O open windows, S parts of a state, H units, G gate
units, F numbers a lens needs of a token (both directions of G), X leading axis of parts.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftw.hat.temporal.bank import SequenceBank, SequenceReader
from ftw.hat.temporal.recurrence import moved_on
from ftw.hat.temporal.recurrent import RecurrentHead
from ftw.hat.temporal.sequence import SequenceHead
from ftw.hat.temporal.side_by_side import side_by_side


class Networks(Protocol):
    """Bidirectional recurrent networks; `bias_n` is None for LSTMs."""

    @property
    def w_hh(self) -> Tensor: ...
    @property
    def bias_n(self) -> Tensor | None: ...


class Carry:
    """Forward states of the windows that are open.

    Args:
        bank: recurrent lenses, or lenses behind a trunk. window, stride: in tokens; the first is a multiple of the
            second.
    """

    def __init__(self, bank: SequenceBank, window: int, stride: int) -> None:
        self.bank, self.window, self.stride, self.num_open = bank, window, stride, window // stride
        for networks in [bank.trunk] if bank.trunk is not None else bank.lenses.filled:
            _side_by_direction(networks)
        self.begin()

    def begin(self) -> None:
        """Forget the sequences before."""
        self._open: dict[tuple[int, int], Tensor] = {}  # by first lens of a part and layer: [S, N, O B, H]

    def move(self, block_XBtF: list[Tensor]) -> None:
        """Move on by a stride of tokens; the window that was due is dropped and one more begins."""
        if self.bank.trunk is not None:
            self._advance((0, 0), self.bank.trunk, block_XBtF[0])
            return

        def move(part: slice) -> None:
            for layer, head in enumerate(self.bank.heads(part)):
                self._advance((part.start, layer), _recurrent(head), block_XBtF[layer][part])

        list(side_by_side(move, self._parts(block_XBtF[0].shape[1]), block_XBtF[0].device))

    def read(self, window_XBTF: list[Tensor]) -> Tensor:
        """Logits [B, N] of the window that is due; all but its last stride of tokens has been moved through."""
        if self.bank.trunk is not None:
            state_NBZ = self._states((0, 0), self.bank.trunk, window_XBTF[0])
            return self.bank.lenses.logits(state_NBZ.transpose(0, 1))

        def read(head: SequenceHead, layer: int, part: slice) -> Tensor:
            networks = _recurrent(head)
            return networks.decide(self._states((part.start, layer), networks, window_XBTF[layer][part]))

        return self.bank.decided(self._parts(window_XBTF[0].shape[1]), window_XBTF[0].device, read)

    def _parts(self, batch: int) -> list[slice]:
        return self.bank.parts(batch, self.window)

    def _states(self, key: tuple[int, int], networks: Networks, window_NBTF: Tensor) -> Tensor:
        """Last states of both directions, [N, B, 2H]."""
        forward_NBH = self._advance(key, networks, window_NBTF[:, :, -self.stride :])
        backward_SNBH = _through(networks, 1, window_NBTF.flip(2), None)
        return torch.cat([forward_NBH, backward_SNBH[0]], dim=-1)

    def _advance(self, key: tuple[int, int], networks: Networks, block_NBtF: Tensor) -> Tensor:
        """Last forward state of the window that is due, [N, B, H]; the others stay open and one more begins."""
        batch = block_NBtF.shape[1]
        state_SNOH = _through(networks, 0, block_NBtF.repeat(1, self.num_open, 1, 1), self._open.get(key))
        due_SNBH, open_SNOH = state_SNOH[:, :, :batch], state_SNOH[:, :, batch:]
        self._open[key] = torch.cat([open_SNOH, torch.zeros_like(due_SNBH)], dim=2)
        return due_SNBH[0]


def carry_of(lenses: SequenceReader, window: int, stride: int) -> Carry | None:
    """What carries the forward direction on; None for lenses that have none, and for windows that share no tokens."""
    if not isinstance(lenses, SequenceBank) or window % stride or window == stride:
        return None
    recurrent = all(isinstance(head, RecurrentHead) for head in lenses.heads(slice(0, len(lenses))))
    return Carry(lenses, window, stride) if recurrent or lenses.trunk is not None else None


def _through(networks: Networks, direction: int, tokens_NBTF: Tensor, state_SNBH: Tensor | None) -> Tensor:
    """States after some more tokens in one direction, [S, N, B, H]."""
    fed_NBTG = tokens_NBTF.unflatten(-1, (2, -1))[..., direction, :]
    bias_n_NH = None if networks.bias_n is None else networks.bias_n[:, direction]
    return moved_on(fed_NBTG, networks.w_hh[:, direction], bias_n_NH, state_SNBH)


def _side_by_direction(networks: nn.Module) -> None:
    """Lay out the recurrent weights so that those of one direction lie together; values and shape stay.

    torch multiplies a batch of matrices that lie apart one by one, fifteen times slower.
    """
    weight: Any = networks.get_parameter("w_hh")
    weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)


def _recurrent(head: SequenceHead) -> RecurrentHead:
    assert isinstance(head, RecurrentHead)
    return head
