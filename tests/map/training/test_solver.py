"""Lenses in closed form: equal to independent solutions, blind to their own fold, the same in parts and as a whole."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from toy_encyclopedia import LAYERS, Sizes, toy_encyclopedia

from ftw.errors import DataError
from ftw.hat.store import LensStack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.training import solver
from ftw.map.training.fit import with_percentiles
from ftw.map.training.solver import choose_shrinkage, solve_shuffled, solve_stack
from ftw.map.training.sparse import SparsePool, class_sums, marks_by_lens, padded_parts, read_sparse_pool, score_marks

CONCEPTS = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encyclopedia]:
    """Seven concepts; of each, about half of the pairs are marked, with weights from 1 to 3."""
    folder = tmp_path_factory.mktemp("solver") / "store"
    sizes = Sizes(train=600, test=1000)
    with toy_encyclopedia(folder, sizes=sizes, concepts=CONCEPTS, sharpness=3.0) as encyclopedia:
        thinned(encyclopedia, lambda table, rng: rng.random(len(table.rows)) < 0.5)
        encyclopedia.table.weights[:] = np.random.default_rng(3).integers(1, 4, len(encyclopedia.table.weights))
        yield encyclopedia


@pytest.fixture(scope="module")
def pool(store: Encyclopedia) -> SparsePool:
    return read_sparse_pool(store, folds=3)


@pytest.fixture(scope="module")
def stack(pool: SparsePool) -> LensStack:
    return solve_stack(pool, progress=False)


def thinned(store: Encyclopedia, choose) -> None:
    """Keep the chosen training marks, and all others."""
    table = store.table
    train = np.asarray(table.splits)[table.rows] == "train"
    kept = ~train | choose(table, np.random.default_rng(2))
    parts = {name: getattr(table, name)[kept].copy() for name in ("rows", "cols", "labels", "weights")}
    store.table = replace(table, **parts)


def states(store: Encyclopedia, split: str) -> torch.Tensor:
    rows = store.table.where(split)
    return torch.stack([torch.from_numpy(store.pooled(layer, "mean", rows)).float() for layer in LAYERS], dim=1)


def standardised(pool: SparsePool, layer: int) -> np.ndarray:
    x_SD = pool.states_SLD[:, layer].astype(np.float64)
    return (x_SD - x_SD.mean(0)) / x_SD.std(0)


def weight(stack: LensStack, layer: int) -> np.ndarray:
    return stack.lens_tensors()["weight"][:, layer].numpy().astype(np.float64)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_directions_are_those_of_shrunk_discriminants_solved_one_by_one(pool: SparsePool, store: Encyclopedia):
    fit, labels_SN, weights_SN = solve_stack(pool, shrinkage=20.0, progress=False), *dense(pool)
    for layer in range(len(LAYERS)):
        x_SD, scale_D = standardised(pool, layer), pool.states_SLD[:, layer].astype(np.float64).std(0)
        covariance_DD = np.cov(x_SD.T, bias=True)
        for n in range(CONCEPTS):
            high_S, low_S = weights_SN[:, n] * labels_SN[:, n], weights_SN[:, n] * (1 - labels_SN[:, n])
            gap_D = high_S @ x_SD / high_S.sum() - low_S @ x_SD / low_S.sum()
            worth = 1 / sum((each**2).sum() / each.sum() ** 2 for each in (high_S, low_S))
            ridge = 20.0 / worth * np.trace(covariance_DD) / len(gap_D)
            expected_D = np.linalg.solve(covariance_DD + ridge * np.eye(len(gap_D)), gap_D)
            assert cosine(weight(fit, layer)[n] * scale_D, expected_D) > 1 - 1e-5


def test_directions_are_those_of_scikit_learn_where_the_shrinkage_is_the_same(tmp_path: Path):
    with toy_encyclopedia(tmp_path / "store", concepts=2) as store:
        pool = read_sparse_pool(store, folds=3)
    fit, labels_SN = solve_stack(pool, shrinkage=30.0, progress=False), dense(pool)[0]
    x_SD, scale_D = standardised(pool, 0), pool.states_SLD[:, 0].astype(np.float64).std(0)
    for n, label_S in enumerate(labels_SN.T):
        groups = [x_SD[label_S == value] for value in (0, 1)]
        within = sum(np.cov(group.T, bias=True) * len(group) for group in groups) / len(x_SD)
        odds = 30.0 * sum(1 / len(group) for group in groups) * np.trace(np.cov(x_SD.T, bias=True)) / np.trace(within)
        oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=odds / (1 + odds)).fit(x_SD, label_S)
        assert cosine(weight(fit, 0)[n] * scale_D, oracle.coef_[0]) > 1 - 1e-5


def test_a_lens_reads_its_negatives_as_zero_in_the_mean(pool: SparsePool, stack: LensStack):
    labels_SN, weights_SN = dense(pool)
    for layer, head in enumerate(stack.heads):
        with torch.no_grad():
            logits_SN = head(torch.from_numpy(pool.states_SLD[:, layer]).float()).numpy()
        mean_N = np.average(logits_SN, axis=0, weights=weights_SN * (1 - labels_SN))
        assert np.abs(mean_N).max() < 1e-3
        assert np.abs(logits_SN.std(axis=0) - 1).max() < 1e-3


def dense(pool: SparsePool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights [S, N] of a pool."""
    marks, shape = pool.marks, (len(pool.states_SLD), len(pool.names))
    labels_SN, weights_SN = np.zeros(shape), np.zeros(shape)
    at = marks.rows_E, np.repeat(np.arange(shape[1]), marks.counts_N)
    labels_SN[at], weights_SN[at] = marks.positive_E, marks.weights_E
    return labels_SN, weights_SN


