"""The page of a lens pack: a model card for the Hub, made from what the pack says of itself.

Figures stand beside their controls and with their intervals, or the card says that there are none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftw import paths
from ftw.map.pack import read_info, read_rows

NAME = "README.md"
MOST_LENSES = 10
SYSTEMS = {
    "auroc": "lenses",
    "auroc_text": "the same texts, words alone",
    "difference": "difference, paired",
    "auroc_shuffled": "lenses trained on shuffled labels",
}


def write_card(folder: Path) -> Path:
    """Write the page of a lens pack into its folder, if it says something else than the one that is there."""
    path, text = folder / NAME, model_card(folder)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with paths.replace_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def model_card(folder: Path) -> str:
    """The page of a lens pack, in Markdown with the Hub's header.

    Raises:
        PackError: its index is damaged.
    """
    info = read_info(folder)
    recipe = info["recipe"]
    levels = {int(level): int(num) for level, num in info["levels"].items()}
    here = {level: num for level, num in levels.items() if (folder / f"layer{level}").is_dir()}
    metrics = {name: figures for rows in read_rows(folder, here).values() for name, figures in rows.items()}
    parts = [
        _header(info, recipe),
        f"# {_plain(info['pack_id'])} {_plain(info['version'])}\n",
        _summary(recipe, levels),
        "## What it reads\n",
        _table(["level of the hierarchy", "concepts"], [[str(level), f"{num:,}"] for level, num in levels.items()]),
        "## How good it is\n",
        _figures(info.get("metrics") or {}, metrics),
        "## How it was made\n",
        _making(info, recipe),
        _WARNINGS,
        _usage(info),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _header(info: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lines = {
        "library_name": "ftw",
        "tags": ["ftw", "lens-pack", "probes", "interpretability"],
        "substrate": recipe["substrate"],
        "pack_id": info["pack_id"],
        "version": info["version"],
    }
    rows = []
    for key, value in lines.items():
        items = [f"  - {_quoted(item)}" for item in value] if isinstance(value, list) else []
        rows += [f"{key}:" if items else f"{key}: {_quoted(value)}", *items]
    return "\n".join(["---", *rows, "---"])


def _summary(recipe: Mapping[str, Any], levels: Mapping[int, int]) -> str:
    heads = "linear" if not recipe["hidden"] else f"MLP of {recipe['hidden']} hidden units"
    layers = ", ".join(str(layer) for layer in recipe["layers"])
    return (
        f"{sum(levels.values()):,} lenses (probes), one a concept, that read the outputs of blocks {layers} of "
        f"**{_plain(recipe['substrate'])}** (width {recipe['width']}) while it writes. Each is {heads}"
        + (f" on a shared basis of rank {recipe['basis_rank']}" if recipe["basis_rank"] else "")
        + f". They are bound to that model by its fingerprint, `{_plain(recipe['fingerprint'])[:16]}`.\n"
    )


def _figures(mean: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    judged = {name: figures for name, figures in metrics.items() if isinstance(figures.get("auroc"), int | float)}
    if not judged:
        return "No figures: the pack was not evaluated on held-out text. Do not rely on it before it is.\n"
    mean = mean or _plain_means(judged)
    rows = [
        [words, _number(mean[key]), _interval(mean, key)]
        for key, words in SYSTEMS.items()
        if isinstance(mean.get(key), int | float)
    ]
    silent = len(metrics) - len(judged)
    weak = [name for name, figures in judged.items() if figures.get("no_better_than")]
    remarks = [
        f"AUROC on held-out text, mean over {len(judged):,} concepts"
        + (f"; {silent:,} more have too few held-out texts for a figure" if silent else "")
        + "; 95 % intervals from a bootstrap over articles.",
        f"{len(weak):,} of them are no better than a control (words alone, or shuffled labels) within the interval: "
        "where words alone read as well, use the words."
        if weak
        else "",
    ]
    best = sorted(judged, key=lambda name: -judged[name]["auroc"])
    shown = best if len(best) <= 2 * MOST_LENSES else [*best[:MOST_LENSES], *best[-MOST_LENSES:]]
    lenses = [
        [
            _plain(name),
            _number(judged[name]["auroc"]),
            _interval(judged[name], "auroc"),
            _number(judged[name].get("auroc_text")),
            str(judged[name].get("num_positive", "")),
        ]
        for name in shown
    ]
    title = "The best and the worst" if len(best) > len(shown) else "Each of them"
    return "\n".join(
        [
            " ".join(filter(None, remarks)) + "\n",
            _table(["", "AUROC", "95 %"], rows),
            f"{title}:\n",
            _table(["concept", "AUROC", "95 %", "words alone", "positives"], lenses),
        ]
    )


def _plain_means(judged: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    means = {}
    for key in SYSTEMS:
        numbers = [figures[key] for figures in judged.values() if isinstance(figures.get(key), int | float)]
        if numbers:
            means[key] = sum(numbers) / len(numbers)
    return means


def _making(info: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    provenance = _object(info.get("provenance"))
    git, concepts = _object(provenance.get("git")), _object(info.get("concept_pack"))
    dirty = " with local changes" if git.get("dirty") else ""
    rows = {
        "command": f"`{_plain(provenance['command'])}`" if provenance.get("command") else "",
        "time (UTC)": _plain(provenance.get("created", "")),
        "commit of FTW": f"{_plain(git['commit'])[:12]}{dirty}" if git.get("commit") else "",
        "concept pack": f"{_plain(concepts['pack_id'])} {_plain(concepts['version'])}" if concepts else "",
        "texts": f"{recipe['num_texts']:,}" if recipe.get("num_texts") else "",
        "normalisation": _plain(recipe["normalisation"]),
        "pooling": _plain(recipe["pooling"]),
        "calibration": _plain(recipe["calibration"]),
        "solver": f"{_plain(recipe['solver'])}, seed {recipe['seed']}",
        "imported from": _plain(provenance.get("imported_from", "")),
        "converted": _plain(provenance.get("conversion", "")),
    }
    table = _table(["", ""], [[key, value] for key, value in rows.items() if value])
    return (
        f"{table}\nThe inputs with their hashes, the versions and the whole configuration stand in `pack_info.json`.\n"
    )


_WARNINGS = """## What it must not be used for

- To judge a person, or to decide anything about one, from what a lens reads.
- As proof that the model thinks, intends or feels something: a lens says that a concept can be *read* from its states.
- On another model than the one named above, or on another kind of text than the figures are from, without new figures.
- Alone, as a guard: someone who knows the lenses can write around them.
"""


def _usage(info: Mapping[str, Any]) -> str:
    name = _plain(info["pack_id"])
    return (
        "## Use\n\n```\n"
        f"ftw pack pull {name}\nftw pack verify {name}\n"
        "```\n\nThe hashes in `MANIFEST.json` show that the files are whole. They do not show who wrote them: that a "
        "signature does.\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _interval(figures: Mapping[str, Any], key: str) -> str:
    low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
    return f"{_number(low)} – {_number(high)}" if _number(low) and _number(high) else ""


def _plain(text: object) -> str:
    """Text of a pack on a line of Markdown: it can be no table, no link and no HTML."""
    return "".join(f"\\{sign}" if sign in "|<>[]`*\\" else sign for sign in " ".join(str(text).split()))


def _quoted(value: object) -> str:
    """A string of YAML: JSON's form is one."""
    return json.dumps(str(value), ensure_ascii=True)
