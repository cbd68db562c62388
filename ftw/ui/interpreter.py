"""What is shown of an interpreter: its figures, its confusions, and what it says of a text or of each token."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftw.hat.timeline import plain as printable

BAR = "▮"
KINDS = ("named", "unnamed", "all")


def figures_table(found: Mapping[str, Any]) -> Table:
    """Systems in rows; for each kind of text top-1 and top-5 with intervals, and the interpreter's lead."""
    # Narrow gaps: all columns fit into a terminal of 80.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("texts", "system"):
        table.add_column(name, no_wrap=True)
    for name in ("top-1", "95 %", "top-5", "ECE", "ahead", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = "ahead: the interpreter's top-1 minus the system's, paired over concepts"
    kinds = [kind for kind in (*KINDS, *found) if kind in found and kind != "confused"]
    for kind in dict.fromkeys(kinds):
        entry = found[kind]
        for place, (name, row) in enumerate(entry["systems"].items()):
            ahead = row.get("minus", {})
            table.add_row(
                kind if not place else "",
                name,
                f"{row['top1']:.3f}",
                _interval(row),
                f"{row['top5']:.3f}",
                f"{row['ece']:.3f}",
                f"{ahead['top1']:+.3f}" if ahead else "",
                _interval(ahead) if ahead else "",
                end_section=place == len(entry["systems"]) - 1,
            )
    return table


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['top1_low']:.2f}–{row['top1_high']:.2f}"


def confusion_picture(names: Sequence[str], matrix_KK: np.ndarray, path: Path) -> Path:
    """A heat map: mean probability that texts of each category (rows) give to each category (columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = max(4.0, 0.28 * len(names) + 2)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix_KK, vmin=0, vmax=1, cmap="viridis")
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(range(len(names)), labels=list(names), fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("category that the interpreter gives its probability to")
    axes.set_ylabel("category of the text's concept")
    figure.colorbar(image, ax=axes, shrink=0.8, label="mean probability")
    figure.savefig(path, dpi=130)
    return path


def concepts_table(rows: Sequence[tuple[str, float]], categories: Sequence[tuple[str, float]], sure: float) -> Table:
    """The strongest concepts of a text, the strongest categories beside them, the confidence in the title."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"confidence {sure:.2f}", title_justify="left")
    table.add_column("concept", overflow="fold")
    table.add_column("probability", justify="right")
    if categories:
        table.add_column("category", overflow="fold")
        table.add_column("probability", justify="right")
    for place in range(max(len(rows), len(categories))):
        cells = [rows[place][0], f"{rows[place][1]:.3f}"] if place < len(rows) else ["", ""]
        if categories:
            cells += [categories[place][0], f"{categories[place][1]:.3f}"] if place < len(categories) else ["", ""]
        table.add_row(*map(Text, cells))
    return table


class LiveInterpretation:
    """Prints one line a token: the token, how sure the interpreter is, and the strongest concepts."""

    def __init__(self, console: Console, *, bar_width: int = 8) -> None:
        self.console, self._bar_width, self._leads = console, bar_width, Counter[str]()

    def add(self, token: str, concepts: Sequence[tuple[str, float]], sure: float) -> None:
        """The next token, concepts with their probabilities, strongest first."""
        self._leads[concepts[0][0]] += 1
        bar = BAR * round(sure * self._bar_width)
        shown = repr(printable(token))[1:-1]
        line = Text.assemble(
            (f"{shown:<16.16}", "italic"), (f" {bar:<{self._bar_width}}", "cyan"), (f" {sure:.2f}  ", "dim")
        )
        for place, (name, chance) in enumerate(concepts):
            line.append(f"{printable(name)} ", "bold" if place == 0 else "")
            line.append(f"{chance:.2f}  ", "dim")
        line.truncate(self.console.width, overflow="ellipsis")
        self.console.print(line, highlight=False)

    def finish(self) -> None:
        """The concepts that led at most tokens."""
        leads = ", ".join(f"{printable(name)} ({num})" for name, num in self._leads.most_common(5))
        self.console.print(Text(f"leading: {leads or 'no token was generated'}", style="dim"))
