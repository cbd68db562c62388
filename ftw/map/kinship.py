"""Which concepts a text speaks for, which it speaks against, and of which it must say nothing.

A text is made from a synset or by a concept's own record. It is a positive of every concept above what it was made
from, no evidence (neither positive nor negative) for concepts below, and a negative of the rest. In a pack cut out of
WordNet, "above" follows the hypernyms. Other packs list synsets loosely (First Light's come from a mapping to SUMO):
there only the pack's own hierarchy makes positives, and what WordNet would add is left without a mark.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from ftw.errors import ConceptError
from ftw.map.concept import ConceptPack
from ftw.map.wordnet import WordNet

_SENSE = re.compile(r"(.+)\.([nvasr])\.(\d+)")
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
MAX_LEMMA_WORDS = 4
# Words of grammar that WordNet also has as nouns (I: iodine, he: helium, are: 100 square metres, can: a tin, ...).
_GRAMMAR_WORDS = """
are can may might must will would shall should has had have was were been being does did done not now then than that
this these those there here who whom whose which what when where why how and but for nor yet our out off over under
his her hers him she they them their its you your yours one two three four five six seven eight nine ten all any some
few more most much many last first second third even just like well back down with into onto upon about above from
very too also only own same other another each every both either neither such per via day days time times way ways man
men woman women people person persons thing things make made take took get got let set put see
"""
_GRAMMAR = frozenset(_GRAMMAR_WORDS.split())
Indices = frozenset[int]


class Kinship:
    """The relations of synsets and concepts to the concepts of a pack; concepts are named by their index in `names`.

    Attributes:
        names: the pack's concepts, in its order.
        taxonomic: the pack's hierarchy is WordNet's, so that everything in the closure of a synset belongs to it.
        roots: for each concept its synsets, those that this WordNet has.
        unknown: synsets that the pack names and this WordNet lacks.
    """

    def __init__(self, pack: ConceptPack, wordnet: WordNet) -> None:
        self.pack, self.wordnet = pack, wordnet
        self.names = pack.names
        self._place = {name: index for index, name in enumerate(self.names)}
        found = [{name: _known(wordnet, name) for name in pack[concept].synsets} for concept in self.names]
        self.roots = [list(dict.fromkeys(name for name in each.values() if name)) for each in found]
        self.unknown = [name for each in found for name, known in each.items() if known is None]
        self._above = [frozenset(self._place[name] for name in pack.ancestors(concept)) for concept in self.names]
        self._below = [frozenset(self._place[name] for name in pack.descendants(concept)) for concept in self.names]
        self._of_root: dict[str, set[int]] = defaultdict(set)
        self._under: dict[str, set[int]] = defaultdict(set)
        for index, roots in enumerate(self.roots):
            for root in roots:
                self._of_root[root].add(index)
                for ancestor in wordnet.ancestors(root):
                    self._under[ancestor].add(index)
        self.taxonomic = self._follows_wordnet()
        self._reach: dict[str, Indices] = {}
        self._spoken: dict[str, Indices] = {}
        self._own_lemmas: dict[str, set[int]] = defaultdict(set)
        for index, concept in enumerate(self.names):
            for lemma in pack[concept].lemmas:
                self._own_lemmas[_key(lemma)].add(index)

    def _follows_wordnet(self) -> bool:
        """Whether every concept is one synset, and its parents' synsets are hypernyms of it."""
        for index, name in enumerate(self.names):
            if len(self.roots[index]) != 1:
                return False
            above = self.wordnet.ancestors(self.roots[index][0])
            if not all(above & set(self.roots[self._place[parent]]) for parent in self.pack.parents(name)):
                return False
        return True

    def siblings(self, index: int) -> list[int]:
        """Indices of the siblings of a concept."""
        return [self._place[name] for name in self.pack.siblings(self.names[index])]

    def sources(self, index: int) -> list[str]:
        """Synsets that texts of a concept are drawn from, sorted: its closure, or in other packs the listed synsets."""
        if not self.taxonomic:
            return sorted(self.roots[index])
        return sorted(frozenset().union(*(self.wordnet.closure(root) for root in self.roots[index])))

    def reach(self, synset: str) -> Indices:
        """Concepts whose closure in WordNet holds the synset, and all that the pack puts above these."""
        if synset not in self._reach:
            lineage = {synset, *self.wordnet.ancestors(synset)}
            self._reach[synset] = self._with_ancestors(set().union(*(self._of_root.get(s, ()) for s in lineage)))
        return self._reach[synset]

    def positives(self, synsets: Iterable[str], concepts: Iterable[int]) -> Indices:
        """Concepts that a text made from these synsets and concepts is a positive of."""
        owners = set(concepts)
        found: set[int] = set()
        for synset in synsets:
            if self.taxonomic:
                found |= self.reach(synset)
            owners |= self._of_root.get(synset, set())
        return frozenset(found | self._with_ancestors(owners))

    def unmarked(self, synsets: Iterable[str], concepts: Iterable[int]) -> Indices:
        """Concepts that such a text is no negative of: those below it, and in WordNet's view those above it."""
        found: set[int] = set()
        roots = set(synsets)
        for index in concepts:
            found |= self._below[index]
            roots.update(self.roots[index])
        for synset in roots:
            found |= self.reach(synset) | self._under.get(synset, set())
            for index in self._of_root.get(synset, ()):
                found |= self._below[index]
        return frozenset(found)

    def spoken_of(self, text: str) -> Indices:
        """Concepts that a word of the text names: its first noun sense, or a lemma of the pack, is of their closure."""
        words = [word.lower() for word in _WORD.findall(text)]
        found: set[int] = set()
        for start in range(len(words)):
            for end in range(start + 1, min(start + MAX_LEMMA_WORDS, len(words)) + 1):
                found |= self._names("_".join(words[start:end]))
        return frozenset(found)

    def _names(self, phrase: str) -> Indices:
        """Concepts that a phrase names, in singular or plural."""
        if phrase not in self._spoken:
            found: set[int] = set()
            for form in _singulars(phrase):
                if len(form) < 3 or form in _GRAMMAR:
                    continue
                senses = self.wordnet.synsets(form)
                found |= self.reach(senses[0].name) if senses else frozenset()
                found |= self._with_ancestors(self._own_lemmas.get(form, set()))
            self._spoken[phrase] = frozenset(found)
        return self._spoken[phrase]

    def _with_ancestors(self, indices: set[int]) -> Indices:
        return frozenset(indices.union(*(self._above[index] for index in indices)))


def _singulars(phrase: str) -> list[str]:
    """The phrase, and what it may be the plural of."""
    forms = [phrase]
    if phrase.endswith("ies"):
        forms.append(phrase[:-3] + "y")
    if phrase.endswith("es"):
        forms.append(phrase[:-2])
    if phrase.endswith("s") and not phrase.endswith("ss"):
        forms.append(phrase[:-1])
    return forms


def _key(lemma: str) -> str:
    return lemma.strip().lower().replace(" ", "_")


def _known(wordnet: WordNet, name: str) -> str | None:
    """The synset's own name, or None where this WordNet lacks it; packs invent synsets for what WordNet has not."""
    if match := _SENSE.fullmatch(name):
        senses = wordnet.synsets(match[1], match[2])
        number = int(match[3])
        return senses[number - 1].name if 1 <= number <= len(senses) else None
    try:
        return wordnet.synset(name).name
    except ConceptError:
        return None
