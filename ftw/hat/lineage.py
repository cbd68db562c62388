"""Who stands below whom, among the concepts that can be read.

A lens pack may read some concepts of its hierarchy only. Here each hangs below its nearest ancestors that have a lens,
so that no concept is cut off because one above it is not read; one with nothing above it is a root, and nothing could
open it.

Axes: N concepts that are read.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from ftw.errors import ConceptError


class Hierarchy(Protocol):
    """What a lineage asks of a concept pack."""

    def __contains__(self, name: object) -> bool: ...

    def parents(self, name: str) -> Sequence[str]:
        """Direct parents; the first is the parent in the tree."""
        ...


class Lineage:
    """N concepts with their levels and lines of descent.

    Args:
        names: N unique concept names; their order is the order of rows.
        levels: level of each; 0 where it is not said.
        hierarchy: the ontology; None: all concepts are roots, as with labelled data.
    """

    def __init__(self, names: Sequence[str], levels: Mapping[str, int], hierarchy: Hierarchy | None = None) -> None:
        self.names = list(names)
        self.row_of = {name: row for row, name in enumerate(self.names)}
        self.level_N = np.array([levels.get(name, 0) for name in self.names], dtype=np.int64)
        self.parents_of = [self._nearest_read(name, hierarchy) for name in self.names]
        children: list[list[int]] = [[] for _ in self.names]
        for row, parents in enumerate(self.parents_of):
            for parent in parents:
                children[parent].append(row)
        self.children_of = [np.array(rows, dtype=np.int64) for rows in children]
        self.is_root_N = np.array([not parents for parents in self.parents_of], dtype=bool)
        self.num_children_N = np.array([len(rows) for rows in children], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def row(self, name: str) -> int:
        """Row of a concept.

        Raises:
            ConceptError: it is not read; names the nearest.
        """
        if name not in self.row_of:
            folded = {known.casefold(): known for known in self.names}
            near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
            nearest = ", ".join(folded[match] for match in near) or "none"
            raise ConceptError(f"no lens for concept {name!r} among {len(self)}; nearest: {nearest}")
        return self.row_of[name]

    def rows(self, names: Iterable[str]) -> np.ndarray:
        """Rows of some concepts, in their order."""
        return np.array([self.row(name) for name in names], dtype=np.int64)

    def names_of(self, rows: Iterable[int]) -> list[str]:
        """Names of some rows, in their order."""
        return [self.names[row] for row in rows]

    def reach(self, row: int) -> np.ndarray:
        """Everything below a concept along all parents, ascending, without itself."""
        return np.array(sorted(self._walk(row, lambda at: self.children_of[at].tolist())), dtype=np.int64)

    def ancestors(self, row: int) -> set[int]:
        """Everything above a concept along all parents, without itself."""
        return self._walk(row, lambda at: self.parents_of[at])

    def path(self, name: str) -> list[str]:
        """Names from the root to the concept, along tree parents."""
        path = [self.row(name)]
        while (parents := self.parents_of[path[-1]]) and parents[0] not in path:
            path.append(parents[0])
        return self.names_of(reversed(path))

    @cached_property
    def families(self) -> list[list[int]]:
        """Siblings in the tree: rows with the same first parent; the roots are one family."""
        families: dict[int, list[int]] = {}
        for row, parents in enumerate(self.parents_of):
            families.setdefault(parents[0] if parents else -1, []).append(row)
        return list(families.values())

    @cached_property
    def family_N(self) -> np.ndarray:
        """Which of `families` each concept belongs to, int [N]."""
        family_N = np.empty(len(self), dtype=np.int64)
        for number, rows in enumerate(self.families):
            family_N[rows] = number
        return family_N

    def _nearest_read(self, name: str, hierarchy: Hierarchy | None) -> list[int]:
        """Rows of the nearest ancestors that are read, the tree's line first."""
        if hierarchy is None or name not in hierarchy:
            return []
        found: dict[int, None] = {}
        seen, waiting = {name}, list(reversed(hierarchy.parents(name)))
        while waiting:
            parent = waiting.pop()
            if parent in seen:
                continue
            seen.add(parent)
            if parent in self.row_of:
                found[self.row_of[parent]] = None
            elif parent in hierarchy:
                waiting.extend(reversed(hierarchy.parents(parent)))
        return list(found)

    @staticmethod
    def _walk(row: int, step: "Step") -> set[int]:
        reached: set[int] = set()
        waiting = list(step(row))
        while waiting:
            if (at := waiting.pop()) not in reached:
                reached.add(at)
                waiting.extend(step(at))
        return reached - {row}


class Step(Protocol):
    def __call__(self, row: int, /) -> Collection[int]: ...
