"""Timing side by side: what a call takes, what its baseline takes, and what memory allows, all in one run.

The calls of a case are timed in turns, one of each a round, so that whatever else the machine does meets all of them
alike, and none finds in the cache what it left there the round before. Figures are medians over the rounds; what counts
is the ratio. The floor of a case is the time that a plain sum over as many bytes takes: the fastest way known here to
read them.

Axes: R rounds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftw.bench.machine import free_bytes
from ftw.errors import ConfigError
from ftw.hat.pages import empty_rows
from ftw.substrate.model import SubstrateConfig

DEVICES = ("auto", "cpu", "cuda")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS = 2, 5, 2000
PAGE = 4096

Call = Callable[[], object]


@dataclass(kw_only=True)
class BenchConfig:
    """How and how long is measured.

    Attributes:
        seconds: a call of a case, beside its baseline and floor; slow calls take at least five rounds.
        threads: of torch; null leaves torch's own number.
        quick: small sizes, to see that everything runs; figures mean nothing.
        clock: wall, or cpu: processor time of this process, for a machine that others use; with threads=1 that is what
            a call would take if it were alone (but for the caches and the memory, which are still shared).
        device: auto (cuda where there is one), cpu or cuda.
        pack: a lens pack to measure on instead of made-up lenses of First Light's size; `monitor` needs one.
        encyclopedia: collected states for `train` to fit on instead of made-up ones.
        substrate: of `monitor` and `collect`.
        seed: of everything made up.
    """

    seconds: float = 1.0
    threads: int | None = None
    quick: bool = False
    clock: str = "wall"
    device: str = "auto"
    pack: str | None = None
    encyclopedia: str | None = None
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds}: give the time a call is measured for, say 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}: give 1 or more, or null for torch's own number")
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock={self.clock!r}: choose {', '.join(CLOCKS)}")
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device!r}: choose {', '.join(DEVICES)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: milliseconds of it, of its baseline, and of reading its bytes.

    Attributes:
        case: what is done. n: lenses (or files). d: width of what they read; 0 where nothing is read.
        baseline: what it is held against. floor_ms: None where no bytes bound it.
        more: further figures, by name.
    """

    case: str
    n: int
    d: int
    ms: float
    baseline: str
    baseline_ms: float
    floor_ms: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The row as plain data, with its ratios to baseline and floor."""
        floor = self.floor_ms
        return {
            "case": self.case,
            "n": self.n,
            "d": self.d,
            "ms": _rounded(self.ms),
            "baseline": self.baseline,
            "baseline_ms": _rounded(self.baseline_ms),
            "ratio": _rounded(self.ms / self.baseline_ms),
            "floor_ms": None if floor is None else _rounded(floor),
            "over_floor": None if floor is None else _rounded(self.ms / floor),
            **{name: _rounded(value) if isinstance(value, float) else value for name, value in self.more.items()},
        }


class Stopwatch:
    """Times calls on one device; the sizes of a case depend on `quick`.

    Raises:
        ConfigError: cuda where there is none.
    """

    def __init__(self, config: BenchConfig) -> None:
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise ConfigError("device=cuda: torch finds no CUDA device here; use device=cpu")
        self.config = config
        self.device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")

    def size(self, full: int, quick: int) -> int:
        """A size, or the small one of a quick run."""
        return quick if self.config.quick else full

    def fits(self, num_bytes: int) -> bool:
        """Whether a case of so many bytes leaves half of the free memory to others."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free_bytes()
        return free is None or 2 * num_bytes < free

    def times(
        self, calls: Mapping[str, Call], *, rounds: int | None = None, tidy: Call = tuple
    ) -> dict[str, np.ndarray]:
        """Milliseconds of each call, [R], measured in turns.

        Args:
            rounds: how many; None: as many as the seconds of the configuration allow.
            tidy: called after each round, not timed.
        """
        for _ in range(WARM_UP):
            for call in calls.values():
                call()
            tidy()
        found: dict[str, list[float]] = {name: [] for name in calls}
        end, num = time.perf_counter() + self.config.seconds * len(calls), 0
        while (
            num < LEAST_ROUNDS or (time.perf_counter() < end and num < MOST_ROUNDS) if rounds is None else num < rounds
        ):
            for name, call in calls.items():
                found[name].append(self.once(call))
            tidy()
            num += 1
        return {name: np.array(times) for name, times in found.items()}

    def once(self, call: Call) -> float:
        """Milliseconds of one call; on CUDA between two events on the device."""
        if self.device.type != "cuda":
            clock = CLOCKS[self.config.clock]
            start = clock()
            call()
            return 1000 * (clock() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def row(
        self,
        case: str,
        call: Call,
        *,
        n: int,
        d: int,
        baseline: tuple[str, Call],
        num_bytes: int = 0,
        tidy: Call = tuple,
        **more: Any,
    ) -> Row:
        """A case, its baseline and, where bytes are given, its floor, in turns."""
        what, other = baseline
        calls = {"case": call, "baseline": other}
        if num_bytes:
            calls["floor"] = self.reading(num_bytes)
            more["megabytes"] = round(num_bytes / 1e6, 2)
        ms = {name: float(np.median(times)) for name, times in self.times(calls, tidy=tidy).items()}
        times = {"ms": ms["case"], "baseline_ms": ms["baseline"], "floor_ms": ms.get("floor")}
        return Row(case=case, n=n, d=d, baseline=what, more=more, **times)

    def reading(self, num_bytes: int) -> Call:
        """A call that reads so many bytes once: a sum over a buffer of its own, in large pages as a bank's are."""
        buffer = empty_rows(max(1, num_bytes // PAGE), torch.empty(1, PAGE // 4, device=self.device)).zero_()
        return buffer.sum


def interval(times_R: np.ndarray, baseline_R: np.ndarray, *, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the ratio of two medians, by bootstrap over rounds that were measured in turns."""
    random = np.random.default_rng(seed)
    drawn_XR = random.integers(len(times_R), size=(draws, len(times_R)))
    ratios_X = np.median(times_R[drawn_XR], axis=1) / np.median(baseline_R[drawn_XR], axis=1)
    low, high = np.quantile(ratios_X, [0.025, 0.975])
    return float(low), float(high)


def _rounded(value: float) -> float:
    """Four digits: more are noise."""
    return float(f"{value:.4g}")
