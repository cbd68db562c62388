"""The store alone: what is written is read, what is damaged is noticed, nothing needs a model."""

import errno
import os
import pickle  # noqa: TID251 - the claim is that a reader survives what DataLoader workers do to it
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ftw.errors import ConfigError, DataError, DiskFullError, EncyclopediaError
from ftw.map.encyclopedia import CaptureSpec, Encyclopedia, ShardStates, merge_moments
from ftw.map.samples import SampleTable, SampleTableBuilder

WIDTH = 6
LAYERS = (1, 9)


def build_table(num_texts: int = 11, seed: int = 0) -> SampleTable:
    """Texts over all splits, with awkward characters, extra columns and a few marks each."""
    rng = np.random.default_rng(seed)
    builder = SampleTableBuilder(["cat", "naïve 猫", "never"])
    for number in range(num_texts):
        split = ("train", "train", "test", "background")[number % 4]
        row = builder.text(
            f"text {number} \0 é 猫 \ud800\n" * (number + 1),
            group=f"g{number // 2}",
            split=split,
            source="definition",
            columns={"stage": str(number % 3), "odd/name": f"v{number}"},
        )
        if split != "background":
            builder.mark(row, "cat", int(rng.integers(2)), weight=float(rng.uniform(0.1, 3)))
            builder.mark(row, "naïve 猫", 1)
    return builder.build()


def build_spec(**changes: object) -> CaptureSpec:
    values = {
        "substrate_name": "toy",
        "fingerprint": "f" * 64,
        "layers": LAYERS,
        "width": WIDTH,
        "tokens_per_text": {"train": 0, "test": 2, "background": -1},
        "max_tokens": 16,
        "shard_texts": 4,
    }
    return CaptureSpec(**{**values, **changes})


def random_states(encyclopedia: Encyclopedia, number: int) -> ShardStates:
    """Random states of the right shapes for a shard, the same for the same shard."""
    spec, place = encyclopedia.spec, encyclopedia.place(number)
    rng = np.random.default_rng(100 + number)
    num_tokens = rng.integers(1, 15, len(place))
    splits = encyclopedia.table.splits[place.start : place.stop]
    kept = [spec.kept_tokens(split, int(count)) for split, count in zip(splits, num_tokens, strict=True)]

    def draw(rows: int) -> np.ndarray:
        return rng.normal(size=(rows, spec.width)).astype(np.float16)

    return ShardStates(
        num_tokens=num_tokens,
        num_cut=1,
        pooled={pool: {layer: draw(len(place)) for layer in spec.layers} for pool in spec.pools},
        tokens={layer: draw(sum(kept)) for layer in spec.layers},
        offsets=np.concatenate([[0], np.cumsum(kept)]),
        positions=np.concatenate([np.arange(count) for count in kept]),
    )


def fill(folder: Path, table: SampleTable | None = None, **changes: object) -> Encyclopedia:
    """A finished store of random states."""
    encyclopedia = Encyclopedia.create(folder, table or build_table(), build_spec(**changes))
    for number in encyclopedia.missing():
        encyclopedia.write_shard(number, random_states(encyclopedia, number))
    encyclopedia.finalise()
    return encyclopedia


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.h5")) if path.is_file()}


def test_the_table_and_the_spec_come_back_whole(tmp_path: Path) -> None:
    table = build_table()
    Encyclopedia.create(tmp_path / "e", table, build_spec())
    read = Encyclopedia.open(tmp_path / "e")
    assert read.table.content_hash() == table.content_hash()
    assert (read.table.texts, read.table.columns) == (table.texts, table.columns)
    assert read.spec == build_spec()
    assert read.missing() == [0, 1, 2]


def test_pooled_states_come_back_in_the_order_asked(tmp_path: Path) -> None:
    with fill(tmp_path / "e") as encyclopedia:
        written = [random_states(encyclopedia, number) for number in range(3)]
        for layer in LAYERS:
            for pool in ("mean", "last"):
                expected = np.concatenate([states.pooled[pool][layer] for states in written])
                np.testing.assert_array_equal(encyclopedia.pooled(layer, pool), expected)
                rows = np.array([10, 0, 5, 5, 7, 2])
                np.testing.assert_array_equal(encyclopedia.pooled(layer, pool, rows), expected[rows])
        assert encyclopedia.pooled(1, "mean", []).shape == (0, WIDTH)
        np.testing.assert_array_equal(encyclopedia.num_tokens, np.concatenate([s.num_tokens for s in written]))
        assert encyclopedia.num_cut == 3


