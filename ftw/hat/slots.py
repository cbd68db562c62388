"""Rows of lenses in preallocated tensors: lenses come and go, and only what changed is moved.

The occupied rows are a prefix, so whatever reads them reads one block. A lens that leaves is overwritten by one that
comes, else by the last row. A hot bank stands on slots, and so does every other tier of a shelf.

Axes: first axis of every tensor = row of a lens.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ftw.errors import ConceptError, ConfigError
from ftw.hat.lens import find_rows
from ftw.hat.pages import populate

WIDE_BYTES = 16 * 2**10  # rows from here on are copied one by one: in one call they would pass through a temporary


class Slots:
    """Named rows, the same in each of several tensors.

    Args:
        tensors: by name, [capacity, ...] each; held, not copied.
        names: of the rows that are filled already, the first ones.

    Raises:
        ConfigError: fewer rows than names.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str] = ()) -> None:
        self.tensors = dict(tensors)
        self.names = list(names)
        self.index = {name: row for row, name in enumerate(self.names)}
        self.capacity = min((len(tensor) for tensor in self.tensors.values()), default=0)
        if self.capacity < len(self.names):
            raise ConfigError(f"{len(self.names)} lenses for {self.capacity} rows; choose a larger capacity")

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.index

    @property
    def num_free(self) -> int:
        """Lenses that can still come."""
        return self.capacity - len(self.names)

    @property
    def row_bytes(self) -> int:
        """Bytes of one lens."""
        return row_bytes(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, filled or not."""
        return self.capacity * self.row_bytes

    def like(self, capacity: int, *, device: str | torch.device = "cpu", pinned: bool = False) -> "Slots":
        """Empty slots for the same kind of rows."""
        return Slots(
            {
                name: torch.empty(capacity, *tensor.shape[1:], dtype=tensor.dtype, device=device, pin_memory=pinned)
                for name, tensor in self.tensors.items()
            }
        )

    def claim(self, names: Sequence[str], drop: Iterable[str] = ()) -> list[int]:
        """Rows for new lenses, in place of those that leave; the caller writes them before anything reads.

        Raises:
            ConceptError: a lens to drop that is not here, or a new one that is. ConfigError: not enough room.
                Nothing has changed then.
        """
        leaving = dict.fromkeys(drop)
        holes = sorted(find_rows(list(leaving), self.index))
        if len(set(names)) < len(names) or any(name in self.index and name not in leaving for name in names):
            twice = next(name for name in names if names.count(name) > 1 or name in self.index)
            raise ConceptError(f"the lens of {twice!r} is loaded already; drop it in the same call to replace it")
        if len(names) > self.num_free + len(holes):
            raise ConfigError(
                f"{len(names)} lenses for {self.num_free + len(holes)} free rows of {self.capacity}; "
                "drop some, or choose a larger capacity"
            )
        before = len(self.names)
        rows = [*holes[: len(names)], *range(before, before + len(names) - len(holes))]
        # Names are replaced, not changed: whoever read a token with the old ones may keep them.
        self.names = [*self.names, *names[len(holes) :]]
        for name in leaving:
            del self.index[name]
        for row, name in zip(rows, names, strict=True):
            self.names[row] = name
            self.index[name] = row
        self._close(holes[len(names) :])
        return rows

    def put(self, names: Sequence[str], rows: Mapping[str, Tensor], *, drop: Iterable[str] = ()) -> None:
        """Lenses come with their rows, in place of those that leave.

        Raises:
            ConceptError, ConfigError: as `claim`.
        """
        at = self.claim(names, drop)
        self.write(at, rows, range(len(at)))

    def drop(self, names: Iterable[str]) -> None:
        """Lenses leave; the last rows close the gaps.

        Raises:
            ConceptError: a lens that is not here, with the nearest names.
        """
        self.claim((), names)

    def take(self, names: Sequence[str], source: "Slots", *, drop: Iterable[str] = ()) -> None:
        """Lenses come from other slots, which keep theirs, over the bus in one copy a tensor.

        Raises:
            ConceptError, ConfigError: as `claim`; or a name that `source` does not have.
        """
        there = find_rows(names, source.index)
        self.write(self.claim(names, drop), source.tensors, there)

    def write(self, at: Sequence[int], source: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Copy some rows of each tensor of `source` to the rows `at`; tensors that it does not have stay."""
        for name, tensor in source.items():
            copy_rows(self.tensors[name], at, tensor, rows)

    def rows(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies of some rows, in that order."""
        at = torch.tensor(find_rows(names, self.index), dtype=torch.long)
        return {name: tensor[at.to(tensor.device)] for name, tensor in self.tensors.items()}

    def populate(self) -> None:
        """Have the system back all rows with memory now: done on first use, that would take longer than a load."""
        for tensor in self.tensors.values():
            populate(tensor)

    def _close(self, holes: Sequence[int]) -> None:
        """Fill gaps from the end, so that the filled rows are a prefix again."""
        if not holes:
            return
        after, gone = len(self.names) - len(holes), set(holes)
        movers = [row for row in range(after, len(self.names)) if row not in gone]
        gaps = [row for row in holes if row < after]
        for tensor in self.tensors.values():
            copy_rows(tensor, gaps, tensor, movers)
        for gap, row in zip(gaps, movers, strict=True):
            self.names[gap] = self.names[row]
            self.index[self.names[row]] = gap
        del self.names[after:]


def row_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of one row of all tensors."""
    return sum(tensor[:1].numel() * tensor.element_size() if len(tensor) else 0 for tensor in tensors.values())


def copy_rows(target: Tensor, at: Sequence[int], source: Tensor, rows: Sequence[int]) -> None:
    """target[at] = source[rows], the two having no row in common."""
    if not rows or not target[0].numel():
        return
    if target.device == source.device and target[0].numel() * target.element_size() >= WIDE_BYTES:
        for to, row in zip(at, rows, strict=True):
            target[to].copy_(source[row])
        return
    chosen = _pick(source, rows, pinned=target.is_cuda and not source.is_cuda, copied=source is target)
    moved = chosen.to(target.device, non_blocking=True)
    first = at[0]
    if list(at) == list(range(first, first + len(rows))):
        target[first : first + len(rows)] = moved
    else:
        target.index_copy_(0, torch.tensor(at, device=target.device), moved.to(target.dtype))


def _pick(source: Tensor, rows: Sequence[int], *, pinned: bool, copied: bool) -> Tensor:
    first = rows[0]
    if not pinned and not copied and list(rows) == list(range(first, first + len(rows))):
        return source[first : first + len(rows)]
    index = torch.tensor(rows, device=source.device)
    if not pinned:
        return source.index_select(0, index)
    # Only from pinned memory does a copy to the device run beside the computation.
    stage = torch.empty(len(rows), *source.shape[1:], dtype=source.dtype, pin_memory=True)
    return torch.index_select(source, 0, index, out=stage)
