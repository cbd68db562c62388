"""What is each choice of the default recipe worth? Every case changes one thing and is compared set by set.

Reads the states that `ftw collect experiment=sae_probes` keeps. With --sets they are fewer, spread evenly over how well
words alone rank *training* rows. Penalties, weights and calibration come from training rows; test rows are read once a
case, and choose nothing. A finished case is kept in the output folder, so a stopped run goes on with the same command.

Axes: S rows of one set, N sets, L layers, D model width, T tokens.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import attention, centroids, descent, discriminant
from rich.console import Console
from rich.progress import track
from rich.table import Table
from summary import picture, summary

from ftw.map import metrics
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.text_control import TextConfig, fit_text_lenses
from ftw.map.text_level import text_level_logits
from ftw.map.training.lens_rows import LensRows, lens_rows, with_rows
from ftw.map.training.recipe import Solved, solve_recipe
from ftw.map.training.stacked import stack_with_text

STATES, LAYERS, DEFAULT = ["mean", "last", "tail", "spread"], (9, 18, 27), "default"
# Heads are compared with this one, on the same states.
ON_MEANS = "logistic, layers averaged"
QUICK_SETS, QUICK_CASES = 8, 6
Read = Callable[["Study"], dict[str, np.ndarray]]


@dataclass
class Study:
    """Some sets of an encyclopedia, and what more than one case needs of them."""

    encyclopedia: Encyclopedia
    lenses: list[LensRows]
    columns: list[int]
    solved: dict[str, Solved] = field(default_factory=dict)

    @cached_property
    def test(self) -> np.ndarray:
        """Indices of the test rows of these sets."""
        table = self.encyclopedia.table
        rows = table.where("test")
        return rows[(table.matrices(rows)[1][:, self.columns] > 0).any(axis=1)]

    @cached_property
    def marks(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights [S, N] of the test rows."""
        return tuple(matrix[:, self.columns] for matrix in self.encyclopedia.table.matrices(self.test))  # pyright: ignore[reportReturnType]

    @cached_property
    def words(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Words alone: out-of-fold logits of the training rows, and logits [S, N] of the test rows."""
        table = with_rows(self.encyclopedia.table, self.lenses)
        fitted = fit_text_lenses(table, TextConfig(window_words=0), progress=False)
        return fitted.held_out, fitted.bank.score([table.texts[row] for row in self.test]).numpy()

    def solve(self, **options: Any) -> Solved:
        """The recipe with some options changed."""
        key = json.dumps(options, sort_keys=True, default=list)
        if key not in self.solved:
            whole = {"pools": STATES, "layers": LAYERS, "progress": False, **options}
            self.solved = {key: solve_recipe(self.encyclopedia, self.lenses, **whole)}
        return self.solved[key]

    def figures(self, logits_SN: np.ndarray) -> dict[str, np.ndarray]:
        """Of every set: AUROC, calibration error and its floor, Brier score."""
        chances_SN = 1 / (1 + np.exp(-logits_SN.astype(np.float64)))
        return {
            "auroc": metrics.auroc(logits_SN, *self.marks),
            "ece": metrics.ece(chances_SN, *self.marks, prior=0.5),
            "ece_floor": metrics.ece_floor(chances_SN, *self.marks, prior=0.5),
            "brier": metrics.brier(chances_SN, *self.marks, prior=0.5),
        }


def recipe(**options: Any) -> Read:
    """The recipe with some options changed, read on the test rows; the rate of its 1 % threshold beside."""

    def read(study: Study) -> dict[str, np.ndarray]:
        stack = study.solve(**options).stack
        logits_SN = text_level_logits(stack, study.encyclopedia, study.test, wanted_SN=study.marks[1] > 0)
        _, rate_N = metrics.rates_at(logits_SN, *study.marks, stack.threshold_1fpr_N.numpy())
        return study.figures(logits_SN) | {"fpr_at_threshold_1": rate_N}

    return read


def words_alone(study: Study) -> dict[str, np.ndarray]:
    """TF-IDF and logistic regression."""
    return study.figures(study.words[1])


def words_stacked(study: Study) -> dict[str, np.ndarray]:
    """States and words together."""
    solved, (held_out, words_SN) = study.solve(), study.words
    logits_SN = text_level_logits(solved.stack, study.encyclopedia, study.test, wanted_SN=study.marks[1] > 0)
    both_N3 = stack_with_text(study.lenses, solved.held_out, held_out).numpy()
    return study.figures(both_N3[:, 0] * logits_SN + both_N3[:, 1] * words_SN + both_N3[:, 2])


def head(fit: Callable[[Encyclopedia, LensRows, np.ndarray], np.ndarray]) -> Read:
    """Heads of another family, set by set: logits of a set's test rows from its training rows, layers averaged."""

    def read(study: Study) -> dict[str, np.ndarray]:
        logits_SN = np.zeros(study.marks[0].shape, dtype=np.float32)
        for lens, rows in enumerate(study.lenses):
            used_S = study.marks[1][:, lens] > 0
            logits_SN[used_S, lens] = fit(study.encyclopedia, rows, study.test[used_S])
        return study.figures(logits_SN)

    return read


def cases() -> dict[str, tuple[str, Read]]:
    """Name -> what is varied, and how it is read; the default first."""
    one = {"combine": "average", "pools": ["mean"]}
    made: dict[str, tuple[str, Read]] = {DEFAULT: ("", recipe())}
    for layers in ((4, 9, 14, 18, 22, 27), (9, 27), (4,), (9,), (14,), (18,), (22,), (27,)):
        made[f"layers {', '.join(map(str, layers))}"] = ("layers", recipe(layers=layers))
    for pools in (["mean"], ["last"], ["tail"], ["spread"], ["mean", "last"], ["mean", "max", "last"]):
        made[" + ".join(pools)] = ("pools", recipe(pools=pools))
    made["all five"] = ("pools", recipe(pools=[*STATES, "max"]))
    for combine in ("average", "choose"):
        made[combine] = ("combine", recipe(combine=combine))
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        made[f"C = {penalty:g} for all"] = ("penalty", recipe(penalties=[penalty]))
    for folds in (2, 8):
        made[f"{folds} folds"] = ("folds", recipe(folds=folds))
    made["calibrated on the rows it was fitted on"] = ("folds", recipe(folds=0))
    made["words alone"] = ("words", words_alone)
    made["states and words stacked"] = ("words", words_stacked)
    made[ON_MEANS] = ("head, on means", recipe(**one))
    made["discriminant (LDA)"] = ("head, on means", head(discriminant))
    made["difference of means"] = ("head, on means", head(centroids))
    made["difference of means, not standardised"] = ("head, on means", head(lambda *a: centroids(*a, standard=False)))
    made["logistic by AdamW"] = ("head, on means", head(lambda *a: descent(*a, family="linear", hidden=0)))
    made["MLP 128-64-1"] = ("head, on means", head(lambda *a: descent(*a, family="mlp", hidden=128)))
    made["attention over tokens"] = ("head, on means", head(attention))
    return made


def chosen_sets(encyclopedia: Encyclopedia, num: int, known: Path) -> tuple[list[LensRows], list[int]]:
    """So many sets, evenly spread over how well words alone rank their training rows, out of fold.

    Args:
        known: file that keeps those figures for the next time.
    """
    lenses = lens_rows(encyclopedia.table)
    if num >= len(lenses):
        return lenses, list(range(len(lenses)))
    if not known.exists():
        held_out = fit_text_lenses(encyclopedia.table, TextConfig(window_words=0), progress=False).held_out
        areas = {
            rows.name: float(metrics.auroc(logits_S[:, None], *rows.columns(1))[0])
            for rows, logits_S in zip(lenses, held_out, strict=True)
        }
        known.write_text(json.dumps(areas), encoding="utf-8")
    areas = json.loads(known.read_text("utf-8"))
    order = np.argsort([areas[rows.name] for rows in lenses], kind="stable")
    columns = sorted(order[np.linspace(0, len(order) - 1, num).round().astype(int)].tolist())
    return [lenses[column] for column in columns], columns


def main() -> None:
    """Run the cases that are not there yet, then tell all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encyclopedia", type=Path, help="folder that `ftw collect experiment=sae_probes` names")
    parser.add_argument("--sets", type=int, default=113)
    parser.add_argument("--only", help="regular expression: cases to run now")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipe"), help="folder of finished cases, table, picture"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SETS} sets and the first {QUICK_CASES} cases")
    arguments = parser.parse_args()
    sets, every = (QUICK_SETS if arguments.quick else arguments.sets), cases()
    if arguments.quick:
        every = dict(list(every.items())[:QUICK_CASES])
    folder = arguments.out / f"{sets}_sets"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json" for name in every}
    left = [n for n, file in files.items() if not file.exists() and re.search(arguments.only or "", n)]
    if left:
        torch.manual_seed(0)
        with Encyclopedia.open(arguments.encyclopedia) as encyclopedia:
            sample = chosen_sets(encyclopedia, sets, arguments.out / "words_on_training_rows.json")
            study = Study(encyclopedia, *sample)
            for name in track(left, "cases"):
                start = time.perf_counter()
                found = {key: values_N.tolist() for key, values_N in every[name][1](study).items()}
                seconds = round(time.perf_counter() - start, 1)
                sets_of = [rows.name for rows in study.lenses]
                case = {"case": name, "varied": every[name][0], "seconds": seconds, "sets": sets_of, **found}
                temporary = files[name].with_suffix(".part")
                temporary.write_text(json.dumps(case), encoding="utf-8")
                temporary.replace(files[name])
    lines = summary(
        [json.loads(file.read_text("utf-8")) for file in files.values() if file.exists()], DEFAULT, ON_MEANS
    )
    table = Table("varied", "case", "AUROC", "difference", "95 %", "ECE (floor)", "seconds")
    for line in lines:
        table.add_row(*line.cells())
    Console().print(table)
    (folder / "summary.json").write_text(json.dumps([vars(line) for line in lines], indent=1) + "\n", "utf-8")
    picture(lines, folder / "recipe.svg")


if __name__ == "__main__":
    main()
