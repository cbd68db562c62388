"""`index.h5` of an encyclopedia: the sample table, the spec and, once all shards are there, views and moments.

It is always written whole and renamed into place. Words are stored as UTF-8 bytes with offsets, since HDF5's own
strings end at the first NUL; only concept names are HDF5 strings as well, for the eyes of other tools.

Axes: S texts, E marks, N concepts, T tokens, D model width.
"""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ftw.errors import DataError, EncyclopediaError
from ftw.map.samples import SampleTable
from ftw.map.shard import (
    LIBVER,
    NORMALISATION,
    SCHEMA_VERSION,
    STATE_UNITS,
    CaptureSpec,
    ShardPlace,
    attribute,
    describe,
    get,
    layer_name,
    pooled_name,
    put,
    tokens_name,
    write_image,
)

INDEX = "index.h5"
INDEX_FORMAT = "ftw-encyclopedia"
MARKS = (("rows", "<i4"), ("cols", "<i4"), ("labels", "<i1"), ("weights", "<f4"))
WORDS = ("texts", "groups", "splits", "sources")


class DamagedIndexError(EncyclopediaError):
    """An `index.h5` that is absent or unreadable; it can be written anew from the table and the spec."""


@dataclass(frozen=True, kw_only=True)
class FinishedStates:
    """What a complete set of shards adds to the index.

    Attributes:
        places, num_kept: every shard, and how many token states it keeps.
        num_tokens, kept_tokens: S counts of tokens read, and of token states kept.
        num_cut: texts that lost their end.
        states_sha256: one word for the bytes of all shards.
        read_means: (layer, shard) to its float16 pooled means [n, D].
    """

    places: Sequence[ShardPlace]
    num_kept: Sequence[int]
    num_tokens: np.ndarray
    kept_tokens: np.ndarray
    num_cut: int
    states_sha256: str
    read_means: Callable[[int, ShardPlace], np.ndarray]


def read_index(folder: Path) -> tuple[SampleTable, CaptureSpec, str]:
    """Table, spec and the hash of the finalised states ("" before that).

    Raises:
        DamagedIndexError: there is no index, or its bytes are not what was written.
        EncyclopediaError: it was written by a later version.
    """
    path = folder / INDEX
    if not path.exists():
        raise DamagedIndexError(f"{folder} holds no encyclopedia (no {INDEX}); make it with: ftw collect")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != INDEX_FORMAT:
                raise DamagedIndexError(f"{path} is not the index of an encyclopedia; delete it and collect again")
            version = attribute(file, "schema_version")
            if version != SCHEMA_VERSION:
                raise EncyclopediaError(
                    f"{path} has schema version {version}; this ftw reads {SCHEMA_VERSION}: use the ftw that wrote it"
                )
            table = _read_table(file)
            spec = CaptureSpec.from_json(json.loads(attribute(file, "spec")))
            if spec.key(table) != attribute(file, "key"):
                raise DamagedIndexError(f"{path} has altered bytes; run the same ftw collect again to write it anew")
            return table, spec, attribute(file, "states_sha256")
    # h5py raises RuntimeError or KeyError for some kinds of damage, OSError for the others; text may no longer decode.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, DataError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:120]
        raise DamagedIndexError(f"{path} is damaged ({reason}); run the same ftw collect again") from error


def write_index(
    folder: Path,
    table: SampleTable,
    spec: CaptureSpec,
    finished: FinishedStates | None = None,
    *,
    moments: bool = True,
) -> None:
    """Write the index atomically, with views and moments if the states are all there."""
    image = io.BytesIO()
    with h5py.File(image, "w", libver=LIBVER) as file:
        file.attrs["format"] = INDEX_FORMAT
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["key"] = spec.key(table)
        file.attrs["spec"] = json.dumps(spec.as_json(), sort_keys=True)
        file.attrs["substrate"] = spec.substrate_name
        file.attrs["normalisation"] = NORMALISATION
        file.attrs["states_sha256"] = finished.states_sha256 if finished else ""
        _write_table(file, table)
        if finished:
            file.attrs["num_cut"] = finished.num_cut
            put(file, "samples/num_tokens", finished.num_tokens.astype("<i4"), axes="S texts", units="tokens")
            _write_views(file, len(table), spec, finished)
            if moments and "mean" in spec.pools:
                _write_statistics(file, table, spec, finished)
    write_image(folder / INDEX, image)


