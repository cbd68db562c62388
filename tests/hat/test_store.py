"""Tensors on disk come back as they went, and a stack is never made of tensors that do not fit."""

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from random_lenses import random_stack
from safetensors import SafetensorError
from torch import Tensor

import ftw.hat.store as store
from ftw import paths
from ftw.errors import ConceptError, DiskFullError, PackError
from ftw.hat.store import LensStack, head_of, read_tensors, stack_from_tensors, write_tensors


def again(stack: LensStack, lens: Mapping[str, Tensor], calibration: Mapping[str, Tensor]) -> LensStack:
    basis = stack.basis
    return stack_from_tensors(
        names=stack.names,
        layers=stack.layers,
        width=32,
        head=head_of(stack),
        lens=lens,
        calibration=calibration,
        basis=None if basis is None else dict(basis.state_dict()),
        basis_rank=0 if basis is None else basis.rank,
        where="here",
    )


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_stack_is_its_tensors(hidden: int, rank: int):
    stack = random_stack(hidden=hidden, rank=rank)
    copy = again(stack, stack.lens_tensors(), stack.calibration_tensors())
    states_BLD = torch.randn(4, 2, 32)
    assert torch.equal(copy.bank()(states_BLD), stack.bank()(states_BLD))
    assert torch.equal(copy.quantiles_NQ, stack.quantiles_NQ)
    assert torch.equal(copy.threshold_1fpr_N, stack.threshold_1fpr_N)


def test_rows_of_tensors_are_lenses():
    stack = random_stack()
    some = stack.rows(["concept4", "concept1"])
    for tensors, chosen in (
        (stack.lens_tensors(), some.lens_tensors()),
        (stack.calibration_tensors(), some.calibration_tensors()),
    ):
        for name, tensor in tensors.items():
            assert torch.equal(chosen[name], tensor if name == "levels" else tensor[[4, 1]]), name


def test_an_unknown_row_is_refused_with_the_nearest_names():
    with pytest.raises(ConceptError, match="concept1"):
        random_stack().rows(["concept11"])


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def changed(name: str, change):
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


@pytest.mark.parametrize(
    "break_lens",
    [
        without("weight"),
        without("bias"),
        changed("weight", lambda tensor: tensor[:, :, :-1]),
        changed("weight", lambda tensor: tensor[:-1]),
        changed("weight", lambda tensor: tensor.flatten()),
        changed("weight", lambda tensor: tensor.int()),
        changed("weight", lambda tensor: tensor.fill_(torch.nan)),
        changed("weight", lambda tensor: tensor.double().fill_(1e300)),
        changed("bias", lambda tensor: tensor.fill_(torch.inf)),
        changed("bias", lambda tensor: tensor.to(torch.complex64)),
    ],
)
def test_lens_tensors_that_do_not_fit_are_refused(break_lens):
    stack = random_stack()
    with pytest.raises(PackError, match=r"here: tensor '(weight|bias)'"):
        again(stack, break_lens(stack.lens_tensors()), stack.calibration_tensors())


@pytest.mark.parametrize(
    "break_calibration",
    [
        without("scale"),
        without("levels"),
        changed("scale", lambda tensor: tensor.T.contiguous()),
        changed("offset", lambda tensor: tensor.fill_(torch.nan)),
        changed("levels", lambda tensor: tensor.flip(0)),
        changed("levels", lambda tensor: tensor[None]),
        changed("quantiles", lambda tensor: tensor.flip(1)),
        changed("quantiles", lambda tensor: tensor[:, :1]),
        changed("quantiles", lambda tensor: tensor.long()),
        changed("threshold", lambda tensor: tensor[:-1]),
    ],
)
def test_calibration_tensors_that_do_not_fit_are_refused(break_calibration):
    stack = random_stack()
    with pytest.raises(PackError, match="here: tensor"):
        again(stack, stack.lens_tensors(), break_calibration(stack.calibration_tensors()))


@pytest.mark.parametrize("size", [{"hidden": 2**30}, {"width": 2**30}, {"basis_rank": 2**30}])
def test_a_declared_size_is_checked_before_memory_is_taken(size: dict[str, int]):
    stack = random_stack(hidden=4)
    head = head_of(stack)
    head.hidden = size.get("hidden", head.hidden)
    with pytest.raises(PackError):
        stack_from_tensors(
            names=stack.names,
            layers=stack.layers,
            width=size.get("width", 32),
            head=head,
            lens=stack.lens_tensors(),
            calibration=stack.calibration_tensors(),
            basis=None,
            basis_rank=size.get("basis_rank", 0),
            where="here",
        )


def test_floats_survive_the_disk_exactly(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.tensor([1e-45, 3e38])}
    write_tensors(tmp_path / "deep" / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "deep" / "x.safetensors")
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_what_is_not_safetensors_is_a_pack_error(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.randn(30)})
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:40], whole[:-1], b"\xff" * 100, (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(PackError, match=r"x\.safetensors"):
            read_tensors(path)
    with pytest.raises(PackError):
        read_tensors(tmp_path / "missing.safetensors")


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "x.safetensors", {})
    assert caught.value.errno == errno.ENOSPC
    with (
        pytest.raises(DiskFullError, match="nothing finished was lost"),
        paths.replace_folder(tmp_path / "pack") as folder,
    ):
        write_tensors(folder / "x.safetensors", {})
    assert not (tmp_path / "pack").exists()
