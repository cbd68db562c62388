"""What the recipe gives with fewer layers, few rows, few positives and wrong labels, and what a fit costs.

Every line has the words alone on the same rows beside it. Test rows are those of the main run, untouched.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegressionCV

from ftw.map.derived import pooled
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.text_control import TextConfig, fit_text_bank
from ftw.map.text_level import text_level_logits
from ftw.map.training.lens_rows import LensRows, lens_rows, with_rows
from ftw.map.training.recipe import solve_recipe

STATES, THREE = ["mean", "last", "tail", "spread"], (9, 18, 27)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def figures(
    encyclopedia: Encyclopedia, lenses: list[LensRows], *, words: bool = True, **options: Any
) -> dict[str, np.ndarray]:
    """AUROC on the test rows, set by set, of states and of words learnt from these rows."""
    table, rows = encyclopedia.table, encyclopedia.table.where("test")
    labels_SN, weights_SN = table.matrices(rows)
    solved = solve_recipe(encyclopedia, lenses, **{"pools": STATES, "layers": THREE, "progress": False, **options})
    logits_SN = text_level_logits(solved.stack, encyclopedia, rows, wanted_SN=weights_SN > 0)
    found = {"activation": auroc(logits_SN, labels_SN, weights_SN)}
    if words:
        bank = fit_text_bank(with_rows(table, lenses), TextConfig(folds=0, window_words=0), progress=False)
        words_SN = bank.score([table.texts[row] for row in rows]).numpy()
        found["text"] = auroc(words_SN, labels_SN, weights_SN)
    return found


def few(rows: LensRows, count: int, positives: int, rng: np.random.Generator) -> LensRows:
    """So many rows, so many of them positive, or as many as there are."""
    wanted = {1: positives, 0: count - positives}
    drawn = [rng.permutation(np.flatnonzero(rows.labels == label))[:size] for label, size in wanted.items()]
    return rows.take(np.sort(np.concatenate(drawn)))


def flipped(rows: LensRows, share: float, rng: np.random.Generator) -> LensRows:
    """A share of the labels turned round."""
    wrong = rng.permutation(len(rows))[: round(share * len(rows))]
    labels = rows.labels.copy()
    labels[wrong] = 1 - labels[wrong]
    return replace(rows, labels=labels)


def regimes(draws: int) -> dict[str, tuple[int, Callable[[LensRows, np.random.Generator], LensRows]]]:
    """Name -> how often it is drawn, and what it does to the rows of a set."""
    made: dict[str, tuple[int, Callable[[LensRows, np.random.Generator], LensRows]]] = {}
    for size in (1, 2, 5, 10, 20, 50, 100, 150):
        made[f"{size} rows a class"] = (draws if size < 50 else 1, lambda r, g, n=size: few(r, 2 * n, n, g))
    for share in (0.05, 0.1, 0.2):
        made[f"{share:.0%} positives of 150"] = (draws, lambda r, g, p=share: few(r, 150, round(150 * p), g))
    for share in (0.1, 0.2, 0.3):
        made[f"{share:.0%} wrong labels"] = (1, lambda r, g, p=share: flipped(r, p, g))
    return made


def tiers(encyclopedia: Encyclopedia, lenses: list[LensRows]) -> list[dict[str, Any]]:
    """Fewer layers and pools, and other ways to combine them."""
    every = encyclopedia.spec.layers
    cases: dict[str, dict[str, Any]] = {
        "6 layers, 5 pools, stacked": {"layers": every, "pools": [*STATES, "max"]},
        "6 layers, 4 pools, stacked": {"layers": every},
        "6 layers, mean + max + last, averaged": {
            "layers": every,
            "pools": ["mean", "max", "last"],
            "combine": "average",
        },
        "6 layers, mean, averaged": {"layers": every, "pools": ["mean"], "combine": "average"},
        "layers 9, 18, 27, 5 pools, stacked": {"pools": [*STATES, "max"]},
        "layers 9, 18, 27, 4 pools, stacked": {},
        "layer 14, 5 pools, stacked": {"layers": (14,), "pools": [*STATES, "max"]},
        "layer 9, mean": {"layers": (9,), "pools": ["mean"]},
    }
    return [
        line(name, [figures(encyclopedia, lenses, words=False, **options)])
        for name, options in track(cases.items(), "tiers")
    ]


def line(name: str, drawn: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Means over draws, then sets, with an interval over sets for the difference to words."""
    mean = {system: np.mean([each[system] for each in drawn], axis=0) for system in drawn[0]}
    made: dict[str, Any] = {"case": name, "draws": len(drawn)} | {
        f"auroc_{k}": float(v.mean()) for k, v in mean.items()
    }
    if "text" in mean:
        difference_N = mean["activation"] - mean["text"]
        draws_RN = np.random.default_rng(0).integers(0, len(difference_N), (10_000, len(difference_N)))
        low, high = np.quantile(difference_N[draws_RN].mean(axis=1), [0.025, 0.975])
        made |= {"difference": float(difference_N.mean()), "low": float(low), "high": float(high)}
    return made


