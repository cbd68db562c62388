"""Texts about concepts that name them, and texts that describe them without a name; held out make by make.

Each concept has a dictionary gloss and the lead paragraph of an encyclopedia article. One of the two, by a hash of the
concept, is held out and never trained on; the other is trained on. So an interpreter is asked about glosses of
concepts of which it knows articles, and about articles of concepts of which it knows glosses. Every description has
the concept's lemmas taken out (*unnamed*). Beside them stand texts with a lemma in them (*named*), in sentences that
training never saw: splits go by what a text was made from, never by concept.

Axes: S texts, N concepts.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ftw.errors import ConfigError, DataError
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig, build_pack
from ftw.map.masking import names_it, without_lemmas
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.sentences import CONTEXTS, phrase, written
from ftw.map.wikipedia import Article, cut, load_articles, part, title_senses
from ftw.map.wordnet import Synset, WordNet
from ftw.substrate.model import Substrate
from ftw.substrate.prompts import generate_texts
from ftw.substrate.sources import fetch

NAMED, UNNAMED = "named", "unnamed"
HELD_OUT_CONTEXTS = 8  # the last of CONTEXTS: two for choices (dev), six for figures (test)
DEV_CONTEXTS = 2
MIN_CHARACTERS = 24  # an unnamed text shorter than this describes nothing
WRITING_PROMPTS = (
    "Begin an encyclopedia entry about {thing}{kind}. Two sentences.",
    "Describe {thing}{kind}: what it is, where it is found and what it is known for. Two sentences.",
    "In two plain sentences, explain to a child what {thing} is{kind}.",
    "State two facts about {thing}{kind}.",
)


@dataclass(kw_only=True)
class DescriptionsConfig:
    """How many concepts, and how many texts of each make.

    Attributes:
        num: concepts: nouns of WordNet that are the only noun sense of an article's title, drawn by a hash.
        contexts: everyday sentences with a lemma, for each concept, to train on. held_out_contexts: to judge on.
        neighbours: glosses of concepts right below, lemmas taken out, for each concept.
        written: texts that the substrate writes about each concept, told its name and what kind of thing it is.
        further: nouns beside these, each with its gloss, and its article if it has one: what a similarity is trained
            on, and nothing is judged by.
        sentences: single sentences of an article that is trained on, beside its lead.
        max_characters: longer texts end at their last sentence before this.
        max_new_tokens, temperature: of the substrate's own texts.
    """

    kind: str = "descriptions"
    num: int = 1000
    contexts: int = 5
    held_out_contexts: int = 2
    neighbours: int = 3
    written: int = 0
    further: int = 0
    sentences: int = 3
    max_characters: int = 450
    max_new_tokens: int = 48
    temperature: float = 0.8


class Described(NamedTuple):
    """A concept with what is written about it."""

    synset: Synset
    article: Article


class _Text(NamedTuple):
    text: str
    group: str
    source: str


@dataclass
class _Held:
    """Where a concept's held-out texts go, and which make of description is held out."""

    part: str
    article: bool


@dataclass
class Descriptions:
    """What `describe` makes: the concepts, the table, the category of each concept, and a table of further concepts."""

    concepts: ConceptPack
    table: SampleTable
    categories: Mapping[str, str] = field(default_factory=dict)
    further: SampleTable | None = None


