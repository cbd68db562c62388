"""From logits to probabilities, thresholds and percentiles, for all lenses at once.

A raw logit says nothing across lenses. Platt scaling on out-of-fold logits makes it a probability at a stated base
rate; a threshold is chosen for F1 or for a false-positive rate; quantiles of a lens's logits on background text turn
a logit into a percentile, which is a rank for display and never a probability.

Axes: S texts, T background tokens, B batch, N lenses, n lenses of one slice, Q quantiles.
"""

from typing import NamedTuple

import numpy as np

from ftw.errors import DataError
from ftw.map.metrics import lens_slices, ranked_curves, usable, weights_at_prior


class Platt(NamedTuple):
    """Calibrated logit = scale_N · logit + offset_N; where `fitted_N` is False the two are 1 and 0."""

    scale_N: np.ndarray
    offset_N: np.ndarray
    fitted_N: np.ndarray


class _Ridge(NamedTuple):
    """Penalty slope/2 · (a − around)² + height/2 · b² on a lens's slope a and height b."""

    slope: float
    height: float = 0.0
    around: float = 0.0


def fit_platt(
    logits_SN: np.ndarray,
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    *,
    prior: float | None = None,
    smooth: bool = True,
    ridge: float = 1e-6,
) -> Platt:
    """Fit probability = σ(scale · logit + offset) for every lens, on logits of texts that the lens was not trained on.

    Weighted Newton steps with backtracking, in float64 on standardised logits, with the targets (n₊+1)/(n₊+2) and
    1/(n₋+2) instead of 1 and 0 when `smooth` (n: effective number of texts, (Σw)²/Σw²), so that a lens that separates
    its texts completely still gets a finite scale. A lens with one class, constant logits or a NaN is left at 1 and 0
    and marked.

    Args:
        logits_SN: logits. labels_SN: 0 or 1. weights_SN: 0 where a text is not used; only their ratios count.
        prior: base rate that the probabilities are for (the classes are reweighted to it); None takes the texts' own.
        smooth: use the smoothed targets. ridge: penalty on the squared standardised scale.

    Raises:
        DataError: no lens at all can be calibrated.

    Source: Platt 1999, Probabilistic outputs for support vector machines; Lin, Lin & Weng 2007, A note on Platt's
    probabilistic outputs.
    """
    _check(logits_SN, labels_SN, weights_SN)
    num_lenses = logits_SN.shape[1]
    fit = Platt(np.ones(num_lenses), np.zeros(num_lenses), np.zeros(num_lenses, dtype=bool))
    for part in lens_slices(*logits_SN.shape):
        scale_n, offset_n, fitted_n = _fit_slice(
            logits_SN[:, part], labels_SN[:, part], weights_SN[:, part], prior, smooth, ridge
        )
        fit.scale_N[part] = np.where(fitted_n, scale_n, 1)
        fit.offset_N[part] = np.where(fitted_n, offset_n, 0)
        fit.fitted_N[part] = fitted_n
    if num_lenses and not fit.fitted_N.any():
        raise DataError(
            f"none of {num_lenses} lenses can be calibrated: each has one class, constant logits or NaN among its "
            f"{logits_SN.shape[0]} texts; give every concept positives and negatives outside of its training fold"
        )
    return fit


