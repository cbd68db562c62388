"""`ftw timeline show|compare FILE`: the story of a saved timeline, in words, pictures and numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ftw.cat.narrative import Narrative, NarrativeConfig, WindowSeries, narrate, window_series
from ftw.cli._schema import TimelineJob
from ftw.cli._verb import verb
from ftw.errors import ConfigError, FTWError
from ftw.hat.timeline import Timeline
from ftw.paths import replace_file
from ftw.ui.plots import png, svg
from ftw.ui.stories import pictures, write_page

FORMATS = ("png", "svg", "html", "json", "parquet")
ACTIONS = {"show": 1, "compare": 2}


def timeline(job: TimelineJob) -> None:
    """Tell the story of one timeline, or of two side by side; write pictures and numbers where `out` says."""
    if job.action not in ACTIONS:
        raise ConfigError(f"action={job.action!r}: choose {' or '.join(ACTIONS)}, as in: ftw timeline show story.json")
    if len(job.files) != ACTIONS[job.action]:
        raise ConfigError(
            f"ftw timeline {job.action} takes {ACTIONS[job.action]} file{'s'[: ACTIONS[job.action] - 1]}, "
            f"{len(job.files)} given; ftw monitor ... save=story.json writes one"
        )
    if unknown := [name for name in job.formats if name not in FORMATS]:
        raise ConfigError(f"formats: no format {unknown[0]!r}; choose among {', '.join(FORMATS)}")
    config = NarrativeConfig(**vars(job.story))
    console = Console()
    names = [Path(file).stem for file in job.files]
    if len(set(names)) < len(names):
        names = list(job.files)
    told: list[tuple[str, WindowSeries, Narrative]] = []
    for name, file in zip(names, job.files, strict=True):
        series, story = _tell(Path(file), config)
        told.append((name, series, story))
    for name, series, story in told:
        _print(console, name, series, story, job.json)
    if len(told) == 2 and not job.json:
        console.print(_differences(told[0][1], told[1][1], config.top))
    if job.out is not None:
        for file in _write(Path(job.out), told, job.formats, config):
            console.print(f"wrote {file}", style="dim", highlight=False, markup=False)
    if job.wandb is not None:
        _to_wandb(job.wandb, told, config)


def _tell(file: Path, config: NarrativeConfig) -> tuple[WindowSeries, Narrative]:
    read = Timeline.load(file)
    return window_series(read, config), narrate(read, config)


def _print(console: Console, name: str, series: WindowSeries, story: Narrative, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"name": name, **story.record()}, ensure_ascii=False))
        return
    console.print(name, style="bold", markup=False)
    console.print(story.text, markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("tokens", "about", "words"):
        table.add_column(heading, overflow="fold")
    for segment in story.segments:
        about = ", ".join(f"{concept} {value:.2f}" for concept, value in segment.concepts.items()) or "–"
        words = " ".join(series.words[segment.first_window].split())[:48]
        table.add_row(f"{segment.start}-{segment.end - 1}", about, words)
    console.print(table)


def _differences(first: WindowSeries, second: WindowSeries, top: int) -> Table:
    """Concepts of both whose means differ the most."""
    means = [
        {series.concepts[n]: float(_known_mean(series, n)) for n in series.leading(len(series.concepts))}
        for series in (first, second)
    ]
    shared = sorted(set(means[0]) & set(means[1]), key=lambda name: -abs(means[0][name] - means[1][name]))
    if not shared:
        raise ConfigError("the two timelines have no concept in common; were they read with the same pack?")
    table = Table("concept", "first", "second", "second − first", box=None, pad_edge=False)
    for name in shared[:top]:
        one, other = means[0][name], means[1][name]
        table.add_row(name, f"{one:.2f}", f"{other:.2f}", f"{other - one:+.2f}".replace("-", "−"))
    return table


def _known_mean(series: WindowSeries, n: int) -> float:
    known = series.values_WN[:, n]
    return known[known == known].mean()


def _write(
    folder: Path, told: list[tuple[str, WindowSeries, Narrative]], formats: list[str], config: NarrativeConfig
) -> list[Path]:
    """Pictures and numbers of every story into a folder."""
    written = []
    drawn = {name: pictures(series, story, top=config.top) for name, series, story in told}
    for place, (name, series, story) in enumerate(told):
        stem = Path(name).stem if len(told) == 1 else f"{place + 1}-{Path(name).stem}"
        for kind, make in (("png", png), ("svg", lambda figure: svg(figure).encode())):
            for caption, figure in drawn[name].items() if kind in formats else ():
                written.append(_bytes(folder / f"{stem}-{caption}.{kind}", make(figure)))
        if "json" in formats:
            record = {"story": story.record(), "windows": series.records(config.threshold)}
            written.append(_bytes(folder / f"{stem}-story.json", json.dumps(record, indent=1).encode()))
        if "parquet" in formats:
            written.append(_parquet(folder / f"{stem}-windows.parquet", series))
    if "html" in formats:
        title = " and ".join(name for name, _, _ in told)
        stories = [(name, story.text, drawn[name]) for name, _, story in told]
        written.append(write_page(folder / "story.html", title, stories))
    return written


def _bytes(path: Path, content: bytes) -> Path:
    with replace_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def _parquet(path: Path, series: WindowSeries) -> Path:
    """One row for each window and concept that was read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FTWError("Parquet needs pyarrow; install it with: pip install 'ftw-lenses[train]'") from error
    rows = [
        {"window_position": start, "window_end": end, "concept": series.concepts[n], series.by: float(values_N[n])}
        for start, end, values_N in zip(series.starts.tolist(), series.ends.tolist(), series.values_WN, strict=True)
        for n in range(len(series.concepts))
        if values_N[n] == values_N[n]
    ]
    with replace_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary, compression="zstd")
    return path


def _to_wandb(project: str, told: list[tuple[str, WindowSeries, Narrative]], config: NarrativeConfig) -> None:
    """Pictures and words of every story to Weights & Biases, offline unless its own settings say otherwise."""
    try:
        import wandb
    except ImportError as error:
        raise FTWError("wandb is not installed; install it with: pip install 'ftw-lenses[wandb]'") from error
    with wandb.init(project=project, mode="offline", job_type="timeline") as run:
        for name, series, story in told:
            media: dict[str, Any] = {
                f"{name}/{caption}": wandb.Image(_pixels(figure))
                for caption, figure in pictures(series, story, top=config.top).items()
            }
            run.log({**media, f"{name}/num_segments": len(story.segments)})
            run.summary[f"{name}/story"] = story.text


def _pixels(figure: Figure) -> np.ndarray:
    """The picture as numbers: wandb knows a figure by its class being matplotlib's own, and ours is a child of it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def main() -> None:
    """The verb, from the command line."""
    verb("timeline", timeline, TimelineJob)


if __name__ == "__main__":
    main()
