"""Calibrated probabilities are true, controls know nothing, percentiles rank against background."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from toy_encyclopedia import LAYERS, Sizes, toy_encyclopedia
from toy_pool import CONFIG, fitted

from ftw.errors import DataError
from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack
from ftw.map.controls import control_scores
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig
from ftw.map.training.callbacks import current_bank, quiet_trainer
from ftw.map.training.data import Pool, build_pool
from ftw.map.training.fit import (
    _permute,
    calibrated_stack,
    evaluate_stack,
    fit_shuffled,
    with_percentiles,
)
from ftw.map.training.lens_task import LensTask
from ftw.map.training.solver import solve_stack

QUICK = EvaluateConfig(draws=20, floor_draws=10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encyclopedia]:
    folder = tmp_path_factory.mktemp("fit") / "store"
    with toy_encyclopedia(folder, sizes=Sizes(train=900, test=1500), sharpness=2.5) as encyclopedia:
        yield encyclopedia


@pytest.fixture(scope="module")
def pool(store: Encyclopedia) -> Pool:
    return build_pool(store, CONFIG, seed=0)


@pytest.fixture(scope="module")
def task(pool: Pool) -> LensTask:
    return fitted(pool, replace(CONFIG, batch_texts=128), epochs=12)


@pytest.fixture(scope="module")
def stack(task: LensTask, pool: Pool, store: Encyclopedia) -> LensStack:
    return calibrated_stack(task, pool, store)


def states(store: Encyclopedia, split: str) -> torch.Tensor:
    rows = store.table.where(split)
    return torch.stack([torch.from_numpy(store.pooled(layer, "mean", rows)).float() for layer in LAYERS], dim=1)


def test_probabilities_are_calibrated_on_rows_that_nothing_has_seen(stack: LensStack, store: Encyclopedia):
    probability_SN = torch.sigmoid(stack.bank().logits(states(store, "test"))).numpy()
    labels_SN, _ = store.table.matrices(store.table.where("test"))
    for n in range(3):
        ordered = np.argsort(probability_SN[:, n])
        for part in np.array_split(ordered, 5):
            assert abs(probability_SN[part, n].mean() - labels_SN[part, n].mean()) < 0.08


def test_lenses_find_the_direction_that_made_the_labels(stack: LensStack, store: Encyclopedia):
    evaluation = evaluate_stack(stack, store, config=QUICK)
    assert 0.75 < evaluation.mean["auroc"] < 0.95
    assert evaluation.mean["ece"] < 0.08
    labels_SN, _ = store.table.matrices(store.table.where("test"))
    logits_SN = stack.bank().logits(states(store, "test")).numpy()
    for n, name in enumerate(stack.names):
        assert evaluation.concepts[name]["auroc"] == pytest.approx(roc_auc_score(labels_SN[:, n], logits_SN[:, n]))


def test_figures_follow_their_lens_when_lenses_are_chosen_or_reordered(stack: LensStack, store: Encyclopedia):
    whole = evaluate_stack(stack, store, config=QUICK)
    some = evaluate_stack(stack.rows(["c2", "c0"]), store, config=QUICK)
    for name in ("c2", "c0"):
        assert some.concepts[name]["auroc"] == pytest.approx(whole.concepts[name]["auroc"])


def test_one_percent_threshold_lets_about_one_percent_through(stack: LensStack, store: Encyclopedia):
    labels_SN, _ = store.table.matrices(store.table.where("test"))
    fires_SN = stack.bank().logits(states(store, "test")).numpy() >= stack.threshold_1fpr_N.numpy()
    rates = [fires_SN[labels_SN[:, n] == 0, n].mean() for n in range(3)]
    assert max(rates) < 0.035


def test_shuffled_labels_give_lenses_that_know_nothing(pool: Pool, stack: LensStack, store: Encyclopedia):
    training = replace(CONFIG, num_shuffles=4)
    shuffled = fit_shuffled(pool, HeadConfig(), training, epochs=3, trainer=quiet_trainer, seed=0)
    assert [len(heads) for heads in shuffled] == [2] * 4
    evaluation = evaluate_stack(stack, store, config=QUICK, shuffled=shuffled)
    assert abs(evaluation.mean["auroc_shuffled"] - 0.5) < 0.1
    assert evaluation.mean["auroc"] > 0.7


def test_shuffling_keeps_the_classes_of_each_lens_and_leaves_unused_pairs(pool: Pool):
    weights_SN = (torch.rand(pool.labels_SN.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    permuted_SN = _permute(pool.labels_SN, weights_SN, seed=3)
    used = weights_SN > 0
    assert torch.equal((permuted_SN * used).sum(0), (pool.labels_SN * used).sum(0))
    assert torch.equal(permuted_SN[~used], pool.labels_SN[~used])
    assert not torch.equal(permuted_SN, pool.labels_SN)
    assert torch.equal(permuted_SN, _permute(pool.labels_SN, weights_SN, seed=3))


def test_percentiles_rank_against_background_tokens(stack: LensStack, store: Encyclopedia):
    rows = store.table.where("background")
    tokens = [torch.from_numpy(store.token_states(layer, rows)[0]).float() for layer in LAYERS]
    logits_TN = stack.bank().logits(torch.stack(tokens, dim=1))
    expected_NQ = np.quantile(logits_TN.numpy(), stack.levels_Q.double().numpy(), axis=0).T
    np.testing.assert_allclose(stack.quantiles_NQ, expected_NQ, atol=1e-3)
    percentile_TN = stack.bank().percentile(logits_TN)
    np.testing.assert_allclose(percentile_TN.mean(0), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("kept", "background", "source"),
    [
        ({"background": -1, "train": -1}, 60, "background"),
        ({"background": -1, "train": -1}, 0, "train"),
        ({"background": 0, "train": -1}, 60, "train"),
        ({"background": -1, "train": 0}, 0, None),
        ({"background": 0, "train": 0}, 60, None),
    ],
    ids=str,
)
def test_without_background_other_tokens_serve_and_without_tokens_none(
    tmp_path: Path, stack: LensStack, kept: dict[str, int], background: int, source: str | None
):
    bare = replace(stack, quantiles_NQ=torch.empty(0, 0), levels_Q=torch.empty(0))
    sizes = Sizes(train=30, test=5, background=background)
    with toy_encyclopedia(tmp_path / "store", sizes=sizes, kept=kept) as other:
        made = with_percentiles(bare, other)
        if source is None:
            assert not made.bank().calibrated
            return
        tokens = [other.token_states(layer, other.table.where(source))[0] for layer in LAYERS]
    logits_TN = bare.bank().logits(torch.stack([torch.from_numpy(each).float() for each in tokens], dim=1))
    torch.testing.assert_close(made.quantiles_NQ[:, 0], logits_TN.min(0).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.quantiles_NQ[:, -1], logits_TN.max(0).values, rtol=1e-4, atol=1e-4)


def test_dropout_does_not_enter_what_is_kept(pool: Pool, store: Encyclopedia):
    task = fitted(pool, head=HeadConfig(hidden=8, dropout=0.5), epochs=2)
    once, twice = (task.out_of_fold(pool.states_SLW, pool.folds_S) for _ in range(2))
    assert torch.equal(once, twice)
    one, other = (calibrated_stack(task, pool, store) for _ in range(2))
    assert torch.equal(one.quantiles_NQ, other.quantiles_NQ)
    heads, x_BW = task.full_fits(), torch.randn(4, 8)
    assert torch.equal(heads[0](x_BW), heads[0](x_BW))


def test_the_bank_in_mid_training_averages_the_layers(task: LensTask, pool: Pool, store: Encyclopedia):
    x_SLD = states(store, "train")
    expected_SN = task(pool.states_SLW)[:, :, 0].mean(1)
    torch.testing.assert_close(current_bank(task, pool).logits(x_SLD), expected_SN.detach(), rtol=1e-4, atol=1e-4)


def test_evaluation_needs_test_rows(tmp_path: Path, stack: LensStack):
    store = toy_encyclopedia(tmp_path / "store", sizes=Sizes(train=30, test=0))
    with store, pytest.raises(DataError, match="no test texts"):
        evaluate_stack(stack, store, config=QUICK)


def test_slices_break_figures_down_by_a_column(stack: LensStack, store: Encyclopedia):
    evaluation = evaluate_stack(stack, store, config=replace(QUICK, slices=["parity"]))
    assert {value: figures["num_rows"] for value, figures in evaluation.slices["parity"].items()} == {
        "0": 750,
        "1": 750,
    }


def test_evaluation_has_controls_and_selectivity_beside_it_in_the_order_of_the_lenses(tmp_path: Path):
    store = toy_encyclopedia(tmp_path / "toy")
    stack = solve_stack(store, shrinkage=20.0, progress=False)
    heads = [[head.rows(torch.arange(3)) for head in stack.heads]] * 2
    found = evaluate_stack(stack, store, config=QUICK, shuffled=heads)
    assert {"auroc_length", "auroc_position", "auroc_random"} <= set(found.mean)
    for figures in found.concepts.values():
        assert figures["selectivity"] == pytest.approx(figures["auroc"] - figures["auroc_shuffled"])
    again = evaluate_stack(stack.rows(["c2", "c0"]), store, config=QUICK)
    assert again.concepts["c2"]["auroc_random"] == found.concepts["c2"]["auroc_random"]


def test_without_training_texts_there_are_no_controls(tmp_path: Path):
    store = toy_encyclopedia(tmp_path / "toy", sizes=Sizes(train=0, test=40, background=0), kept={"test": 0})
    assert control_scores(store, store.table.where("test"), layers=LAYERS) == {}
