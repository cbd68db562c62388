"""`ftw monitor`: generate with the lenses live, or read a given text."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ftw.cat.divergence import dissonance
from ftw.cli._schema import GenerationConfig, MonitorJob
from ftw.cli._sources import Sources, lens_pack, pack_index
from ftw.cli._verb import verb
from ftw.errors import ConfigError
from ftw.hat.deployment import Admission, fingerprint
from ftw.hat.lineage import Lineage
from ftw.hat.monitor import MODES, Monitor
from ftw.hat.text_embedding import EmbeddingBank
from ftw.hat.timeline import Timeline, TokenReading
from ftw.map.dynamic import DynamicLensManager
from ftw.map.live import ResidentConfig
from ftw.map.pack import LensPack
from ftw.map.pack_index import PackIndex
from ftw.substrate.encoder import SentenceEncoder
from ftw.substrate.model import Substrate
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.terminal import LiveTokens
from ftw.ui.watch import alarm_table, gap_table
from ftw.ui.windows import LiveWindows

CANDIDATES = 64  # strongest concepts of a window that are held against the threshold

# What is told of a shelf: its counts, by the names that `DynamicLensManager.statistics` has for them.
SHELF_COUNTS = {"hits": "hits", "misses": "misses", "loads": "cold_loads", "stalls": "stalls", "failed": "failed"}


@dataclass(kw_only=True)
class Live:
    """What reads, with what a reader must be told beside its readings.

    Attributes:
        paths: concept -> root … concept. aperture: what decides which lenses are read; None: all of them.
    """

    reader: Monitor
    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    aperture: DynamicLensManager | None = None

    def counts(self) -> dict[str, int]:
        """How many lenses are read now, what the shelf did so far, and how many readings are missing."""
        if self.aperture is None:
            return {}
        statistics = self.aperture.statistics
        holder = statistics["holder"]
        shelf = {name: holder[key] for name, key in SHELF_COUNTS.items() if key in holder}
        return {"read": statistics["loaded_lenses"], **shelf, "missing": statistics["missing_lenses"]}

    def line(self, reading: TokenReading) -> str:
        """One token as JSON: its reading, with the path of each concept and the counts of the lenses."""
        record = reading.record()
        for part in ("top", "watch", "text", "dissonance", "alarms"):
            for row in record.get(part, ()):
                row["path"] = list(self.paths.get(row["concept"], [row["concept"]]))
        return json.dumps(record | ({"lenses": self.counts()} if self.aperture else {}), ensure_ascii=False)

    def cost(self, timeline: Timeline) -> str:
        """What reading cost of each token's time, for the footer; and what could not be read."""
        meta, parts = timeline.meta, list[str]()
        if meta.get("mode") != "text":
            parts.append(f"{meta['lens_ms_per_token']:.2f} ms of it for {len(timeline.concepts):,} lenses")
        if "text_ms_per_token" in meta:
            parts.append(f"{meta['text_ms_per_token']:.2f} ms of it for text lenses")
        if counts := self.counts():
            parts.append(f"{counts['read']:,} read at the end")
            parts += [f"{counts[name]:,} {name}" for name in SHELF_COUNTS if name in counts]
        lost = meta.get("num_missing", 0) + meta.get("num_text_missing", 0)
        if lost := lost + counts.get("missing", 0):
            error = "" if self.aperture is None else self.aperture.statistics["last_error"]
            why = error or meta.get("last_lens_error", "lenses or states that cannot be read")
            parts.append(f"{lost:,} readings missing ({why})")
        return " · ".join(parts)


