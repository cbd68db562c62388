"""A sequence lens reads the states of several tokens and gives one logit: what all such families share.

Its work falls into two parts, which live reading keeps apart: `tokens` is done once a token, `pooled` once a sequence
(or window). Sequences are padded on the right and carry their true length; padding enters nowhere.

Axes: N lenses, B sequences, T tokens, W input width, F numbers a lens needs of a token, G gate units.
"""

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ftw.errors import ConfigError
from ftw.hat.lens import Head

# Of what lenses at once make of the tokens, and of their recurrent weights, which every step reads again. In training
# parts that leave a core's cache take twice as long; in reading a step is short, and few large ones are faster.
BUDGET_BYTES, TRAINED_BYTES, READ_BYTES = 2**25, 2**22, 2**24
Own = TypeVar("Own", bound="SequenceHead")


class SequenceHead(Head):
    """N classifiers of sequences; a single state counts as a sequence of one token."""

    token_bytes: int  # memory that a lens needs for a token while it reads
    step_bytes = 0  # weights of a lens that every step reads again
    draws: torch.Generator | None = None  # what dropout draws from; None: torch's own

    def forward(self, x_BW: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logit of every lens for every sequence: [B, N], float32.

        Args:
            x_BW: single states [B, W], sequences [B, T, W], or sequences of each lens's own [N, B, T, W].
            lengths_B: true lengths, [B] (or [N, B]); at least 1 each. None: all tokens count.
        """
        x = x_BW.unsqueeze(1) if x_BW.ndim == 2 else x_BW
        return self.pooled(self.tokens(x), lengths_B)

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """What the lenses need of each token: [N, B, T, F] for [B, T, W], or for [N, B, T, W]."""

    @abstractmethod
    def pooled(self, tokens_NBTF: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of sequences, [B, N], from what `tokens` gave."""

    @abstractmethod
    def empty(self: Own, num_lenses: int) -> Own:
        """Lenses of the same shape, their weights undefined."""

    @torch.no_grad()
    def rows(self: Own, index: Tensor) -> Own:
        with torch.device("meta"):  # its random weights would be overwritten, and would move torch's generator
            chosen = self.empty(len(index))
        rows = {name: tensor[index].cpu() for name, tensor in self.state_dict().items()}
        chosen.to_empty(device="cpu").load_state_dict(rows)
        return chosen.train(self.training)

    def fold_inputs(self: Own, center_W: Tensor, scale_W: Tensor) -> Own:
        shape = (self.num_lenses, self.width)
        return self.fold_norm((1 / scale_W).expand(shape), (-center_W / scale_W).expand(shape))

    @abstractmethod
    def fold_norm(self: Own, gain_NW: Tensor, shift_NW: Tensor) -> Own: ...

    def stored(self: Own, precision: str) -> Own:
        check_precision(precision)
        kept: Any = self.part(0, self.num_lenses)
        for name in kept.large():
            weight = getattr(kept, name).detach().to(getattr(torch, precision))
            setattr(kept, name, nn.Parameter(weight, requires_grad=False))
        return kept

    @abstractmethod
    def large(self) -> list[str]:
        """Names of the weights whose precision decides memory and speed."""

    def weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.large()]


def check_precision(precision: str) -> None:
    """Raise ConfigError for what sequence lenses do not compute in."""
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision {precision!r} of sequence lenses: choose float32 or bfloat16")


def token_product(x: Tensor, weight_NFW: Tensor, bias_NF: Tensor | None = None) -> Tensor:
    """Every token times every lens's weights: [N, B, T, F] for shared tokens [B, T, W] or own ones [N, B, T, W].

    Computed in bfloat16 if either side is.
    """
    dtype = read_in(x, weight_NFW)
    x, weight_NFW = x.to(dtype), weight_NFW.to(dtype)
    if x.ndim == 4:
        factors = x.flatten(1, 2), weight_NFW.transpose(1, 2)
        whole = torch.bmm(*factors) if bias_NF is None else torch.baddbmm(bias_NF.unsqueeze(1).to(dtype), *factors)
        return whole.unflatten(1, x.shape[1:3])
    bias_M = None if bias_NF is None else bias_NF.flatten().to(dtype)
    product_BTM = torch.nn.functional.linear(x, weight_NFW.flatten(0, 1), bias_M)
    return product_BTM.unflatten(-1, weight_NFW.shape[:2]).permute(2, 0, 1, 3)


def read_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """What states and weights are multiplied in: bfloat16 if either is."""
    return torch.bfloat16 if torch.bfloat16 in (x.dtype, weight.dtype) else torch.float32


def dropped(x: Tensor, share: float, draws: torch.Generator | None) -> Tensor:
    """Dropout that can draw from a generator of its own, so that parts trained side by side do not mix their draws."""
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=draws) / (1 - share)


def beyond(lengths: Tensor | None, num_tokens: int) -> Tensor | None:
    """Which tokens are padding, bool [1 or N, B, T]; None where none is."""
    if lengths is None or int(lengths.min()) >= num_tokens:
        return None
    return torch.arange(num_tokens, device=lengths.device) >= lengths.view(-1, lengths.shape[-1], 1)


def lenses_at_once(
    head: SequenceHead, batch: int, tokens: int, *, cached_bytes: int, budget_bytes: int = BUDGET_BYTES
) -> int:
    """How many lenses fit a budget of memory at once, and their recurrent weights the cache; at least one."""
    by_tokens = budget_bytes // max(1, batch * tokens * head.token_bytes)
    by_weights = cached_bytes // head.step_bytes if head.step_bytes else head.num_lenses
    return max(1, min(head.num_lenses, by_tokens, by_weights))


def uniform(shape: tuple[int, ...], bound: float) -> nn.Parameter:
    """Random weights between -bound and bound."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