def test_token_states_come_back_ragged_in_the_order_asked(tmp_path: Path) -> None:
    with fill(tmp_path / "e", build_table(40), shard_texts=16) as encyclopedia:
        rows = encyclopedia.token_rows()
        assert set(np.asarray(encyclopedia.table.splits)[rows]) == {"test", "background"}
        for wanted in (rows, rows[::-1], rows[[0, -1]], rows[[3, 3]]):
            states, offsets = encyclopedia.token_states(9, wanted)
            for place, row in enumerate(wanted):
                shard = random_states(encyclopedia, row // 16)
                expected = shard.tokens[9][shard.offsets[row % 16] : shard.offsets[row % 16 + 1]]
                np.testing.assert_array_equal(states[offsets[place] : offsets[place + 1]], expected)
                assert len(expected) >= 1


def test_virtual_datasets_read_with_plain_h5py_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fill(tmp_path / "here") as encyclopedia:
        pooled = encyclopedia.pooled(9, "last")
        tokens, offsets = encyclopedia.token_states(1, encyclopedia.token_rows())
    shutil.move(tmp_path / "here", tmp_path / "there")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with h5py.File(tmp_path / "there" / "index.h5") as file:
        np.testing.assert_array_equal(file["pooled/last/layer_09"][()], pooled)
        np.testing.assert_array_equal(file["tokens/layer_01"][()], tokens)
        assert file["tokens/offsets"][-1] == offsets[-1]
        assert [name.decode() for name in file["concepts"][()]] == ["cat", "naïve 猫", "never"]
    with Encyclopedia.open(tmp_path / "there") as moved:
        np.testing.assert_array_equal(moved.pooled(9, "last"), pooled)
        assert moved.verify() == []


def test_every_dataset_says_its_axes_dtype_units_and_normalisation(tmp_path: Path) -> None:
    fill(tmp_path / "e").close()
    for path in (tmp_path / "e").rglob("*.h5"):
        with h5py.File(path) as file:
            datasets: list[h5py.Dataset] = []
            file.visititems(
                lambda _, node, kept=datasets: kept.append(node) if isinstance(node, h5py.Dataset) else None
            )
            for dataset in datasets:
                assert {"shape", "dtype", "units", "normalisation"} <= set(dataset.attrs), dataset.name
                if dataset.name.startswith(("/pooled", "/tokens/layer")):
                    assert dataset.attrs["normalisation"] == "layernorm"
                    assert dataset.dtype == np.float16
                    assert not dataset.is_virtual or path.name == "index.h5"


def test_two_stores_of_the_same_states_have_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a").close()
    fill(tmp_path / "b").close()
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_moments_equal_recomputation_over_the_positive_training_texts(tmp_path: Path) -> None:
    table = build_table(60, seed=3)
    with fill(tmp_path / "e", table, shard_texts=7) as encyclopedia:
        labels, weights = table.matrices(np.arange(len(table)))
        train = np.asarray(table.splits) == "train"
        for layer in LAYERS:
            statistics = encyclopedia.statistics(layer)
            means = encyclopedia.pooled(layer, "mean").astype(np.float64)
            for concept in range(2):
                chosen = means[(labels[:, concept] == 1) & (weights[:, concept] > 0) & train]
                assert statistics.num_samples[concept] == len(chosen) > 5
                np.testing.assert_allclose(statistics.mean_ND[concept], chosen.mean(0), rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(statistics.variance_ND[concept], chosen.var(0, ddof=1), rtol=1e-5)
            assert statistics.num_samples[2] == 0
            assert np.isnan(statistics.mean_ND[2]).all()
            assert np.isnan(statistics.variance_ND[2]).all()
            assert statistics.stage.tolist() == [2, 2, -1]
            assert np.isnan(statistics.confidence).all()


finite = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 8), st.just(3)), elements=finite),
    hnp.arrays(np.float64, st.tuples(st.integers(0, 8), st.just(3)), elements=finite),
)
def test_merging_moments_equals_the_moments_of_the_union(a: np.ndarray, b: np.ndarray) -> None:
    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = x.mean(0) if len(x) else np.zeros(3)
        return np.array(len(x)), mean, ((x - mean) ** 2).sum(0)

    for merged, expected in zip(merge_moments(*moments(a), *moments(b)), moments(np.concatenate([a, b])), strict=True):
        np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-6)


def test_a_reader_survives_pickling_without_its_open_files(tmp_path: Path) -> None:
    with fill(tmp_path / "e") as encyclopedia:
        expected = encyclopedia.pooled(1, "mean")
        copy = pickle.loads(pickle.dumps(encyclopedia))  # noqa: S301
        with copy:
            np.testing.assert_array_equal(copy.pooled(1, "mean"), expected)
        assert len(pickle.dumps(encyclopedia)) < 1_000


