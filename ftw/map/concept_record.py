"""One concept, and the First Light record it is read from and written to.

A record says much that FTW has no use for (safety tags, training hints, provenance) and says it in forms that changed
over the years. What is used is checked for its type; all the rest is carried along untouched.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ftw.errors import ConceptError

MAX_LEVEL = 1000
MAX_NAME_LENGTH = 200
NAME_FIELDS = ("sumo_term", "term", "synset")  # today's layer files, the authoring form, the synset layer of old packs


@dataclass(kw_only=True, frozen=True)
class Concept:
    """A node of an ontology.

    Attributes:
        name: unique in its pack; "Name:level" where the pack's files repeat a name over levels.
        level: depth, 0 for roots; larger than that of the tree parent.
        parents: names; the first is the parent in the tree, the others make the hierarchy a DAG.
        definition, lemmas, synsets: what it means; empty where the record is silent.
        record: the source record; fields that FTW does not know live only here.
    """

    name: str
    level: int
    parents: list[str] = field(default_factory=list)
    definition: str = ""
    lemmas: list[str] = field(default_factory=list)
    synsets: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def term(self) -> str:
        """The name as the pack's files write it, without the level that tells namesakes apart."""
        plain = self.name.removesuffix(f":{self.level}")
        return plain if any(self.record.get(key) == plain for key in NAME_FIELDS) else self.name


def read_record(record: object, level: int, file: str) -> Concept:
    """The concept of a record in the file of a level; names are still the file's, namesakes not yet told apart.

    Raises:
        ConceptError: a field of the wrong type, or a name that no file system should see.
    """
    if not isinstance(record, dict):
        raise ConceptError(f"{file}: a concept must be an object with sumo_term, got {str(record)[:60]!r}")
    name = next((record[key] for key in NAME_FIELDS if key in record), None)
    if not isinstance(name, str):
        raise ConceptError(f"{file}: a concept without a name (sumo_term is {name!r}): {str(record)[:80]}")
    where = f"{file}: concept {name!r}"
    if fault := name_fault(name):
        raise ConceptError(f"{where}: its name {fault}; rename it in the pack")
    if type(given := record.get("layer", level)) is not int or given != level:
        raise ConceptError(f"{where}: its layer is {given!r}, but the file is that of layer {level}")
    return Concept(
        name=name,
        level=level,
        parents=_strings(record, "parent_concepts", where),
        definition=_string(record, "definition", where) or _string(record, "sumo_definition", where),
        lemmas=_strings(record, "lemmas", where),
        synsets=_strings(record, "synsets", where),
        record=record,
    )


def write_record(concept: Concept) -> dict[str, Any]:
    """The concept's record, with the fields that no longer say what the concept says brought up to date."""
    stale: dict[str, Any] = {}
    record = concept.record
    if not any(record.get(key) == concept.term for key in NAME_FIELDS):
        stale["sumo_term"] = concept.term
    if record.get("layer", concept.level if record else None) != concept.level:
        stale["layer"] = concept.level
    known = read_record({"sumo_term": concept.term, **record, **stale}, concept.level, "record")
    # The order of a record's parents is free: which of them is the tree parent stands in hierarchy.json alone.
    given, listed = _terms(concept.parents), _terms(known.parents)
    if not set(given[1:]) <= set(listed) <= set(given) or "parent_concepts" not in record:
        stale["parent_concepts"] = concept.parents
    for name in ("definition", "lemmas", "synsets"):
        if getattr(known, name) != getattr(concept, name):
            stale[name] = getattr(concept, name)
    return {**record, **stale} if stale else record


def trimmed_record(record: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """A record whose lists of children name only concepts of `kept`."""
    trimmed = dict(record)
    for key in ("category_children", "child_concepts", "split_children"):
        if isinstance(children := record.get(key), list):
            trimmed[key] = [child for child in children if child in kept]
    if "child_count" in record and "child_concepts" in trimmed:
        trimmed["child_count"] = len(trimmed["child_concepts"])
    return trimmed


def name_fault(name: str) -> str | None:
    """What makes a name unfit to be part of a path, a key or a table; None if nothing does."""
    if not name.strip() or name in (".", ".."):
        return "is empty or a dot"
    if len(name) > MAX_NAME_LENGTH:
        return f"has {len(name)} characters (at most {MAX_NAME_LENGTH})"
    if "/" in name or "\\" in name:
        return "holds a path separator"
    if not name.isprintable():  # control characters and lone surrogates, which no UTF-8 file can hold
        return "holds a character that cannot be printed"
    return None


def split_key(key: str) -> tuple[str, int | None]:
    """Term and level of a "Name:level" key; the level is None where there is none."""
    term, colon, level = key.rpartition(":")
    if colon and level.isascii() and level.isdigit() and len(level) <= len(str(MAX_LEVEL)):
        return term, int(level)
    return key, None


def _terms(names: Iterable[str]) -> list[str]:
    return [split_key(name)[0] for name in names]


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ConceptError(f"{where}: its {key} must be text, got {type(value).__name__} {str(value)[:60]!r}")
    return value or ""


def _strings(record: dict[str, Any], key: str, where: str) -> list[str]:
    value = record.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConceptError(f"{where}: its {key} must be a list of texts, got {str(value)[:60]!r}")
    return list(value)
