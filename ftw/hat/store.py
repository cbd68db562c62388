"""Lenses as files: stacked tensors, one safetensors shard a level, never one file a lens.

`LensStack` is what training makes and a pack stores: one head a layer, with the calibration beside it. `stack.bank()`
folds it into the module that reads. Rows of all tensors are lenses, so levels and single concepts load on their own.

Axes: N lenses, L layers, D model width, Q quantiles.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftw.errors import PackError
from ftw.hat.bank import LensBank, build_bank
from ftw.hat.basis import Basis
from ftw.hat.lens import Head, HeadConfig, find_rows
from ftw.hat.mlp import MLPHead
from ftw.hat.pooling import Pooling
from ftw.hat.product import stored
from ftw.hat.temporal.bank import SequenceBank
from ftw.hat.temporal.families import UNITS, described
from ftw.hat.temporal.sequence import SequenceHead
from ftw.hat.temporal.trunk import Trunk


@dataclass(kw_only=True)
class LensStack:
    """N trained lenses, layer by layer.

    Attributes:
        names: N concepts. layers: L layers. heads: one head a layer, reading layer-normed states or basis coordinates.
        scale_NL, offset_NL: Platt's calibration of each layer; a lens's logit is the mean over layers of
            scale x head + offset.
        quantiles_NQ, levels_Q: background quantiles of that logit on single tokens.
        threshold_N: logit above which a text is called positive (best F1 on out-of-fold rows).
        threshold_1fpr_N: logit that 1 % of the out-of-fold negatives exceed.
        basis: shared projection, or None. trunk: shared encoder of sequences, or None.
        pooling: how a whole text is read, where that is more than the lens's logit of its mean state; or None.
    """

    names: list[str]
    layers: tuple[int, ...]
    heads: list[Head]
    scale_NL: Tensor
    offset_NL: Tensor
    quantiles_NQ: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    levels_Q: Tensor = field(default_factory=lambda: torch.empty(0))
    threshold_N: Tensor = field(default_factory=lambda: torch.empty(0))
    threshold_1fpr_N: Tensor = field(default_factory=lambda: torch.empty(0))
    basis: Basis | None = None
    pooling: Pooling | None = None
    trunk: Trunk | None = None

    @property
    def reads_sequences(self) -> bool:
        """Whether the lenses read sequences; then `sequence_bank` is what reads them."""
        return self.trunk is not None or any(isinstance(head, SequenceHead) for head in self.heads)

    def bank(self) -> LensBank:
        """The module that reads single states: calibration folded in.

        Raises:
            PackError: the lenses read sequences.
        """
        if self.reads_sequences:
            raise PackError("these lenses read sequences, not single states; read windows: ftw monitor mode=timeline")
        return self._bank(self.basis)

    def sequence_bank(self) -> SequenceBank:
        """The module that reads sequences.

        Raises:
            PackError: the lenses read single states.
        """
        if not self.reads_sequences:
            raise PackError("these lenses read single states; their bank is stack.bank()")
        return SequenceBank(self._bank(None), basis=self.basis, trunk=self.trunk)

    def _bank(self, basis: Basis | None) -> LensBank:
        num_layers = len(self.layers)
        return build_bank(
            names=self.names,
            layers=self.layers,
            heads=self.heads,
            scale_LN=self.scale_NL.T / num_layers,
            offset_N=self.offset_NL.mean(1),
            quantiles_NQ=self.quantiles_NQ if self.levels_Q.numel() else None,
            levels_Q=self.levels_Q if self.levels_Q.numel() else None,
            basis=basis,
        )

    def rows(self, names: Sequence[str]) -> "LensStack":
        """The stack of some of its lenses, in the given order.

        Raises:
            ConceptError: a name that the stack has no lens for, with the nearest names.
        """
        place = {name: row for row, name in enumerate(self.names)}
        index = torch.tensor(find_rows(names, place), dtype=torch.long)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index] if tensor.numel() else tensor

        return replace(
            self,
            names=list(names),
            heads=[head.rows(index) for head in self.heads],
            scale_NL=pick(self.scale_NL),
            offset_NL=pick(self.offset_NL),
            quantiles_NQ=pick(self.quantiles_NQ),
            threshold_N=pick(self.threshold_N),
            threshold_1fpr_N=pick(self.threshold_1fpr_N),
            pooling=None if self.pooling is None else self.pooling.rows(index),
        )

    def lens_tensors(self) -> dict[str, Tensor]:
        """Weights by name, [N, L, ...]."""
        parts = [head.row_tensors() for head in self.heads]
        return {name: torch.stack([part[name] for part in parts], dim=1).contiguous() for name in parts[0]}

    def calibration_tensors(self) -> dict[str, Tensor]:
        """Calibration by name, lens axis first (but for `levels`)."""
        tensors = {
            "scale": self.scale_NL,
            "offset": self.offset_NL,
            "quantiles": self.quantiles_NQ,
            "levels": self.levels_Q,
            "threshold": self.threshold_N,
            "threshold_1fpr": self.threshold_1fpr_N,
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor.numel()}


def stack_from_tensors(
    *,
    names: list[str],
    layers: tuple[int, ...],
    width: int,
    head: HeadConfig,
    lens: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    basis: Mapping[str, Tensor] | None,
    basis_rank: int,
    where: str,
    trunk: Mapping[str, Tensor] | None = None,
) -> LensStack:
    """A stack from the tensors of a pack, every name and shape checked.

    Args:
        width, basis_rank: of the substrate, and of the basis (0: none).

    Raises:
        PackError: a tensor is missing, of another shape, or not finite; names file and tensor.
    """
    num, num_layers = len(names), len(layers)
    lens, read_width, encoder = dequantised(lens), basis_rank or width, None
    if head.family == "trunk_lstm":
        encoder = _trunk(trunk or {}, num_layers, read_width, head.hidden or UNITS, where)
        read_width = 2 * encoder.hidden
    with torch.device("meta"):  # shapes only: what a hostile index declares is not allocated
        shapes = {name: tensor.shape[1:] for name, tensor in head.build(1, read_width).state_dict().items()}
    checked = {name: check_tensor(lens, name, (num, num_layers, *shape), where) for name, shape in shapes.items()}
    shared = None
    if basis_rank:
        mean_LD = check_tensor(basis or {}, "mean", (num_layers, width), where)
        shared = Basis(mean_LD, check_tensor(basis or {}, "components", (num_layers, width, basis_rank), where))
    with torch.device("meta"):  # random weights would take longer than the pack's own
        heads = [head.build(num, read_width) for _ in layers]
    for layer, built in enumerate(heads):
        built.load_state_dict({name: tensor[:, layer].contiguous() for name, tensor in checked.items()}, assign=True)
    if "norm_weight" in lens:  # lenses with a layer norm of their own read the same normed state after this
        gain_NLW, shift_NLW = (
            check_tensor(lens, name, (num, num_layers, read_width), where) for name in ("norm_weight", "norm_bias")
        )
        heads = [built.fold_norm(gain_NLW[:, layer], shift_NLW[:, layer]) for layer, built in enumerate(heads)]
    return LensStack(
        names=names,
        layers=layers,
        heads=heads,
        basis=shared,
        trunk=encoder,
        **calibration_from_tensors(calibration, num, num_layers, where),
    )


def calibration_from_tensors(
    calibration: Mapping[str, Tensor], num: int, num_layers: int, where: str
) -> dict[str, Any]:
    """The calibration of a stack of `num` lenses from the tensors of a pack, by the stack's names.

    Raises:
        PackError: as `stack_from_tensors`.
    """
    found = {f"{name}_NL": check_tensor(calibration, name, (num, num_layers), where) for name in ("scale", "offset")}
    for name in ("threshold", "threshold_1fpr"):
        if name in calibration:
            found[f"{name}_N"] = check_tensor(calibration, name, (num,), where)
    if "quantiles" in calibration:
        found["levels_Q"] = _ascending(calibration, "levels", (calibration["quantiles"].shape[-1],), where)
        found["quantiles_NQ"] = _ascending(calibration, "quantiles", (num, len(found["levels_Q"])), where)
    return found


LARGEST = 1e12  # a lens's products with another of its numbers stay within float32
# The wide tensors of each family: what a precision other than float32 is for. The rest is a thousandth of the bytes.
WIDE = {"weight": ("weight",), "w1": ("w1", "w2")}


def quantised(tensors: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Lens tensors as a file of that precision holds them: int8 comes with a step a row, `w2` of an MLP stays bfloat16.

    Raises:
        ConfigError: no such precision. PackError: lenses of a family that has no other form.
    """
    if precision == "float32":
        return dict(tensors)
    family = next((first for first in WIDE if first in tensors), None)
    if family is None:
        raise PackError(f"lenses of this family are stored in float32 only, not in {precision}")
    first, *further = WIDE[family]
    weight, step = stored(tensors[first].float(), precision)
    kept = {**tensors, first: weight, **{name: tensors[name].bfloat16() for name in further}}
    return kept if step is None else {**kept, f"{first}_step": step}


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lens tensors in floats, whatever `quantised` made of them."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_step")}
    for name, step in tensors.items():
        first = name.removesuffix("_step")
        if name.endswith("_step") and first in plain and plain[first].dtype == torch.int8:
            if step.shape != plain[first].shape[:-1] or not step.is_floating_point():
                raise PackError(
                    f"tensor {name!r} has shape {tuple(step.shape)}, not one step for each row of {first!r}"
                )
            plain[first] = plain[first].float() * step.float().unsqueeze(-1)
    return plain


