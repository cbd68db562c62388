"""What a command prints: tables of figures, and tokens in the colour of what was read in them.

Everything is a rich renderable or writes to a rich console, so that without a terminal, with NO_COLOR or in a narrow
window the same calls give plain text that fits. Tokens come from a model: control characters never reach the terminal.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ftw.hat.floor import CHANCE
from ftw.hat.timeline import FLOOR, SURPRISE_LIMIT, Timeline, TokenReading
from ftw.ui import figures
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.figures import Evaluated, Metrics

ARROW = " › "
SPARKS = " ▁▂▃▄▅▆▇█"
# Heading, smallest terminal width that has room for the column.
COLUMNS = (
    ("AUROC", 0),
    ("95 %", 52),
    ("text", 0),
    ("shuffled", 64),
    ("Δ text", 74),
    ("Δ 95 %", 112),
    ("F1", 84),
    ("R@1 %", 92),
    ("ECE", 100),
    ("floor", 124),
    ("texts", 132),
)


def printable(text: str) -> str:
    """Text that cannot move the cursor or recolour the terminal: control characters become a dot, breaks stay."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "·" for mark in text.replace("\t", "    "))


@dataclass(frozen=True)
class EvaluationTable:
    """Figures per concept, best first, with as many columns as the terminal has room for."""

    evaluation: Evaluated
    limit: int = 40
    where: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [name for name, width in COLUMNS if options.max_width >= width]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True, collapse_padding=True)
        # At the narrowest only the name may fold.
        table.add_column("concept", "mean", overflow="fold", min_width=10)
        means = _cells(self.evaluation.mean)
        for name in columns:
            table.add_column(name, means[name], justify="right", no_wrap=True)
        rows = figures.ranked(self.evaluation)
        shown = _ends(len(rows), self.limit)
        for index in shown:
            if index is None:
                table.add_row(Text(f"… {len(rows) - len(shown) + 1} more", style="dim"), *[""] * len(columns))
                continue
            name, row = rows[index]
            style = "yellow" if figures.weak(row) else ""
            cells = _cells(row)
            table.add_row(_marked(name, row), *[cells[column] for column in columns], style=style)
        yield table
        yield from self._notes(rows, len(shown) < len(rows))

    def _notes(self, rows: Sequence[tuple[str, Metrics]], is_cut: bool) -> Iterable[Text]:
        num_weak = sum(bool(figures.weak(row)) for _, row in rows)
        if num_weak:
            yield Text(
                f"* {num_weak} of {len(rows)} lenses are no better than a control (t: text only, s: shuffled labels, "
                "l: length, p: position, r: random direction, f: first layer, m: a linear lens on every token); trust "
                "their readings accordingly",
                style="yellow",
            )
        for note in self.evaluation.notes:
            yield Text(printable(note), style="dim")
        if is_cut and self.where:
            yield Text(f"All {len(rows)} concepts: {self.where}", style="dim")


def evaluation_table(evaluation: Evaluated, *, limit: int = 40, where: str = "") -> RenderableType:
    """Table of an evaluation: best concepts first, means at the foot, lenses no better than a control marked.

    Args:
        limit: with more concepts than this, only the best and the worst are shown.
        where: the file that has all of them, named below a table that was cut.
    """
    return EvaluationTable(evaluation, limit, where)


def _ends(num_rows: int, limit: int) -> list[int | None]:
    """Indices of the rows to show, None for the gap between the best and the worst."""
    if num_rows <= limit:
        return list(range(num_rows))
    head = (limit + 1) // 2
    return [*range(head), None, *range(num_rows - (limit - head), num_rows)]


def _marked(name: str, row: Metrics) -> Text:
    marks = "".join("m" if word == "token_max" else word[0] for word in figures.weak(row))
    return Text(printable(name)).append(f" *{marks}" if marks else "")


