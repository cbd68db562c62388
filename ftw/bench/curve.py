"""The cost curve of `ftw bench bank`, drawn: milliseconds a token over the number of lenses, and what memory allows."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib import rc_context

from ftw import paths
from ftw.bench.measure import Row
from ftw.errors import ConfigError
from ftw.hat.picture import Picture
from ftw.ui.plots import ACCENT, CONTROL, FAINT, STYLE

CURVE = "curve"  # begins the case of the rows that are drawn
SUFFIXES = (".svg", ".png")
COLOURS = {"float32": ACCENT, "float16": CONTROL}


def draw_curve(rows: Iterable[Row], path: Path) -> Path:
    """Write the curve as `.svg` or `.png`.

    Raises:
        ConfigError: another suffix. DiskFullError: no room.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"plot={str(path)!r}: a picture is written as {' or '.join(SUFFIXES)}")
    with rc_context(STYLE):
        figure = Picture(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.subplots()
        by_precision: dict[str, list[Row]] = {}
        for row in rows:
            if row.case.startswith(CURVE):
                by_precision.setdefault(str(row.more["precision"]), []).append(row)
        for precision, points in by_precision.items():
            num, ms = [row.n for row in points], [row.ms for row in points]
            axes.plot(num, ms, "o-", color=COLOURS.get(precision, FAINT), markersize=4, label=precision)
            floors = [(row.n, row.floor_ms) for row in points if row.floor_ms is not None]
            axes.plot(*zip(*floors, strict=True), ":", color=COLOURS.get(precision, FAINT), linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="linear lenses on one layer", ylabel="ms a token")
        axes.grid(visible=True, color=FAINT, alpha=0.2, linewidth=0.6)
        axes.legend(frameon=False, title="dotted: reading the bytes")
        with paths.replace_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=160, facecolor="white")
    return path
