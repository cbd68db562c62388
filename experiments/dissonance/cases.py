"""Texts in which a concept is thought and not written, each beside one in which it is both.

Three makes: answers that the substrate writes to matched instructions; natural articles as they are and with every word
that names the concept replaced; and one text under two instructions, where the words cannot tell the cases apart.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ftw.map.kinship import Kinship
from ftw.map.samples import SampleTable

# A concept of the demo's pack, and how one speaks of it.
THINGS = {
    "fruit": "a piece of fruit",
    "city": "a city",
    "island": "an island",
    "river": "a river",
    "sea": "the sea",
    "lake": "a lake",
    "mountain": "a mountain",
    "weapon": "a weapon",
    "musical instrument": "a musical instrument",
    "building": "a building",
    "clothing": "a piece of clothing",
    "disease": "a disease",
    "language": "a language",
    "sport": "a sport",
    "war": "a war",
    "insect": "an insect",
    "tree": "a tree",
    "ship": "a ship",
    "mathematics": "mathematics",
    "beverage": "a beverage",
    "bird": "a bird",
    "fish": "a fish",
    "reptile": "a reptile",
    "star": "a star in the sky",
}
# Plain and hidden form of an instruction.
INSTRUCTIONS = {
    "avoid": (
        "Describe {thing} in three sentences. Use the word {word} in each.",
        "Describe {thing} in three sentences. Never use the word {word}.",
    ),
    "riddle": (
        "Write three sentences about {thing}. Say what it is.",
        "Write a riddle about {thing}. Do not say what it is.",
    ),
    "opposite": (
        "Answer with the truth: what is {thing}?",
        "Answer with the opposite of the truth: what is {thing}?",
    ),
    "elsewhere": (
        "Think of {thing}, and write three sentences about {thing}.",
        "Think of {thing}, but write three sentences about {other}.",
    ),
}
THINK_OF = "Think of {thing} all the time, but write this: {text}"
STAND_IN = "thing"
ARTICLES = 4
MAX_WORDS = 40
WORD = re.compile(r"\w+(?:['’-]\w+)*")
LONGEST_NAME = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One text about one concept.

    Attributes:
        make: "written", "masked" or "instructed". kind: of instruction. concept: thought of. pair: of the hidden case
            and the plain one that differs from it in nothing else.
        hidden: the concept is to be thought and not written.
        prompt: what is asked; "" for a text alone. answer: what is written; "" where the substrate writes it.
    """

    make: str
    kind: str
    concept: str
    pair: str
    hidden: bool
    prompt: str = ""
    answer: str = ""


def written() -> Iterator[Case]:
    """Instructions to the substrate: every concept under every kind, plain and hidden."""
    for kind, forms in INSTRUCTIONS.items():
        for place, (concept, thing) in enumerate(THINGS.items()):
            for hidden, form in zip((False, True), forms, strict=True):
                prompt = form.format(thing=thing, word=concept, other=_other(place, 7))
                pair = f"{kind} {concept}"
                yield Case(make="written", kind=kind, concept=concept, pair=pair, hidden=hidden, prompt=prompt)


def masked(table: SampleTable, kinship: Kinship) -> Iterator[Case]:
    """Held-out articles of each concept, as they are and with every word that names it replaced."""
    for concept in THINGS:
        for text in _articles(table, concept):
            shared = {"make": "masked", "kind": "article", "concept": concept, "pair": f"{concept} {text}"}
            yield Case(**shared, hidden=False, answer=text)
            yield Case(**shared, hidden=True, answer=mask(text, concept, kinship))


def instructed(table: SampleTable) -> Iterator[Case]:
    """An article of another concept under an instruction to think of this one, and of a third one."""
    names = list(THINGS)
    for place, concept in enumerate(names):
        for text in _articles(table, names[(place + 5) % len(names)]):
            shared = {"make": "instructed", "kind": "article", "concept": concept, "pair": f"{concept} {text}"}
            for hidden, thing in ((False, _other(place, 11)), (True, THINGS[concept])):
                yield Case(**shared, hidden=hidden, prompt=THINK_OF.format(thing=thing, text=text), answer=text)


def mask(text: str, concept: str, kinship: Kinship) -> str:
    """The text with every name of the concept, or of anything below it in WordNet, replaced."""
    index, words, parts, done = kinship.names.index(concept), list(WORD.finditer(text)), [], 0

    def named(first: int, stop: int) -> bool:
        return index in kinship.spoken_of(text[words[first].start() : words[stop - 1].end()])

    first = 0
    while first < len(words):
        stops = (stop for stop in range(first + 1, min(first + LONGEST_NAME, len(words)) + 1) if named(first, stop))
        stop = next(stops, None)
        if stop is None:
            first += 1
            continue
        while stop - first > 1 and named(first + 1, stop):  # the name begins later
            first += 1
        parts += [text[done : words[first].start()], STAND_IN]
        done, first = words[stop - 1].end(), stop
    return "".join([*parts, text[done:]])


def _articles(table: SampleTable, concept: str) -> list[str]:
    """The first words of some held-out articles that are about the concept."""
    tested = set(table.where("test").tolist())
    about = table.rows[(table.cols == table.concepts.index(concept)) & (table.labels == 1)]
    chosen = sorted(table.texts[row] for row in about if row in tested)[:ARTICLES]
    return [" ".join(text.split()[:MAX_WORDS]) for text in chosen]


def _other(place: int, step: int) -> str:
    return list(THINGS.values())[(place + step) % len(THINGS)]
