"""What a growing encyclopedia knows of each concept beside its states: how it is called, and what it means.

In a sentence a concept is called by a word of which it is the most frequent sense, since that is how readers, models
included, take the word. The definition is kept for tests alone; no context that is learnt from is made of it.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ftw.errors import ConceptError, EncyclopediaError
from ftw.map.concept import ConceptPack
from ftw.map.concept_record import name_fault
from ftw.map.sentences import familiar_lemma, with_article
from ftw.map.wordnet import WordNet
from ftw.paths import replace_file

MAX_ENTRIES = 1_000_000
MAX_BYTES = 2_000_000_000  # of all entries, unpacked
MASK = "this"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One concept in words.

    Attributes:
        name: of the concept. term: the word alone, "heron". phrase: in a sentence, "the heron".
        lemmas: all words for it. definition, examples: of the dictionary, "" and () where it has none.
        parent: name of the concept above it, "" for a root. synset: of WordNet, "" without.
    """

    name: str
    term: str
    phrase: str
    lemmas: tuple[str, ...] = ()
    definition: str = ""
    examples: tuple[str, ...] = ()
    parent: str = ""
    synset: str = ""

    def names_itself(self, text: str) -> bool:
        """Whether a text holds one of the words for the concept, in singular or plural."""
        return self._pattern().search(text) is not None

    def masked(self, text: str) -> str:
        """The text with every word for the concept, and the article before it, replaced by "this"."""
        return re.sub(rf"\b(?:the |an? )?{self._pattern().pattern}", MASK, text, flags=re.IGNORECASE)

    def _pattern(self) -> re.Pattern[str]:
        words = sorted({self.term, *self.lemmas}, key=lambda word: (-len(word), word))
        stems = "|".join(_inflected(word) for word in words if word)
        return re.compile(rf"(?<!\w)(?:{stems})(?!\w)", re.IGNORECASE)


def _inflected(word: str) -> str:
    """A pattern of a word and its regular plural; its parts may be joined by a space or a hyphen."""
    stem = r"[\s-]+".join(re.escape(part) for part in re.split(r"[\s_-]+", word.strip()) if part)
    return f"(?:{stem[:-1]}(?:y|ies))" if word.endswith("y") else f"(?:{stem}(?:e?s)?)"


def entries_of(pack: ConceptPack, wordnet: WordNet | None = None) -> list[Entry]:
    """The entries of a concept pack, in its order.

    Args:
        wordnet: tells, for concepts with a synset, which of its words is the most familiar.

    Raises:
        ConceptError: no concepts.
    """
    if not len(pack):
        raise ConceptError(f"concept pack {pack.pack_id!r} has no concepts; nothing can be looked up in it")
    found = []
    for name, concept in pack.concepts.items():
        synset = concept.synsets[0] if len(concept.synsets) == 1 else ""
        if wordnet is not None and synset:
            known = wordnet.synset(synset)
            term = familiar_lemma(wordnet, known)
            phrase, examples = with_article(term, known.pos), known.examples
        else:
            term = concept.lemmas[0] if concept.lemmas else _spoken(concept.term)
            phrase, examples = term, ()
        parents = pack.parents(name)
        found.append(
            Entry(
                name=name,
                term=term,
                phrase=phrase,
                lemmas=tuple(concept.lemmas),
                definition=concept.definition,
                examples=tuple(examples),
                parent=parents[0] if parents else "",
                synset=synset,
            )
        )
    return found


def _spoken(name: str) -> str:
    """A name of an ontology as words: CorpuscularObject is "corpuscular object"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " "))
    return spaced if spaced == name else spaced.lower()


def check_entries(entries: Sequence[Entry]) -> None:
    """Raise ConceptError for no entries, a name twice, a name unfit for a table, or an empty term."""
    if not entries:
        raise ConceptError("no concepts; give concepts=wordnet concepts.num=500, or concepts=pack concepts.path=FOLDER")
    if len(entries) > MAX_ENTRIES:
        raise ConceptError(f"{len(entries):,} concepts; at most {MAX_ENTRIES:,} fit into one encyclopedia")
    if twice := [name for name, num in Counter(entry.name for entry in entries).items() if num > 1]:
        raise ConceptError(f"concept {twice[0]!r} is given twice ({len(twice)} such names); names must be unique")
    for entry in entries:
        if fault := name_fault(entry.name):
            raise ConceptError(f"concept {entry.name!r}: its name {fault}; rename it")
        if not entry.term.strip():
            raise ConceptError(f"concept {entry.name!r} has no word for itself; give it a lemma, or leave it out")


def write_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Write entries as gzipped JSON lines, whole or not at all; equal entries give equal bytes."""
    lines = "".join(json.dumps(_record(entry), ensure_ascii=False) + "\n" for entry in entries)
    with replace_file(path) as temporary:
        temporary.write_bytes(gzip.compress(lines.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0))


def _record(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value}


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        EncyclopediaError: it cannot be read, or holds something else.
    """
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise EncyclopediaError(f"{path} unpacks to over {MAX_BYTES:,} bytes; it is no list of concepts")
        found = [_entry(json.loads(line)) for line in content.decode("utf-8", "surrogatepass").splitlines() if line]
        check_entries(found)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, ConceptError, RecursionError) as error:
        raise EncyclopediaError(f"{path} is no list of concepts ({error}); restore it, or bootstrap anew") from error
    return found


def _entry(record: Any) -> Entry:
    if not isinstance(record, dict):
        raise ValueError(f"a line is {type(record).__name__}, not an object")
    values: dict[str, Any] = {}
    for field in fields(Entry):
        if field.name not in record:
            continue
        value = record[field.name]
        if field.name in ("lemmas", "examples"):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{field.name} is no list of texts")
            value = tuple(value)
        elif not isinstance(value, str):
            raise ValueError(f"{field.name} is no text")
        values[field.name] = value
    return Entry(**values)