def monitor(job: MonitorJob) -> None:
    """Print each token as it comes, with its strongest concepts; with json=true one JSON object a line."""
    if (job.prompt is None) == (job.text is None):
        raise ConfigError('give a prompt to answer (prompt="...") or a text to read (text="..."), one of the two')
    if job.text is not None and not job.text.strip():
        raise ConfigError(f'text={job.text!r} has no words to read; give some, for example text="The whale swims."')
    if job.generation.max_new_tokens < 1:
        raise ConfigError(f"generation.max_new_tokens={job.generation.max_new_tokens}: an answer has 1 token or more")
    if job.mode == "timeline":
        tell_windows(job)
        return
    pack = pack_index(job.pack, levels=job.levels)
    substrate = Sources().substrate(job.substrate)
    pack.check(substrate)
    with opened(job, pack, substrate) as live:
        colours = None if job.json else concept_colours(pack.names, live.paths)
        if colours is not None and live.aperture is not None and live.aperture.admission is not None:
            Console().print(Text(_admitted(live.aperture.admission), style="dim"))
        if job.text is not None:
            timeline = read(live, job.text, colours)
        else:
            assert job.prompt is not None  # one of the two is given
            timeline = answer(live, job.prompt, job.generation, job.seed, colours)
        if live.aperture is not None:
            timeline.meta["lenses"] = live.counts()
        if live.reader.mode == "dual" and colours is not None:
            Console().print(gap_table(dissonance(timeline, live.reader.written(timeline))))
        if job.save is not None:
            timeline.save(Path(job.save))


@contextmanager
def opened(job: MonitorJob, pack: PackIndex, substrate: Substrate) -> Iterator[Live]:
    """The monitor that a job describes, in its mode; its shelf is let go at the end.

    Raises:
        ConfigError: no such mode, a pack without the lenses for it, budgets too small, a manifest that cannot be.
        ConceptError: an unknown concept to watch.
    """
    if job.mode not in MODES:
        raise ConfigError(f"mode={job.mode!r}: choose {', '.join(MODES)}")
    aperture = _aperture(job, pack)
    try:
        yield Live(reader=_reader(job, pack, substrate, aperture), paths=concept_paths(pack), aperture=aperture)
    finally:
        if aperture is not None:
            aperture.close()


def _aperture(job: MonitorJob, pack: PackIndex) -> DynamicLensManager | None:
    """What decides which activation lenses are read; None: all are."""
    config = job.hat.aperture
    if job.mode != "text":
        return config.open(pack, manifest=job.manifest, watch=job.watch)
    if job.manifest is not None or not isinstance(config, ResidentConfig):
        raise ConfigError("mode=text reads no activation lenses; leave out manifest and hat/aperture, or use mode=dual")
    return None


def _reader(job: MonitorJob, pack: PackIndex, substrate: Substrate, aperture: DynamicLensManager | None) -> Monitor:
    bank = None
    if job.mode != "text":
        bank = pack.bank().stored(job.hat.aperture.precision) if aperture is None else aperture.bank
    text = pack.text if job.mode in ("text", "dual") else None
    if job.text_encoder is not None and isinstance(text, EmbeddingBank):
        text = text.using(SentenceEncoder.load(job.text_encoder))
    meta = {"pack": pack.pack_id, "pack_version": pack.version}
    if aperture is not None and aperture.manifest is not None and aperture.admission is not None:
        admitted = aperture.admission.admitted
        # A concept that a deployment does not admit is not read from its words either.
        text = None if text is None else text.subset([name for name in text.names if name in admitted])
        meta |= {"manifest": aperture.manifest.manifest_id, "admitted": fingerprint(admitted, pack.levels)}
    return Monitor(
        substrate,
        bank,
        text=text,
        mode=job.mode,
        top_k=job.top_k,
        watch=job.watch,
        alarm=job.alarm,
        lineage=Lineage(pack.names, pack.levels, pack.concepts),
        text_window=job.text_window,
        meta=meta,
    )