def test_marks_by_lens_hold_what_the_table_holds(store: Encyclopedia, pool: SparsePool):
    rows = np.random.default_rng(0).permutation(store.table.where("train"))
    marks = marks_by_lens(store.table, rows)
    for have, expected in zip(dense(replace_marks(pool, marks)), store.table.matrices(rows), strict=True):
        assert np.array_equal(have, expected)
    for lens in range(CONCEPTS):
        assert (np.diff(marks.part(lens, lens + 1).rows_E) > 0).all()


def replace_marks(pool: SparsePool, marks) -> SparsePool:
    return replace(pool, marks=marks)


def test_sums_and_scores_equal_dense_products(pool: SparsePool):
    labels_SN, weights_SN = dense(pool)
    x_SD = standardised(pool, 1).astype(np.float32)
    positive = class_sums(x_SD, pool.marks, pool, positives_only=True)
    every = class_sums(x_SD, pool.marks, pool, positives_only=False)
    bounds = list(zip(pool.fold_starts_K[:-1], pool.fold_starts_K[1:], strict=True))
    for fold, (start, stop) in enumerate(bounds):
        span = slice(start, stop)
        expected_ND = (labels_SN * weights_SN)[span].T @ x_SD[span]
        np.testing.assert_allclose(positive.states_KnD[fold], expected_ND, atol=1e-3)
        np.testing.assert_allclose(every.weight_Kn[fold], weights_SN[span].sum(0))
    weight_KND = np.random.default_rng(0).normal(size=(3, CONCEPTS, x_SD.shape[1])).astype(np.float32)
    bias_KN = np.arange(3 * CONCEPTS).reshape(3, CONCEPTS) / 10
    logits_E = score_marks(x_SD, pool.marks, pool, weight_KND, bias_KN)
    fold_S = pool.fold_of(np.arange(len(x_SD)))
    dense_SN = np.einsum("sd,snd->sn", x_SD, weight_KND[fold_S]) + bias_KN[fold_S]
    lens_E = np.repeat(np.arange(CONCEPTS), pool.marks.counts_N)
    np.testing.assert_allclose(logits_E, dense_SN[pool.marks.rows_E, lens_E], atol=1e-4)


def test_padded_parts_hold_every_mark_once(pool: SparsePool):
    for budget in (1, 80 * 700, 1 << 30):
        places = [place[used] for _, place, used in padded_parts(pool.marks, budget_bytes=budget)]
        assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(pool.marks.rows_E)))


def out_of_fold(pool: SparsePool, layer: int = 0) -> np.ndarray:
    space = solver._space(pool, layer)
    return solver._out_of_fold(space, pool.marks, pool, *solver._two_sums(space.x_SD, pool.marks, pool), 20.0)


def test_out_of_fold_logits_never_see_labels_of_their_fold(pool: SparsePool):
    held_E = pool.fold_of(pool.marks.rows_E) == 1
    flipped = replace(pool.marks, positive_E=pool.marks.positive_E ^ held_E)
    plain_E, other_E = out_of_fold(pool), out_of_fold(replace_marks(pool, flipped))
    np.testing.assert_allclose(plain_E[held_E], other_E[held_E], atol=1e-4)
    assert np.abs(plain_E[~held_E] - other_E[~held_E]).max() > 0.1


def test_small_parts_give_the_same_stack(pool: SparsePool, stack: LensStack):
    small = solve_stack(pool, progress=False, budget_bytes=1)
    for name, tensor in {**stack.lens_tensors(), **stack.calibration_tensors()}.items():
        torch.testing.assert_close(
            {**small.lens_tensors(), **small.calibration_tensors()}[name], tensor, atol=2e-4, rtol=2e-4
        )


