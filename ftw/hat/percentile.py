"""Where logits stand among the background of their lenses: the step from a number to a rank that can be compared.

Live, a handful of values is asked for at every token, when the model in between has driven everything from the cache:
then plain Python, one value at a time, beats every call on arrays. At the end all lenses of all tokens are: then the
fewest passes over memory do.

Axes: M rows (lenses), B values a row, Q quantiles, R rows in which a value equals a quantile.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

FEW_VALUES, MANY_VALUES = 64, 4096
VALUES_AT_ONCE = 16384  # stay in the cache between the passes
SMALLEST_STEP = 1e-12


def interpolate(logits_MB: Tensor, quantiles_MQ: Tensor, levels_Q: Tensor) -> Tensor:
    """Percentile of each value in its row's quantiles, [M, B]: linear between them, 0 below and 1 above.

    A value on a flat step stands in its middle; NaN stays NaN.
    """
    on_cpu = logits_MB.device.type == "cpu"
    if on_cpu and 0 < logits_MB.numel() <= FEW_VALUES:
        return _few(logits_MB, quantiles_MQ, levels_Q)
    rows = max(1, VALUES_AT_ONCE // max(1, logits_MB.shape[1]))
    if on_cpu and len(logits_MB) > rows:
        parts = zip(logits_MB.split(rows), quantiles_MQ.split(rows), strict=True)
        return torch.cat([_many(part_MB, part_MQ, levels_Q) for part_MB, part_MQ in parts])
    return _many(logits_MB, quantiles_MQ, levels_Q)


def percentile_of(value: float, quantiles: Sequence[float], levels: Sequence[float], start: int = 0) -> float:
    """As `interpolate`, of one value in quantiles[start : start + len(levels)]; NaN where there are none."""
    if value != value or not levels:
        return math.nan
    stop = start + len(levels)
    first = bisect_left(quantiles, value, start, stop) - start
    if first == len(levels):
        return 1.0
    last = bisect_right(quantiles, value, start + first, stop) - start - 1
    if first <= last:
        return (levels[first] + levels[last]) / 2
    if first == 0:
        return 0.0
    low, high = quantiles[start + last], quantiles[start + first]
    share = min(1.0, (value - low) / max(high - low, SMALLEST_STEP))
    return levels[last] + share * (levels[first] - levels[last])


def flat_numbers(array: Tensor) -> Sequence[float]:
    """The numbers of a tensor on the host, row by row, without a copy: one of them is fetched in a fraction of the
    time that an array library takes."""
    return cast(Sequence[float], array.detach().reshape(-1).numpy().data)


def _few(logits_MB: Tensor, quantiles_MQ: Tensor, levels_Q: Tensor) -> Tensor:
    quantiles, levels = flat_numbers(quantiles_MQ), levels_Q.tolist()
    found_MB = [
        [percentile_of(value, quantiles, levels, row * len(levels)) for value in values_B]
        for row, values_B in enumerate(logits_MB.tolist())
    ]
    return torch.tensor(found_MB, dtype=logits_MB.dtype).view_as(logits_MB)


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
