"""Does ranking siblings apart after the fit help on text that decided nothing?

Lenses are fitted on the training texts, refined there, each kept by the development articles, and judged on the test
articles: how often the own lens ranks first among its siblings, how often its domain is among the first three, and the
AUROC, before and after, with a paired bootstrap over articles.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console

from ftw.cli._sources import Sources
from ftw.hat.store import LensStack
from ftw.map.bootstrap import bootstrap
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.training.siblings import Rows, SiblingConfig, families, refine_siblings, validate_ranks
from ftw.map.training.solver import solve_stack
from ftw.paths import conf


def demo_concepts() -> ConceptPack:
    """The concepts of `ftw demo`."""
    chosen = OmegaConf.to_container(OmegaConf.load(conf() / "concepts" / "demo.yaml"))
    assert isinstance(chosen, dict)
    return Sources().concepts(ConceptsConfig(**{str(key): held for key, held in chosen.items() if key != "defaults"}))


def rows_of(encyclopedia: Encyclopedia, split: str) -> tuple[Rows, list[str]]:
    """Texts of a split, and their groups."""
    rows = encyclopedia.table.where(split)
    states = [torch.from_numpy(encyclopedia.pooled(layer, "mean", rows)).float() for layer in encyclopedia.spec.layers]
    groups = [encyclopedia.table.groups[row] for row in rows]
    return Rows(torch.stack(states, dim=1), *encyclopedia.table.matrices(rows)), groups


def gap(before: LensStack, after: LensStack, test: Rows, groups: list[str]) -> list[float]:
    """Mean difference in AUROC, and its 95 % interval."""
    logits = {name: stack.bank().logits(test.states_SLD).numpy() for name, stack in (("b", before), ("a", after))}
    marks = test.labels_SN, test.weights_SN
    drawn = bootstrap(logits, *marks, np.asarray(groups), draws=1000, seed=0)
    ends = np.quantile(np.nanmean(drawn["a"] - drawn["b"], axis=1), (0.025, 0.975))
    return [float(np.nanmean(auroc(logits["a"], *marks) - auroc(logits["b"], *marks))), *ends.tolist()]


def main() -> None:
    """Fit, refine with several lengths of step, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dev", type=Path, help="folder that `ftw collect data.heldout_part=dev` names")
    parser.add_argument("test", type=Path, help="folder that `ftw collect` names")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    concepts = demo_concepts()
    with Encyclopedia.open(arguments.dev) as dev_store, Encyclopedia.open(arguments.test) as store:
        stack = solve_stack(store, shrinkage=50.0, progress=False)
        (train, _), (dev, _), (test, groups) = (
            rows_of(store, "train"),
            rows_of(dev_store, "test"),
            rows_of(store, "test"),
        )
    groups_of, roots = families(concepts, stack.names), [name for name in concepts.roots if name in stack.names]
    before, lines = validate_ranks(stack, test, groups_of, roots=roots), []
    console = Console()
    console.print(
        f"first among siblings {before.mean_first:.4f}, domain in 3 {np.mean(list(before.domain.values())):.4f}"
    )
    for rate in arguments.rates:
        config = SiblingConfig(learning_rate=rate)
        refined, report = refine_siblings(stack, train, dev, groups_of, config)
        after = validate_ranks(refined, test, groups_of, roots=roots)
        mean, low, high = gap(stack, refined, test, groups)
        lines.append({"rate": rate, "kept": len(report.kept), "first": after.mean_first, "auroc": [mean, low, high]})
        console.print(
            f"rate {rate:g}: {len(report.kept)} of {len(stack.names)} kept, first {after.mean_first:.4f}, "
            f"AUROC {mean:+.4f} ({low:+.4f} … {high:+.4f})"
        )
    if arguments.json is not None:
        whole = {"before": asdict(before), "refined": lines}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
