"""From where on a reading stands out, when thousands of lenses read the same token.

One lens in a hundred is above the 99th percentile of its background at any token, so that of 7,947 lenses some eighty
always are. The floor here is for all lenses together: the rank that at most `CHANCE` lenses a background token reach,
so that at most that share of background tokens has one. The bound needs no independence, only the quantiles that
calibration keeps; pooled over all lenses they reach far beyond what those of one lens resolve.

Axes: N lenses, B tokens, Q quantiles.

Source: the bound is Boole's (G. Boole 1847, The Mathematical Analysis of Logic).
"""

from typing import Protocol

import torch
from torch import Tensor

CHANCE = 0.05
LOWEST = 1.0  # the 99th percentile: of a few lenses, too, one must be that high to stand out
BISECTIONS, HIGHEST = 40, 1e9
LINE_ERROR, SEEN_LENSES = 1e-3, 256  # share of a distance that rounding may be; lenses that are looked at


class Ranked(Protocol):
    """N lenses with background."""

    @property
    def calibrated(self) -> bool: ...
    def background(self) -> tuple[Tensor, Tensor]: ...
    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor: ...


def chance_floor(lenses: Ranked) -> float:
    """Lowest rank, at least 1, that at most `CHANCE` lenses a background token are expected to reach.

    Infinite without background: then nothing can be said to stand out.
    """
    if not lenses.calibrated:
        return float("inf")

    one_token = resolution(*lenses.background())

    def expected(rank: float) -> float:
        """Lenses above this rank at a background token."""
        share_N = 1 - lenses.percentile(logits_at(lenses, rank)[None])[0].double()
        # Between two tokens the line says less than there is, by one token at most.
        return float(torch.where(share_N > 0, share_N + one_token, 0).sum())

    low = high = LOWEST
    while expected(high) > CHANCE and high < HIGHEST:
        low, high = high, 2 * high
    for _ in range(BISECTIONS if high > low else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > CHANCE else (low, middle)
    return high


def resolution(quantiles_NQ: Tensor, levels_Q: Tensor) -> float:
    """Share of the background that a single token of it is, or a little more.

    How many tokens there were is not kept, but seen: quantiles between the two highest tokens lie on the line from the
    one to the other, and those below do not.
    """
    top_NQ, above_Q = quantiles_NQ[:: max(1, len(quantiles_NQ) // SEEN_LENSES)].double(), 1 - levels_Q.double()
    top_NQ = top_NQ[top_NQ[:, -1] > top_NQ[:, 0]]
    for place in range(len(above_Q) - 3, -1, -1):
        drop_N1 = (top_NQ[:, -1:] - top_NQ[:, place, None]).clamp_min(1e-30)
        line_NQ = top_NQ[:, -1:] - drop_N1 * (above_Q / above_Q[place])[place:]
        off_N = ((top_NQ[:, place:] - line_NQ).abs() / drop_N1).amax(dim=1)
        if not (off_N <= LINE_ERROR).double().mean() > 0.5:
            return float(above_Q[place])
    return 1.0


def middle_spread(quantiles_NQ: Tensor, levels_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Background median of each lens, and its distance to the 99th percentile: what ranks are measured in, [N] each."""
    median_N, upper_N = (quantiles_NQ[:, int((levels_Q - level).abs().argmin())] for level in (0.5, 0.99))
    return median_N.clone(), (upper_N - median_N).clamp_min(1e-6)


def logits_at(lenses: Ranked, rank: float) -> Tensor:
    """Logit of each lens at a positive rank, [N]; above the median even where the spread is lost in rounding."""
    median_N, spread_N = middle_spread(*lenses.background())
    above_N = torch.nextafter(median_N, torch.full_like(median_N, torch.inf))
    return torch.maximum(median_N + rank * spread_N, above_N)
