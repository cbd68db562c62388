"""The loop: judge the concepts, refine those that it doubts most, judge again, until it is enough.

What a cycle refines is on disk before it is refined, and every step leaves the same bytes however often it was stopped;
so an interrupted and resumed run ends like one that ran through. The time used is kept too: a budget spans resumptions.

Axes: N concepts.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftw.errors import ConfigError, EncyclopediaError
from ftw.map.growing.choose import most_doubtful
from ftw.map.growing.contexts import templates_left
from ftw.map.growing.judge import Judge, judge
from ftw.map.growing.rounds import add_judging, finish_pending, refine
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.growing.writing import WritingConfig
from ftw.paths import replace_file
from ftw.substrate.model import Substrate

LEDGER = "grow.json"


@dataclass(kw_only=True)
class GrowConfig:
    """How far and in what steps an encyclopedia grows.

    Attributes:
        budget_minutes: of all runs together; the step in hand is finished.
        target: mean confidence that is enough; what is refined first is said by the judge's doubt, not by it.
        cycles: at most so many refinements. share: of the concepts that are refined in each.
        contexts: texts a concept gets in each. highest_stage: beyond which no concept goes.
    """

    budget_minutes: float = 30.0
    target: float = 0.95
    cycles: int = 20
    share: float = 0.2
    contexts: int = 5
    highest_stage: int = 2

    def check(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if self.budget_minutes <= 0 or not 0 < self.target <= 1 or not 0 < self.share <= 1:
            raise ConfigError(
                f"grow: budget_minutes={self.budget_minutes} must be above 0, target={self.target} and "
                f"share={self.share} above 0 and at most 1"
            )
        if self.cycles < 0 or self.contexts < 1 or not 1 <= self.highest_stage <= 3:
            raise ConfigError(
                f"grow: cycles={self.cycles} must be 0 or more, contexts={self.contexts} 1 or more, "
                f"highest_stage={self.highest_stage} 1 to 3"
            )


@dataclass
class Ledger:
    """What was decided so far: for each cycle the mean confidence, and the refinements with their first round."""

    seconds: float = 0.0
    cycles: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """The ledger of an encyclopedia; an empty one where there is none."""
        path = folder / LEDGER
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(float(found["seconds"]), [dict(cycle) for cycle in found["cycles"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EncyclopediaError(f"{path} is damaged ({error}); delete it to begin counting anew") from error

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        with replace_file(folder / LEDGER) as temporary:
            temporary.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n", encoding="utf-8")


def grow(
    growing: GrowingEncyclopedia,
    substrate: Substrate,
    by: Judge,
    config: GrowConfig,
    *,
    seed: int = 0,
    writing: WritingConfig | None = None,
    tell: Callable[[str], None] = lambda words: None,
    progress: bool = True,
) -> Ledger:
    """Judge and refine until the target, the number of cycles or the budget is reached.

    Args:
        by: says how certain each concept is (`ftw.map.growing.judge`). tell: called with a line after each step.

    Raises:
        EncyclopediaError: another substrate. DiskFullError: no room; all that is finished stays.
    """
    config.check()
    growing.check_substrate(substrate)
    ledger = Ledger.load(growing.folder)
    clock = _Clock(ledger, growing.folder)
    while True:
        if ledger.cycles:
            _refine_cycle(growing, substrate, ledger.cycles[-1], config, seed + len(ledger.cycles), writing, progress)
            clock.stop()
        else:
            finish_pending(growing, substrate, progress=progress)
        add_judging(growing, substrate, seed=seed, progress=progress)
        if growing.judged.get("round") != growing.num_rounds:
            judge(growing, by, seed)
            clock.stop()
        sure = float(np.nanmean(growing.confidence))
        samples = int(growing.num_samples.sum())
        tell(
            f"{len(ledger.cycles)} refinements, {samples:,} samples: mean confidence {sure:.3f}, {ledger.seconds:.0f} s"
        )
        spent = ledger.seconds >= 60 * config.budget_minutes
        if sure >= config.target or len(ledger.cycles) >= config.cycles or spent:
            return ledger
        open_N = _open(growing, config.highest_stage)
        if not open_N.any():
            tell("every concept has had all its templates; grow.highest_stage=2 lets the substrate write more")
            return ledger
        num = max(1, round(config.share * len(growing)))
        chosen = most_doubtful(np.where(open_N, growing.doubt, -np.inf), min(num, int(open_N.sum())))
        ledger.cycles.append(
            {"confidence": round(sure, 6), "samples": samples, "plans": _plans(growing, chosen, config)}
        )
        ledger.cycles[-1]["first_round"] = growing.num_rounds
        clock.stop()


def _open(growing: GrowingEncyclopedia, highest_stage: int) -> np.ndarray:
    """Which concepts can get another text: there are so many templates and no more, the later stages write theirs."""
    if highest_stage > 1:
        return np.ones(len(growing), dtype=bool)
    return templates_left(growing) > 0


def _plans(growing: GrowingEncyclopedia, chosen: list[int], config: GrowConfig) -> list[dict[str, Any]]:
    """The chosen concepts by the stage that each goes to next."""
    following = np.minimum(growing.stage[chosen] + 1, config.highest_stage)
    return [
        {"stage": int(stage), "concepts": [index for index, to in zip(chosen, following, strict=True) if to == stage]}
        for stage in np.unique(following)
    ]


def _refine_cycle(
    growing: GrowingEncyclopedia,
    substrate: Substrate,
    cycle: dict[str, Any],
    config: GrowConfig,
    seed: int,
    writing: WritingConfig | None,
    progress: bool,
) -> None:
    """Those refinements of a cycle that are not there yet."""
    for place, plan in enumerate(cycle["plans"]):
        if growing.num_rounds <= cycle["first_round"] + place:
            options = {"contexts": config.contexts, "seed": seed, "writing": writing, "progress": progress}
            refine(growing, substrate, plan["concepts"], plan["stage"], **options)


class _Clock:
    """Adds the time since the last stop to a ledger."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger, self._folder, self._since = ledger, folder, time.monotonic()

    def stop(self) -> None:
        now = time.monotonic()
        self._ledger.seconds = round(self._ledger.seconds + now - self._since, 3)
        self._since = now
        self._ledger.save(self._folder)
