"""How well lenses separate and how honest their probabilities are, for all lenses at once.

Every function takes scores, labels and weights of S texts for N lenses and returns N numbers; a weight of 0 means
that the text is not used for that lens. Rank metrics sort each lens once and work on cumulative sums, in slices of
lenses so that memory stays bounded. A lens with one class, or with a NaN among its used scores, reads NaN; nothing is
raised for it.

Axes: S texts, N lenses, n lenses of one slice, K bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Slices of this size keep the sorted copies of one slice within the caches of a small machine.
SLICE_BYTES = 16 << 20


def lens_slices(num_rows: int, num_lenses: int, *, budget_bytes: int = SLICE_BYTES) -> Iterator[slice]:
    """Slices of the lens axis such that one float64 array of a slice stays under a byte budget."""
    step = max(1, budget_bytes // (8 * max(1, num_rows)))
    for start in range(0, num_lenses, step):
        yield slice(start, min(start + step, num_lenses))


def usable(scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> np.ndarray:
    """Whether each lens has both classes and no NaN among its used texts."""
    used_SN = weights_SN > 0
    both_N = (used_SN & (labels_SN > 0)).any(axis=0) & (used_SN & (labels_SN <= 0)).any(axis=0)
    return np.logical_and(both_N, ~(used_SN & np.isnan(scores_SN)).any(axis=0))


@dataclass(frozen=True)
class RankedCurve:
    """True and false positives of each lens as its threshold falls past one score after the other.

    Attributes:
        scores_nS: scores, highest first.
        hits_nS, alarms_nS: weight of the positives and of the negatives that stand at or above that score. Inside a
            run of
            equal scores both keep the value of before the run, since no threshold cuts a run in two.
        ends_nS: whether the place is the last of its run, that is, whether a threshold can stand just below it.
        valid_n: whether the lens has both classes and no NaN.
    """

    scores_nS: np.ndarray
    hits_nS: np.ndarray
    alarms_nS: np.ndarray
    ends_nS: np.ndarray
    valid_n: np.ndarray

    @property
    def positive_n(self) -> np.ndarray:
        """Total weight of the positives (NaN for an invalid lens, so that whatever is divided by it is NaN)."""
        return np.where(self.valid_n, self.hits_nS[:, -1], np.nan)

    @property
    def negative_n(self) -> np.ndarray:
        """Total weight of the negatives (NaN for an invalid lens)."""
        return np.where(self.valid_n, self.alarms_nS[:, -1], np.nan)


def ranked_curves(
    scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray
) -> Iterator[tuple[slice, RankedCurve]]:
    """The ranked curves of all lenses, one slice of lenses after the other."""
    if scores_SN.shape[0] == 0:
        scores_SN = np.full((1, scores_SN.shape[1]), np.nan)
        labels_SN = weights_SN = np.zeros(scores_SN.shape)
    for part in lens_slices(*scores_SN.shape):
        yield part, _ranked(scores_SN[:, part], labels_SN[:, part], weights_SN[:, part])


def _ranked(scores_Sn: np.ndarray, labels_Sn: np.ndarray, weights_Sn: np.ndarray) -> RankedCurve:
    dtype = np.float32 if scores_Sn.dtype in (np.float16, np.float32) else np.float64
    falling_nS = np.negative(scores_Sn.T, dtype=dtype)
    order_nS = np.argsort(falling_nS, axis=1)
    falling_nS = np.take_along_axis(falling_nS, order_nS, axis=1)
    # One signed array carries label and weight through the sort: a gather is the dearest step after the sort itself.
    signed_nS = np.ascontiguousarray(np.where(labels_Sn > 0, 1.0, -1.0).T * weights_Sn.T)
    signed_nS = np.take_along_axis(signed_nS, order_nS, axis=1)
    broken_n = (np.isnan(falling_nS) & (signed_nS != 0)).any(axis=1)
    hits_nS = np.cumsum(np.maximum(signed_nS, 0), axis=1)
    alarms_nS = np.cumsum(np.maximum(-signed_nS, 0), axis=1)
    ends_nS = np.ones(falling_nS.shape, dtype=bool)
    np.not_equal(falling_nS[:, 1:], falling_nS[:, :-1], out=ends_nS[:, :-1])
    valid_n = (hits_nS[:, -1] > 0) & (alarms_nS[:, -1] > 0) & ~broken_n
    if not ends_nS.all():
        # Both sums only rise, so the running maximum over the ends of runs is the value at the last end passed.
        hits_nS = np.maximum.accumulate(np.where(ends_nS, hits_nS, 0), axis=1)
        alarms_nS = np.maximum.accumulate(np.where(ends_nS, alarms_nS, 0), axis=1)
    return RankedCurve(-falling_nS, hits_nS, alarms_nS, ends_nS, valid_n)


def auroc(scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each lens: the chance that a positive scores above a negative, ties counting half."""
    result_N = np.full(scores_SN.shape[1], np.nan)
    for part, curve in ranked_curves(scores_SN, labels_SN, weights_SN):
        new_alarms_nS = np.diff(curve.alarms_nS, axis=1, prepend=0)
        twice_n = np.einsum("ns,ns->n", new_alarms_nS, curve.hits_nS)
        twice_n += np.einsum("ns,ns->n", new_alarms_nS[:, 1:], curve.hits_nS[:, :-1])
        result_N[part] = twice_n / (2 * curve.positive_n * curve.negative_n)
    return result_N


