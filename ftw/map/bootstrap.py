"""AUROC under resampled groups: draws shared by all systems and concepts, so that their differences are paired.

The rows of one article are not independent, so whole groups are drawn. Each lens is sorted once; a draw then only
changes how often every text counts, which is a look-up in cumulative sums.

Axes: S texts, N concepts, G groups, R draws, r draws of one block, L texts of the larger class, K of the smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Work of one bootstrap, in texts × concepts × systems × draws, before the number of draws is lowered (about 20 s a
# core).
AFFORDABLE_WORK = 1_500_000_000
FEWEST_DRAWS = 100
BLOCK_DRAWS = 128  # keeps one block of a thousand texts within the cache


def affordable_draws(draws: int, work_per_draw: int) -> int:
    """Draws of a bootstrap that ends within seconds: as asked, or fewer (at least 100, or as asked if that is less)."""
    return min(draws, max(FEWEST_DRAWS, AFFORDABLE_WORK // max(1, work_per_draw)))


def bootstrap(
    scores: Mapping[str, np.ndarray],
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    groups_S: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """AUROC of every system and concept under resampled groups, [R, N] each; NaN where a draw has one class.

    As many groups as there are, are drawn with replacement; a text counts as often as its group was drawn. Draws are
    the same for all systems and concepts, so differences of the results are paired. Each lens is sorted once: with
    the negatives in order of score, the weight below every positive is one look-up in their cumulative sums.

    Args:
        groups_S: group number of each text, or its name.

    Source: Efron & Tibshirani 1993, An introduction to the bootstrap (percentile intervals, cluster resampling).
    """
    names, numbers_S = np.unique(groups_S, return_inverse=True)
    num_groups = len(names)
    rng = np.random.default_rng(seed)
    drawn_RG = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=draws)
    counts_GR = np.ascontiguousarray(drawn_RG.T, dtype=np.float64)
    results = {name: np.full((draws, labels_SN.shape[1]), np.nan) for name in scores}
    for lens in range(labels_SN.shape[1]):
        used_S = weights_SN[:, lens] > 0
        positive_s = np.flatnonzero(used_S & (labels_SN[:, lens] > 0))
        negative_s = np.flatnonzero(used_S & (labels_SN[:, lens] <= 0))
        for name, scores_SN in scores.items():
            column_S = scores_SN[:, lens]
            if len(positive_s) and len(negative_s) and not np.isnan(column_S[used_S]).any():
                pairs = _Pairs.of(column_S, weights_SN[:, lens], numbers_S, positive_s, negative_s)
                results[name][:, lens] = pairs.auroc(counts_GR)
    return results


@dataclass(frozen=True)
class _Pairs:
    """One lens on its texts, sorted once: the larger class in order of score, the smaller with its places in it."""

    large_groups: np.ndarray
    large_weights: np.ndarray
    small_groups: np.ndarray
    small_weights: np.ndarray
    below: np.ndarray
    upto: np.ndarray

    @classmethod
    def of(
        cls,
        scores_S: np.ndarray,
        weights_S: np.ndarray,
        numbers_S: np.ndarray,
        positive_s: np.ndarray,
        negative_s: np.ndarray,
    ) -> "_Pairs":
        # AUROC is the same when classes and signs are both swapped, and the sums are over the larger class.
        swap = len(positive_s) > len(negative_s)
        large_s, small_s, sign = (positive_s, negative_s, -1) if swap else (negative_s, positive_s, 1)
        signed_S = sign * scores_S.astype(np.float64)
        large_s = large_s[np.argsort(signed_S[large_s], kind="stable")]
        below, upto = (np.searchsorted(signed_S[large_s], signed_S[small_s], side) for side in ("left", "right"))
        return cls(numbers_S[large_s], weights_S[large_s], numbers_S[small_s], weights_S[small_s], below, upto)

    def auroc(self, counts_GR: np.ndarray) -> np.ndarray:
        """AUROC of each draw, [R]."""
        result_R = np.empty(counts_GR.shape[1])
        for start in range(0, len(result_R), BLOCK_DRAWS):
            counts_Gr = counts_GR[:, start : start + BLOCK_DRAWS]
            large_Lr = counts_Gr[self.large_groups] * self.large_weights[:, None]
            small_Kr = counts_Gr[self.small_groups] * self.small_weights[:, None]
            sums_Lr = np.zeros((len(large_Lr) + 1, large_Lr.shape[1]))
            np.cumsum(large_Lr, axis=0, out=sums_Lr[1:])
            won_r = np.einsum("kr,kr->r", small_Kr, sums_Lr[self.below] + sums_Lr[self.upto]) / 2
            pairs_r = small_Kr.sum(axis=0) * sums_Lr[-1]
            won_r = np.divide(won_r, pairs_r, out=np.full(len(won_r), np.nan), where=pairs_r > 0)
            result_R[start : start + BLOCK_DRAWS] = won_r
        return result_R
