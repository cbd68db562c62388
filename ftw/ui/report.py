"""One HTML file that tells what was read, how far to trust it, and how to do it again.

The file needs nothing else: style, pictures and the few lines of script are inside, and a content policy forbids any
request. Everything that came from outside (tokens, concept names, addresses, notes) is escaped by the template. The
page works without its script, which only sorts tables.

Axes: T tokens, N concepts.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftw.errors import DataError
from ftw.hat.timeline import FLOOR, Timeline
from ftw.paths import replace_file
from ftw.ui import figures
from ftw.ui.choices import choices_part
from ftw.ui.colours import concept_colours
from ftw.ui.figures import Evaluated, Metrics
from ftw.ui.page import environment, with_policy
from ftw.ui.passage import passage

DRAWN = ("auroc", "auroc_low", "auroc_high", "auroc_text", "auroc_shuffled")
# Heading, key, digits.
EVALUATION_COLUMNS = (
    ("AUROC", "auroc", 3),
    ("words alone", "auroc_text", 3),
    ("shuffled", "auroc_shuffled", 3),
    ("lens − words", "difference", 3),
    ("average precision", "average_precision", 3),
    ("F1", "f1", 2),
    ("recall at 1 % FPR", "recall_at_1fpr", 2),
    ("ECE / its floor", "ece", 3),
    ("positive / negative", "num_positive", 0),
)
FURTHER_CONTROLS = (
    ("length of the text", "auroc_length"),
    ("number of tokens read", "auroc_position"),
    ("a random direction", "auroc_random"),
    ("the first layer", "auroc_first_layer"),
)
# What stands small beside a figure: its interval, or the figure it is to be read against.
BESIDE = {"ece": ("ece_floor", 3), "num_positive": ("num_negative", 0)}
WITH_INTERVAL = ("auroc", "difference")


def write_report(
    path: str | Path,
    *,
    title: str,
    timelines: Timeline | Sequence[Timeline] = (),
    evaluation: Evaluated | None = None,
    recipe: Mapping[str, Any] | None = None,
    inputs: Iterable[Mapping[str, Any]] = (),
    config_yaml: str = "",
    versions: Mapping[str, str] | None = None,
    command: str = "",
    timings: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    paths: Mapping[str, Sequence[str]] | None = None,
    pictures: Mapping[str, str] | None = None,
    top: int = 16,
) -> Path:
    """Write the report of a run to `path` (a folder gets `report.html`); parts that are not given are left out.

    Args:
        recipe: capture, normalisation, layers, pooling, family, calibration; may be nested.
        inputs: `{"name", "address", "sha256" (one, or file -> hash), "notice"}` each.
        timings: step -> seconds. paths: concept -> root … concept, for colours that follow the hierarchy.
        pictures: caption -> SVG markup made by `ftw.ui.plots.svg`; trusted, put in as it is.
        top: concepts in the heat map.

    Raises:
        DataError: a picture that is no SVG. DiskFullError: no room.
    """
    path = Path(path)
    path = path if path.suffix == ".html" else path / "report.html"
    timelines = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    names = set(paths or {}).union(*(timeline.concepts for timeline in timelines))
    colours = concept_colours(names, paths)
    _check_pictures(pictures or {})
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            passages=[passage(timeline, colours, top, name=f"t{at}") for at, timeline in enumerate(timelines)],
            columns=[heading for heading, *_ in EVALUATION_COLUMNS],
            evaluation=_evaluation_part(evaluation),
            choices=choices_part(evaluation),
            recipe=_flat(recipe or {}),
            flat=_flat,
            inputs=[_input_part(entry) for entry in inputs],
            config_yaml=config_yaml,
            versions=versions or {},
            command=command,
            timings=_timings_part(timings or {}),
            notes=[notes] if isinstance(notes, str) else list(notes),
            pictures=pictures or {},
            floor=figures.percent(FLOOR, 0),
        )
    )
    with replace_file(path) as temporary:
        temporary.write_text(with_policy(page), encoding="utf-8")
    return path


def _check_pictures(pictures: Mapping[str, str]) -> None:
    for caption, markup in pictures.items():
        if not markup.startswith("<svg"):
            raise DataError(f"the picture {caption!r} is no SVG markup; make it with ftw.ui.plots.svg(figure)")


def _flat(words: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows: "capture.layers" and "9, 18, 27"."""
    rows: list[tuple[str, str]] = []
    for key, held in words.items():
        name = f"{prefix}{key}"
        if isinstance(held, Mapping):
            rows += _flat(held, f"{name}.")
        elif isinstance(held, list | tuple | set | np.ndarray):
            rows.append((name, ", ".join(map(str, held)) or figures.DASH))
        else:
            rows.append((name, figures.DASH if held is None else str(held)))
    return rows


def _input_part(entry: Mapping[str, Any]) -> dict[str, Any]:
    hashes = entry.get("sha256") or {}
    hashes = hashes.items() if isinstance(hashes, Mapping) else [("", hashes)]
    return {
        "name": str(entry.get("name", "")),
        "address": str(entry.get("address", "")),
        "notice": str(entry.get("notice") or ""),
        "hashes": [(str(file), str(digest)) for file, digest in hashes],
    }


def _timings_part(timings: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Step, seconds, share of all."""
    total = sum(timings.values()) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in timings.items()]


def _evaluation_part(evaluation: Evaluated | None) -> dict[str, Any] | None:
    """Rows of the table with the places of their dots, in percent of the width of the picture column."""
    if evaluation is None:
        return None
    rows = figures.ranked(evaluation)
    drawn = [row[key] for _, row in rows for key in DRAWN if not np.isnan(figures.value(row, key))]
    lowest = min([0.4, *(np.floor(10 * figures.value({"x": low}, "x")) / 10 for low in drawn)])
    return {
        "rows": [_row(name, row, lowest) for name, row in rows],
        "mean": _row("mean", evaluation.mean, lowest),
        "ticks": [(f"{tick:.1f}", _place(tick, lowest)) for tick in np.arange(lowest, 1.01, 0.1)],
        "num_weak": sum(bool(figures.weak(row)) for _, row in rows),
        "notes": [str(note) for note in evaluation.notes],
        "controls": [
            (name, figures.number(evaluation.mean, key))
            for name, key in FURTHER_CONTROLS
            if not np.isnan(figures.value(evaluation.mean, key))
        ],
    }


def _row(name: str, row: Metrics, lowest: float) -> dict[str, Any]:
    places = {key: _place(figures.value(row, key), lowest) for key in DRAWN}
    cells = [(figures.value(row, key), *_written(row, key, digits)) for _, key, digits in EVALUATION_COLUMNS]
    if name == "mean":  # its interval is several times narrower
        cells[0] = (*cells[0][:2], figures.interval(row, "auroc", 3))
    return {"name": name, "weak": figures.weak(row), "places": places, "cells": cells}


def _written(row: Metrics, key: str, digits: int) -> tuple[str, str]:
    """A figure, and what stands small beside it."""
    words = (figures.signed if key == "difference" else figures.number)(row, key, digits)
    if key in WITH_INTERVAL:
        return words, figures.interval(row, key)
    return words, figures.number(row, *BESIDE[key]) if key in BESIDE and words != figures.DASH else ""


def _place(auroc: float, lowest: float) -> float | None:
    """Place of an AUROC on the drawn axis, in percent; None if there is nothing to draw."""
    return None if np.isnan(auroc) else round(100 * (auroc - lowest) / (1 - lowest), 2)
