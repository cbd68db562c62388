"""Does an interpreter name the concept of a text, and of a description without a name, better than simpler readers?

    python experiments/interpreter/run.py fit SYSTEM --out FOLDER     interpreter, hierarchical, multitask, baselines
    python experiments/interpreter/run.py table --out FOLDER          figures, table and picture of all that was fitted

Each system is what `ftw train experiment=interpreter model=…` trains, on the same states; they are fitted one by one,
their probabilities for the test texts kept, and compared on the same resampled concepts.
"""

import argparse
import json
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf

from ftw import paths
from ftw.cli._schema import register
from ftw.cli._schema_train import DATA, TrainJob
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter, calibrated
from ftw.map.collect import collect
from ftw.map.descriptions import describe
from ftw.map.interpreter_figures import SYSTEM, figures, most_confused
from ftw.map.leaks import LeakConfig, check_leaks
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.interpreter import (
    TRUST,
    InterpreterFit,
    mixed_precision,
    read_logits,
    read_parts,
    softmax_temperature,
    train_interpreter,
)
from ftw.map.training.interpreter_baselines import baselines
from ftw.map.training.interpreter_data import DEV, TEST, InterpreterRows, read_rows, with_further
from ftw.map.wordnet import WordNet
from ftw.substrate.model import load_substrate
from ftw.substrate.sources import fetch

MODELS = {SYSTEM: "interpreter", "hierarchical": "interpreter_hierarchical", "multitask": "interpreter_multitask"}
ALONE = ("direct path alone", "encoder alone")  # parts of the interpreter
ORDER = [*MODELS, *ALONE, "linear, whitened", "linear softmax", "nearest mean", "TF-IDF", "chance"]


def job_of(model: str, *changes: str) -> TrainJob:
    """The job that the command line would run."""
    register("train", TrainJob, DATA)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(paths.conf())):
        config = hydra.compose("train", overrides=["experiment=interpreter", f"model={model}", *changes])
    made = OmegaConf.to_object(config)
    assert isinstance(made, TrainJob)
    return made


def read(job: TrainJob) -> tuple[InterpreterRows, ConceptTree]:
    """The rows (states are collected if they are not there yet) and the tree of categories."""
    substrate = load_substrate()
    made = describe(WordNet.open(fetch("wordnet-3.0").folder), job.data, job.seed, substrate=substrate)
    with collect(substrate, made.table, job.map.encyclopedia) as encyclopedia:
        rows = read_rows(encyclopedia, pools=job.map.interpreter.pools)
    if made.further is not None:  # with --set data.further=NUMBER, of use to the multitask interpreter
        with collect(substrate, made.further, job.map.encyclopedia) as more:
            rows = with_further(rows, more)
    return rows, ConceptTree.of_categories(rows.names, made.categories)


def fit(system: str, job: TrainJob, rows: InterpreterRows, tree: ConceptTree, folder: Path) -> None:
    """Fit one system and keep what it says of the test rows; what choices were made by is printed."""
    start = time.perf_counter()
    if system == "baselines":
        said = baselines(rows, seed=job.seed)
    else:
        interpreter = train_interpreter(
            rows,
            InterpreterFit(model=job.model, training=job.map.interpreter, seed=job.seed),
            tree=tree,
            trainer=lambda callbacks: quiet_trainer(
                job.trainer["max_epochs"], callbacks=callbacks, precision=mixed_precision(), gradient_clip_val=1.0
            ),
            folder=folder / system,
        )
        dev, test = rows.select(rows.where(DEV)), rows.select(rows.where(TEST))
        tell_dev(system, read_logits(interpreter, dev), dev)
        print(*(f"{name} {float(getattr(interpreter, name)):.3g}" for name in ("trust", "mix", "temperature")))
        said = {system: calibrated(read_logits(interpreter, test), interpreter.temperature).numpy()}
        if system == SYSTEM:
            said |= alone(interpreter, dev, test)
    seconds = time.perf_counter() - start
    test = rows.select(rows.where(TEST))
    for name, chance_SC in said.items():
        np.savez(folder / f"{name}.npz", chance=chance_SC.astype(np.float16), seconds=seconds)
    kept = {"labels": test.labels_S.tolist(), "kinds": test.kinds, "names": rows.names, "texts": test.texts}
    kept["makes"] = ["article" if group.startswith("article") else group.split()[0].strip(":") for group in test.groups]
    (folder / "test.json").write_text(json.dumps(kept))
    print(f"{system}: {seconds:.0f} s")


def alone(interpreter: Interpreter, dev: InterpreterRows, test: InterpreterRows) -> dict[str, np.ndarray]:
    """What the parts of an interpreter say of the test rows by themselves, each calibrated on the dev rows."""
    said = {}
    (encoded_dev, _, direct_dev), (encoded, _, direct) = (read_parts(interpreter, rows) for rows in (dev, test))
    assert direct_dev is not None  # the experiment's interpreter has a direct path
    assert direct is not None
    of_parts = ((TRUST * direct_dev, TRUST * direct), (encoded_dev, encoded))
    for name, (dev_SC, test_SC) in zip(ALONE, of_parts, strict=True):
        tell_dev(name, dev_SC, dev)
        said[name] = calibrated(test_SC, softmax_temperature(dev_SC, dev)[1]).numpy()
    return said


