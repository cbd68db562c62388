"""One shard of an encyclopedia: the states of some consecutive texts in one HDF5 file that is whole or not there.

A shard says whose it is (the key of its encyclopedia, its number, its rows) and carries a sha256 of each of its
datasets, so a truncated, altered or foreign file is recognised. HDF5's own Fletcher checksums stand behind every read.
States are stored as they are: float16 noise shrinks by 13 % under gzip and takes forty times as long to write.

Axes: S texts, n texts of a shard, T tokens, L layers, D model width.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ftw.errors import ConfigError, DataError, EncyclopediaError
from ftw.hat.pooling import STATE_POOLS
from ftw.map.samples import SPLITS, SampleTable
from ftw.paths import replace_file

SCHEMA_VERSION = 1
SHARD_FORMAT = "ftw-encyclopedia-shard"
NORMALISATION = "layernorm"
STATE_UNITS = "residual stream after per-token layer norm (dimensionless)"
# HDF5 1.10 layout: every piece of metadata has a checksum, and any h5py of the last eight years reads it.
LIBVER = ("v110", "v110")
CHUNK_BYTES = 1 << 18
TOKEN_IDS = "tokens/ids"


@dataclass(frozen=True, kw_only=True)
class CaptureSpec:
    """What is stored for every text; two stores with one spec and one sample table hold the same states.

    Attributes:
        substrate_name, fingerprint, width: the language model and the length D of its states.
        layers: block indices, ascending.
        pools: pooled states of the layer-normed tokens (`ftw.hat.pooling`); position 0, the sink, is in none.
        tokens_per_text: for each split, how many token states of a text are kept: 0 none, -1 all, k spread evenly.
        max_tokens: tokens fed of a text, the sink included; the rest is cut off, and the text counted.
        batch_tokens, precision: how the states were computed; they decide the last bits.
        shard_texts: texts in a shard, the unit of work and of what a killed run can lose.
        sampling: None where the texts themselves are read. Else they are prompts, and the tokens kept are those of an
            answer sampled to each: max_new_tokens, temperature, seed.
    """

    substrate_name: str
    fingerprint: str
    layers: tuple[int, ...]
    width: int
    pools: tuple[str, ...] = ("mean", "last")
    tokens_per_text: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 128
    batch_tokens: int = 2048
    precision: str = "float32"
    shard_texts: int = 512
    sampling: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ConfigError(f"layers {list(self.layers)}: name at least one block, ascending, none twice")
        if unknown := set(self.pools) - set(STATE_POOLS):
            raise ConfigError(f"unknown pool {sorted(unknown)}; the pools are {', '.join(STATE_POOLS)}")
        if unknown := set(self.tokens_per_text) - set(SPLITS):
            raise ConfigError(f"tokens_per_text: unknown split {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        for split, count in self.tokens_per_text.items():
            if count < -1:
                raise ConfigError(f"tokens_per_text.{split}={count}: 0 keeps none, -1 all, k > 0 keeps k a text")
        for name in ("width", "max_tokens", "batch_tokens", "shard_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.pools and not self.keeps_tokens:
            raise ConfigError("nothing to store: pools is empty and tokens_per_text keeps no tokens")

    @property
    def keeps_tokens(self) -> bool:
        """Whether any split keeps states of single tokens."""
        return any(self.tokens_per_text.values())

    def kept_tokens(self, split: str, num_tokens: int) -> int:
        """How many token states are kept of a text of `num_tokens` tokens."""
        wanted = self.tokens_per_text.get(split, 0)
        return num_tokens if wanted < 0 else min(wanted, num_tokens)

    def key(self, table: SampleTable) -> str:
        """sha256 (hex) over the texts with their marks, and over this spec."""
        words = json.dumps([SCHEMA_VERSION, table.content_hash(), self.as_json()], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The spec as plain JSON values; what is not asked for is left out, so that older stores keep their key."""
        record = {**asdict(self), "layers": list(self.layers), "pools": list(self.pools)}
        return {name: value for name, value in record.items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "CaptureSpec":
        """The spec that `as_json` wrote; keys of later versions are ignored."""
        known = {name.name for name in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        return cls(**{**values, "layers": tuple(values["layers"]), "pools": tuple(values["pools"])})


@dataclass(frozen=True, kw_only=True)
class ShardPlace:
    """Which shard of which encyclopedia: its file, number, rows and the key that it must carry."""

    path: Path
    number: int
    start: int
    stop: int
    key: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(kw_only=True)
class ShardStates:
    """The states of n consecutive texts.

    Attributes:
        num_tokens: n counts of content tokens read (after the cut).
        num_cut: how many of the texts were longer than `max_tokens`.
        pooled: float16 [n, D] by pool and layer.
        tokens: float16 [ΣT, D] by layer: kept token states, text after text.
        offsets: n + 1 places in `tokens`; a text that keeps none has length zero.
        positions: ΣT places of the kept tokens in their texts; 0 is the first content token.
        token_ids: ΣT tokens of sampled answers.
    """

    num_tokens: np.ndarray
    num_cut: int = 0
    pooled: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


def layer_name(layer: int) -> str:
    """Name of a layer inside the file: 9 is `layer_09`."""
    return f"layer_{layer:02d}"


def pooled_name(pool: str, layer: int) -> str:
    """Path of a pooled dataset inside a shard and inside the index."""
    return f"pooled/{pool}/{layer_name(layer)}"


def tokens_name(layer: int) -> str:
    """Path of a dataset of token states inside a shard and inside the index."""
    return f"tokens/{layer_name(layer)}"


def put(group: h5py.Group, name: str, array: np.ndarray, *, axes: str, units: str, normalisation: str = "none") -> None:
    """Write one dataset with its legend of axes, dtype, units, normalisation and the sha256 of its bytes."""
    array = np.ascontiguousarray(array)
    options: dict[str, Any] = {}
    if array.size:
        # Chunks of equal length: HDF5 stores the last one whole, however little of it is used.
        num_chunks = -(-array.nbytes // CHUNK_BYTES)
        options = {"chunks": (-(-len(array) // num_chunks), *array.shape[1:]), "fletcher32": True}
    dataset = group.create_dataset(name, data=array, track_times=False, **options)
    describe(dataset, axes=axes, dtype=str(array.dtype), units=units, normalisation=normalisation)
    dataset.attrs["sha256"] = digest(array)


def describe(dataset: h5py.Dataset, *, axes: str, dtype: str, units: str, normalisation: str = "none") -> None:
    """The attributes that every dataset carries."""
    dataset.attrs["shape"] = axes
    dataset.attrs["dtype"] = dtype
    dataset.attrs["units"] = units
    dataset.attrs["normalisation"] = normalisation


def digest(array: np.ndarray) -> str:
    """sha256 (hex) of the bytes of an array, row after row."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def get(group: Any, name: str, rows: slice | tuple[()] = ()) -> np.ndarray:
    """A dataset, or some consecutive rows of it, as an array."""
    return np.asarray(group[name][rows])


def attribute(node: Any, name: str) -> Any:
    """An attribute as a plain Python value."""
    value = node.attrs[name]
    return value.item() if isinstance(value, np.generic) else value


def write_image(path: Path, image: io.BytesIO) -> None:
    """Put a finished HDF5 image on the disk under its name, whole or not at all.

    HDF5 never writes to the disk itself: when the disk is full its flush fails while the file is being freed, and the
    process dies of a segmentation fault (HDF5 2.0.0). A plain write fails as an ordinary, catchable error.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(image.getbuffer())


def write_shard(place: ShardPlace, spec: CaptureSpec, states: ShardStates) -> None:
    """Write one shard atomically.

    Raises:
        DataError: shapes or dtypes are not those of the spec, or a state is not finite.
        DiskFullError: the disk has no room; nothing else is touched.
    """
    _check_states(place, spec, states)
    image = io.BytesIO()
    with h5py.File(image, "w", libver=LIBVER) as file:
        identity = {"format": SHARD_FORMAT, "schema_version": SCHEMA_VERSION, "key": place.key}
        file.attrs.update({**identity, "number": place.number, "start": place.start, "stop": place.stop})
        file.attrs["num_cut"] = states.num_cut
        put(file, "num_tokens", states.num_tokens.astype("<i4"), axes="n texts", units="tokens")
        for pool in spec.pools:
            for layer in spec.layers:
                put(
                    file,
                    pooled_name(pool, layer),
                    states.pooled[pool][layer],
                    axes="n texts, D width",
                    units=STATE_UNITS,
                    normalisation=NORMALISATION,
                )
        if spec.keeps_tokens:
            put(file, "tokens/offsets", states.offsets.astype("<i8"), axes="n texts + 1", units="tokens")
            put(file, "tokens/positions", states.positions.astype("<i4"), axes="ΣT tokens", units="position in text")
            if spec.sampling:
                put(file, TOKEN_IDS, states.token_ids.astype("<i4"), axes="ΣT tokens", units="token of the substrate")
            for layer in spec.layers:
                put(
                    file,
                    tokens_name(layer),
                    states.tokens[layer],
                    axes="ΣT tokens, D width",
                    units=STATE_UNITS,
                    normalisation=NORMALISATION,
                )
    write_image(place.path, image)


def _check_states(place: ShardPlace, spec: CaptureSpec, states: ShardStates) -> None:
    """Refuse arrays that the spec does not describe, or states that are not numbers."""
    if len(states.num_tokens) != len(place):
        raise DataError(f"shard {place.number}: {len(states.num_tokens)} token counts for {len(place)} texts")
    expected = {(pool, layer): (len(place), spec.width) for pool in spec.pools for layer in spec.layers}
    arrays = {(pool, layer): array for pool, by_layer in states.pooled.items() for layer, array in by_layer.items()}
    if spec.keeps_tokens:
        if len(states.offsets) != len(place) + 1 or states.offsets[-1] != len(states.positions):
            raise DataError(f"shard {place.number}: offsets do not end at the {len(states.positions)} kept tokens")
        if spec.sampling and len(states.token_ids) != len(states.positions):
            raise DataError(f"shard {place.number}: {len(states.token_ids)} ids for {len(states.positions)} tokens")
        expected |= {("tokens", layer): (len(states.positions), spec.width) for layer in spec.layers}
        arrays |= {("tokens", layer): array for layer, array in states.tokens.items()}
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype != np.float16:
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise DataError(f"shard {place.number}: {name[0]} of layer {name[1]} is {found}, not float16 {list(shape)}")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            text = row if name[0] != "tokens" else int(np.searchsorted(states.offsets, row, side="right")) - 1
            raise DataError(f"shard {place.number}: layer {name[1]} of text {place.start + text} is not finite")


def shard_problem(place: ShardPlace, spec: CaptureSpec, *, thorough: bool) -> str | None:
    """What is wrong with a shard's file; None if nothing is.

    Args:
        thorough: also hash the bytes of every dataset (about a second for a gigabyte); else only identity and shapes.
    """
    try:
        with h5py.File(place.path, "r", locking=False) as file:
            if file.attrs.get("format") != SHARD_FORMAT or attribute(file, "schema_version") != SCHEMA_VERSION:
                return "is not a shard of this version"
            if attribute(file, "key") != place.key:
                return "belongs to another encyclopedia"
            if any(attribute(file, name) != getattr(place, name) for name in ("number", "start", "stop")):
                return "holds other texts than its name says"
            return _dataset_problem(file, place, spec, thorough=thorough)
    # h5py raises RuntimeError or KeyError for some kinds of damaged metadata, OSError for the others.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        return f"is truncated or damaged ({(str(error).splitlines() or ['no reason given'])[0][:120]})"


def _dataset_problem(file: h5py.File, place: ShardPlace, spec: CaptureSpec, *, thorough: bool) -> str | None:
    for name in dataset_names(spec):
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            return f"lacks {name}"
        by_text = name.startswith("pooled/") or name == "num_tokens"
        if by_text and len(dataset) != len(place):
            return f"has {len(dataset)} rows in {name} instead of {len(place)}"
        if thorough and digest(np.asarray(dataset[()])) != attribute(dataset, "sha256"):
            return f"has altered bytes in {name}"
    return None


def dataset_names(spec: CaptureSpec) -> list[str]:
    """Every dataset that a shard of this spec holds."""
    names = ["num_tokens", *(pooled_name(pool, layer) for pool in spec.pools for layer in spec.layers)]
    if spec.keeps_tokens:
        names += ["tokens/offsets", "tokens/positions", *(tokens_name(layer) for layer in spec.layers)]
    return [*names, TOKEN_IDS] if spec.sampling else names


def rows_by_shard(rows: np.ndarray, shard_texts: int) -> Iterator[tuple[int, np.ndarray]]:
    """For every shard that some rows lie in: its number, and the places in `rows` that do, by ascending row."""
    order = np.argsort(rows, kind="stable")
    numbers = rows[order] // shard_texts
    for number in np.unique(numbers):
        low, high = np.searchsorted(numbers, [number, number + 1])
        yield int(number), order[low:high]


def read_rows(dataset: h5py.Dataset, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Some spans of rows, ascending: one read if they cover half of what they stretch over, else one read each."""
    low, high = spans[0][0], max(stop for _, stop in spans)
    if sum(stop - start for start, stop in spans) * 2 >= high - low:
        block = dataset[low:high]
        return [block[start - low : stop - low] for start, stop in spans]
    return [dataset[start:stop] for start, stop in spans]


def damaged(place: ShardPlace, problem: str) -> EncyclopediaError:
    """The error for a shard that cannot be read, with the way back."""
    return EncyclopediaError(
        f"shard {place.path} {problem}; run the same ftw collect again, it replaces this shard and keeps the others"
    )
