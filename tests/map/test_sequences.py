"""Prompts and marks of sequence data, sampled collections, and the dense layout of the original design."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_compose import NOUNS, pack_of
from toy_dictionary import write_wordnet

from ftw.errors import ConfigError, DataError
from ftw.map.collect import CollectConfig, collect
from ftw.map.dense import export_dense, read_dense
from ftw.map.samples import SPLITS, SampleTable
from ftw.map.sequences import KINDS, NEGATED, SequencesConfig, compose_sequences, mark_kinds
from ftw.map.shard import shard_problem
from ftw.substrate.model import Substrate

KEYS = ["dog", "cat", "food"]
SMALL = SequencesConfig(
    positives=8, samples_per_prompt=2, siblings=4, distant=4, negated=2, max_new_tokens=5, background=4
)
CAPTURE = CollectConfig(
    layers=[1, 3],
    pools=[],
    tokens_per_text=dict.fromkeys(SPLITS, -1),
    max_new_tokens=5,
    precision="float32",
    shard_texts=16,
)


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    wordnet = write_wordnet(tmp_path / "wn", NOUNS)
    return compose_sequences(pack_of(wordnet, KEYS), wordnet, SMALL, seed=0)


def test_samples_of_a_prompt_stand_on_one_side_and_share_a_group(table: SampleTable):
    sides: dict[str, set[str]] = {}
    for text, group, split in zip(table.texts, table.groups, table.splits, strict=True):
        assert text == group
        sides.setdefault(group, set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert {split for splits in sides.values() for split in splits} == set(SPLITS)
    assert len(table) == SMALL.samples_per_prompt * len(sides)


def test_each_concept_has_the_answers_that_were_asked_for(table: SampleTable):
    for concept, name in enumerate(KEYS):
        mine = table.cols == concept
        positive = table.rows[mine & (table.labels == 1)]
        assert len(positive) >= SMALL.positives
        assert all(table.sources[row] == "sampled" for row in positive)
        negative = [row for row in table.rows[mine & (table.labels == 0)] if table.sources[row] != NEGATED]
        assert len(negative) == SMALL.siblings + SMALL.distant, name
        assert not {table.texts[row] for row in positive} & {table.texts[row] for row in negative}


def test_a_denied_concept_is_a_negative_of_its_own_kind_for_that_concept_alone(table: SampleTable):
    rows = np.arange(len(table))
    kinds_SN = mark_kinds(table, rows, [[1], [0], []])
    negated = [row for row in rows if table.sources[row] == NEGATED]
    assert len(negated) == SMALL.negated * len(KEYS)
    for row in negated:
        marked = table.rows == row
        assert marked.sum() == 1
        assert table.labels[marked] == 0
        assert kinds_SN[row, table.cols[marked][0]] == KINDS.index("negated")
        assert "NOT" in table.texts[row]
    labels_SN, weights_SN = table.matrices(rows)
    for concept, sibling in ((0, 1), (1, 0)):
        near = (kinds_SN[:, concept] == KINDS.index("sibling")).nonzero()[0]
        assert len(near)
        assert (labels_SN[near, sibling] == 1).all()
    assert ((kinds_SN >= 0) == ((weights_SN > 0) & (labels_SN == 0))).all()


def test_siblings_weigh_their_share_of_the_negatives_however_few_they_are(tmp_path: Path):
    wordnet = write_wordnet(tmp_path / "wn", NOUNS)
    pack = pack_of(wordnet, ["animal", "dog", "cat", "food"])
    table = compose_sequences(pack, wordnet, replace(SMALL, siblings=2, distant=10, sibling_share=0.4), seed=0)
    rows, place = np.arange(len(table)), {name: index for index, name in enumerate(table.concepts)}
    siblings = [[place[other] for other in pack.siblings(name) if pack.parents(name)] for name in table.concepts]
    kinds_SN, (_, weights_SN) = mark_kinds(table, rows, siblings), table.matrices(rows)
    for concept in (place["dog"], place["cat"]):
        near, far = (weights_SN[kinds_SN[:, concept] == KINDS.index(kind), concept] for kind in ("sibling", "distant"))
        assert len(near)
        assert len(far)
        assert near.sum() / (near.sum() + far.sum()) == pytest.approx(0.4, abs=1e-6)
        assert near.sum() + far.sum() == pytest.approx(len(near) + len(far))
    food = place["food"]
    assert (weights_SN[kinds_SN[:, food] == KINDS.index("distant"), food] == 1).all()


def test_the_same_seed_gives_the_same_table_and_another_one_another(tmp_path: Path):
    wordnet = write_wordnet(tmp_path / "wn", NOUNS)
    first, again, other = (compose_sequences(pack_of(wordnet, KEYS), wordnet, SMALL, seed=seed) for seed in (0, 0, 1))
    assert first.content_hash() == again.content_hash() != other.content_hash()


def test_options_that_cannot_be_and_concepts_without_negatives_are_refused(tmp_path: Path):
    wordnet = write_wordnet(tmp_path / "wn", NOUNS)
    with pytest.raises(ConfigError, match="no negatives"):
        compose_sequences(pack_of(wordnet, KEYS), wordnet, replace(SMALL, siblings=0, distant=0), seed=0)
    with pytest.raises(ConfigError, match=r"sibling_share=1\.0"):
        compose_sequences(pack_of(wordnet, KEYS), wordnet, replace(SMALL, sibling_share=1.0), seed=0)
    with pytest.raises(DataError, match="'dog' has no negatives"):
        compose_sequences(pack_of(wordnet, ["dog"]), wordnet, SMALL, seed=0)


def test_a_collection_keeps_every_token_of_every_answer_and_little_else(
    table: SampleTable, tmp_path: Path, tiny_substrate: Substrate
):
    with collect(tiny_substrate, table, CAPTURE, progress=False, folder=tmp_path / "store") as store:
        assert store.verify() == []
        ids = store.answers(np.arange(len(table)))
        states_TD, offsets = store.token_states(3, np.arange(len(table)))
        assert np.diff(offsets).tolist() == [len(tokens) for tokens in ids] == store.num_tokens.tolist()
        assert max(map(len, ids)) == SMALL.max_new_tokens
        assert np.abs(states_TD.astype(np.float32).mean(axis=1)).max() < 1e-2  # layer-normed
        same = [row for row in range(1, len(table)) if table.texts[row] == table.texts[row - 1]]
        assert any(ids[row] != ids[row - 1] for row in same)


def test_a_damaged_shard_is_sampled_again_the_same(table: SampleTable, tmp_path: Path, tiny_substrate: Substrate):
    with collect(tiny_substrate, table, CAPTURE, progress=False, folder=tmp_path / "store") as store:
        before, sha256 = store.answers(np.arange(len(table))), store.states_sha256
        place = store.place(1)
    with h5py.File(place.path, "r+") as file:
        file["tokens/ids"][0] = 7
    assert shard_problem(place, store.spec, thorough=True) == "has altered bytes in tokens/ids"
    with pytest.warns(UserWarning, match="altered bytes"):
        again = collect(tiny_substrate, table, CAPTURE, progress=False, folder=tmp_path / "store")
    with again:
        assert again.answers(np.arange(len(table))) == before
        assert again.states_sha256 == sha256


def test_stores_without_sampling_keep_the_key_that_they_had(tiny_substrate: Substrate):
    assert "sampling" not in CollectConfig(layers=[1]).spec(tiny_substrate).as_json()
    with pytest.raises(ConfigError, match="pools="):
        replace(CAPTURE, pools=["mean"]).spec(tiny_substrate)


def test_the_dense_layout_gives_back_what_it_was_given(table: SampleTable, tmp_path: Path, tiny_substrate: Substrate):
    with collect(tiny_substrate, table, CAPTURE, progress=False, folder=tmp_path / "store") as store:
        found = list(read_dense(export_dense(store, tmp_path / "dense.h5")))
        assert [(one.layer, one.concept) for one in found] == [(layer, name) for layer in (1, 3) for name in KEYS]
        one = found[4]
        rows = table.rows[(table.cols == 1) & (table.labels == 1)]
        states_TD, offsets = store.token_states(3, rows)
        assert one.lengths_P[one.labels_P == 1].tolist() == np.diff(offsets).tolist()
        for place, length in enumerate(np.diff(offsets)):
            assert (one.states_PTD[place, :length] == states_TD[offsets[place] : offsets[place + 1]]).all()
            assert not one.states_PTD[place, length:].any()


def test_the_last_layer_of_the_seed_is_read_and_hostile_files_are_not(tmp_path: Path):
    with h5py.File(tmp_path / "seed.h5", "w") as file:
        group = file.create_group("layer_-1/concept_0")
        for word in ("positive", "negative"):
            group[f"{word}_sequences"] = np.ones((2, 3, 4), np.float16)
            group[f"{word}_lengths"] = np.array([3, 1])
    (one,) = read_dense(tmp_path / "seed.h5")
    assert (one.layer, one.concept, one.states_PTD.shape) == (-1, "concept_0", (4, 3, 4))
    assert one.labels_P.tolist() == [1, 1, 0, 0]
    with h5py.File(tmp_path / "seed.h5", "r+") as file:
        file["layer_-1/concept_0/negative_lengths"][0] = 9
    with pytest.raises(DataError, match="beyond 3 tokens"):
        list(read_dense(tmp_path / "seed.h5"))
    (tmp_path / "no.h5").write_bytes(b"no")
    with pytest.raises(DataError, match="no readable file"):
        list(read_dense(tmp_path / "no.h5"))
