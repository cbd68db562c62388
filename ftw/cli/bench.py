"""`ftw bench`: what reading, loading and training cost, each beside a baseline and a floor measured in the same run."""

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftw.bench.machine import git_state, load, machine
from ftw.bench.measure import Row, Stopwatch
from ftw.cli import _run
from ftw.cli._arguments import near
from ftw.cli._schema import BENCHES, BenchJob
from ftw.cli._verb import verb
from ftw.errors import ConfigError

NUMBERS = ("n", "d", "ms", "baseline_ms", "ratio", "floor_ms", "over_floor")
OWN_COLUMN = ("case", "baseline", *NUMBERS)
WIDE = 150


def bench(job: BenchJob) -> list[Row]:
    """Measure one of the benches, print its table, and write the rows as JSON and the curve as a picture if asked.

    `--json` without a file prints the rows as JSON; the table then goes to standard error.
    """
    if job.bench not in BENCHES:
        raise ConfigError(f"there is no bench {job.bench!r}{near(job.bench, BENCHES)} Name one of {', '.join(BENCHES)}")
    picture = _picture(job)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    watch, console, rows = Stopwatch(job), Console(stderr=job.json == ""), list[Row]()
    measured_on = {**machine(watch.device), "clock": job.clock}
    measure: Callable[[Stopwatch], Iterator[Row]] = getattr(
        import_module(f"ftw.bench.{job.bench}"), f"{job.bench}_rows"
    )
    with console.status(f"measuring {job.bench}") as status:
        for row in measure(watch):
            rows.append(row)
            status.update(f"measuring {job.bench}: {len(rows)} rows, the last: {row.case}")
    measured_on["load_after"] = load()
    console.print(table(rows, width=console.width))
    console.print(Text(_where(measured_on), style="dim"))
    if job.json == "":
        print(json.dumps(report(rows, measured_on), indent=1))
    elif job.json is not None:
        _run.write_json(Path(job.json), report(rows, measured_on))
    if picture is not None:
        from ftw.bench.curve import draw_curve

        console.print(f"cost curve: {draw_curve(rows, picture)}", highlight=False)
    return rows


def report(rows: Sequence[Row], measured_on: dict[str, Any]) -> dict[str, Any]:
    """What is written as JSON."""
    state = git_state()
    commit = None if state is None else state["commit"] + (", with changes" if state["dirty"] else "")
    return {"machine": measured_on, "commit": commit, "rows": [row.record() for row in rows]}


def table(rows: Sequence[Row], *, width: int) -> Table:
    """A row each, with what it is held against below it; further figures where the terminal is wide."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    shown.add_column("case, and what it is held against", overflow="fold", ratio=3)
    for name in ("n", "d", "ms", "other", "ratio", "floor", "×"):
        shown.add_column(name, justify="right", no_wrap=True)
    if width >= WIDE:
        shown.add_column("", overflow="fold", ratio=2, style="dim")
    for row in rows:
        values = row.record()
        more = "  ".join(f"{name} {_cell(value)}" for name, value in values.items() if name not in OWN_COLUMN)
        case = Text.assemble(row.case, "\n", (f"  {row.baseline}", "dim"))
        cells = [case, *(Text(_cell(values[name])) for name in NUMBERS), Text(more)]
        shown.add_row(*cells[: len(shown.columns)])
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "–" if value is None else str(value)


def _picture(job: BenchJob) -> Path | None:
    """Where the curve goes: as asked, or beside the JSON.

    Raises:
        ConfigError: a file without a name, or a curve of a bench that has none.
    """
    if job.plot == "":
        raise ConfigError("--plot takes a file: ftw bench bank --plot bank.svg")
    if job.plot is not None and job.bench != "bank":
        raise ConfigError(f"plot={job.plot!r}: only `ftw bench bank` has a curve to draw; leave it out")
    if job.plot is not None:
        return Path(job.plot)
    return Path(job.json).with_suffix(".svg") if job.json and job.bench == "bank" else None


def _where(measured_on: dict[str, Any]) -> str:
    """The machine in a line."""
    name = measured_on.get("card") or measured_on["processor"]
    threads, cores = measured_on["torch_threads"], measured_on["cores"]
    return (
        f"{name}, {threads} of {cores} cores, torch {measured_on['torch']}, {measured_on['clock']} time, load "
        f"{measured_on['load']} before and {measured_on['load_after']} after; ratio: case over baseline"
    )


def main() -> None:
    """The verb, from the command line."""
    verb("bench", bench, BenchJob)


if __name__ == "__main__":
    main()
