"""Claims about the interval of a mean over concepts: it holds the mean, and the truth as often as it says."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ftw.map.bootstrap import SMALL_CLASS, bootstrap, group_counts
from ftw.map.evaluate import EvaluateConfig, evaluate
from ftw.map.influence import Influence, influence

RARE, COMMON = 60, 12


def world(rng: np.random.Generator, shifts_N: np.ndarray, num_texts: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels where most concepts have one to three positives; each pair of concepts shares a positive text.

    A concept with shift d has the AUROC Φ(d / √2).
    """
    labels_SN = np.zeros((num_texts, len(shifts_N)), dtype=np.int8)
    for lens in range(len(shifts_N)):
        num = rng.integers(1, 4) if lens < RARE else 30
        labels_SN[rng.permutation(num_texts)[:num], lens] = 1
        if lens % 2:
            labels_SN[rng.choice(np.flatnonzero(labels_SN[:, lens - 1])), lens] = 1
    # A text of its own difficulty reads alike for all concepts.
    noise_SN = rng.normal(size=labels_SN.shape) * math.sqrt(0.7) + rng.normal(size=(num_texts, 1)) * math.sqrt(0.3)
    return noise_SN + shifts_N * labels_SN, labels_SN


def true_auroc(shifts_N: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1 + math.erf(shift / 2)) for shift in shifts_N])


def intervals(scores_SN: np.ndarray, labels_SN: np.ndarray, *, seed: int) -> list[tuple[float, float]]:
    """The interval of 90 % for these concepts, and the wide one."""
    counts_GR, numbers_S = group_counts(np.arange(len(labels_SN)), draws=200, seed=seed)
    found = influence(scores_SN, labels_SN, np.ones(labels_SN.shape), numbers_S)
    return [tuple(np.quantile(drawn_R, (0.05, 0.95))) for drawn_R in found.mean_draws(counts_GR, seed=seed)]


def test_a_mean_over_what_a_draw_holds_slides_off_the_mean_and_this_one_does_not():
    """The reason for this module: rare concepts are missing from draws, and rare ones read better here."""
    rng = np.random.default_rng(0)
    shifts_N = np.repeat([3.0, 0.3], [RARE, COMMON])
    scores_SN, labels_SN = world(rng, shifts_N)
    groups, ones = np.arange(len(labels_SN)), np.ones(labels_SN.shape)
    drawn_RN = bootstrap({"activation": scores_SN}, labels_SN, ones, groups, draws=400)["activation"]
    mean = float(influence(scores_SN, labels_SN, ones, groups).values_N.mean())
    assert np.quantile(np.nanmean(drawn_RN, axis=1), 0.9) < mean
    low, high = intervals(scores_SN, labels_SN, seed=0)[0]
    assert low < mean < high


def test_intervals_of_the_mean_cover_as_often_as_they_say_with_one_to_three_positives():
    rng = np.random.default_rng(1)
    shifts_N = np.repeat([2.0, 0.8], [RARE, COMMON])  # the rare ones read better, as in the wild
    truth, covered = true_auroc(shifts_N).mean(), []
    for seed in range(80):
        low, high = intervals(*world(rng, shifts_N), seed=seed)[0]
        covered.append(low <= truth <= high)
    # 0.9 less two standard errors; above, because a lone positive counts on the wide side.
    assert 0.84 <= np.mean(covered) <= 0.99


def test_the_wide_interval_covers_the_mean_of_concepts_that_were_never_drawn():
    rng = np.random.default_rng(2)
    truth = true_auroc(np.random.default_rng(3).normal(1.2, 0.6, size=200_000)).mean()
    covered = []
    for seed in range(60):
        held = world(rng, rng.normal(1.2, 0.6, size=RARE + COMMON))
        covered.append([low <= truth <= high for low, high in intervals(*held, seed=seed)])
    these, others = np.mean(covered, axis=0)
    assert 0.82 <= others <= 0.99
    assert others > these