def describe(
    wordnet: WordNet,
    config: DescriptionsConfig,
    seed: int,
    *,
    substrate: Substrate | None = None,
    articles: Sequence[Article] | None = None,
) -> Descriptions:
    """The table of all texts; its columns `kind` (named, unnamed) and `part` (train, dev, test) say what each is for.

    Args:
        substrate: writes texts; may be None where `config.written` is 0.
        articles: None: the source wikipedia-leads is fetched.

    Raises:
        ConfigError: an option out of its range. DataError: fewer concepts than asked have both makes of description.
    """
    _check(config, substrate)
    found = articles if articles is not None else load_articles(fetch("wikipedia-leads").folder)
    chosen = choose_described(wordnet, found, config.num, seed)
    synsets = [one.synset.name for one in chosen]
    pack = build_pack(ConceptsConfig(synsets=synsets, pack_id=f"described-{len(chosen)}"), wordnet)
    builder = SampleTableBuilder(pack.names)
    replies = _written(wordnet, chosen, config, seed, substrate)
    named = {synset: name for name in pack.names for synset in pack[name].synsets}
    for one in chosen:
        lemmas = [*one.synset.lemmas, re.sub(r"\s*\(.*\)$", "", one.article.title)]
        held = _held(one, seed)
        texts = [*_training(wordnet, one, held, config, seed), *replies[one.synset.name]]
        rows = [("train", held_in) for held_in in _both(texts, lemmas)]
        rows += [(held.part, row) for row in _held_out(wordnet, one, held, lemmas, config, seed)]
        for piece, (kind, text) in rows:
            columns = {"kind": kind, "part": piece}
            split = "train" if piece == "train" else "test"
            row = builder.text(text.text, group=text.group, split=split, source=text.source, columns=columns)
            builder.mark(row, named[one.synset.name], 1)
    categories = {named[one.synset.name]: one.synset.lexname.partition(".")[2] for one in chosen}
    table = _without_leaks(builder.build())
    return Descriptions(pack, table, categories, _further(wordnet, found, chosen, table, config, seed))


def choose_described(wordnet: WordNet, articles: Sequence[Article], num: int, seed: int) -> list[Described]:
    """Concepts with a gloss and an article, drawn by a hash; titles with one noun sense only, so that both agree.

    Raises:
        DataError: there are fewer.
    """
    found = _described(wordnet, articles)
    if num > len(found):
        raise DataError(f"data.num={num}, but {len(found)} nouns have both a gloss and an article; choose at most that")
    return sorted(_ranked(found, seed)[:num], key=lambda one: one.synset.name)


def _described(wordnet: WordNet, articles: Sequence[Article]) -> dict[str, Described]:
    """The nouns that have both, by synset."""
    found: dict[str, Described] = {}
    for article in articles:
        senses = title_senses(article, wordnet)
        if len(senses) != 1 or part(article.title) == "background":
            continue
        synset = wordnet.synset(senses[0])
        # Names of single things (rivers, people) have an article and hardly a gloss.
        if any(lemma == lemma.lower() for lemma in synset.lemmas):
            found.setdefault(synset.name, Described(synset, article))
    return found


def _ranked(found: Mapping[str, Described], seed: int) -> list[Described]:
    return sorted(found.values(), key=lambda one: (_digest(seed, "concept", one.synset.name), one.synset.name))


def _further(
    wordnet: WordNet,
    articles: Sequence[Article],
    chosen: Sequence[Described],
    table: SampleTable,
    config: DescriptionsConfig,
    seed: int,
) -> SampleTable | None:
    """Texts of other nouns, those with an article first; none that is held out, or about one of the chosen."""
    if not config.further:
        return None
    taken = {one.synset.name for one in chosen}
    known = {name: one for name, one in _described(wordnet, articles).items() if name not in taken}
    pairs: list[tuple[Synset, Article | None]] = [*_ranked(known, seed)]
    taken |= known.keys()
    others = [name for name in wordnet.names("n") if name not in taken]
    for place in _random(seed, "further").permutation(len(others)):
        if len(pairs) >= config.further:
            break
        synset = wordnet.synset(others[place])
        # Rare names (of plants, of places) say little; a word's first sense is what a reader takes it for.
        if synset.lemmas[0] == synset.lemmas[0].lower() and wordnet.synsets(synset.lemmas[0])[0].name == synset.name:
            pairs.append((synset, None))
    pairs = pairs[: config.further]
    held = {_plain(text) for text, split in zip(table.texts, table.splits, strict=True) if split == "test"}
    builder = SampleTableBuilder([synset.name for synset, _ in pairs])
    for synset, article in pairs:
        for text in _about(wordnet, synset, article, config, seed):
            if _plain(text.text) not in held:
                row = builder.text(text.text, group=text.group, split="train", source=text.source)
                builder.mark(row, synset.name, 1)
    return builder.build()


