"""The table of a run of `ftw train experiment=sae_probes`: all sets, the hard ones, intervals over sets, and a picture.

Hard are the 39 sets whose words alone rank training rows worst, out of fold: test rows choose nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

NUM_HARD, DRAWS = 39, 10_000
SYSTEMS = {"activation": "auroc", "text": "auroc_text", "both": "auroc_both", "shuffled": "auroc_shuffled"}
PAIRS = (("activation", "text"), ("both", "text"), ("both", "activation"))


def interval(values_N: np.ndarray, draws_RN: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % bootstrap interval over sets."""
    low, high = np.quantile(values_N[draws_RN].mean(axis=1), [0.025, 0.975])
    return {"mean": float(values_N.mean()), "low": float(low), "high": float(high)}


def summary(concepts: dict[str, dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """Means of the systems and of their paired differences over some sets."""
    figures = {system: np.array([concepts[name][key] for name in names]) for system, key in SYSTEMS.items()}
    draws_RN = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    rows = {system: interval(values_N, draws_RN) for system, values_N in figures.items()}
    return rows | {f"{one} - {other}": interval(figures[one] - figures[other], draws_RN) for one, other in PAIRS}


def picture(concepts: dict[str, dict[str, Any]], names: list[str], path: Path) -> None:
    """A dot for each set: words alone against states, and against both."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    text_N = [concepts[name]["auroc_text"] for name in names]
    for axis, (system, key) in zip(axes, (("states", "auroc"), ("states and words", "auroc_both")), strict=True):
        axis.plot([0.35, 1], [0.35, 1], color="0.7", linewidth=1)
        axis.scatter(text_N, [concepts[name][key] for name in names], s=14, alpha=0.8)
        axis.set(xlabel="AUROC, words alone (TF-IDF)", ylabel=f"AUROC, {system}", aspect="equal")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print, and write summary.json and sets.svg beside the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="?", default=Path("runs/latest/metrics.json"))
    metrics = parser.parse_args().metrics
    concepts = json.loads(metrics.read_text(encoding="utf-8"))["concepts"]
    names = sorted(concepts)
    hard = sorted(names, key=lambda name: concepts[name]["choice"]["evidence"]["text"])[:NUM_HARD]
    found = {"all": summary(concepts, names), "hard": summary(concepts, hard)}
    table = Table("", f"{len(names)} sets", f"{NUM_HARD} hard ones")
    for row in found["all"]:
        table.add_row(
            row, *("{mean:.3f} ({low:.3f}, {high:.3f})".format(**found[part][row]) for part in ("all", "hard"))
        )
    Console().print(table)
    text_N, both_N = (np.array([concepts[name][key] for name in names]) for key in ("auroc_text", "auroc_both"))
    worst = int((both_N - text_N).argmin())
    Console().print(f"both, at worst below words: {(both_N - text_N)[worst]:+.3f} ({names[worst]})")
    metrics.with_name("summary.json").write_text(json.dumps(found | {"hard_sets": hard}, indent=1) + "\n", "utf-8")
    picture(concepts, names, metrics.with_name("sets.svg"))


if __name__ == "__main__":
    main()
