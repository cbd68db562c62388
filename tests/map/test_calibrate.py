"""Claims about calibration: Platt equals another solver, thresholds keep their promise, percentiles are ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from ftw.errors import DataError
from ftw.map.calibrate import (
    background_quantiles,
    best_f1_threshold,
    fit_platt,
    fit_platt_together,
    fpr_threshold,
    percentile,
    quantile_levels,
)


def readings(num_texts: int = 400, num_lenses: int = 6, seed: int = 0):
    """Logits on very different scales, a fifth of the texts unused."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_texts, num_lenses)) < 0.3).astype(np.int8)
    logits = rng.normal(size=labels.shape) + 1.5 * labels
    logits = logits * 10.0 ** rng.integers(-3, 4, num_lenses) + rng.normal(size=num_lenses) * 50
    weights = rng.choice([0, 1, 1, 2, 0.5], size=labels.shape)
    return logits.astype(np.float32), labels, weights.astype(np.float32)


def test_platt_equals_an_unpenalised_logistic_regression_on_each_lens():
    logits, labels, weights = readings()
    fit = fit_platt(logits, labels, weights, smooth=False, ridge=0)
    assert fit.fitted_N.all()
    for lens in range(logits.shape[1]):
        used = weights[:, lens] > 0
        column = logits[used, lens].astype(np.float64)
        centre, spread = column.mean(), column.std()
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
        model.fit(((column - centre) / spread)[:, None], labels[used, lens], sample_weight=weights[used, lens])
        scale = model.coef_[0, 0] / spread
        assert fit.scale_N[lens] == pytest.approx(scale, rel=1e-4)
        assert fit.offset_N[lens] == pytest.approx(model.intercept_[0] - scale * centre, rel=1e-4, abs=1e-4)


