"""Pictures of a generation's story: heat map, stream of the leading concepts, network of pairs, change points.

All take the windows of a timeline (`ftw.cat.narrative`) and give matplotlib figures that belong to their caller.

Axes: W windows, N concepts, K concepts drawn.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ftw.cat.narrative import Narrative, WindowSeries
from ftw.hat.picture import Picture
from ftw.hat.timeline import plain
from ftw.paths import replace_file
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.plots import FAINT, INK, STYLE, SURPRISE_MAP, svg

TOP = 12


def heat_map(series: WindowSeries, narrative: Narrative | None = None, *, top: int = TOP) -> Figure:
    """Every leading concept in every window, in the order that they come; lines where the segments meet."""
    rows = series.in_turn(series.leading(top))
    with rc_context(STYLE):
        figure = Picture(figsize=(_width(series), 1.3 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        shown_KW = np.ma.masked_invalid(series.values_WN[:, rows].T)
        mesh = axes.pcolormesh(_edges(series), np.arange(len(rows) + 1), shown_KW, cmap=SURPRISE_MAP, vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(series.concepts[n]) for n in rows])
        axes.set_xlabel("token")
        axes.tick_params(axis="y", length=0)
        for segment in (narrative.segments if narrative else [])[1:]:
            axes.axvline(segment.start, color=INK, linewidth=1)
        figure.colorbar(mesh, ax=axes, pad=0.01).set_label(series.by)
    return figure


def stream(series: WindowSeries, *, top: int = 8, colours: Mapping[str, Colour] | None = None) -> Figure:
    """How much of each leading concept there is, stacked around a middle line."""
    rows = series.leading(top)
    names = [series.concepts[n] for n in rows]
    shades = colours or concept_colours(names)
    values_KW = np.nan_to_num(series.values_WN[:, rows].T)
    places = series.ends.astype(float)
    if len(places) == 1:  # a single window has no course; it is drawn as wide as it is
        places, values_KW = np.array([series.starts[0], series.ends[0]], dtype=float), np.repeat(values_KW, 2, axis=1)
    with rc_context(STYLE):
        figure = Picture(figsize=(_width(series), 3.4), layout="constrained")
        axes = figure.subplots()
        bands = axes.stackplot(places, values_KW, baseline="sym", colors=[shades[name].line_light for name in names])
        for band in bands:
            band.set_edgecolor("white")
            band.set_linewidth(0.4)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("token")
        axes.set_xlim(places[0], places[-1])
        labels = [plain(name) for name in names]
        figure.legend(bands, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def network(series: WindowSeries, narrative: Narrative, *, top: int = TOP) -> Figure:
    """Leading concepts on a circle; a line for each pair that comes together more often than chance."""
    names = [series.concepts[n] for n in series.leading(top)]
    means = {name: float(np.nanmean(series.values_WN[:, series.concepts.index(name)])) for name in names}
    order = _neighbours(names, narrative)
    angles = {name: 2 * np.pi * place / max(1, len(order)) for place, name in enumerate(order)}
    with rc_context(STYLE):
        figure = Picture(figsize=(5.4, 5.4), layout="constrained")
        axes = figure.subplots()
        for pair in narrative.together:
            if pair.first in angles and pair.second in angles:
                ends = np.array([[np.cos(angles[name]), np.sin(angles[name])] for name in (pair.first, pair.second)])
                width = 0.6 + min(4.0, 1.5 * np.log2(max(pair.lift, 1)))
                axes.plot(ends[:, 0], ends[:, 1], color=FAINT, linewidth=width, alpha=0.6, zorder=1)
        for name, angle in angles.items():
            x, y = np.cos(angle), np.sin(angle)
            axes.plot(x, y, "o", color="#2f6fb5", markersize=4 + 12 * means[name], alpha=0.8, zorder=2)
            side = "left" if x >= 0 else "right"
            axes.annotate(plain(name), (1.1 * x, 1.1 * y), ha=side, va="center", fontsize=8)
        axes.set(xlim=(-1.9, 1.9), ylim=(-1.4, 1.4), aspect="equal")
        axes.axis("off")
        if not narrative.together:
            axes.annotate("no pair above chance", (0, 0), ha="center", color=FAINT, fontsize=8)
    return figure


def turns(series: WindowSeries, narrative: Narrative, *, top: int = TOP) -> Figure:
    """How far each window is from the one before, over all leading concepts; lines and names at the change points."""
    values_WK = np.nan_to_num(series.values_WN[:, series.leading(top)])
    steps = np.sqrt((np.diff(values_WK, axis=0) ** 2).mean(axis=1)) if len(values_WK) > 1 else np.zeros(0)
    with rc_context(STYLE):
        figure = Picture(figsize=(_width(series), 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(series.ends[1:], steps, color="#2f6fb5", linewidth=1.2)
        high = max(float(steps.max(initial=0)), 1e-3)
        for place, segment in enumerate(narrative.segments):
            if place:
                axes.axvline(segment.start, color=INK, linewidth=0.8)
            names = ", ".join(plain(name) for name in list(segment.concepts)[:2]) or "–"
            axes.annotate(names, (segment.start, high * (1.16 - 0.1 * (place % 2))), fontsize=7.5)
        axes.set(xlim=(series.starts[0], series.ends[-1]), ylim=(0, 1.25 * high))
        axes.set(xlabel="token", ylabel="change from window to window")
    return figure


def pictures(series: WindowSeries, narrative: Narrative, *, top: int = TOP) -> dict[str, Figure]:
    """All pictures of a story, by name."""
    return {
        "heat-map": heat_map(series, narrative, top=top),
        "stream": stream(series, top=min(top, 8)),
        "together": network(series, narrative, top=top),
        "turns": turns(series, narrative, top=top),
    }


def write_page(path: Path, title: str, stories: Sequence[tuple[str, str, Mapping[str, Figure]]]) -> Path:
    """One HTML file that needs nothing else: for each story its name, its text and its pictures.

    Everything that came from outside is escaped; a content policy forbids any request.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:16px/1.6 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}",
        "figure{margin:1.5em 0}svg{max-width:100%;height:auto}figcaption{color:#666}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for number, (name, text, drawn) in enumerate(stories):
        parts += [f"<h2>{html.escape(name)}</h2>", f"<p>{html.escape(text)}</p>"]
        for place, (caption, figure) in enumerate(drawn.items()):
            picture = svg(figure, prefix=f"s{number}p{place}")
            parts.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    with replace_file(path) as temporary:
        temporary.write_text("\n".join([*parts, "</body></html>"]), encoding="utf-8")
    return path


def _edges(series: WindowSeries) -> np.ndarray:
    """Borders of the windows along the tokens: each is drawn where it adds what the one before has not seen."""
    return np.concatenate([[series.starts[0]], series.ends])


def _width(series: WindowSeries) -> float:
    return float(np.clip(4 + 0.12 * len(series.ends), 6.5, 24))


def _neighbours(names: list[str], narrative: Narrative) -> list[str]:
    """The names in an order in which pairs stand side by side where they can."""
    order: list[str] = []
    for pair in narrative.together:
        for name, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if name in names and name not in order:
                order.insert(order.index(other) + 1 if other in order else len(order), name)
    return [*order, *(name for name in names if name not in order)]
