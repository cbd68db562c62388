"""A shelf reads as the whole bank would, within its budgets, whatever the disk does."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_lenses import random_stack

from ftw.errors import ConceptError, ConfigError, PackError
from ftw.hat import cold as cold_module
from ftw.hat.cold import ColdLenses
from ftw.hat.shelf import BATCH_LENSES, IDLE_TOKENS, MB, Shelf, ShelfConfig
from ftw.hat.store import LensStack, head_of, write_tensors
from ftw.map.pack import LensPack, Recipe
from ftw.map.pack_index import PackIndex, open_shelf

KINDS = [
    {"layers": (2,), "hidden": 6},
    {"layers": (0, 3), "hidden": 40},
    {"layers": (0, 3), "hidden": 6, "rank": 5},
    {"layers": (0, 3, 1), "hidden": 0},
    {"layers": (1,), "hidden": 0, "calibrated": False},
]


def save(stack: LensStack, folder: Path, *, per_level: int = 9) -> Path:
    head = head_of(stack)
    recipe = Recipe(
        substrate="s", fingerprint="f", width=32, dtype="float32", precision="float32", layers=list(stack.layers),
        family=head.family, hidden=head.hidden, basis_rank=0 if stack.basis is None else stack.basis.rank,
    )  # fmt: skip
    levels = {name: n // per_level for n, name in enumerate(stack.names)}
    return LensPack(pack_id="p", version="1.0.0", stack=stack, recipe=recipe, levels=levels).save(folder / "pack")


def budget(num: int, folder: Path, precision: str = "float32") -> float:
    """Megabytes that hold so many lenses of a pack, and not one more."""
    cold = PackIndex.open(folder).cold()
    row_bytes = cold.bank(1, precision=precision).slots.row_bytes
    cold.close()
    return (num + 0.5) * row_bytes / MB


def ask(shelf: Shelf, states_BLD: torch.Tensor, rows: list[int]) -> np.ndarray:
    shelf.begin(states_BLD)
    return shelf.logits(np.array(rows, dtype=np.int64))


def settle(shelf: Shelf) -> None:
    """Wait until what is to be read ahead has been read."""
    done = threading.Event()
    keep = shelf._keep

    def last(names: list[str], *, ahead: bool = False) -> int:
        if names == ["end"]:
            done.set()
            return 0
        return keep(names, ahead=ahead)

    shelf._keep = last
    shelf._wanted.put(["end"])
    assert done.wait(10)
    shelf._keep = keep


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_shelf_reads_what_the_bank_of_all_lenses_reads(kind: dict, tmp_path: Path):
    stack = random_stack(num=30, **kind)
    folder, bank = save(stack, tmp_path), stack.bank()
    config = ShelfConfig(hot_mb=budget(7, folder), warm_mb=budget(3, folder), tepid_mb=budget(8, folder))
    rng = np.random.default_rng(0)
    with open_shelf(folder, config, always=["concept4"]) as shelf:
        assert shelf.names == stack.names
        assert (shelf.layers, shelf.width, shelf.calibrated) == (bank.layers, 32, bank.calibrated)
        for _ in range(12):
            states_BLD = torch.randn(2, len(stack.layers), 32)
            expected_BN = bank(states_BLD)
            shelf.begin(states_BLD)
            for num in (5, 3, 20):  # the last is more than the bank has room for
                rows = rng.choice(30, num, replace=False)
                got_BM = shelf.logits(rows)
                np.testing.assert_allclose(got_BM, expected_BN[:, rows], rtol=1e-5, atol=1e-5)
                percentile_M = bank.percentile(expected_BN)[0, rows]
                np.testing.assert_allclose(shelf.percentile(got_BM[0], rows), percentile_M, atol=1e-4)
                shelf.prefetch(rng.choice(30, 6))
                shelf.drop(rng.choice(rows, 2))
            assert "concept4" in shelf.bank.names
            assert len(shelf.bank) <= 7
        counts = shelf.statistics()
        assert counts["misses"] == counts["warm_hits"] + counts["tepid_hits"] + counts["cold_loads"]
        assert counts["bytes_moved"] == counts["misses"] * counts["lens_bytes"]
        assert counts["missing"] == 0
    shelf.close()  # twice does no harm


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
def test_a_shelf_of_another_precision_reads_what_such_a_bank_reads(precision: str, tmp_path: Path):
    stack = random_stack(num=12, hidden=16)
    bank, states_BLD = stack.bank().hot(12, precision=precision), torch.randn(1, 2, 32)
    with open_shelf(save(stack, tmp_path), ShelfConfig(precision=precision, tepid_mb=1)) as shelf:
        shelf.preload(MB)
        rows = [5, 0, 11, 3]
        np.testing.assert_allclose(ask(shelf, states_BLD, rows), bank(states_BLD)[:, rows], rtol=1e-3, atol=1e-3)
        assert shelf.counts.tepid_hits == 4


def test_lenses_leave_when_they_are_not_asked_for_and_the_oldest_first(tmp_path: Path):
    folder = save(random_stack(num=12, hidden=6), tmp_path)
    with open_shelf(folder, ShelfConfig(hot_mb=budget(4, folder), warm_mb=budget(2, folder))) as shelf:
        states_BLD = torch.randn(1, 2, 32)
        for row in (0, 1, 2, 3):
            ask(shelf, states_BLD, [row])
        ask(shelf, states_BLD, [0])  # reactivated: concept1 is the oldest now
        ask(shelf, states_BLD, [7])
        assert [shelf.tier(f"concept{n}") for n in (0, 1, 2, 3, 7, 8)] == ["hot", "warm", "hot", "hot", "hot", "cold"]
        shelf.drop(np.array([0, 3]))
        assert shelf.tier("concept3") == "hot"  # it may come back with the next token
        ask(shelf, states_BLD, [3])
        for _ in range(IDLE_TOKENS + 1):
            shelf.begin(states_BLD)
        assert sorted(shelf.bank.names) == ["concept2", "concept3", "concept7"]
        ask(shelf, states_BLD, [0])
        counts = shelf.counts
        assert (counts.warm_hits, counts.cold_loads, counts.evictions) == (1, 5, 2)
        assert (counts.hits, counts.misses) == (2, 6)
        with pytest.raises(ConceptError, match="nearest: concept"):
            shelf.tier("concept")


def test_what_was_read_ahead_comes_from_memory(tmp_path: Path):
    folder = save(random_stack(num=40, hidden=6), tmp_path)
    with open_shelf(folder, ShelfConfig(hot_mb=budget(25, folder), tepid_mb=budget(20, folder))) as shelf:
        shelf.prefetch(np.arange(BATCH_LENSES + 3))
        settle(shelf)
        assert shelf.counts.prefetched == BATCH_LENSES + 3
        ask(shelf, torch.randn(1, 2, 32), [0, BATCH_LENSES + 2, 30])
        assert (shelf.counts.tepid_hits, shelf.counts.cold_loads) == (2, 1)
        settle(shelf)
        assert "concept30" in shelf._tepid  # and what was not, will be nearer the next time
        shelf.prefetch(np.arange(20, 30))
        settle(shelf)
        assert len(shelf._tepid) == 20


def test_preloading_brings_as_many_as_fit(tmp_path: Path):
    folder = save(random_stack(num=20, hidden=6), tmp_path)
    with open_shelf(folder) as shelf:
        assert shelf.preload(int(budget(12, folder) * MB), ["concept19", *shelf.names[:15]]) == 12
        assert shelf.tier("concept19") == "tepid"
        assert shelf.preload(2**62) == 20
        ask(shelf, torch.randn(1, 2, 32), list(range(20)))
        assert (shelf.counts.tepid_hits, shelf.counts.cold_loads) == (20, 0)
        with pytest.raises(ConfigError, match="smallest workable"):
            shelf.preload(10)


@pytest.mark.parametrize("tier", ["hot_mb", "warm_mb", "tepid_mb"])
def test_a_budget_that_cannot_work_is_refused_with_the_smallest_that_can(tier: str, tmp_path: Path):
    folder = save(random_stack(num=12, hidden=6), tmp_path)
    always = ["concept1", "concept2"] if tier == "hot_mb" else []
    for value in (1e-4, -1.0):
        with pytest.raises(ConfigError, match=rf"{tier}={value:g} holds 0 lenses .* {tier}=0\.0\d+") as caught:
            open_shelf(folder, ShelfConfig(**{tier: value}), always=always)
    smallest = float(str(caught.value).split(f"{tier}=")[-1].split()[0])
    with open_shelf(folder, ShelfConfig(**{tier: smallest}), always=always) as shelf:
        assert sorted(shelf.bank.names) == always
    with pytest.raises(ConceptError, match="nearest: concept2"):
        open_shelf(folder, always=["concept12"])


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_a_file_that_ends_too_early_costs_its_lenses_and_not_the_reading(
    kind: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cold_module, "SMALL_BYTES", 100)
    stack = random_stack(num=30, **kind)
    folder, states_BLD = save(stack, tmp_path, per_level=30), torch.randn(1, len(stack.layers), 32)
    with open_shelf(folder) as shelf:
        path = folder / "layer0" / "lenses.safetensors"
        field = shelf.cold._files[0].fields["weight" if kind["hidden"] == 0 else "w1"]
        os.truncate(path, field.offset + 10 * field.row_bytes + 1)
        logits_N = ask(shelf, states_BLD, list(range(30)))[0]
        lost = np.isnan(logits_N)
        assert lost[10:].all()
        assert set(shelf.missing) == {f"concept{n}" for n in np.flatnonzero(lost)}
        assert shelf.counts.failed == lost.sum()
        np.testing.assert_allclose(logits_N[~lost], stack.bank()(states_BLD)[0, ~lost], rtol=1e-4, atol=1e-4)
        assert shelf.tier("concept29") == "missing"
        assert np.isnan(ask(shelf, states_BLD, [29])).all()
        assert shelf.counts.failed == lost.sum()  # not tried again at every token


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=str)
@settings(max_examples=10, deadline=None)
@given(bad=st.sets(st.integers(0, 19), max_size=6))
def test_exactly_the_lenses_whose_bytes_cannot_be_read_are_missing(kind: dict, bad: set[int], tmp_path_factory):
    stack = random_stack(num=20, **kind)
    folder = save(stack, tmp_path_factory.mktemp("disk"), per_level=20)
    states_BLD = torch.randn(1, len(stack.layers), 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_module, "SMALL_BYTES", 100)
        with open_shelf(folder, ShelfConfig(hot_mb=budget(8, folder), tepid_mb=budget(9, folder))) as shelf:
            field = shelf.cold._files[0].fields["w1" if kind["hidden"] else "weight"]
            read = os.preadv

            def failing(descriptor: int, targets: list, offset: int) -> int:
                first = (offset - field.offset) // field.row_bytes
                num = sum(len(target) for target in targets) // field.row_bytes
                if offset >= field.offset and bad & set(range(first, first + num)):
                    raise OSError(5, "Input/output error")
                return read(descriptor, targets, offset)

            patch.setattr(os, "preadv", failing)
            shelf.prefetch(np.arange(20))
            logits_N = ask(shelf, states_BLD, list(range(20)))[0]
            np.testing.assert_array_equal(np.isnan(logits_N), [n in bad for n in range(20)])
            assert set(shelf.missing) == {f"concept{n}" for n in bad}
            settle(shelf)
            shelf.prefetch(np.arange(20))
            settle(shelf)  # the thread lives


def test_numbers_that_are_no_weights_are_refused_when_a_pack_is_opened_and_found_when_it_is_not(tmp_path: Path):
    stack = random_stack(num=6, hidden=40)
    with torch.no_grad():
        stack.heads[0].w1[2, 1, 1] = torch.nan
    with pytest.raises(PackError, match="not finite"):
        open_shelf(save(stack, tmp_path))
    path = tmp_path / "x.safetensors"
    write_tensors(path, stack.lens_tensors())
    cold = ColdLenses(
        names_of={path: stack.names},
        layers=stack.layers,
        width=32,
        head=head_of(stack),
        calibration=stack.calibration_tensors(),
    )
    with Shelf(cold, ShelfConfig(precision="int8")) as shelf:
        assert np.isnan(ask(shelf, torch.randn(1, 2, 32), [0, 2, 4])).tolist() == [[False, True, False]]
        assert "not finite" in shelf.missing["concept2"]


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ftw.map import verified

    folder = save(random_stack(num=12, hidden=6), tmp_path)
    hashed = []
    original = verified.sha256
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 0)
    monkeypatch.setattr(verified, "sha256", lambda path: hashed.append(path.name) or original(path))
    first = PackIndex.open(folder)
    assert len(hashed) == 7  # pack_info, version_manifest, calibration, two levels of lenses and results
    hashed.clear()
    assert PackIndex.open(folder) == first
    assert hashed == []
    path = folder / "layer1" / "lenses.safetensors"
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(PackError, match=r"layer1/lenses.safetensors.*sha256 differs"):
        PackIndex.open(folder)
    assert hashed == ["lenses.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "short", "extra", "cache"])
def test_a_damaged_pack_is_refused_and_a_damaged_cache_made_anew(damage: str, tmp_path: Path, own_home: Path):
    folder = save(random_stack(num=12, hidden=6), tmp_path)
    PackIndex.open(folder)
    path = folder / "layer1" / "lenses.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "extra":
        (folder / "layer1" / "more.safetensors").write_bytes(b"")
    else:
        [cache] = (own_home / "verified").iterdir()
        cache.write_text('{"schema": 1, "files": [1]}')
        assert PackIndex.open(folder).rows_of[1] == ["concept9", "concept10", "concept11"]
        return
    with pytest.raises(PackError, match="layer1"):
        PackIndex.open(folder)


def test_files_that_disagree_are_refused(tmp_path: Path):
    stack = random_stack(num=6, hidden=6)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    form = {"layers": stack.layers, "width": 32, "head": head_of(stack)}

    def cold(names_of: dict, **changes: object) -> ColdLenses:
        return ColdLenses(names_of=names_of, **{**form, "calibration": stack.calibration_tensors(), **changes})

    write_tensors(one, stack.rows(stack.names[:4]).lens_tensors())
    write_tensors(other, random_stack(num=2, hidden=8).lens_tensors())
    with pytest.raises(PackError, match="differ in tensors"):
        cold({one: stack.names[:4], other: stack.names[4:]})
    write_tensors(other, stack.rows(stack.names[4:]).lens_tensors())
    cold({one: stack.names[:4], other: stack.names[4:]}).close()
    for wrong in (
        lambda: cold({one: stack.names[:3], other: stack.names[3:]}),
        lambda: cold({one: stack.names[:4], other: ["x", "concept0"]}),
        lambda: cold({one: stack.names[:4], other: stack.names[4:]}, width=31),
        lambda: cold({one: stack.names[:4], other: stack.names[4:]}, layers=(1,)),
        lambda: cold({one: stack.names[:4]}),
        lambda: cold({tmp_path / "none.safetensors": ["x"]}),
    ):
        with pytest.raises(PackError):
            wrong()
    whole = one.read_bytes()
    for content in (b"", whole[:40], whole[:-1], b"\xff" * 100):
        one.write_bytes(content)
        with pytest.raises(PackError, match=r"one\.safetensors"):
            cold({one: stack.names[:4], other: stack.names[4:]})
