"""`ftw monitor`: generate with the lenses live, or read a given text."""

import json
import sys
from pathlib import Path

from rich.console import Console

from ftw.cli._schema import GenerationConfig, MonitorJob
from ftw.cli._sources import Sources, lens_pack
from ftw.cli._verb import verb
from ftw.errors import ConfigError
from ftw.hat.monitor import Monitor
from ftw.hat.timeline import Timeline
from ftw.map.pack import LensPack
from ftw.ui.colours import Colour, concept_colours
from ftw.ui.terminal import LiveTokens


def monitor(job: MonitorJob) -> None:
    """Print each token as it comes, with its strongest concepts; with json=true one JSON object a line."""
    if (job.prompt is None) == (job.text is None):
        raise ConfigError('give a prompt to answer (prompt="...") or a text to read (text="..."), one of the two')
    pack = lens_pack(job.pack, levels=job.levels)
    substrate = Sources().substrate(job.substrate)
    pack.check(substrate)
    meta = {"pack": pack.pack_id, "pack_version": pack.version}
    reader = Monitor(substrate, pack.bank(), top_k=job.top_k, watch=job.watch, meta=meta)
    if job.text is not None:
        timeline = reader.read(job.text)
        if job.json:
            for reading in timeline.readings(job.top_k, watch=job.watch):
                print(json.dumps(reading.record(), ensure_ascii=False))
        else:
            with LiveTokens(colours=pack_colours(pack)) as shown:
                for reading in timeline.readings(job.top_k):
                    shown.add(reading)
                shown.finish(timeline)
    else:
        assert job.prompt is not None  # one of the two is given
        timeline = answer(reader, job.prompt, job.generation, job.seed, None if job.json else pack_colours(pack))
    if job.save is not None:
        timeline.save(Path(job.save))


def answer(
    reader: Monitor,
    prompt: str,
    generation: GenerationConfig,
    seed: int,
    colours: dict[str, Colour] | None,
    console: Console | None = None,
) -> Timeline:
    """Stream one answer to the terminal, or as JSON lines where `colours` is None."""
    options = {
        "max_new_tokens": generation.max_new_tokens,
        "do_sample": generation.do_sample,
        **({"temperature": generation.temperature, "top_p": generation.top_p} if generation.do_sample else {}),
        **generation.options,
    }
    with reader.stream(prompt, chat=generation.chat, system=generation.system, seed=seed, **options) as stream:
        if colours is None:
            for reading in stream:
                sys.stdout.write(json.dumps(reading.record(), ensure_ascii=False) + "\n")
                sys.stdout.flush()
            return stream.timeline
        with LiveTokens(colours=colours, console=console) as shown:
            for reading in stream:
                shown.add(reading)
            timeline = stream.timeline
            shown.finish(
                timeline,
                note=f"{timeline.meta['lens_ms_per_token']:.2f} ms of it for {len(timeline.concepts):,} lenses",
            )
    return timeline


def pack_colours(pack: LensPack) -> dict[str, Colour]:
    """A colour for each concept of a pack, by its place in the hierarchy."""
    concepts = pack.concepts
    return concept_colours(pack.names, None if concepts is None else {name: concepts.path(name) for name in pack.names})


def main() -> None:
    """The verb, from the command line."""
    verb("monitor", monitor, MonitorJob)


if __name__ == "__main__":
    main()
