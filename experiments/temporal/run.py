"""Is a sequence model worth it? Families of sequence lenses on sampled answers, judged on prompts that were held out.

`fit` trains one family on some layers and keeps what its lenses say of the test answers, whole and cut short; `tell`
compares what was kept: accuracy by kind of negative beside the controls, paired, and how early each layer knows.
All choices (concepts, families, cuts, which family is compared) were made without the test answers.

Axes: S answers, N concepts, K cuts, G prompts.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import yaml
from matplotlib import rc_context

from ftw.hat.lens import HeadConfig
from ftw.hat.picture import Picture
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig, load_concepts
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.sequence_figures import accuracies
from ftw.map.sequences import mark_kinds, near_kin
from ftw.map.text_control import TextConfig, fit_text_bank
from ftw.map.training.callbacks import quiet_lightning, quiet_trainer
from ftw.map.training.sequence_data import build_sequence_pool
from ftw.map.training.sequence_pack import spoken
from ftw.map.training.temporal import fit_sequences, read_answers, shuffled_stack
from ftw.map.training.temporal_task import SequenceTrainingConfig
from ftw.paths import conf
from ftw.substrate.model import load_substrate
from ftw.substrate.sources import fetch
from ftw.ui.plots import ACCENT, CONTROL, FAINT, STYLE, png

CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
UNITS = {"lstm": 256, "gru": 256, "trunk_lstm": 256, "attention": 4, "token_max": 0, "token_mean": 0}
FOLDS, DRAWS = 4, 1000
BASELINE = "token_max"


def fit(options: argparse.Namespace) -> None:
    """Train one family and keep its logits on the test answers, beside those of shuffled labels if asked."""
    quiet_lightning()
    with Encyclopedia.open(options.encyclopedia) as store:
        pool = build_sequence_pool(store, folds=FOLDS, basis_rank=options.rank, seed=0, layers=options.layers)
        units = UNITS[options.family]
        head = HeadConfig(family=options.family, hidden=units, dropout=0.1 if units > 4 else 0.0)
        training = SequenceTrainingConfig(weight_decay=options.decay, learning_rate=options.rate)
        trainers: list[pl.Trainer] = []

        def make(_: int) -> pl.Trainer:
            trainers.append(quiet_trainer(options.epochs))
            return trainers[-1]

        start = time.perf_counter()
        stack = fit_sequences(pool, head, training, trainer=make, seed=options.seed)
        seconds = time.perf_counter() - start
        rows = test_rows(store, options.layers[0])
        bank = stack.sequence_bank().stored()
        kept = {f"cut_{most}": read_answers(bank, store, rows, most=most) for most in options.cuts}
        kept["whole"] = read_answers(bank, store, rows)
        if options.shuffled:
            control = shuffled_stack(pool, head, training, trainer=make, seed=options.seed)
            kept["shuffled"] = read_answers(control.sequence_bank().stored(), store, rows)
    facts = {
        "seconds": seconds,
        "epochs": trainers[0].current_epoch,
        "held_out_loss": float(trainers[0].callback_metrics["val/best_loss"]),
        "lenses": len(pool.names),
        "answers": len(pool),
    }
    name = "-".join(
        [
            options.family,
            *map(str, options.layers),
            *([f"r{options.rank}"] if options.rank else []),
        ]
    )
    keep(options.out / f"{name}.npz", facts, kept)
    print(json.dumps({name: facts}))


def concept_pack() -> ConceptPack:
    """The study's concepts."""
    config = yaml.safe_load((conf() / "concepts" / "families.yaml").read_text())
    return load_concepts(ConceptsConfig(**config), lambda: fetch("wordnet-3.0").folder)


def words(options: argparse.Namespace) -> None:
    """What the words alone give away: TF-IDF and logistic regression on the answers, whole and cut short."""
    substrate = load_substrate()
    with Encyclopedia.open(options.encyclopedia) as store:
        table = spoken(store, substrate)
        text = fit_text_bank(table, TextConfig(), progress=False)
        rows = test_rows(store, store.spec.layers[0])
        ids = store.answers(rows)
        kept = {"whole": text.score([table.texts[row] for row in rows]).numpy()}
        for most in CUTS:
            said = substrate.tokenizer.batch_decode([tokens[:most] for tokens in ids], skip_special_tokens=True)
            kept[f"cut_{most}"] = text.score([one.strip() for one in said]).numpy()
    keep(options.out / "words.npz", {}, kept)


