"""Pictures of what was read and of how far to trust it: matplotlib figures that belong to nobody but the caller.

Figures are made without pyplot, so there is no global state to leak and nothing to close. `svg` gives markup to put
into a page, with text that is text and, if wanted, in the colour of the page around it.

Axes: T tokens, N concepts, S texts.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ftw.cat.divergence import ALIGNED, Dissonance
from ftw.errors import DataError
from ftw.hat.picture import Picture
from ftw.hat.timeline import FLOOR, SURPRISE_LIMIT, Timeline, plain
from ftw.ui import figures
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.figures import Evaluated

INK, FAINT, ACCENT, CONTROL = "#111213", "#8b8f94", "#2f6fb5", "#c2571a"
# From nothing to ink in even steps of lightness, readable in grey and for every kind of colour vision.
SURPRISE_MAP = LinearSegmentedColormap.from_list("surprise", ["#f3f5f8", "#b9d3ea", "#4f93cb", "#0b3768"])
WRITTEN_MAP = LinearSegmentedColormap.from_list("written", ["#f7f4f2", "#f0c8ae", "#d9814d", "#6e2c08"])
TICKS = {0: "0 %", 1: "90 %", 2: "99 %", 3: "99.9 %"}
# matplotlib's own style element would reach the whole page; it matters only for thick lines.
SVG_STYLE = '<style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style>'
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def timeline_heatmap(timeline: Timeline, top: int = 16, *, split: bool = True, columns: int = 60) -> Figure:
    """Concepts × tokens, dark where a concept stands out from background text; rows in the order in which they peak.

    Args:
        split: draw the prompt in a panel of its own, above the answer.
        columns: tokens a panel; longer texts go on in the next one.
    """
    content = ~timeline.is_special
    parts = [
        ("prompt", np.flatnonzero(content & timeline.is_prompt)),
        ("answer", np.flatnonzero(content & ~timeline.is_prompt)),
    ]
    if not split:
        parts = [("", np.flatnonzero(content))]
    panels = [
        (name, positions[start : start + columns])
        for name, positions in parts
        for start in range(0, len(positions), columns)
    ]
    if not panels:
        raise DataError("this timeline has only special tokens; there is nothing to draw")
    rows = timeline.by_peak(timeline.leading(top))
    height = 0.17 * len(rows) + 0.75
    with rc_context(STYLE):
        figure = Picture(figsize=(2.2 + 0.16 * columns, height * len(panels) + 0.3), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        meshes = []
        for panel, (name, positions) in zip(axes, panels, strict=True):
            meshes.append(_heat(panel, timeline, rows, positions, columns))
            panel.set_title(name, loc="left", fontsize=9, color=FAINT)
        bar = figure.colorbar(
            meshes[0], ax=list(axes), ticks=list(TICKS), fraction=0.015, pad=0.01, aspect=30, shrink=0.6
        )
        bar.ax.set_yticklabels(list(TICKS.values()))
        bar.set_label("percentile against background text")
        bar.outline.set_visible(False)
    return figure


def _heat(axes: Axes, timeline: Timeline, rows: np.ndarray, positions: np.ndarray, columns: int) -> Any:
    shown_NT = np.ma.masked_invalid(timeline.surprise_TN[np.ix_(positions, rows)].T)
    mesh = axes.pcolormesh(shown_NT, cmap=SURPRISE_MAP, vmin=0, vmax=SURPRISE_LIMIT, edgecolors="white", linewidth=0.4)
    axes.set_xlim(0, columns)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(timeline.concepts[n]) for n in rows])
    tokens = [plain(timeline.tokens[t])[:14] for t in positions]
    axes.set_xticks(np.arange(len(positions)) + 0.5, tokens, rotation=90, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def concept_streams(
    timeline: Timeline, top: int = 8, *, smooth: int = 5, colours: Mapping[str, Colour] | None = None
) -> Figure:
    """The leading concepts over the answer, a row each: surprise as points, its moving mean as an area.

    Args:
        smooth: tokens of the moving mean, centred, shorter at the ends.
    """
    rows = timeline.by_peak(timeline.leading(top))
    positions = np.flatnonzero(timeline.counted)
    if not len(rows):
        raise DataError("no concept was read in this timeline; there is nothing to draw")
    colours = colours or concept_colours(timeline.concepts)
    with rc_context(STYLE):
        figure = Picture(figsize=(9.6, 0.5 * len(rows) + 0.7), layout="constrained")
        panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
        for axes, n in zip(panels, rows, strict=True):
            surprise_T = timeline.surprise_TN[positions, n]
            _stream(axes, surprise_T, smooth, colours[timeline.concepts[n]].line_light)
            axes.set_ylabel(plain(timeline.concepts[n]), rotation=0, ha="right", va="center", labelpad=8)
        every = max(1, int(np.ceil(len(positions) / 40)))
        tokens = [plain(timeline.tokens[t])[:12] for t in positions[::every]]
        panels[-1].set_xticks(np.arange(0, len(positions), every), tokens, rotation=90, fontsize=7)
        panels[-1].set_xlim(-0.5, len(positions) - 0.5)
    return figure


def _stream(axes: Axes, surprise_T: np.ndarray, smooth: int, colour: str) -> None:
    places = np.arange(len(surprise_T))
    mean_T = moving_mean(surprise_T, smooth)
    axes.fill_between(places, 0, mean_T, color=colour, alpha=0.3, linewidth=0)
    axes.plot(places, mean_T, color=colour, linewidth=1.3)
    axes.vlines(places, 0, np.nan_to_num(surprise_T), color=colour, linewidth=0.8, alpha=0.55)
    axes.axhline(-np.log10(1 - FLOOR), color=FAINT, linewidth=0.5, linestyle=(0, (2, 3)))
    axes.set_ylim(0, SURPRISE_LIMIT * 1.05)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def moving_mean(values_T: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values, over fewer at the ends and where some are NaN; NaN where all are."""
    there_T = ~np.isnan(values_T)
    kernel = np.ones(max(1, min(width, len(values_T))))
    total_T = np.convolve(np.where(there_T, values_T, 0.0), kernel, mode="same")
    num_T = np.convolve(there_T.astype(float), kernel, mode="same")
    return np.where(num_T > 0.5, total_T / np.maximum(num_T, 1.0), np.nan)


