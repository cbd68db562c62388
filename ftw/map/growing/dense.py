"""Pooled states in the layout of the original design: one file, one array of means a layer.

    attrs n_concepts, activation_dim, model, stage, samples_per_concept, timestamp; normalisation (ours)
    /concepts [N]                                 names
    /layer_9/activations, /layer_9/variance       [N, D], attrs samples_per_concept, confidence, stage
    /num_samples, /stages [N]                     ours: there, only the whole file had a number and a stage

A file made elsewhere holds means of raw states: they are layer-normed as they come in, as ours are before the mean.

Axes: N concepts, D model width.
"""

import io
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ftw.errors import ConceptError, DataError, EncyclopediaError
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.growing.contexts import table_of
from ftw.map.growing.entries import Entry
from ftw.map.growing.moments import FILE as MOMENTS
from ftw.map.growing.moments import Moments, write_moments
from ftw.map.growing.plan import STAGES, Plan
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.shard import LIBVER, NORMALISATION, CaptureSpec, ShardStates, attribute, write_image
from ftw.paths import replace_folder

MOST_BYTES = 2**33  # of one array
EPS = 1e-5
CONFIDENCE = {0: "low", 1: "medium", 2: "high", 3: "high"}  # the original's word for a stage
SHARD_CONCEPTS = 4096
_LAYER = re.compile(r"layer_(-?\d+)")


@dataclass(frozen=True)
class DensePooled:
    """What such a file says: names, and by layer means and variances [N, D]; N counts and stages."""

    names: list[str]
    model: str
    mean: dict[int, np.ndarray]
    variance: dict[int, np.ndarray]
    num_samples: np.ndarray
    stage: np.ndarray


def export_pooled(growing: GrowingEncyclopedia, path: Path) -> Path:
    """Write mean and variance of every concept.

    Raises:
        DiskFullError: no room; the old file stays. EncyclopediaError: damaged rounds.
    """
    count_N, stage_N, image = growing.num_samples, growing.stage, io.BytesIO()
    about = {"samples_per_concept": int(count_N.max(initial=0)), "stage": int(stage_N.max(initial=0))}
    with h5py.File(image, "w", libver=LIBVER) as file:
        file.attrs.update({"n_concepts": len(growing), "activation_dim": growing.width, **about})
        file.attrs.update({"model": growing.spec.substrate_name, "normalisation": NORMALISATION})
        file.attrs["timestamp"] = datetime.now(UTC).isoformat(timespec="seconds")
        file.create_dataset("concepts", data=[name.encode() for name in growing.concepts], dtype=h5py.string_dtype())
        file["num_samples"], file["stages"] = count_N.astype("<i4"), stage_N.astype("<i1")
        for layer in growing.layers:
            known = growing.statistics(layer)
            group = file.create_group(f"layer_{layer}")
            group.attrs.update({**about, "confidence": CONFIDENCE.get(about["stage"], "low")})
            for name, array in (("activations", known.mean_ND), ("variance", known.variance_ND)):
                group.create_dataset(name, data=array.astype(np.float16), compression="gzip", compression_opts=4)
    write_image(path, image)
    return path


