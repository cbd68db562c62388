"""How sure the last judge was of each concept, kept beside the rounds.

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
    """Confidence in 0..1 or NaN [N], the concepts that each was taken for, and words about the judge."""

    confidence_N: np.ndarray
    confused_with: list[list[int]]
    judged: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, num: int) -> "Verdict":
        """What was kept; nothing known where there is no file.

        Raises:
            EncyclopediaError: it is damaged, or for other concepts.
        """
        path = folder / FILE
        if not path.exists():
            return cls(np.full(num, np.nan, dtype=np.float32), [[] for _ in range(num)], {})
        found = read_json(path, "delete it and judge again")
        try:
            values = [np.nan if value is None else float(value) for value in found["confidence"]]
            others = [[int(other) for other in one] for one in found["confused_with"]]
            if not len(values) == len(others) == num or any(not 0 <= other < num for one in others for other in one):
                raise ValueError(f"it does not fit {num:,} concepts")
            return cls(np.array(values, dtype=np.float32), others, dict(found["judged"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EncyclopediaError(f"{path} is damaged ({error}); delete it and judge again") from error

    def save(self, folder: Path, num: int) -> None:
        """Write it, whole or not at all.

        Raises:
            DataError: not one value for each of `num` concepts, or one outside 0..1.
        """
        known = self.confidence_N[~np.isnan(self.confidence_N)]
        if self.confidence_N.shape != (num,) or len(self.confused_with) != num or ((known < 0) | (known > 1)).any():
            raise DataError(
                f"confidence has shape {self.confidence_N.shape} for {num:,} concepts, or lies outside 0..1"
            )
        # Six digits: equal runs give equal files, whatever the last bits of a sum.
        values = [None if np.isnan(value) else round(float(value), 6) for value in self.confidence_N]
        write_json(folder / FILE, {"judged": self.judged, "confidence": values, "confused_with": self.confused_with})
