"""Rounds, from plan to moments: bootstrap, refinement, tests. Everything resumes where it was stopped.

A round's plan is on disk before any work; its texts follow from the plan, its states from its texts. So a killed round
is finished by running it again, and leaves the same bytes as one that ran through.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftw.errors import ConfigError, DataError, EncyclopediaError
from ftw.map.collect import CollectConfig, collect
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.estimate import nominal_rate
from ftw.map.growing.contexts import Context, table_of
from ftw.map.growing.entries import Entry, check_entries
from ftw.map.growing.plan import STAGES, Plan
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.growing.writing import WritingConfig, write_contexts
from ftw.map.index import INDEX
from ftw.map.samples import SampleTable
from ftw.substrate.model import Substrate

MOST_SHOWN = 5


def bootstrap(
    folder: Path | str, substrate: Substrate, entries: Sequence[Entry], capture: CollectConfig, *, progress: bool = True
) -> GrowingEncyclopedia:
    """Stage 0: the state of every concept's bare term, in one pass.

    Raises:
        ConceptError: a name twice, or no concepts. DataError: a term without tokens (names all of them).
        EncyclopediaError: the folder holds another encyclopedia. DiskFullError: no room; what is finished stays.
    """
    check_entries(entries)
    check_terms(substrate, entries)
    if "mean" not in capture.pools:
        raise ConfigError(f"pools={capture.pools}: a growing encyclopedia needs the pool mean for its moments")
    spec = capture.spec(substrate)
    growing = GrowingEncyclopedia.create(folder, entries, spec, tokens_per_second=nominal_rate(substrate, spec))
    finish_pending(growing, substrate, progress=progress)
    if growing.num_rounds == 0:
        run(growing, substrate, Plan(stage=0), progress=progress)
    return growing


def check_terms(substrate: Substrate, entries: Sequence[Entry]) -> None:
    """Raise DataError for terms that the tokenizer has no tokens for, or only its unknown token."""
    unknown = substrate.tokenizer.unk_token_id
    covered: Sequence[Sequence[int]] = substrate.tokenizer(
        [entry.term for entry in entries], add_special_tokens=False, verbose=False
    )["input_ids"]
    bare = [entry.name for entry, ids in zip(entries, covered, strict=True) if all(token == unknown for token in ids)]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(entries):,} concepts have no tokens in {substrate.name!r}: "
            f"{', '.join(map(repr, bare[:MOST_SHOWN]))}{', ...' if len(bare) > MOST_SHOWN else ''}; leave them out"
        )


def refine(
    growing: GrowingEncyclopedia,
    substrate: Substrate,
    concepts: Sequence[int],
    stage: int,
    *,
    contexts: int = 5,
    seed: int = 0,
    writing: WritingConfig | None = None,
    progress: bool = True,
) -> int:
    """Give some concepts further contexts of a stage; returns the number of the round.

    A round that was begun earlier and not finished is finished first; if it is this very one, that is all.

    Raises:
        ConfigError: a stage that there is not, or no contexts.
        EncyclopediaError: a concept has not had the stage before this one. DataError: no concepts, or no texts.
    """
    begun = growing.num_rounds if growing.pending is not None else None
    plan = _refinement(growing, concepts, stage, contexts, seed, writing or WritingConfig())
    same = begun is not None and growing.pending == plan
    finish_pending(growing, substrate, progress=progress)
    if same:
        assert begun is not None  # the pending plan was compared with
        return begun
    check_order(growing, concepts, stage)
    return run(growing, substrate, plan, progress=progress)


def _refinement(
    growing: GrowingEncyclopedia, concepts: Sequence[int], stage: int, contexts: int, seed: int, writing: WritingConfig
) -> Plan:
    """The plan of a refinement."""
    if stage not in STAGES or stage == 0:
        raise ConfigError(
            f"stage={stage}: refine has 1 (templates), 2 (written), 3 (opposed); 0 is ftw encyclopedia bootstrap"
        )
    if contexts < 1:
        raise ConfigError(f"contexts={contexts}: a refinement needs at least 1 text a concept")
    if not len(concepts):
        raise DataError("no concepts to refine; choose some with concepts=uncertain share=0.2, or by name")
    chosen = sorted({int(index) for index in concepts})
    options, against = {}, None
    if stage == 3:
        confused = growing.confused_with
        against = [confused[index] for index in chosen]
        if not any(against):
            raise EncyclopediaError(
                "stage 3 contrasts a concept with those it is confused with, and nobody has judged that yet: "
                "run ftw encyclopedia judge first"
            )
    if stage > 1:
        options = writing.record()
    return Plan(stage=stage, concepts=chosen, contexts=contexts, seed=seed, against=against, options=options)


def check_order(growing: GrowingEncyclopedia, concepts: Sequence[int], stage: int) -> None:
    """Raise EncyclopediaError if one of the concepts has not had the stage before `stage`."""
    have = growing.stage[np.asarray(concepts, dtype=np.int64)]
    early = [growing.concepts[index] for index, at in zip(concepts, have, strict=True) if at < stage - 1]
    if early:
        lowest = int(have.min()) + 1
        raise EncyclopediaError(
            f"{len(early)} of {len(have)} concepts have not had stage {stage - 1} "
            f"({', '.join(map(repr, early[:MOST_SHOWN]))}{', ...' if len(early) > MOST_SHOWN else ''}); "
            f"refine them first with: ftw encyclopedia refine stage={lowest}"
        )


def add_tests(
    growing: GrowingEncyclopedia, substrate: Substrate, *, contexts: int = 3, seed: int = 0, progress: bool = True
) -> int:
    """States of texts to test readers on; they are never learnt from. Returns the number of the round.

    Named: templates and dictionary examples unseen in training. Unnamed: definitions without the concept's words.
    """
    return _add_unseen(growing, substrate, Plan(stage=0, split="test", contexts=contexts, seed=seed), progress=progress)


def add_judging(growing: GrowingEncyclopedia, substrate: Substrate, *, seed: int = 0, progress: bool = True) -> int:
    """A sentence of each concept that nothing learns from, on which all are judged alike. Returns its round."""
    return _add_unseen(growing, substrate, Plan(stage=0, split="background", seed=seed), progress=progress)


def _add_unseen(growing: GrowingEncyclopedia, substrate: Substrate, plan: Plan, *, progress: bool) -> int:
    """A round of texts that count nowhere, if there is none of this plan yet."""
    finish_pending(growing, substrate, progress=progress)
    for number in range(growing.num_rounds):
        if growing.plan(number) == plan:
            return number
    return run(growing, substrate, plan, progress=progress)


def finish_pending(growing: GrowingEncyclopedia, substrate: Substrate, *, progress: bool = True) -> None:
    """Finish a round that was begun and not closed, if there is one.

    Raises:
        EncyclopediaError: the states are of another substrate.
    """
    growing.check_substrate(substrate)
    if growing.pending is not None:
        _complete(growing, substrate, growing.num_rounds, progress=progress)


def run(growing: GrowingEncyclopedia, substrate: Substrate, plan: Plan, *, progress: bool = True) -> int:
    """Begin a round and bring it to its end; returns its number."""
    growing.check_substrate(substrate)
    number = growing.begin(plan)
    _complete(growing, substrate, number, progress=progress)
    return number


def _complete(growing: GrowingEncyclopedia, substrate: Substrate, number: int, *, progress: bool) -> None:
    plan, folder = growing.plan(number), growing.round_folder(number)
    try:
        table = _table(growing, substrate, plan, folder, progress=progress)
    except DataError:
        growing.discard(number)
        raise
    collect(substrate, table, capture_of(growing), progress=progress, folder=folder, moments=False).close()
    growing.finish(number)


def _table(
    growing: GrowingEncyclopedia, substrate: Substrate, plan: Plan, folder: Path, *, progress: bool
) -> SampleTable:
    """The texts of a round: those in its index if it has one, else made from the plan."""
    if (folder / INDEX).exists():
        with Encyclopedia.open(folder) as begun:
            return begun.table
    written: list[Context] = []
    if plan.stage > 1:
        written = write_contexts(growing, substrate, plan, folder / "written", progress=progress)
    return table_of(growing, plan, written)


def capture_of(growing: GrowingEncyclopedia) -> CollectConfig:
    """How the states of a growing encyclopedia are computed, as a configuration."""
    spec = growing.spec
    return CollectConfig(
        layers=[float(layer) for layer in spec.layers],
        pools=list(spec.pools),
        tokens_per_text=dict(spec.tokens_per_text),
        max_tokens=spec.max_tokens,
        batch_tokens=spec.batch_tokens,
        precision=spec.precision,
        shard_texts=spec.shard_texts,
    )