def _write_table(file: h5py.File, table: SampleTable) -> None:
    try:
        names = [name.encode() for name in table.concepts]
    except UnicodeEncodeError as error:
        raise DataError(f"a concept name is not valid Unicode: {error.object!r}") from error
    if bad := [name for name in table.concepts if "\0" in name]:
        raise DataError(f"concept name {bad[0]!r} contains a NUL character")
    concepts = file.create_dataset("concepts", data=names, dtype=h5py.string_dtype(), track_times=False)
    describe(concepts, axes="N concepts", dtype="utf-8", units="name")
    for name in WORDS:
        _put_words(file, f"samples/{name}", getattr(table, name), axes="S texts")
    put(file, "samples/stage", sample_stages(table), axes="S texts", units="stage (0 term .. 3 adversarial)")
    columns = file.create_group("columns")
    for number, name in enumerate(sorted(table.columns)):
        # The name is an attribute: a user's column may be called anything, "a/b" included.
        _put_words(columns, f"{number:04d}", table.columns[name], axes="S texts")
        columns.require_group(f"{number:04d}").attrs["name"] = name
    for name, dtype in MARKS:
        units = {"rows": "text index", "cols": "concept index", "labels": "0 or 1", "weights": "weight > 0"}[name]
        put(file, f"marks/{name}", getattr(table, name).astype(dtype), axes="E marks", units=units)


def _read_table(file: h5py.File) -> SampleTable:
    words = {name: _read_words(file[f"samples/{name}"]) for name in WORDS}
    marks = {name: get(file, f"marks/{name}") for name, _ in MARKS}
    groups = [file.require_group(f"columns/{number}") for number in file.require_group("columns")]
    return SampleTable(
        texts=words["texts"],
        groups=words["groups"],
        splits=words["splits"],
        sources=words["sources"],
        concepts=[name.decode() for name in get(file, "concepts")],
        columns={attribute(group, "name"): _read_words(group) for group in groups},
        **marks,
    )


def _put_words(group: h5py.Group, name: str, words: Sequence[str], *, axes: str) -> None:
    encoded = [word.encode("utf-8", "surrogatepass") for word in words]
    ends = np.cumsum([0, *(len(word) for word in encoded)], dtype="<i8")
    put(group, f"{name}/bytes", np.frombuffer(b"".join(encoded), dtype=np.uint8), axes="bytes", units="utf-8")
    put(group, f"{name}/offsets", ends, axes=f"{axes} + 1", units="bytes")


def _read_words(group: Any) -> list[str]:
    joined, ends = get(group, "bytes").tobytes(), get(group, "offsets").tolist()
    return [joined[low:high].decode("utf-8", "surrogatepass") for low, high in itertools.pairwise(ends)]


def sample_stages(table: SampleTable) -> np.ndarray:
    """S refinement stages (int8), from the table's column `stage`; 0 without one.

    Raises:
        DataError: a stage that is not a whole number of 0..127.
    """
    words = table.columns.get("stage")
    if words is None:
        return np.zeros(len(table), dtype=np.int8)
    bad = [row for row, word in enumerate(words) if not (word.isdecimal() and int(word) < 128)]
    if bad:
        raise DataError(f"text {bad[0]}: stage {words[bad[0]]!r} is not a whole number of 0..127")
    return np.array([int(word) for word in words], dtype=np.int8)


def _write_views(file: h5py.File, num_texts: int, spec: CaptureSpec, finished: FinishedStates) -> None:
    """Virtual datasets over the shards, by relative path; a shard that has gone reads as NaN."""
    names = [(pooled_name(pool, layer), "S texts, D width", False) for pool in spec.pools for layer in spec.layers]
    if spec.keeps_tokens:
        names += [(tokens_name(layer), "ΣT tokens, D width", True) for layer in spec.layers]
        offsets = np.concatenate([[0], np.cumsum(finished.kept_tokens)]).astype("<i8")
        put(file, "tokens/offsets", offsets, axes="S texts + 1", units="tokens")
    for name, axes, by_token in names:
        sizes = list(finished.num_kept) if by_token else [len(place) for place in finished.places]
        layout = h5py.VirtualLayout((sum(sizes), spec.width), np.float16)
        # create_virtual_dataset has no track_times, and the time of day would make equal stores differ.
        layout.dcpl.set_obj_track_times(False)
        start = 0
        for place, size in zip(finished.places, sizes, strict=True):
            if size:
                source = f"{place.path.parent.name}/{place.path.name}"
                layout[start : start + size] = h5py.VirtualSource(source, name, (size, spec.width), np.float16)
            start += size
        view = file.create_virtual_dataset(name, layout, fillvalue=np.nan)
        describe(view, axes=axes, dtype="float16", units=STATE_UNITS, normalisation=NORMALISATION)