def _cells(row: Metrics) -> dict[str, str]:
    """Every column of one row."""
    positive, negative = (figures.count(row, f"num_{sign}") for sign in ("positive", "negative"))
    return {
        "AUROC": figures.number(row, "auroc"),
        "95 %": figures.interval(row, "auroc"),
        "text": figures.number(row, "auroc_text"),
        "shuffled": figures.number(row, "auroc_shuffled"),
        "Δ text": figures.signed(row, "difference"),
        "Δ 95 %": figures.interval(row, "difference"),
        "F1": figures.number(row, "f1", 2),
        "R@1 %": figures.number(row, "recall_at_1fpr", 2),
        "ECE": figures.number(row, "ece"),
        "floor": figures.number(row, "ece_floor"),
        "texts": "" if positive == figures.DASH else f"{positive} + {negative}",
    }


def token_text(readings: Timeline | Iterable[TokenReading], colours: Mapping[str, Colour] | None = None) -> Text:
    """The text, tokens on the colour of the concept that stands out; the prompt dim, special tokens left out."""
    readings = list(readings.readings(1) if isinstance(readings, Timeline) else readings)
    if colours is None:
        colours = concept_colours({reading.lead for reading in readings if reading.lead is not None})
    text = Text()
    for reading in readings:
        if not reading.is_special:
            text.append(printable(reading.token), token_style(reading, colours))
    return text


def token_style(reading: TokenReading, colours: Mapping[str, Colour]) -> Style:
    """How a token is written: on the colour of the concept that stands out, the prompt dim, else plain.

    A token with an alarm is bold and underlined besides.
    """
    colour = None if reading.is_special or reading.lead is None else colours.get(reading.lead)
    mark = True if reading.alarms else None
    if colour is not None:
        return Style(bgcolor=colour.dark, color=colour.dark_ink, dim=None, bold=mark, underline=mark)
    return Style(dim=True if reading.is_prompt else None, bold=mark, underline=mark)


def legend(counts: Mapping[str, int], colours: Mapping[str, Colour]) -> Columns:
    """Concept names on their colours, each with its number of tokens."""
    chips = []
    for name, num_tokens in counts.items():
        style = Style(bgcolor=colours[name].dark, color=colours[name].dark_ink) if name in colours else Style()
        chips.append(Text.assemble((f" {printable(name)} ", style), (f" {num_tokens}", "dim"), no_wrap=True))
    return Columns(chips, padding=(0, 2))


