"""The encyclopedia: a folder that holds the states of every text of a sample table, for some layers of one substrate.

`index.h5` holds the table, the capture spec and, once finalised, virtual datasets over the shards and the moments of
every concept; `shards/NNNNNN.h5` hold the states. It opens without the model, the text files or the network, reads
lazily, survives `kill -9` at any moment with all finished shards, and may be moved: nothing in it names its folder.

Axes: S texts, E marks, N concepts, T tokens, D model width.
"""

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ftw.errors import DataError, EncyclopediaError
from ftw.map.estimate import Estimate, estimate
from ftw.map.index import INDEX, DamagedIndexError, FinishedStates, merge_moments, read_index, write_index
from ftw.map.samples import SampleTable
from ftw.map.shard import (
    TOKEN_IDS,
    CaptureSpec,
    ShardPlace,
    ShardStates,
    damaged,
    get,
    layer_name,
    pooled_name,
    read_rows,
    rows_by_shard,
    shard_problem,
    tokens_name,
    write_shard,
)

__all__ = [
    "CaptureSpec",
    "ConceptStatistics",
    "Encyclopedia",
    "Estimate",
    "ShardStates",
    "estimate",
    "merge_moments",
]

# Files kept open by one reader: enough for every shard of a demo, far below the usual limit of 1,024 descriptors.
OPEN_SHARDS = 64


@dataclass(kw_only=True)
class ConceptStatistics:
    """What is known of every concept at one layer, over its positive training texts.

    Attributes:
        num_samples: N counts.
        mean_ND, variance_ND: float32, of the pooled mean; NaN without a sample, variance (n - 1 below) NaN under two.
        stage: N highest stages of a concept's samples, -1 without any.
        confidence: N values in 0..1, NaN until an interpreter has set them.
    """

    num_samples: np.ndarray
    mean_ND: np.ndarray
    variance_ND: np.ndarray
    stage: np.ndarray
    confidence: np.ndarray