def tell_dev(system: str, logits_SC: torch.Tensor, rows: InterpreterRows) -> None:
    """Top-1 and top-5 on the rows kept for choices."""
    for kind in sorted(set(rows.kinds)):
        at = torch.from_numpy(rows.where(DEV, kind))
        hits = logits_SC[at].topk(5).indices == rows.labels_S[at].unsqueeze(1)
        print(f"dev, {kind}, {system}: {hits[:, 0].float().mean():.3f} {hits.any(1).float().mean():.3f}", flush=True)


def table(job: TrainJob, folder: Path) -> None:
    """Figures by kind and by make, as JSON, as rows of a table, and as a picture."""
    kept = json.loads((folder / "test.json").read_text())
    made = describe(WordNet.open(fetch("wordnet-3.0").folder), job.data, job.seed)
    copies = {made.table.texts[held] for _, held in check_leaks(made.table, LeakConfig(allow=True)).pairs}
    rows = [row for row, text in enumerate(kept["texts"]) if text not in copies]
    print(f"{len(kept['texts']) - len(rows)} held-out texts nearly repeat a training text and are left out")
    kept |= {name: [kept[name][row] for row in rows] for name in ("labels", "kinds", "makes")}
    labels = np.array(kept["labels"])
    there = [name for name in ORDER if (folder / f"{name}.npz").exists()]
    said = {name: np.load(folder / f"{name}.npz")["chance"][rows].astype(np.float32) for name in there}
    found = figures(said, labels, kept["kinds"], draws=job.evaluate.draws, seed=job.seed)
    makes = [f"{kind}, {make}" for kind, make in zip(kept["kinds"], kept["makes"], strict=True)]
    found |= {"makes": figures(said, labels, makes, draws=job.evaluate.draws, seed=job.seed)}
    found["differences"] = {SYSTEM: _ahead(found)}
    for one in ("hierarchical", "multitask"):
        if one in said:
            others = {SYSTEM: said[one], **{name: said[name] for name in there if name not in MODELS}}
            compared = figures(others, labels, kept["kinds"], draws=job.evaluate.draws, seed=job.seed)
            found["differences"][one] = _ahead(compared)
    found["confused"] = most_confused(said[SYSTEM], labels, kept["names"])
    found["seconds"] = {name: float(np.load(folder / f"{name}.npz")["seconds"]) for name in there}
    (folder / "metrics.json").write_text(json.dumps(found, indent=1))
    for kind in ("named", "unnamed"):
        entry = found[kind]
        print(f"\n{kind}: {entry['num_texts']} texts about {entry['num_concepts']} concepts")
        for name, row in entry["systems"].items():
            print(
                f"| {name} | {row['top1']:.3f} | {row['top1_low']:.3f} – {row['top1_high']:.3f} | {row['top5']:.3f} "
                f"| {row['top5_low']:.3f} – {row['top5_high']:.3f} | {row['ece']:.3f} |"
            )
    for one, by_kind in found["differences"].items():
        for kind in ("named", "unnamed"):
            for other, row in by_kind[kind].items():
                if row is None:
                    continue
                print(f"{kind}, {one} - {other}: {row['top1']:+.3f} ({row['top1_low']:+.3f} – {row['top1_high']:+.3f})")
    picture(found, folder / "figures.png")


def _ahead(found: dict) -> dict:
    """By kind and system, how far the interpreter is ahead."""
    kinds = ("named", "unnamed")
    return {kind: {name: row.get("minus") for name, row in found[kind]["systems"].items()} for kind in kinds}


def picture(found: dict, path: Path) -> None:
    """Top-1 of every system with its interval, named beside unnamed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, kind in enumerate(("named", "unnamed")):
        systems = found[kind]["systems"]
        axes = figure.add_subplot(1, 2, place + 1)
        for row, (name, one) in enumerate(systems.items()):
            error = [[max(0.0, one["top1"] - one["top1_low"])], [max(0.0, one["top1_high"] - one["top1"])]]
            axes.barh(
                row, one["top1"], xerr=error, color="#3b6ea5" if name in (*MODELS, *ALONE) else "#b8b8b8", capsize=2
            )
        axes.set_yticks(range(len(systems)), labels=list(systems) if not place else [""] * len(systems))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title("texts with a lemma" if kind == "named" else "descriptions without a lemma", fontsize=10)
        axes.set_xlabel("top-1 of 1,000 concepts")
    figure.savefig(path, dpi=140)


def main() -> None:
    """Fit a system, or tell what came of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit", "table"])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=", ".join([*MODELS, "baselines"]))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="changes to the configuration, key=value")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.what == "table":
        table(job_of("interpreter", *options.set), options.out)
        return
    rows, tree = read(job_of("interpreter", *options.set))
    for system in options.systems:
        fit(system, job_of(MODELS.get(system, "interpreter"), *options.set), rows, tree, options.out)


if __name__ == "__main__":
    main()
