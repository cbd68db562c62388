"""`ftw encyclopedia`: cover many concepts at once, then refine those that readers doubt."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftw import paths
from ftw.cli import _run
from ftw.cli._arguments import near
from ftw.cli._schema_encyclopedia import EncyclopediaJob
from ftw.cli._sources import Sources
from ftw.cli._verb import verb
from ftw.errors import ConfigError
from ftw.map.collect import collect
from ftw.map.estimate import readable_bytes
from ftw.map.growing.choose import choose
from ftw.map.growing.convergence import AT, Point, between, contexts_needed, crossed_table, measure, nouns
from ftw.map.growing.dense import export_pooled, import_pooled, read_pooled
from ftw.map.growing.entries import Entry, entries_of
from ftw.map.growing.grow import grow
from ftw.map.growing.judge import judge, judge_of
from ftw.map.growing.plan import STAGES
from ftw.map.growing.rounds import add_judging, add_tests, bootstrap, refine
from ftw.map.growing.status import next_costs, status
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.wordnet import WordNet
from ftw.substrate.model import Substrate
from ftw.ui.convergence import convergence_curves
from ftw.ui.steps import steps


def encyclopedia(job: EncyclopediaJob) -> None:
    """Do one action on a growing encyclopedia."""
    if job.action not in ACTIONS:
        raise ConfigError(f"action={job.action!r} is none of {', '.join(ACTIONS)}{near(job.action, ACTIONS)}")
    ACTIONS[job.action](job, Console(), Sources())


def folder_of(job: EncyclopediaJob) -> Path:
    """Where the encyclopedia is: a folder that was named, else one under `$FTW_HOME`."""
    if "/" in job.name:
        return Path(job.name).expanduser()
    return paths.home() / "growing" / job.name


def run_bootstrap(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Stage 0 of all concepts."""
    run_steps = steps(console=console)
    with run_steps.step("Read the concepts") as step:
        entries = _entries(job, sources)
        step.note(f"{len(entries):,} concepts")
    with run_steps.step("Load the substrate") as step:
        substrate = sources.substrate(job.substrate)
        step.note(substrate.name)
    with (
        run_steps.step("Read every bare term") as step,
        bootstrap(folder_of(job), substrate, entries, job.capture) as growing,
    ):
        step.note(f"layers {list(growing.layers)}")
        _tell(growing, job, console)


