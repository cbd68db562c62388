"""Where lenses live when there are too many for memory: hot, warm, tepid, cold.

Hot lenses are in the bank that reads; warm ones wait on the same device, tepid ones in memory (pinned if the device is
a GPU), cold ones in the files of the pack. Each tier is `Slots` under a byte budget. A lens that is asked for is
brought from the nearest tier, in one batch a tier; what is likely next is read ahead by a thread of its own. A lens
that cannot be read is missing, and counted: the reading goes on without it.

Axes: N all lenses, B states, L layers, D model width, M lenses asked for.
"""

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError
from ftw.hat.bank import normalise
from ftw.hat.cold import ColdLenses
from ftw.hat.lens import find_rows
from ftw.hat.slots import Slots

MB = 2**20
IDLE_TOKENS = 2  # for so long a lens that was dropped is read on: many come back, and a move costs as much as a reading
BATCH_LENSES = 16  # read ahead at once: the bank never waits longer than for one batch


@dataclass(kw_only=True)
class ShelfConfig:
    """Budgets of the tiers.

    Attributes:
        hot_mb: of the bank that reads. warm_mb: of lenses waiting on the device (worth it on a GPU; 0: none).
        tepid_mb: of lenses in memory (0: none; the system keeps read files in memory as well).
        precision: of the weights: float32, bfloat16, float16 or int8.
        device: of the bank. prefetch: read ahead in a thread.
    """

    hot_mb: float = 512.0
    warm_mb: float = 0.0
    tepid_mb: float = 0.0
    precision: str = "float32"
    device: str = "cpu"
    prefetch: bool = True


@dataclass(kw_only=True)
class ShelfStatistics:
    """What happened since the shelf was opened.

    Attributes:
        hits, misses: lenses asked for that were hot, and that were not.
        warm_hits, tepid_hits, cold_loads: where the missed ones came from. prefetched: read ahead into memory.
        evictions: lenses that left the bank. failed: that could not be read.
        bytes_moved: into the bank. stalls, stall_ms: waits for the reading-ahead thread.
        load_ms: time spent bringing lenses.
    """

    hits: int = 0
    misses: int = 0
    warm_hits: int = 0
    tepid_hits: int = 0
    cold_loads: int = 0
    prefetched: int = 0
    evictions: int = 0
    failed: int = 0
    bytes_moved: int = 0
    stalls: int = 0
    stall_ms: float = 0.0
    load_ms: float = 0.0


