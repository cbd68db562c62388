"""The MLP family of the original design: W -> H -> H/2 -> 1 with ReLU, N networks as stacked tensors.

The first layer of all lenses is one matrix product (they read the same vector); the small second and third layers are
batched over lenses.

Axes: N lenses, B batch, W input width, H first hidden width, K = H/2.
"""

import math

import torch
from torch import Tensor, nn

from ftw.hat.lens import Head


class MLPHead(Head):
    """logit_n(x) = w3_n . relu(W2_n relu(W1_n x + b1_n) + b2_n) + b3_n for N lenses.

    Shapes:
        w1 [N, H, W], b1 [N, H], w2 [N, K, H], b2 [N, K], w3 [N, K], b3 [N].
    """

    def __init__(self, num_lenses: int, width: int, *, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_lenses, self.width, self.hidden, self.dropout = num_lenses, width, hidden, dropout
        second = hidden // 2
        self.w1 = nn.Parameter(_uniform((num_lenses, hidden, width), fan_in=width))
        self.b1 = nn.Parameter(torch.zeros(num_lenses, hidden))
        self.w2 = nn.Parameter(_uniform((num_lenses, second, hidden), fan_in=hidden))
        self.b2 = nn.Parameter(torch.zeros(num_lenses, second))
        self.w3 = nn.Parameter(_uniform((num_lenses, second), fan_in=second))
        self.b3 = nn.Parameter(torch.zeros(num_lenses))

    def forward(self, x_BW: Tensor) -> Tensor:
        first_BNH = torch.nn.functional.linear(x_BW, self.w1.flatten(0, 1), self.b1.flatten()).relu()
        first_NBH = self._drop(first_BNH.unflatten(1, (self.num_lenses, self.hidden))).transpose(0, 1)
        second_NBK = torch.baddbmm(self.b2.unsqueeze(1), first_NBH, self.w2.transpose(1, 2)).relu()
        return torch.einsum("nbk,nk->bn", self._drop(second_NBK), self.w3) + self.b3

    def weights(self) -> list[Tensor]:
        return [self.w1, self.w2, self.w3]

    @torch.no_grad()
    def fold_inputs(self, center_W: Tensor, scale_W: Tensor) -> "MLPHead":
        folded = self.rows(torch.arange(self.num_lenses, device=self.b3.device))
        folded.w1.copy_(self.w1 / scale_W)
        folded.b1.copy_(self.b1 - folded.w1 @ center_W)
        return folded

    @torch.no_grad()
    def rows(self, index: Tensor) -> "MLPHead":
        with torch.device("meta"):  # its random weights would be overwritten, and would move torch's generator
            chosen = MLPHead(len(index), self.width, hidden=self.hidden, dropout=self.dropout)
        chosen.to_empty(device="cpu").load_state_dict(
            {name: tensor[index] for name, tensor in self.state_dict().items()}
        )
        return chosen.train(self.training)

    def _drop(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.dropout, self.training)


def _uniform(shape: tuple[int, ...], *, fan_in: int) -> Tensor:
    # He et al. 2015, "Delving Deep into Rectifiers": keeps the variance through ReLU layers.
    bound = math.sqrt(6 / fan_in)
    return torch.empty(shape).uniform_(-bound, bound)