def fit_platt_together(
    logits_SN: np.ndarray,
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    *,
    prior: float | None = None,
    pull: float = 8.0,
) -> Platt:
    """Platt's calibration of lenses that were trained alike, for few texts each: one scale and offset from all of them,
    from which each lens departs as far as its own texts say.

    Fewer than ten positives tell an offset badly, and smoothed targets, which are nearer to even odds for the smaller
    class, move it: both cost more than lenses of one make differ. In the common coordinates each lens minimises
    n · cross-entropy + pull/2 · ((slope − 1)² + height²), with n its effective number of texts at the prior.

    Args:
        logits_SN, labels_SN, weights_SN, prior: as in `fit_platt`. pull: in texts; 0 leaves each lens to its own.

    Raises:
        DataError: no lens at all can be calibrated.

    Source: Platt 1999; Gelman & Hill 2007, Data analysis using regression and multilevel models (partial pooling).
    """
    alone = fit_platt(logits_SN, labels_SN, weights_SN, prior=prior)
    use_SN = np.where(alone.fitted_N, weights_SN, 0)
    share_SN = weights_at_prior(labels_SN, use_SN, prior)
    logit_SN = np.where(use_SN > 0, logits_SN, 0).astype(np.float64)
    columns = (each.reshape(-1, 1) for each in (logit_SN, labels_SN, share_SN))
    scale, offset = (float(each[0]) for each in fit_platt(*columns)[:2])
    count_N = _effective(share_SN)
    slope_N, height_N = _newton(
        scale * logit_SN + offset, (labels_SN > 0).astype(np.float64), share_SN * count_N, _Ridge(pull, pull, 1.0)
    )
    return Platt(
        np.where(alone.fitted_N, slope_N * scale, 1),
        np.where(alone.fitted_N, slope_N * offset + height_N, 0),
        alone.fitted_N,
    )


