"""A trunk: one bidirectional LSTM a layer that all lenses share; each concept is then a linear head on its last states.

What a basis is in width, a trunk is in time: tens of thousands of concepts read sequences for the price of one network
and one matrix product.

Axes: L layers, B sequences, T tokens, W input width, 2 directions, H units, G gate units (4H), Z = 2H.
"""

import math

import torch
from torch import Tensor, nn

from ftw.hat.temporal.recurrence import states_of
from ftw.hat.temporal.recurrent import fed_tokens, last_states
from ftw.hat.temporal.sequence import read_in, uniform


class Trunk(nn.Module):
    """One encoder a layer of the substrate.

    Shapes:
        w_ih [L, 2, G, W], w_hh [L, 2, G, H], bias [L, 2, G].
    """

    bias_n = None  # of a GRU's candidate

    def __init__(self, num_layers: int, width: int, *, hidden: int = 256) -> None:
        super().__init__()
        self.num_layers, self.width, self.hidden = num_layers, width, hidden
        bound = 1 / math.sqrt(hidden)
        self.w_ih = uniform((num_layers, 2, 4 * hidden, width), bound)
        self.w_hh = uniform((num_layers, 2, 4 * hidden, hidden), bound)
        self.bias = nn.Parameter(torch.zeros(num_layers, 2, 4 * hidden))

    def forward(self, x_BTLW: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Last states of both directions on every layer, [B, L, Z] in float32."""
        x_LBTW = x_BTLW.permute(2, 0, 1, 3)
        x_LBTW = x_LBTW.to(read_in(x_LBTW, self.w_ih))
        return states_of(x_LBTW, self.w_ih, self.bias, self.w_hh, None, lengths_B).transpose(0, 1)

    def tokens(self, x_BTLW: Tensor) -> Tensor:
        """What each token gives to the gates: [L, B, T, 2G]."""
        return fed_tokens(x_BTLW.permute(2, 0, 1, 3), self.w_ih, self.bias)

    def pooled(self, tokens_LBTF: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Last states, [B, L, Z], from what `tokens` gave."""
        return last_states(tokens_LBTF, self.w_hh, None, lengths_B).transpose(0, 1)

    @torch.no_grad()
    def fold_inputs(self, center_LW: Tensor, scale_LW: Tensor) -> "Trunk":
        """The trunk that gives on x what this one gives on (x - center) / scale."""
        folded = Trunk(self.num_layers, self.width, hidden=self.hidden)
        folded.w_ih.copy_(self.w_ih / scale_LW[:, None, None])
        folded.w_hh.copy_(self.w_hh)
        folded.bias.copy_(self.bias - torch.einsum("lzgw,lw->lzg", folded.w_ih, center_LW))
        return folded.requires_grad_(False)