def test_lenses_solved_together_equal_each_solved_alone(pool: SparsePool, stack: LensStack):
    alone = solve_stack(
        replace(pool, marks=pool.marks.part(2, 3), names=["c2"]), shrinkage=choose_shrinkage(pool), progress=False
    )
    for name, tensor in alone.lens_tensors().items():
        torch.testing.assert_close(tensor[0], stack.lens_tensors()[name][2], atol=1e-4, rtol=1e-4)


def test_lenses_are_as_good_as_logistic_regressions(pool: SparsePool, stack: LensStack, store: Encyclopedia):
    truth_SN, _ = store.table.matrices(store.table.where("test"))
    test_SLD, (labels_SN, row_weights_SN) = states(store, "test"), dense(pool)
    solved_SN, differences = stack.bank().logits(test_SLD).numpy(), []
    for n in range(CONCEPTS):
        used = row_weights_SN[:, n] > 0
        logistic_S = sum(
            LogisticRegression(class_weight="balanced")
            .fit(pool.states_SLD[used, layer].astype(np.float64), labels_SN[used, n], row_weights_SN[used, n])
            .decision_function(test_SLD[:, layer].numpy())
            for layer in range(len(LAYERS))
        )
        differences.append(roc_auc_score(truth_SN[:, n], solved_SN[:, n]) - roc_auc_score(truth_SN[:, n], logistic_S))
    assert np.mean(differences) > -0.005


def test_probabilities_are_calibrated_on_rows_that_nothing_has_seen(stack: LensStack, store: Encyclopedia):
    probability_SN = torch.sigmoid(stack.bank().logits(states(store, "test"))).numpy()
    labels_SN, _ = store.table.matrices(store.table.where("test"))
    assert np.abs(probability_SN.mean(0) - labels_SN.mean(0)).max() < 0.12
    assert ((probability_SN - labels_SN) ** 2).mean() < 0.2
    assert np.isfinite(stack.threshold_N.numpy()).all()
    fired_SN = stack.bank().logits(states(store, "test")).numpy() >= stack.threshold_1fpr_N.numpy()
    assert (fired_SN * (1 - labels_SN)).sum() / (1 - labels_SN).sum() < 0.03


def test_stack_is_ready_for_percentiles(stack: LensStack, store: Encyclopedia):
    ranked = with_percentiles(stack, store)
    assert ranked.quantiles_NQ.shape[0] == CONCEPTS
    assert (ranked.quantiles_NQ.diff(dim=1) >= 0).all()


@pytest.fixture(scope="module")
def scarce(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encyclopedia]:
    """As First Light: few positives and many negatives; the last concept has its only positives in one group."""
    folder = tmp_path_factory.mktemp("scarce") / "store"
    with toy_encyclopedia(folder, sizes=Sizes(train=900, test=600), concepts=5, sharpness=12.0) as store:

        def few(table, rng: np.random.Generator) -> np.ndarray:
            kept = table.labels == 0
            for concept, num in enumerate([3, 4, 6, 10, 2]):
                kept[rng.permutation(np.flatnonzero((table.cols == concept) & (table.labels == 1)))[:num]] = True
            return kept

        thinned(store, few)
        table = store.table
        groups = list(table.groups)
        last = table.rows[(table.cols == 4) & (table.labels == 1) & (np.asarray(table.splits)[table.rows] == "train")]
        for row in last:
            groups[row] = "one article"
        store.table = replace(table, groups=groups)
        yield store


def test_three_positives_make_a_lens_and_one_group_borrows_its_calibration(scarce: Encyclopedia):
    stack = solve_stack(scarce, progress=False)
    rows = scarce.table.where("test")
    logits_SN = stack.bank().logits(states(scarce, "test")).numpy()
    area_N = auroc(logits_SN, *scarce.table.matrices(rows))
    # Two or three examples of a direction in eight dimensions say something; ten say more.
    assert area_N.min() > 0.55
    assert area_N.mean() > 0.7
    assert (stack.scale_NL > 0).all()
    assert torch.isfinite(stack.offset_NL).all()
    # No out-of-fold positive: even odds for F1, and the negatives alone for the rate of false alarms.
    assert stack.threshold_N[4] == 0
    assert stack.threshold_1fpr_N[4] < 1e30


