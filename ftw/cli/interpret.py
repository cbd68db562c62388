"""`ftw interpret`: what a text is about, or each token of an answer as it is generated."""

import json
import sys
from collections.abc import Iterator

from rich.console import Console

from ftw.cli._schema import InterpretJob
from ftw.cli._sources import Sources
from ftw.cli._verb import verb
from ftw.cli.monitor import generation_options
from ftw.errors import ConfigError
from ftw.hat.interpreter import Interpreter
from ftw.hat.interpreter_reader import Interpretation, InterpretedTokens, check_fingerprint, interpret_text
from ftw.hat.monitor import Monitor
from ftw.hat.timeline import TokenReading
from ftw.substrate.model import Substrate
from ftw.ui.interpreter import LiveInterpretation, concepts_table


def interpret(job: InterpretJob) -> None:
    """Print the concepts of a text, or those of each token of an answer; with json=true as JSON lines."""
    if (job.prompt is None) == (job.text is None):
        raise ConfigError('give a prompt to answer (prompt="...") or a text to read (text="..."), one of the two')
    if job.top_k < 1:
        raise ConfigError(f"top_k={job.top_k}: choose 1 concept or more")
    interpreter = Interpreter.load(job.interpreter)
    substrate = Sources().substrate(job.substrate)
    check_fingerprint(interpreter, substrate)
    interpreter.to(substrate.device)
    if job.text is not None:
        _tell_text(job, interpret_text(interpreter, substrate, job.text, top_k=job.top_k))
        return
    shown = None if job.json else LiveInterpretation(Console())
    for token, said in tokens(job, interpreter, substrate):
        if shown is None:
            _write({"position": token.position, "token": token.token, "token_id": token.token_id, **said.record()})
        else:
            shown.add(token.token, said.concepts, said.confidence)
    if shown is not None:
        shown.finish()


def tokens(
    job: InterpretJob, interpreter: Interpreter, substrate: Substrate
) -> Iterator[tuple[TokenReading, Interpretation]]:
    """Each token of an answer with what the tokens up to it are about, as it comes."""
    assert job.prompt is not None  # asked only with one
    reader = InterpretedTokens(interpreter, top_k=job.top_k)
    monitor = Monitor(substrate, reader, mode="timeline", top_k=1, window=job.window, stride=1)
    told = 0
    with monitor.stream(job.prompt, **generation_options(job.generation), seed=job.seed) as stream:
        for reading in stream:
            if reading.top and not reading.is_prompt:
                yield reading, reader.interpretations[told]
                told += 1


def _tell_text(job: InterpretJob, said: Interpretation) -> None:
    if job.json:
        _write({"text": job.text, **said.record()})
    else:
        Console().print(concepts_table(said.concepts, said.categories, said.confidence))


def _write(record: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def main() -> None:
    """The verb, from the command line."""
    verb("interpret", interpret, InterpretJob)


if __name__ == "__main__":
    main()