def head_of(stack: LensStack) -> HeadConfig:
    """The configuration that builds a stack's heads again."""
    head = stack.heads[0]
    if stack.trunk is not None:
        return HeadConfig(family="trunk_lstm", hidden=stack.trunk.hidden)
    if isinstance(head, SequenceHead):
        return described(head)
    return (
        HeadConfig(family="mlp", hidden=head.hidden, dropout=head.dropout)
        if isinstance(head, MLPHead)
        else HeadConfig()
    )


def _trunk(tensors: Mapping[str, Tensor], num_layers: int, width: int, hidden: int, where: str) -> Trunk:
    with torch.device("meta"):
        trunk = Trunk(num_layers, width, hidden=hidden)
    shapes = {name: tuple(tensor.shape) for name, tensor in trunk.state_dict().items()}
    checked = {name: check_tensor(tensors, name, shape, where) for name, shape in shapes.items()}
    trunk.load_state_dict(checked, assign=True)
    return trunk.requires_grad_(False)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file.

    Raises:
        OSError: it cannot be written, a full disk with its own errno.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # safetensors tells of a full disk in words only; `paths` asks for the number.
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped.

    Raises:
        PackError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise PackError(
            f"{path} is not a readable safetensors file ({error}); fetch or train the pack again"
        ) from error


def check_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    """A tensor of a pack as float32.

    Raises:
        PackError: it is missing, of another shape, or not finite.
    """
    if name not in tensors:
        raise PackError(f"{where}: tensor {name!r} is missing (there are {', '.join(sorted(tensors)) or 'none'})")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise PackError(f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, its index says {shape}")
    if not tensor.is_floating_point() or not is_sane(tensor):
        raise PackError(
            f"{where}: tensor {name!r} is {tensor.dtype} or holds numbers that are not finite, or beyond {LARGEST:.0e}"
        )
    return tensor.float()


def is_sane(tensor: Tensor) -> bool:
    """Whether every number is finite and of a size that a lens can have."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # one pass, no memory; a number that is none makes both none
    return bool(low >= -LARGEST) and bool(high <= LARGEST)


def _ascending(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    tensor = check_tensor(tensors, name, shape, where)
    if shape[-1] < 2 or (tensor.diff(dim=-1) < 0).any():
        raise PackError(f"{where}: tensor {name!r} does not ascend over at least two quantiles")
    return tensor