def test_smoothed_targets_are_those_of_lin_lin_and_weng():
    logits, labels, _ = readings(num_texts=30, num_lenses=1)
    fit = fit_platt(logits, labels, np.ones(logits.shape), ridge=0)
    num_positive, num_negative = labels.sum(), (1 - labels).sum()
    target = np.where(labels, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    error = 1 / (1 + np.exp(-(fit.scale_N * logits + fit.offset_N))) - target
    # At the optimum the gradient vanishes.
    assert abs(error.sum()) < 1e-6
    assert abs((error * logits).sum()) < 1e-4 * abs(logits).max()


def alike(num_texts: int, num_lenses: int = 60, share: float = 0.1, seed: int = 0):
    """Lenses of one make: the same scale and offset, few positives each."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_texts, num_lenses)) < share).astype(np.int8)
    labels[:3] = 1
    return (3 * rng.normal(size=labels.shape) + 6 * labels - 20).astype(np.float32), labels


def test_lenses_of_one_make_are_calibrated_better_together_than_alone():
    few, labels = alike(40)
    many, truth = alike(4000, seed=1)
    weights = np.ones(few.shape)
    right = []
    for fit in (fit_platt(few, labels, weights, prior=0.5), fit_platt_together(few, labels, weights, prior=0.5)):
        said = fit.scale_N * many + fit.offset_N > 0
        right.append(
            ((said & (truth > 0)).sum(0) / truth.sum(0) + (~said & (truth < 1)).sum(0) / (truth < 1).sum(0)) / 2
        )
    best = 0.8413  # two normal curves two spreads apart
    assert best - right[1].mean() < 0.01 < best - right[0].mean()


def test_without_pull_each_lens_is_calibrated_by_its_own_texts_and_with_many_texts_the_pull_is_lost():
    logits, labels, weights = readings(num_texts=3000)
    own = fit_platt(logits, labels, weights, prior=0.5, smooth=False)
    assert np.allclose(fit_platt_together(logits, labels, weights, prior=0.5, pull=0).scale_N, own.scale_N, rtol=1e-3)
    logits, labels = alike(3000)
    logits[:, :30] -= 3
    together = fit_platt_together(logits, labels, np.ones(logits.shape), prior=0.5)
    middle = -together.offset_N / together.scale_N
    assert np.abs(middle - np.where(np.arange(60) < 30, -20, -17)).max() < 1


def test_a_strong_pull_gives_all_lenses_one_scale_and_offset():
    logits, labels = alike(50)
    fit = fit_platt_together(logits, labels, np.ones(logits.shape), prior=0.5, pull=1e9)
    assert np.ptp(fit.scale_N) < 1e-6
    assert np.ptp(fit.offset_N) < 1e-5


def test_a_lens_of_one_class_is_marked_and_moves_no_other():
    logits, labels = alike(50)
    weights = np.ones(logits.shape)
    without = fit_platt_together(logits[:, 1:], labels[:, 1:], weights[:, 1:], prior=0.5)
    labels[:, 0], logits[7, 0] = 0, np.nan
    fit = fit_platt_together(logits, labels, weights, prior=0.5)
    assert not fit.fitted_N[0]
    assert (fit.scale_N[0], fit.offset_N[0]) == (1, 0)
    assert np.allclose(fit.scale_N[1:], without.scale_N)
    assert np.allclose(fit.offset_N[1:], without.offset_N)


def test_weights_count_by_their_ratios_and_a_doubled_weight_is_a_doubled_text():
    logits, labels, weights = readings()
    one, scaled = fit_platt(logits, labels, weights), fit_platt(logits, labels, weights * 1000)
    np.testing.assert_allclose(one.scale_N, scaled.scale_N, rtol=1e-9)
    doubled = fit_platt(*(np.concatenate([part, part]) for part in (logits, labels, weights)), smooth=False)
    np.testing.assert_allclose(fit_platt(logits, labels, weights, smooth=False).scale_N, doubled.scale_N, rtol=1e-6)


def test_separable_texts_give_a_finite_scale_that_orders_them():
    logits = np.concatenate([np.linspace(-9, -5, 20), np.linspace(5, 9, 20)])[:, None]
    labels, weights = (logits > 0).astype(int), np.ones(logits.shape)
    for smooth in (True, False):
        fit = fit_platt(logits, labels, weights, smooth=smooth)
        assert fit.fitted_N.all()
        assert 0 < fit.scale_N[0] < 100
    smoothed = fit_platt(logits, labels, weights)
    chances = 1 / (1 + np.exp(-(smoothed.scale_N * logits + smoothed.offset_N)))
    # Twenty texts of each class are no evidence for certainty: the targets are 21/22 and 1/22, not 1 and 0.
    assert chances[labels == 1].mean() == pytest.approx(21 / 22, abs=0.01)
    assert chances.max() < 0.99


def test_degenerate_lenses_are_marked_and_their_neighbours_unchanged():
    logits, labels, weights = readings()
    expected = fit_platt(logits, labels, weights)
    labels[:, 1], logits[:, 2], weights[:, 3], logits[5, 4], weights[5, 4] = 0, 7.3, 0, np.nan, 1
    fit = fit_platt(logits, labels, weights)
    assert fit.fitted_N.tolist() == [True, False, False, False, False, True]
    assert (fit.scale_N[1:5] == 1).all()
    assert (fit.offset_N[1:5] == 0).all()
    np.testing.assert_allclose(fit.scale_N[[0, 5]], expected.scale_N[[0, 5]], rtol=1e-9)
    with pytest.raises(DataError, match="none of 4 lenses"):
        fit_platt(logits[:, 1:5], labels[:, 1:5], weights[:, 1:5])


def test_a_prior_moves_the_offset_by_its_log_odds_and_not_the_scale():
    rng = np.random.default_rng(1)
    labels = (rng.random((100_000, 1)) < 0.2).astype(int)
    logits, weights = rng.normal(size=labels.shape) + 2 * labels, np.ones(labels.shape)
    own, even = fit_platt(logits, labels, weights), fit_platt(logits, labels, weights, prior=0.5)
    assert even.scale_N[0] == pytest.approx(own.scale_N[0], rel=0.03)
    assert even.offset_N[0] - own.offset_N[0] == pytest.approx(np.log(4), abs=0.06)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 40))
def test_no_threshold_has_a_higher_f1_than_the_chosen_one(seed, num_texts):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 4, size=(num_texts, 1)).astype(np.float32)
    labels, weights = rng.integers(0, 2, size=logits.shape), rng.integers(0, 3, size=logits.shape)
    labels[:2], weights[:2] = [[0], [1]], 1
    chosen = best_f1_threshold(logits, labels, weights)[0]

    def f1(threshold):
        return f1_score(labels[:, 0], logits[:, 0] >= threshold, sample_weight=weights[:, 0], zero_division=0)

    assert f1(chosen) == pytest.approx(max(f1(threshold) for threshold in np.arange(-5, 5)))


def test_a_threshold_for_one_percent_fires_on_one_percent_of_new_negatives():
    rng = np.random.default_rng(2)
    logits, labels = rng.standard_normal((151, 2000)).astype(np.float32), np.zeros((151, 2000))
    labels[0] = 1
    threshold = fpr_threshold(logits, labels, np.ones(labels.shape), 0.01)
    fresh = rng.standard_normal((2000, 2000)).astype(np.float32)
    assert 0.005 < (fresh >= threshold).mean() <= 0.01
    # 99 negatives are the fewest that can promise 1 %: the threshold stands just above the highest.
    few = fpr_threshold(logits[:100], labels[:100], np.ones((100, 2000)), 0.01)
    assert (few == np.nextafter(logits[1:100].max(axis=0), np.float32(np.inf))).all()
    assert np.isnan(fpr_threshold(logits, np.zeros(labels.shape), np.ones(labels.shape))).all()


def test_levels_are_even_below_and_dense_at_the_top():
    levels = quantile_levels()
    assert len(levels) == 129
    assert (np.diff(levels) > 0).all()
    for level in (0.0, 0.9, 0.99, 0.999, 0.9999, 1.0):
        assert np.abs(levels - level).min() < 1e-12
    with pytest.raises(DataError, match="at least 9"):
        quantile_levels(4)


def test_the_percentile_of_background_is_its_rank():
    rng = np.random.default_rng(3)
    background = rng.gamma(2, size=(20_000, 3)).astype(np.float32)
    quantiles, levels = background_quantiles(background)
    ranks = background.argsort(axis=0).argsort(axis=0) / (len(background) - 1)
    found = percentile(background, quantiles, levels)
    assert np.abs(found - ranks).max() < 0.005
    assert np.abs(found - ranks)[ranks > 0.99].max() < 0.0003
    extremes = percentile(np.array([[-1e9] * 3, [1e9] * 3, [np.nan] * 3]), quantiles, levels)
    np.testing.assert_array_equal(extremes, [[0] * 3, [1] * 3, [np.nan] * 3])


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (30, 2), elements=st.integers(-3, 3).map(float)))
def test_percentiles_rise_with_the_logit_even_over_flat_steps(background):
    quantiles, levels = background_quantiles(background, 17)
    found = percentile(np.linspace(-4, 4, 81)[:, None].repeat(2, axis=1), quantiles, levels)
    assert (np.diff(found, axis=0) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_a_lens_that_always_says_the_same_stands_in_the_middle():
    quantiles, levels = background_quantiles(np.full((50, 1), 2.5))
    assert percentile(np.array([[2.4], [2.5], [2.6]]), quantiles, levels)[:, 0].tolist() == [0, 0.5, 1]


def test_damaged_or_absent_input_is_named():
    with pytest.raises(DataError, match="lens 1 has a background logit"):
        background_quantiles(np.array([[0.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(DataError, match="no background tokens"):
        background_quantiles(np.zeros((0, 3)))
    with pytest.raises(DataError, match="one shape"):
        fit_platt(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((2, 2)))
