"""The aperture: which concepts are read now, and which of them are shown.

Base levels and the watch list are read at every tick. A parent that is among the strongest *and* above a threshold
opens: its children are read too, all of them, since a child means little without its siblings. In one tick this goes on
from the opened children, `max_depth` steps down, `beam` parents a step. A family stays open while its parent holds
above a lower threshold and somebody in it is among the strongest; after a cool-down it closes.

The aperture holds no lens: it asks for scores of rows. A loader answers by bringing lenses in; where all lenses are
resident the same aperture is a view over scores that are already there, and its decisions are the same.

Axes: N concepts, K kinds of lens (activation, text), M rows asked for.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftw.errors import ConfigError
from ftw.hat.lineage import Lineage

# Scores of some rows, [K, M] in [0, 1]; NaN where a lens does not exist, failed to load or could not read.
Score = Callable[[np.ndarray], np.ndarray]
Drop = Callable[[np.ndarray], None]


@dataclass(kw_only=True)
class ApertureConfig:
    """How wide the aperture opens.

    Attributes:
        base_levels: levels of the hierarchy that are always read (levels, not layers of the substrate), beside concepts
            that have no parent with a lens and so could be opened by nobody.
        keep_top_k: strongest concepts of *each* kind that are shown, and among which a parent must be to open.
        load_threshold: score at which a parent opens. unload_threshold: score below which its family cools down.
        cooldown_ticks: ticks that a family may cool before it closes; 0 closes it at once.
        max_depth: steps down in one tick. beam: parents opened in one step.
        max_loaded: concepts read at the same time at most, the base included; 0 for no limit.
        watch: concepts read always, with everything below them.
    """

    base_levels: list[int] = field(default_factory=lambda: [0])
    keep_top_k: int = 200
    load_threshold: float = 0.3
    unload_threshold: float = 0.1
    cooldown_ticks: int = 10
    max_depth: int = 5
    beam: int = 10
    max_loaded: int = 1000
    watch: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            ConfigError: naming the key, its value and its limit.
        """
        for name, least in (("keep_top_k", 1), ("max_depth", 0), ("beam", 1), ("cooldown_ticks", 0), ("max_loaded", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"aperture: {name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.unload_threshold <= self.load_threshold <= 1:
            raise ConfigError(
                f"aperture: unload_threshold={self.unload_threshold} and load_threshold={self.load_threshold} must "
                "rise within [0, 1], or families would open and close at every token"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What one tick decided; rows ascending where nothing else is said.

    Attributes:
        to_load: rows read now that were not before. to_unload: rows read before that are not now.
        visible: rows shown of each kind, strongest first.
        values_KN: scores; NaN where not read. opened, closed: parents. likely: rows that may be wanted next.
        num_refused: parents that passed but had no room below `max_loaded`.
    """

    to_load: np.ndarray
    to_unload: np.ndarray
    visible: list[np.ndarray]
    values_KN: np.ndarray
    opened: list[int]
    closed: list[int]
    likely: np.ndarray
    num_refused: int


class Aperture:
    """Decides tick by tick; holds which parents are open and nothing else.

    Args:
        admitted: names that may be read at all (a deployment's); None: all. A watched one is read in any case.
        required: names that are always read, as a deployment may ask; without what is below them.
        static: nothing opens or closes; everything admitted is read always.

    Raises:
        ConfigError: values that cannot be, a base level that no concept has, or a base larger than `max_loaded`.
        ConceptError: an unknown concept on the watch list, with the nearest names.
    """

    def __init__(
        self,
        lineage: Lineage,
        config: ApertureConfig,
        *,
        admitted: Collection[str] | None = None,
        required: Collection[str] = (),
        static: bool = False,
    ) -> None:
        config.check()
        self.lineage, self.config = lineage, config
        levels = set(lineage.level_N.tolist())
        if unknown := [level for level in config.base_levels if level not in levels]:
            raise ConfigError(
                f"aperture: base_levels={config.base_levels}: no lens is on level {unknown[0]}; "
                f"there are {sorted(levels)}"
            )
        self.admitted_N = np.ones(len(lineage), dtype=bool)
        if admitted is not None:
            self.admitted_N[:] = [name in admitted for name in lineage.names]
        self.watched_N = self._watched()
        self.admitted_N |= self.watched_N
        self.base_N = self.admitted_N & self._base(required, static)
        limit, num_base = config.max_loaded, int(self.base_N.sum())
        if limit and num_base > limit:
            raise ConfigError(
                f"aperture: max_loaded={limit} is less than the {num_base} concepts of base levels "
                f"{config.base_levels} and the watch list; the smallest workable value is {num_base}"
            )
        # Children that may be read, by parent; a parent without one cannot open.
        self._below = [rows[self.admitted_N[rows]] for rows in lineage.children_of]
        self._has_below_N = np.array([len(rows) > 0 for rows in self._below], dtype=bool) & (not static)
        self.reset()

    def reset(self) -> None:
        """Close everything: back to the base."""
        self._age: dict[int, int] = {}  # open parents, and for how many ticks they have been cooling
        self._pinned: set[int] = set()
        self._held: dict[int, int] = {}  # closed on request, and until which tick
        self._uses_N = np.zeros(len(self.lineage), dtype=np.int64)  # open parents above each concept
        self._tick = 0

    @property
    def scored_N(self) -> np.ndarray:
        """What is read now, bool [N]."""
        return self.base_N | (self._uses_N > 0)

    @property
    def open_parents(self) -> list[int]:
        """Rows of the parents that are open."""
        return list(self._age)

    def step(self, score: Score, drop: Drop = lambda _: None) -> Decision:
        """One tick: read what is read now, open what passes, close what has cooled.

        Args:
            score: scores of rows; called once for what is read already, and once for each step down.
            drop: told rows that will not be asked for again until they are opened anew.
        """
        self._tick += 1
        before_N = self.scored_N
        rows = np.flatnonzero(before_N)
        first_KM = score(rows)
        values_KN = np.full((len(first_KM), len(self.lineage)), np.nan)
        values_KN[:, rows] = first_KM
        opened, refused, closed = list[int](), set[int](), list[int]()
        for _ in range(self.config.max_depth):
            new, room = self._openings(values_KN, refused)
            closed += self._make_room(room, values_KN, drop)
            fresh = self._open(new, refused)
            opened += [parent for parent in new if parent in self._age]
            if not len(fresh):
                break
            values_KN[:, fresh] = score(fresh)
        closed += self._cool(values_KN, drop)
        after_N = self.scored_N
        values_KN[:, ~after_N] = np.nan
        return Decision(
            to_load=np.flatnonzero(after_N & ~before_N),
            to_unload=np.flatnonzero(before_N & ~after_N),
            visible=[self._visible(values_N) for values_N in values_KN],
            values_KN=values_KN,
            opened=[parent for parent in opened if parent in self._age],
            closed=closed,
            likely=self._likely(values_KN),
            num_refused=len(refused),
        )

    def open(self, row: int) -> np.ndarray:
        """Open a concept on request and keep it so until `close`; returns rows that are read from now on.

        Raises:
            ConfigError: no room below `max_loaded`.
        """
        self._held.pop(row, None)
        refused = set[int]()
        lineage_above = [row] if self.scored_N[row] else [*self._line_to(row), row]
        fresh = [self._open([parent], refused) for parent in lineage_above]
        self._pinned.update(parent for parent in lineage_above if parent in self._age)
        if refused:
            raise ConfigError(
                f"no room to open {self.lineage.names[row]!r}: {int(self.scored_N.sum())} concepts are read of at most "
                f"max_loaded={self.config.max_loaded}; close one first"
            )
        return np.unique(np.concatenate(fresh)) if fresh else np.array([], dtype=np.int64)

    def close(self, row: int) -> np.ndarray:
        """Close a concept on request, for at least a cool-down; returns rows that are read no more."""
        before_N = self.scored_N
        self._pinned.discard(row)
        self._held[row] = self._tick + max(1, self.config.cooldown_ticks)
        self._close([row] if row in self._age else [])
        return np.flatnonzero(before_N & ~self.scored_N)

    # --- what is always read ---------------------------------------------------------------------------------------

    def _watched(self) -> np.ndarray:
        watched_N = np.zeros(len(self.lineage), dtype=bool)
        for row in self.lineage.rows(self.config.watch):
            watched_N[row] = True
            watched_N[self.lineage.reach(row)] = True
        return watched_N

    def _base(self, required: Collection[str], static: bool) -> np.ndarray:
        lineage = self.lineage
        if static:
            return self.admitted_N
        # One with nothing admitted above it could be opened by nobody.
        orphan_N = np.array([not any(self.admitted_N[up] for up in above) for above in lineage.parents_of], dtype=bool)
        kept_N = self.watched_N.copy()
        kept_N[lineage.rows(required)] = True
        base_N = np.isin(lineage.level_N, self.config.base_levels) | kept_N | lineage.is_root_N | orphan_N
        for row in np.flatnonzero(kept_N):  # ranked among its siblings, or it would mean little
            base_N[lineage.families[lineage.family_N[row]]] = True
        return base_N

    # --- opening and closing -----------------------------------------------------------------------------------------

    def _openings(self, values_KN: np.ndarray, refused: Collection[int]) -> tuple[list[int], int]:
        """Parents to open in this step, strongest first, and how many rows are needed for them."""
        best_N = strongest_kind(values_KN)
        passes_N = self._among_top(values_KN) & (best_N >= self.config.load_threshold) & self._has_below_N
        rows = [
            row
            for row in np.flatnonzero(passes_N).tolist()
            if row not in self._age and row not in refused and self._held.get(row, 0) < self._tick
        ]
        chosen = sorted(rows, key=lambda row: (-best_N[row], row))[: self.config.beam]
        fresh = {child for parent in chosen for child in self._below[parent].tolist()}
        return chosen, int((~self.scored_N[list(fresh)]).sum()) if fresh else 0

    def _open(self, parents: Sequence[int], refused: set[int]) -> np.ndarray:
        """Open parents as far as there is room; returns rows that nobody read before."""
        before_N = self.scored_N
        num, limit = int(before_N.sum()), self.config.max_loaded
        for parent in parents:
            if parent in self._age or not (self.base_N[parent] or self._uses_N[parent]):
                continue  # open already, or what it stands under has just made room
            below = self._below[parent]
            num_new = int((~self.base_N[below] & (self._uses_N[below] == 0)).sum())
            if limit and num + num_new > limit:
                refused.add(parent)
                continue
            self._age[parent] = 0
            self._uses_N[below] += 1
            num += num_new
        return np.flatnonzero(self.scored_N & ~before_N)

    def _close(self, parents: Sequence[int]) -> list[int]:
        """Close parents, and those that are read only because of them."""
        closed, waiting = [], list(parents)
        while waiting:
            parent = waiting.pop()
            if parent not in self._age:
                continue
            del self._age[parent]
            self._pinned.discard(parent)
            below = self._below[parent]
            self._uses_N[below] -= 1
            closed.append(parent)
            waiting += below[~self.base_N[below] & (self._uses_N[below] == 0)].tolist()
        return closed

    def _make_room(self, num_rows: int, values_KN: np.ndarray, drop: Drop) -> list[int]:
        """Close the families that have cooled longest until `num_rows` more fit; none that is strong now."""
        limit, closed, before_N = self.config.max_loaded, list[int](), self.scored_N
        if not limit or int(before_N.sum()) + num_rows <= limit:
            return closed
        cooling = sorted((p for p in self._age if self._age[p] and p not in self._pinned), key=lambda p: -self._age[p])
        for parent in cooling:
            if int(self.scored_N.sum()) + num_rows <= limit:
                break
            closed += self._close([parent])
        self._forget(before_N, values_KN, drop)
        return closed

    def _cool(self, values_KN: np.ndarray, drop: Drop) -> list[int]:
        """Age the families that nothing speaks for, and close those that have cooled long enough."""
        best_N, top_N = strongest_kind(values_KN), self._among_top(values_KN)
        over, before_N, parents_of = list[int](), self.scored_N, self.lineage.parents_of
        above_top = {parent for row in np.flatnonzero(top_N).tolist() for parent in parents_of[row]}
        open_parents = list(self._age)
        best = best_N[open_parents].tolist()
        for parent, value, is_top in zip(open_parents, best, top_N[open_parents].tolist(), strict=True):
            if value != value or parent in self._pinned:
                continue  # a missing reading says nothing
            alive = value >= self.config.unload_threshold and (is_top or parent in above_top)
            self._age[parent] = 0 if alive else self._age[parent] + 1
            if self._age[parent] > self.config.cooldown_ticks:
                over.append(parent)
        closed = self._close(over)
        self._forget(before_N, values_KN, drop)
        return closed

    def _forget(self, before_N: np.ndarray, values_KN: np.ndarray, drop: Drop) -> None:
        gone = np.flatnonzero(before_N & ~self.scored_N)
        if len(gone):
            values_KN[:, gone] = np.nan
            drop(gone)

    def _line_to(self, row: int) -> list[int]:
        """Tree parents from the first one that is read down to the concept's own."""
        line: list[int] = []
        while (parents := self.lineage.parents_of[row]) and parents[0] not in line:
            line.append(parents[0])
            if self.scored_N[parents[0]]:
                break
            row = parents[0]
        return line[::-1]

    # --- what is shown ---------------------------------------------------------------------------------------------

    def _among_top(self, values_KN: np.ndarray) -> np.ndarray:
        """Among the strongest `keep_top_k` of some kind, bool [N]."""
        top_N = np.zeros(len(self.lineage), dtype=bool)
        for values_N in values_KN:
            top_N[strongest(values_N, self.config.keep_top_k)] = True
        return top_N

    def _visible(self, values_N: np.ndarray) -> np.ndarray:
        shown_N = self.watched_N.copy()
        shown_N[strongest(values_N, self.config.keep_top_k)] = True
        shown_N[list(self._age)] = True
        rows = np.flatnonzero(shown_N & ~np.isnan(values_N))
        return rows[np.argsort(-values_N[rows], kind="stable")]

    def _likely(self, values_KN: np.ndarray) -> np.ndarray:
        """Children of closed parents between both thresholds: the next to open if they grow."""
        best_N = strongest_kind(values_KN)
        near_N = (best_N >= self.config.unload_threshold) & self._has_below_N
        near_N[list(self._age)] = False
        near = np.flatnonzero(near_N)
        near = near[np.argsort(-best_N[near], kind="stable")][: self.config.beam]
        rows = np.unique(np.concatenate([self._below[row] for row in near])) if len(near) else near
        return rows[~self.scored_N[rows]]


def strongest(values_N: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k largest values, NaN left out; among equal ones the first rows."""
    there = np.flatnonzero(~np.isnan(values_N))
    if len(there) <= k:
        return there
    values = values_N[there]
    floor = np.partition(values, len(values) - k)[len(values) - k]
    above = there[values > floor]
    return np.concatenate([above, there[values == floor][: k - len(above)]])


def strongest_kind(values_KN: np.ndarray) -> np.ndarray:
    """Larger of the kinds' scores, NaN where no kind has one: a branch opens when either side passes."""
    return np.fmax.reduce(values_KN, axis=0)
