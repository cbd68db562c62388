"""A converted pack is smaller, reads nearly the same, and says what it lost."""

from pathlib import Path

import pytest
import torch
from toy_pack import make_pack

from ftw.errors import ConfigError, PackError
from ftw.hat.store import read_tensors, write_tensors
from ftw.map.convert import convert
from ftw.map.manifest import write_manifest
from ftw.map.pack import load_pack
from ftw.map.pack_index import PackIndex
from ftw.map.versions import lens_hashes

KINDS = [{"hidden": 0}, {"hidden": 8}, {"hidden": 8, "rank": 5}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_pack_of_another_precision_is_smaller_and_is_on_disk_what_was_judged(
    tmp_path: Path, kind: dict, precision: str
):
    pack = make_pack(**kind)
    made, change = convert(pack, precision=precision)
    again = load_pack(made.save(tmp_path / "small"))
    states = torch.randn(16, 2, 32)
    logits = made.bank()(states)
    assert torch.equal(again.subset(pack.names).bank()(states), logits)
    assert lens_hashes(again.stack) == lens_hashes(made.stack)
    assert again.stored == precision
    cold = PackIndex.open(tmp_path / "small").cold()
    bank = cold.bank(len(pack.names))
    assert cold.fill(bank.slots, pack.names, precision="float32") == {}
    bank.refresh()
    assert (bank(states) - logits).abs().max() < 1e-5
    cold.close()
    assert change.correlation > 0.99
    assert change.bytes_after < change.bytes_before
    lenses = [
        folder / "layer1" / "lenses.safetensors" for folder in (pack.save(tmp_path / "large"), tmp_path / "small")
    ]
    assert lenses[1].stat().st_size < lenses[0].stat().st_size
    back, _ = convert(again, precision="float32")
    assert torch.equal(back.subset(pack.names).bank()(states), logits)


@pytest.mark.parametrize("damage", ["no step", "step of another shape", "step is nan", "step is huge"])
def test_int8_weights_with_a_damaged_step_are_refused(tmp_path: Path, damage: str):
    folder = convert(make_pack(), precision="int8")[0].save(tmp_path / "small")
    path = folder / "layer1" / "lenses.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    if damage == "no step":
        del tensors["weight_step"]
    elif damage == "step of another shape":
        tensors["weight_step"] = tensors["weight_step"][:, :1].contiguous()
    else:
        tensors["weight_step"][0] = torch.nan if damage == "step is nan" else 3e38
    write_tensors(path, tensors)
    write_manifest(folder)
    with pytest.raises(PackError):
        load_pack(folder)
    with pytest.raises(PackError):
        PackIndex.open(folder).cold()


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_basis_of_the_rank_that_the_lenses_span_loses_nothing(hidden: int):
    pack = make_pack(hidden=hidden)
    made, change = convert(pack, rank=31)
    assert change.correlation > 0.95
    assert made.recipe.basis_rank == 31
    # Six linear lenses span six directions a layer: a basis of six holds them whole.
    if not hidden:
        exact, same = convert(pack, rank=6)
        states = torch.randn(16, 2, 32)
        assert (exact.bank()(states) - pack.bank()(states)).abs().max() < 1e-4
        assert same.correlation > 0.999999


def test_what_cannot_be_converted_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="none of float32"):
        convert(make_pack(), precision="int4")
    with pytest.raises(ConfigError, match="choose 1 to 31"):
        convert(make_pack(), rank=32)
    with pytest.raises(PackError, match="on a basis of rank 5 already"):
        convert(make_pack(rank=5), rank=3)


def test_the_provenance_of_a_converted_pack_says_what_was_done():
    made, change = convert(make_pack(), precision="int8", rank=6)
    assert made.provenance["based_on"] == {"pack_id": "toy", "version": "1.2.3"}
    assert "int8" in made.provenance["conversion"]
    assert "random states" in change.judged_on
    assert change.auroc_before is None
