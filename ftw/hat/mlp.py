"""The MLP family of the original design: W -> H -> H/2 -> 1 with ReLU, N networks as stacked tensors.

The first layer of all lenses is one matrix product (they read the same vector); the small second and third layers are
batched over lenses.

Axes: N lenses, B batch, W input width, H first hidden width, K = H/2.
"""

import math

import torch
from torch import Tensor, nn

from ftw.hat.lens import Head
from ftw.hat.product import FEW, product, stored


class MLPHead(Head):
    """logit_n(x) = w3_n . relu(W2_n relu(W1_n x + b1_n) + b2_n) + b3_n for N lenses.

    Shapes:
        w1 [N, H, W], b1 [N, H], w2 [N, K, H], b2 [N, K], w3 [N, K], b3 [N]; w1_step [N, H] when w1 is int8.
    """

    w1_step: Tensor | None

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
        self.register_buffer("w1_step", None)

    def forward(self, x_BW: Tensor) -> Tensor:
        step_M = None if self.w1_step is None else self.w1_step.flatten()
        first_BM = product(x_BW, self.w1.flatten(0, 1), step_M, self.b1.flatten()).relu()
        first_NBH = self._drop(first_BM.unflatten(1, (self.num_lenses, self.hidden))).transpose(0, 1)
        second_NBK = (self._second(first_NBH) + self.b2.unsqueeze(1)).relu()
        return torch.einsum("nbk,nk->bn", self._drop(second_NBK), self.w3) + self.b3

    def _second(self, first_NBH: Tensor) -> Tensor:
        if self.w2.dtype != torch.float32:
            return torch.bmm(first_NBH.to(self.w2.dtype), self.w2.transpose(1, 2)).float()
        if first_NBH.shape[1] <= FEW:  # for few states a product from the left reads the weights four times faster
            return torch.bmm(self.w2, first_NBH.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(first_NBH, self.w2.transpose(1, 2))

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

    def stored(self, precision: str) -> "MLPHead":
        w1, step = stored(self.w1.detach(), precision)
        # The second layer is a tenth of the weights: bfloat16 is fast everywhere and exact enough for it.
        w2 = self.w2.detach() if precision == "float32" else self.w2.detach().bfloat16()
        kept = self.part(0, self.num_lenses)
        assert isinstance(kept, MLPHead)  # `part` gives its own kind
        kept.w1, kept.w2 = (nn.Parameter(tensor, requires_grad=False) for tensor in (w1, w2))
        kept.w1_step = step
        return kept

    @torch.no_grad()
    def fold_norm(self, gain_NW: Tensor, shift_NW: Tensor) -> "MLPHead":
        folded = self.rows(torch.arange(self.num_lenses, device=self.b3.device))
        folded.w1.copy_(self.w1 * gain_NW.unsqueeze(1))
        folded.b1.copy_(self.b1 + torch.bmm(self.w1, shift_NW.unsqueeze(-1)).squeeze(-1))
        return folded

    def _drop(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.dropout, self.training)


def _uniform(shape: tuple[int, ...], *, fan_in: int) -> Tensor:
    # He et al. 2015, "Delving Deep into Rectifiers": keeps the variance through ReLU layers.
    bound = math.sqrt(6 / fan_in)
    return torch.empty(shape).uniform_(-bound, bound)