def _fit_slice(
    logits_Sn: np.ndarray,
    labels_Sn: np.ndarray,
    weights_Sn: np.ndarray,
    prior: float | None,
    smooth: bool,
    ridge: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    share_Sn = weights_at_prior(labels_Sn, weights_Sn, prior)
    used_Sn, positive_Sn = weights_Sn > 0, labels_Sn > 0
    finite_n = (np.isfinite(logits_Sn) | ~used_Sn).all(axis=0)
    both_n = usable(logits_Sn, labels_Sn, weights_Sn)
    logit_Sn = np.where(used_Sn & finite_n, logits_Sn, 0).astype(np.float64)
    middle_n = (share_Sn * logit_Sn).sum(axis=0)
    spread_n = np.sqrt((share_Sn * (logit_Sn - middle_n) ** 2).sum(axis=0))
    # Relative to the size of the logits: the spread of a constant column is rounding, not zero.
    fitted_n = finite_n & both_n & (spread_n > 1e-9 * (1 + np.abs(middle_n)))
    spread_n = np.where(fitted_n, spread_n, 1)
    standard_Sn = (logit_Sn - middle_n) / spread_n
    target_Sn = positive_Sn.astype(np.float64)
    if smooth:
        high_n = _effective(weights_Sn * positive_Sn)
        low_n = _effective(weights_Sn * ~positive_Sn)
        target_Sn = np.where(positive_Sn, (high_n + 1) / (high_n + 2), 1 / (low_n + 2))
    slope_n, height_n = _newton(standard_Sn, target_Sn, np.where(fitted_n, share_Sn, 0), _Ridge(ridge))
    return slope_n / spread_n, height_n - slope_n * middle_n / spread_n, fitted_n


def _effective(weights_Sn: np.ndarray) -> np.ndarray:
    """Kish's effective number of texts: unlike the sum of the weights it does not depend on their unit."""
    exact_Sn = weights_Sn.astype(np.float64)
    total_n, square_n = exact_Sn.sum(axis=0), (exact_Sn**2).sum(axis=0)
    return np.divide(total_n**2, square_n, out=np.zeros(len(total_n)), where=square_n > 0)


def _newton(
    standard_Sn: np.ndarray, target_Sn: np.ndarray, share_Sn: np.ndarray, ridge: _Ridge, max_steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and height that minimise the weighted cross-entropy plus the penalty, lens by lens."""
    slope_n, height_n = np.full(standard_Sn.shape[1], ridge.around), np.zeros(standard_Sn.shape[1])
    active_k = np.flatnonzero(share_Sn.sum(axis=0) > 0)
    for _ in range(max_steps):
        if not len(active_k):
            break
        x_Sk, t_Sk, w_Sk = standard_Sn[:, active_k], target_Sn[:, active_k], share_Sn[:, active_k]
        a_k, b_k = slope_n[active_k], height_n[active_k]
        p_Sk = 0.5 * (1 + np.tanh(0.5 * (a_k * x_Sk + b_k)))
        error_Sk, curve_Sk = w_Sk * (p_Sk - t_Sk), w_Sk * p_Sk * (1 - p_Sk)
        grad_a_k = (error_Sk * x_Sk).sum(axis=0) + ridge.slope * (a_k - ridge.around)
        grad_b_k = error_Sk.sum(axis=0) + ridge.height * b_k
        # 1e-12 keeps the 2×2 system solvable where every probability has saturated.
        aa_k = (curve_Sk * x_Sk * x_Sk).sum(axis=0) + ridge.slope + 1e-12
        ab_k, bb_k = (curve_Sk * x_Sk).sum(axis=0), curve_Sk.sum(axis=0) + ridge.height + 1e-12
        det_k = np.maximum(aa_k * bb_k - ab_k**2, 1e-300)
        step_a_k = (bb_k * grad_a_k - ab_k * grad_b_k) / det_k
        step_b_k = (aa_k * grad_b_k - ab_k * grad_a_k) / det_k
        slope_k = grad_a_k * step_a_k + grad_b_k * step_b_k
        size_k = _backtrack((x_Sk, t_Sk, w_Sk), (a_k, b_k), (step_a_k, step_b_k), slope_k, ridge)
        slope_n[active_k], height_n[active_k] = a_k - size_k * step_a_k, b_k - size_k * step_b_k
        # Half the decrement is what is left to gain; a lens that found no step is at the limit of float64.
        active_k = active_k[(slope_k > 1e-16) & (size_k > 0)]
    return slope_n, height_n


def _backtrack(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    at: tuple[np.ndarray, np.ndarray],
    step: tuple[np.ndarray, np.ndarray],
    slope_k: np.ndarray,
    ridge: _Ridge,
) -> np.ndarray:
    """Largest of 1, ½, ¼, … at which the loss falls enough (Armijo); 0 where none does."""
    start_k, size_k = _loss(rows, *at, ridge), np.ones(len(slope_k))
    waiting_k = np.arange(len(slope_k))
    for _ in range(30):
        x_Sw, t_Sw, w_Sw = rows if len(waiting_k) == len(slope_k) else (part[:, waiting_k] for part in rows)
        tried_w = size_k[waiting_k]
        a_w, b_w = (at[i][waiting_k] - tried_w * step[i][waiting_k] for i in range(2))
        loss_w = _loss((x_Sw, t_Sw, w_Sw), a_w, b_w, ridge)
        waiting_k = waiting_k[~(loss_w <= start_k[waiting_k] - 1e-4 * tried_w * slope_k[waiting_k])]
        if not len(waiting_k):
            return size_k
        size_k[waiting_k] /= 2
    size_k[waiting_k] = 0
    return size_k


def _loss(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray], a_k: np.ndarray, b_k: np.ndarray, ridge: _Ridge
) -> np.ndarray:
    x_Sk, t_Sk, w_Sk = rows
    z_Sk = a_k * x_Sk + b_k
    # log(1 + e^z) − t·z without overflow.
    entropy_Sk = np.maximum(z_Sk, 0) + np.log1p(np.exp(-np.abs(z_Sk))) - t_Sk * z_Sk
    penalty_k = ridge.slope * (a_k - ridge.around) ** 2 + ridge.height * b_k**2
    return (w_Sk * entropy_Sk).sum(axis=0) + penalty_k / 2


def best_f1_threshold(logits_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> np.ndarray:
    """Threshold of each lens with the highest F1 on these (out-of-fold) texts; a lens fires at or above it.

    It stands halfway to the next lower logit, so that a rounding of the logits changes nothing. NaN for a lens with one
    class or a NaN logit.
    """
    _check(logits_SN, labels_SN, weights_SN)
    threshold_N = np.full(logits_SN.shape[1], np.nan)
    for part, curve in ranked_curves(logits_SN, labels_SN, weights_SN):
        f1_nS = 2 * curve.hits_nS / (curve.hits_nS + curve.alarms_nS + curve.hits_nS[:, -1:]).clip(1e-300)
        best_n = np.where(curve.ends_nS, f1_nS, -1).argmax(axis=1)
        lens_n = np.arange(len(best_n))
        here_n = curve.scores_nS[lens_n, best_n].astype(np.float64)
        # Next used score below: texts of weight 0 stand in the same ranking and may be anything.
        below_n = _next_used(curve.scores_nS, curve.hits_nS + curve.alarms_nS, best_n)
        middle_n = np.where(np.isfinite(below_n), (here_n + below_n) / 2, here_n)
        threshold_N[part] = np.where(curve.valid_n, middle_n, np.nan)
    return threshold_N


def _next_used(scores_nS: np.ndarray, called_nS: np.ndarray, place_n: np.ndarray) -> np.ndarray:
    """First score after a place at which more texts are called; NaN where there is none."""
    lens_n = np.arange(len(place_n))
    more_nS = called_nS > called_nS[lens_n, place_n][:, None]
    first_n = more_nS.argmax(axis=1)
    return np.where(more_nS[lens_n, first_n], scores_nS[lens_n, first_n].astype(np.float64), np.nan)


def fpr_threshold(
    logits_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray, target: float = 0.01
) -> np.ndarray:
    """Lowest threshold of each lens at which a new negative fires with an expected rate of at most `target`.

    With n negatives and k of them at or above the threshold, that rate is (k+1)/(n+1), not k/n: taking k/n makes a "1
    %" threshold from 150 negatives fire at twice its name. With fewer than 1/target − 1 negatives no threshold can
    promise the rate; the one returned stands just above the highest negative. NaN for a lens with one class or a NaN
    logit.

    Source: Vovk, Gammerman & Shafer 2005, Algorithmic learning in a random world (conformal prediction).
    """
    _check(logits_SN, labels_SN, weights_SN)
    if not 0 < target < 1:
        raise DataError(f"a false-positive rate of {target} is none; it lies between 0 and 1, for example 0.01")
    threshold_N = np.full(logits_SN.shape[1], np.nan)
    dtype = np.float32 if logits_SN.dtype in (np.float16, np.float32) else np.float64
    for part in lens_slices(*logits_SN.shape):
        negative_Sn = np.where(labels_SN[:, part] > 0, 0, weights_SN[:, part]).astype(np.float64)
        count_n = (negative_Sn > 0).sum(axis=0)
        total_n = negative_Sn.sum(axis=0)
        newcomer_n = total_n / count_n.clip(1)
        order_Sn = np.argsort(-logits_SN[:, part], axis=0)
        sorted_Sn = np.take_along_axis(logits_SN[:, part].astype(dtype), order_Sn, axis=0)
        above_Sn = np.cumsum(np.take_along_axis(negative_Sn, order_Sn, axis=0), axis=0)
        # A negative that would break the promise: the threshold must stand above the highest of them.
        breaks_Sn = above_Sn + newcomer_n > (target + 1e-12) * (total_n + newcomer_n)
        breaks_Sn &= np.diff(above_Sn, axis=0, prepend=0) > 0
        first_n = breaks_Sn.argmax(axis=0)
        highest_n = sorted_Sn[first_n, np.arange(len(first_n))]
        above_n = np.nextafter(highest_n, np.array(np.inf, dtype=dtype))
        usable_n = usable(logits_SN[:, part], labels_SN[:, part], weights_SN[:, part])
        threshold_N[part] = np.where(usable_n, above_n, np.nan)
    return threshold_N


def quantile_levels(num_quantiles: int = 129) -> np.ndarray:
    """Probabilities at which quantiles are kept: even up to 0.9, then ever denser, with 0.99, 0.999, 0.9999 and 1.

    What is displayed is the upper tail, where an even grid of 129 would not tell 0.993 from 0.9999.
    """
    if num_quantiles < 9:
        raise DataError(f"{num_quantiles} quantiles are too few for an upper tail; ask for at least 9 (129 by default)")
    tail = 3 * ((num_quantiles // 2) // 3)
    bulk_Q = np.linspace(0, 0.9, num_quantiles - tail - 2, endpoint=False)
    tail_Q = 1 - 10.0 ** (-1 - 3 * np.arange(tail + 1) / tail)
    return np.concatenate([bulk_Q, tail_Q, [1.0]])


def background_quantiles(logits_TN: np.ndarray, num_quantiles: int = 129) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of each lens's logits on background tokens.

    Returns:
        quantiles_NQ: float32, ascending along Q. levels_Q: float64, the probabilities they stand for
            (`quantile_levels`).

    Raises:
        DataError: there are no tokens, or a lens has a logit that is not finite.
    """
    levels_Q = quantile_levels(num_quantiles)
    num_tokens, num_lenses = logits_TN.shape
    if num_tokens == 0:
        raise DataError("no background tokens for percentiles; give the sample table texts of split 'background'")
    quantiles_NQ = np.empty((num_lenses, len(levels_Q)), dtype=np.float32)
    for part in lens_slices(num_tokens, num_lenses):
        logits_Tn = logits_TN[:, part].astype(np.float64)
        if not np.isfinite(logits_Tn).all():
            lens = part.start + int(np.flatnonzero(~np.isfinite(logits_Tn).all(axis=0))[0])
            raise DataError(f"lens {lens} has a background logit that is not finite; its weights or states are damaged")
        quantiles_NQ[part] = np.quantile(logits_Tn, levels_Q, axis=0).T
    return quantiles_NQ, levels_Q


def percentile(logits_BN: np.ndarray, quantiles_NQ: np.ndarray, levels_Q: np.ndarray) -> np.ndarray:
    """Share of background tokens below each logit: 0 below the lowest quantile, 1 above the highest, linear between.

    A logit that equals a run of equal quantiles gets the middle of their levels (as ties in a rank do): a lens that
    says the same on most background stands at the middle of that mass when it says it again, not on top of it. NaN
    stays NaN.
    """
    logits_BN = np.asarray(logits_BN)
    result_BN = np.empty(logits_BN.shape, dtype=np.float64)
    for part in lens_slices(len(logits_BN) * len(levels_Q), logits_BN.shape[1]):
        x_Bn, q_nQ = logits_BN[:, part], quantiles_NQ[part]
        first_Bn = (q_nQ < x_Bn[..., None]).sum(axis=-1)
        after_Bn = (q_nQ <= x_Bn[..., None]).sum(axis=-1)
        lens_n = np.arange(q_nQ.shape[0])
        low_Bn, high_Bn = (first_Bn - 1).clip(0), first_Bn.clip(max=len(levels_Q) - 1)
        left_Bn, right_Bn = q_nQ[lens_n, low_Bn].astype(np.float64), q_nQ[lens_n, high_Bn].astype(np.float64)
        way_Bn = np.divide(x_Bn - left_Bn, right_Bn - left_Bn, out=np.zeros(x_Bn.shape), where=right_Bn > left_Bn)
        between_Bn = levels_Q[low_Bn] + way_Bn * (levels_Q[high_Bn] - levels_Q[low_Bn])
        between_Bn = np.where(first_Bn == 0, 0.0, np.where(first_Bn == len(levels_Q), 1.0, between_Bn))
        on_run_Bn = (levels_Q[high_Bn] + levels_Q[(after_Bn - 1).clip(0)]) / 2
        result_BN[:, part] = np.where(after_Bn > first_Bn, on_run_Bn, between_Bn)
    return np.where(np.isnan(logits_BN), np.nan, result_BN)


def _check(logits_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> None:
    shapes = logits_SN.shape, labels_SN.shape, weights_SN.shape
    if len(shapes[0]) != 2 or len(set(shapes)) != 1 or not shapes[0][0]:
        raise DataError(
            f"calibration needs logits, labels and weights of one shape [texts, lenses] with at least one text; "
            f"these have {shapes[0]}, {shapes[1]}, {shapes[2]}"
        )