def tell_windows(job: MonitorJob) -> None:
    """Print each window as it is read, with the concepts above the threshold; with json=true one object a line."""
    if not 0 < job.threshold < 1:
        raise ConfigError(f"threshold={job.threshold} is a probability; choose one between 0 and 1, say 0.5")
    if job.manifest is not None or not isinstance(job.hat.aperture, ResidentConfig):
        raise ConfigError("mode=timeline reads windows with all lenses; leave out manifest and hat/aperture")
    pack = lens_pack(job.pack, levels=job.levels)
    substrate = Sources().substrate(job.substrate)
    pack.check(substrate)
    reader = Monitor(
        substrate,
        pack.reader(precision=job.hat.aperture.precision, device=substrate.device),
        mode="timeline",
        # Whatever passes the threshold is told of a window, so all that are strong are needed.
        top_k=max(job.top_k, CANDIDATES),
        watch=job.watch,
        alarm=job.alarm,
        lineage=Lineage(pack.names, pack.levels, pack.concepts),
        window=job.window,
        stride=job.stride,
        meta={"pack": pack.pack_id, "pack_version": pack.version},
    )
    shown = LiveWindows(window=job.window, threshold=job.threshold, as_json=job.json)
    if job.text is not None:
        timeline = reader.read(job.text, on_token=lambda _, reading: shown.add(reading))
    else:
        assert job.prompt is not None  # one of the two is given
        with reader.stream(job.prompt, **generation_options(job.generation), seed=job.seed) as stream:
            for reading in stream:
                shown.add(reading)
            timeline = stream.timeline
    if not job.json:
        Console().print(Live(reader=reader).cost(timeline), style="dim", highlight=False)
    if job.save is not None:
        timeline.save(Path(job.save))


def generation_options(generation: GenerationConfig) -> dict[str, Any]:
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


def read(live: Live, text: str, colours: dict[str, Colour] | None) -> Timeline:
    """Show a given text with what was read in it, or write JSON lines where `colours` is None."""
    if colours is None:
        return live.reader.read(text, on_token=lambda _, reading: _write(live.line(reading)))
    readings: list[TokenReading] = []
    timeline = live.reader.read(text, on_token=lambda _, reading: readings.append(reading))
    with LiveTokens(colours=colours, paths=live.paths) as shown:
        for reading in readings:
            shown.add(reading)
        _finish(shown, timeline, live)
    return timeline


def answer(
    live: Live,
    prompt: str,
    generation: GenerationConfig,
    seed: int,
    colours: dict[str, Colour] | None,
    console: Console | None = None,
) -> Timeline:
    """Stream one answer to the terminal, or as JSON lines where `colours` is None."""
    options = {**generation_options(generation), "seed": seed}
    if colours is None:
        # Written while the lenses rest, so that the counts in a line are those of its token.
        timeline = live.reader.generate(prompt, on_token=lambda _, reading: _write(live.line(reading)), **options)
        assert isinstance(timeline, Timeline)  # one prompt
        return timeline
    with (
        live.reader.stream(prompt, **options) as stream,
        LiveTokens(colours=colours, paths=live.paths, console=console) as shown,
    ):
        for reading in stream:
            shown.add(reading)
        _finish(shown, stream.timeline, live)
        return stream.timeline


def _admitted(admission: Admission) -> str:
    """What a deployment admits, and which of its names mean nothing here."""
    unknown = admission.unknown
    more = f"; {len(unknown)} of its names have no lens here: {', '.join(unknown[:5])}" if unknown else ""
    return f"the manifest admits {len(admission.admitted):,} of {len(admission.reasons):,} concepts{more}"


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _finish(shown: LiveTokens, timeline: Timeline, live: Live) -> None:
    """Legend, leading concepts, cost, and the alarms if there were any."""
    shown.finish(timeline, note=live.cost(timeline))
    if (alarms := alarm_table(shown.readings)) is not None:
        shown.console.print(alarms)


def concept_paths(pack: LensPack | PackIndex) -> dict[str, list[str]]:
    """Each concept's line from the root; none where the pack has no hierarchy."""
    concepts = pack.concepts
    return {} if concepts is None else {name: concepts.path(name) for name in pack.names}


def main() -> None:
    """The verb, from the command line."""
    verb("monitor", monitor, MonitorJob)


if __name__ == "__main__":
    main()
