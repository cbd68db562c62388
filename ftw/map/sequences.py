"""Prompts whose sampled answers sequence lenses learn from, and what each says about every concept.

Each concept has prompts about itself and about members of its closure, several samples of each; a prompt's samples
share its group, so that none crosses a split. An answer is a positive of the concepts above what was asked about; the
negatives of a concept are answers about its siblings and about distant concepts. "What is NOT X?", the negative of the
original design, still evokes X; such answers are kept apart, for those who want to see it.

Axes: S answers, N concepts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ftw.errors import ConfigError, DataError
from ftw.map.concept import ConceptPack
from ftw.map.kinship import Indices, Kinship
from ftw.map.samples import SampleTable
from ftw.map.sentences import phrase
from ftw.map.wordnet import WordNet

QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to a child.",
    "Describe {} in a few sentences.",
    "What should I know about {}?",
    "Why does {} matter?",
    "Give me a short introduction to {}.",
    "Write a paragraph about {}.",
    "What do you know about {}?",
    "Give me an interesting fact about {}.",
    "How would you define {}?",
    "I want to learn about {}. Where do I start?",
    "Write the first lines of an article on {}.",
    "What comes to mind when you think of {}?",
    "Tell a short story with {} in it.",
    "What do people often get wrong about {}?",
    "What is the history of {}?",
    "Why do people talk about {}?",
    "Summarise what is known about {}.",
    "How is {} described in books?",
    "Write a short poem about {}.",
    "What makes {} special?",
    "Give three examples to do with {}.",
    "What would you show a visitor of {}?",
    "Explain why someone would study {}.",
)
NEGATIONS = ("What is NOT {}?", "Name something that is NOT {}.")
EVERYDAY = (
    "How was your day?",
    "Write a short letter to a friend.",
    "Tell me a story.",
    "What would you do with a free afternoon?",
    "Give me some advice.",
    "Say something interesting.",
    "Write the opening of a novel.",
    "What happened in the news?",
    "Plan a weekend for two.",
    "Explain how to learn a new skill.",
    "Write a poem.",
    "Compare two things of your choice.",
    "Describe a place you have read about.",
    "What makes a good question?",
    "Summarise a film.",
    "Write a product review.",
)
SAMPLED, NEGATED, BACKGROUND = "sampled", "negated", "everyday"
KINDS = ("distant", "sibling", "negated")


@dataclass(kw_only=True)
class SequencesConfig:
    """How many answers are sampled, and which of them are negatives.

    Attributes:
        layers: whose states are kept where the command says nothing else; the last one tells most.
        positives: answers sampled about each concept, half of them about itself, half about members of its closure;
            those sampled for the concepts below it are positives of it as well.
        samples_per_prompt: answers sampled to each prompt.
        siblings, distant: at most so many negatives of each concept among answers about its siblings, and about
            unrelated concepts; they are the other concepts' answers, so that none is sampled for them.
        sibling_share: what its siblings weigh among the negatives of a concept, where it has both kinds.
        negated: answers to "What is NOT X?", marked apart; training leaves them out.
        max_new_tokens, temperature: of an answer.
        test_fraction: share of the prompts that is held out.
        background: answers to everyday prompts, for percentiles.
    """

    kind: str = "sequences"
    layers: list[float] = field(default_factory=lambda: [0.99])
    positives: int = 50
    samples_per_prompt: int = 1
    siblings: int = 200
    distant: int = 1000
    sibling_share: float = 0.3
    negated: int = 0
    max_new_tokens: int = 20
    temperature: float = 1.0
    test_fraction: float = 0.3
    background: int = 128


@dataclass(frozen=True)
class _Prompt:
    text: str
    source: str
    split: str
    positives: Indices = frozenset()
    silent: Indices = frozenset()
    negated: int = -1


def compose_sequences(pack: ConceptPack, wordnet: WordNet, config: SequencesConfig, seed: int) -> SampleTable:
    """The table of all prompts, one row a sample, with marks.

    Raises:
        ConfigError: an option out of its range. DataError: a concept without negatives, or without a name to ask for.
    """
    _check(config)
    kinship = Kinship(pack, wordnet)
    prompts = _prompts(kinship, config, seed)
    rows = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    marks = [_marks_of(kinship, rows, index, config, seed) for index in range(len(kinship.names))]
    found, labels, weights = (np.concatenate([mark[place] for mark in marks]) for place in range(3))
    cols = np.repeat(np.arange(len(marks)), [len(mark[0]) for mark in marks])
    order = np.lexsort((cols, found))
    numbers = np.tile(np.arange(config.samples_per_prompt), len(prompts))
    return SampleTable(
        texts=[prompt.text for prompt in rows],
        groups=[prompt.text for prompt in rows],
        splits=[prompt.split for prompt in rows],
        sources=[prompt.source for prompt in rows],
        concepts=list(kinship.names),
        rows=found[order].astype(np.int32),
        cols=cols[order].astype(np.int32),
        labels=labels[order].astype(np.int8),
        weights=weights[order].astype(np.float32),
        columns={"sample": [str(number) for number in numbers]},
    )


def near_kin(pack: ConceptPack, name: str) -> list[str]:
    """The siblings of a concept under its own parent; the roots of a pack are strangers to each other."""
    return pack.siblings(name) if pack.parents(name) else []


def mark_kinds(table: SampleTable, rows: np.ndarray, siblings: Sequence[Sequence[int]]) -> np.ndarray:
    """What kind of negative each answer is for each concept, int8 [S, N]: place in `KINDS`, -1 where it is none.

    Args:
        rows: S rows of the table. siblings: indices of the siblings of each concept.
    """
    labels_SN, weights_SN = table.matrices(rows)
    positive_SN = (labels_SN > 0) & (weights_SN > 0)
    kinds_SN = np.where((weights_SN > 0) & ~positive_SN, KINDS.index("distant"), -1).astype(np.int8)
    negated_S = np.array([table.sources[row] == NEGATED for row in rows])
    for concept, others in enumerate(siblings):
        near_S = positive_SN[:, list(others)].any(axis=1) if len(others) else np.zeros(len(rows), dtype=bool)
        kinds_SN[near_S & (kinds_SN[:, concept] >= 0), concept] = KINDS.index("sibling")
    kinds_SN[negated_S] = np.where(kinds_SN[negated_S] >= 0, KINDS.index("negated"), -1)
    return kinds_SN


def _check(config: SequencesConfig) -> None:
    for name, least in (
        ("positives", 4),
        ("samples_per_prompt", 1),
        ("siblings", 0),
        ("distant", 0),
        ("negated", 0),
        ("max_new_tokens", 1),
        ("background", 0),
    ):
        if getattr(config, name) < least:
            raise ConfigError(f"data.{name}={getattr(config, name)}: must be at least {least}")
    if not 0 <= config.test_fraction < 1 or config.temperature < 0:
        raise ConfigError(
            f"data.test_fraction={config.test_fraction} must lie in [0, 1), temperature={config.temperature} above 0"
        )
    if not 0 < config.sibling_share < 1:
        raise ConfigError(f"data.sibling_share={config.sibling_share}: must lie between 0 and 1")
    if config.siblings + config.distant == 0:
        raise ConfigError("data.siblings=0 and data.distant=0 leave no negatives; ask for some of either")


def _prompts(kinship: Kinship, config: SequencesConfig, seed: int) -> list[_Prompt]:
    """All prompts, each once, in order of the concepts."""
    found: dict[str, _Prompt] = {}
    wanted = -(-config.positives // config.samples_per_prompt)
    for index, name in enumerate(kinship.names):
        own = kinship.roots[index][:1]
        if not own:
            raise DataError(f"concept {name!r} has no synset to ask about; leave it out of the concept pack")
        random = np.random.default_rng(list(_digest(seed, "prompts", name)))
        others = [synset for synset in kinship.sources(index) if synset not in own]
        drawn = [others[place] for place in random.permutation(len(others))]
        questions = [QUESTIONS[place] for place in random.permutation(len(QUESTIONS))]
        asked = [(question, own[0]) for question in questions[: -(-wanted // 2)]]
        # Few members, or many prompts: other questions about the same ones.
        turns = [(question, synset) for question in questions for synset in drawn]
        asked += turns[: wanted - len(asked)]
        asked += [(question, own[0]) for question in questions if (question, own[0]) not in asked]
        for question, synset in asked[:wanted]:
            text = question.format(phrase(kinship.wordnet, synset))
            if text not in found:
                positives, silent = kinship.positives([synset], ()), kinship.unmarked([synset], ())
                split = _split(text, config)
                found[text] = _Prompt(text, SAMPLED, split, positives, silent)
        for place in range(-(-config.negated // config.samples_per_prompt)):
            text = NEGATIONS[place % len(NEGATIONS)].format(phrase(kinship.wordnet, own[0]))
            found.setdefault(text, _Prompt(text, NEGATED, _split(text, config), negated=index))
    for place in range(-(-config.background // config.samples_per_prompt)):
        text = EVERYDAY[place % len(EVERYDAY)] + " " * (place // len(EVERYDAY))
        found.setdefault(text, _Prompt(text, BACKGROUND, "background"))
    return list(found.values())


def _split(text: str, config: SequencesConfig) -> str:
    # By the text alone: a prompt that was held out from training stays so, whatever the seed of an evaluation.
    draw = int.from_bytes(_digest(0, "split", text)[:8], "big") / 2**64
    return "test" if draw < config.test_fraction else "train"


def _marks_of(
    kinship: Kinship, rows: Sequence[_Prompt], index: int, config: SequencesConfig, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are marked for a concept, their labels and their weights."""
    sibling_indices = {kinship.names.index(name) for name in near_kin(kinship.pack, kinship.names[index])}
    positive, near, far, negated = list[int](), list[int](), list[int](), list[int]()
    for row, prompt in enumerate(rows):
        if prompt.source == NEGATED:
            negated += [row] * (prompt.negated == index)
        elif index in prompt.positives:
            positive.append(row)
        elif prompt.source == SAMPLED and index not in prompt.silent:
            (near if sibling_indices & prompt.positives else far).append(row)
    name = kinship.names[index]

    def draw(places: list[int], most: int, words: str) -> list[int]:
        random = np.random.default_rng(list(_digest(seed, words, name)))
        return [places[place] for place in random.permutation(len(places))[:most]]

    total = config.siblings + config.distant
    siblings_first, far_first = draw(near, total, "siblings"), draw(far, total, "distant")
    # Where there are too few of one kind, the other kind has their share as well.
    num_near = min(len(siblings_first), max(config.siblings, total - len(far_first)))
    num_far = min(len(far_first), total - num_near)
    if not num_near + num_far:
        raise DataError(f"concept {name!r} has no negatives: nothing else in the pack is unrelated to it; add concepts")
    parts = [positive, siblings_first[:num_near], far_first[:num_far], negated]
    sizes = [len(part) for part in parts]
    weights = [1.0, *_kind_weights(num_near, num_far, config.sibling_share), 1.0]
    marked = np.array([row for part in parts for row in part], dtype=np.int64)
    return marked, np.repeat([1, 0, 0, 0], sizes), np.repeat(weights, sizes)


def _kind_weights(num_near: int, num_far: int, share: float) -> tuple[float, float]:
    """Weights of a sibling and of a distant negative: one on average, and `share` of all on the siblings."""
    if not num_near or not num_far:
        return 1.0, 1.0
    return share * (num_near + num_far) / num_near, (1 - share) * (num_near + num_far) / num_far


def _digest(seed: int, *words: str) -> bytes:
    return hashlib.blake2b("\0".join([str(seed), *words]).encode("utf-8", "surrogatepass"), digest_size=16).digest()
