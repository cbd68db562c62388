"""What a watch list and a comparison came to: alarms token by token, and concepts that were thought or written only.

As in `terminal`, everything is a rich renderable, and nothing from a model reaches the terminal but text.
"""

from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ftw.hat.timeline import TokenReading
from ftw.ui import figures
from ftw.ui.terminal import printable


class OneGap(Protocol):
    """A concept with its readings of both kinds."""

    @property
    def concept(self) -> str: ...
    @property
    def activation(self) -> float: ...
    @property
    def text(self) -> float: ...
    @property
    def signed(self) -> float: ...


class Compared(Protocol):
    """What is thought set against what is written."""

    def thinks_not_writes(self, k: int = 10, /) -> Sequence[OneGap]: ...
    def writes_not_thinks(self, k: int = 10, /) -> Sequence[OneGap]: ...


def alarm_table(readings: Sequence[TokenReading], limit: int = 20) -> RenderableType | None:
    """One line for every alarm, strongest first; None where there was none."""
    rows = [(alarm, reading) for reading in readings for alarm in reading.alarms]
    if not rows:
        return None
    rows.sort(key=lambda row: (-row[0].reading.percentile, row[1].position))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="alarms", title_style="bold red", title_justify="left")
    table.add_column("token", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, max_width=14)
    table.add_column("concept", overflow="fold", min_width=10)
    table.add_column("percentile", justify="right", no_wrap=True)
    for alarm, reading in rows[:limit]:
        name = printable(alarm.reading.concept)
        below = "" if alarm.watched == alarm.reading.concept else f" (below {printable(alarm.watched)})"
        cells = [str(reading.position), repr(printable(reading.token.strip(" ")))[1:-1], name + below]
        table.add_row(*(Text(cell) for cell in cells), Text(figures.percent(alarm.reading.percentile, 2)))
    more = [Text(f"… {len(rows) - limit} more", style="dim")] if len(rows) > limit else []
    return Group(table, *more)


def gap_table(compared: Compared, k: int = 5) -> RenderableType:
    """Concepts that were thought more than written, and written more than thought, by means over the answer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("thinks, writes", overflow="fold", min_width=10)
    for name in ("thinks", "writes", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for gap in [*compared.thinks_not_writes(k), *reversed(compared.writes_not_thinks(k))]:
        numbers = (
            figures.percent(gap.activation, 0),
            figures.percent(gap.text, 0),
            f"{100 * gap.signed:+.0f}".replace("-", "−"),
        )
        table.add_row(Text(printable(gap.concept)), *numbers)
    return table