def average_precision(scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> np.ndarray:
    """Average precision of each lens: precision at every threshold, weighted by the recall that it adds."""
    result_N = np.full(scores_SN.shape[1], np.nan)
    for part, curve in ranked_curves(scores_SN, labels_SN, weights_SN):
        called_nS = curve.hits_nS + curve.alarms_nS
        precision_nS = np.divide(curve.hits_nS, called_nS, out=np.zeros_like(called_nS), where=called_nS > 0)
        gained_nS = np.diff(curve.hits_nS, axis=1, prepend=0)
        result_N[part] = np.einsum("ns,ns->n", gained_nS, precision_nS) / curve.positive_n
    return result_N


def recall_at_fpr(
    scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray, target: float = 0.01
) -> np.ndarray:
    """Highest recall of each lens at any threshold whose false-positive rate, on these same texts, is at most `target`.

    The threshold is chosen with these labels; the rate of one chosen beforehand is `rates_at`.
    """
    result_N = np.full(scores_SN.shape[1], np.nan)
    for part, curve in ranked_curves(scores_SN, labels_SN, weights_SN):
        # 1e-12: a rate such as 3 of 300 must count as one hundredth whatever the order of the sum.
        allowed_nS = curve.alarms_nS <= (target + 1e-12) * np.nan_to_num(curve.negative_n)[:, None]
        result_N[part] = np.where(allowed_nS, curve.hits_nS, 0).max(axis=1) / curve.positive_n
    return result_N


def rates_at(
    scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray, threshold_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and false-positive rate of each lens when it fires at or above its threshold."""
    fired_SN = scores_SN >= threshold_N
    positive_SN = np.where(labels_SN > 0, weights_SN, 0)
    negative_SN = np.where(labels_SN > 0, 0, weights_SN)
    usable_N = usable(scores_SN, labels_SN, weights_SN)
    recall_N = _ratio((positive_SN * fired_SN).sum(axis=0), positive_SN.sum(axis=0))
    rate_N = _ratio((negative_SN * fired_SN).sum(axis=0), negative_SN.sum(axis=0))
    bad_N = ~usable_N | np.isnan(threshold_N)
    return np.where(bad_N, np.nan, recall_N), np.where(bad_N, np.nan, rate_N)


def f1_at(scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray, threshold_N: np.ndarray) -> np.ndarray:
    """F1 of each lens when it fires at or above its threshold."""
    fired_SN = (scores_SN >= threshold_N) * weights_SN
    hits_N = np.where(labels_SN > 0, fired_SN, 0).sum(axis=0)
    positive_N = np.where(labels_SN > 0, weights_SN, 0).sum(axis=0)
    f1_N = _ratio(2 * hits_N, positive_N + fired_SN.sum(axis=0))
    return np.where(usable(scores_SN, labels_SN, weights_SN) & ~np.isnan(threshold_N), f1_N, np.nan)


def weights_at_prior(labels_SN: np.ndarray, weights_SN: np.ndarray, prior: float | None) -> np.ndarray:
    """Weights that sum to 1 for each lens, with the positives' share equal to `prior` (None: the share they have).

    A lens without positives or negatives keeps zeros on the missing side.
    """
    positive_SN = np.where(labels_SN > 0, weights_SN, 0).astype(np.float64)
    negative_SN = np.where(labels_SN > 0, 0, weights_SN).astype(np.float64)
    if prior is None:
        return _ratio(positive_SN + negative_SN, (positive_SN + negative_SN).sum(axis=0), empty=0)
    positive_SN = prior * _ratio(positive_SN, positive_SN.sum(axis=0), empty=0)
    return positive_SN + (1 - prior) * _ratio(negative_SN, negative_SN.sum(axis=0), empty=0)


def brier(
    probabilities_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray, *, prior: float | None = None
) -> np.ndarray:
    """Brier score of each lens (mean squared error of its probability), at the base rate `prior` if one is given."""
    result_N = np.full(probabilities_SN.shape[1], np.nan)
    for part in lens_slices(*probabilities_SN.shape):
        usable_n = usable(probabilities_SN[:, part], labels_SN[:, part], weights_SN[:, part])
        shares_Sn = weights_at_prior(labels_SN[:, part], weights_SN[:, part], prior)
        error_Sn = np.where(shares_Sn > 0, probabilities_SN[:, part] - labels_SN[:, part], 0)
        result_N[part] = np.where(usable_n, (shares_Sn * error_Sn**2).sum(axis=0), np.nan)
    return result_N


def ece(
    probabilities_SN: np.ndarray,
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    *,
    bins: int = 10,
    prior: float | None = None,
) -> np.ndarray:
    """Expected calibration error of each lens over bins of equal width (Guo et al. 2017).

    Σ_k |Σ_{i in k} w_i (p_i − y_i)| with weights that sum to 1; `prior` reweights the texts to that base rate, which
    must be the one that the probabilities were calibrated for.
    """
    result_N = np.full(probabilities_SN.shape[1], np.nan)
    for part in lens_slices(*probabilities_SN.shape):
        usable_n = usable(probabilities_SN[:, part], labels_SN[:, part], weights_SN[:, part])
        shares_Sn = weights_at_prior(labels_SN[:, part], weights_SN[:, part], prior)
        chance_Sn = np.where(shares_Sn > 0, probabilities_SN[:, part], 0)
        gaps_nK = _bin_sums(shares_Sn * (chance_Sn - labels_SN[:, part]), _bins(chance_Sn, bins), bins)
        result_N[part] = np.where(usable_n, np.abs(gaps_nK).sum(axis=1), np.nan)
    return result_N


def ece_floor(
    probabilities_SN: np.ndarray,
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    *,
    bins: int = 10,
    prior: float | None = None,
    draws: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """What `ece` would read, on average, for a perfectly calibrated lens with these probabilities, weights and rows.

    Labels are drawn from the probabilities themselves `draws` times; what is left of the error is the noise of
    counting. The real labels only set the weights that bring the texts to the base rate `prior`.
    """
    rng = np.random.default_rng(seed)
    result_N = np.full(probabilities_SN.shape[1], np.nan)
    for part in lens_slices(*probabilities_SN.shape):
        usable_n = usable(probabilities_SN[:, part], labels_SN[:, part], weights_SN[:, part])
        shares_Sn = weights_at_prior(labels_SN[:, part], weights_SN[:, part], prior)
        chance_Sn = np.where(shares_Sn > 0, probabilities_SN[:, part], 0).astype(np.float64)
        bin_Sn, floor_n = _bins(chance_Sn, bins), np.zeros(chance_Sn.shape[1])
        for _ in range(draws):
            drawn_Sn = rng.random(chance_Sn.shape, dtype=np.float32) < chance_Sn
            gaps_nK = _bin_sums(shares_Sn * (chance_Sn - drawn_Sn), bin_Sn, bins)
            floor_n += np.abs(gaps_nK).sum(axis=1) / draws
        result_N[part] = np.where(usable_n, floor_n, np.nan)
    return result_N


def _bins(chance_Sn: np.ndarray, bins: int) -> np.ndarray:
    """Place of every probability in one flat row of n times K bins."""
    inside_Sn = np.clip(np.nan_to_num(chance_Sn) * bins, 0, bins - 1).astype(np.int64)
    return inside_Sn + bins * np.arange(chance_Sn.shape[1])


def _bin_sums(values_Sn: np.ndarray, bin_Sn: np.ndarray, bins: int) -> np.ndarray:
    num_lenses = values_Sn.shape[1]
    return np.bincount(bin_Sn.ravel(), values_Sn.ravel(), minlength=num_lenses * bins).reshape(num_lenses, bins)


def _ratio(over: np.ndarray, under: np.ndarray, *, empty: float = np.nan) -> np.ndarray:
    """Division that gives `empty` where there is nothing to divide by."""
    out = np.full(np.broadcast_shapes(over.shape, under.shape), float(empty))
    return np.divide(over, under, out=out, where=under > 0)
