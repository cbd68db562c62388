"""Lenses on disk, read row by row: the cold end of a shelf.

Opening reads headers and what is small of every lens (biases, calibration); the wide weights stay in the files until
they are asked for. Rows are read with `pread`, straight to where they are used when the file's form is the bank's. A
memory map would be as fast, but ends the process when the disk fails; here that is an error of single lenses.

Axes: N lenses, L layers, H first hidden width, K second, W input width.
"""

import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftw.errors import FTWError, PackError
from ftw.hat.bank import LensBank
from ftw.hat.lens import HeadConfig
from ftw.hat.slots import Slots
from ftw.hat.store import LensStack, calibration_from_tensors, check_tensor, stack_from_tensors

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
CHUNK_BYTES = 8 * 2**20  # what is read and folded at once: stays in the cache between the two
SMALL_BYTES = 2 * 2**10  # rows up to here are kept in memory for all lenses
READERS, PARALLEL_BYTES = 2, 4 * 2**20  # threads that read, and bytes from which a second one is worth it
RUN_ROWS = 16  # read in one call at most: enough to be few calls, and both readers have their share


@dataclass(frozen=True)
class Field:
    """Where a tensor stands in a file: its type, shape, first byte and bytes a row."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    def none(self) -> Tensor:
        """No row of it."""
        return torch.empty(0, *self.shape[1:], dtype=self.dtype)


class RowFile:
    """A safetensors file whose tensors are read by rows of their first axis.

    Raises:
        PackError: the file is missing, truncated or not safetensors, or holds something else than floats.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks that the header and the size agree
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            self.fields = {name: _field(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise PackError(
                f"{path} is not a readable safetensors file of floats ({error}); fetch or train the pack again"
            ) from error
        # Closed by `close`, or by whoever drops the object: a descriptor is no file object that complains.
        self._descriptor = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._descriptor)

    def read_rows(self, name: str, row: int, num: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets, one after the other, with the bytes of consecutive rows.

        Raises:
            OSError: the disk fails, or the file ends before.
        """
        field = self.fields[name]
        got = os.preadv(self._descriptor, targets, field.offset + row * field.row_bytes)
        if got != num * field.row_bytes:
            raise OSError(
                f"{self.path.name} ended {num * field.row_bytes - got} bytes before the end of rows from {row}"
            )

    def read_all(self, name: str) -> Tensor:
        """A whole tensor."""
        field = self.fields[name]
        whole = torch.empty(field.shape, dtype=field.dtype)
        if whole.numel():
            got = os.preadv(self._descriptor, [_bytes(whole)], field.offset)
            if got != whole.numel() * whole.element_size():
                raise OSError(f"{self.path.name} ended within tensor {name!r}")
        return whole

    def close(self) -> None:
        """Let the file go."""
        self._closing()


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of a file; start: place of the first among the lenses that are asked for."""

    file: RowFile
    row: int
    start: int
    num: int

    def read(self, tensor: str, targets: Sequence[memoryview]) -> None:
        self.file.read_rows(tensor, self.row, self.num, targets)

    def singles(self) -> list["_Run"]:
        """Each row on its own, to see which of several cannot be read; nothing of a single one."""
        rows = range(self.num) if self.num > 1 else ()
        return [_Run(self.file, self.row + place, self.start + place, 1) for place in rows]


class ColdLenses:
    """All lenses of a pack, on disk.

    Args:
        names_of: the concepts in each file of stacked tensors, in row order.
        layers, width, head, basis, basis_rank: as of a stack.
        calibration: by name, rows in the order of the files.
        where: of messages.

    Raises:
        PackError: files and index disagree.
    """

    def __init__(
        self,
        *,
        names_of: Mapping[Path, Sequence[str]],
        layers: tuple[int, ...],
        width: int,
        head: HeadConfig,
        calibration: Mapping[str, Tensor],
        basis: Mapping[str, Tensor] | None = None,
        basis_rank: int = 0,
        where: str = "pack",
    ) -> None:
        self.names = [name for names in names_of.values() for name in names]
        self.index = {name: row for row, name in enumerate(self.names)}
        self.layers, self.width, self.where = layers, width, where
        self._head, self._basis, self._rank = head, basis, basis_rank
        self._files = [RowFile(path) for path in names_of]
        self._place = [
            (file, row) for file, names in zip(self._files, names_of.values(), strict=True) for row in range(len(names))
        ]
        self._check_files([len(names) for names in names_of.values()])
        fields = self._files[0].fields
        self._small = {
            name: check_tensor(whole, name, (len(self.names), *field.shape[1:]), where)
            for name, field in fields.items()
            if field.row_bytes <= SMALL_BYTES and field.dtype != torch.int8
            for whole in [{name: torch.cat([file.read_all(name) for file in self._files])}]
        }
        self._wide = {name: field for name, field in fields.items() if name not in self._small}
        self._calibration = dict(calibration)
        everyone = calibration_from_tensors(calibration, len(self.names), len(layers), where)
        self.readings = LensStack(names=self.names, layers=layers, heads=[], basis=None, trunk=None, **everyone).bank()
        self._empty = self._stack([], {name: field.none() for name, field in self._wide.items()}).bank()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="ftw-cold")

    def __len__(self) -> int:
        return len(self.names)

    def bank(self, capacity: int, *, precision: str = "float32") -> LensBank:
        """A bank of none of the lenses with room for some of them."""
        return self._empty.hot(capacity, precision=precision)

    def fill(self, slots: Slots, names: Sequence[str], *, precision: str, drop: Sequence[str] = ()) -> dict[str, str]:
        """Read lenses into slots of a bank's rows, in place of those that leave.

        Returns:
            Why lenses could not be read, by name; those are not in the slots.
        """
        if not names:
            slots.drop(drop)
            return {}
        if self._as_filed(slots, precision):
            return self._fill_as_filed(slots, names, drop)
        step = max(1, CHUNK_BYTES // max(1, sum(field.row_bytes for field in self._wide.values())))
        failed, leaving = dict[str, str](), list(drop)
        for start in range(0, len(names), step):
            part = names[start : start + step]
            out, leaving = (leaving[: len(part)], leaving[len(part) :]) if start + step < len(names) else (leaving, [])
            rows, lost = self._folded(part, precision)
            failed |= lost
            slots.take(rows.names, rows.slots, drop=out)
        return failed

    def close(self) -> None:
        """Let the files go."""
        self._pool.shutdown()
        for file in self._files:
            file.close()

    def _as_filed(self, slots: Slots, precision: str) -> bool:
        """Whether a row on disk is byte by byte what the bank holds: one copy then brings it."""
        mlp = self._head.hidden > 0 and "norm_weight" not in self._files[0].fields
        on_cpu = all(tensor.device.type == "cpu" for tensor in slots.tensors.values())
        return mlp and on_cpu and precision == "float32" and all(f.dtype == torch.float32 for f in self._wide.values())

    def _fill_as_filed(self, slots: Slots, names: Sequence[str], drop: Sequence[str]) -> dict[str, str]:
        at = slots.claim(names, drop)
        views = {
            name: [_bytes(slots.tensors[f"{layer}.{name}"]) for layer in range(len(self.layers))] for name in self._wide
        }

        def read(runs: list[_Run]) -> dict[str, str]:
            failed = {}
            while runs:
                run = runs.pop()
                try:
                    for tensor, layers in views.items():
                        size = self._wide[tensor].row_bytes // len(layers)
                        run.read(tensor, _targets(layers, size, at[run.start : run.start + run.num]))
                except OSError as error:
                    if run.num == 1:
                        failed[names[run.start]] = str(error)
                    runs += run.singles()
            return failed

        rows = [self.index[name] for name in names]
        slots.write(at, self.readings.slots.tensors, rows)
        for name, tensor in self._small.items():
            slots.write(at, {f"{layer}.{name}": tensor[:, layer] for layer in range(len(self.layers))}, rows)
        runs = self._runs(names)
        step = READERS if sum(f.row_bytes for f in self._wide.values()) * len(names) >= PARALLEL_BYTES else 1
        parts = [read(runs)] if step == 1 else list(self._pool.map(read, (runs[first::step] for first in range(step))))
        failed = {name: why for part in parts for name, why in part.items()}
        slots.drop(failed)
        return failed

    def _folded(self, names: Sequence[str], precision: str) -> tuple[LensBank, dict[str, str]]:
        """A bank of some lenses, and why others could not be read."""
        wide, failed = self._read(names)
        found = [name for name in names if name not in failed]
        try:
            bank = self._stack(found, wide).bank()
            return bank if precision == "float32" else bank.hot(len(found), precision=precision), failed
        except FTWError as error:  # numbers that are not finite, or too large for the precision
            if len(found) > 1:
                parts = [self._folded([name], precision) for name in found]
                failed |= {name: why for _, lost in parts for name, why in lost.items()}
                return self._folded([name for name in found if name not in failed], precision)[0], failed
            return self._empty.hot(0, precision=precision), failed | {found[0]: str(error)}

    def _read(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The wide rows of some lenses as filed, and why others could not be read; those have no row."""
        wide = {
            name: torch.empty(len(names), *field.shape[1:], dtype=field.dtype) for name, field in self._wide.items()
        }
        views = {name: _bytes(tensor) for name, tensor in wide.items()}
        failed, row, runs = dict[str, str](), 0, self._runs(names)[::-1]
        while runs:
            run = runs.pop()
            try:
                for tensor, view in views.items():
                    size = self._wide[tensor].row_bytes
                    run.read(tensor, [view[row * size : (row + run.num) * size]])
                row += run.num
            except OSError as error:
                if run.num == 1:
                    failed[names[run.start]] = str(error)
                runs += run.singles()[::-1]
        return {name: tensor[:row] for name, tensor in wide.items()}, failed

    def _runs(self, names: Sequence[str]) -> list["_Run"]:
        """Lenses that are asked for one after the other and stand so in a file, in one piece."""
        runs: list[_Run] = []
        for start, name in enumerate(names):
            file, row = self._place[self.index[name]]
            last = runs[-1] if runs else None
            if last is not None and last.file is file and last.row + last.num == row and last.num < RUN_ROWS:
                runs[-1] = replace(last, num=last.num + 1)
            else:
                runs.append(_Run(file, row, start, 1))
        return runs

    def _stack(self, names: Sequence[str], wide: Mapping[str, Tensor]) -> LensStack:
        rows = torch.tensor([self.index[name] for name in names], dtype=torch.long)
        calibration = {name: tensor if name == "levels" else tensor[rows] for name, tensor in self._calibration.items()}
        return stack_from_tensors(
            names=list(names),
            layers=self.layers,
            width=self.width,
            head=self._head,
            lens={**wide, **{name: tensor[rows] for name, tensor in self._small.items()}},
            calibration=calibration,
            basis=self._basis,
            basis_rank=self._rank,
            where=self.where,
        )

    def _check_files(self, num_rows: Sequence[int]) -> None:
        forms = set()
        for file, num in zip(self._files, num_rows, strict=True):
            for name, field in file.fields.items():
                if not field.shape or field.shape[0] != num:
                    raise PackError(f"{file.path}: {num} rows in its index, another number in tensor {name!r}")
            forms.add(json.dumps({name: [str(f.dtype), *f.shape[1:]] for name, f in sorted(file.fields.items())}))
        if len(forms) != 1 or len(self.index) != len(self.names):
            raise PackError(
                f"{self.where}: its levels differ in tensors, or a concept stands on two; fetch the pack again"
            )


def _targets(layers: Sequence[memoryview], size: int, rows: Sequence[int]) -> list[memoryview]:
    """Where consecutive rows of a file go: to rows of a bank, layer by layer, in one piece if they are consecutive."""
    if len(layers) == 1 and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return [layers[0][rows[0] * size : (rows[-1] + 1) * size]]
    return [view[row * size : (row + 1) * size] for row in rows for view in layers]


def _field(entry: Mapping[str, object], data: int) -> Field:
    shape, offsets = entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list)  # safetensors has read this header before
    assert isinstance(offsets, list)
    dtype = TYPES[str(entry["dtype"])]
    return Field(dtype, tuple(shape), data + offsets[0], math.prod(shape[1:]) * dtype.itemsize)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().view(torch.uint8).numpy().data.cast("B")
