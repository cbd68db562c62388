"""What siblings among the negatives bring, and which pools suit concepts that are mentioned somewhere in a text.

Lenses learn from glosses and are read on Wikipedia articles of the part kept for choices: `ftw collect
data.heldout_part=dev "map.encyclopedia.tokens_per_text={train: -1, test: -1, background: -1}"`.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ftw.map import metrics
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.text_level import text_level_logits
from ftw.map.training.lens_rows import LensRows, lens_rows
from ftw.map.training.recipe import solve_recipe

LAYERS = (9, 18, 27)
STATES = ["mean", "last", "tail", "spread"]


def weighted(weight: float) -> Callable[[LensRows], LensRows]:
    """Positives of siblings count so much among the negatives; 0 leaves them out."""

    def change(rows: LensRows) -> LensRows:
        if not weight:
            return rows.take(np.flatnonzero((rows.labels > 0) | (rows.weights <= 1)))
        return replace(rows, weights=np.where(rows.weights > 1, weight, 1).astype(np.float32))

    return change


CASES: dict[str, tuple[Callable[[LensRows], LensRows], list[str]]] = {
    "siblings left out": (weighted(0), ["mean"]),
    "siblings, weight 1": (weighted(1), ["mean"]),
    "siblings, weight 3 (default)": (weighted(3), ["mean"]),
    "siblings, weight 10": (weighted(10), ["mean"]),
    "mean and strongest token": (weighted(3), ["mean", "max"]),
    "the four states": (weighted(3), STATES),
}


def line(encyclopedia: Encyclopedia, lenses: list[LensRows], pools: list[str]) -> list[str]:
    """AUROC, calibration error with its floor, rates at the 1 % threshold; means over the lenses."""
    rows = encyclopedia.table.where("test")
    marks = encyclopedia.table.matrices(rows)
    stack = solve_recipe(encyclopedia, lenses, layers=LAYERS, pools=pools, progress=False).stack
    logits_SN = text_level_logits(stack, encyclopedia, rows, wanted_SN=marks[1] > 0)
    chances_SN = 1 / (1 + np.exp(-logits_SN.astype(np.float64)))
    found, alarms = metrics.rates_at(logits_SN, *marks, stack.threshold_1fpr_N.numpy())
    error, floor = (np.nanmean(of(chances_SN, *marks, prior=0.5)) for of in (metrics.ece, metrics.ece_floor))
    area = np.nanmean(metrics.auroc(logits_SN, *marks))
    return [f"{area:.4f}", f"{error:.3f} ({floor:.3f})", f"{np.nanmean(alarms):.1%}", f"{np.nanmean(found):.0%}"]


def main() -> None:
    """Fit every case and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dev", type=Path, help="folder that the collection names")
    table = Table("case", "AUROC", "ECE (floor)", "false positives at 1 %", "found")
    with Encyclopedia.open(parser.parse_args().dev) as encyclopedia:
        lenses = lens_rows(encyclopedia.table)
        for name, (change, pools) in track(CASES.items(), "cases"):
            table.add_row(name, *line(encyclopedia, [change(rows) for rows in lenses], pools))
    Console().print(table)


if __name__ == "__main__":
    main()
