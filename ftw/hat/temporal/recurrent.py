"""Recurrent families: N independent bidirectional LSTM (or GRU) classifiers as stacked tensors.

The family of the original design: 256 units in each direction, the last states of both side by side, a linear head.

Axes: N lenses, B sequences, T tokens, W input width, 2 directions, H units, G gate units (4H or 3H).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ftw.hat.temporal.recurrence import final_states, states_of
from ftw.hat.temporal.sequence import SequenceHead, dropped, read_in, token_product, uniform

GATES = {"lstm": 4, "gru": 3}


class RecurrentHead(SequenceHead):
    """logit_n = w_n . [last forward state, last backward state] + b_n for N bidirectional networks.

    Shapes:
        w_ih [N, 2, G, W], w_hh [N, 2, G, H], bias [N, 2, G], bias_n [N, 2, H] (GRU), w_out [N, 2H], b_out [N].
    """

    def __init__(
        self, num_lenses: int, width: int, *, cell: str = "lstm", hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_lenses, self.width, self.cell, self.hidden, self.dropout = num_lenses, width, cell, hidden, dropout
        bound, gates = 1 / math.sqrt(hidden), GATES[cell] * hidden
        self.w_ih = uniform((num_lenses, 2, gates, width), bound)
        self.w_hh = uniform((num_lenses, 2, gates, hidden), bound)
        self.bias = nn.Parameter(torch.zeros(num_lenses, 2, gates))
        self.bias_n = nn.Parameter(torch.zeros(num_lenses, 2, hidden)) if cell == "gru" else None
        self.w_out = uniform((num_lenses, 2 * hidden), bound)
        self.b_out = nn.Parameter(torch.zeros(num_lenses))

    @property
    def token_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (of the shape, not stored)
        """Gates of both directions, a state and a cell; twice for the way back."""
        return 2 * self.hidden * (2 * GATES[self.cell] * self.w_hh.element_size() + 8)

    @property
    def step_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (as above)
        return self.w_hh[:1].numel() * self.w_hh.element_size() if self.num_lenses else 0

    def forward(self, x_BW: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        if x_BW.ndim < 4:
            return super().forward(x_BW, lengths_B)
        x_NBTW = x_BW.to(read_in(x_BW, self.w_ih))
        return self.decide(states_of(x_NBTW, self.w_ih, self.bias, self.w_hh, self.bias_n, lengths_B))

    def tokens(self, x: Tensor) -> Tensor:
        return fed_tokens(x, self.w_ih, self.bias)

    def pooled(self, tokens_NBTF: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.decide(last_states(tokens_NBTF, self.w_hh, self.bias_n, lengths))

    def decide(self, state_NBH: Tensor) -> Tensor:
        """Logits [B, N] of the last states of both directions."""
        if self.training and self.dropout:
            state_NBH = dropped(state_NBH, self.dropout, self.draws)
        return torch.einsum("nbh,nh->bn", state_NBH, self.w_out.float()) + self.b_out

    def empty(self, num_lenses: int) -> "RecurrentHead":
        return RecurrentHead(num_lenses, self.width, cell=self.cell, hidden=self.hidden, dropout=self.dropout)

    @torch.no_grad()
    def fold_norm(self, gain_NW: Tensor, shift_NW: Tensor) -> "RecurrentHead":
        folded = self.rows(torch.arange(self.num_lenses))
        folded.w_ih.copy_(self.w_ih * gain_NW[:, None, None])
        folded.bias.copy_(self.bias + torch.einsum("nzgw,nw->nzg", self.w_ih, shift_NW))
        return folded

    def large(self) -> list[str]:
        return ["w_ih", "w_hh"]


def fed_tokens(x: Tensor, w_ih_N2GW: Tensor, bias_N2G: Tensor) -> Tensor:
    """What each token gives to the gates of both directions: [N, B, T, 2G]."""
    return token_product(x, w_ih_N2GW.flatten(1, 2), bias_N2G.flatten(1))


def last_states(fed_NBTF: Tensor, w_hh_N2GH: Tensor, bias_n_N2H: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Last states of both directions, [N, B, 2H] in float32."""
    return final_states(fed_NBTF.unflatten(-1, (2, -1)), w_hh_N2GH, bias_n_N2H, lengths)


def from_torch(module: nn.LSTM | nn.GRU, w_out_H: Tensor, b_out: Tensor) -> RecurrentHead:
    """A head of one lens with the weights of torch's bidirectional LSTM or GRU of one layer, and a linear head."""
    cell = "gru" if isinstance(module, nn.GRU) else "lstm"
    head = RecurrentHead(1, module.input_size, cell=cell, hidden=module.hidden_size)

    def both(name: str) -> Any:
        return torch.stack([getattr(module, f"{name}_l0{direction}") for direction in ("", "_reverse")]).detach()

    bias_2G, recurrent_2G = both("bias_ih"), both("bias_hh")
    if head.bias_n is not None:  # its candidate gate multiplies the recurrent bias by the reset gate
        head.bias_n.data[0] = recurrent_2G[:, 2 * head.hidden :]
        recurrent_2G = torch.cat([recurrent_2G[:, : 2 * head.hidden], torch.zeros_like(head.bias_n[0])], dim=1)
    head.w_ih.data[0], head.w_hh.data[0] = both("weight_ih"), both("weight_hh")
    head.bias.data[0] = bias_2G + recurrent_2G
    head.w_out.data[0], head.b_out.data[0] = w_out_H.detach().flatten(), b_out.detach().squeeze()
    return head
