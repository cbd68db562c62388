"""The page of cards: a table of all lenses that can be searched and sorted, and a card under each that has one.

The numbers stand in the page as JSON and are drawn on request, so that a pack of thousands opens at once. The script
builds elements and sets their text; it never reads markup out of the data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ftw.map.cards import Cards
from ftw.paths import replace_file
from ftw.ui import figures
from ftw.ui.page import environment, tamed, with_policy
from ftw.ui.plots import wilson

# Heading, key, digits, what it means; the order of the table.
COLUMNS = (
    ("AUROC", "auroc", 3, "chance that a text of the concept reads higher than one that is not"),
    ("words alone", "auroc_text", 3, "the same from a text classifier on the same texts"),
    ("lens − words", "difference", 3, ""),
    ("selectivity", "selectivity", 3, "AUROC minus that of lenses trained on shuffled labels"),
    ("average precision", "average_precision", 3, ""),
    ("recall at 1 % FPR", "recall_at_1fpr", 2, "with the threshold chosen on these texts"),
    ("recall, stored threshold", "recall_at_threshold_1", 2, "with the threshold set for 1 % on training texts"),
    ("its real FPR", "fpr_at_threshold_1", 3, "false positives of that threshold on these texts"),
    ("ECE", "ece", 3, "calibration error"),
    ("its floor", "ece_floor", 3, "what a perfectly calibrated lens would show on so few texts"),
    ("Brier", "brier", 3, ""),
    ("positives", "num_positive", 0, ""),
    ("negatives", "num_negative", 0, ""),
)
ALSO = ("auroc_low", "auroc_high", "threshold_1", "auroc_shuffled")


def write_cards(path: str | Path, cards: Cards, *, title: str, command: str = "") -> Path:
    """Write the cards of an evaluation as one HTML file that needs nothing else.

    Raises:
        DiskFullError: no room.
    """
    path = Path(path)
    page = (
        environment()
        .get_template("cards.html.j2")
        .render(
            title=title,
            command=command,
            notes=cards.notes,
            num_lenses=len(cards.concepts),
            num_cards=len(cards.cards),
            num_weak=sum(bool(figures.weak(row)) for row in cards.concepts.values()),
            mean={key: figures.number(cards.mean, key) for key in ("auroc", "auroc_text", "auroc_shuffled")},
            interval=figures.interval(cards.mean, "auroc", 3),
            data=_script_data(_document(cards)),
        )
    )
    with replace_file(path) as temporary:
        temporary.write_text(with_policy(page), encoding="utf-8")
    return path


def _document(cards: Cards) -> dict[str, Any]:
    """What the script draws: rows as lists in the order of the columns, cards by row."""
    plain = cards.to_json()
    names = [name for name, _ in figures.ranked(cards)] if cards.concepts else []
    shown = [key for _, key, *_ in COLUMNS if any(row.get(key) is not None for row in plain["lenses"].values())]
    keys = [*shown, *ALSO]
    return {
        "columns": [column for column in COLUMNS if column[1] in shown],
        "keys": keys,
        "lenses": [
            {
                "name": name,
                "level": plain["levels"].get(name, 0),
                "weak": figures.weak(cards.concepts[name]),
                "values": [_rounded(plain["lenses"][name].get(key)) for key in keys],
            }
            for name in names
        ],
        "cards": {name: _with_intervals(card) for name, card in plain["cards"].items()},
    }


def _with_intervals(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card with the interval of each share of its reliability picture."""
    bins = np.array(card["reliability"]).reshape(-1, 3)
    low, high = wilson(bins[:, 1], bins[:, 2].clip(1))
    reliability = [[*row, *ends] for row, ends in zip(bins.tolist(), np.stack([low, high], 1).tolist(), strict=True)]
    return {**card, "reliability": reliability}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _script_data(document: Any) -> Markup:
    """JSON that no reader of HTML can take for markup."""
    text = json.dumps(_tamed_parts(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _tamed_parts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {tamed(key): _tamed_parts(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_tamed_parts(part) for part in value]
    return tamed(value)