def _about(
    wordnet: WordNet, synset: Synset, article: Article | None, config: DescriptionsConfig, seed: int
) -> Iterator[_Text]:
    """Name, one everyday sentence, and descriptions without the name."""
    lemmas = [*synset.lemmas, *([article.title] if article else [])]
    yield _Text(synset.lemmas[0], "term", "term")
    number = int(_random(seed, "context", synset.name).integers(len(CONTEXTS) - HELD_OUT_CONTEXTS))
    yield _in_context(wordnet, synset.name, number)
    gloss = without_lemmas(cut(synset.definition, config.max_characters), lemmas)
    yield _Text(gloss, f"gloss: {synset.name}", "definition")
    if article is not None:
        text = without_lemmas(cut(article.text, config.max_characters), lemmas)
        yield _Text(text, f"article: {article.title}", "article")


def _check(config: DescriptionsConfig, substrate: Substrate | None) -> None:
    least = {
        "num": 2,
        "contexts": 0,
        "held_out_contexts": 1,
        "neighbours": 0,
        "written": 0,
        "sentences": 0,
        "further": 0,
    }
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ConfigError(f"data.{name}={getattr(config, name)}: must be at least {value}")
    most = {"contexts": len(CONTEXTS) - HELD_OUT_CONTEXTS, "held_out_contexts": DEV_CONTEXTS}
    most["written"] = len(WRITING_PROMPTS)
    for name, value in most.items():
        if getattr(config, name) > value:
            raise ConfigError(f"data.{name}={getattr(config, name)}: there are {value}")
    if config.written and substrate is None:
        raise ConfigError(f"data.written={config.written} needs a substrate to write; give one or set data.written=0")


def _digest(seed: int, *words: str) -> bytes:
    return hashlib.blake2b("\0".join([str(seed), *words]).encode(), digest_size=8).digest()


def _random(seed: int, *words: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(seed, *words), "big"))


def _held(one: Described, seed: int) -> _Held:
    return _Held(part(one.article.title), _digest(seed, "make", one.synset.name)[0] % 2 == 0)


def _training(wordnet: WordNet, one: Described, held: _Held, config: DescriptionsConfig, seed: int) -> Iterator[_Text]:
    """What is written about a concept, but for the make that is held out."""
    synset, name = one.synset, one.synset.name
    for lemma in dict.fromkeys([*synset.lemmas, one.article.title]):
        yield _Text(lemma, "term", "term")
    random = _random(seed, "context", name)
    numbers = random.permutation(len(CONTEXTS) - HELD_OUT_CONTEXTS)[: config.contexts]
    for number in numbers.tolist():
        yield _in_context(wordnet, name, number)
    for text in synset.examples:
        yield _Text(cut(text, config.max_characters), f"example: {name}", "example")
    if held.article:
        yield _Text(cut(synset.definition, config.max_characters), f"gloss: {name}", "definition")
        yield _Text(f"{synset.lemmas[0]}: {cut(synset.definition, config.max_characters)}", f"gloss: {name}", "entry")
    else:
        group = f"article: {one.article.title}"
        lead = cut(one.article.text, config.max_characters)
        yield _Text(lead, group, "article")
        if one.article.description:
            yield _Text(one.article.description, group, "description")
        sentences = [text for text in re.split(r"(?<=[.!?])\s+(?=[A-Z])", lead) if len(text) >= MIN_CHARACTERS]
        for text in sentences[: config.sentences] if len(sentences) > 1 else []:
            yield _Text(text, group, "sentence")
    below = [wordnet.synset(other) for other in synset.hyponyms]
    for other in [below[place] for place in random.permutation(len(below))[: config.neighbours]]:
        yield _Text(cut(other.definition, config.max_characters), f"gloss: {other.name}", "neighbour")
    if above := [wordnet.synset(other).lemmas[0] for other in synset.hypernyms]:
        examples = f", such as {', '.join(other.lemmas[0] for other in below[:3])}" if below else ""
        yield _Text(f"a kind of {above[0]}{examples}", f"above: {name}", "neighbour")