def _write_statistics(file: h5py.File, table: SampleTable, spec: CaptureSpec, finished: FinishedStates) -> None:
    rows, cols = positives(table)
    stage = np.full(len(table.concepts), -1, dtype=np.int8)
    np.maximum.at(stage, cols, sample_stages(table)[rows])
    count = np.bincount(cols, minlength=len(table.concepts)).astype("<i4")
    put(file, "statistics/num_samples", count, axes="N concepts", units="positive training texts")
    put(file, "statistics/stage", stage, axes="N concepts", units="stage (-1 without a sample)")
    confidence = np.full(len(table.concepts), np.nan, dtype="<f4")
    put(file, "statistics/confidence", confidence, axes="N concepts", units="0..1, NaN until known")
    enough_N1 = (count > 1)[:, None]
    for layer in spec.layers:
        _, mean_ND, m2_ND = concept_moments(table, finished, layer)
        mean_ND = np.where(count[:, None] > 0, mean_ND, np.nan).astype("<f4")
        variance_ND = np.where(enough_N1, m2_ND / np.maximum(count - 1, 1)[:, None], np.nan).astype("<f4")
        for name, values in (("mean", mean_ND), ("variance", variance_ND)):
            units = STATE_UNITS if name == "mean" else f"square of: {STATE_UNITS}"
            path = f"statistics/{layer_name(layer)}/{name}"
            put(file, path, values, axes="N concepts, D width", units=units, normalisation=NORMALISATION)


def positives(table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """Rows and concepts of the positive marks of training texts, by row and then concept."""
    train = np.asarray(table.splits) == "train"
    kept = (table.labels == 1) & train[table.rows]
    rows, cols = table.rows[kept].astype(np.int64), table.cols[kept].astype(np.int64)
    order = np.lexsort((cols, rows))
    return rows[order], cols[order]


def concept_moments(
    table: SampleTable, finished: FinishedStates, layer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count [N], mean and sum of squared deviations [N, D] (float64) of the pooled means, merged shard by shard."""
    rows, cols = positives(table)
    count = np.zeros(len(table.concepts), dtype=np.int64)
    mean = m2 = np.zeros((0, 0))
    for place in finished.places:
        states_SD = finished.read_means(layer, place).astype(np.float64)
        if not mean.size:
            mean, m2 = np.zeros((2, len(table.concepts), states_SD.shape[1]))
        low, high = np.searchsorted(rows, [place.start, place.stop])
        if low == high:
            continue
        order = np.argsort(cols[low:high], kind="stable")
        concepts, starts, counts = np.unique(cols[low:high][order], return_index=True, return_counts=True)
        states_ED = states_SD[rows[low:high][order] - place.start]
        shard_mean = np.add.reduceat(states_ED, starts, axis=0) / counts[:, None]
        shard_m2 = np.add.reduceat((states_ED - np.repeat(shard_mean, counts, axis=0)) ** 2, starts, axis=0)
        merged = merge_moments(count[concepts], mean[concepts], m2[concepts], counts, shard_mean, shard_m2)
        count[concepts], mean[concepts], m2[concepts] = merged
    return count, mean, m2


def merge_moments(
    count_a: np.ndarray,
    mean_a: np.ndarray,
    m2_a: np.ndarray,
    count_b: np.ndarray,
    mean_b: np.ndarray,
    m2_b: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and sum of squared deviations of two sets together, from those of each.

    Counts [...] and moments [..., D]. Nothing is read again, and no large sums cancel.
    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    count = np.asarray(count_a) + np.asarray(count_b)
    share = (np.asarray(count_b) / np.maximum(count, 1))[..., None]
    delta = mean_b - mean_a
    mean = mean_a + delta * share
    m2 = m2_a + m2_b + delta**2 * (np.asarray(count_a)[..., None] * share)
    return count, mean, m2
