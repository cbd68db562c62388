"""Which levels of a lens pack are on this machine and wanted, and which rows of its common tensors are theirs.

A pack of which some levels were fetched keeps its calibration and its text lenses whole: their rows are those of all
lenses, level by level.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftw.errors import PackError
from ftw.map.manifest import installed_levels


@dataclass(frozen=True, kw_only=True)
class InstalledRows:
    """Which rows of a pack's common tensors belong to the lenses that are read.

    Attributes:
        levels: number of lenses on each of them, ascending. rows: their rows among all. total: number of all.
    """

    levels: dict[int, int]
    rows: list[slice]
    total: int

    def of(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Tensors with one row a lens, cut to these rows; `levels` (of quantiles) stays whole.

        Raises:
            PackError: a tensor has another number of rows.
        """
        if sum(self.levels.values()) == self.total:
            return dict(tensors)
        cut = {}
        for name, tensor in tensors.items():
            if name != "levels" and (tensor.ndim == 0 or len(tensor) != self.total):
                raise PackError(f"{where}: tensor {name!r} has not one row for each of {self.total} lenses")
            cut[name] = tensor if name == "levels" else torch.cat([tensor[rows] for rows in self.rows])
        return cut


def installed_rows(folder: Path, info: Mapping[str, Any], levels: Sequence[int] | None = None) -> InstalledRows:
    """The levels of a pack that are here and asked for.

    Raises:
        PackError: a level is asked for that the pack has not, or that was not fetched.
    """
    declared = dict(sorted((int(level), int(num)) for level, num in info["levels"].items()))
    if any(num < 0 for num in declared.values()) or not declared:
        raise PackError(f"pack {folder} declares levels {declared}; fetch the pack again")
    present = installed_levels(folder)
    here = [level for level in declared if present is None or level in present]
    if missing := sorted(set(levels or here) - set(here)):
        words = f"; level {missing[0]} is on the Hub, not here: ftw pack pull" if missing[0] in declared else ""
        raise PackError(f"pack {info['pack_id']!r} has no level {missing[0]} here; its levels are {here}{words}")
    wanted = {level: declared[level] for level in here if levels is None or level in levels}
    if not wanted:
        raise PackError(f"pack {info['pack_id']!r}: no level was asked for; its levels are {here}")
    starts = dict(zip(declared, itertools.accumulate(declared.values(), initial=0), strict=False))
    rows = [slice(starts[level], starts[level] + num) for level, num in wanted.items()]
    return InstalledRows(levels=wanted, rows=rows, total=sum(declared.values()))
