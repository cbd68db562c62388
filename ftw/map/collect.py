"""Collecting: run the substrate over every text of a sample table and keep the states in an encyclopedia.

The work is cut into shards of consecutive texts. A shard is computed from nothing but its own texts, under its own file
lock, and appears whole or not at all; so a killed run loses at most the shard in hand, a resumed one gives the same
bytes, and several processes share one folder.

Axes: S texts, n texts of a shard, T tokens, L layers, D model width.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.nn.functional import layer_norm

from ftw.errors import ConfigError, DataError, DiskFullError, SubstrateError
from ftw.hat.pooling import STATE_POOLS, pool_tokens
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.estimate import Estimate, encode_row, estimate, readable_bytes
from ftw.map.samples import SampleTable
from ftw.map.shard import CaptureSpec, ShardPlace, ShardStates
from ftw.paths import home
from ftw.substrate.model import Substrate
from ftw.substrate.sampling import Answer, sample_answers
from ftw.substrate.taps import read_batches, read_states, resolve_precision

LAYER_NORM_EPS = 1e-5
# A shard is built in memory; with long texts of a wide model it holds fewer of them.
SHARD_BYTES_LIMIT = 1 << 29
STATE_BYTES = 2


@dataclass(kw_only=True)
class CollectConfig:
    """What to keep of every text, and how to compute it.

    Attributes:
        layers: block indices, or fractions of the depth between 0 and 1.
        pools: pooled states of a text: mean, last, tail, spread (`ftw.hat.pooling`).
        tokens_per_text: by split, how many token states of a text are kept: 0 none, -1 all, k spread evenly.
        max_tokens: tokens fed of a text, the sink included; longer texts are cut, and counted.
        batch_tokens: padded tokens in one forward pass.
        precision: "auto", "float32" or "bfloat16".
        shard_texts: texts in a shard at most: the unit of work, and the most that a killed run loses.
        max_new_tokens: 0 reads the texts. Above, they are prompts: an answer of at most so many tokens is sampled to
            each, and the states of its tokens are kept. temperature, sampling_seed: of the sampling.
    """

    layers: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9])
    pools: list[str] = field(default_factory=lambda: list(STATE_POOLS))
    tokens_per_text: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0, "background": -1})
    max_tokens: int = 128
    batch_tokens: int = 2048
    precision: str = "auto"
    shard_texts: int = 512
    max_new_tokens: int = 0
    temperature: float = 1.0
    sampling_seed: int = 0

    def spec(self, substrate: Substrate) -> CaptureSpec:
        """The capture spec for one substrate on this machine: fractions and "auto" resolved.

        Raises:
            ConfigError: a value that cannot be. SubstrateError: no such layer.
        """
        if not 2 <= self.max_tokens <= substrate.context_tokens:
            raise ConfigError(
                f"max_tokens={self.max_tokens}: {substrate.name!r} takes 2 to {substrate.context_tokens} tokens"
            )
        layers = tuple(sorted(substrate.layers(self.layers)))
        most_tokens = max((self.max_tokens if k < 0 else k for k in self.tokens_per_text.values()), default=0)
        most_tokens = self.max_new_tokens or most_tokens
        text_bytes = (len(self.pools) + most_tokens) * len(layers) * substrate.width * STATE_BYTES
        return CaptureSpec(
            substrate_name=substrate.name,
            fingerprint=substrate.fingerprint,
            layers=layers,
            width=substrate.width,
            pools=tuple(self.pools),
            tokens_per_text=dict(self.tokens_per_text),
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            precision=resolve_precision(substrate, self.precision),
            shard_texts=max(1, min(self.shard_texts, SHARD_BYTES_LIMIT // max(1, text_bytes))),
            sampling=self._sampling(),
        )

    def _sampling(self) -> dict[str, float] | None:
        if self.max_new_tokens == 0:
            return None
        if self.max_new_tokens < 0 or self.temperature < 0 or self.pools:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} and temperature={self.temperature} must not be negative, and "
                f"pools={self.pools} of sampled answers must be empty: their tokens are kept one by one"
            )
        sampled = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return {**sampled, "seed": self.sampling_seed}


def encyclopedia_folder(table: SampleTable, spec: CaptureSpec) -> Path:
    """Where the states of this table under this spec live: a readable name with 16 digits of their key."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.substrate_name).strip("-.") or "substrate"
    return home() / "encyclopedias" / f"{name}-{spec.key(table)[:16]}"


