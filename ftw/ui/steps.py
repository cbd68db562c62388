"""The steps of a long command: which is running, how far it is, and where the time went in the end.

A bar is on the screen only while its step reports progress through it, so that a step may show bars of its own instead.
Without a terminal there are two plain lines a step.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ftw.ui.figures import duration, percent


@dataclass(eq=False)
class Step:
    """One step while it runs; call `advance` for a bar and `note` for words on its last line."""

    name: str
    console: Console
    words: str = ""
    _progress: Progress | None = field(default=None, init=False)
    _task: TaskID = field(default=TaskID(0), init=False)

    def advance(self, amount: float = 1, *, total: float | None = None) -> None:
        """Move the bar on; the first call, or one with `total`, says how far it goes."""
        if not self.console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  "),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.name, total=total)
        if total is not None:
            self._progress.update(self._task, total=total)
        self._progress.advance(self._task, amount)

    def note(self, words: str) -> None:
        """Words to stand beside the time the step took, such as what it made."""
        self.words = words

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Steps:
    """Runs named steps and remembers what each took.

    Args:
        total: how many steps there will be, for "3/8"; 0 if nobody knows.

    Attributes:
        seconds: step name -> wall-clock seconds, in order; also of a step that failed.

    Example:
        run = steps(total=2)
        with run.step("Collect states") as step:
            ...
            step.note("1,920 texts")
        console.print(run.table())
    """

    def __init__(self, *, total: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.seconds: dict[str, float] = {}
        self._total = total

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Run one step: its name when it starts; a tick, its time and its note when it ends; a cross if it fails."""
        place = len(self.seconds) + 1
        place_words = f"{place}/{self._total}" if self._total else f"{place}"
        self.console.print(Text.assemble((f"{place_words:>5}  ", "dim"), (name, "bold")))
        step = Step(name, self.console)
        start, mark, style = time.perf_counter(), "✗ stopped after", "red"
        try:
            yield step
            mark, style = "✓", "green"
        finally:
            step.close()
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            words = f" · {step.words}" if step.words else ""
            self.console.print(Text.assemble("       ", (mark, style), (f" {duration(took)}{words}", "dim")))

    def table(self) -> Table:
        """Where the time went: every step with its seconds, its share, and a bar."""
        total = sum(self.seconds.values())
        table = Table(title="Where the time went", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.show_footer = True
        table.add_column("step", "all", overflow="fold")
        table.add_column("time", duration(total), justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="crop")
        for name, seconds in self.seconds.items():
            share = seconds / total if total > 0 else 0.0
            table.add_row(name, duration(seconds), percent(share, 0), Text("█" * round(24 * share), style="cyan"))
        return table


def steps(*, total: int = 0, console: Console | None = None) -> Steps:
    """The steps of one command; see `Steps`."""
    return Steps(total=total, console=console)
