"""`ftw monitor`: generate with the lenses live, or read a given text."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ftw.cat.divergence import dissonance
from ftw.cli._schema import GenerationConfig, MonitorJob
from ftw.cli._sources import Sources, lens_pack
from ftw.cli._verb import verb
from ftw.errors import ConfigError
from ftw.hat.lineage import Lineage
from ftw.hat.monitor import Monitor
from ftw.hat.timeline import Timeline, TokenReading
from ftw.map.pack import LensPack
from ftw.substrate.model import Substrate
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.terminal import LiveTokens
from ftw.ui.watch import alarm_table, gap_table
from ftw.ui.windows import LiveWindows

CANDIDATES = 64  # strongest concepts of a window that are held against the threshold


def monitor(job: MonitorJob) -> None:
    """Print each token as it comes, with its strongest concepts; with json=true one JSON object a line."""
    if (job.prompt is None) == (job.text is None):
        raise ConfigError('give a prompt to answer (prompt="...") or a text to read (text="..."), one of the two')
    pack = lens_pack(job.pack, levels=job.levels)
    substrate = Sources().substrate(job.substrate)
    pack.check(substrate)
    reader = reader_of(job, pack, substrate)
    if reader.mode == "timeline":
        tell_windows(job, reader)
        return
    colours = None if job.json else pack_colours(pack)
    if job.text is not None:
        timeline = read(reader, job.text, colours)
    else:
        assert job.prompt is not None  # one of the two is given
        timeline = answer(reader, job.prompt, job.generation, job.seed, colours)
    if reader.mode == "dual" and colours is not None:
        Console().print(gap_table(dissonance(timeline, reader.written(timeline))))
    if job.save is not None:
        timeline.save(Path(job.save))


def reader_of(job: MonitorJob, pack: LensPack, substrate: Substrate) -> Monitor:
    """The monitor that a job describes, in its mode.

    Raises:
        ConfigError: no such mode, or a pack without the lenses for it. ConceptError: an unknown concept to watch.
    """
    windows = job.mode == "timeline"
    return Monitor(
        substrate,
        pack.reader() if windows else None if job.mode == "text" else pack.bank().stored(job.precision),
        text=pack.text if job.mode in ("text", "dual") else None,
        mode=job.mode,
        # Whatever passes the threshold is told of a window, so all that are strong are needed.
        top_k=max(job.top_k, CANDIDATES) if windows else job.top_k,
        watch=job.watch,
        alarm=job.alarm,
        lineage=Lineage(pack.names, pack.levels, pack.concepts),
        text_window=job.text_window,
        window=job.window,
        stride=job.stride,
        meta={"pack": pack.pack_id, "pack_version": pack.version},
    )


def tell_windows(job: MonitorJob, reader: Monitor) -> None:
    """Print each window as it is read, with the concepts above the threshold; with json=true one object a line."""
    if not 0 < job.threshold < 1:
        raise ConfigError(f"threshold={job.threshold} is a probability; choose one between 0 and 1, say 0.5")
    shown = LiveWindows(window=job.window, threshold=job.threshold, as_json=job.json)
    if job.text is not None:
        timeline = reader.read(job.text, on_token=lambda _, reading: shown.add(reading))
    else:
        assert job.prompt is not None  # one of the two is given
        with reader.stream(job.prompt, **_options(job.generation), seed=job.seed) as stream:
            for reading in stream:
                shown.add(reading)
            timeline = stream.timeline
    if not job.json:
        Console().print(cost_note(timeline), style="dim", highlight=False)
    if job.save is not None:
        timeline.save(Path(job.save))


def _options(generation: GenerationConfig) -> dict[str, Any]:
    """What `Monitor.stream` takes, from the configuration."""
    sampling = {"temperature": generation.temperature, "top_p": generation.top_p} if generation.do_sample else {}
    return {
        "chat": generation.chat,
        "system": generation.system,
        "max_new_tokens": generation.max_new_tokens,
        "do_sample": generation.do_sample,
        **sampling,
        **generation.options,
    }


def read(reader: Monitor, text: str, colours: dict[str, Colour] | None) -> Timeline:
    """Show a given text with what was read in it, or write JSON lines where `colours` is None."""
    readings: list[TokenReading] = []
    timeline = reader.read(text, on_token=lambda _, reading: readings.append(reading))
    if colours is None:
        for reading in readings:
            print(json.dumps(reading.record(), ensure_ascii=False))
        return timeline
    with LiveTokens(colours=colours) as shown:
        for reading in readings:
            shown.add(reading)
        _finish(shown, timeline)
    return timeline


def cost_note(timeline: Timeline) -> str:
    """What reading cost of each token's time, for the footer; and what could not be read."""
    meta, parts = timeline.meta, list[str]()
    if meta.get("mode") != "text":
        parts.append(f"{meta['lens_ms_per_token']:.2f} ms of it for {len(timeline.concepts):,} lenses")
    if "text_ms_per_token" in meta:
        parts.append(f"{meta['text_ms_per_token']:.2f} ms of it for text lenses")
    if missing := meta.get("num_missing", 0) + meta.get("num_text_missing", 0):
        parts.append(f"{missing} readings missing ({meta.get('last_lens_error', 'states that are not finite')})")
    return " · ".join(parts)


def answer(
    reader: Monitor,
    prompt: str,
    generation: GenerationConfig,
    seed: int,
    colours: dict[str, Colour] | None,
    console: Console | None = None,
) -> Timeline:
    """Stream one answer to the terminal, or as JSON lines where `colours` is None."""
    with reader.stream(prompt, seed=seed, **_options(generation)) as stream:
        if colours is None:
            for reading in stream:
                sys.stdout.write(json.dumps(reading.record(), ensure_ascii=False) + "\n")
                sys.stdout.flush()
            return stream.timeline
        with LiveTokens(colours=colours, console=console) as shown:
            for reading in stream:
                shown.add(reading)
            timeline = stream.timeline
            _finish(shown, timeline)
    return timeline


def _finish(shown: LiveTokens, timeline: Timeline) -> None:
    """Legend, leading concepts, cost, and the alarms if there were any."""
    shown.finish(timeline, note=cost_note(timeline))
    if (alarms := alarm_table(shown.readings)) is not None:
        shown.console.print(alarms)


def pack_colours(pack: LensPack) -> dict[str, Colour]:
    """A colour for each concept of a pack, by its place in the hierarchy."""
    concepts = pack.concepts
    return concept_colours(pack.names, None if concepts is None else {name: concepts.path(name) for name in pack.names})


def main() -> None:
    """The verb, from the command line."""
    verb("monitor", monitor, MonitorJob)


if __name__ == "__main__":
    main()