def collect(
    substrate: Substrate,
    table: SampleTable,
    config: CollectConfig,
    *,
    progress: bool = True,
    folder: Path | str | None = None,
    moments: bool = True,
) -> Encyclopedia:
    """The finished encyclopedia of a table: made, resumed, or opened if it is all there.

    Args:
        progress: draw a bar on stderr.
        folder: where to keep it; default: `encyclopedia_folder`.
        moments: write mean and variance of every concept into the index.

    Returns:
        A complete and finalised encyclopedia, open for reading.

    Raises:
        DataError: no texts, a text without tokens, or states that are not finite (each names the text).
        DiskFullError: the disk has not, or no longer, room enough; finished shards stay.
        EncyclopediaError: `folder` holds something else.
    """
    spec = config.spec(substrate)
    encyclopedia = Encyclopedia.create(folder or encyclopedia_folder(table, spec), table, spec)
    try:
        if missing := encyclopedia.missing(thorough=True):
            cost = estimate(table, spec, substrate, moments=moments)
            _check_room(encyclopedia, cost, len(missing))
            _collect_missing(substrate, encyclopedia, missing, cost, progress=progress)
        encyclopedia.finalise(moments=moments)
    except KeyboardInterrupt:
        done = encyclopedia.num_shards - len(encyclopedia.missing())
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"stopped: {done} of {encyclopedia.num_shards} shards are kept in {encyclopedia.folder}; "
            "run the same command again to go on"
        )
        encyclopedia.close()
        raise
    except BaseException:
        encyclopedia.close()
        raise
    return encyclopedia


def _check_room(encyclopedia: Encyclopedia, cost: Estimate, num_missing: int) -> None:
    need = cost.bytes * num_missing // encyclopedia.num_shards
    free = shutil.disk_usage(encyclopedia.folder).free
    if free < need:
        raise DiskFullError(
            f"collecting into {encyclopedia.folder} needs {readable_bytes(need)}, but the disk has "
            f"{readable_bytes(free)} free; free some space, set FTW_HOME to another disk, "
            "or keep less (fewer layers, tokens_per_text.background=16)"
        )


def _collect_missing(
    substrate: Substrate, encyclopedia: Encyclopedia, missing: list[int], cost: Estimate, *, progress: bool
) -> None:
    """Collect the missing shards; those that another process has in hand come last, and are waited for."""
    num_texts = sum(len(encyclopedia.place(number)) for number in missing)
    with _progress_bar(enabled=progress) as bar:
        task = bar.add_task("collecting states", total=cost.num_tokens * num_texts / cost.num_texts, rate="")
        postponed = [
            number for number in missing if not _collect_one(substrate, encyclopedia, number, bar, task, wait=False)
        ]
        for number in postponed:
            _collect_one(substrate, encyclopedia, number, bar, task, wait=True)