def test_leaving_the_with_block_closes_every_file(tmp_path: Path) -> None:
    opened: dict[int, h5py.File] = {}

    def fail() -> None:
        with fill(tmp_path / "e") as encyclopedia:
            encyclopedia.pooled(1, "mean")
            opened.update(encyclopedia._files)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert opened
    assert not any(opened.values())  # a closed h5py file is false


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_foreign(path: Path) -> None:
    other = fill(path.parent.parent.parent / "other", build_table(11, seed=5))
    shutil.copy(other.place(1).path, path)


def damage_renumbered(path: Path) -> None:
    shutil.copy(path.with_name("000000.h5"), path)


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"not HDF5 " * 100)


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_empty, damage_foreign, damage_renumbered, damage_garbage],
    ids=lambda f: f.__name__,
)
def test_a_damaged_or_foreign_shard_is_missing_with_a_warning_and_can_be_replaced(damage, tmp_path: Path) -> None:
    fill(tmp_path / "e").close()
    before = folder_bytes(tmp_path / "e")
    shard = tmp_path / "e" / "shards" / "000001.h5"
    damage(shard)
    with pytest.warns(UserWarning, match=r"000001\.h5 .*counts as missing"):
        encyclopedia = Encyclopedia.open(tmp_path / "e")
    assert encyclopedia.missing() == [1]
    assert len(encyclopedia.verify()) == 1
    with pytest.raises(EncyclopediaError, match=r"000001\.h5 .*ftw collect again"):
        encyclopedia.pooled(1, "mean")
    with pytest.raises(EncyclopediaError, match="lacks 1 of 3 shards"):
        encyclopedia.finalise()
    encyclopedia.write_shard(1, random_states(encyclopedia, 1))
    encyclopedia.finalise()
    encyclopedia.close()
    assert folder_bytes(tmp_path / "e") == before


def test_no_flipped_byte_of_a_shard_is_read_as_a_state(tmp_path: Path) -> None:
    with fill(tmp_path / "e") as encyclopedia:
        expected = {layer: encyclopedia.pooled(layer, "mean") for layer in LAYERS}
        path = encyclopedia.place(1).path
    whole = path.read_bytes()
    noticed = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with warnings.catch_warnings(), Encyclopedia(tmp_path / "e") as damaged:
            warnings.simplefilter("ignore")
            thorough = damaged.missing(thorough=True)
            try:
                for layer in LAYERS:
                    np.testing.assert_array_equal(damaged.pooled(layer, "mean"), expected[layer])
            except EncyclopediaError:
                assert thorough == [1]
            noticed += bool(thorough)
    assert noticed > 15


def test_flipped_bytes_of_a_state_are_noticed_on_reading_and_by_verify(tmp_path: Path) -> None:
    encyclopedia = fill(tmp_path / "e")
    path = encyclopedia.place(2).path
    state = encyclopedia.pooled(9, "last", [9]).tobytes()
    encyclopedia.close()
    whole = path.read_bytes()
    assert whole.count(state) == 1
    path.write_bytes(whole.replace(state, state[:3] + bytes([state[3] ^ 1]) + state[4:]))
    with Encyclopedia.open(tmp_path / "e") as damaged:
        with pytest.raises(EncyclopediaError, match=r"000002\.h5 is damaged"):
            damaged.pooled(9, "last")
        with pytest.warns(UserWarning, match="000002"):
            assert damaged.missing(thorough=True) == [2]
        assert "000002" in damaged.verify()[0]


@pytest.mark.parametrize("damage", ["absent", "truncated", "text flipped"])
def test_a_lost_index_is_named_and_written_anew_with_the_shards_kept(damage: str, tmp_path: Path) -> None:
    fill(tmp_path / "e").close()
    before = folder_bytes(tmp_path / "e")
    index = tmp_path / "e" / "index.h5"
    whole = index.read_bytes()
    if damage == "absent":
        index.unlink()
    else:
        index.write_bytes(whole[:-50] if damage == "truncated" else whole.replace(b"text 3", b"text 4", 1))
    with pytest.raises(EncyclopediaError, match="ftw collect"):
        Encyclopedia.open(tmp_path / "e")
    again = Encyclopedia.create(tmp_path / "e", build_table(), build_spec())
    assert again.complete
    again.finalise()
    again.close()
    assert folder_bytes(tmp_path / "e") == before


def test_a_folder_of_other_texts_or_another_model_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path / "e").close()
    with pytest.raises(EncyclopediaError, match="other texts or marks"):
        Encyclopedia.create(tmp_path / "e", build_table(12), build_spec())
    with pytest.raises(EncyclopediaError, match=r"layers \[1, 9\] instead of \[2\]"):
        Encyclopedia.create(tmp_path / "e", build_table(), build_spec(layers=(2,)))
    with Encyclopedia.open(tmp_path / "e") as encyclopedia:
        encyclopedia.check_substrate("toy", "f" * 64)
        with pytest.raises(EncyclopediaError, match=r"toy .*ffffffffffff.* not of gemma .*0000"):
            encyclopedia.check_substrate("gemma", "0" * 64)