def test_rows(store: Encyclopedia, layer: int) -> np.ndarray:
    """Answers to held-out prompts, empty ones left out."""
    rows = store.table.where("test")
    return rows[np.diff(store.token_states(layer, rows)[1]) > 0]


def keep(path: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Numbers for `tell`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, facts=json.dumps(facts), **{name: a.astype(np.float32) for name, a in arrays.items()})


def tell(options: argparse.Namespace) -> None:
    """Tables and pictures of everything that was kept in a folder."""
    kept = {path.stem: np.load(path) for path in sorted(options.out.glob("*.npz"))}
    facts = {name: json.loads(str(arrays["facts"])) for name, arrays in kept.items()}
    with Encyclopedia.open(options.encyclopedia) as store:
        marks = test_marks(store)
    whole = {name: arrays["whole"] for name, arrays in kept.items()}
    whole |= {f"{name} shuffled": arrays["shuffled"] for name, arrays in kept.items() if "shuffled" in arrays}
    reference = options.reference
    systems = {reference: whole[reference], **whole}
    found = accuracies(systems, **marks, draws=DRAWS)
    print(accuracy_table(found, facts, reference), end="\n\n")
    early = early_accuracies(kept, marks)
    print(early_table(early))
    record = {"facts": facts, "accuracy": found, "early": early}
    (options.out / "figures.json").write_text(json.dumps(record, indent=1))
    (options.out / "families.png").write_bytes(png(families_picture(found)))
    (options.out / "layers.png").write_bytes(png(layers_picture(early)))


def test_marks(store: Encyclopedia) -> dict[str, Any]:
    """Labels, weights, kinds of negatives and prompts of the test answers, as `accuracies` takes them."""
    table = store.table
    rows = test_rows(store, store.spec.layers[0])
    concepts = concept_pack()
    place = {name: index for index, name in enumerate(table.concepts)}
    siblings = [[place[other] for other in near_kin(concepts, name)] for name in table.concepts]
    labels_SN, weights_SN = table.matrices(rows)
    return {
        "labels_SN": labels_SN,
        "weights_SN": weights_SN,
        "kinds_SN": mark_kinds(table, rows, siblings),
        "groups": [table.groups[row] for row in rows],
    }


