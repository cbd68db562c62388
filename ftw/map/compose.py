"""Samples for a concept pack: what its lenses learn from, and the natural text they are judged on.

Texts are drawn concept by concept (dictionary glosses and example sentences, lemmas in everyday sentences, text that
the substrate writes itself) into one pool, with neutral sentences beside them. Every text then says of every concept
yes, no or nothing (`ftw.map.kinship`). Held-out text is of another make: leads of Wikipedia articles, marked by the
senses of their titles. All draws are seeded by concept, so that a further concept leaves the others' draws alone.

Axes: S texts, N concepts.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from rich.progress import track

from ftw.errors import ConfigError, DataError, LeakError
from ftw.map.concept import ConceptPack
from ftw.map.kinship import Indices, Kinship
from ftw.map.leaks import LeakConfig, find_leaks
from ftw.map.samples import SampleTable
from ftw.map.sentences import CONTEXTS, GENERATION_PROMPTS, phrase, written
from ftw.map.wikipedia import PARTS, Article, cut, load_articles, part, title_senses
from ftw.map.wordnet import WordNet
from ftw.substrate.model import Substrate
from ftw.substrate.prompts import generate_texts
from ftw.substrate.sources import fetch

ALL_NEGATIVES_UP_TO = 256  # concepts; S × N marks are few below, and all of them help
NEGATIVES_OF_LARGE_PACKS = 2_000
FEW_POSITIVES = 8
T = TypeVar("T")


@dataclass(kw_only=True)
class ComposeConfig:
    """How many texts of each make.

    Attributes:
        max_positives: for each concept at most so many glosses, and so many example sentences, are drawn.
        examples: whether WordNet's example sentences (and a pack's own) are drawn.
        contexts, generated: for each concept so many everyday sentences with a lemma; so many texts of the substrate.
        neutral: example sentences, in all, of verbs, adjectives and adverbs that name no concept.
        sibling_weight: how much the positives of a concept's siblings count among its negatives; other negatives 1.
        max_negatives: for each concept at most so many; siblings' first (up to half), then others. 0: all of them in
            packs of up to 256 concepts, else 2,000.
        heldout: "wikipedia" or "none". heldout_part: the articles that become the test split: test, dev or all of both.
        max_articles_per_concept: so many positives are drawn for each concept; the union of these is the test split.
        background_articles: articles of a third part, without marks.
        max_characters: longer texts end at their last sentence before this.
        max_new_tokens, temperature: of the substrate's own texts.
    """

    kind: str = "wordnet"
    max_positives: int = 60
    examples: bool = True
    contexts: int = 8
    generated: int = 0
    neutral: int = 300
    sibling_weight: float = 3.0
    max_negatives: int = 0
    heldout: str = "wikipedia"
    heldout_part: str = "test"
    max_articles_per_concept: int = 25
    background_articles: int = 150
    max_characters: int = 700
    max_new_tokens: int = 48
    temperature: float = 0.8


@dataclass(slots=True)
class _Draft:
    """A text before it is marked: what it was made from, and whether its words may name further concepts."""

    group: str
    split: str
    source: str
    synsets: set[str] = field(default_factory=set)
    concepts: set[int] = field(default_factory=set)
    free: bool = False


_Pool = dict[str, _Draft]


def compose(
    pack: ConceptPack,
    wordnet: WordNet,
    substrate: Substrate | None,
    config: ComposeConfig,
    seed: int,
    articles: Sequence[Article] | None = None,
) -> SampleTable:
    """The sample table of a concept pack: splits train, test and background.

    Args:
        substrate: writes the generated texts; may be None where `config.generated` is 0.
        articles: natural text; None: the source wikipedia-leads is fetched where `config.heldout` asks for it.

    Raises:
        ConfigError: an option out of its range. DataError: a concept without any text, a text in two splits.
    """
    _check_options(config, substrate)
    kinship = Kinship(pack, wordnet)
    train = _drawn(kinship, config, seed)
    prompts = _prompts(kinship, config, seed)
    if prompts and substrate is not None:
        replies = generate_texts(
            substrate,
            [prompt for prompt, _ in prompts],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=seed,
        )
        for (prompt, synset), reply in zip(prompts, replies, strict=True):
            if text := written(reply, config.max_characters):
                _add(train, text, _Draft(f"prompt: {prompt}", "train", "generated", synsets={synset}, free=True))
    test, background = _natural(kinship, config, seed, _articles(config, articles))
    table = _without_copies(_marked(kinship, train, test, background, config, seed))
    check_leaks(table)
    if lacking := _without(table, "train", 1):
        names = ", ".join(repr(name) for name, _ in lacking[:8])
        raise DataError(f"no training text for {names} ({len(lacking)} concepts): no definition, synset or example")
    return table


def preview(
    pack: ConceptPack,
    wordnet: WordNet,
    config: ComposeConfig,
    seed: int,
    articles: Sequence[Article] | None = None,
) -> dict[str, int]:
    """Number of texts by source that `compose` would give; "generated" counts prompts, as nothing is generated."""
    _check_options(config, None, dry=True)
    kinship = Kinship(pack, wordnet)
    test, background = _natural(kinship, config, seed, _articles(config, articles))
    counts = Counter(draft.source for draft in _drawn(kinship, config, seed).values())
    counts["generated"] = len(_prompts(kinship, config, seed))
    return {**counts, "wikipedia": len(test), "background": len(background)}


def notes(table: SampleTable, few: int = FEW_POSITIVES) -> list[str]:
    """Sentences on concepts whose held-out figures rest on fewer than `few` positives; their intervals are wide."""
    if not len(table.where("test")):
        return []
    return [
        f"{name}: only {count} held-out positives" if count else f"{name}: no held-out positive, so no held-out figure"
        for name, count in _without(table, "test", few)
    ]


def _without(table: SampleTable, split: str, few: int) -> list[tuple[str, int]]:
    """Concepts with fewer than `few` positives in a split, and how many."""
    inside = np.asarray(table.splits)[table.rows] == split
    counts = np.bincount(table.cols[inside & (table.labels == 1)], minlength=len(table.concepts))
    return [(name, int(count)) for name, count in zip(table.concepts, counts, strict=True) if count < few]


def _check_options(config: ComposeConfig, substrate: Substrate | None, *, dry: bool = False) -> None:
    """Values that nothing could be composed with."""
    if config.heldout not in ("wikipedia", "none"):
        raise ConfigError(f"data.heldout={config.heldout!r}: the choices are wikipedia, none")
    if config.heldout_part not in ("test", "dev", "all"):
        raise ConfigError(f"data.heldout_part={config.heldout_part!r}: the choices are test, dev, all")
    for name, least in (("max_positives", 1), ("contexts", 0), ("generated", 0), ("neutral", 0), ("max_negatives", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"data.{name}={getattr(config, name)}: must be at least {least}")
    if config.sibling_weight <= 0 or config.max_characters < 80:
        raise ConfigError("data.sibling_weight must be above 0 and data.max_characters at least 80")
    if config.generated and substrate is None and not dry:
        raise ConfigError(
            f"data.generated={config.generated} needs a substrate to write; give one or set data.generated=0"
        )


# --- what to train on ---------------------------------------------------------------------------------------------


def _random(seed: int, *words: str) -> np.random.Generator:
    """A generator that depends on these words alone, not on how often others were asked."""
    return np.random.default_rng(int.from_bytes(_digest(seed, *words), "big"))


def _digest(seed: int, *words: str) -> bytes:
    return hashlib.blake2b("\0".join([str(seed), *words]).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _draw(random: np.random.Generator, items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, in random order."""
    return [items[index] for index in random.permutation(len(items))[:most]]


