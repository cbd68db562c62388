"""Does refining the concepts that a reader is least certain of help more than refining as many by chance?

Two steps, both resumable: `prepare` collects terms, templates and tests, lets an ensemble of interpreters choose a
fifth of the concepts in several ways, and has the substrate write contexts for all chosen. `compare` trains
interpreters on the common samples plus those of one choice, and reads the tests.

Axes: S rows, N concepts, R draws.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftw import load_substrate, paths
from ftw.hat.interpreter import Interpreter, InterpreterConfig, calibrated, confidence
from ftw.map.collect import CollectConfig
from ftw.map.concept_source import ConceptsConfig, build_pack
from ftw.map.growing.entries import entries_of
from ftw.map.growing.judge import interpreter_rows, judging_rows, together
from ftw.map.growing.rounds import add_judging, add_tests, bootstrap, refine
from ftw.map.growing.rows import Rows
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.growing.writing import WritingConfig
from ftw.map.training.interpreter import InterpreterFit, read_logits, train_interpreter
from ftw.map.training.interpreter_data import DEV, InterpreterRows
from ftw.map.training.interpreter_task import InterpreterTrainingConfig
from ftw.map.wordnet import WordNet
from ftw.substrate.sources import fetch

LAYERS = [0.1, 0.3, 0.5, 0.7, 0.9]
ARMS = ("none", "random", "entropy", "margin", "disagreement")
MODEL = InterpreterConfig(width=128, num_blocks=2, num_heads=4, feedforward=256, direct=512)
TRAINING = InterpreterTrainingConfig(learning_rate=1e-3)


@dataclass(frozen=True)
class Study:
    """Sizes of the study."""

    num: int
    share: float
    contexts: int
    seeds: int
    epochs: int
    draws: int = 2000

    def fit(self, seed: int) -> InterpreterFit:
        return InterpreterFit(model=MODEL, training=TRAINING, epochs=self.epochs, seed=seed)


def prepare(study: Study, folder: Path) -> None:
    """Collect what all arms share, choose, and have contexts written for every chosen concept."""
    wordnet = WordNet.open(fetch("wordnet-3.0").folder)
    familiar = ConceptsConfig(
        roots=["entity.n.01"], num=study.num, min_depth=4, min_closure=0, first_senses=True, order="frequency"
    )
    substrate = load_substrate()
    capture = CollectConfig(layers=LAYERS, pools=["mean"], tokens_per_text={}, batch_tokens=4096, shard_texts=4096)
    with bootstrap(folder, substrate, entries_of(build_pack(familiar, wordnet), wordnet), capture) as growing:
        if growing.stage.min() < 1:
            refine(growing, substrate, range(len(growing)), 1, contexts=3)
        add_tests(growing, substrate, contexts=2)
        add_judging(growing, substrate)
        chosen = choices(growing, study, folder / "choices.json")
        union = sorted({one for name in ARMS[1:] for one in chosen[name]})
        if missing := [one for one in union if growing.stage[one] < 2]:
            refine(growing, substrate, missing, 2, contexts=study.contexts, writing=WritingConfig(max_new_tokens=32))


def choices(growing: GrowingEncyclopedia, study: Study, path: Path) -> dict[str, list[int]]:
    """A share of the concepts by each selector; kept in a file, so that it is made once."""
    if path.exists():
        return json.loads(path.read_text())
    rows = interpreter_rows(growing, growing.rows([0, 1]), dev=judging_rows(growing))
    dev = rows.select(rows.where(DEV))
    readers = [train_interpreter(rows, study.fit(seed)) for seed in range(study.seeds)]
    mean_SN, doubt_S = together(calibrated(read_logits(reader, dev), reader.temperature) for reader in readers)
    best_S2 = mean_SN.topk(2).values
    least = {"entropy": confidence(mean_SN), "margin": best_S2[:, 0] - best_S2[:, 1], "disagreement": -doubt_S}
    num, label_S = round(study.share * len(growing)), dev.labels_S.numpy()
    found = {"random": np.random.default_rng(0).permutation(len(growing))[:num].tolist()}
    for name, values_S in least.items():
        found[name] = label_S[np.argsort(values_S.numpy(), kind="stable")[:num]].tolist()
    path.write_text(json.dumps(found))
    return found


def compare(study: Study, folder: Path) -> dict[str, Any]:
    """Top-1 and top-5 of every arm, on named and unnamed tests, over all concepts and over the least certain ones."""
    with GrowingEncyclopedia.open(folder) as growing:
        chosen = {"none": [], **json.loads((folder / "choices.json").read_text())}
        common, written, test = growing.rows([0, 1]), growing.rows([2]), growing.rows(split="test")
        judging = judging_rows(growing)
        hits: dict[str, np.ndarray] = {}
        for arm in ARMS:
            mine = written.take(np.isin(written.concept, np.array(chosen[arm], dtype=np.int64)))
            rows = interpreter_rows(growing, Rows.joined([common, mine]), dev=judging, test=test)
            tests = rows.select(rows.where("test"))
            hits[arm] = np.mean(
                [_hits(train_interpreter(rows, study.fit(seed)), tests) for seed in range(study.seeds)], axis=0
            )
            print(arm, len(mine), hits[arm].mean(axis=1), flush=True)
        counts = {arm: int(np.isin(written.concept, chosen[arm]).sum()) for arm in ARMS}
        return {"texts": counts, "figures": _figures(hits, chosen, test, study)}


def _hits(reader: Interpreter, tests: InterpreterRows) -> np.ndarray:
    """Whether the concept is the first, and among the first five, [2, S]."""
    logits_SN, label_S = read_logits(reader, tests), tests.labels_S
    rank_S = (logits_SN > logits_SN.gather(1, label_S[:, None])).sum(1).numpy()
    return np.stack([rank_S < 1, rank_S < 5]).astype(np.float64)


def _figures(hits: dict[str, np.ndarray], chosen: dict[str, list[int]], test: Rows, study: Study) -> list[dict]:
    """Each arm's share of hits, over all concepts and over those of each choice, with intervals over concepts.

    Beside it the difference from what refining by chance gives, and from what refining nothing gives.
    """
    concept_S, named_S = test.concept, test.named
    random, found = np.random.default_rng(1), []
    for group in ("all", *ARMS[1:]):
        wanted = np.arange(study.num) if group == "all" else np.array(sorted(chosen[group]))
        for kind, of_kind_S in (("named", named_S), ("unnamed", ~named_S)):
            rows = np.flatnonzero(of_kind_S & np.isin(concept_S, wanted))
            concepts, place = np.unique(concept_S[rows], return_inverse=True)
            drawn_RN = random.integers(len(concepts), size=(study.draws, len(concepts)))
            for arm in ARMS:
                for number, name in enumerate(("top1", "top5")):
                    of_N = _by_concept(hits[arm][number, rows], place, len(concepts))
                    figure = {"concepts": group, "num": len(concepts), "tests": kind, "arm": arm, "figure": name}
                    figure["share"] = _interval(of_N, drawn_RN)
                    for other in ("random", "none"):
                        other_N = _by_concept(hits[other][number, rows], place, len(concepts))
                        figure[f"over_{other}"] = _interval(of_N - other_N, drawn_RN)
                    found.append(figure)
    return found


def _interval(of_N: np.ndarray, drawn_RN: np.ndarray) -> list[float]:
    """Mean over concepts, and the bounds of 95 % of its resamples."""
    return [float(of_N.mean()), *map(float, np.quantile(of_N[drawn_RN].mean(1), [0.025, 0.975]))]


def _by_concept(values_S: np.ndarray, place_S: np.ndarray, num: int) -> np.ndarray:
    return np.bincount(place_S, weights=values_S, minlength=num) / np.bincount(place_S, minlength=num)


def main() -> None:
    """Prepare, compare, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["prepare", "compare", "both"])
    parser.add_argument("--name", default="refinement")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    study = Study(num=words.num, share=0.2, contexts=words.contexts, seeds=words.seeds, epochs=words.epochs)
    folder = paths.home() / "growing" / words.name
    if words.step != "compare":
        prepare(study, folder)
    if words.step == "prepare":
        return
    found = compare(study, folder)
    if words.json:
        words.json.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["figures"]:
        print(
            row["concepts"], row["tests"], row["arm"], row["figure"], row["share"], row["over_random"], row["over_none"]
        )


if __name__ == "__main__":
    main()