def accuracy_table(found: dict[str, Any], facts: dict[str, Any], reference: str) -> str:
    """A row a system, in Markdown: accuracy by kind of negative, and the paired differences from the reference."""
    kinds = ("distant", "sibling")
    heads = ["lenses, layer", *kinds, "NOT", *(f"{kind}, minus {reference}" for kind in kinds), "loss", "s a lens"]
    rows = []
    for name in sorted(found["all"], key=lambda one: -found["all"][one].get("accuracy", 0)):
        if name == "difference":
            continue
        # `accuracies` gives the first system minus the others.
        differences = [found[kind]["difference"].get(name) for kind in kinds]
        fact = facts.get(name, {})
        rows.append(
            [
                name,
                *(interval(found[kind][name]) for kind in kinds),
                f"{found['negated'][name]['accuracy']:.3f}" if "negated" in found else "",
                *(interval(turned(one), sign="+") if one else "" for one in differences),
                f"{fact['held_out_loss']:.3f}" if fact else "",
                f"{fact['seconds'] / fact['lenses']:.2f}" if fact else "",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def turned(figure: dict[str, float]) -> dict[str, float]:
    """A difference the other way round."""
    return {"accuracy": -figure["accuracy"], "low": -figure["high"], "high": -figure["low"]}


def interval(figure: dict[str, float], sign: str = "") -> str:
    """A value with its 95 % interval."""
    return f"{figure['accuracy']:{sign}.3f} ({figure['low']:{sign}.3f} … {figure['high']:{sign}.3f})"


def early_accuracies(kept: dict[str, Any], marks: dict[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Accuracy on the first k tokens alone, for every system that was read so."""
    systems = [name for name, arrays in kept.items() if f"cut_{CUTS[0]}" in arrays]
    early: dict[str, dict[int, dict[str, float]]] = {name: {} for name in systems}
    for most in CUTS:
        cut = {name: kept[name][f"cut_{most}"] for name in systems}
        found = accuracies(cut, **marks, draws=DRAWS)["all"]
        for name in systems:
            early[name][most] = found[name]
    return early


def early_table(early: dict[str, dict[int, dict[str, float]]]) -> str:
    """A row a system, a column a cut, in Markdown."""
    rows = [["first tokens", *map(str, CUTS)], ["---"] * (len(CUTS) + 1)]
    rows += [[name, *(f"{by_cut[most]['accuracy']:.3f}" for most in CUTS)] for name, by_cut in early.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def families_picture(found: dict[str, Any]) -> Picture:
    """Accuracy of every system on distant and sibling negatives, with intervals."""
    names = [name for name in found["all"] if name == "words" or re.fullmatch(r"\w+-29(-r\d+)?", name)]
    names.sort(key=lambda name: found["all"][name]["accuracy"])
    with rc_context(STYLE):
        figure = Picture(figsize=(7.2, 0.8 + 0.3 * len(names)), layout="constrained")
        axes = figure.subplots()
        for kind, colour, shift in (("distant", ACCENT, 0.12), ("sibling", CONTROL, -0.12)):
            centres = np.array([found[kind][name]["accuracy"] for name in names])
            ends = np.array([[found[kind][name][end] for name in names] for end in ("low", "high")])
            options = {"fmt": "o", "color": colour, "label": f"{kind} negatives", "markersize": 4}
            axes.errorbar(centres, np.arange(len(names)) + shift, xerr=np.abs(ends - centres), **options)
        for bar, colour in ((0.9, ACCENT), (0.8, CONTROL)):
            axes.axvline(bar, color=colour, linewidth=0.8, linestyle=":")
        axes.set_yticks(np.arange(len(names)), names)
        axes.set_xlabel("balanced accuracy, mean over concepts")
        axes.legend(frameon=False, loc="upper left", fontsize=8)
    return figure


def layers_picture(early: dict[str, dict[int, dict[str, float]]]) -> Picture:
    """Accuracy against the number of tokens read: one line a layer, and the words alone."""
    family = options_family(early)
    shades = {4: "#b9d5ee", 16: "#7db0de", 26: ACCENT, 29: "#0b3768"}
    with rc_context(STYLE):
        figure = Picture(figsize=(6.6, 3.6), layout="constrained")
        axes = figure.subplots()
        drawn = {int(name.rpartition("-")[2]): name for name in early if re.fullmatch(rf"{family}-\d+", name)}
        for layer, name in [*sorted(drawn.items()), (None, "words")]:
            by_cut = early[name]
            colour, label = (FAINT, "words alone") if layer is None else (shades.get(layer, ACCENT), f"layer {layer}")
            middle = [by_cut[most]["accuracy"] for most in CUTS]
            axes.plot(CUTS, middle, "o-", color=colour, label=label, markersize=3)
            ends = ([by_cut[most][end] for most in CUTS] for end in ("low", "high"))
            axes.fill_between(CUTS, *ends, color=colour, alpha=0.12, linewidth=0)
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.set(xlabel="tokens of the answer that were read", ylabel=f"balanced accuracy ({family})")
        axes.legend(frameon=False, fontsize=8)
    return figure


def options_family(early: dict[str, Any]) -> str:
    """The family with most layers: the trunk where there is one."""
    return "trunk_lstm" if any(name.startswith("trunk_lstm-") for name in early) else BASELINE


def main() -> None:
    """All commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["fit", "words", "tell"])
    parser.add_argument("encyclopedia", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the numbers (and pictures)")
    parser.add_argument("--family", choices=sorted(UNITS), default="attention")
    parser.add_argument("--layers", type=int, nargs="+", default=[29])
    parser.add_argument("--rank", type=int, default=0, help="of a shared basis; 0: the full width")
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate; 0: the family's own")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="also train on shuffled labels")
    parser.add_argument("--reference", default=f"{BASELINE}-29", help="what all others are compared with")
    parser.add_argument("--cuts", type=int, nargs="*", default=[], help="also read the first so many tokens")
    options = parser.parse_args()
    {"fit": fit, "words": words, "tell": tell}[options.action](options)


if __name__ == "__main__":
    main()
