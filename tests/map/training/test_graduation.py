"""Claims about graduation: who passes stops, who is stuck escalates and stops, and cost is bounded."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ftw.errors import ConfigError, DataError
from ftw.map.training.graduation import GraduationConfig, Validation, fixed, graduate, subset
from ftw.map.training.solver import solve_stack
from ftw.map.training.sparse import Marks, SparsePool

NAMES = ["easy", "hard", "noise", "small"]
LAYERS, WIDTH = (2, 5), 12
SHARPNESS = {"easy": 6.0, "hard": 0.7, "noise": 0.0, "small": 2.0}
CONFIG = GraduationConfig(sizes=[5, 15, 30, 60], tiers=[0.97, 0.95, 0.9, 0.85], patience=2)


def texts(num: int, seed: int, directions_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States, and labels in which each text is about one concept, or (a fifth of them) about none."""
    rng = np.random.default_rng(seed)
    about_S = rng.integers(0, len(NAMES) * 5 // 4 + 1, size=num)
    labels_SN = about_S[:, None] == np.arange(len(NAMES))
    labels_SN[12:, 3] = False  # "small" has few texts
    sharp_N = np.array([SHARPNESS[name] for name in NAMES])
    states_SD = rng.normal(size=(num, WIDTH)) + (labels_SN * sharp_N) @ directions_ND
    noise_SLD = 0.1 * rng.normal(size=(num, len(LAYERS), WIDTH))
    return (states_SD[:, None] + noise_SLD).astype(np.float16), labels_SN


@pytest.fixture(scope="module")
def directions_ND() -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.linalg.qr(rng.normal(size=(WIDTH, len(NAMES))))[0].T


@pytest.fixture(scope="module")
def pool(directions_ND: np.ndarray) -> SparsePool:
    states_SLD, labels_SN = texts(500, 0, directions_ND)
    num = len(states_SLD)
    marks = Marks(
        rows_E=np.tile(np.arange(num, dtype=np.int32), len(NAMES)),
        positive_E=labels_SN.T.reshape(-1),
        weights_E=np.ones(num * len(NAMES), dtype=np.float32),
        starts_N=num * np.arange(len(NAMES) + 1),
    )
    return SparsePool(
        states_SLD=states_SLD, marks=marks, fold_starts_K=np.arange(0, num + 1, 125), names=NAMES, layers=LAYERS
    )


@pytest.fixture(scope="module")
def validation(directions_ND: np.ndarray) -> Validation:
    states_SLD, labels_SN = texts(400, 1, directions_ND)
    labels_SN[12:, 3] = False
    return Validation(torch.from_numpy(states_SLD).float(), labels_SN.astype(np.float32), np.ones(labels_SN.shape))


def positives(pool: SparsePool, used_S: np.ndarray) -> dict[str, int]:
    labels_NS = pool.marks.positive_E.reshape(len(NAMES), -1)
    return {name: int(labels_NS[lens, used_S].sum()) for lens, name in enumerate(NAMES)}


def test_an_easy_concept_passes_at_once_with_few_samples_and_a_hard_one_goes_on(
    pool: SparsePool, validation: Validation
):
    done = graduate(pool, validation, CONFIG)
    easy, hard, noise = (done.records[name] for name in ("easy", "hard", "noise"))
    assert (easy.state, easy.tier, easy.grade, easy.num_positive) == ("graduated", "strict", "A", 5)
    assert len(hard.rounds) > 1
    assert hard.num_positive > easy.num_positive
    assert noise.tier == ""
    assert noise.grade == "C"
    assert done.num_texts == done.used_S.sum() == done.texts_by_round[-1]
    assert sorted(done.texts_by_round) == done.texts_by_round


def test_a_concept_that_gains_nothing_is_stuck_escalates_to_its_siblings_and_stops(
    pool: SparsePool, validation: Validation
):
    never = replace(CONFIG, min_gain=1.0, tiers=[1.0], tier_names=["strict"], sizes=[5, 10, 20, 40, 60])
    alone = graduate(pool, validation, never)
    assert alone.records["noise"].state == "stuck"
    assert len(alone.records["noise"].rounds) == 1 + never.patience
    # Passed at once, "easy" grows only as the sibling of somebody who is stuck.
    stuck = replace(never, tiers=[0.97, 0.97], tier_names=["strict", "same"])
    assert graduate(pool, validation, stuck).records["easy"].num_positive == 5
    helped = graduate(pool, validation, stuck, siblings={"noise": ["easy"]})
    assert helped.records["easy"].state == "graduated"
    assert helped.records["easy"].num_positive > 5


def test_a_concept_without_further_texts_is_exhausted_and_the_budget_is_never_passed(
    pool: SparsePool, validation: Validation
):
    strict = replace(CONFIG, tiers=[1.0], tier_names=["strict"], min_gain=-1.0)
    done = graduate(pool, validation, strict)
    assert done.records["small"].state == "exhausted"
    assert done.records["small"].num_positive == positives(pool, np.ones(500, dtype=bool))["small"]
    for limit in (60, 90):
        bounded = graduate(pool, validation, replace(strict, max_texts=limit))
        assert bounded.num_texts <= limit
        assert "budget" in {record.state for record in bounded.records.values()}


def test_the_lenses_are_those_of_one_fit_on_the_texts_that_were_used(pool: SparsePool, validation: Validation):
    done = graduate(pool, validation, CONFIG)
    again = solve_stack(subset(pool, done.used_S), shrinkage=CONFIG.shrinkage, progress=False)
    assert torch.equal(done.stack.heads[0].row_tensors()["weight"], again.heads[0].row_tensors()["weight"])
    auroc_N = validation.auroc(again)
    for lens, name in enumerate(NAMES):
        assert done.records[name].auroc == pytest.approx(auroc_N[lens])


def test_a_subset_of_all_texts_is_the_pool_and_of_some_has_their_marks_and_folds(pool: SparsePool):
    whole = subset(pool, np.ones(500, dtype=bool))
    assert np.array_equal(whole.marks.rows_E, pool.marks.rows_E)
    assert np.array_equal(whole.fold_starts_K, pool.fold_starts_K)
    used_S = np.random.default_rng(3).random(500) < 0.3
    part = subset(pool, used_S)
    assert np.array_equal(part.states_SLD, pool.states_SLD[used_S])
    assert np.array_equal(np.diff(part.fold_starts_K), used_S.reshape(4, 125).sum(axis=1))
    labels_NS = pool.marks.positive_E.reshape(len(NAMES), -1)[:, used_S]
    for lens in range(len(NAMES)):
        span = slice(part.marks.starts_N[lens], part.marks.starts_N[lens + 1])
        assert np.array_equal(part.marks.positive_E[span][np.argsort(part.marks.rows_E[span])], labels_NS[lens])


def test_a_fixed_number_gives_everybody_that_many_or_all_they_have(pool: SparsePool):
    for size in (5, 20):
        counts = positives(pool, fixed(pool, size, CONFIG))
        every = positives(pool, np.ones(500, dtype=bool))
        assert counts == {name: min(size, every[name]) for name in NAMES}


def test_the_same_seed_gives_the_same_and_records_fit_into_a_packs_metrics(pool: SparsePool, validation: Validation):
    one, two = graduate(pool, validation, CONFIG), graduate(pool, validation, CONFIG)
    assert np.array_equal(one.used_S, two.used_S)
    metrics = one.add_to({"easy": {"auroc": 0.9}})
    assert metrics["easy"]["auroc"] == 0.9
    assert metrics["easy"]["graduation"]["state"] == "graduated"
    assert metrics["hard"]["graduation"]["rounds"][0]["num_positive"] == 5


def test_what_cannot_be_is_named(pool: SparsePool, validation: Validation):
    wrongs: list[dict[str, Any]] = [
        {"sizes": [30, 10]},
        {"tiers": [0.9, 0.95]},
        {"tier_names": ["one"]},
        {"patience": 0},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="graduation"):
            GraduationConfig(**wrong)
    with pytest.raises(DataError, match="validation"):
        Validation(validation.states_VLD[:3], validation.labels_VN, validation.weights_VN)
    with pytest.raises(DataError, match="3 concepts"):
        graduate(pool, Validation(validation.states_VLD, validation.labels_VN[:, :3], validation.weights_VN[:, :3]))
