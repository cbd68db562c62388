"""One timeline as a page shows it: tokens with their readings, the heat map, the course of each leading concept.

Plain data for the report's template: text (escaped there), shades, and places in percent; no markup but path data.

Axes: T tokens, N concepts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftw.hat.floor import CHANCE
from ftw.hat.timeline import FLOOR, SURPRISE_LIMIT, Timeline
from ftw.ui.colours import Colour

PANEL_TOKENS = 56  # as many tokens side by side as a page of 1200 pixels has room for
NUM_LEVELS = 10  # shades of the heat map
NUM_LEGEND = 20
MARKS = {"\n": "↵", "\t": "⇥", "\r": "↵"}


@dataclass(frozen=True)
class _View:
    """A timeline with what all its parts need, computed once."""

    timeline: Timeline
    surprise_TN: np.ndarray
    probabilities_TN: np.ndarray
    strongest_T: np.ndarray
    kinds: Mapping[str, str]  # concept -> CSS class that holds its colours


def passage(timeline: Timeline, colours: Mapping[str, Colour], top: int = 16, *, name: str = "t0") -> dict[str, Any]:
    """Everything a page says about one timeline, as data for the template.

    Args:
        top: concepts in the heat map and in the table.
        name: start of the CSS classes, different for every timeline of a page.
    """
    strongest_T = timeline.strongest()
    rows = timeline.by_peak(timeline.leading(top))
    used = {timeline.concepts[n] for n in [*strongest_T[strongest_T >= 0], *rows]}
    kinds = {concept: f"{name}c{index}" for index, concept in enumerate(sorted(used))}
    view = _View(timeline, timeline.surprise_TN, timeline.probabilities_TN, strongest_T, kinds)
    counted = timeline.counted
    won = Counter(timeline.concepts[n] for n in strongest_T[counted] if n >= 0)
    times = timeline.ms_per_token
    return {
        "prompt": timeline.prompt,
        "meta": timeline.meta,
        "colours": [(kind, colours[concept]) for concept, kind in kinds.items()],
        "parts": [(heading, list(_tokens(view, positions))) for heading, positions in _halves(timeline)],
        "legend": [(concept, kinds[concept], count) for concept, count in won.most_common(NUM_LEGEND)],
        "num_hidden": max(0, len(won) - NUM_LEGEND),
        "num_tokens": int(counted.sum()),
        "num_coloured": sum(won.values()),
        "num_concepts": len(timeline.concepts),
        "by_chance": CHANCE,
        "ms": None if times is None or not counted.any() else float(np.nanmean(times[counted])),
        "panels": [panel for half in _halves(timeline) for panel in _panels(view, rows, *half)],
        "leaders": list(_leaders(view, rows, np.flatnonzero(counted))),
        "floor_height": round(100 - 100 * -np.log10(1 - FLOOR) / SURPRISE_LIMIT, 1),
    }


def visible(token: str) -> str:
    """A token on one line: breaks as arrows, a lone space as its sign, no control or direction-changing characters."""
    return "".join(MARKS.get(mark, mark if mark.isprintable() else "·") for mark in token.strip(" ")) or "␣"


def shade(surprise: float) -> int | None:
    """Shade of the heat map, 0 to 9; None where nothing was read."""
    return None if np.isnan(surprise) else min(NUM_LEVELS - 1, int(NUM_LEVELS * surprise / SURPRISE_LIMIT))


def _halves(timeline: Timeline) -> list[tuple[str, np.ndarray]]:
    """Content tokens of prompt and answer; of the whole if it is not in two parts."""
    content = ~timeline.is_special
    halves = [("Prompt", content & timeline.is_prompt), ("Answer", content & ~timeline.is_prompt)]
    filled = [(heading, np.flatnonzero(half_T)) for heading, half_T in halves if half_T.any()]
    return filled if len(filled) == 2 else [("Text", positions) for _, positions in filled]


def _tokens(view: _View, positions: np.ndarray) -> Iterator[dict[str, Any]]:
    timeline = view.timeline
    for t in positions:
        n = int(view.strongest_T[t])
        text = timeline.tokens[t].replace("\t", "    ")
        words = text.lstrip(" ")
        yield {
            # The space before a word stays outside its colour, or it would hang at the end of a line.
            "space": text[: len(text) - len(words)],
            "text": words,
            "name": visible(text),
            "position": int(t),
            "kind": view.kinds[timeline.concepts[n]] if n >= 0 else "",
            # A tenth of the room below the top of the scale: only readings no background token came near.
            "is_sure": n >= 0 and bool(view.surprise_TN[t, n] > 0.9 * SURPRISE_LIMIT),
            "readings": timeline.top(6, position=int(t)),
        }


def _panels(view: _View, rows: np.ndarray, heading: str, positions: np.ndarray) -> Iterator[dict[str, Any]]:
    """The heat map in lines of `PANEL_TOKENS`."""
    timeline = view.timeline
    for start in range(0, len(positions), PANEL_TOKENS):
        held = positions[start : start + PANEL_TOKENS]
        yield {
            "heading": heading if start == 0 else "",
            "tokens": [timeline.tokens[t] for t in held],
            "rows": [
                (
                    timeline.concepts[n],
                    view.kinds[timeline.concepts[n]],
                    [(shade(float(view.surprise_TN[t, n])), float(timeline.percentiles_TN[t, n])) for t in held],
                )
                for n in rows
            ],
        }


def _leaders(view: _View, rows: np.ndarray, counted: np.ndarray) -> Iterator[dict[str, Any]]:
    """Course and figures of each leading concept over the answer."""
    timeline = view.timeline
    for n in rows:
        surprise_T = view.surprise_TN[counted, n]
        peak = counted[int(np.nan_to_num(surprise_T, nan=-1.0).argmax())]
        yield {
            "name": timeline.concepts[n],
            "kind": view.kinds[timeline.concepts[n]],
            "bars": _bars(surprise_T),
            "num_above": int((timeline.percentiles_TN[counted, n] >= FLOOR).sum()),
            "probability": float(np.nanmax(view.probabilities_TN[counted, n])),
            "token": timeline.tokens[peak],
            "position": int(peak),
        }


def _bars(surprise_T: np.ndarray) -> str:
    """Path of one bar a token in a box of 100 × 100, the area under a line of steps."""
    width = 100 / max(len(surprise_T), 1)
    heights = np.clip(100 * np.nan_to_num(surprise_T) / SURPRISE_LIMIT, 0, 100)
    steps = (f"V{100 - height:.1f}h{width:.4f}" for height in heights)
    return f"M0 100{''.join(steps)}V100z"