def speed(encyclopedia: Encyclopedia, lenses: list[LensRows]) -> dict[str, Any]:
    """Cross-validated fits on means of three layers, side by side with scikit-learn's on every tenth set."""
    sample = lenses[::10]
    start = time.perf_counter()
    ours = figures(encyclopedia, lenses, words=False, pools=["mean"])["activation"][::10].mean()
    seconds = (time.perf_counter() - start) / len(lenses)
    table, test = encyclopedia.table, encyclopedia.table.where("test")
    labels_SN, weights_SN = table.matrices(test)
    logits_SN = np.zeros((len(test), len(lenses)))
    start = time.perf_counter()
    for lens, rows in track(list(enumerate(lenses))[::10], "scikit-learn"):
        used = weights_SN[:, lens] > 0
        for layer in THREE:
            train_SD = pooled(encyclopedia, layer, "mean", rows.rows).astype(np.float32)
            center_D, scale_D = train_SD.mean(0), train_SD.std(0).clip(1e-4)
            options: dict[str, Any] = {"Cs": PENALTIES, "l1_ratios": (0,), "use_legacy_attributes": False}
            model = LogisticRegressionCV(cv=4, scoring="roc_auc", max_iter=1000, **options).fit(
                (train_SD - center_D) / scale_D, rows.labels
            )
            test_SD = (pooled(encyclopedia, layer, "mean", test[used]) - center_D) / scale_D
            logits_SN[used, lens] += model.decision_function(test_SD)
    theirs = (time.perf_counter() - start) / len(sample)
    area = auroc(logits_SN, labels_SN, weights_SN)[::10].mean()
    return {
        "case": "seconds a lens (3 layers, means, C by 4-fold cross-validation)",
        "ours": seconds,
        "scikit_learn": theirs,
        "ratio": theirs / seconds,
        "auroc_ours": float(ours),
        "auroc_scikit_learn": float(area),
    }


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """States and words with fewer rows, fewer positives and wrong labels."""
    by_case = {each["case"]: each for each in lines if "auroc_text" in each}
    panels = {
        "rows of each class": [case for case in by_case if case.endswith("rows a class")],
        "positives among 150 rows": [case for case in by_case if "positives" in case],
        "wrong labels": [case for case in by_case if "wrong" in case],
    }
    panels = {title: cases for title, cases in panels.items() if cases}
    sizes = [len(cases) for cases in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(10, 3.2), sharey=True, width_ratios=sizes, layout="constrained", squeeze=False
    )
    for axis, (title, cases) in zip(axes[0], panels.items(), strict=True):
        for system, label, mark in (("activation", "lenses", "o-"), ("text", "words alone", "s--")):
            axis.plot(range(len(cases)), [by_case[case][f"auroc_{system}"] for case in cases], mark, label=label)
        axis.set_xticks(range(len(cases)), [case.split()[0] for case in cases])
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("AUROC, mean over sets")
    axes[0][0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run the parts asked for; print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encyclopedia", type=Path, help="folder that `ftw collect experiment=sae_probes` names")
    parser.add_argument("--parts", nargs="+", default=["tiers", "regimes", "speed"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("regimes.json"))
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with Encyclopedia.open(arguments.encyclopedia) as encyclopedia:
        lenses = lens_rows(encyclopedia.table)
        if "speed" in arguments.parts:
            lines.append(speed(encyclopedia, lenses))
        if "tiers" in arguments.parts:
            lines += tiers(encyclopedia, lenses)
        if "regimes" in arguments.parts:
            for name, (draws, change) in track(regimes(arguments.draws).items(), "regimes"):
                changed = [
                    [change(r, np.random.default_rng([d, n])) for n, r in enumerate(lenses)] for d in range(draws)
                ]
                lines.append(line(name, [figures(encyclopedia, each) for each in changed]))
    keys = list(dict.fromkeys(key for each in lines for key in each))
    table = Table(*keys)
    for each in lines:
        table.add_row(*(f"{v:.4f}" if isinstance(v := each.get(key, ""), float) else str(v) for key in keys))
    Console().print(table)
    arguments.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if "regimes" in arguments.parts:
        picture(lines, arguments.json.with_name("regimes.svg"))


if __name__ == "__main__":
    main()