def _add(pool: _Pool, text: str, draft: _Draft) -> None:
    """Put a text into the pool; one met again speaks for what both were made from."""
    text = re.sub(r"\s+", " ", text).strip()
    if not text:
        return
    known = pool.setdefault(text, draft)
    known.synsets |= draft.synsets
    known.concepts |= draft.concepts


def _drawn(kinship: Kinship, config: ComposeConfig, seed: int) -> _Pool:
    """All training texts but the generated ones."""
    pool: _Pool = {}
    for index in range(len(kinship.names)):
        _draw_definitions(pool, kinship, index, config, seed)
        if config.examples:
            _draw_examples(pool, kinship, index, config, seed)
        _draw_contexts(pool, kinship, index, config, seed)
    for text, synset in _neutral(kinship, config.neutral, seed):
        if text not in pool:
            _add(pool, text, _Draft(synset, "train", "neutral"))
    return pool


def _draw_definitions(pool: _Pool, kinship: Kinship, index: int, config: ComposeConfig, seed: int) -> None:
    """The concept's own definition and glosses of its closure; the glosses of its own synsets are always among them."""
    name, wordnet = kinship.names[index], kinship.wordnet
    own = set(kinship.roots[index])
    drawn = _draw(_random(seed, "definition", name), kinship.sources(index), config.max_positives)
    for synset in [*kinship.roots[index], *(synset for synset in drawn if synset not in own)][: config.max_positives]:
        definition = cut(wordnet.synset(synset).definition, config.max_characters)
        _add(pool, definition, _Draft(synset, "train", "definition", synsets={synset}))
    # SUMO's definitions mark terms as &%Term.
    definition = cut(kinship.pack[name].definition.replace("&%", ""), config.max_characters)
    group = kinship.roots[index][0] if kinship.taxonomic else f"concept: {name}"
    _add(pool, definition, _Draft(group, "train", "definition", concepts={index}))