def _collect_one(
    substrate: Substrate, encyclopedia: Encyclopedia, number: int, bar: Progress, task: TaskID, *, wait: bool
) -> bool:
    """Collect one shard under its lock; False if another process holds it and `wait` is off."""
    place = encyclopedia.place(number)
    lock = FileLock(encyclopedia.folder / ".locks" / f"{number:06d}.lock", timeout=-1 if wait else 0)
    try:
        with lock:
            if encyclopedia.has_shard(number, thorough=True):
                return True
            # Left by a process killed while writing this very shard: the lock says that nobody writes it now.
            for leftover in place.path.parent.glob(f".{place.path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)

            def on_tokens(count: int) -> None:
                bar.advance(task, count)
                speed = bar.tasks[task].speed
                bar.update(task, rate=f"{speed:,.0f} tok/s" if speed else "")

            make = sample_shard if encyclopedia.spec.sampling else read_shard
            states = make(substrate, encyclopedia.table, encyclopedia.spec, place, on_tokens)
            encyclopedia.write_shard(number, states)
    except Timeout:
        return False
    return True


def _progress_bar(*, enabled: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (enabled and console.is_interactive),  # in a log it would leave an empty line
    )


def read_shard(
    substrate: Substrate,
    table: SampleTable,
    spec: CaptureSpec,
    place: ShardPlace,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> ShardStates:
    """The states of one shard's texts, layer-normed, pooled and rounded to float16.

    A token's state is layer-normed in float32 without parameters, then averaged, and rounded only at the end.

    Args:
        on_tokens: told after each batch how many tokens it had.

    Raises:
        DataError: a text without tokens, or with states that are not finite.
    """
    rows = range(place.start, place.stop)
    encoded = [encode_row(substrate, spec, table, row) for row in rows]
    token_ids = [ids for ids, _ in encoded]
    num_tokens = np.array([len(ids) - 1 for ids in token_ids], dtype=np.int32)
    kept = [spec.kept_tokens(table.splits[row], int(count)) for row, count in zip(rows, num_tokens, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    pooled_LnD = {pool: np.empty((len(spec.layers), len(rows), spec.width), np.float16) for pool in spec.pools}
    tokens_LTD = np.empty((len(spec.layers), int(offsets[-1]), spec.width), np.float16)
    positions = np.zeros(int(offsets[-1]), dtype=np.int32)
    options = {"batch_tokens": spec.batch_tokens, "precision": spec.precision}
    try:
        for indices, states_LBTD, lengths in read_batches(substrate, token_ids, spec.layers, **options):
            # Texts of one length are pooled together: of the short ones there are thousands.
            for low, high in _runs(lengths):
                normed_LnTD = layer_norm(states_LBTD[:, low:high, : lengths[low]], (spec.width,), eps=LAYER_NORM_EPS)
                for pool, array_LnD in pooled_LnD.items():
                    array_LnD[:, indices[low:high]] = pool_tokens(normed_LnTD, pool).numpy()
                for column, index in enumerate(indices[low:high]):
                    if kept[index]:
                        chosen = evenly_spaced(int(num_tokens[index]), kept[index])
                        span = slice(offsets[index], offsets[index + 1])
                        positions[span] = chosen
                        tokens_LTD[:, span] = normed_LnTD[:, column, chosen].numpy()
            on_tokens(sum(lengths))
    except SubstrateError as error:
        raise _name_the_text(error, substrate, table, spec, place, token_ids) from error
    return ShardStates(
        num_tokens=num_tokens,
        num_cut=sum(was_cut for _, was_cut in encoded),
        pooled={pool: dict(zip(spec.layers, array, strict=True)) for pool, array in pooled_LnD.items()},
        tokens=dict(zip(spec.layers, tokens_LTD, strict=True)) if spec.keeps_tokens else {},
        offsets=offsets,
        positions=positions,
    )


def sample_shard(
    substrate: Substrate,
    table: SampleTable,
    spec: CaptureSpec,
    place: ShardPlace,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> ShardStates:
    """Answers sampled to one shard's prompts, with the layer-normed states of their tokens rounded to float16.

    Raises:
        SubstrateError: a prompt too long, or states that are not finite.
    """
    assert spec.sampling is not None  # the caller has seen to it
    answers: list[Answer | None] = [None] * len(place)
    for answer in sample_answers(
        substrate,
        [substrate.chat(text) for text in table.texts[place.start : place.stop]],
        spec.layers,
        max_new_tokens=int(spec.sampling["max_new_tokens"]),
        temperature=spec.sampling["temperature"],
        seed=int(spec.sampling["seed"]) * 1_000_003 + place.number,
        precision=spec.precision,
    ):
        normed_LTD = layer_norm(answer.states_LTD, (spec.width,), eps=LAYER_NORM_EPS).half()
        answers[answer.prompt] = answer._replace(states_LTD=normed_LTD)
        on_tokens(len(answer.token_ids))
    there = [answer for answer in answers if answer is not None]
    num_tokens = np.array([len(answer.token_ids) for answer in there], dtype=np.int32)
    tokens_LTD = torch.cat([answer.states_LTD for answer in there], dim=1).numpy()
    return ShardStates(
        num_tokens=num_tokens,
        tokens=dict(zip(spec.layers, tokens_LTD, strict=True)),
        offsets=np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64),
        positions=np.concatenate([np.arange(num) for num in num_tokens]).astype(np.int32),
        token_ids=np.array([token for answer in there for token in answer.token_ids], dtype=np.int32),
    )


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where runs of equal lengths begin and end."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] != lengths[start]:
            yield start, stop
            start = stop


def evenly_spaced(num_tokens: int, num_kept: int) -> np.ndarray:
    """`num_kept` distinct positions of 0..num_tokens - 1, in the middles of equal parts."""
    return ((np.arange(num_kept) + 0.5) * num_tokens / num_kept).astype(np.int64)


def _name_the_text(
    error: SubstrateError,
    substrate: Substrate,
    table: SampleTable,
    spec: CaptureSpec,
    place: ShardPlace,
    token_ids: list[list[int]],
) -> DataError:
    """Which text of a shard cannot be read, found by reading them one by one."""
    for row, ids in enumerate(token_ids, start=place.start):
        try:
            list(read_states(substrate, [ids], spec.layers, precision=spec.precision))
        except SubstrateError:
            return DataError(
                f"text {row} ({table.texts[row][:60]!r}, group {table.groups[row]!r}) has states that are "
                f"not finite in {spec.precision}; try precision=float32, or leave it out"
            )
    return DataError(f"among texts {place.start}-{place.stop - 1}: {error}")