def test_a_later_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "e").close()
    with h5py.File(tmp_path / "e" / "index.h5", "r+") as file:
        file.attrs["schema_version"] = 99
    before = (tmp_path / "e" / "index.h5").read_bytes()
    with pytest.raises(EncyclopediaError, match="schema version 99"):
        Encyclopedia.create(tmp_path / "e", build_table(), build_spec())
    assert (tmp_path / "e" / "index.h5").read_bytes() == before


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    with fill(tmp_path / "toys") as encyclopedia:
        with pytest.raises(
            EncyclopediaError, match=r"'toys' has no layer 12 \(it has 1, 9\).*ftw collect layers=\[12\]"
        ):
            encyclopedia.pooled(12, "mean")
        with pytest.raises(EncyclopediaError, match=r"no pool 'max' \(it has mean, last\)"):
            encyclopedia.pooled(1, "max")
        with pytest.raises(DataError, match=r"no text 11 \(it has 0-10\)"):
            encyclopedia.pooled(1, "mean", [3, 11])
        with pytest.raises(EncyclopediaError, match=r"text 0 \(split train\).*tokens_per_text\.train=-1"):
            encyclopedia.token_states(1, [0])


def test_statistics_before_finalise_say_so(tmp_path: Path) -> None:
    encyclopedia = Encyclopedia.create(tmp_path / "e", build_table(), build_spec())
    with pytest.raises(EncyclopediaError, match="not finalised"):
        encyclopedia.statistics(1)


def test_states_that_are_not_numbers_or_not_of_the_spec_are_refused_before_writing(tmp_path: Path) -> None:
    encyclopedia = Encyclopedia.create(tmp_path / "e", build_table(), build_spec())
    states = random_states(encyclopedia, 1)
    states.pooled["last"][9][2, 1] = np.nan
    with pytest.raises(DataError, match=r"layer 9 of text 6 is not finite"):
        encyclopedia.write_shard(1, states)
    states = random_states(encyclopedia, 1)
    states.tokens[1][-1, 0] = np.inf
    with pytest.raises(DataError, match=r"layer 1 of text 7 is not finite"):
        encyclopedia.write_shard(1, states)
    states = random_states(encyclopedia, 1)
    states.pooled["mean"][9] = states.pooled["mean"][9].astype(np.float32)
    with pytest.raises(DataError, match="mean of layer 9 is float32"):
        encyclopedia.write_shard(1, states)
    assert encyclopedia.missing() == [0, 1, 2]


def test_a_full_disk_is_named_and_costs_only_the_shard_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encyclopedia = Encyclopedia.create(tmp_path / "e", build_table(), build_spec())
    encyclopedia.write_shard(0, random_states(encyclopedia, 0))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as edge:
        edge.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="no room on the disk"):
            encyclopedia.write_shard(1, random_states(encyclopedia, 1))
    assert encyclopedia.missing() == [1, 2]
    assert sorted(path.name for path in (tmp_path / "e" / "shards").iterdir()) == ["000000.h5"]


def test_a_store_of_token_states_alone_has_no_moments(tmp_path: Path) -> None:
    with fill(tmp_path / "e", pools=(), tokens_per_text={"train": 3}) as encyclopedia:
        states, offsets = encyclopedia.token_states(1, encyclopedia.token_rows())
        assert len(states) == offsets[-1] > 0
        with pytest.raises(EncyclopediaError, match="no pooled means"):
            encyclopedia.statistics(1)


def test_a_store_of_pooled_states_alone_keeps_no_tokens(tmp_path: Path) -> None:
    with fill(tmp_path / "e", tokens_per_text={}) as encyclopedia:
        assert len(encyclopedia.token_rows()) == 0
        with h5py.File(tmp_path / "e" / "index.h5") as file:
            assert "tokens" not in file


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": (3, 3)},
        {"layers": (9, 1)},
        {"pools": ("max",)},
        {"tokens_per_text": {"dev": 1}},
        {"tokens_per_text": {"train": -2}},
        {"shard_texts": 0},
        {"pools": (), "tokens_per_text": {}},
    ],
)
def test_a_spec_that_cannot_be_is_refused(changes: dict) -> None:
    with pytest.raises(ConfigError):
        build_spec(**changes)


def test_a_table_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no texts"):
        Encyclopedia.create(tmp_path / "e", SampleTableBuilder(["a"]).build(), build_spec())


def test_a_stage_that_is_no_number_is_refused_by_row(tmp_path: Path) -> None:
    builder = SampleTableBuilder(["a"])
    builder.text("x", group="g", split="train", source="s", columns={"stage": "two"})
    with pytest.raises(DataError, match="text 0: stage 'two'"):
        Encyclopedia.create(tmp_path / "e", builder.build(), build_spec())