class Shelf:
    """All lenses of a pack within a budget of memory; a context manager, or `close` it.

    Args:
        cold: the lenses on disk. config: budgets.
        always: lenses that never leave the bank.

    Raises:
        ConfigError: a budget that holds no lens, or not those of `always`; says the smallest workable one.
        ConceptError: a name of `always` without a lens.
    """

    def __init__(self, cold: ColdLenses, config: ShelfConfig | None = None, *, always: Sequence[str] = ()) -> None:
        config = config or ShelfConfig()
        self.config, self.cold, self.always = config, cold, list(dict.fromkeys(always))
        find_rows(self.always, cold.index)
        row_bytes = cold.bank(1, precision=config.precision).slots.row_bytes
        num_hot = _capacity("hot_mb", config.hot_mb, row_bytes, len(cold), len(self.always) + 1)
        num_warm = _capacity("warm_mb", config.warm_mb, row_bytes, len(cold))
        num_tepid = _capacity("tepid_mb", config.tepid_mb, row_bytes, len(cold))
        self.bank = cold.bank(num_hot, precision=config.precision).to(config.device)
        slots, device = self.bank.slots, self.bank.offset.device
        self._warm = slots.like(num_warm, device=device)
        self._tepid = slots.like(num_tepid, pinned=device.type == "cuda")
        self._readings = cold.readings.to(device)
        self.missing: dict[str, str] = {}
        self.counts = ShelfStatistics()
        self._asked = np.zeros(len(cold), dtype=np.int64)  # token at which each lens was last asked for
        self._token, self._idle = 0, dict[str, int]()  # lenses that may leave, with the token that said so
        self._lock = threading.Lock()  # of the tepid tier
        self._normed_BLD = torch.empty(0)
        self._logits_BN = np.empty((0, len(cold)), dtype=np.float32)
        self._read_N, self._whole = np.zeros(len(cold), dtype=bool), False
        self._places = list[str](), np.empty(0, dtype=np.int64)
        self._wanted: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._read_ahead, name="ftw-shelf", daemon=True)
        self._thread.start()
        try:
            self.bring(self.always)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and let the files go."""
        self._closing = True
        self._wanted.put(None)
        self._thread.join()
        self.cold.close()

    @property
    def names(self) -> list[str]:
        """All lenses, on whatever tier."""
        return self.cold.names

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the substrate that the lenses read."""
        return self.cold.layers

    @property
    def width(self) -> int:
        """Width of the states."""
        return self.cold.width

    @property
    def calibrated(self) -> bool:
        """Whether percentiles can be given."""
        return self._readings.calibrated

    def tier(self, name: str) -> str:
        """Where a lens is: hot, warm, tepid, cold or missing.

        Raises:
            ConceptError: no such lens, with the nearest names.
        """
        find_rows([name], self.cold.index)
        tiers = {"missing": self.missing, "hot": self.bank.slots, "warm": self._warm, "tepid": self._tepid}
        return next((tier for tier, held in tiers.items() if name in held), "cold")

    @torch.inference_mode()
    def begin(self, states_BLD: Tensor) -> None:
        """Take the states of a token (or of several): the next calls of `logits` are about them."""
        self._token += 1
        if stale := [name for name, token in self._idle.items() if self._token - token > IDLE_TOKENS]:
            self._leave(stale)
            self.bank.drop(stale)
        self._normed_BLD = normalise(states_BLD.to(self.bank.offset.device))
        self._logits_BN = np.full((len(states_BLD), len(self.cold)), np.nan, dtype=np.float32)
        self._read_N[:], self._whole = False, False

    @torch.inference_mode()
    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits of some lenses, float32 [B, M], bringing them in; NaN for one that is missing.

        More lenses than the bank has room for are read in turns.
        """
        unread = [self.names[row] for row in np.asarray(rows)[~self._read_N[rows]].tolist()]
        while unread:
            hot = self.bring(unread)
            self._score(hot)
            done = set(hot) | self.missing.keys()
            unread = [name for name in unread if name not in done]
        return self._logits_BN[:, rows]

    @torch.inference_mode()
    def percentile(self, logits_M: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Share of background tokens that each logit exceeds, [M]; NaN when the pack is not calibrated."""
        device = self.bank.offset.device
        logits_1M = torch.from_numpy(np.asarray(logits_M, dtype=np.float32))[None].to(device)
        return self._readings.percentile(logits_1M, torch.from_numpy(rows)[None].to(device))[0].cpu().numpy()

    @torch.inference_mode()
    def rank(self, logits_BN: Tensor) -> Tensor:
        """What lenses are compared by, as in a bank."""
        return self._readings.rank(logits_BN.to(self.bank.offset.device)).cpu()

    def background(self) -> tuple[Tensor, Tensor]:
        """Quantiles of each lens's logits on background tokens, [N, Q], and the levels they stand for."""
        return self._readings.quantiles.cpu(), self._readings.levels.cpu()

    def bring(self, names: Sequence[str]) -> list[str]:
        """Make lenses hot, those least recently asked for leaving; returns which are now, in the order given.

        At most as many as the bank has room for; missing ones are left out.

        Raises:
            ConceptError: no such lens, with the nearest names.
        """
        names = list(dict.fromkeys(names))
        self._asked[find_rows(names, self.cold.index)] = self._token
        slots = self.bank.slots
        for name in names:
            self._idle.pop(name, None)
        absent = [name for name in names if name not in slots and name not in self.missing]
        self.counts.hits += sum(name in slots for name in names)
        if absent:
            begun = time.perf_counter()
            self._load(absent, names)
            self.counts.load_ms += 1000 * (time.perf_counter() - begun)
        return [name for name in names if name in slots]

    def drop(self, rows: np.ndarray) -> None:
        """Learn that some lenses are read no more; they leave within a few tokens, or when room is needed."""
        kept = set(self.always)
        for row in np.asarray(rows).tolist():
            name = self.names[row]
            if name in self.bank.slots and name not in kept:
                self._idle.setdefault(name, self._token)

    def prefetch(self, rows: np.ndarray) -> None:
        """Learn that some lenses may be asked for soon; returns at once."""
        if self.config.prefetch and self._tepid.capacity:
            self._asked[rows] = self._token  # or the next ones read ahead would push them out
            self._wanted.put([self.names[row] for row in np.asarray(rows).tolist()])

    def preload(self, max_bytes: int, names: Sequence[str] | None = None) -> int:
        """Read lenses into memory, as many as `max_bytes` hold; returns how many are there.

        Raises:
            ConfigError: not even one fits. ConceptError: no such lens.
        """
        names = self.names if names is None else list(names)
        find_rows(names, self.cold.index)
        row_bytes = self.bank.slots.row_bytes
        capacity = _capacity("max_ram_mb", max_bytes / MB, row_bytes, len(self.cold), 1)
        if capacity > self._tepid.capacity:
            with self._lock:
                self._tepid = self.bank.slots.like(capacity, pinned=self.bank.offset.is_cuda)
        for start in range(0, min(len(names), capacity), BATCH_LENSES):
            self._keep(names[start : min(start + BATCH_LENSES, capacity)])
        return len(self._tepid)

    def statistics(self) -> dict[str, Any]:
        """Counts, and what each tier holds in lenses and bytes."""
        tiers = {"hot": self.bank.slots, "warm": self._warm, "tepid": self._tepid}
        held = {tier: len(slots) for tier, slots in tiers.items()} | {"missing": len(self.missing)}
        num_bytes = {f"{tier}_bytes": slots.num_bytes for tier, slots in tiers.items()}
        return {**asdict(self.counts), **held, **num_bytes, "lens_bytes": self.bank.slots.row_bytes}

    def _score(self, names: Sequence[str]) -> None:
        """Read lenses that are hot: the first time of a token the whole bank, then what has come since."""
        bank = self.bank
        if self._whole:
            rows = np.sort([bank.index[name] for name in names])
            runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
            parts = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        else:
            parts, self._whole = [(0, len(bank))], True
        for start, stop in parts:
            there = self._hot_rows()[start:stop]
            self._logits_BN[:, there] = bank.logits(self._normed_BLD, slice(start, stop)).float().cpu().numpy()
            self._read_N[there] = True

    def _hot_rows(self) -> np.ndarray:
        """Row among all lenses of each hot one."""
        if self._places[0] is not self.bank.names:  # a new list whenever they change
            rows = np.array(find_rows(self.bank.names, self.cold.index), dtype=np.int64)
            self._places = self.bank.names, rows
        return self._places[1]

    def _load(self, absent: list[str], wanted: Sequence[str]) -> None:
        """Bring lenses that are not hot from the nearest tier that has them."""
        slots = self.bank.slots
        leaving = self._leaving(len(absent), set(wanted))
        absent = absent[: slots.num_free + len(leaving)]
        self._leave(leaving)
        warm = [name for name in absent if name in self._warm]
        with _Wait(self._lock, self.counts):
            tepid = [name for name in absent if name in self._tepid and name not in self._warm]
            for held, source in ((warm, self._warm), (tepid, self._tepid)):
                slots.take(held, source, drop=leaving[: len(held)])
                leaving = leaving[len(held) :]
        self._warm.drop(warm)
        cold = [name for name in absent if name not in slots]
        failed = self.cold.fill(slots, cold, precision=self.config.precision, drop=leaving)
        self.missing |= failed
        self.bank.refresh()
        self.counts.misses += len(absent)
        self.counts.warm_hits += len(warm)
        self.counts.tepid_hits += len(tepid)
        self.counts.cold_loads += len(cold) - len(failed)
        self.counts.failed += len(failed)
        self.counts.bytes_moved += (len(absent) - len(failed)) * slots.row_bytes
        if cold and self.config.prefetch and self._tepid.capacity:
            self._wanted.put([name for name in cold if name not in failed])  # nearer the next time

    def _leaving(self, num: int, wanted: set[str]) -> list[str]:
        """Which lenses make room for `num` others: the idle ones, then the least recently asked for."""
        need = num - self.bank.slots.num_free
        if need <= 0:
            return []
        stay = wanted | set(self.always)
        others = [name for name in self.bank.names if name not in stay]
        idle = self._idle
        others.sort(key=lambda name: (name not in idle, self._asked[self.cold.index[name]]))
        return others[:need]

    def _leave(self, names: Sequence[str]) -> None:
        """Lenses are about to leave the bank: keep them on the device if there is room, the oldest giving way."""
        for name in names:
            self._idle.pop(name, None)
        self.counts.evictions += len(names)
        kept = list(names)[: self._warm.capacity]
        if kept:
            self._warm.take(kept, self.bank.slots, drop=self._oldest(self._warm, len(kept)))

    def _oldest(self, slots: Slots, num: int) -> list[str]:
        """Which lenses of a tier give way to `num` others."""
        need = num - slots.num_free
        return sorted(slots.names, key=lambda name: self._asked[self.cold.index[name]])[: max(need, 0)]

    def _read_ahead(self) -> None:
        """The thread: back the tiers with memory, then read what is likely next."""
        self.bank.slots.populate()
        self._tepid.populate()
        while (names := self._wanted.get()) is not None and not self._closing:
            for start in range(0, len(names), BATCH_LENSES):
                if not self._closing:
                    self.counts.prefetched += self._keep(names[start : start + BATCH_LENSES], ahead=True)

    def _keep(self, names: Iterable[str], *, ahead: bool = False) -> int:
        """Read lenses into the tepid tier; returns how many came."""
        with self._lock:
            tepid = self._tepid
            new = [name for name in dict.fromkeys(names) if name not in tepid and name not in self.missing]
            new = new[: tepid.capacity if ahead else tepid.num_free]
            failed = self.cold.fill(
                tepid, new, precision=self.config.precision, drop=self._oldest(tepid, len(new)) if ahead else ()
            )
            # Not marked as missing: should it be asked for, the reading itself will try, and count.
            return len(new) - len(failed)


class _Wait:
    """A lock whose waits are counted."""

    def __init__(self, lock: threading.Lock, counts: ShelfStatistics) -> None:
        self._lock, self._counts = lock, counts

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            begun = time.perf_counter()
            self._lock.acquire()
            self._counts.stalls += 1
            self._counts.stall_ms += 1000 * (time.perf_counter() - begun)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _capacity(budget: str, num_mb: float, row_bytes: int, num_lenses: int, least: int = 0) -> int:
    """Lenses that a budget holds.

    Raises:
        ConfigError: fewer than `least`, or than one when it is not 0; says the smallest workable budget.
    """
    capacity = int(min(num_mb * MB // row_bytes, num_lenses))
    least = min(max(least, 1 if num_mb else 0), num_lenses)
    if num_mb < 0 or capacity < least:
        # Rounded up, so that the number given works when it is typed.
        smallest = -(-least * row_bytes * 1000 // MB) / 1000
        raise ConfigError(
            f"{budget}={num_mb:g} holds {max(capacity, 0)} lenses of {row_bytes / MB:.3f} MB; the smallest workable "
            f"budget is {budget}={smallest:.3f}" + (f" ({least} lenses)" if least > 1 else "")
        )
    return capacity