def test_few_examples_are_shrunk_more(scarce: Encyclopedia):
    pool = read_sparse_pool(scarce, folds=0)
    stack, mean = (solve_stack(pool, shrinkage=value, progress=False) for value in (10.0, 1e9))
    assert (
        np.argsort([cosine(a, b) for a, b in zip(weight(stack, 0)[[0, 3]], weight(mean, 0)[[0, 3]], strict=True)])[1]
        == 0
    )


def test_shrinkage_is_chosen_from_training_rows_alone(scarce: Encyclopedia):
    chosen = choose_shrinkage(scarce)
    table = scarce.table
    test = np.asarray(table.splits)[table.rows] == "test"
    labels = np.where(test, 1 - table.labels, table.labels).astype(np.int8)
    scarce.table = replace(table, labels=labels)
    assert choose_shrinkage(scarce) == chosen
    scarce.table = table


def test_without_folds_shrinkage_is_the_usual_one(pool: SparsePool, store: Encyclopedia):
    assert choose_shrinkage(store, folds=0) == solver.DEFAULT_SHRINKAGE
    assert solve_stack(store, folds=0, progress=False).names == pool.names


def test_permuted_labels_keep_their_number_and_do_not_depend_on_the_part(pool: SparsePool):
    whole, part = pool.marks.permuted(seed=4), pool.marks.part(3, 6).permuted(seed=4, first_lens=3)
    assert np.array_equal(whole.part(3, 6).positive_E, part.positive_E)
    assert not np.array_equal(whole.positive_E, pool.marks.positive_E)
    for n in range(CONCEPTS):
        assert whole.part(n, n + 1).positive_E.sum() == pool.marks.part(n, n + 1).positive_E.sum()


def test_shuffled_labels_give_lenses_that_know_nothing(store: Encyclopedia):
    truth_SN, weights_SN = store.table.matrices(store.table.where("test"))
    test_SLD = states(store, "test")
    heads = solve_shuffled(store, num_shuffles=20, progress=False)
    assert [len(each) for each in heads] == [len(LAYERS)] * 20
    with torch.no_grad():
        areas = [auroc(layers[0](test_SLD[:, 0]).numpy(), truth_SN, weights_SN).mean() for layers in heads]
    assert abs(np.mean(areas) - 0.5) < 0.05


def test_shuffled_lenses_of_true_labels_would_be_the_lenses(pool: SparsePool, monkeypatch: pytest.MonkeyPatch):
    even = replace_marks(pool, replace(pool.marks, weights_E=np.ones_like(pool.marks.weights_E)))
    monkeypatch.setattr("ftw.map.training.sparse.Marks.permuted", lambda marks, **_: marks)
    (control,) = solve_shuffled(even, num_shuffles=1, shrinkage=20.0, progress=False)
    stack = solve_stack(even, shrinkage=20.0, progress=False)
    for layer, head in enumerate(control):
        torch.testing.assert_close(
            head.row_tensors()["weight"], stack.heads[layer].row_tensors()["weight"], atol=1e-4, rtol=1e-3
        )


def test_data_that_cannot_be_solved_is_refused_in_words(tmp_path: Path):
    with toy_encyclopedia(tmp_path / "store") as store:
        table = store.table
        with pytest.raises(DataError, match="folds=1"):
            solve_stack(store, folds=1, progress=False)
        with pytest.raises(DataError, match="shrinkage=-1"):
            solve_stack(store, shrinkage=-1.0, progress=False)
        twice = {
            name: np.concatenate([getattr(table, name), getattr(table, name)[:2]])
            for name in ("rows", "cols", "labels", "weights")
        }
        store.table = replace(table, **twice)
        with pytest.raises(DataError, match=r"2 pairs .* marked twice"):
            read_sparse_pool(store)
        weights = np.where((table.cols == 1) & (table.labels == 1), 0, table.weights)
        store.table = replace(table, weights=weights)
        with pytest.raises(DataError, match=r"1 of 3 concepts.*'c1' \(0 positive"):
            read_sparse_pool(store)
        store.table = replace(table, groups=["one"] * len(table))
        with pytest.raises(DataError, match="one fold; give concepts texts of several groups"):
            solve_stack(store, progress=False)
        store.table = replace(table, splits=["test"] * len(table))
        with pytest.raises(DataError, match="no training texts"):
            read_sparse_pool(store)


def test_states_that_are_not_finite_are_refused_by_the_name_of_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with toy_encyclopedia(tmp_path / "store") as store:
        plain = store.pooled
        bad = np.where(np.arange(240)[:, None] == 7, np.float16(np.inf), np.float16(1))
        monkeypatch.setattr(store, "pooled", lambda layer, name, rows: plain(layer, name, rows) * bad[rows])
        with pytest.raises(DataError, match="'text 7 of train' are not finite"):
            read_sparse_pool(store)
