"""From a job to its samples: the substrate, the concepts, the table, and where everything came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ftw.cli._sources import Sources
from ftw.errors import ConfigError
from ftw.map.collect import CollectConfig
from ftw.map.compose import ComposeConfig, compose
from ftw.map.concept import ConceptPack
from ftw.map.descriptions import DescriptionsConfig
from ftw.map.descriptions import describe as describe_concepts
from ftw.map.labelled import LabelledConfig, read
from ftw.map.samples import SPLITS, SampleTable
from ftw.map.sequences import SequencesConfig, compose_sequences
from ftw.map.wordnet import WordNet
from ftw.substrate.model import Substrate
from ftw.ui.steps import Steps


@dataclass
class Samples:
    """A table with the concepts it is about (None for labelled data), what a reader must be told, the concepts'
    categories where there are any, and texts about further concepts for a similarity."""

    table: SampleTable
    concepts: ConceptPack | None
    lines: list[str]
    categories: Mapping[str, str] = field(default_factory=dict)
    further: SampleTable | None = None


def samples(job: Any, substrate: Substrate | None, sources: Sources, *, concepts: ConceptPack | None = None) -> Samples:
    """The sample table that a job asks for.

    Raises:
        ConfigError: `data` is of no known kind.
    """
    data = job.data
    if isinstance(data, LabelledConfig):
        data = replace(data, path=sources.texts(data.path))
        table, report = read(data, job.seed)
        return Samples(table, None, report.lines())
    if isinstance(data, ComposeConfig):
        pack = concepts or sources.concepts(job.concepts)
        wordnet = WordNet.open(sources.fetch("wordnet-3.0").folder)
        if data.heldout == "wikipedia":
            sources.fetch("wikipedia-leads")
        table = compose(pack, wordnet, substrate, data, job.seed)
        return Samples(table, pack, [f"{len(pack)} concepts on {len(pack.levels)} levels", *describe(table)])
    if isinstance(data, DescriptionsConfig):
        wordnet = WordNet.open(sources.fetch("wordnet-3.0").folder)
        sources.fetch("wikipedia-leads")
        made = describe_concepts(wordnet, data, job.seed, substrate=substrate)
        lines = [f"{len(made.concepts)} concepts in {len(set(made.categories.values()))} categories"]
        return Samples(made.table, made.concepts, [*lines, *describe(made.table)], made.categories, made.further)
    if isinstance(data, SequencesConfig):
        pack = concepts or sources.concepts(job.concepts)
        wordnet = WordNet.open(sources.fetch("wordnet-3.0").folder)
        table = compose_sequences(pack, wordnet, data, job.seed)
        return Samples(table, pack, [f"{len(pack)} concepts on {len(pack.levels)} levels", *describe(table)])
    raise ConfigError("data is of no known kind; choose data=wordnet, labelled, sequences or descriptions")


def prepare(job: Any, sources: Sources, run_steps: Steps) -> tuple[Substrate, Samples]:
    """Load the substrate and make the samples of a job, telling each step."""
    with run_steps.step("Load the substrate") as step:
        substrate = sources.substrate(job.substrate)
        step.note(f"{substrate.name}, {substrate.num_layers} blocks of width {substrate.width}")
    with run_steps.step("Make the samples") as step:
        made = samples(job, substrate, sources)
        step.note(made.lines[0])
    for line in made.lines[1:]:
        run_steps.console.print(f"       {line}", style="dim", highlight=False, markup=False)
    return substrate, made


def describe(table: SampleTable) -> list[str]:
    """Texts by split and make."""
    lines = []
    for split in dict.fromkeys(table.splits):
        makes: dict[str, int] = {}
        for index in table.where(split):
            makes[table.sources[index]] = makes.get(table.sources[index], 0) + 1
        parts = ", ".join(f"{num:,} {make}" for make, num in makes.items())
        lines.append(f"{split}: {sum(makes.values()):,} texts ({parts})")
    return lines


def capture(config: CollectConfig, table: SampleTable, data: Any = None, seed: int = 0) -> CollectConfig:
    """The capture that a table needs: without a background split, tokens of training texts serve for percentiles.

    Prompts are answered, and every token of an answer is kept.
    """
    if isinstance(data, SequencesConfig):
        return replace(
            config,
            pools=[],
            tokens_per_text=dict.fromkeys(SPLITS, -1),
            max_new_tokens=data.max_new_tokens,
            temperature=data.temperature,
            sampling_seed=seed,
        )
    if len(table.where("background")) or config.tokens_per_text.get("train"):
        return config
    return replace(config, tokens_per_text={**config.tokens_per_text, "train": 4})