def _draw_examples(pool: _Pool, kinship: Kinship, index: int, config: ComposeConfig, seed: int) -> None:
    """Example sentences of the closure in WordNet, and those that the concept's own record gives."""
    name = kinship.names[index]
    sentences = [
        (text, synset) for synset in kinship.sources(index) for text in kinship.wordnet.synset(synset).examples
    ]
    for text, synset in _draw(_random(seed, "example", name), sentences, config.max_positives):
        _add(pool, cut(text, config.max_characters), _Draft(synset, "train", "example", synsets={synset}))
    hints = kinship.pack[name].record.get("training_hints")
    listed = hints.get("positive_examples") if isinstance(hints, dict) else None
    texts = [text for text in listed if isinstance(text, str)] if isinstance(listed, list) else []
    for text in texts[: config.max_positives]:
        draft = _Draft(f"concept: {name}", "train", "example", concepts={index}, free=True)
        _add(pool, cut(text, config.max_characters), draft)


def _draw_contexts(pool: _Pool, kinship: Kinship, index: int, config: ComposeConfig, seed: int) -> None:
    """Everyday sentences about members of the closure; every synset once before any comes twice."""
    name = kinship.names[index]
    random = _random(seed, "context", name)
    members = _draw(random, kinship.sources(index), config.contexts)
    for turn in range(config.contexts if members else 0):
        synset = members[turn % len(members)]
        number = int(random.integers(len(CONTEXTS)))
        text = CONTEXTS[number].format(phrase(kinship.wordnet, synset))
        _add(
            pool, text[0].upper() + text[1:], _Draft(f"template {number:02d}", "train", "context", {synset}, free=True)
        )


def _neutral(kinship: Kinship, most: int, seed: int) -> Iterator[tuple[str, str]]:
    """Sentences that show verbs, adjectives and adverbs in use and name no concept of the pack."""
    names = [name for pos in "var" for name in kinship.wordnet.names(pos)] if most else []
    found = 0
    for place in _random(seed, "neutral").permutation(len(names)):
        for text in kinship.wordnet.synset(names[place]).examples:
            if found < most and len(text.split()) >= 4 and not kinship.spoken_of(text):
                found += 1
                yield text, names[place]
        if found == most:
            return


