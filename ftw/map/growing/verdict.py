"""How sure the last judge was of each concept, and how much it doubts it, kept beside the rounds.

Axes: N concepts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftw.errors import DataError, EncyclopediaError
from ftw.map.growing.plan import read_json, write_json

FILE = "confidence.json"


@dataclass(frozen=True, eq=False)
class Verdict:
    """Confidence in 0..1 and doubt, NaN where nobody judged [N]; what each was taken for; words about the judge."""

    confidence_N: np.ndarray
    doubt_N: np.ndarray
    confused_with: list[list[int]]
    judged: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, num: int) -> "Verdict":
        """What was kept; nothing known where there is no file, or one from before doubt was kept.

        Raises:
            EncyclopediaError: it is damaged, or for other concepts.
        """
        path, unknown_N = folder / FILE, np.full(num, np.nan, dtype=np.float32)
        found = read_json(path, "delete it and judge again") if path.exists() else {}
        if not isinstance(found, dict) or "doubt" not in found:
            return cls(unknown_N, unknown_N, [[] for _ in range(num)], {})
        try:
            confidence_N, doubt_N = (_read(found[name]) for name in ("confidence", "doubt"))
            others = [[int(other) for other in one] for one in found["confused_with"]]
            sizes = {len(confidence_N), len(doubt_N), len(others)}
            if sizes != {num} or any(not 0 <= other < num for one in others for other in one):
                raise ValueError(f"it does not fit {num:,} concepts")
            return cls(confidence_N, doubt_N, others, dict(found["judged"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EncyclopediaError(f"{path} is damaged ({error}); delete it and judge again") from error

    def save(self, folder: Path, num: int) -> None:
        """Write it, whole or not at all.

        Raises:
            DataError: not one value for each of `num` concepts, or one outside 0..1.
        """
        known = self.confidence_N[~np.isnan(self.confidence_N)]
        shapes = {self.confidence_N.shape, self.doubt_N.shape, (len(self.confused_with),)}
        if shapes != {(num,)} or ((known < 0) | (known > 1)).any():
            raise DataError(
                f"confidence has shape {self.confidence_N.shape}, doubt {self.doubt_N.shape}, for {num:,} concepts; "
                "or a confidence lies outside 0..1"
            )
        figures = {"confidence": _written(self.confidence_N), "doubt": _written(self.doubt_N)}
        write_json(folder / FILE, {"judged": self.judged, **figures, "confused_with": self.confused_with})


def _read(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float32)


def _written(values_N: np.ndarray) -> list[float | None]:
    # Six digits: equal runs give equal files, whatever the last bits of a sum.
    return [None if np.isnan(value) else round(float(value), 6) for value in values_N]
