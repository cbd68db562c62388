"""Graduation: a concept gets more samples until its lens passes on text of another make, and no more than that.

1. Round r gives every concept that has not graduated `sizes[r]` positives. Texts that others brought count first: they
   are in the pool at no cost. All texts of the pool are negatives for whom they are marked so.
2. One closed-form fit a round serves all lenses; each is judged on validation texts of another construction than the
   training texts (articles against glosses), never on folds of its own.
3. A lens passes in round r when its validation AUROC reaches `tiers[r]`: strict at first, then more lenient, so that
   nobody is chased forever. Its samples are then frozen (they still serve the others as negatives).
4. A lens that grew without gaining `min_gain` is stuck. It escalates: in the next round its siblings grow with it,
   because their positives are its hardest negatives. Stuck `patience` times in a row, it stops.
5. Growth ends when all have stopped, the sizes are used up, or the pool holds `max_texts` (the concepts that read worst
   are served first).

The final lenses are those of the last fit, on the whole pool. Texts of the pool are the cost: each is one pass of the
substrate, which takes far longer than all fits.

Axes: S texts of the pool, s texts of one round, V validation texts, N concepts, L layers, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.store import LensStack
from ftw.map.metrics import auroc
from ftw.map.training.solver import solve_stack
from ftw.map.training.sparse import Marks, SparsePool

GRADUATED, STUCK, EXHAUSTED, BUDGET, ROUNDS = "graduated", "stuck", "exhausted", "budget", "rounds"


@dataclass(kw_only=True)
class GraduationConfig:
    """When a lens has seen enough.

    Attributes:
        sizes: positives of a concept in each round, rising.
        tiers: validation AUROC that passes in each round, falling; the last holds for further rounds.
        tier_names: of the tiers. grades: validation AUROC from which on a lens is graded A, B; below is C.
        min_gain: AUROC that a round must bring. patience: rounds in a row without it, after which a lens stops.
        max_texts: of the pool; 0 for no bound. shrinkage: of the fits, in texts. seed: of the order of samples.
    """

    sizes: list[int] = field(default_factory=lambda: [10, 30, 60, 90])
    tiers: list[float] = field(default_factory=lambda: [0.97, 0.95, 0.93, 0.90])
    tier_names: list[str] = field(default_factory=lambda: ["strict", "high", "medium", "relaxed"])
    grades: list[float] = field(default_factory=lambda: [0.98, 0.90])
    min_gain: float = 0.002
    patience: int = 2
    max_texts: int = 0
    shrinkage: float = 50.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or sorted(set(self.sizes)) != self.sizes:
            raise ConfigError(f"graduation: sizes={self.sizes} must rise from 1 or more, as in [10, 30, 60, 90]")
        for name in ("tiers", "grades"):
            values = getattr(self, name)
            if not values or sorted(values, reverse=True) != values or not all(0.5 <= value <= 1 for value in values):
                raise ConfigError(f"graduation: {name}={values} must fall and lie between 0.5 and 1")
        if len(self.tier_names) != len(self.tiers):
            raise ConfigError(f"graduation: {len(self.tier_names)} tier_names for {len(self.tiers)} tiers")
        if self.patience < 1 or self.max_texts < 0 or self.shrinkage < 0:
            raise ConfigError("graduation: patience must be 1 or more, max_texts and shrinkage 0 or more")


@dataclass(frozen=True)
class Validation:
    """Texts of another make than the training texts, in the order of the pool's layers and concepts.

    Attributes:
        states_VLD: layer-normed. labels_VN, weights_VN: marks (weight 0: not used).
    """

    states_VLD: Tensor
    labels_VN: np.ndarray
    weights_VN: np.ndarray

    def __post_init__(self) -> None:
        num, marks = len(self.states_VLD), self.labels_VN.shape
        if not num or marks != self.weights_VN.shape or marks[0] != num:
            raise DataError(f"validation: {num} states, labels {marks} and weights {self.weights_VN.shape} do not fit")

    def auroc(self, stack: LensStack) -> np.ndarray:
        """Of every lens, [N]; NaN where the texts have one class."""
        return auroc(stack.bank().logits(self.states_VLD).numpy(), self.labels_VN, self.weights_VN)


@dataclass
class Record:
    """How one concept went: rounds with positives and validation AUROC, and how it ended.

    Attributes:
        state: graduated, stuck, exhausted (no texts left), budget, rounds (sizes used up), or "" while it grows.
        tier: name of the tier it passed; "" if it did not. grade: A, B or C by its last AUROC; "" without one.
        num_positive: positives in the pool. auroc: on validation texts, at the end.
    """

    rounds: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""
    tier: str = ""
    grade: str = ""
    num_positive: int = 0
    auroc: float = float("nan")


@dataclass
class Graduation:
    """The lenses of the last fit, what every concept went through, and which texts of the pool were used."""

    stack: LensStack
    records: dict[str, Record]
    used_S: np.ndarray
    texts_by_round: list[int]

    @property
    def num_texts(self) -> int:
        """Texts that had to be collected: the cost."""
        return int(self.used_S.sum())

    def add_to(self, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """A pack's metrics with each concept's record under "graduation"."""
        result = {name: dict(figures) for name, figures in metrics.items()}
        for name, record in self.records.items():
            plain = asdict(record) | {"auroc": None if np.isnan(record.auroc) else record.auroc}
            result.setdefault(name, {})["graduation"] = plain
        return result


def graduate(
    pool: SparsePool,
    validation: Validation,
    config: GraduationConfig | None = None,
    *,
    siblings: Mapping[str, Sequence[str]] | None = None,
    step: Callable[[int, int], None] = lambda round_number, num_texts: None,
) -> Graduation:
    """Grow the samples of every concept until its lens passes on the validation texts.

    Args:
        pool: all samples there are. siblings: of each concept, which grow with it when it is stuck.
        step: told the round and the texts of the pool before each fit.

    Raises:
        DataError: validation marks of another number of concepts than the pool's.
    """
    config = config or GraduationConfig()
    if validation.labels_VN.shape[1] != len(pool.names):
        raise DataError(f"validation marks {validation.labels_VN.shape[1]} concepts, the pool {len(pool.names)}")
    growth = _Growth(pool, config, siblings or {})
    stack, texts_by_round = None, []
    for number, size in enumerate(config.sizes):
        if number == 0:
            growth.start(size)
        elif not growth.grow(size):
            break
        step(number, int(growth.used_S.sum()))
        texts_by_round.append(int(growth.used_S.sum()))
        stack = solve_stack(subset(pool, growth.used_S), shrinkage=config.shrinkage, progress=False)
        growth.judge(number, validation.auroc(stack))
    assert stack is not None  # sizes are not empty
    return Graduation(stack, growth.finished(), growth.used_S, texts_by_round)


def fixed(pool: SparsePool, size: int, config: GraduationConfig | None = None) -> np.ndarray:
    """Texts of a pool in which every concept has `size` positives, as the first round of graduation would take them."""
    growth = _Growth(pool, config or GraduationConfig(), {})
    growth.start(size)
    return growth.used_S


def subset(pool: SparsePool, used_S: np.ndarray) -> SparsePool:
    """The pool of some of its texts, with the marks that they have."""
    marks = pool.marks
    kept_E = used_S[marks.rows_E]
    lens_E = np.repeat(np.arange(marks.num_lenses), marks.counts_N)
    place_S = np.cumsum(used_S) - 1
    starts_N = np.concatenate([[0], np.cumsum(np.bincount(lens_E[kept_E], minlength=marks.num_lenses))])
    return replace(
        pool,
        states_SLD=pool.states_SLD[used_S],
        marks=Marks(
            rows_E=place_S[marks.rows_E[kept_E]].astype(np.int32),
            positive_E=marks.positive_E[kept_E],
            weights_E=marks.weights_E[kept_E],
            starts_N=starts_N.astype(np.int64),
        ),
        fold_starts_K=np.concatenate([[0], np.cumsum(used_S)])[pool.fold_starts_K],
    )


class _Growth:
    """Which texts are in the pool, and where every concept stands."""

    def __init__(self, pool: SparsePool, config: GraduationConfig, siblings: Mapping[str, Sequence[str]]) -> None:
        self.config, self.names = config, pool.names
        place = {name: column for column, name in enumerate(pool.names)}
        self.siblings = [[place[each] for each in siblings.get(name, ()) if each in place] for name in pool.names]
        marks, self.queue = pool.marks, []
        self.positive_texts: list[np.ndarray] = []
        for lens in range(marks.num_lenses):
            span = slice(marks.starts_N[lens], marks.starts_N[lens + 1])
            texts = marks.rows_E[span][marks.positive_E[span]]
            self.positive_texts.append(texts)
            self.queue.append(np.random.default_rng([config.seed, lens]).permutation(texts))
        owned_S = np.zeros(len(pool.states_SLD), dtype=bool)
        for texts in self.positive_texts:
            owned_S[texts] = True
        # Texts about none of the concepts come in proportion to the positives, in an order of their own.
        self.neutral = np.random.default_rng([config.seed, marks.num_lenses]).permutation(np.flatnonzero(~owned_S))
        self.owned = int(owned_S.sum())
        self.used_S = np.zeros(len(pool.states_SLD), dtype=bool)
        self.records = {name: Record() for name in pool.names}
        self.stuck_N = np.zeros(len(pool.names), dtype=int)

    def start(self, size: int) -> None:
        """Round 0: every concept gets its positives, those with the fewest first, whose texts serve their ancestors."""
        self._bring(dict.fromkeys(sorted(range(len(self.names)), key=lambda n: len(self.queue[n])), size))

    def grow(self, size: int) -> bool:
        """A further round for those that have not stopped, the worst read first; False where nobody can grow."""
        growing = [lens for lens, name in enumerate(self.names) if not self.records[name].state]
        # A lens without validation figure has nothing to pass: it stays as small as it is.
        growing.sort(key=lambda lens: self.records[self.names[lens]].auroc)
        wanted: dict[int, int] = {}
        for lens in growing:
            for each in [lens, *(self.siblings[lens] if self.stuck_N[lens] else [])]:
                wanted.setdefault(each, size)
        before = int(self.used_S.sum())
        self._bring(wanted)
        return int(self.used_S.sum()) > before

    def _bring(self, wanted: Mapping[int, int]) -> None:
        """Take texts into the pool until each of these concepts has its number of positives, or there is no room."""
        limit = self.config.max_texts or len(self.used_S)
        for lens, size in wanted.items():
            lacking = size - int(self.used_S[self.positive_texts[lens]].sum())
            fresh = [text for text in self.queue[lens] if not self.used_S[text]][: max(0, lacking)]
            room = max(0, limit - int(self.used_S.sum()))
            self.used_S[np.array(fresh[:room], dtype=np.int64)] = True
            record = self.records[self.names[lens]]
            if lacking > 0 and not record.state and record.rounds:
                record.state = BUDGET if len(fresh) > room else EXHAUSTED if not fresh else ""
        share = (self.used_S.sum() - self.used_S[self.neutral].sum()) / max(1, self.owned)
        room = max(0, limit - int(self.used_S.sum()) + int(self.used_S[self.neutral].sum()))
        self.used_S[self.neutral[: min(room, int(share * len(self.neutral)))]] = True

    def judge(self, number: int, auroc_N: np.ndarray) -> None:
        """Enter the round into the records: who passed, who is stuck, who goes on."""
        tier = min(number, len(self.config.tiers) - 1)
        for lens, name in enumerate(self.names):
            record, now = self.records[name], float(auroc_N[lens])
            was = record.auroc
            record.auroc = now
            record.num_positive = int(self.used_S[self.positive_texts[lens]].sum())
            if record.state:
                continue
            record.rounds.append({"num_positive": record.num_positive, "auroc": now if np.isfinite(now) else None})
            if not np.isfinite(now):
                record.state = EXHAUSTED
            elif now >= self.config.tiers[tier]:
                record.state, record.tier = GRADUATED, self.config.tier_names[tier]
            elif len(record.rounds) > 1:
                self.stuck_N[lens] = self.stuck_N[lens] + 1 if now < was + self.config.min_gain else 0
                if self.stuck_N[lens] >= self.config.patience:
                    record.state = STUCK

    def finished(self) -> dict[str, Record]:
        """The records with grades; who was still growing has used up the rounds."""
        for record in self.records.values():
            record.state = record.state or ROUNDS
            if np.isfinite(record.auroc):
                better = sum(record.auroc < limit for limit in self.config.grades)
                record.grade = "ABCDEF"[min(better, 5)]
        return self.records