def run_refine(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Further contexts for chosen concepts."""
    with GrowingEncyclopedia.open(folder_of(job)) as growing:
        chosen = choose(growing, job.choose, job.seed)
        stages = (
            [job.stage] if job.stage is not None else sorted({min(int(growing.stage[one]) + 1, 3) for one in chosen})
        )
        by_stage = {
            stage: [one for one in chosen if job.stage is not None or min(int(growing.stage[one]) + 1, 3) == stage]
            for stage in stages
        }
        if job.dry_run:
            for stage, concepts in by_stage.items():
                console.print(f"would refine {len(concepts):,} concepts at stage {stage} ({STAGES.get(stage, '?')})")
            return
        substrate = _substrate(job, sources, growing)
        run_steps = steps(console=console)
        for stage, concepts in by_stage.items():
            with run_steps.step(f"Refine {len(concepts):,} concepts at stage {stage} ({STAGES.get(stage, '?')})"):
                options = {"contexts": job.contexts, "seed": job.seed, "writing": job.writing}
                refine(growing, substrate, concepts, stage, **options)
        _tell(growing, job, console)


def run_test(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Texts to test readers on."""
    with GrowingEncyclopedia.open(folder_of(job)) as growing:
        substrate = _substrate(job, sources, growing)
        add_tests(growing, substrate, contexts=job.test_contexts, seed=job.seed)
        rows = growing.rows(split="test")
        console.print(f"{len(rows):,} test texts, {int(rows.named.sum()):,} of them name their concept")


def run_judge(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """How certain a reader is of each concept."""
    with GrowingEncyclopedia.open(folder_of(job)) as growing:
        run_steps = steps(console=console)
        if not len(growing.rows(split="background")):
            with run_steps.step("Read a sentence of each concept"):
                add_judging(growing, _substrate(job, sources, growing), seed=job.seed)
        with run_steps.step(f"Judge {len(growing):,} concepts ({job.confidence})"):
            judge(growing, judge_of(job.confidence, job.interpreter, job.readers), job.seed)
        _tell(growing, job, console)


def run_grow(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Bootstrap if there is nothing yet, then judge and refine until it is enough."""
    substrate = sources.substrate(job.substrate)
    with bootstrap(folder_of(job), substrate, _entries(job, sources), job.capture) as growing:
        by = judge_of(job.confidence, job.interpreter, job.readers)
        grow(growing, substrate, by, job.grow, seed=job.seed, writing=job.writing, tell=console.print)
        _tell(growing, job, console)


def run_status(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Concepts by stage and confidence, size, and what the next stages would cost."""
    with GrowingEncyclopedia.open(folder_of(job)) as growing:
        found = status(growing)
        if job.json:
            print(json.dumps({**asdict(found), "bytes_a_concept": found.bytes_a_concept}, indent=1, default=str))
            return
        _tell(growing, job, console)


def run_convergence(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """How many contexts until a concept's mean settles, for concrete and abstract nouns."""
    job.convergence.check()
    wordnet = WordNet.open(sources.fetch("wordnet-3.0").folder)
    chosen = nouns(wordnet, job.convergence.num)
    table, kinds = crossed_table([entry for entry, _ in chosen]), [kind for _, kind in chosen]
    substrate, run_steps = sources.substrate(job.substrate), steps(console=console)
    with run_steps.step(f"Read {len(table):,} texts"):
        encyclopedia = collect(substrate, table, job.capture, moments=False)
    points, apart, needed = list[Point](), list[dict[str, Any]](), dict[str, dict[str, float]]()
    with encyclopedia, run_steps.step("Halve the templates and compare") as step:
        for layer in encyclopedia.spec.layers:
            step.advance(total=len(encyclopedia.spec.layers))
            states_SD = encyclopedia.pooled(layer, "mean").astype(np.float32)
            states_NTD = states_SD.reshape(len(chosen), -1, states_SD.shape[-1])
            points += measure(states_NTD, kinds, layer, job.convergence, job.seed)
            apart += between(states_NTD, kinds, layer, job.convergence, job.seed)
            each = contexts_needed(states_NTD)
            needed[str(layer)] = {kind: float(np.median(each[np.array(kinds) == kind])) for kind in set(kinds)}
    console.print(_convergence_table(points, needed))
    for row in apart:
        told = ", ".join(f"{name} {row[name][0]:.3f}" for name in ("distance", "corrected", "own"))
        console.print(f"two sets of sentences, layer {row['layer']}, {row['kind']}: {told}", highlight=False)
    if job.out:
        folder = Path(job.out).expanduser()
        record = {"points": [point.record() for point in points], "two_sets": apart, "median_contexts_needed": needed}
        _run.write_json(folder / "convergence.json", record)
        lines = "".join(f"{entry.synset}\t{entry.phrase}\t{kind}\n" for entry, kind in chosen)
        (folder / "nouns.tsv").write_text(lines, encoding="utf-8")
        layers = encyclopedia.spec.layers
        figure = convergence_curves(points, layers[len(layers) // 2])
        figure.savefig(folder / "curves.png", dpi=130)
        console.print(f"written: {folder}", highlight=False)


def _convergence_table(points: list[Point], needed: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "nouns", "n", "distance", "corrected", "cosine", "reliability", "under 5 %", "n for 5 %"):
        table.add_column(column, justify="left" if column == "nouns" else "right")
    last = max(point.n for point in points)
    for point in points:
        if point.n in (1, 5, AT, last):
            figures = [point.distance, point.corrected, point.cosine, point.reliability, point.passing]
            cells = [f"{value:.3f} ({low:.3f}–{high:.3f})" for value, low, high in figures]
            wanted = f"{needed[str(point.layer)][point.kind]:,.0f}" if point.n == last else ""
            table.add_row(str(point.layer), point.kind, str(point.n), *cells, wanted)
    return table


def run_export(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """Mean and variance of every concept as one dense file."""
    if not job.out:
        raise ConfigError("out needs a value; write ftw encyclopedia export NAME out=FILE.h5")
    with GrowingEncyclopedia.open(folder_of(job)) as growing:
        path = export_pooled(growing, Path(job.out).expanduser())
    console.print(f"written: {path} ({readable_bytes(path.stat().st_size)})", highlight=False)


def run_import(job: EncyclopediaJob, console: Console, sources: Sources) -> None:
    """A new encyclopedia from a dense file."""
    if not job.path:
        raise ConfigError("path needs a value; write ftw encyclopedia import NAME path=FILE.h5")
    substrate = sources.substrate(job.substrate)
    dense = read_pooled(Path(job.path).expanduser(), num_layers=substrate.num_layers)
    with import_pooled(folder_of(job), dense, fingerprint=substrate.fingerprint) as growing:
        _tell(growing, job, console)


ACTIONS = {
    "bootstrap": run_bootstrap,
    "refine": run_refine,
    "test": run_test,
    "judge": run_judge,
    "grow": run_grow,
    "status": run_status,
    "convergence": run_convergence,
    "export": run_export,
    "import": run_import,
}


def _entries(job: EncyclopediaJob, sources: Sources) -> list[Entry]:
    """The concepts of a job in words."""
    pack = sources.concepts(job.concepts)
    has_synsets = any(concept.synsets for concept in pack.concepts.values())
    return entries_of(pack, WordNet.open(sources.fetch("wordnet-3.0").folder) if has_synsets else None)


def _substrate(job: EncyclopediaJob, sources: Sources, growing: GrowingEncyclopedia) -> Substrate:
    substrate = sources.substrate(job.substrate)
    growing.check_substrate(substrate)
    return substrate


def _tell(growing: GrowingEncyclopedia, job: EncyclopediaJob, console: Console) -> None:
    """A table of the stages, and what the next ones would cost."""
    found = status(growing)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "concepts", "samples", "confidence", "variance"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in found.stages:
        figures = [f"{value:.3f}" if value == value else "–" for value in (row.confidence, row.variance)]
        word = STAGES.get(row.stage, "no sample")
        table.add_row(str(row.stage), word, f"{row.num_concepts:,}", f"{row.num_samples:,}", *figures)
    console.print(table)
    size = f"{readable_bytes(found.bytes)}, {readable_bytes(found.bytes_a_concept)} a concept"
    console.print(
        escape(f"{found.num_rounds} rounds, {found.num_tests:,} test texts; {size}: {growing.folder}"), highlight=False
    )
    if found.judged:
        spread = ", ".join(f"{num:,}" for num in found.confidence_counts)
        console.print(f"judged by {_judges(found.judged)}; concepts by confidence in fifths: {spread}", highlight=False)
    if found.pending:
        console.print("a round is not finished; the next command that refines finishes it first")
    for cost in next_costs(growing, contexts=job.contexts, new_tokens=job.writing.max_new_tokens):
        console.print(f"next: {cost.words()}", highlight=False)


def _judges(judged: dict[str, Any]) -> str:
    readers = judged.get("readers", 1)
    return f"{readers} {judged.get('by')}s" if readers > 1 else str(judged.get("by"))


def main() -> None:
    """The verb, from the command line."""
    verb("encyclopedia", encyclopedia, EncyclopediaJob)


if __name__ == "__main__":
    main()