def answer_table(
    timeline: Timeline, top: int = 12, *, width: int = 100, paths: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """The leading concepts over the answer: tokens above the floor, highest probability, where, and the whole course.

    Args:
        width: columns of the terminal; the token of the peak and the sparkline go first when it is narrow.
        paths: concept -> root … concept; shown as far as there is room.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    spark_width = max(8, min(24, width - 64) if paths else min(40, width - 56))
    room = width - sum(size for least, size in ((0, 16), (60, 16), (76, spark_width + 2)) if width >= least)
    table.add_column("concept", overflow="fold", min_width=10)
    for name in (f"≥ {figures.percent(FLOOR, 0)}", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= 60:
        table.add_column("at", no_wrap=True, max_width=14)
    if width >= 76:
        table.add_column("over the answer", no_wrap=True)
    counted = np.flatnonzero(timeline.counted)
    probabilities_TN, surprise_TN = timeline.probabilities_TN[counted], timeline.surprise_TN[counted]
    for n in timeline.leading(top):
        peak = int(np.nan_to_num(surprise_TN[:, n], nan=-1.0).argmax())
        name = timeline.concepts[n]
        cells = [
            short_path((paths or {}).get(name) or [name], room),
            str(int((timeline.percentiles_TN[counted, n] >= FLOOR).sum())),
            f"{probabilities_TN[peak, n]:.2f}",
            repr(printable(timeline.tokens[counted[peak]].strip(" ")))[1:-1],
            sparkline(surprise_TN[:, n], spark_width),
        ]
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells[: len(table.columns)]))
    return table


def short_path(path: Sequence[str], width: int) -> Text:
    """A concept behind those above it, as many as have room, the root and the nearest first."""
    steps = [printable(step) for step in path]
    shown = steps
    for num_left_out in range(1, len(steps)):
        if cell_len(ARROW.join(shown)) <= width:
            break
        # The middle of the path says least: then the root goes, then the parents.
        shown = [steps[0], "…", *steps[num_left_out + 1 :]] if num_left_out < len(steps) - 1 else steps[-1:]
    above = "".join(step + ARROW for step in shown[:-1])
    return Text.assemble((above, "dim"), shown[-1])


def sparkline(surprise_T: np.ndarray, width: int = 32) -> str:
    """Course of one concept in `width` characters, the highest of each stretch of tokens."""
    stretches = np.array_split(np.nan_to_num(surprise_T), min(width, max(len(surprise_T), 1)))
    heights = [float(part.max(initial=0.0)) / SURPRISE_LIMIT for part in stretches]
    return "".join(SPARKS[round(min(height, 1.0) * (len(SPARKS) - 1))] for height in heights)


class LiveTokens:
    """Prints tokens as they come, each on the colour of its strongest concept; then legend, table and cost.

    Example:
        with LiveTokens(colours=concept_colours(pack.names, paths)) as live:
            for reading in monitor.stream(prompt):
                live.add(reading)
            live.finish(timeline)
    """

    def __init__(
        self,
        *,
        colours: Mapping[str, Colour],
        paths: Mapping[str, Sequence[str]] | None = None,
        console: Console | None = None,
        width: int = 100,
    ) -> None:
        self.console = console or Console()
        self.colours, self._paths = colours, paths
        self.readings: list[TokenReading] = []
        self._width = min(width, self.console.width)
        self._column = 0
        self._in_prompt = False

    def __enter__(self) -> "LiveTokens":
        return self

    def __exit__(self, *_: object) -> None:
        self._break_line()

    def add(self, reading: TokenReading) -> None:
        """Print one token at once."""
        self.readings.append(reading)
        if reading.is_special:
            return
        if self._in_prompt and not reading.is_prompt:
            self._break_line()
            self._break_line(blank=True)
        self._in_prompt = reading.is_prompt
        self._write(printable(reading.token), token_style(reading, self.colours))

    def finish(self, timeline: Timeline | None = None, *, top: int = 12, note: str = "") -> None:
        """Print the legend, the table of the leading concepts if there is a timeline, and what a token cost.

        Args:
            note: words for the footer, such as how much of the time was the lenses'.
        """
        self._break_line()
        self._break_line(blank=True)
        content = [reading for reading in self.readings if not reading.is_special]
        answer = [reading for reading in content if not reading.is_prompt] or content
        won = Counter(reading.lead for reading in answer if reading.lead is not None)
        if won:
            self.console.print(legend(dict(won.most_common(24)), self.colours))
        if answer:
            self.console.print(Text(self._rule(sum(won.values()), len(answer), timeline), style="dim"))
        if timeline is not None:
            self.console.print(answer_table(timeline, top, width=self.console.width, paths=self._paths))
        times = [reading.ms for reading in answer if reading.ms is not None]
        parts = [f"{len(answer)} tokens"]
        if times:
            parts.append(f"{np.mean(times):.1f} ms a token")
        self.console.print(Text(" · ".join([*parts, *([note] if note else [])]), style="dim"))

    @staticmethod
    def _rule(num_coloured: int, num_tokens: int, timeline: Timeline | None) -> str:
        """What a colour means."""
        lenses = "the lenses" if timeline is None else f"{len(timeline.concepts):,} lenses"
        chance = f"chance gives at most {figures.percent(CHANCE, 0)} of background tokens one"
        return f"{num_coloured} of {num_tokens} tokens have a concept that stands out among {lenses}; {chance}"

    def _write(self, text: str, style: Style) -> None:
        """Print a piece, breaking the line before a word that has no room (a terminal would break inside it)."""
        for index, line in enumerate(text.split("\n")):
            if index:
                self._break_line(blank=True)
            if line.startswith(" ") and self._column + cell_len(line) > self._width:
                self._break_line()
            piece = line.lstrip(" ") if self._column == 0 and line.strip(" ") else line
            if piece:
                self.console.print(Text(piece, style), end="", soft_wrap=True)
                self._column += cell_len(piece)
        self.console.file.flush()

    def _break_line(self, *, blank: bool = False) -> None:
        if self._column or blank:
            self.console.print()
        self._column = 0


def overview(title: str, rows: Mapping[str, str]) -> Group:
    """A title over two columns of what and value, for the head and the end of a command."""
    grid = Table.grid(padding=(0, 2))
    for name, words in rows.items():
        grid.add_row(Text(name, style="dim"), Text(printable(words)))
    return Group(Text(title, style="bold"), grid)
