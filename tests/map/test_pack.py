"""A pack comes back exactly as it was saved, or not at all with a PackError: whatever happened to its files."""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_pack import make_pack

import ftw.hat.store as store
from ftw.errors import ConceptError, DiskFullError, PackError
from ftw.hat.store import read_tensors, write_tensors
from ftw.map.manifest import NAME, write_manifest
from ftw.map.pack import LensPack, load_pack
from ftw.substrate.model import Substrate

KINDS = [
    {"hidden": hidden, "rank": rank, "calibrated": calibrated}
    for hidden in (0, 6)
    for rank in (0, 5)
    for calibrated in (True, False)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(rank=5).save(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pack"))


def assert_reads_the_same(one: LensPack, other: LensPack, names: list[str]) -> None:
    states_BLD = torch.randn(4, 2, 32)
    banks = [pack.subset(names).bank() for pack in (one, other)]
    logits = [bank(states_BLD) for bank in banks]
    assert torch.equal(*logits)
    assert torch.equal(*(bank.percentile(logits[0]).nan_to_num(-1) for bank in banks))
    for field in ("threshold_N", "threshold_1fpr_N"):
        assert torch.equal(*(getattr(pack.stack.rows(names), field) for pack in (one, other)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_a_pack_comes_back_exactly_as_it_was_saved(tmp_path: Path, kind: dict[str, Any], whole: bool):
    pack = make_pack(whole=whole, **kind)
    again = load_pack(pack.save(tmp_path / "pack"))
    assert_reads_the_same(pack, again, pack.names)
    for field in ("pack_id", "version", "recipe", "levels", "provenance"):
        assert getattr(again, field) == getattr(pack, field)
    assert {name: again.metrics[name] for name in pack.metrics} == pack.metrics
    assert again.names == sorted(pack.names, key=lambda name: pack.levels[name])
    if whole:
        assert pack.text is not None
        assert again.text is not None
        assert again.concepts is not None
        assert again.text.names == again.names
        texts = ["a cat", "concept1 and a cat", ""]
        assert torch.equal(again.text.subset(pack.names).score(texts), pack.text.score(texts))
        assert again.concepts.content_hash() == pack.concepts.content_hash()
    assert load_pack(again.save(tmp_path / "second")).names == again.names


def test_levels_and_lenses_load_on_their_own(folder: Path):
    pack = make_pack(rank=5)
    some = load_pack(folder, levels=[0, 2])
    assert some.names == ["concept1", "concept5", "concept0", "concept3"]
    assert_reads_the_same(pack, some, some.names)
    assert some.metrics.keys() == set(some.names)
    assert some.text is not None
    assert some.text.names == some.names
    with pytest.raises(PackError, match=r"levels are \[0, 1, 2\]"):
        load_pack(folder, levels=[7])
    with pytest.raises(ConceptError, match="concept1"):
        pack.subset(["concept11"])


def test_a_pack_for_another_substrate_is_refused_with_both_names(tiny_substrate: Substrate):
    make_pack(fingerprint=tiny_substrate.fingerprint).check(tiny_substrate)
    with pytest.raises(PackError, match=r"'toy' was trained on 'tiny'.*ffffffffffff.*not on 'tiny-llama'"):
        make_pack().check(tiny_substrate)


def test_every_changed_byte_of_every_file_is_a_pack_error(folder: Path):
    rng = np.random.default_rng(0)
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1, *rng.integers(len(whole), size=3).tolist()}:
            # A flipped bit of a space may leave the manifest the same JSON; anything else must be seen.
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
            with pytest.raises(PackError):
                load_pack(folder)
        for content in (whole[: len(whole) // 2], whole[:-2], b""):
            path.write_bytes(content)
            with pytest.raises(PackError):
                load_pack(folder)
        path.unlink()
        with pytest.raises(PackError):
            load_pack(folder)
        path.write_bytes(whole)
    load_pack(folder)


def change_json(name: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return apply


def change_tensors(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in read_tensors(folder / name).items()}
        change(tensors)
        write_tensors(folder / name, tensors)

    return apply


def recipe(**changes: Any) -> Callable[[Path], None]:
    return change_json("pack_info.json", lambda info: info["recipe"].update(changes))


def swap_rows(value: dict) -> None:
    value["results"].reverse()


LENSES, RESULTS = "layer1/lenses.safetensors", "layer1/results.json"
HOSTILE = {
    "other schema": change_json("pack_info.json", lambda info: info.update(schema=2)),
    "no recipe": change_json("pack_info.json", lambda info: info.pop("recipe") and None),
    "recipe is a list": change_json("pack_info.json", lambda info: info.update(recipe=[1])),
    "unknown recipe key": recipe(code="rm -rf"),
    "recipe lacks a key": change_json("pack_info.json", lambda info: info["recipe"].pop("width") and None),
    "width of an exabyte": recipe(width=2**60),
    "width beyond any integer": recipe(width=10**40),
    "width of two billion": recipe(width=2**31 - 1),
    "hidden of two billion": recipe(family="mlp", hidden=2**31 - 2),
    "rank of two billion": recipe(basis_rank=2**31 - 1),
    "no basis": recipe(basis_rank=0),
    "width is text": recipe(width="32"),
    "width is true": recipe(width=True),
    "family of another kind": recipe(family="pickle"),
    "no layers": recipe(layers=[]),
    "negative layers": recipe(layers=[-1, 2]),
    "one layer twice": recipe(layers=[1, 1]),
    "more layers": recipe(layers=[1, 2, 3]),
    "a million layers": recipe(layers=list(range(10**6))),
    "fingerprint is a number": recipe(fingerprint=5),
    "levels is a list": change_json("pack_info.json", lambda info: info.update(levels=[0])),
    "a level too many": change_json("pack_info.json", lambda info: info["levels"].update({"9": 1})),
    "a level that climbs": change_json("pack_info.json", lambda info: info["levels"].update({"../..": 1})),
    "no level": change_json("pack_info.json", lambda info: info.update(levels={})),
    "other count": change_json("pack_info.json", lambda info: info["levels"].update({"1": 3})),
    "other concept pack": change_json("pack_info.json", lambda info: info["concept_pack"].update(sha256="0")),
    "concept pack is a number": change_json("pack_info.json", lambda info: info.update(concept_pack=3)),
    "provenance is a number": change_json("pack_info.json", lambda info: info.update(provenance=3)),
    "info is a list": change_json("pack_info.json", lambda info: [info]),
    "deep info": lambda folder: (folder / "pack_info.json").write_text("[" * 10**5),
    "rows out of order": change_json(RESULTS, swap_rows),
    "a row less": change_json(RESULTS, lambda value: value["results"].pop() and None),
    "rows are numbers": change_json(RESULTS, lambda value: value.update(results=[1, 2])),
    "a concept twice": change_json(RESULTS, lambda value: value["results"][0].update(concept="concept4")),
    "a concept on two levels": change_json(RESULTS, lambda value: value["results"][0].update(concept="concept0")),
    "metrics are a number": change_json(RESULTS, lambda value: value["results"][0].update(metrics=3)),
    "extra rows": change_tensors(LENSES, lambda t: t.update(bias=torch.zeros(3, 2))),
    "renamed tensor": change_tensors(LENSES, lambda t: t.update(weights=t.pop("weight"))),
    "transposed": change_tensors(LENSES, lambda t: t.update(weight=t["weight"].transpose(1, 2).contiguous())),
    "a scalar": change_tensors(LENSES, lambda t: t.update(bias=torch.tensor(0.0))),
    "no tensors": change_tensors(LENSES, lambda t: t.clear()),
    "nan": change_tensors(LENSES, lambda t: t["weight"][0].fill_(torch.nan)),
    "integers": change_tensors(LENSES, lambda t: t.update(weight=t["weight"].int())),
    "booleans": change_tensors(LENSES, lambda t: t.update(bias=t["bias"] > 0)),
    "beyond float32": change_tensors(LENSES, lambda t: t.update(bias=t["bias"].double() + 1e200)),
    "calibration without scale": change_tensors("calibration.safetensors", lambda t: t.pop("scale")),
    "nan threshold": change_tensors("calibration.safetensors", lambda t: t["threshold"].fill_(torch.nan)),
    "falling quantiles": change_tensors("calibration.safetensors", lambda t: t.update(quantiles=-t["quantiles"])),
    "quantiles of one lens": change_tensors("calibration.safetensors", lambda t: t.update(quantiles=t["quantiles"][0])),
    "quantile is a scalar": change_tensors("calibration.safetensors", lambda t: t.update(quantiles=torch.tensor(1.0))),
    "levels of another length": change_tensors("calibration.safetensors", lambda t: t.update(levels=t["levels"][1:])),
    "basis of another rank": change_tensors(
        "basis.safetensors", lambda t: t.update(components=t["components"][..., 1:])
    ),
    "basis with nan": change_tensors("basis.safetensors", lambda t: t["mean"].fill_(torch.nan)),
    "basis without mean": change_tensors("basis.safetensors", lambda t: t.pop("mean")),
    "text of other concepts": change_json("text.json", lambda value: value["names"].reverse()),
    "text of too few": change_json("text.json", lambda value: value["names"].pop() and None),
    "text without words": change_json("text.json", lambda value: value.update(vocabulary=5)),
    "text with nan": change_tensors("text.safetensors", lambda t: t["bias"].fill_(torch.nan)),
    "text with fractional rows": change_tensors("text.safetensors", lambda t: t.update(lenses=t["lenses"].float())),
    "text without rows": change_tensors("text.safetensors", lambda t: t.pop("row_starts")),
    "text points outside": change_tensors("text.safetensors", lambda t: t["lenses"].fill_(99)),
    "no text tensors": lambda folder: (folder / "text.safetensors").unlink(),
    "no hierarchy": lambda folder: shutil.rmtree(folder / "hierarchy"),
    "hierarchy without pack": lambda folder: (folder / "hierarchy" / "pack.json").unlink(),
    "hierarchy is no JSON": lambda folder: (folder / "hierarchy" / "pack.json").write_text("{"),
    "a level is missing": lambda folder: shutil.rmtree(folder / "layer1"),
    "lenses are a folder": lambda folder: ((folder / LENSES).unlink(), (folder / LENSES).mkdir()),
    "lenses are a script": lambda folder: (folder / LENSES).write_text("import os"),
    "calibration is a script": lambda folder: (folder / "calibration.safetensors").write_bytes(b"\x80\x04cos\nsystem"),
    "header of an exabyte": lambda folder: (folder / LENSES).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    "deep text": lambda folder: (folder / "text.json").write_text('{"a":' * 10**5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pack_with_a_fitting_manifest_is_a_pack_error(folder: Path, name: str):
    HOSTILE[name](folder)
    write_manifest(folder)
    with pytest.raises(PackError):
        load_pack(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_of_the_index_loads_or_is_a_pack_error(saved: Path, tmp_path: Path, data: st.DataObject):
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    )
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(["pack_info.json", RESULTS, "text.json"]))
    node = whole = json.loads((folder / name).read_text())
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            node[key] = data.draw(values)
            break
        node = node[key]
    (folder / name).write_text(json.dumps(whole))
    write_manifest(folder)
    with contextlib.suppress(PackError):
        bank = load_pack(folder).bank()
        assert len(bank) == len(set(bank.names)) > 0


def test_a_save_that_fails_leaves_the_old_pack(folder: Path, monkeypatch: pytest.MonkeyPatch):
    other = make_pack(seed=1)
    for part in ("layer1", "calibration", "text"):

        def fail(path: Path, tensors: object, part: str = part) -> None:
            if part in str(path):
                raise RuntimeError("stopped")
            write_tensors(path, tensors)

        monkeypatch.setattr("ftw.map.pack.write_tensors", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            other.save(folder)
    assert_reads_the_same(load_pack(folder), make_pack(rank=5), other.names)
    assert [entry.name for entry in folder.parent.iterdir() if "pack" in entry.name] == ["pack"]


def test_a_full_disk_leaves_the_old_pack_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(tensors: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(DiskFullError, match="no room"):
        make_pack(seed=1).save(folder)
    monkeypatch.undo()
    assert load_pack(folder).names


def test_saving_replaces_the_old_pack_whole(folder: Path):
    make_pack(whole=False).save(folder)
    assert not (folder / "hierarchy").exists()
    assert not (folder / "basis.safetensors").exists()
    again = load_pack(folder)
    assert again.concepts is None
    assert again.text is None


def test_nothing_in_a_pack_is_code(folder: Path):
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert (folder / NAME).is_file()