class Encyclopedia:
    """States by text and layer, on disk; a context manager that closes its files, picklable for data workers."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._owner = os.getpid()
        self._warned: set[int] = set()
        self._num_tokens: np.ndarray | None = None
        self._offsets: dict[int, np.ndarray] = {}
        self.table, self.spec, self.states_sha256 = read_index(self.folder)
        self.key = self.spec.key(self.table)

    @classmethod
    def create(cls, folder: Path | str, table: SampleTable, spec: CaptureSpec) -> "Encyclopedia":
        """A new store, or the one that is there if it is for the same texts and spec; valid shards are kept.

        Raises:
            DataError: the table has no texts. EncyclopediaError: the folder holds other texts or another spec.
        """
        folder = Path(folder)
        if not len(table):
            raise DataError("the sample table has no texts; nothing can be collected")
        try:
            present = cls.open(folder)
        except DamagedIndexError:
            write_index(folder, table, spec)
            return cls.open(folder)
        if differences := _differences(present, table, spec):
            raise EncyclopediaError(
                f"encyclopedia {present.name!r} holds something else: {'; '.join(differences)}; "
                f"collect into another folder, or delete {folder}"
            )
        return present

    @classmethod
    def open(cls, folder: Path | str) -> "Encyclopedia":
        """Open a store; shards that are damaged or foreign count as missing, with a warning that names them."""
        encyclopedia = cls(folder)
        encyclopedia.missing()
        return encyclopedia

    def __enter__(self) -> "Encyclopedia":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; the next read opens what it needs again."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        layers = ", ".join(str(layer) for layer in self.spec.layers)
        return f"Encyclopedia({self.name!r}: {len(self)} texts, layers {layers} of {self.spec.substrate_name})"

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def num_shards(self) -> int:
        """How many shards the finished store has."""
        return -(-len(self.table) // self.spec.shard_texts)

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing()

    def place(self, number: int) -> ShardPlace:
        """File, rows and key of a shard."""
        start = number * self.spec.shard_texts
        stop = min(start + self.spec.shard_texts, len(self.table))
        path = self.folder / "shards" / f"{number:06d}.h5"
        return ShardPlace(path=path, number=number, start=start, stop=stop, key=self.key)

    def missing(self, *, thorough: bool = False) -> list[int]:
        """Numbers of the shards that are absent, damaged or foreign; a warning names each of the latter two, once."""
        numbers = []
        for number in range(self.num_shards):
            if not self.has_shard(number, thorough=thorough):
                numbers.append(number)
        return numbers

    def has_shard(self, number: int, *, thorough: bool = False) -> bool:
        """Whether a shard is there and sound."""
        place = self.place(number)
        if not place.path.exists():
            return False
        problem = shard_problem(place, self.spec, thorough=thorough)
        if problem and number not in self._warned:
            self._warned.add(number)
            warnings.warn(f"shard {place.path} {problem}; it counts as missing", stacklevel=3)
        return problem is None

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, every byte checked; empty if all is well."""
        problems = []
        for number in range(self.num_shards):
            place = self.place(number)
            problem = shard_problem(place, self.spec, thorough=True) if place.path.exists() else "is missing"
            if problem:
                problems.append(f"shard {place.path} {problem}")
        if not problems and self.states_sha256 != self._hash_states():
            problems.append(f"{self.folder / INDEX} is not finalised for the shards that are there")
        return problems

    def check_substrate(self, name: str, fingerprint: str) -> None:
        """Raise EncyclopediaError if the states are not those of the substrate with this fingerprint."""
        if fingerprint != self.spec.fingerprint:
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} holds states of {self.spec.substrate_name} "
                f"(fingerprint {self.spec.fingerprint[:12]}), not of {name} (fingerprint {fingerprint[:12]}); "
                "collect for this model with: ftw collect"
            )

    def write_shard(self, number: int, states: ShardStates) -> None:
        """Write one shard atomically (see `ftw.map.shard.write_shard`)."""
        if stale := self._own_files().pop(number, None):
            stale.close()
        self._num_tokens = None
        self._offsets.pop(number, None)
        self._warned.discard(number)
        write_shard(self.place(number), self.spec, states)

    @property
    def num_tokens(self) -> np.ndarray:
        """S counts (int64) of the content tokens read of each text."""
        if self._num_tokens is None:
            counts = [self._read(number, "num_tokens") for number in range(self.num_shards)]
            self._num_tokens = np.concatenate(counts).astype(np.int64)
        return self._num_tokens

    @property
    def num_cut(self) -> int:
        """How many texts were longer than `max_tokens` and lost their end."""
        return sum(int(self._file(number).attrs["num_cut"]) for number in range(self.num_shards))

    def pooled(self, layer: int, pool: str, rows: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """Pooled states of some texts (default: all), in the order asked.

        Returns:
            float16 [len(rows), D], layer-normed residual stream.

        Raises:
            EncyclopediaError: no such layer or pool, or a shard that is missing or damaged.
        """
        self._check_layer(layer)
        if pool not in self.spec.pools:
            has = ", ".join(self.spec.pools) or "none"
            raise EncyclopediaError(f"encyclopedia {self.name!r} has no pool {pool!r} (it has {has})")
        wanted = self._check_rows(np.arange(len(self)) if rows is None else rows)
        states = np.empty((len(wanted), self.spec.width), dtype=np.float16)
        for number, places in rows_by_shard(wanted, self.spec.shard_texts):
            local = wanted[places] - self.place(number).start
            block = self._read(number, pooled_name(pool, layer), slice(local[0], local[-1] + 1))
            states[places] = block[local - local[0]]
        return states

    def token_rows(self) -> np.ndarray:
        """Indices of the texts whose token states are kept, ascending."""
        kept = {split for split, count in self.spec.tokens_per_text.items() if count}
        return np.flatnonzero(np.isin(np.asarray(self.table.splits), sorted(kept)))

    def token_states(self, layer: int, rows: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Kept token states of some texts, text after text in the order asked.

        Returns:
            float16 [ΣT, D] and int64 offsets [len(rows) + 1]: text i is `states[offsets[i]:offsets[i + 1]]`.

        Raises:
            EncyclopediaError: no such layer, or a text whose split keeps no token states.
        """
        self._check_layer(layer)
        wanted = self._check_rows(rows)
        self._check_token_rows(wanted)
        groups = list(rows_by_shard(wanted, self.spec.shard_texts))
        bounds = np.zeros((len(wanted), 2), dtype=np.int64)
        for number, places in groups:
            local = wanted[places] - self.place(number).start
            ends = self._shard_offsets(number)
            bounds[places] = np.stack([ends[local], ends[local + 1]], axis=1)
        offsets = np.concatenate([[0], np.cumsum(bounds[:, 1] - bounds[:, 0])]).astype(np.int64)
        states = np.empty((int(offsets[-1]), self.spec.width), dtype=np.float16)
        for number, places in groups:
            spans = [(int(start), int(stop)) for start, stop in bounds[places]]
            with self._reading(number) as file:
                blocks = read_rows(file[tokens_name(layer)], spans)
            for place, block in zip(places, blocks, strict=True):
                states[offsets[place] : offsets[place + 1]] = block
        return states, offsets

    def answers(self, rows: np.ndarray | Sequence[int]) -> list[list[int]]:
        """Tokens of the answers that were sampled to some prompts.

        Raises:
            EncyclopediaError: the texts are no prompts; nothing was sampled.
        """
        if not self.spec.sampling:
            raise EncyclopediaError(f"encyclopedia {self.name!r} holds no sampled answers; ftw collect data=sequences")
        wanted = self._check_rows(rows)
        found: list[list[int]] = [[] for _ in wanted]
        for number, places in rows_by_shard(wanted, self.spec.shard_texts):
            ids, ends = self._read(number, TOKEN_IDS), self._shard_offsets(number)
            for place in places:
                local = wanted[place] - self.place(number).start
                found[place] = ids[ends[local] : ends[local + 1]].tolist()
        return found

    def statistics(self, layer: int) -> ConceptStatistics:
        """Moments, stage and confidence of every concept at a layer.

        Raises:
            EncyclopediaError: no such layer, no pooled means, or not finalised.
        """
        self._check_layer(layer)
        with h5py.File(self.folder / INDEX, "r", locking=False) as index:
            path = f"statistics/{layer_name(layer)}"
            if path not in index:
                reason = "is not finalised: run the same ftw collect again"
                if "mean" not in self.spec.pools:
                    reason = "has no pooled means: collect with pools=[mean]"
                raise EncyclopediaError(f"encyclopedia {self.name!r} {reason}")
            return ConceptStatistics(
                num_samples=get(index, "statistics/num_samples"),
                mean_ND=get(index, f"{path}/mean"),
                variance_ND=get(index, f"{path}/variance"),
                stage=get(index, "statistics/stage"),
                confidence=get(index, "statistics/confidence"),
            )

    def finalise(self, *, moments: bool = True) -> None:
        """Write virtual datasets over all shards and the moments of every concept into the index; again is harmless.

        Args:
            moments: False leaves them out, where they are kept elsewhere or are as large as the states.

        Raises:
            EncyclopediaError: shards are missing.
        """
        if missing := self.missing():
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} lacks {len(missing)} of {self.num_shards} shards "
                f"(first: {missing[0]:06d}); run the same ftw collect again"
            )
        states_sha256 = self._hash_states()
        if states_sha256 != self.states_sha256:
            write_index(self.folder, self.table, self.spec, self._finished(states_sha256), moments=moments)
            self.states_sha256 = states_sha256

    def _finished(self, states_sha256: str) -> FinishedStates:
        kept = [np.diff(self._shard_offsets(number)) for number in range(self.num_shards) if self.spec.keeps_tokens]
        return FinishedStates(
            places=[self.place(number) for number in range(self.num_shards)],
            num_kept=[int(counts.sum()) for counts in kept],
            num_tokens=self.num_tokens,
            kept_tokens=np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64),
            num_cut=self.num_cut,
            states_sha256=states_sha256,
            read_means=lambda layer, place: self._read(place.number, pooled_name("mean", layer)),
        )

    def _hash_states(self) -> str:
        """sha256 over the digests that the shards carry: one word for all the states."""
        combined = hashlib.sha256()
        for number in range(self.num_shards):
            with self._reading(number) as file:
                names: list[str] = []
                file.visititems(lambda name, node, found=names: found.append(name) if "sha256" in node.attrs else None)
                combined.update("".join(f"{name}={file[name].attrs['sha256']};" for name in sorted(names)).encode())
        return combined.hexdigest()

    def _shard_offsets(self, number: int) -> np.ndarray:
        if number not in self._offsets:
            self._offsets[number] = self._read(number, "tokens/offsets")
        return self._offsets[number]

    def _read(self, number: int, name: str, rows: slice = slice(None)) -> np.ndarray:
        with self._reading(number) as file:
            return get(file, name, rows)

    def _reading(self, number: int) -> "_Reading":
        return _Reading(self.place(number), self._file(number))

    def _own_files(self) -> "OrderedDict[int, h5py.File]":
        """Open files of this process; those of a forked parent are forgotten (HDF5 shares nothing over a fork)."""
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        return self._files

    def _file(self, number: int) -> Any:
        files = self._own_files()
        if number not in files:
            place = self.place(number)
            if not place.path.exists():
                raise damaged(place, "is missing")
            if problem := shard_problem(place, self.spec, thorough=False):
                raise damaged(place, problem)
            # Shards never change once they are named, so readers need no lock (and may sit on a read-only disk).
            files[number] = h5py.File(place.path, "r", locking=False)
        files.move_to_end(number)
        while len(files) > OPEN_SHARDS:
            files.popitem(last=False)[1].close()
        return files[number]

    def _check_layer(self, layer: int) -> None:
        if layer not in self.spec.layers:
            has = ", ".join(str(known) for known in self.spec.layers)
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} has no layer {layer} (it has {has}); "
                f"collect it with: ftw collect layers=[{layer}]"
            )

    def _check_rows(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise DataError(f"encyclopedia {self.name!r} has no text {outside[0]} (it has 0-{len(self) - 1})")
        return wanted

    def _check_token_rows(self, rows: np.ndarray) -> None:
        for row in rows:
            split = self.table.splits[row]
            if not self.spec.tokens_per_text.get(split, 0):
                raise EncyclopediaError(
                    f"encyclopedia {self.name!r} keeps no token states of text {row} (split {split}); "
                    f"collect them with: ftw collect tokens_per_text.{split}=-1"
                )


class _Reading:
    """A read of a shard; HDF5's complaint about a bad checksum becomes an error that names the shard."""

    def __init__(self, place: ShardPlace, file: Any) -> None:
        self._place, self._file = place, file

    def __enter__(self) -> Any:
        return self._file

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (OSError, RuntimeError, KeyError)):
            reason = (str(error).splitlines() or ["no reason given"])[0][:120]
            raise damaged(self._place, f"is damaged ({reason})") from error


def _differences(present: Encyclopedia, table: SampleTable, spec: CaptureSpec) -> list[str]:
    """In what a store differs from what is asked, in words."""
    there, asked = present.spec.as_json(), spec.as_json()
    names = {**there, **asked}
    differences = [
        f"{name} {there.get(name)} instead of {asked.get(name)}" for name in names if there.get(name) != asked.get(name)
    ]
    if present.table.content_hash() != table.content_hash():
        differences.append(f"other texts or marks ({len(present)} texts, asked for {len(table)})")
    return differences