def _in_context(wordnet: WordNet, synset: str, number: int) -> _Text:
    text = CONTEXTS[number].format(phrase(wordnet, synset))
    return _Text(text[0].upper() + text[1:], f"context {number:02d}", "context")


def _both(texts: Sequence[_Text], lemmas: Sequence[str]) -> Iterator[tuple[str, _Text]]:
    """Each text as it is if it names the concept, and without the name; everyday sentences and terms only named."""
    for one in texts:
        named = names_it(one.text, lemmas)
        if named:
            yield NAMED, one
        if one.source in ("term", "context"):
            continue
        bare = without_lemmas(one.text, lemmas) if named else one.text
        if len(bare) >= MIN_CHARACTERS or not named:
            yield UNNAMED, one._replace(text=bare)


def _held_out(
    wordnet: WordNet, one: Described, held: _Held, lemmas: Sequence[str], config: DescriptionsConfig, seed: int
) -> Iterator[tuple[str, _Text]]:
    """Sentences that training never saw with a lemma, and the description of the make that it never saw."""
    first, last = len(CONTEXTS) - HELD_OUT_CONTEXTS, len(CONTEXTS)
    numbers = range(first, first + DEV_CONTEXTS) if held.part == "dev" else range(first + DEV_CONTEXTS, last)
    drawn = _random(seed, "held out", one.synset.name).permutation(len(numbers))[: config.held_out_contexts]
    for place in drawn.tolist():
        yield NAMED, _in_context(wordnet, one.synset.name, numbers[place])
    text, group, source = one.synset.definition, f"gloss: {one.synset.name}", "definition"
    if held.article:
        text, group, source = one.article.text, f"article: {one.article.title}", "article"
    text = cut(text, config.max_characters)
    if names_it(text, lemmas):
        yield NAMED, _Text(text, group, source)
    yield UNNAMED, _Text(without_lemmas(text, lemmas), group, source)


def _written(
    wordnet: WordNet, chosen: Sequence[Described], config: DescriptionsConfig, seed: int, substrate: Substrate | None
) -> dict[str, list[_Text]]:
    """Texts of the substrate about each concept, which is told the name and the kind, never a definition."""
    texts: dict[str, list[_Text]] = {one.synset.name: [] for one in chosen}
    if not config.written or substrate is None:
        return texts
    asked = []
    for one in chosen:
        above = [wordnet.synset(other).lemmas[0] for other in one.synset.hypernyms[:1]]
        kind = f" (a kind of {above[0]})" if above else ""
        thing = phrase(wordnet, one.synset.name)
        asked += [(one.synset.name, WRITING_PROMPTS[n].format(thing=thing, kind=kind)) for n in range(config.written)]
    prompts = [prompt for _, prompt in asked]
    options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": seed}
    for (name, prompt), reply in zip(asked, generate_texts(substrate, prompts, **options), strict=True):
        if text := written(reply, config.max_characters):
            texts[name].append(_Text(text, f"prompt: {prompt}", "written"))
    return texts


def _without_leaks(table: SampleTable) -> SampleTable:
    """The table without training texts that are held out as well (a gloss that two concepts share, say)."""
    held = {_plain(text) for text, split in zip(table.texts, table.splits, strict=True) if split == "test"}
    rows = zip(table.texts, table.splits, strict=True)
    kept = [row for row, (text, split) in enumerate(rows) if split == "test" or _plain(text) not in held]
    return table if len(kept) == len(table) else table.select(np.array(kept), table.concepts)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
