"""Sequences in the layout of the original design: one file, one padded array a layer, concept and class.

    /layer_9/concept_0/positive_sequences [P, T, D] float16, positive_lengths [P]; negative_... alike

The name of a concept is an attribute of its group (there, only its number was known). Padding is zero and beyond the
lengths. Reading checks sizes before anything is held, since such files come from elsewhere.

Axes: P sequences, T tokens, D model width.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ftw.errors import DataError
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.sequences import NEGATED
from ftw.map.shard import LIBVER, attribute, write_image

MOST_BYTES = 2**31  # of one array
CLASSES = (("positive", 1), ("negative", 0))
_LAYER, _CONCEPT = re.compile(r"layer_(-?\d+)"), re.compile(r"concept_(\d+)")


class DenseSequences(NamedTuple):
    """The sequences of one concept at one layer: float16 [P, T, D], their true lengths and labels [P]."""

    layer: int
    concept: str
    states_PTD: np.ndarray
    lengths_P: np.ndarray
    labels_P: np.ndarray


def export_dense(encyclopedia: Encyclopedia, path: Path) -> Path:
    """Write the marked answers of an encyclopedia; those to negated prompts are left out.

    Raises:
        EncyclopediaError: it keeps no token states. DiskFullError: no room; the old file stays.
    """
    table, image = encyclopedia.table, io.BytesIO()
    longest = int(encyclopedia.num_tokens.max(initial=0))
    with h5py.File(image, "w", libver=LIBVER) as file:
        file.attrs["substrate"], file.attrs["normalisation"] = encyclopedia.spec.substrate_name, "layernorm"
        for layer in encyclopedia.spec.layers:
            for number, name in enumerate(table.concepts):
                group = file.create_group(f"layer_{layer}/concept_{number}")
                group.attrs["concept"] = name
                marked = table.cols == number
                for word, label in CLASSES:
                    rows = table.rows[marked & (table.labels == label)]
                    rows = np.array([row for row in rows if table.sources[row] != NEGATED], dtype=np.int64)
                    states_TD, offsets = encyclopedia.token_states(layer, rows)
                    group[f"{word}_sequences"] = _padded(states_TD, offsets, longest)
                    group[f"{word}_lengths"] = np.diff(offsets).astype("<i4")
    write_image(path, image)
    return path


def read_dense(path: Path) -> Iterator[DenseSequences]:
    """Every concept at every layer of a file in this layout.

    Raises:
        DataError: no such file, not this layout, an array too large, or lengths that do not fit their sequences.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            for layer_name in sorted(file, key=_natural):
                if (layer := _LAYER.fullmatch(layer_name)) is None:
                    raise DataError(f"{path}: {layer_name!r} is no layer; the layout is /layer_L/concept_K/…")
                for concept_name in sorted(_group(file, layer_name, path), key=_natural):
                    yield _concept(file, int(layer[1]), f"{layer_name}/{concept_name}", path)
    # h5py raises RuntimeError or KeyError for some kinds of damage, OSError for the others.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no readable file of sequences ({error})") from error


def _concept(file: Any, layer: int, name: str, path: Path) -> DenseSequences:
    group, number = _group(file, name, path), _CONCEPT.fullmatch(name.rpartition("/")[2])
    if number is None:
        raise DataError(f"{path}: {name!r} is no concept; the layout is /layer_L/concept_K/…")
    states, lengths, labels = [], [], []
    for word, label in CLASSES:
        dataset, sizes = group[f"{word}_sequences"], group[f"{word}_lengths"]
        if dataset.ndim != 3 or dataset.dtype.kind != "f" or sizes.shape != dataset.shape[:1]:
            raise DataError(f"{path}: {name}/{word}_sequences is {dataset.dtype} {dataset.shape}, not [P, T, D] floats")
        if dataset.size * 2 > MOST_BYTES:
            raise DataError(f"{path}: {name}/{word}_sequences holds {dataset.size:,} numbers; split the file")
        lengths_P = np.asarray(sizes[()]).astype(np.int64)
        if ((lengths_P < 0) | (lengths_P > dataset.shape[1])).any():
            raise DataError(f"{path}: {name}/{word}_lengths go beyond {dataset.shape[1]} tokens")
        states.append(np.asarray(dataset[()]).astype(np.float16))
        lengths.append(lengths_P)
        labels.append(np.full(len(lengths_P), label, dtype=np.int8))
    if states[0].shape[1:] != states[1].shape[1:]:
        raise DataError(f"{path}: positives and negatives of {name} have shapes {[part.shape for part in states]}")
    found = attribute(group, "concept") if "concept" in group.attrs else f"concept_{number[1]}"
    return DenseSequences(layer, str(found), *(np.concatenate(parts) for parts in (states, lengths, labels)))


def _group(file: Any, name: str, path: Path) -> Any:
    group = file[name]
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path}: {name!r} is no group; the layout is /layer_L/concept_K/…")
    return group


def _padded(states_TD: np.ndarray, offsets: np.ndarray, longest: int) -> np.ndarray:
    lengths = np.diff(offsets)
    padded = np.zeros((len(lengths), longest, states_TD.shape[1]), dtype=np.float16)
    for row, (start, length) in enumerate(zip(offsets, lengths, strict=False)):
        padded[row, :length] = states_TD[start : start + length]
    return padded


def _natural(name: str) -> tuple[int, str]:
    digits = re.search(r"-?\d+$", name)
    return (int(digits[0]) if digits else 0, name)
