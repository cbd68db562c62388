"""How well the lenses of a large pack read held-out natural text, by level and by domain, with intervals and controls.

Takes a pack that `ftw train experiment=first_light` left, reads the articles of one part, and writes what metrics.json
holds beside the same means for each level, root and branch of the hierarchy; and draws them.

Axes: S texts, N concepts, G groups (articles), R draws.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ftw.errors import DataError
from ftw.hat.picture import Picture
from ftw.map.bootstrap import group_counts
from ftw.map.collect import CollectConfig, collect
from ftw.map.compose import ComposeConfig, compose
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.influence import Influence, influence
from ftw.map.pack import LensPack, load_pack
from ftw.map.text_level import text_level_logits
from ftw.map.training.finish import visible_texts
from ftw.map.wordnet import WordNet
from ftw.substrate.model import Substrate, load_substrate
from ftw.substrate.sources import fetch
from ftw.ui.plots import ACCENT, CONTROL, FAINT, STYLE, png

DRAWS, TAILS = 2000, (0.025, 0.975)
MANY_ARTICLES = 8


@dataclass(frozen=True, kw_only=True)
class Held:
    """What held-out articles say of every lens.

    Attributes:
        lenses, words, difference: influences of articles on AUROCs of lenses, of text lenses, on what lies between.
        shuffled_N: AUROC of lenses trained on shuffled labels, where the pack knows it.
        positive_N: articles about each concept. counts_GR: draws of articles.
    """

    lenses: Influence
    words: Influence
    difference: Influence
    shuffled_N: np.ndarray
    positive_N: np.ndarray
    counts_GR: np.ndarray

    def figures(self, lenses_N: np.ndarray) -> dict[str, Any]:
        """Means over some concepts, with intervals for these concepts, and for others like them."""
        known_N = lenses_N & np.isfinite(self.lenses.values_N)
        found: dict[str, Any] = {"num_concepts": int(known_N.sum())}
        if not known_N.any():
            return found
        found["num_positive"] = round(float(self.positive_N[known_N].mean()), 1)
        parts = {"auroc": self.lenses, "auroc_text": self.words, "difference": self.difference}
        for key, part in parts.items():
            drawn = part.of(known_N).mean_draws(self.counts_GR)
            found[key] = round(float(part.values_N[known_N].mean()), 4)
            for kind, drawn_R in zip(("", "_wide"), drawn, strict=True):
                low, high = (
                    None if math.isnan(edge) else round(float(edge), 4) for edge in np.quantile(drawn_R, TAILS)
                )
                found |= {f"{key}{kind}_low": low, f"{key}{kind}_high": high}
        shuffled_N = self.shuffled_N[known_N]
        found["auroc_shuffled"] = round(float(np.nanmean(shuffled_N)), 4) if np.isfinite(shuffled_N).any() else None
        return found


def articles(pack: LensPack, substrate: Substrate, part: str, *, seed: int) -> Encyclopedia:
    """States of the held-out articles, drawn as for the pack."""
    if pack.concepts is None:
        raise DataError(f"pack {pack.pack_id!r} holds no concept pack; train it again")
    fetch("wikipedia-leads")
    wordnet = WordNet.open(fetch("wordnet-3.0").folder)
    config = ComposeConfig(max_positives=12, contexts=1, max_articles_per_concept=8, heldout_part=part)
    table = compose(pack.concepts, wordnet, None, config, seed)
    layers = [float(layer) for layer in pack.recipe.layers]
    capture = CollectConfig(layers=layers, max_tokens=pack.recipe.max_tokens, tokens_per_text={})
    return collect(substrate, table.select(table.where("test"), pack.names), capture)


def judge(pack: LensPack, encyclopedia: Encyclopedia, substrate: Substrate, *, seed: int) -> Held:
    """Influences of all articles on the AUROC of all lenses, and of the words alone."""
    assert pack.text is not None
    table = encyclopedia.table
    rows = np.arange(len(table))
    labels_SN, weights_SN = table.matrices(rows)
    logits_SN = text_level_logits(pack.stack, encyclopedia, rows, pool=pack.recipe.pooling, wanted_SN=weights_SN > 0)
    words_SN = pack.text.score(visible_texts(encyclopedia, substrate)).numpy()
    counts_GR, numbers_S = group_counts(np.array(table.groups), draws=DRAWS, seed=seed)
    lenses, words = (influence(scores_SN, labels_SN, weights_SN, numbers_S) for scores_SN in (logits_SN, words_SN))
    shuffled = [pack.metrics.get(name, {}).get("auroc_shuffled") for name in pack.names]
    return Held(
        lenses=lenses,
        words=words,
        difference=lenses - words,
        shuffled_N=np.array(shuffled, dtype=np.float64),
        positive_N=((labels_SN > 0) & (weights_SN > 0)).sum(axis=0),
        counts_GR=counts_GR,
    )


def by(pack: LensPack, held: Held, family: Callable[[str], str | None]) -> dict[str, dict[str, Any]]:
    """Figures of each family of concepts; the largest first. None belongs to no family."""
    families = np.array([family(name) or "" for name in pack.names])
    found = {name: held.figures(families == name) for name in sorted(set(families.tolist()) - {""})}
    return {name: row for name, row in found.items() if row["num_concepts"]}


def picture(groups: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Means of lenses with their intervals, of words alone, and of shuffled labels; a panel for each kind of family."""
    sizes = [len(rows) for rows in groups.values()]
    with rc_context(STYLE):
        figure = Picture(figsize=(6.6, 0.2 * sum(sizes) + 0.55 * len(sizes) + 0.5), layout="constrained")
        panels = figure.subplots(len(sizes), sharex=True, height_ratios=sizes, squeeze=False)[:, 0]
        for axes, (title, rows) in zip(panels, groups.items(), strict=True):
            for place, row in enumerate(rows.values()):
                if row["auroc_low"] is not None:
                    axes.hlines(place, row["auroc_low"], row["auroc_high"], color=ACCENT, linewidth=2.2, alpha=0.6)
                if row["auroc_wide_low"] is not None:
                    axes.hlines(place, row["auroc_wide_low"], row["auroc_wide_high"], color=ACCENT, linewidth=0.7)
                axes.plot(row["auroc_text"], place, "o", color=CONTROL, markersize=4, markerfacecolor="none")
                axes.plot(row["auroc"], place, "o", color=ACCENT, markersize=4.5)
                if row["auroc_shuffled"] is not None:
                    axes.plot(row["auroc_shuffled"], place, "x", color=FAINT, markersize=4)
            axes.set_yticks(range(len(rows)), [f"{name} ({row['num_concepts']})" for name, row in rows.items()])
            axes.set_title(title, loc="left", fontsize=9, color=FAINT)
            axes.tick_params(axis="y", length=0, labelsize=7.5)
            axes.spines["left"].set_visible(False)
            axes.invert_yaxis()
        panels[-1].set_xlabel("AUROC on held-out articles: lens •  words alone ○  shuffled labels ×")
    return figure


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """One table of means."""
    table = Table(title, "concepts", "articles", "AUROC", "95 %", "wide", "words alone", "difference", "shuffled")
    for name, row in rows.items():
        edges = [
            "–" if row[f"{key}_low"] is None else f"{row[f'{key}_low']:.3f} – {row[f'{key}_high']:.3f}"
            for key in ("auroc", "auroc_wide", "difference")
        ]
        shuffled = "–" if row["auroc_shuffled"] is None else f"{row['auroc_shuffled']:.3f}"
        cells = [f"{row['auroc']:.3f}", *edges[:2], f"{row['auroc_text']:.3f}"]
        cells.append(f"{row['difference']:+.3f} ({edges[2]})")
        table.add_row(name, str(row["num_concepts"]), f"{row['num_positive']:.0f}", *cells, shuffled)
    Console(width=160).print(table)