def dissonance_heatmap(dissonance: Dissonance, top: int = 8, *, columns: int = 60) -> Figure:
    """The concepts that differ most, two rows each over the counted tokens: what the model thinks, what it writes.

    Percentiles are drawn by their nines, as in `timeline_heatmap`; probabilities and surprise as they are.

    Args:
        columns: tokens a panel; longer texts go on in the next one.
    """
    rows, positions = dissonance.leading(top), np.flatnonzero(dissonance.counted)
    if not len(rows):
        raise DataError("no concept has an activation and a text reading; there is no dissonance to draw")
    panels = [positions[start : start + columns] for start in range(0, len(positions), columns)]
    nines = dissonance.by == "percentile"
    with rc_context(STYLE):
        height = 0.3 * len(rows) + 0.75
        figure = Picture(figsize=(2.9 + 0.16 * columns, height * len(panels) + 0.3), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        meshes = [_pairs(panel, dissonance, rows, part, columns) for panel, part in zip(axes, panels, strict=True)]
        for mesh, label in zip(meshes[0], ("thinks", "writes"), strict=True):
            bar = figure.colorbar(mesh, ax=list(axes), fraction=0.015, pad=0.01, aspect=30, shrink=0.6)
            if nines:
                bar.set_ticks(list(TICKS), labels=list(TICKS.values()))
            bar.set_label(f"{label}, {dissonance.by}")
            bar.outline.set_visible(False)
    return figure


def _pairs(axes: Axes, dissonance: Dissonance, rows: np.ndarray, positions: np.ndarray, columns: int) -> list[Any]:
    """Rows of thinking and writing in turns, a gap after each pair."""
    meshes = []
    shades = ((dissonance.activation_TN, SURPRISE_MAP, 0.0), (dissonance.text_TN, WRITTEN_MAP, 1.0))
    nines = dissonance.by == "percentile"
    for values_TN, shade, offset in shades:
        shown_NT = values_TN[np.ix_(positions, rows)].T
        if nines:
            shown_NT = -np.log10(np.maximum(1.0 - shown_NT, 10.0**-SURPRISE_LIMIT))
        # Every third row of a mesh that starts at `offset`; the rows between are left out.
        spaced = np.full((3 * len(rows) - 2, len(positions)), np.nan)
        spaced[::3] = shown_NT
        edges = (np.arange(len(positions) + 1), offset + np.arange(3 * len(rows) - 1))
        limit = SURPRISE_LIMIT if nines else 1.0
        meshes.append(
            axes.pcolormesh(*edges, np.ma.masked_invalid(spaced), cmap=shade, vmin=0, vmax=limit, edgecolors="none")
        )
    axes.set(xlim=(0, columns), ylim=(3 * len(rows) - 0.7, -0.2))
    axes.set_yticks(3 * np.arange(len(rows)) + 1, [plain(dissonance.concepts[n]) for n in rows])
    tokens = [plain(dissonance.tokens[t])[:14] for t in positions]
    axes.set_xticks(np.arange(len(positions)) + 0.5, tokens, rotation=90, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return meshes


def dissonance_scatter(dissonance: Dissonance, label: int = 8) -> Figure:
    """A point a concept: mean activation reading across, mean text reading up, over the counted tokens.

    Args:
        label: concepts named on each side, those that are furthest from the diagonal and outside of its grey band.
    """
    num = len(dissonance.concepts)
    thinks, writes = dissonance.thinks_not_writes(num), dissonance.writes_not_thinks(num)
    if not len(dissonance.leading(1)):
        raise DataError("no concept has an activation and a text reading; there is no dissonance to draw")
    with rc_context(STYLE):
        figure = Picture(figsize=(5.4, 5.4), layout="constrained")
        axes = figure.subplots()
        axes.fill_between([0, 1], [-ALIGNED, 1 - ALIGNED], [ALIGNED, 1 + ALIGNED], color=FAINT, alpha=0.12, linewidth=0)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
        for gaps, colour, side in ((thinks, ACCENT, "left"), (writes, CONTROL, "right")):
            places = [gap.activation for gap in gaps], [gap.text for gap in gaps]
            axes.plot(*places, "o", color=colour, markersize=3.6, alpha=0.6, markeredgewidth=0)
            for gap in (gap for gap in gaps[:label] if abs(gap.signed) > ALIGNED):
                shift = (5, -2) if side == "left" else (-5, -2)
                axes.annotate(
                    plain(gap.concept),
                    (gap.activation, gap.text),
                    shift,
                    textcoords="offset points",
                    fontsize=7.5,
                    ha=side,
                )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel=f"thinks (mean activation {dissonance.by})", ylabel=f"writes (mean text {dissonance.by})")
    return figure


def evaluation_dots(evaluation: Evaluated) -> Figure:
    """AUROC of every concept, best first: the lens with its interval, the text-only and the shuffled-label controls."""
    rows = [(name, row) for name, row in figures.ranked(evaluation) if not np.isnan(figures.value(row, "auroc"))]
    if not rows:
        raise DataError("no concept has an AUROC; the evaluation needs positive and negative texts for at least one")
    places = np.arange(len(rows))
    auroc, low, high, text, shuffled = (
        np.array([figures.value(row, key) for _, row in rows])
        for key in ("auroc", "auroc_low", "auroc_high", "auroc_text", "auroc_shuffled")
    )
    with rc_context(STYLE):
        figure = Picture(figsize=(7.2, 0.165 * len(rows) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.hlines(places[1::2], 0, 1, color=FAINT, linewidth=0.3, alpha=0.5, zorder=0)
        axes.hlines(places, low, high, color=ACCENT, linewidth=1.4, alpha=0.6)
        axes.plot(shuffled, places, "x", color=FAINT, markersize=3.2, markeredgewidth=0.9, label="shuffled labels")
        axes.plot(text, places, "o", color=CONTROL, markersize=3.6, markerfacecolor="none", label="text only")
        axes.plot(auroc, places, "o", color=ACCENT, markersize=4.2, label="lens, 95 % interval")
        axes.axvline(0.5, color=FAINT, linewidth=0.6)
        names = [plain(name) + (" *" if figures.weak(row) else "") for name, row in rows]
        axes.set_yticks(places, names, fontsize=7.5)
        axes.invert_yaxis()
        lowest = float(np.nanmin(np.concatenate([auroc, low, text, shuffled])))
        axes.set_xlim(min(0.4, lowest - 0.02), 1.01)
        axes.set_ylim(len(rows) - 0.3, -0.7)
        axes.set_xlabel("AUROC on held-out text")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8, handletextpad=0.3)
    return figure


def reliability(probabilities_S: np.ndarray, labels_S: np.ndarray, *, bins: int = 10) -> Figure:
    """Share of positives against stated probability, in bins of equal width, with 95 % intervals (Wilson, 1927).

    Args:
        probabilities_S: of one lens or of many laid end to end, in [0, 1]; NaN is left out.
        labels_S: 0 or 1.
    """
    probabilities_S, labels_S = np.ravel(probabilities_S).astype(float), np.ravel(labels_S).astype(float)
    kept = ~np.isnan(probabilities_S)
    probabilities_S, labels_S = probabilities_S[kept], labels_S[kept]
    if not len(labels_S):
        raise DataError("a reliability picture needs probabilities and labels; there are none")
    place = np.minimum((probabilities_S * bins).astype(int), bins - 1)
    num = np.bincount(place, minlength=bins)
    there = num > 0
    stated = np.bincount(place, probabilities_S, bins)[there] / num[there]
    found = np.bincount(place, labels_S, bins)[there] / num[there]
    low, high = wilson(found, num[there])
    with rc_context(STYLE):
        figure = Picture(figsize=(3.8, 4.4), layout="constrained")
        axes, below = figure.subplots(2, sharex=True, height_ratios=(5, 1))
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
        axes.vlines(stated, low, high, color=ACCENT, linewidth=1.4, alpha=0.6)
        axes.plot(stated, found, "o", color=ACCENT, markersize=4.5)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that were positive")
        below.bar((np.arange(bins) + 0.5) / bins, num, width=0.8 / bins, color=ACCENT, alpha=0.4)
        below.set(xlabel="stated probability", ylabel="texts")
        if num.max() > 50 * num[there].min():
            below.set_yscale("log")
    return figure


def wilson(shares: np.ndarray, counts: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a share out of a count (Wilson, 1927, "Probable Inference, the Law of Succession")."""
    centre = (shares + z * z / (2 * counts)) / (1 + z * z / counts)
    half = z * np.sqrt(shares * (1 - shares) / counts + z * z / (4 * counts**2)) / (1 + z * z / counts)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def svg(figure: Figure, *, prefix: str = "", themed: bool = False) -> str:
    """A figure as SVG markup for a page: no prologue, text as text, the same bytes every time.

    Args:
        prefix: put before every id; several pictures in one page need different ones.
        themed: ink takes the colour of the page around the picture, grounds are transparent.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ftw", "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=themed, metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    # A size in points would not shrink with the page; the view box keeps the proportions.
    head, rest = markup.split(">", 1)
    markup = re.sub(r' (width|height)="[\d.]+pt"', "", head) + ">" + rest.replace(SVG_STYLE, "")
    if prefix:
        markup = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", markup)
    return markup.replace(INK, "currentColor") if themed else markup


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
