"""Where logits stand among the background of their lenses: the step from a number to a rank that can be compared.

Live, a handful of values is asked for at every token, when the model in between has driven everything from the cache:
then the fewest calls win. At the end all lenses of all tokens are: then the fewest passes over memory do.

Axes: M rows (lenses), B values a row, Q quantiles, R rows in which a value equals a quantile.
"""

import numpy as np
import torch
from torch import Tensor

FEW_VALUES, MANY_VALUES = 256, 4096
VALUES_AT_ONCE = 16384  # stay in the cache between the passes
SMALLEST_STEP = 1e-12


def interpolate(logits_MB: Tensor, quantiles_MQ: Tensor, levels_Q: Tensor) -> Tensor:
    """Percentile of each value in its row's quantiles, [M, B]: linear between them, 0 below and 1 above.

    A value on a flat step stands in its middle; NaN stays NaN.
    """
    on_cpu = logits_MB.device.type == "cpu"
    if on_cpu and 0 < logits_MB.numel() <= FEW_VALUES:
        few = _few(logits_MB.detach().numpy(), quantiles_MQ.detach().numpy(), levels_Q.numpy())
        return torch.from_numpy(few).to(logits_MB.dtype)
    rows = max(1, VALUES_AT_ONCE // max(1, logits_MB.shape[1]))
    if on_cpu and len(logits_MB) > rows:
        parts = zip(logits_MB.split(rows), quantiles_MQ.split(rows), strict=True)
        return torch.cat([_many(part_MB, part_MQ, levels_Q) for part_MB, part_MQ in parts])
    return _many(logits_MB, quantiles_MQ, levels_Q)


def _few(logits_MB: np.ndarray, quantiles_MQ: np.ndarray, levels_Q: np.ndarray) -> np.ndarray:
    rows_M1 = np.arange(len(logits_MB))[:, None]
    below = (quantiles_MQ[:, None, 1:-1] < logits_MB[:, :, None]).sum(-1)
    low, high = quantiles_MQ[rows_M1, below], quantiles_MQ[rows_M1, below + 1]
    share = np.clip((logits_MB - low) / np.maximum(high - low, SMALLEST_STEP), 0, 1)
    low_level, high_level = levels_Q[below], levels_Q[below + 1]
    percentile = np.where(
        share < 0.5, low_level + share * (high_level - low_level), high_level - (high_level - low_level) * (1 - share)
    )
    percentile[logits_MB > quantiles_MQ[:, -1:]] = 1.0
    percentile[logits_MB < quantiles_MQ[:, :1]] = 0.0
    met = (low == logits_MB) | (high == logits_MB)
    if met.any():
        first = (quantiles_MQ[:, None] < logits_MB[:, :, None]).sum(-1).clip(max=len(levels_Q) - 1)
        last = (quantiles_MQ[:, None] <= logits_MB[:, :, None]).sum(-1).clip(min=1) - 1
        percentile = np.where(met, (levels_Q[first] + levels_Q[last]) / 2, percentile)
    return percentile


def _many(logits_MB: Tensor, quantiles_MQ: Tensor, levels_Q: Tensor) -> Tensor:
    quantiles_MQ, logits_MB = quantiles_MQ.contiguous(), logits_MB.contiguous()  # torch warns of anything else
    below = _num_below(logits_MB, quantiles_MQ)
    low, high = quantiles_MQ.gather(1, below), quantiles_MQ.gather(1, below + 1)
    share = (logits_MB - low).div_((high - low).clamp_min_(SMALLEST_STEP)).clamp_(0, 1)
    low_level, high_level = (
        side_Q.index_select(0, below.flatten()).view_as(share) for side_Q in (levels_Q[:-1], levels_Q[1:])
    )
    percentile = torch.lerp(low_level, high_level, share)
    if percentile.device.type != "cpu" or (levels_Q[0], levels_Q[-1]) != (0, 1):  # else the ends are 0 and 1 already
        percentile = percentile.masked_fill(logits_MB > quantiles_MQ[:, -1:], 1.0)
        percentile = percentile.masked_fill(logits_MB < quantiles_MQ[:, :1], 0.0)
    # Values that equal a quantile are rare (constant lenses, the extremes); two searches cost more than all the rest.
    met = (low == logits_MB) | (high == logits_MB)
    if met.any():
        rows_R = met.any(dim=1).nonzero()[:, 0]
        met_RQ, met_RB = quantiles_MQ[rows_R], logits_MB[rows_R]
        first, after = (torch.searchsorted(met_RQ, met_RB, right=right) for right in (False, True))
        middle = (levels_Q[first.clamp_max(len(levels_Q) - 1)] + levels_Q[(after - 1).clamp_min(0)]) / 2
        percentile[rows_R] = torch.where(met[rows_R], middle, percentile[rows_R])
    return percentile


def _num_below(logits_MB: Tensor, quantiles_MQ: Tensor) -> Tensor:
    """How many of its row's quantiles between the first and the last a value exceeds, [M, B]."""
    if logits_MB.device.type != "cpu" or logits_MB.numel() < MANY_VALUES:
        return torch.searchsorted(quantiles_MQ, logits_MB).clamp_(1, quantiles_MQ.shape[1] - 1) - 1
    # torch's search guesses wrong at every branch: halving without branches takes a third of its time.
    below, left = torch.zeros_like(logits_MB, dtype=torch.long), quantiles_MQ.shape[1] - 2
    while left:
        half = (left + 1) // 2
        below.add_(quantiles_MQ.gather(1, below + half) < logits_MB, alpha=half)
        left -= half
    return below
