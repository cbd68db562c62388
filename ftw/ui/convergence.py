"""Curves of convergence: distance and reliability of a concept's mean against its contexts."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from ftw.map.growing.convergence import CRITERION, Point
from ftw.ui.plots import ACCENT, CONTROL, FAINT, STYLE

COLOURS = {"concrete": ACCENT, "abstract": CONTROL}


def convergence_curves(points: Sequence[Point], layer: int) -> Figure:
    """Two panels over the number of contexts at one layer, bands for the 95 % intervals over concepts."""
    panels = (
        ("distance", "relative distance to the other half"),
        ("reliability", "split-half reliability"),
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
            for kind in dict.fromkeys(point.kind for point in points):
                mine = [point for point in points if point.kind == kind and point.layer == layer]
                n, values = [point.n for point in mine], [getattr(point, name) for point in mine]
                colour = COLOURS.get(kind, FAINT)
                axes.plot(n, [value[0] for value in values], color=colour, label=kind)
                axes.fill_between(n, [v[1] for v in values], [v[2] for v in values], color=colour, alpha=0.2, lw=0)
            if name != "reliability":
                axes.axhline(CRITERION, color=FAINT, lw=0.8, ls="--")
            axes.set_ylim(0, 1 if name == "reliability" else None)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("contexts")
        figure.axes[0].legend(frameon=False)
    return figure
