"""Can probabilities learnt from glosses be made to hold better on articles, without a label there?

Each attempt refits the last line of calibration (Platt) on training rows out of fold, weighted or with unlabelled
background articles beside them, and is read on articles: `dev` is there to choose by, `test` to tell the truth.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ftw.map import metrics
from ftw.map.calibrate import fit_platt
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.text_level import text_level_logits
from ftw.map.training.lens_rows import LensRows, lens_rows
from ftw.map.training.recipe import solve_recipe

LAYERS = (9, 18, 27)


@dataclass
class Read:
    """Logits of articles and of background, and what the lenses said of their own rows out of fold."""

    logits_SN: np.ndarray
    marks: tuple[np.ndarray, np.ndarray]
    background_BN: np.ndarray
    lenses: list[LensRows]
    held_out: list[np.ndarray]
    words_S: np.ndarray
    sources_S: np.ndarray

    def gap(self, scale_N: np.ndarray | float, offset_N: np.ndarray | float) -> float:
        """Calibration error minus what a perfect lens would read, mean over lenses."""
        chances_SN = 1 / (1 + np.exp(-(self.logits_SN * scale_N + offset_N).astype(np.float64)))
        error_N, floor_N = (of(chances_SN, *self.marks, prior=0.5) for of in (metrics.ece, metrics.ece_floor))
        return float(np.nanmean(error_N) - np.nanmean(floor_N))

    def refitted(
        self, weight: Callable[[LensRows], np.ndarray], background: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Platt's lines on weighted rows; background articles make up a share of the negatives."""
        lines = []
        for lens, (rows, logits_S) in enumerate(zip(self.lenses, self.held_out, strict=True)):
            weights_S = rows.weights * weight(rows)
            further_B = self.background_BN[:, lens] if background else np.zeros(0)
            negative = float(weights_S[rows.labels == 0].sum())
            each = background * negative / max(1, len(further_B))
            weights_S = np.where(rows.labels == 0, (1 - background) * weights_S, weights_S)
            fit = fit_platt(
                np.concatenate([logits_S, further_B])[:, None],
                np.concatenate([rows.labels, np.zeros(len(further_B))])[:, None],
                np.concatenate([weights_S, np.full(len(further_B), each)])[:, None],
                prior=0.5,
            )
            lines.append((fit.scale_N[0], fit.offset_N[0]))
        scale_N, offset_N = np.array(lines).T
        return scale_N, offset_N

    def shift(self, share: float) -> tuple[float, np.ndarray]:
        """Offsets moved by a share of how far background stands from the training negatives, beyond what all share."""
        train_N = [
            np.average(h, weights=r.weights * (1 - r.labels)) for r, h in zip(self.lenses, self.held_out, strict=True)
        ]
        moved_N = np.median(self.background_BN, axis=0) - np.array(train_N)
        return 1.0, -share * (moved_N - np.median(moved_N))


def read(folder: Path) -> Read:
    """Fit on the glosses of a collection and read its articles."""
    with Encyclopedia.open(folder) as encyclopedia:
        table, lenses = encyclopedia.table, lens_rows(encyclopedia.table)
        solved = solve_recipe(encyclopedia, lenses, layers=LAYERS, pools=["mean"])
        rows, background = table.where("test"), table.where("background")
        marks = table.matrices(rows)
        logits = [
            text_level_logits(solved.stack, encyclopedia, some, wanted_SN=np.ones((len(some), len(lenses)), bool))
            for some in (rows, background)
        ]
        words_S = np.array([len(text.split()) for text in table.texts])
        return Read(logits[0], marks, logits[1], lenses, solved.held_out, words_S, np.array(table.sources))


def attempts(part: Read) -> dict[str, float]:
    """Gap to the floor of each attempt."""

    def alike(rows: LensRows) -> np.ndarray:
        return np.ones(len(rows))

    oracle = fit_platt(part.logits_SN, *part.marks, prior=0.5)
    return {
        "as it is": part.gap(1.0, 0.0),
        "logits times 0.8": part.gap(0.8, 0.0),
        "logits times 0.9": part.gap(0.9, 0.0),
        "longer texts weigh more": part.gap(*part.refitted(lambda rows: part.words_S[rows.rows])),
        "definitions weigh five times": part.gap(
            *part.refitted(lambda rows: np.where(part.sources_S[rows.rows] == "definition", 5, 1))
        ),
        "offset moved by half of the shift of background": part.gap(*part.shift(0.5)),
        "background, half of the negatives": part.gap(*part.refitted(alike, 0.5)),
        "Platt on these articles (nobody has it)": part.gap(oracle.scale_N, oracle.offset_N),
    }


def main() -> None:
    """Read both parts and tell the gaps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dev", type=Path, help="folder that `ftw collect data.heldout_part=dev` names")
    parser.add_argument("test", type=Path, help="folder that `ftw collect` names")
    arguments = parser.parse_args()
    found = [attempts(read(folder)) for folder in (arguments.dev, arguments.test)]
    table = Table("calibration", "gap to the floor, dev", "test")
    for name in found[0]:
        table.add_row(name, *(f"{part[name]:.3f}" for part in found))
    Console().print(table)


if __name__ == "__main__":
    main()