def read_pooled(path: Path, *, num_layers: int) -> DensePooled:
    """Read a file in this layout.

    Args:
        num_layers: blocks of the substrate, so that layer -1 is known for the last.

    Raises:
        DataError: no such file, not this layout, arrays of other shapes or too large, or states that are not finite.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(file["concepts"])]
            found = {word: int(match[1]) for word in map(str, file) if (match := _LAYER.fullmatch(word))}
            if not found or not names:
                raise DataError(
                    f"{path}: {len(names)} concepts and {len(found)} layers; the layout is /layer_L/activations"
                )
            normed = file.attrs.get("normalisation") == NORMALISATION
            mean, variance = {}, {}
            for word, number in sorted(found.items(), key=lambda item: item[1]):
                layer = number if number >= 0 else num_layers + number
                if not 0 <= layer < num_layers or layer in mean:
                    raise DataError(f"{path}: {word} is no layer of a model of {num_layers} blocks, or is there twice")
                mean[layer] = _array(file, f"{word}/activations", len(names), path, finite=True)
                variance[layer] = _array(file, f"{word}/variance", len(names), path, finite=False)
                if not normed:
                    mean[layer], variance[layer] = _layer_normed(mean[layer]), np.full_like(mean[layer], np.nan)
            return DensePooled(
                names, str(file.attrs.get("model", "unknown")), mean, variance, *_numbers(file, len(names))
            )
    # h5py raises RuntimeError or KeyError for some kinds of damage, OSError for the others.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no readable file of pooled states ({error})") from error


def _array(file: Any, name: str, num: int, path: Path, *, finite: bool) -> np.ndarray:
    if name not in file and not finite:  # variance may be left out
        return np.full(_array(file, name.replace("variance", "activations"), num, path, finite=True).shape, np.nan)
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 2 or len(dataset) != num or dataset.dtype.kind != "f":
        raise DataError(f"{path}: {name} is not an array of floats [{num}, D]")
    if dataset.size * dataset.dtype.itemsize > MOST_BYTES:
        raise DataError(f"{path}: {name} holds {dataset.size:,} numbers; split the file")
    array = np.asarray(dataset[()]).astype(np.float32)
    if finite and not np.isfinite(array).all():
        raise DataError(f"{path}: {name} has states that are not finite")
    return array


def _layer_normed(states_ND: np.ndarray) -> np.ndarray:
    centred = states_ND - states_ND.mean(axis=1, keepdims=True)
    return centred / np.sqrt(centred.var(axis=1, keepdims=True) + EPS)


def _numbers(file: Any, num: int) -> tuple[np.ndarray, np.ndarray]:
    """N counts and stages, from our arrays, else those of the whole file."""
    whole = {"num_samples": "samples_per_concept", "stages": "stage"}
    arrays = []
    for name, word in whole.items():
        values = np.asarray(file[name][()]) if name in file else np.full(num, int(attribute(file, word)))
        least, most = (1, 2**31) if name == "num_samples" else (0, max(STAGES))
        if values.shape != (num,) or (values < least).any() or (values > most).any():
            raise ValueError(f"{name} outside {least}-{most}")
        arrays.append(values.astype(np.int64))
    return arrays[0], arrays[1]


def import_pooled(
    folder: Path, dense: DensePooled, *, fingerprint: str, precision: str = "float32"
) -> GrowingEncyclopedia:
    """A growing encyclopedia that starts from the means of such a file: one sample a concept stands for all of theirs.

    Raises:
        EncyclopediaError: the folder exists. ConceptError: names twice, or unfit. DiskFullError: no room.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists():
        raise EncyclopediaError(f"{folder} exists; name another encyclopedia, or delete it")
    width = next(iter(dense.mean.values())).shape[1]
    spec = CaptureSpec(
        substrate_name=dense.model,
        fingerprint=fingerprint,
        layers=tuple(sorted(dense.mean)),
        width=width,
        pools=("mean",),
        tokens_per_text={},
        precision=precision,
        shard_texts=SHARD_CONCEPTS,
    )
    entries = [Entry(name=name, term=name, phrase=name, lemmas=(name,)) for name in dense.names]
    if any(array.shape[1] != width for array in dense.mean.values()):
        raise ConceptError("layers of different widths")
    with replace_folder(folder) as unfinished:
        with GrowingEncyclopedia.create(unfinished, entries, spec) as growing:
            number = growing.begin(Plan(stage=0))
            with Encyclopedia.create(
                growing.round_folder(number), table_of(growing, growing.plan(number)), spec
            ) as round_:
                _write_shards(round_, dense)
                round_.finalise(moments=False)
        _write_moments(unfinished, number, dense)
    return GrowingEncyclopedia.open(folder)


def _write_shards(encyclopedia: Encyclopedia, dense: DensePooled) -> None:
    for number in range(encyclopedia.num_shards):
        place = encyclopedia.place(number)
        rows = slice(place.start, place.stop)
        states = {layer: array[rows].astype(np.float16) for layer, array in dense.mean.items()}
        counts = np.ones(len(place), dtype=np.int32)
        encyclopedia.write_shard(number, ShardStates(num_tokens=counts, pooled={"mean": states}))


def _write_moments(folder: Path, number: int, dense: DensePooled) -> None:
    several = dense.num_samples > 1
    rows = np.arange(len(dense.names))

    def of(layer: int) -> Moments:
        degrees = (dense.num_samples[several] - 1)[:, None]
        m2 = np.nan_to_num(dense.variance[layer][several]).astype(np.float64) * degrees
        return Moments(dense.num_samples[several], dense.mean[layer][several].astype(np.float64), m2)

    write_moments(
        folder / "rounds" / f"{number:04d}" / MOMENTS,
        concepts=rows,
        count=dense.num_samples,
        stage=dense.stage,
        row=np.where(several, -1, rows),
        by_layer=((layer, of(layer)) for layer in sorted(dense.mean)) if several.any() else (),
    )
