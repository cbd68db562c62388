"""Do gradient descent and the closed form give equally good linear lenses? Run on a finished encyclopedia.

Prints and writes a table: solver, seconds, mean AUROC on the encyclopedia's held-out rows with its interval.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig
from ftw.map.training.callbacks import quiet_lightning, quiet_trainer
from ftw.map.training.data import EncyclopediaDataModule
from ftw.map.training.fit import build_task, calibrated_stack, evaluate_stack, fitting
from ftw.map.training.lens_task import TrainingConfig
from ftw.map.training.solver import choose_shrinkage, solve_stack


def by_descent(encyclopedia: Encyclopedia, seed: int) -> LensStack:
    """AdamW on logistic loss, the default of `ftw train`."""
    config = TrainingConfig()
    data = EncyclopediaDataModule(encyclopedia, config, seed=seed)
    task = build_task(data.pool, HeadConfig(), config, seed=seed)
    with fitting():
        quiet_trainer(80).fit(task, datamodule=data)
    return calibrated_stack(task, data.pool, encyclopedia)


def in_closed_form(encyclopedia: Encyclopedia, seed: int) -> LensStack:
    """Shrunk discriminant analysis, shrinkage chosen on out-of-fold training rows."""
    shrinkage = choose_shrinkage(encyclopedia, seed=seed)
    return solve_stack(encyclopedia, shrinkage=shrinkage, seed=seed, progress=False)


SOLVERS: dict[str, Callable[[Encyclopedia, int], LensStack]] = {"adamw": by_descent, "lda": in_closed_form}


def main() -> None:
    """Fit with each solver and seed, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encyclopedia", type=Path, help="folder that `ftw collect data.heldout_part=dev` names")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    quiet_lightning()
    rows = []
    with Encyclopedia.open(arguments.encyclopedia) as encyclopedia:
        for seed in range(arguments.seeds):
            for name, solve in SOLVERS.items():
                start = time.perf_counter()
                stack = solve(encyclopedia, seed)
                seconds = time.perf_counter() - start
                mean = evaluate_stack(stack, encyclopedia, config=EvaluateConfig()).mean
                figures = {key: round(mean[key], 4) for key in ("auroc", "auroc_low", "auroc_high")}
                rows.append({"solver": name, "seed": seed, "seconds": round(seconds, 1), **figures})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
