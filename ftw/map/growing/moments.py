"""Mean and variance of every concept, brought up to date round by round without reading an old sample again.

Each round leaves one small HDF5 file: for the concepts that the round touched, the moments of all their samples so far,
made by merging the moments before with those of the round's own samples. The newest file that has a concept speaks for
it. A concept with a single sample has no entry beside that sample: its mean is the sample.

Axes: N concepts, n concepts of a round, m those of them with two samples or more, S texts, L layers, D model width.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ftw.errors import EncyclopediaError
from ftw.map.index import merge_moments
from ftw.map.shard import LIBVER, NORMALISATION, STATE_UNITS, attribute, digest, get, layer_name, put, write_image

FORMAT = "ftw-growing-moments"
FILE = "moments.h5"


@dataclass(frozen=True)
class Moments:
    """Count [n], mean and sum of squared deviations [n, D] (float64) of the samples of some concepts."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def none(cls, num: int, width: int) -> "Moments":
        """Of no samples."""
        return cls(np.zeros(num, dtype=np.int64), np.zeros((num, width)), np.zeros((num, width)))

    @classmethod
    def of(cls, states_SD: np.ndarray, place_S: np.ndarray, num: int) -> "Moments":
        """Of samples that belong to the concepts at `place_S` (0..num - 1)."""
        order = np.argsort(place_S, kind="stable")
        places, starts, counts = np.unique(place_S[order], return_index=True, return_counts=True)
        found = cls.none(num, states_SD.shape[1])
        if len(places):
            sorted_SD = states_SD[order].astype(np.float64)
            found.count[places] = counts
            found.mean[places] = np.add.reduceat(sorted_SD, starts, axis=0) / counts[:, None]
            deviation_SD = sorted_SD - np.repeat(found.mean[places], counts, axis=0)
            found.m2[places] = np.add.reduceat(deviation_SD**2, starts, axis=0)
        return found

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets together (`ftw.map.index.merge_moments`)."""
        return Moments(*merge_moments(self.count, self.mean, self.m2, other.count, other.mean, other.m2))

    def variance(self) -> np.ndarray:
        """Sample variance [n, D] (n - 1 below); NaN under two samples."""
        degrees = np.where(self.count > 1, self.count - 1, np.nan)
        return self.m2 / degrees[:, None]


@dataclass(frozen=True, kw_only=True)
class RoundMoments:
    """What one round's file says; means and deviations stay on disk.

    Attributes:
        path: the file.
        concepts: n indices of the concepts touched, ascending. count: their samples so far. stage: the highest so far.
        row: n text rows of a concept's only sample in this round's texts; -1 where there are more.
        place: n places among the stored moments; -1 where there is but one sample.
    """

    path: Path
    concepts: np.ndarray
    count: np.ndarray
    stage: np.ndarray
    row: np.ndarray
    place: np.ndarray

    @classmethod
    def open(cls, path: Path, num_concepts: int) -> "RoundMoments":
        """Read all but the moments.

        Raises:
            EncyclopediaError: the file is damaged, or of another encyclopedia.
        """
        try:
            with h5py.File(path, "r", locking=False) as file:
                if file.attrs.get("format") != FORMAT:
                    raise ValueError("it holds something else")
                arrays = [get(file, name).astype(np.int64) for name in ("concepts", "count", "stage", "row")]
                for name, array in zip(("concepts", "count", "stage", "row"), arrays, strict=True):
                    if digest(get(file, name)) != attribute(file[name], "sha256") or len(array) != len(arrays[0]):
                        raise ValueError(f"altered bytes in {name}")
        # h5py raises RuntimeError or KeyError for some kinds of damage, OSError for the others.
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        concepts, count, stage, row = arrays
        if len(concepts) and not (concepts.min() >= 0 and concepts.max() < num_concepts):
            raise _damaged(path, f"it names a concept beyond the {num_concepts} there are")
        several = count > 1
        place = np.where(several, np.cumsum(several) - 1, -1)
        return cls(path=path, concepts=concepts, count=count, stage=stage, row=row, place=place)

    def read(self, layer: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and sums of squared deviations (float64) at some places among the stored ones.

        Raises:
            EncyclopediaError: the file is damaged.
        """
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                name = layer_name(layer)
                mean, m2 = (get(file, f"{name}/{part}")[places] for part in ("mean", "m2"))
                return mean.astype(np.float64), m2.astype(np.float64)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise _damaged(self.path, str(error)) from error


def write_moments(
    path: Path,
    *,
    concepts: np.ndarray,
    count: np.ndarray,
    stage: np.ndarray,
    row: np.ndarray,
    by_layer: Iterable[tuple[int, Moments]],
) -> None:
    """Write what is known so far of the concepts that a round touched, whole or not at all.

    Args:
        by_layer: layer after layer, the moments of those concepts whose `count` is two or more.

    Raises:
        DiskFullError: no room; nothing else is touched.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver=LIBVER) as file:
        file.attrs["format"] = FORMAT
        put(file, "concepts", concepts.astype("<i4"), axes="n concepts", units="concept index")
        put(file, "count", count.astype("<i4"), axes="n concepts", units="training texts so far")
        put(file, "stage", stage.astype("<i1"), axes="n concepts", units="highest stage so far")
        put(file, "row", row.astype("<i4"), axes="n concepts", units="text row of an only sample, -1 else")
        for layer, moments in by_layer:
            for name, array, units in (("mean", moments.mean, STATE_UNITS), ("m2", moments.m2, "sum of squares")):
                put(
                    file,
                    f"{layer_name(layer)}/{name}",
                    array.astype("<f4"),
                    axes="m concepts, D width",
                    units=units,
                    normalisation=NORMALISATION,
                )
    write_image(path, image)


def _damaged(path: Path, reason: str) -> EncyclopediaError:
    words = (reason.splitlines() or ["no reason given"])[0][:120]
    return EncyclopediaError(
        f"{path} is damaged ({words}); delete the file and those of later rounds: the next ftw encyclopedia command "
        "makes them again from the states"
    )
