"""The recipe: what is calibrated and combined out of fold stays honest, and texts are read as they were in training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_encyclopedia import Sizes, toy_encyclopedia

from ftw.errors import ConfigError, DataError, EncyclopediaError, PackError
from ftw.hat.pooling import POOLS, pool_tokens, pooling_from_tensors
from ftw.map.derived import pooled
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.text_level import text_level_logits
from ftw.map.training.lens_rows import LensRows, lens_rows
from ftw.map.training.recipe import Solved, shuffled_recipe, solve_recipe
from ftw.map.training.stacked import stack_with_text

KEPT = {"train": -1, "test": -1, "background": -1}
QUICK = {"penalties": [1e-2, 1e-1], "folds": 3, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Encyclopedia:
    return toy_encyclopedia(tmp_path_factory.mktemp("recipe") / "store", sizes=Sizes(train=160, test=100), kept=KEPT)


@pytest.fixture(scope="module")
def solved(store: Encyclopedia) -> Solved:
    return solve_recipe(store, lens_rows(store.table), pools=POOLS, **QUICK)


def held_out_auroc(solved: Solved, lenses: list[LensRows]) -> np.ndarray:
    return np.array(
        [
            auroc(logits_S[:, None], rows.labels[:, None], rows.weights[:, None])[0]
            for logits_S, rows in zip(solved.held_out, lenses, strict=True)
        ]
    )


def test_lenses_find_the_signal_and_put_their_weight_on_the_pool_that_has_it(store: Encyclopedia, solved: Solved):
    assert held_out_auroc(solved, lens_rows(store.table)).min() > 0.85
    for choice in solved.choices.values():
        # The toy's tokens are noise: only the mean was given a signal.
        assert max(choice.pools, key=choice.pools.__getitem__) == "mean"
        assert choice.evidence["combined"] > max(choice.evidence[pool] for pool in POOLS[1:])
        assert sum(choice.pools.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("combine", ["stack", "choose", "average"])
def test_held_out_logits_of_labels_without_a_signal_rank_nothing(store: Encyclopedia, combine: str):
    rng = np.random.default_rng(0)
    lenses = [replace(rows, labels=rng.permutation(rows.labels)) for rows in lens_rows(store.table) for _ in range(5)]
    lenses = [replace(rows, name=f"{n}") for n, rows in enumerate(lenses)]
    found = solve_recipe(store, lenses, pools=POOLS, combine=combine, **QUICK)
    # Choosing among six candidates looks at the same rows; weights that are learnt out of fold do not.
    assert abs(held_out_auroc(found, lenses).mean() - 0.5) < (0.08 if combine == "choose" else 0.04)


def test_texts_are_read_as_a_sum_over_layers_and_pools(store: Encyclopedia, solved: Solved):
    stack, rows = solved.stack, store.table.where("test")[:7]
    assert stack.pooling is not None
    wanted = np.ones((len(rows), len(stack.names)), dtype=bool)
    logits_SN = text_level_logits(stack, store, rows, wanted_SN=wanted)
    for place, row in enumerate(rows):
        tokens_LTD = torch.stack([torch.from_numpy(store.token_states(n, [row])[0].astype(np.float32)) for n in (1, 3)])
        expected_N = stack.pooling.offset_N.clone()
        for layer, number in enumerate(stack.layers):
            for place_pool, pool in enumerate(POOLS):
                if pool == "max":
                    value_N = stack.heads[layer](tokens_LTD[layer]).amax(0)
                else:
                    head = stack.heads[layer] if pool == "mean" else stack.pooling.heads[pool][layer]
                    value_N = head(torch.from_numpy(pooled(store, number, pool, [row]).astype(np.float32)))[0]
                expected_N = expected_N + stack.pooling.scale_NLP[:, layer, place_pool] * value_N
        torch.testing.assert_close(torch.from_numpy(logits_SN[place]), expected_N.detach(), rtol=1e-4, atol=1e-4)


def test_pools_that_were_not_collected_are_made_from_the_tokens_once(store: Encyclopedia):
    tokens_TD, offsets = store.token_states(3, [5, 200])
    for pool in ("last", "tail", "spread"):
        made = pooled(store, 3, pool, [5, 200])
        for place in range(2):
            text_TD = torch.from_numpy(tokens_TD[offsets[place] : offsets[place + 1]].astype(np.float32))
            np.testing.assert_array_equal(made[place], pool_tokens(text_TD, pool).numpy().astype(np.float16))
    cached = store.folder / "derived" / "layer_3_tail.npy"
    before = pooled(store, 3, "tail")
    cached.write_bytes(cached.read_bytes()[:100])
    np.testing.assert_array_equal(pooled(store, 3, "tail"), before)


def test_pools_that_cannot_be_made_are_an_error_that_says_how(tmp_path: Path):
    with toy_encyclopedia(tmp_path / "store") as bare:
        with pytest.raises(EncyclopediaError, match=r"map\.encyclopedia\.pools"):
            pooled(bare, 1, "tail")
        with pytest.raises(DataError, match="tokens_per_text"):
            solve_recipe(bare, lens_rows(bare.table), pools=["max"], **QUICK)
        with pytest.raises(ConfigError, match="choose from"):
            solve_recipe(bare, lens_rows(bare.table), pools=["first"], **QUICK)
        with pytest.raises(ConfigError, match="combine"):
            solve_recipe(bare, lens_rows(bare.table), pools=["mean"], combine="vote", **QUICK)


def test_a_lens_of_two_rows_is_the_difference_of_its_means(store: Encyclopedia):
    rows = lens_rows(store.table)[0]
    places = np.concatenate([np.flatnonzero(rows.labels == label)[:2] for label in (0, 1)])
    found = solve_recipe(store, [rows.take(places)], pools=["mean"], **QUICK)
    assert found.choices["c0"].difference_of_means
    x_SLD = torch.stack([torch.from_numpy(pooled(store, n, "mean", rows.rows[places])).float() for n in (1, 3)], dim=1)
    logits_S = found.stack.bank().logits(x_SLD)[:, 0]
    assert logits_S[2:].mean() == pytest.approx(1, abs=1e-2)
    assert logits_S[:2].mean() == pytest.approx(-1, abs=1e-2)


def test_one_class_is_named(store: Encyclopedia):
    rows = lens_rows(store.table)[1]
    with pytest.raises(DataError, match="c1"):
        solve_recipe(store, [rows.take(np.flatnonzero(rows.labels > 0))], pools=["mean"], **QUICK)


def test_shuffled_lenses_rank_nothing(store: Encyclopedia, solved: Solved):
    lenses, table = lens_rows(store.table), store.table
    controls = shuffled_recipe(store, lenses, solved.choices, num=8, seed=0, progress=False)
    rows = table.where("test")
    labels_SN, weights_SN = table.matrices(rows)
    x_SD = torch.from_numpy(pooled(store, 1, "mean", rows).astype(np.float32))
    areas = [auroc(heads[0](x_SD).detach().numpy(), labels_SN, weights_SN).mean() for heads in controls]
    assert abs(np.mean(areas) - 0.5) < 0.1


def test_folds_have_both_classes_and_never_part_a_group():
    labels = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=np.float32)
    groups = np.array(list("aabbccddee"), dtype=object)
    rows = LensRows("x", np.arange(10), labels, np.ones(10, dtype=np.float32), groups)
    assert rows.fewest_groups == 2
    folds = rows.folds(2, seed=3)
    for group in "abcde":
        assert len(set(folds[groups == group])) == 1
    for fold in (0, 1):
        assert set(labels[folds == fold]) == {0, 1}


def test_siblings_alone_decide_where_there_are_some():
    rows = LensRows(
        "x",
        np.arange(4),
        np.array([1, 0, 0, 1], dtype=np.float32),
        np.array([1, 3, 1, 1], dtype=np.float32),
        np.array(list("abcd"), dtype=object),
    )
    assert rows.has_siblings
    assert rows.sibling_weights().tolist() == [1, 3, 0, 1]
    assert rows.balanced(rows.weights)[rows.labels == 1].sum() == rows.balanced(rows.weights)[rows.labels == 0].sum()


def test_states_and_words_together_lean_on_the_one_that_knows():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(np.float32)
    rows = LensRows("x", np.arange(300), labels, np.ones(300, dtype=np.float32), np.arange(300).astype(str))
    knows, noise = 2 * labels - 1 + rng.normal(size=300), rng.normal(size=300)
    (of_states, of_words, _), (_, alone, _), missing = (
        each.tolist()
        for each in stack_with_text(
            [rows, rows, rows],
            [knows, -knows, knows],
            [noise, knows, np.full(300, np.nan)],
        )
    )
    assert of_states > 5 * abs(of_words)
    assert alone > 0
    assert missing == [1, 0, 0]


def test_a_system_that_is_not_above_chance_out_of_fold_is_left_out_once_there_are_rows_to_tell():
    rng = np.random.default_rng(0)

    def stacked(num: int, *signals: tuple[float, float]) -> list[list[float]]:
        labels = (np.arange(num) % 2).astype(np.float32)
        rows = LensRows("x", np.arange(num), labels, np.ones(num, dtype=np.float32), np.arange(num).astype(str))
        systems = [[signal * (2 * labels - 1) + rng.normal(size=num) for signal in pair] for pair in signals]
        return [stack_with_text([rows], [states], [words])[0].tolist() for states, words in systems]

    assert stacked(400, (0, 0), (0, 1), (1, 0)) == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    # Twenty rows cannot show that a weak system is one: it keeps the weight it was given.
    assert min(stacked(20, (0.5, 0.5))[0][:2]) > 0


def test_a_pooling_survives_its_tensors_and_refuses_damaged_ones(solved: Solved):
    pooling = solved.stack.pooling
    assert pooling is not None
    tensors, sizes = pooling.tensors(), {"num_lenses": 3, "num_layers": 2, "width": 8, "where": "pack"}
    again = pooling_from_tensors(tensors, **sizes)
    assert again.tensors().keys() == tensors.keys()
    for name, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, tensors[name])
    for name in tensors:
        with pytest.raises(PackError, match=name):
            pooling_from_tensors({**tensors, name: tensors[name][:1].float().log()}, **sizes)
