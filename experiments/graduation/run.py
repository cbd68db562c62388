"""What does graduation buy against the same number of samples for everybody, at equal cost?

Cost is texts collected. Samples grow by validation on the development articles; figures are from the test articles,
which chose nothing. Prints a table and writes it as JSON: texts, mean AUROC, and differences at equal cost with
intervals from a bootstrap over articles, paired by article, concept and seed.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from ftw.cli._sources import Sources
from ftw.errors import DataError
from ftw.hat.store import LensStack
from ftw.map.bootstrap import bootstrap
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.training.graduation import GraduationConfig, Validation, fixed, graduate, subset
from ftw.map.training.solver import solve_stack
from ftw.map.training.sparse import SparsePool, read_sparse_pool
from ftw.paths import conf

SIZES = (10, 20, 30, 45, 60, 90)
DRAWS = 1000


def demo_concepts() -> ConceptPack:
    """The concepts of `ftw demo`."""
    chosen = OmegaConf.to_container(OmegaConf.load(conf() / "concepts" / "demo.yaml"))
    assert isinstance(chosen, dict)
    return Sources().concepts(ConceptsConfig(**{str(key): held for key, held in chosen.items() if key != "defaults"}))


def held_out(encyclopedia: Encyclopedia) -> tuple[Validation, list[str]]:
    """The articles of an encyclopedia, and their groups."""
    rows = encyclopedia.table.where("test")
    states = [torch.from_numpy(encyclopedia.pooled(layer, "mean", rows)).float() for layer in encyclopedia.spec.layers]
    groups = [encyclopedia.table.groups[row] for row in rows]
    return Validation(torch.stack(states, dim=1), *encyclopedia.table.matrices(rows)), groups


def at_cost(pool: SparsePool, num_texts: int, config: GraduationConfig) -> tuple[int, np.ndarray]:
    """The largest number of positives for everybody whose pool is no larger than `num_texts`, and that pool."""
    low, high = 1, 2000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fixed(pool, middle, config).sum() <= num_texts else (low, middle - 1)
    return low, fixed(pool, low, config)


def fit(pool: SparsePool, used_S: np.ndarray, config: GraduationConfig) -> LensStack:
    return solve_stack(subset(pool, used_S), shrinkage=config.shrinkage, progress=False)


def one_seed(
    pool: SparsePool, dev: Validation, siblings: dict[str, list[str]], config: GraduationConfig
) -> dict[str, Any]:
    """Stacks and costs by strategy, and the lenses that read worst on the development articles after ten positives."""
    start = time.perf_counter()
    graduation = graduate(pool, dev, config, siblings=siblings)
    seconds = time.perf_counter() - start
    size, equal_S = at_cost(pool, graduation.num_texts, config)
    strategies: dict[str, tuple[int, LensStack]] = {"graduation": (graduation.num_texts, graduation.stack)}
    strategies["equal cost"] = int(equal_S.sum()), fit(pool, equal_S, config)
    for each in SIZES:
        used_S = fixed(pool, each, config)
        strategies[f"fixed {each}"] = int(used_S.sum()), fit(pool, used_S, config)
    early_N = np.nan_to_num(dev.auroc(strategies["fixed 10"][1]), nan=1)
    weakest = np.argsort(early_N)[: len(early_N) // 5]
    return {
        "strategies": strategies,
        "weakest": weakest,
        "size": size,
        "seconds": seconds,
        "states": Counter(record.state for record in graduation.records.values()),
        "tiers": Counter(record.tier or "none" for record in graduation.records.values()),
        "grades": Counter(record.grade or "none" for record in graduation.records.values()),
        "by_round": graduation.texts_by_round,
    }


def differences(runs: list[dict[str, Any]], test: Validation, groups: list[str]) -> dict[str, list[float]]:
    """Graduation minus the same number for all at equal cost: mean and 95 %, over all lenses and over the weakest."""
    drawn: dict[str, list[np.ndarray]] = {"all": [], "weakest": []}
    point: dict[str, list[float]] = {"all": [], "weakest": []}
    for run in runs:
        logits = {
            name: run["strategies"][name][1].bank().logits(test.states_VLD).numpy()
            for name in ("graduation", "equal cost")
        }
        both = bootstrap(logits, test.labels_VN, test.weights_VN, np.asarray(groups), draws=DRAWS, seed=0)
        gap_RN = both["graduation"] - both["equal cost"]
        here = [auroc(each, test.labels_VN, test.weights_VN) for each in logits.values()]
        for kind, which in (("all", np.arange(gap_RN.shape[1])), ("weakest", run["weakest"])):
            drawn[kind].append(np.nanmean(gap_RN[:, which], axis=1))
            point[kind].append(float(np.nanmean((here[0] - here[1])[which])))
    return {
        kind: [float(np.mean(point[kind])), *np.quantile(np.mean(drawn[kind], axis=0), (0.025, 0.975)).tolist()]
        for kind in drawn
    }


def main() -> None:
    """Grow and fit for each seed, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dev", type=Path, help="folder that `ftw collect data.heldout_part=dev` names")
    parser.add_argument("test", type=Path, help="folder that `ftw collect` names")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiers", type=float, nargs="+", default=GraduationConfig().tiers)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    concepts = demo_concepts()
    siblings = {name: concepts.siblings(name) for name in concepts.names}
    with Encyclopedia.open(arguments.dev) as dev_store, Encyclopedia.open(arguments.test) as test_store:
        if dev_store.table.concepts != test_store.table.concepts:
            raise DataError("the two encyclopedias are about different concepts; collect both with the same options")
        pool, (dev, _), (test, groups) = read_sparse_pool(test_store), held_out(dev_store), held_out(test_store)
    names = [f"tier {number}" for number in range(len(arguments.tiers))]
    configs = [GraduationConfig(seed=s, tiers=arguments.tiers, tier_names=names) for s in range(arguments.seeds)]
    runs = [one_seed(pool, dev, siblings, config) for config in configs]
    rows = []
    for name in runs[0]["strategies"]:
        texts = np.mean([run["strategies"][name][0] for run in runs])
        by_seed = [test.auroc(run["strategies"][name][1]) for run in runs]
        weakest = np.mean([np.nanmean(each[run["weakest"]]) for each, run in zip(by_seed, runs, strict=True)])
        rows.append({"strategy": name, "texts": round(texts), "auroc": np.nanmean(by_seed), "weakest": weakest})
    table = Table("strategy", "texts", "mean AUROC", "weakest fifth")
    for row in sorted(rows, key=lambda row: row["texts"]):
        table.add_row(row["strategy"], str(row["texts"]), f"{row['auroc']:.4f}", f"{row['weakest']:.4f}")
    console, gaps = Console(), differences(runs, test, groups)
    console.print(table)
    for kind, (mean, low, high) in gaps.items():
        console.print(f"graduation − equal cost, {kind}: {mean:+.4f} ({low:+.4f} … {high:+.4f})")
    for run in runs:
        console.print(
            run["size"], run["by_round"], run["states"], run["tiers"], run["grades"], f"{run['seconds']:.1f} s"
        )
    if arguments.json is not None:
        plain = [
            {key: run[key] for key in ("size", "by_round", "states", "tiers", "grades", "seconds")} for run in runs
        ]
        arguments.json.write_text(json.dumps({"rows": rows, "differences": gaps, "runs": plain}, indent=1) + "\n")


if __name__ == "__main__":
    main()
