"""The texts of a round: the bare term, templates, what the substrate writes, contrasts, and texts for tests.

Which template a concept gets is drawn by the hash of its name and the seed, each at most once, so that a concept's
contexts do not depend on which others are refined beside it. Templates for tests are never learnt from, and no text
that is learnt from is made of a definition: definitions are the test of a reader that is not told the word.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ftw.errors import DataError
from ftw.map.growing.entries import Entry
from ftw.map.growing.plan import STAGES, Plan
from ftw.map.growing.store import NAMED, GrowingEncyclopedia
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.sentences import CONTEXTS, OPPOSITIONS, TEST_CONTEXTS

# Of the sentences that nothing is learnt from: on the last four concepts are judged, on the others readers are tested.
TESTING, JUDGING = range(len(TEST_CONTEXTS) - 4), range(len(TEST_CONTEXTS) - 4, len(TEST_CONTEXTS))
MIN_UNNAMED_CHARACTERS = 12  # of a definition without the words for its concept


class Context(NamedTuple):
    """One text of a concept."""

    concept: int
    text: str
    group: str
    source: str


def table_of(growing: GrowingEncyclopedia, plan: Plan, written: Sequence[Context] = ()) -> SampleTable:
    """The sample table of a round.

    Args:
        written: texts that the substrate wrote for this plan.

    Raises:
        DataError: no concept gets a text.
    """
    makers = {0: _terms, 1: _templates, 3: _oppositions}
    contexts = list(written)
    if plan.split == "test":
        contexts = list(_tests(growing, plan))
    elif plan.split == "background":
        contexts = list(_unseen(growing, plan, JUDGING, "judging"))
    elif plan.stage in makers:
        contexts = [*makers[plan.stage](growing, plan), *contexts]
    touched = sorted({context.concept for context in contexts})
    if not touched:
        raise DataError(
            f"no concept gets a text at stage {plan.stage} ({STAGES[plan.stage]}); "
            f"there are {len(CONTEXTS)} templates and {len(OPPOSITIONS)} contrasts a concept"
        )
    builder = SampleTableBuilder([growing.concepts[index] for index in touched])
    for context in contexts:
        named = "1" if growing.entries[context.concept].names_itself(context.text) else "0"
        columns = {"stage": str(plan.stage), NAMED: named}
        row = builder.text(context.text, group=context.group, split=plan.split, source=context.source, columns=columns)
        builder.mark(row, growing.concepts[context.concept], 1)
    return builder.build()


def wanted(growing: GrowingEncyclopedia, plan: Plan) -> list[int]:
    """Indices of the concepts of a plan."""
    return list(range(len(growing))) if plan.concepts is None else plan.concepts


def draw(seed: int, name: str, num: int) -> np.ndarray:
    """An order of `num` things that belongs to a name and a seed."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(num)


def _terms(growing: GrowingEncyclopedia, plan: Plan) -> Iterator[Context]:
    for index in wanted(growing, plan):
        yield Context(index, growing.entries[index].term, "term", "term")


def _templates(growing: GrowingEncyclopedia, plan: Plan) -> Iterator[Context]:
    """The next templates of each concept's own order that it has not had."""
    had = _groups_had(growing, stage=1)
    for index in wanted(growing, plan):
        entry = growing.entries[index]
        order = [number for number in draw(plan.seed, entry.name, len(CONTEXTS)) if _group(number) not in had[index]]
        for number in order[: plan.contexts]:
            yield Context(index, fill(CONTEXTS[number], entry), _group(number), "template")


def templates_left(growing: GrowingEncyclopedia) -> np.ndarray:
    """How many templates each concept has not had, [N]."""
    had = _groups_had(growing, stage=1)
    return np.array([len(CONTEXTS) - len(had[index]) for index in range(len(growing))])


def _group(number: int) -> str:
    return f"template {number}"


def _groups_had(growing: GrowingEncyclopedia, stage: int) -> defaultdict[int, set[str]]:
    had: defaultdict[int, set[str]] = defaultdict(set)
    rows = growing.rows(stages=[stage])
    for concept, group in zip(rows.concept.tolist(), rows.groups, strict=True):
        had[concept].add(group)
    return had


def _oppositions(growing: GrowingEncyclopedia, plan: Plan) -> Iterator[Context]:
    """Sentences that set a concept against those it is confused with, one after the other."""
    for place, index in enumerate(wanted(growing, plan)):
        entry, others = growing.entries[index], (plan.against or [])[place : place + 1]
        for number, form in enumerate(draw(plan.seed, entry.name, len(OPPOSITIONS))[: plan.contexts]):
            if others and others[0]:
                other = growing.entries[others[0][number % len(others[0])]]
                text = fill(OPPOSITIONS[form].replace("{other}", _braced(other.phrase)), entry)
                yield Context(index, text, f"opposition {form}", "opposed")


def _tests(growing: GrowingEncyclopedia, plan: Plan) -> Iterator[Context]:
    """Templates kept for tests, the dictionary's examples, and definitions without the words for the concept."""
    yield from _unseen(growing, plan, TESTING, "template")
    for index in wanted(growing, plan):
        entry = growing.entries[index]
        for example in entry.examples:
            if entry.names_itself(example):
                yield Context(index, example, f"examples of {entry.name}", "example")
        definition = entry.masked(entry.definition)
        if len(definition) >= MIN_UNNAMED_CHARACTERS:
            yield Context(index, definition, f"definition of {entry.name}", "definition")


def _unseen(growing: GrowingEncyclopedia, plan: Plan, numbers: range, source: str) -> Iterator[Context]:
    """Sentences that nothing is learnt from."""
    for index in wanted(growing, plan):
        entry = growing.entries[index]
        for place in draw(plan.seed, entry.name, len(numbers))[: plan.contexts]:
            number = numbers[place]
            yield Context(index, fill(TEST_CONTEXTS[number], entry), f"test template {number}", source)


def fill(template: str, entry: Entry) -> str:
    """A template with the concept in its gap; a sentence begins with a capital."""
    text = template.format(entry.phrase)
    return text[:1].upper() + text[1:]


def _braced(words: str) -> str:
    """Words that go through `str.format` unharmed."""
    return words.replace("{", "{{").replace("}", "}}")