def _prompts(kinship: Kinship, config: ComposeConfig, seed: int) -> list[tuple[str, str]]:
    """Requests for the substrate to write about the concept's own synsets and then others of its closure."""
    prompts: dict[str, str] = {}
    for index, name in enumerate(kinship.names if config.generated else []):
        random = _random(seed, "generated", name)
        others = _draw(random, kinship.sources(index), config.generated)
        members = list(dict.fromkeys([*kinship.roots[index][:1], *others]))
        for turn in range(config.generated if members else 0):
            synset = members[turn % len(members)]
            request = GENERATION_PROMPTS[int(random.integers(len(GENERATION_PROMPTS)))]
            definition = kinship.wordnet.synset(synset).definition
            prompts[request.format(thing=phrase(kinship.wordnet, synset), definition=definition)] = synset
    return list(prompts.items())


# --- what to judge on ---------------------------------------------------------------------------------------------


def _articles(config: ComposeConfig, articles: Sequence[Article] | None) -> Sequence[Article]:
    if config.heldout == "none":
        return []
    return load_articles(fetch("wikipedia-leads").folder) if articles is None else articles


def _natural(
    kinship: Kinship, config: ComposeConfig, seed: int, articles: Sequence[Article]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Test texts with the title and its senses, background texts with the title."""
    parts = PARTS[:2] if config.heldout_part == "all" else (config.heldout_part,)
    by_concept: dict[int, list[tuple[Article, list[str]]]] = defaultdict(list)
    for article in articles:
        if part(article.title) in parts and (senses := title_senses(article, kinship.wordnet)):
            for index in kinship.reach(senses[0]):
                by_concept[index].append((article, senses))
    chosen: dict[str, list[str]] = {}
    for index in sorted(by_concept):
        random = _random(seed, "articles", kinship.names[index])
        for article, senses in _draw(random, by_concept[index], config.max_articles_per_concept):
            chosen[cut(article.text, config.max_characters)] = [article.title, *senses]
    quiet = [article for article in articles if part(article.title) == "background"]
    drawn = _draw(_random(seed, "background"), quiet, config.background_articles)
    return chosen, {cut(article.text, config.max_characters): article.title for article in drawn}


def _without_copies(table: SampleTable) -> SampleTable:
    """The table without articles that a training text repeats: some definitions are taken from them."""
    copied = find_leaks(table, LeakConfig().similarity).pairs
    if not copied:
        return table
    kept = np.ones(len(table), dtype=bool)
    kept[[test for _, test in copied]] = False
    return table.select(np.flatnonzero(kept), table.concepts)


def check_leaks(table: SampleTable) -> None:
    """Refuse a table in which a text stands in two splits, be it with other case, spaces or punctuation.

    Raises:
        LeakError: names the texts.
    """
    known: dict[str, int] = {}
    leaks = []
    for row, text in enumerate(table.texts):
        key = " ".join(re.findall(r"\w+", text.casefold())) or text
        other = known.setdefault(key, row)
        if table.splits[other] != table.splits[row]:
            leaks.append(f"{text[:80]!r} in {table.splits[other]} ({table.groups[other]}) and {table.splits[row]}")
    if leaks:
        raise LeakError(f"{len(leaks)} texts stand in two splits: " + "; ".join(leaks[:5]))


# --- who says what about whom -------------------------------------------------------------------------------------


def _marked(
    kinship: Kinship,
    train: _Pool,
    test: dict[str, list[str]],
    background: dict[str, str],
    config: ComposeConfig,
    seed: int,
) -> SampleTable:
    """The table of all texts, with the marks of the training and test texts."""
    drafts = list(train.values())
    positives = [kinship.positives(draft.synsets, draft.concepts) for draft in drafts]
    silent = [
        kinship.unmarked(draft.synsets, draft.concepts) | (kinship.spoken_of(text) if draft.free else frozenset())
        for text, draft in train.items()
    ]
    marks = _marks(kinship, list(train), positives, silent, config, seed, config.sibling_weight)
    sure = [kinship.reach(senses[0]) for _, *senses in test.values()]
    # What any further sense of the title could mean, and what lies below its first sense, is left open.
    unsure = [kinship.unmarked(senses[:1], ()).union(*map(kinship.reach, senses)) for _, *senses in test.values()]
    # Held-out rows count alike: weights are for learning.
    tested = _marks(kinship, list(test), sure, unsure, config, seed, 1.0)
    tested[0] += len(train)
    rows, cols, labels, weights = (np.concatenate(pair) for pair in zip(marks, tested, strict=True))
    return SampleTable(
        texts=[*train, *test, *background],
        groups=[*(draft.group for draft in drafts), *(title for title, *_ in test.values()), *background.values()],
        splits=["train"] * len(train) + ["test"] * len(test) + ["background"] * len(background),
        sources=[*(draft.source for draft in drafts), *["wikipedia"] * (len(test) + len(background))],
        concepts=list(kinship.names),
        rows=rows.astype(np.int32),
        cols=cols.astype(np.int32),
        labels=labels.astype(np.int8),
        weights=weights.astype(np.float32),
    )


def _marks(
    kinship: Kinship,
    texts: Sequence[str],
    positives: Sequence[Indices],
    silent: Sequence[Indices],
    config: ComposeConfig,
    seed: int,
    sibling_weight: float,
) -> list[np.ndarray]:
    """Rows, columns, labels and weights of the marks of some texts, in order of row and column."""
    num_concepts = len(kinship.names)
    large = num_concepts > ALL_NEGATIVES_UP_TO
    limit = config.max_negatives or (NEGATIVES_OF_LARGE_PACKS if large else len(texts))
    keys = np.array([int.from_bytes(_digest(seed, text)[:8], "big") for text in texts], dtype=np.uint64)
    rows_of = _transposed(positives, num_concepts)
    silent_of = _transposed(silent, num_concepts)
    parts: list[tuple[np.ndarray, ...]] = []
    for index, name in enumerate(track(kinship.names, "marking texts", disable=not large, transient=True)):
        free = np.ones(len(texts), dtype=bool)
        free[rows_of[index]] = free[silent_of[index]] = False
        near = np.zeros(len(texts), dtype=bool)
        for sibling in kinship.siblings(index):
            near[rows_of[sibling]] = True
        key = np.uint64(int.from_bytes(_digest(seed, "negatives", name)[:8], "big"))
        negatives = _few(free & near, free & ~near, limit, keys ^ key)
        rows = np.concatenate([rows_of[index], negatives])
        labels = np.repeat([1, 0], [len(rows_of[index]), len(negatives)])
        weights = np.where((labels == 0) & near[rows], sibling_weight, 1.0)
        parts.append((rows, np.full(len(rows), index), labels, weights))
    rows, cols, labels, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((cols, rows))
    return [rows[order], cols[order], labels[order], weights[order]]


def _transposed(concepts_of_rows: Sequence[Indices], num_concepts: int) -> list[np.ndarray]:
    """Rows of each concept, from the concepts of each row."""
    rows: list[list[int]] = [[] for _ in range(num_concepts)]
    for row, indices in enumerate(concepts_of_rows):
        for index in indices:
            rows[index].append(row)
    return [np.array(each, dtype=np.int64) for each in rows]


def _few(near: np.ndarray, far: np.ndarray, limit: int, keys: np.ndarray) -> np.ndarray:
    """At most `limit` rows, by smallest key: siblings' up to half of it (or what the others leave), then the others."""
    near_rows, far_rows = np.flatnonzero(near), np.flatnonzero(far)
    num_near = min(len(near_rows), max(limit - limit // 2, limit - len(far_rows)))
    num_far = min(len(far_rows), limit - num_near)
    chosen = [_smallest(near_rows, keys, num_near), _smallest(far_rows, keys, num_far)]
    return np.sort(np.concatenate(chosen))


def _smallest(rows: np.ndarray, keys: np.ndarray, num: int) -> np.ndarray:
    """The `num` rows of smallest key, in no order."""
    return rows if num == len(rows) else rows[np.argpartition(keys[rows], num)[:num]]
