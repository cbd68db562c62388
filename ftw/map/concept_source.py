"""Where the concepts come from: chosen in WordNet, or read from a concept pack.

Choosing takes explicit synsets and, below given roots, those with most meanings beneath them within bounds of depth.
The pack keeps WordNet's order among the chosen: a concept hangs below its nearest chosen ancestors, whatever was left
out between them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftw.errors import ConceptError, ConfigError
from ftw.map.concept import Concept, ConceptPack
from ftw.map.sentences import is_first_sense
from ftw.map.wordnet import Synset, WordNet

POS_WORDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass(kw_only=True)
class ConceptsConfig:
    """The concepts to make lenses for.

    Attributes:
        kind: "wordnet" builds a pack from synsets and roots; "pack" reads the one at `path`.
        path: folder of a concept pack in the First Light form (kind "pack").
        synsets: concepts chosen by hand, "dog.n.01" (kind "wordnet").
        roots: concepts below (and with) these may be chosen, largest closure first (kind "wordnet").
        num: number of concepts of the pack, those of `synsets` included; None takes all that satisfy the bounds.
        min_depth, max_depth: hypernym links below the nearest root; 0 is the root itself.
        min_closure: least number of synsets below a concept chosen through `roots`.
        first_senses: of those, only synsets that are the most frequent sense of one of their words, so that a word
            alone tells them apart.
        order: which are taken first: "closure" those with most meanings beneath them, "frequency" those most often met
            in the texts that WordNet's authors tagged, then by closure.
        levels: levels of the finished pack to keep; None for all.
        pack_id, version: name of a pack that is built.
    """

    kind: str = "wordnet"
    path: str | None = None
    synsets: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    num: int | None = None
    min_depth: int = 0
    max_depth: int | None = None
    min_closure: int = 1
    first_senses: bool = False
    order: str = "closure"
    levels: list[int] | None = None
    pack_id: str = "wordnet"
    version: str = "1.0.0"


def load_concepts(config: ConceptsConfig, wordnet_folder: Callable[[], Path]) -> ConceptPack:
    """The concept pack of a configuration; `wordnet_folder` is called only where WordNet is needed.

    Raises:
        ConfigError: an unknown kind, or a kind without what it needs.
        ConceptError: concepts that do not exist, or a pack that cannot be read.
    """
    if config.kind == "pack":
        if not config.path:
            raise ConfigError("concepts.kind=pack needs concepts.path, the folder of a concept pack (with pack.json)")
        pack = ConceptPack.load(Path(config.path).expanduser())
    elif config.kind == "wordnet":
        pack = build_pack(config, WordNet.open(wordnet_folder()))
    else:
        raise ConfigError(f"concepts.kind={config.kind!r} is unknown; the kinds are wordnet and pack")
    return pack if config.levels is None else pack.subset(levels=config.levels)


def build_pack(config: ConceptsConfig, wordnet: WordNet) -> ConceptPack:
    """A concept pack of chosen synsets with their definitions, lemmas, examples, antonyms and hierarchy.

    Raises:
        ConceptError: an unknown synset, a synset given twice, or fewer synsets than `num` within the bounds.
    """
    chosen = choose(config, wordnet)
    names = _readable_names(chosen)
    order = {name: place for place, name in enumerate(names)}
    parents = {synset.name: _chosen_parents(synset.name, order, wordnet) for synset in chosen}
    levels = _levels(parents)
    for name, above in parents.items():
        # The most specific parent is the one in the tree, so that a tree edge always spans exactly one level.
        distance = wordnet.distances_up(name)
        above.sort(key=lambda other: (-levels[other], distance[other], order[other]))
    children: dict[str, list[str]] = {name: [] for name in names}
    for name, above in parents.items():
        for parent in above:
            children[parent].append(names[name])
    concepts = []
    for synset in chosen:
        record = _record(synset, names, parents, children[synset.name], levels)
        concepts.append(
            Concept(
                name=names[synset.name],
                level=levels[synset.name],
                parents=record["parent_concepts"],
                definition=synset.definition,
                lemmas=list(synset.lemmas),
                synsets=[synset.name],
                record=record,
            )
        )
    return ConceptPack.of(config.pack_id, config.version, concepts, _pack_info(config))


def choose(config: ConceptsConfig, wordnet: WordNet) -> list[Synset]:
    """Synsets of a configuration: the explicit ones as listed, then those below the roots, largest closure first."""
    explicit = [wordnet.synset(name) for name in config.synsets]
    if repeated := [name for name, num in Counter(synset.name for synset in explicit).items() if num > 1]:
        raise ConceptError(f"concepts.synsets gives {repeated[0]} twice (a synset has several names); remove one")
    if not explicit and not config.roots:
        raise ConceptError("no concepts: give concepts.synsets=[dog.n.01, ...] or concepts.roots=[entity.n.01]")
    if config.num is None and not config.roots:
        return explicit
    taken = {synset.name for synset in explicit}
    found = [name for name in _candidates(config, wordnet) if name not in taken]
    wanted = len(found) if config.num is None else config.num - len(explicit)
    if not 0 <= wanted <= len(found) or (not explicit and not found):
        raise ConceptError(
            f"concepts.num={config.num}, but {len(explicit)} synsets are given and {len(found)} more lie below "
            f"{config.roots} at depth {config.min_depth} to {config.max_depth}, each above {config.min_closure} or "
            "more others; change num, max_depth or min_closure"
        )
    return explicit + [wordnet.synset(name) for name in found[:wanted]]


def _candidates(config: ConceptsConfig, wordnet: WordNet) -> list[str]:
    """Names below the roots within the bounds, in the order of choice; ties by name, so that the choice is stable."""
    depths: dict[str, int] = {}
    for root in config.roots:
        for name, depth in wordnet.distances_down(root).items():
            depths[name] = min(depth, depths.get(name, depth))
    # One pass over everyone's ancestors: 740,000 additions for all nouns, where a closure each would be slower.
    num_below: Counter[str] = Counter()
    for name in depths:
        num_below.update(wordnet.ancestors(name))
    fit = [
        name
        for name, depth in depths.items()
        if config.min_depth <= depth
        and (config.max_depth is None or depth <= config.max_depth)
        and num_below[name] >= config.min_closure
        and (not config.first_senses or _is_first_sense(name, wordnet))
    ]
    if config.order not in ("closure", "frequency"):
        raise ConfigError(f"concepts.order={config.order!r} is unknown; choose closure or frequency")
    counts = wordnet.tag_counts() if config.order == "frequency" else Counter()
    return sorted(fit, key=lambda name: (-counts[name], -num_below[name], name))


def _is_first_sense(name: str, wordnet: WordNet) -> bool:
    """Whether a synset is the most frequent sense of one of its words."""
    synset = wordnet.synset(name)
    return any(is_first_sense(wordnet, lemma, synset) for lemma in synset.lemmas)


def _chosen_parents(name: str, order: Mapping[str, int], wordnet: WordNet) -> list[str]:
    """Chosen ancestors of a synset that no other chosen ancestor stands below, in the order of the choice."""
    # WordNet's verbs hold a cycle; a synset that is also below this one is no parent.
    above = {other for other in wordnet.ancestors(name) if other in order and name not in wordnet.ancestors(other)}
    covered = {far for other in above for far in wordnet.ancestors(other)}
    return sorted(above - covered, key=order.__getitem__)


def _levels(parents: dict[str, list[str]]) -> dict[str, int]:
    """Length of the longest way from a root, so that every parent is of a lower level."""
    levels: dict[str, int] = {}
    while len(levels) < len(parents):
        ready = {n: above for n, above in parents.items() if n not in levels and all(up in levels for up in above)}
        levels |= {name: 1 + max((levels[up] for up in above), default=-1) for name, above in ready.items()}
    return levels


def _readable_names(chosen: Sequence[Synset]) -> dict[str, str]:
    """Synset name → concept name: the first lemma as WordNet writes it; with the synset where two concepts share it."""
    words = {synset.name: synset.lemmas[0].replace("/", "-") for synset in chosen}
    shared = Counter(word.casefold() for word in words.values())
    return {name: word if shared[word.casefold()] == 1 else f"{word} ({name})" for name, word in words.items()}


def _record(
    synset: Synset,
    names: dict[str, str],
    parents: dict[str, list[str]],
    children: list[str],
    levels: dict[str, int],
) -> dict[str, Any]:
    """The First Light record of a chosen synset."""
    root = synset.name
    while parents[root]:
        root = parents[root][0]
    return {
        "sumo_term": names[synset.name],
        "layer": levels[synset.name],
        "domain": names[root],
        "is_category_lens": bool(children),
        "is_pseudo_sumo": False,
        "parent_concepts": [names[other] for other in parents[synset.name]],
        "category_children": children,
        "child_count": len(children),
        "child_concepts": children,
        "definition": synset.definition,
        "definition_source": "wordnet-3.0",
        "synset_count": 1,
        "synsets": [synset.name],
        "canonical_synset": synset.name,
        "synset_offset": f"{synset.offset:08d}.{synset.pos}",
        "lemmas": list(synset.lemmas),
        "pos": POS_WORDS[synset.pos],
        "lexname": synset.lexname,
        "relationships": {"antonyms": [names.get(other, other) for other in synset.antonyms]},
        "training_hints": {"positive_examples": list(synset.examples)},
    }


def _pack_info(config: ConceptsConfig) -> dict[str, Any]:
    """`pack.json` of a built pack; no date, so that equal configurations give equal files."""
    parameters = {key: value for key, value in asdict(config).items() if key not in ("kind", "path", "levels")}
    return {
        "spec_id": f"org.ftw/{config.pack_id}@{config.version}",
        "description": "Concepts chosen in WordNet 3.0, with its definitions, lemmas and hypernym hierarchy.",
        "license": "WordNet 3.0 licence (Princeton University)",
        "ontology_stack": {
            "base_ontology": {"name": "WordNet", "version": "3.0", "source": "https://wordnet.princeton.edu"},
            "hierarchy_builder": {"method": "ftw concepts build", "parameters": parameters},
        },
        "concept_metadata": {"with_wordnet_mappings": True},
    }
