"""Lenses in `.pt` files: read without running anything, in every spelling that HatCat has used.

A file is a zip archive with tensors and a pickle that may name nothing but tensors (`weights_only`). Sizes are checked
before and after. The spellings: `net.0.weight` ..., with a layer norm first or not, without the prefix, and
`linear.weight`.

Axes: W input width, H first hidden width, K second.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftw.errors import PackError

MAX_LENS_BYTES = 256 * 2**20
MAX_BANK_BYTES = 8 * 2**30
_KEY = re.compile(r"(?:net\.|linear\.|)(?:(\d{1,2})\.)?(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class ReadLens:
    """A lens out of a file, in float32.

    Attributes:
        tensors: by the names of FTW's heads: weight [W] and bias; or w1 [H, W], b1 [H], w2 [K, H], b2 [K], w3 [K], b3.
        dtype: as it was stored. norm: gain and shift [W] of a layer norm of its own, or None.
    """

    tensors: dict[str, Tensor]
    dtype: torch.dtype
    norm: tuple[Tensor, Tensor] | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """What lenses must have in common to stand in one bank."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in self.tensors.items())


def read_pt(path: Path, *, max_bytes: int = MAX_LENS_BYTES) -> dict[str, Any]:
    """What a `.pt` file holds: tensors in dictionaries, nothing else.

    Raises:
        PackError: a link, too large, compressed, or with anything else inside than tensors.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise PackError(f"{path} is a link or no file; it is not read")
        if (size := path.stat().st_size) > max_bytes:
            raise PackError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
        with zipfile.ZipFile(path) as archive:
            # torch stores without compression: what unpacks to more than the file would is a bomb.
            if sum(member.file_size for member in archive.infolist()) > size:
                raise PackError(f"{path} unpacks to more than it has; do not use it")
        # The one place where FTW reads this format, for there is no other reader of it: tensors only, no names.
        value = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except PackError:
        raise
    except Exception as error:  # a hostile file makes torch raise anything
        words = str(error).strip().partition("\n")[0][:120]
        raise PackError(
            f"{path} is not read: it is no archive of plain tensors ({type(error).__name__}: {words}). FTW opens no "
            "pickle; save the state dict with a current torch"
        ) from error
    if not isinstance(value, dict):
        raise PackError(f"{path} holds a {type(value).__name__}; a lens is a state dict")
    for tensor in _tensors(value):
        # An expanded tensor claims more numbers than it has bytes; touching them would allocate all.
        if tensor.is_sparse or tensor.numel() * tensor.element_size() > size:
            raise PackError(f"{path} holds a tensor {tuple(tensor.shape)} that is larger than the file")
    return value


def parse_lens(state: Mapping[str, Any], where: str) -> ReadLens:
    """A lens from a state dict, whatever its spelling.

    Raises:
        PackError: it is no linear lens and no MLP of three layers, or its numbers are not finite.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(str(key))
        if not match or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise PackError(f"{where}: {str(key)[:60]!r} is no weight or bias of a lens")
        found.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    parts = [found[place] for place in sorted(found)]
    if not all(part.keys() == {"weight", "bias"} for part in parts):
        raise PackError(f"{where}: a layer without weight or bias among {', '.join(map(str, state))[:120]}")
    dtypes = {tensor.dtype for part in parts for tensor in part.values()}
    exact = [{name: tensor.detach().float() for name, tensor in part.items()} for part in parts]
    if not all(torch.isfinite(tensor).all() for part in exact for tensor in part.values()):
        raise PackError(f"{where}: numbers that are not finite")
    norm = None
    if len(exact) in (2, 4) and exact[0]["weight"].ndim == 1:
        norm = (exact[0]["weight"], exact[0]["bias"])
        exact = exact[1:]
    tensors = _named(exact, where)
    width = tensors["weight" if "weight" in tensors else "w1"].shape[-1]
    if norm is not None and not norm[0].shape == norm[1].shape == (width,):
        raise PackError(f"{where}: its layer norm has {tuple(norm[0].shape)} numbers, its input {width}")
    return ReadLens(tensors=tensors, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32, norm=norm)


def _named(parts: list[dict[str, Tensor]], where: str) -> dict[str, Tensor]:
    shapes = [tuple(part["weight"].shape) for part in parts]
    biases = [tuple(part["bias"].shape) for part in parts]
    flat = all(len(shape) == 2 and bias == shape[:1] for shape, bias in zip(shapes, biases, strict=True))
    if flat and len(parts) == 1 and shapes[0][0] == 1:
        return {"weight": parts[0]["weight"][0], "bias": parts[0]["bias"][0]}
    chained = flat and len(parts) == 3 and shapes[1][1] == shapes[0][0] and shapes[2] == (1, shapes[1][0])
    if chained and shapes[1][0] == shapes[0][0] // 2:
        first, second, third = parts
        return {
            "w1": first["weight"],
            "b1": first["bias"],
            "w2": second["weight"],
            "b2": second["bias"],
            "w3": third["weight"][0],
            "b3": third["bias"][0],
        }
    raise PackError(f"{where}: layers of shapes {shapes}; a lens is linear, or W -> H -> H/2 -> 1")


def _tensors(value: Any) -> list[Tensor]:
    waiting, found = [value], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return found