def test_values_are_those_of_scikit_learn_and_influences_those_of_leaving_texts_out():
    rng = np.random.default_rng(4)
    scores_SN, labels_SN = rng.normal(size=(60, 2)).round(1), (rng.random((60, 2)) < 0.3).astype(np.int8)
    weights_SN = rng.choice([0.0, 1.0, 2.0], size=(60, 2))
    groups = np.arange(60) // 2
    found = influence(scores_SN, labels_SN, weights_SN, groups)
    for lens in range(2):
        labels, scores, weights = labels_SN[:, lens], scores_SN[:, lens], weights_SN[:, lens]
        whole = roc_auc_score(labels, scores, sample_weight=weights)
        assert found.values_N[lens] == pytest.approx(whole)
        for group in range(0, 30, 5):
            # The derivative with respect to the group's weight, without the small-sample stretch (under 10 % here).
            more = roc_auc_score(labels, scores, sample_weight=weights * np.where(groups == group, 1.001, 1))
            assert found.by_group_GN[group, lens] == pytest.approx((more - whole) / 0.001, rel=0.12, abs=1e-4)
    np.testing.assert_allclose(found.by_group_GN.sum(axis=0), 0, atol=0.02)


def test_the_difference_of_a_system_with_itself_has_no_width():
    scores_SN, labels_SN = world(np.random.default_rng(5), np.full(RARE + COMMON, 1.0))
    counts_GR, numbers_S = group_counts(np.arange(len(labels_SN)), draws=50, seed=0)
    found = influence(scores_SN, labels_SN, np.ones(labels_SN.shape), numbers_S)
    for drawn_R in (found - found).mean_draws(counts_GR):
        np.testing.assert_array_equal(drawn_R, 0)


def test_what_tells_nothing_has_no_interval():
    labels_SN = np.zeros((50, 3), dtype=np.int8)
    labels_SN[0, 0] = labels_SN[:9, 1] = 1
    scores_SN, ones = np.random.default_rng(6).normal(size=labels_SN.shape), np.ones(labels_SN.shape)
    config = EvaluateConfig(draws=50)

    def run(lenses: list[int]):
        parts = (scores_SN[:, lenses], labels_SN[:, lenses], ones[:, lenses])
        names = {"groups": [f"{row}" for row in range(50)], "concepts": [f"c{lens}" for lens in lenses]}
        return evaluate({"activation": parts[0]}, labels=parts[1], weights=parts[2], **names, config=config)

    both, alone = run([0, 1, 2]), run([0])
    assert math.isfinite(both.concepts["c0"]["auroc"])
    assert math.isnan(both.concepts["c0"]["auroc_low"])
    assert math.isfinite(both.concepts["c1"]["auroc_low"])
    assert both.mean["auroc_low"] < both.mean["auroc"] < both.mean["auroc_high"]
    assert math.isnan(alone.mean["auroc_low"])
    assert any("1 concepts without an interval of their own" in note for note in both.notes)


def test_classes_too_large_for_a_matrix_give_the_same_draws(monkeypatch):
    rng = np.random.default_rng(7)
    scores_SN, labels_SN = rng.normal(size=(90, 4)).round(1), (rng.random((90, 4)) < 0.4).astype(np.int8)
    weights_SN, groups = rng.choice([0.0, 1.0, 2.5], size=(90, 4)), np.arange(90) // 2
    arguments = ({"activation": scores_SN}, labels_SN, weights_SN, groups)
    by_product = bootstrap(*arguments, draws=150, seed=1)["activation"]
    assert SMALL_CLASS > 90
    monkeypatch.setattr("ftw.map.bootstrap.SMALL_CLASS", 0)
    np.testing.assert_allclose(bootstrap(*arguments, draws=150, seed=1)["activation"], by_product, atol=1e-12)
    monkeypatch.undo()
    monkeypatch.setattr("ftw.map.bootstrap.BLOCK_ROWS", 1)
    np.testing.assert_allclose(bootstrap(*arguments, draws=150, seed=1)["activation"], by_product, atol=1e-12)


def test_nothing_known_has_no_mean():
    nothing = Influence(np.array([np.nan]), np.zeros((3, 1), np.float32), np.array([-1]))
    assert all(np.isnan(drawn_R).all() for drawn_R in nothing.mean_draws(np.ones((3, 5))))
