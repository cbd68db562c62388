"""Claims about the metrics of many lenses: each equals scikit-learn's for that lens alone, with ties and gaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from ftw.map import metrics


def pool(seed: int, num_texts: int, num_lenses: int, levels: int):
    """Scores with ties, labels of both classes, weights with gaps, for each lens."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels, size=(num_texts, num_lenses)).astype(np.float32) / 3
    labels = (rng.random((num_texts, num_lenses)) < rng.uniform(0.1, 0.9, num_lenses)).astype(np.int8)
    weights = rng.choice([0, 0.5, 1, 3], size=(num_texts, num_lenses)).astype(np.float32)
    labels[:2] = [[0], [1]]
    weights[:2] = 1
    return scores, labels, weights


def probability(scores):
    return 1 / (1 + np.exp(-scores.clip(-30, 30)))


pools = st.builds(
    pool,
    seed=st.integers(0, 10_000),
    num_texts=st.integers(4, 60),
    num_lenses=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 10, 1000]),
)


def each(pool, function, **options):
    scores, labels, weights = pool
    return [
        function(labels[used, lens], scores[used, lens], sample_weight=weights[used, lens], **options)
        for lens in range(scores.shape[1])
        for used in [weights[:, lens] > 0]
    ]


def oracle_recall(labels, scores, *, sample_weight, target):
    alarms, hits, _ = oracle.roc_curve(labels, scores, sample_weight=sample_weight, drop_intermediate=False)
    return hits[alarms <= target + 1e-9].max()


@settings(max_examples=60, deadline=None)
@given(pools)
def test_rank_metrics_equal_scikit_learn_lens_by_lens(pool):
    np.testing.assert_allclose(metrics.auroc(*pool), each(pool, oracle.roc_auc_score), atol=1e-9)
    np.testing.assert_allclose(metrics.average_precision(*pool), each(pool, oracle.average_precision_score), atol=1e-9)
    np.testing.assert_allclose(metrics.recall_at_fpr(*pool, 0.2), each(pool, oracle_recall, target=0.2), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(pools)
def test_f1_rates_and_brier_equal_scikit_learn(pool):
    scores, labels, weights = pool
    threshold = np.zeros(scores.shape[1])
    calls = (scores >= 0, labels, weights)
    np.testing.assert_allclose(
        metrics.f1_at(*pool, threshold), each(calls, oracle.f1_score, zero_division=0), atol=1e-6
    )
    recall, rate = metrics.rates_at(*pool, threshold)
    np.testing.assert_allclose(recall, each(calls, oracle.recall_score), atol=1e-6)
    np.testing.assert_allclose(1 - rate, each(calls, oracle.recall_score, pos_label=0), atol=1e-6)
    chances = (probability(scores), labels, weights)
    np.testing.assert_allclose(metrics.brier(*chances), each(chances, oracle.brier_score_loss), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(pools, st.randoms(use_true_random=False))
def test_the_order_of_texts_and_any_rising_map_of_scores_change_nothing(pool, random):
    scores, labels, weights = pool
    order = random.sample(range(len(scores)), len(scores))
    moved = (np.exp(scores[order] / 100).astype(np.float64), labels[order], weights[order])
    for metric in (metrics.auroc, metrics.average_precision, metrics.recall_at_fpr):
        np.testing.assert_allclose(metric(*pool), metric(*moved), atol=1e-9)


def test_a_weight_of_zero_is_as_if_the_text_were_not_there():
    scores, labels, weights = pool(1, 200, 4, 5)
    poisoned = np.where(weights == 0, np.nan, scores)
    for metric in (metrics.auroc, metrics.average_precision, metrics.recall_at_fpr):
        np.testing.assert_allclose(metric(poisoned, labels, weights), metric(scores, labels, weights), atol=1e-12)
    chances = probability(scores)
    poisoned = np.where(weights == 0, np.nan, chances)
    for metric in (metrics.ece, metrics.ece_floor, metrics.brier):
        np.testing.assert_array_equal(metric(poisoned, labels, weights), metric(chances, labels, weights))


def test_a_degenerate_lens_reads_nan_and_leaves_its_neighbours_alone():
    scores, labels, weights = pool(2, 100, 5, 10)
    expected = metrics.auroc(scores, labels, weights)
    labels[:, 1], weights[:, 2], scores[0, 3] = 1, 0, np.nan
    chances = probability(scores)
    threshold = np.zeros(5)
    results = [metric(scores, labels, weights) for metric in (metrics.auroc, metrics.average_precision)]
    results += [metrics.recall_at_fpr(scores, labels, weights), metrics.f1_at(scores, labels, weights, threshold)]
    results += [metric(chances, labels, weights) for metric in (metrics.ece, metrics.ece_floor, metrics.brier)]
    results += list(metrics.rates_at(scores, labels, weights, threshold))
    for result in results:
        assert np.isnan(result).tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(results[0][[0, 4]], expected[[0, 4]])
    assert np.isnan(metrics.auroc(scores[:0], labels[:0], weights[:0])).all()


def test_slices_of_lenses_give_what_one_piece_gives(monkeypatch):
    wide = pool(3, 50, 37, 10)
    whole = metrics.auroc(*wide)
    monkeypatch.setattr(metrics.lens_slices, "__kwdefaults__", {"budget_bytes": 8 * 50 * 4})
    assert len(list(metrics.lens_slices(50, 37))) == 10
    np.testing.assert_array_equal(metrics.auroc(*wide), whole)


def test_ece_equals_a_plain_loop_over_bins():
    scores, labels, weights = pool(4, 300, 3, 1000)
    chances = probability(scores)
    for lens in range(3):
        w, p, y = weights[:, lens] / weights[:, lens].sum(), chances[:, lens], labels[:, lens]
        bins = np.minimum((p * 10).astype(int), 9)
        expected = sum(abs((w * (p - y))[bins == k].sum()) for k in range(10))
        assert metrics.ece(chances, labels, weights)[lens] == pytest.approx(expected, abs=1e-6)


def test_a_calibrated_lens_reads_its_floor_and_an_overconfident_one_more():
    rng = np.random.default_rng(5)
    chances = rng.beta(0.4, 0.4, size=(250, 400))
    labels, weights = (rng.random(chances.shape) < chances).astype(np.int8), np.ones(chances.shape)
    floor = metrics.ece_floor(chances, labels, weights, draws=50)
    assert metrics.ece(chances, labels, weights).mean() == pytest.approx(floor.mean(), rel=0.05)
    sharper = chances**3 / (chances**3 + (1 - chances) ** 3)
    assert (
        metrics.ece(sharper, labels, weights).mean() > 2 * metrics.ece_floor(sharper, labels, weights, draws=50).mean()
    )


def test_at_a_prior_a_lens_calibrated_for_that_prior_is_calibrated():
    # Texts at a base rate of one in ten, probabilities for a base rate of one half.
    rng = np.random.default_rng(6)
    labels = (rng.random((40_000, 1)) < 0.1).astype(np.int8)
    logits = rng.normal(size=labels.shape) + 2 * labels - 1
    chances, weights = 1 / (1 + np.exp(-2 * logits)), np.ones(labels.shape)
    assert metrics.ece(chances, labels, weights, prior=0.5)[0] < 0.02
    assert metrics.ece(chances, labels, weights)[0] > 0.1
    shares = metrics.weights_at_prior(labels, weights, 0.5)
    assert shares[labels == 1].sum() == pytest.approx(0.5)
    assert shares.sum() == pytest.approx(1)