def families(pack: LensPack, held: Held) -> dict[str, dict[str, dict[str, Any]]]:
    """All concepts; each level; each root of the hierarchy; each branch below a root."""
    assert pack.concepts is not None
    paths = {name: pack.concepts.path(name) for name in pack.names}
    whole = np.ones(len(pack.names), dtype=bool)
    sums = {
        "all": held.figures(whole),
        f"{MANY_ARTICLES} articles or more": held.figures(held.positive_N >= MANY_ARTICLES),
    }
    return {
        "concepts": sums,
        "level": by(pack, held, lambda name: str(pack.levels[name])),
        "root": by(pack, held, lambda name: paths[name][0]),
        "branch": by(pack, held, lambda name: paths[name][1] if len(paths[name]) > 1 else None),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge a pack, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run; the pack is in it")
    parser.add_argument("--part", default="test", choices=("test", "dev"), help="articles to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write metrics.json with the families there")
    parser.add_argument("--picture", type=Path, help="also draw the families there")
    options = parser.parse_args(arguments)
    pack, substrate = load_pack(options.run / "pack"), load_substrate()
    pack.check(substrate)
    with articles(pack, substrate, options.part, seed=options.seed) as encyclopedia:
        held = judge(pack, encyclopedia, substrate, seed=options.seed)
    found = families(pack, held)
    for title, rows in found.items():
        show(title, rows)
    if options.json is not None:
        metrics = json.loads((options.run / "metrics.json").read_text(encoding="utf-8"))
        content = {"mean": metrics["mean"], "families": found, "concepts": metrics["concepts"]}
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.picture is not None:
        options.picture.write_bytes(png(picture({name: found[name] for name in ("level", "root", "branch")}), dpi=120))


if __name__ == "__main__":
    main()
