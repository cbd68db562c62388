"""The pool is the table's marks beside standardised states; batches depend on seed and epoch alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm
from toy_encyclopedia import LAYERS, WIDTH, Sizes, toy_encyclopedia
from toy_pool import CONFIG, toy_pool

from ftw.errors import DataError
from ftw.hat.bank import NORM_EPS
from ftw.hat.lens import HeadConfig
from ftw.map.collect import LAYER_NORM_EPS
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.training.data import EncyclopediaDataModule, Pool, build_pool, group_folds


def plain_states(store: Encyclopedia) -> torch.Tensor:
    rows = store.table.where("train")
    return torch.stack([torch.from_numpy(store.pooled(layer, "mean", rows)).float() for layer in LAYERS], dim=1)


def test_pool_holds_standardised_states_and_the_marks_of_training_rows(tmp_path: Path):
    with toy_encyclopedia(tmp_path / "store") as store:
        pool, plain = build_pool(store, CONFIG, seed=0), plain_states(store)
    torch.testing.assert_close(pool.states_SLW.mean(0), torch.zeros(2, WIDTH), atol=1e-5, rtol=0)
    torch.testing.assert_close(pool.states_SLW.std(0), torch.ones(2, WIDTH))
    torch.testing.assert_close(pool.states_SLW * pool.scale_LW + pool.center_LW, plain)
    labels_TN, weights_TN = store.table.matrices(store.table.where("train"))
    assert np.array_equal(pool.labels_SN, labels_TN)
    assert np.array_equal(pool.weights_SN, weights_TN)
    assert (pool.names, pool.layers) == (["c0", "c1", "c2"], LAYERS)


@pytest.mark.parametrize("rank", [0, 3])
def test_folded_heads_read_plain_states_as_trained_heads_read_the_pool(tmp_path: Path, rank: int):
    with toy_encyclopedia(tmp_path / "store") as store:
        pool, plain = build_pool(store, replace(CONFIG, basis_rank=rank), seed=0), plain_states(store)
    heads = [HeadConfig(hidden=4).build(2, rank or WIDTH) for _ in LAYERS]
    x_SLW = plain if pool.basis is None else pool.basis(plain)
    for layer, folded in enumerate(pool.fold(heads)):
        torch.testing.assert_close(
            folded(x_SLW[:, layer]), heads[layer](pool.states_SLW[:, layer]), rtol=1e-4, atol=1e-4
        )


def test_states_that_are_not_finite_are_refused_by_the_name_of_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with toy_encyclopedia(tmp_path / "store") as store:
        states = store.pooled(1, "mean", store.table.where("train"))
        states[7, 2] = np.nan  # a store refuses to hold these; one that was written by something else may
        monkeypatch.setattr(store, "pooled", lambda *_: states)
        with pytest.raises(DataError, match=r"'text 7 of train' are not finite"):
            build_pool(store, CONFIG, seed=0)


@pytest.mark.parametrize("label", [0, 1])
def test_a_concept_of_one_class_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int):
    with toy_encyclopedia(tmp_path / "store") as store:
        store.table.labels[store.table.cols == 1] = label
        words = rf"1 of 3 concepts.*'c1' \({240 * label} positive, {240 - 240 * label} negative\)"
        with pytest.raises(DataError, match=words):
            build_pool(store, CONFIG, seed=0)


def test_marks_of_weight_zero_do_not_count_as_a_class(tmp_path: Path):
    with toy_encyclopedia(tmp_path / "store") as store:
        store.table.weights[(store.table.cols == 1) & (store.table.labels == 1)] = 0
        with pytest.raises(DataError, match=r"'c1' \(0 positive"):
            build_pool(store, CONFIG, seed=0)


def test_a_table_without_training_texts_is_refused(tmp_path: Path):
    store = toy_encyclopedia(tmp_path / "store", sizes=Sizes(train=0))
    with store, pytest.raises(DataError, match="no training texts"):
        build_pool(store, CONFIG, seed=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 99))
def test_groups_never_part_and_folds_are_even(groups: list[str], num_folds: int, seed: int):
    folds = group_folds(groups, num_folds, seed)
    of_group: dict[str, set[int]] = {}
    for group, fold in zip(groups, folds.tolist(), strict=True):
        of_group.setdefault(group, set()).add(fold)
    assert all(len(each) == 1 for each in of_group.values())
    sizes = np.bincount([each.pop() for each in of_group.values()], minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    order = np.random.default_rng(0).permutation(len(groups))
    assert np.array_equal(group_folds([groups[i] for i in order], num_folds, seed), folds[order])


def batches(pool: Pool, *, seed: int, epoch: int, train: bool = True) -> list[dict[str, torch.Tensor]]:
    module = EncyclopediaDataModule(pool, CONFIG, seed=seed)
    loader = module.train_dataloader() if train else module.val_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_every_row_comes_once_an_epoch_with_its_own_marks():
    pool = toy_pool()
    for train in (True, False):
        parts = batches(pool, seed=0, epoch=2, train=train)
        assert [len(part["states"]) for part in parts] == [32, 32, 26]
        states = torch.cat([part["states"] for part in parts])
        place = torch.cdist(states.flatten(1), pool.states_SLW.flatten(1)).argmin(1)
        assert place.sort().values.tolist() == list(range(90))
        for name, whole in (("labels", pool.labels_SN), ("weights", pool.weights_SN), ("folds", pool.folds_S)):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[place])
        assert train != (place.tolist() == list(range(90)))


def test_order_depends_on_seed_and_epoch_alone():
    pool = toy_pool()

    def order(seed: int, epoch: int) -> list[float]:
        return [float(value) for part in batches(pool, seed=seed, epoch=epoch) for value in part["states"][:, 0, 0]]

    assert order(1, 4) == order(1, 4)
    assert len({tuple(order(*each)) for each in ((1, 4), (1, 5), (2, 4))}) == 3


def test_the_collected_normalisation_is_that_of_the_bank():
    assert NORM_EPS == LAYER_NORM_EPS
    assert layer_norm(torch.ones(3), (3,), eps=NORM_EPS).abs().max() == 0
