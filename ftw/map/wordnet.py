"""WordNet read from Princeton's own files, fast and without a package in between.

Opening costs nothing; a part of speech is indexed when it is first asked for, a synset parsed when it is first met.
Names are those that NLTK made common: `dog.n.01` is the first noun sense of "dog". The files' grammar is in wndb(5WN)
(Princeton University, "WordNet 3.0", 2006; Miller, "WordNet: a lexical database for English", 1995).
"""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ftw.errors import ConceptError, SourceError

SENSE_DIGITS = {"n": "1", "v": "2", "a": "35", "s": "35", "r": "4"}  # of index.sense; 5 are satellites
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}

# The lexicographer files, in the order of the numbers in data.* (lexnames(5WN)); the npm tarball leaves the list out.
_LEXNAMES = """
    adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition
    noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person
    noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state
    noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
    verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative
    verb.weather adj.ppl
"""
LEXNAMES = tuple(_LEXNAMES.split())

_OFFSET_NAME = re.compile(r"(\d{8})[.-]([nvasr])")  # First Light also writes a synset as 00015388.n
_SENSE_NAME = re.compile(r"(.+)\.([nvasr])\.(\d{1,4})")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand; part of the word field of data.adj
_EXAMPLES = re.compile(r'(?:^|[;:]\s*)"')  # a quotation inside the definition follows a word, an example a semicolon


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning and the words that share it.

    Attributes:
        name: first lemma in lower case (with underscores), part of speech, sense number: "dog.n.01".
        offset: byte offset in the data file.
        pos: n, v, a, s (satellite adjective) or r.
        lemmas: words as WordNet writes them, with spaces: "Great Dane".
        definition, examples: the gloss, split where the quoted examples begin.
        hypernyms, hyponyms: names of the synsets directly above and below, instances included.
        antonyms: names of the synsets that hold an antonym of one of the lemmas.
        lexname: lexicographer file, "noun.animal".
    """

    name: str
    offset: int
    pos: str
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]
    hyponyms: tuple[str, ...]
    antonyms: tuple[str, ...]
    lexname: str


class WordNet:
    """All synsets of a folder of Princeton files, by name, by lemma, and along the hypernym links."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, _Part] = {}
        self._synsets: dict[str, Synset] = {}
        self._closures: dict[str, frozenset[str]] = {}
        self._ancestors: dict[str, frozenset[str]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "WordNet":
        """WordNet in `folder`, or in the first folder at most three levels below it that has a `data.noun`.

        Raises:
            SourceError: there is none.
        """
        for pattern in ("data.noun", "*/data.noun", "*/*/data.noun", "*/*/*/data.noun"):
            if found := sorted(Path(folder).glob(pattern)):
                return cls(found[0].parent)
        raise SourceError(
            f"no WordNet in {folder}: found no file data.noun there or up to three folders below; "
            "give the folder of Princeton's dict files (data.noun, index.noun, data.verb, ...)"
        )

    def synset(self, name: str) -> Synset:
        """The synset of a name such as "dog.n.01" (any of its lemmas serves) or an offset such as "02084071.n".

        Raises:
            ConceptError: no such synset; the message names the nearest ones.
        """
        if name not in self._synsets:
            part, offset = self._locate(name)
            found = part.parse(offset)
            self._synsets[name] = self._synsets.setdefault(found.name, found)
        return self._synsets[name]

    def synsets(self, lemma: str, pos: str = "n") -> list[Synset]:
        """Senses of a word, most frequent first; empty if WordNet lacks the word. Spaces or underscores, any case."""
        return [self.synset(name) for name in self.senses(lemma, pos)]

    def senses(self, lemma: str, pos: str = "n") -> list[str]:
        """Names of the senses of a word, most frequent first, without parsing them."""
        part = self._part(pos)
        return [part.names[offset] for offset in part.index.get(_key(lemma), ())]

    def tag_counts(self, pos: str = "n") -> Counter[str]:
        """How often each synset was met in the texts that WordNet's authors tagged by hand; 0 for most.

        Raises:
            SourceError: `index.sense` is missing or damaged.
        """
        part, digit, file = self._part(pos), SENSE_DIGITS[pos], self.folder / "index.sense"
        counts: Counter[str] = Counter()
        for number, line in enumerate(_read(file).splitlines(), start=1):
            try:
                sense, offset, _, count = line.split(" ")
                if sense.partition("%")[2][0] in digit and count != "0":
                    counts[part.names[int(offset)]] += int(count)
            except (ValueError, IndexError, KeyError) as error:
                raise _damaged(file, number, error) from error
        return counts

    def names(self, pos: str = "n") -> list[str]:
        """Names of all synsets of a part of speech, in the order of the file."""
        return list(self._part(pos).names.values())

    def closure(self, name: str) -> frozenset[str]:
        """Names of the synset itself and of everything below it (hyponyms and instances)."""
        start = self.synset(name).name
        if start not in self._closures:
            self._closures[start] = frozenset(self._reach(start, "hyponyms"))
        return self._closures[start]

    def ancestors(self, name: str) -> frozenset[str]:
        """Names of everything above the synset, along all paths; the synset itself is not among them."""
        start = self.synset(name).name
        if start not in self._ancestors:
            self._ancestors[start] = frozenset(self._reach(start, "hypernyms").keys() - {start})
        return self._ancestors[start]

    def distances_up(self, name: str) -> dict[str, int]:
        """Number of hypernym links on the shortest way to each ancestor; 0 for the synset itself."""
        return self._reach(self.synset(name).name, "hypernyms")

    def distances_down(self, name: str) -> dict[str, int]:
        """Number of hyponym links on the shortest way to each synset of the closure; 0 for the synset itself."""
        return self._reach(self.synset(name).name, "hyponyms")

    def _reach(self, start: str, links: str) -> dict[str, int]:
        """Breadth-first distances from a synset along `links`; a visited synset is never entered again."""
        distances = {start: 0}
        frontier = [start]
        while frontier:
            found = []
            for name in frontier:
                for other in getattr(self.synset(name), links):
                    if other not in distances:
                        distances[other] = distances[name] + 1
                        found.append(other)
            frontier = found
        return distances

    def _part(self, pos: str) -> "_Part":
        if pos not in "nvasr" or len(pos) != 1:
            raise ConceptError(f"unknown part of speech {pos!r}; WordNet has n, v, a (or s) and r")
        pos = "a" if pos == "s" else pos  # satellites stand in the adjective file and share its sense numbers
        if pos not in self._parts:
            self._parts[pos] = _Part(self.folder, pos)
        return self._parts[pos]

    def _locate(self, name: str) -> tuple["_Part", int]:
        """Part of speech and offset of a synset's name."""
        if match := _OFFSET_NAME.fullmatch(name):
            part, offset = self._part(match[2]), int(match[1])
            if offset in part.names:
                return part, offset
            raise ConceptError(f"no synset begins at byte {offset} of {part.data_file}; is {name!r} of WordNet 3.0?")
        if not (match := _SENSE_NAME.fullmatch(name)):
            raise ConceptError(f"{name!r} does not name a synset; write lemma.pos.number, such as dog.n.01")
        part, lemma, sense = self._part(match[2]), _key(match[1]), int(match[3])
        offsets = part.index.get(lemma, ())
        if 1 <= sense <= len(offsets):
            return part, offsets[sense - 1]
        if offsets:
            known = [
                f"{lemma}.{match[2]}.{n:02d} ({part.parse(at).definition[:60]})" for n, at in enumerate(offsets, 1)
            ]
            raise ConceptError(f"no synset {name!r}; {match[1]!r} has {len(offsets)} senses: {'; '.join(known)}")
        nearest = [f"{word}.{match[2]}.01" for word in part.closest(lemma)]
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ConceptError(f"no synset {name!r}: WordNet has no {FILES[part.pos]} {match[1]!r}{hint}")


class _Part:
    """One part of speech: the data file as text, the index (word → offsets by sense), and names by offset."""

    def __init__(self, folder: Path, pos: str) -> None:
        self.pos = pos
        self.data_file, self.index_file = folder / f"data.{FILES[pos]}", folder / f"index.{FILES[pos]}"
        self.text = _read(self.data_file)
        self.index = self._read_index()
        self.names = self._read_names()
        for offsets in self.index.values():
            for offset in offsets:
                if offset not in self.names:
                    raise SourceError(
                        f"{self.data_file} has no synset at byte {offset}, which {self.index_file.name} lists; "
                        f"it ends at line {self.text.count(chr(10))}: the file is cut short or of another version, "
                        "fetch it again"
                    )

    def _read_index(self) -> dict[str, tuple[int, ...]]:
        index = {}
        for number, line in enumerate(_read(self.index_file).splitlines(), start=1):
            if line.startswith(" "):  # the licence
                continue
            fields = line.split()
            try:
                index[fields[0]] = tuple(map(int, fields[-int(fields[2]) :]))
            except (ValueError, IndexError) as error:
                raise _damaged(self.index_file, number, error) from error
        return index

    def _read_names(self) -> dict[int, str]:
        """Name of every synset: its first word, and which sense of that word it is."""
        names, position = {}, 0
        for number, line in enumerate(self.text.splitlines(), start=1):
            if not line.startswith(" "):
                try:
                    offset, _, pos, _, word, _ = line.split(" ", 5)
                    if int(offset) != position:
                        raise ValueError(f"offset {offset} stands at byte {position}")
                    lemma = _MARKER.sub("", word.lower())
                    names[position] = f"{lemma}.{pos}.{self.index[lemma].index(position) + 1:02d}"
                except (ValueError, KeyError) as error:
                    raise _damaged(self.data_file, number, error) from error
            position += len(line) + 1
        return names

    def parse(self, offset: int) -> Synset:
        """The synset whose line begins at byte `offset`."""
        try:
            return self._parse(self.text[offset : self.text.index("\n", offset)])
        except (ValueError, IndexError, KeyError) as error:
            raise _damaged(self.data_file, self.text.count("\n", 0, offset) + 1, error) from error

    def _parse(self, line: str) -> Synset:
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words_end = 4 + 2 * int(fields[3], 16)
        words = fields[4:words_end:2] if self.pos != "a" else [_MARKER.sub("", word) for word in fields[4:words_end:2]]
        pointers_end = words_end + 1 + 4 * int(fields[words_end])
        above, below, opposite = [], [], []
        for at in range(words_end + 1, pointers_end, 4):
            symbol = fields[at]
            if symbol in ("@", "@i"):
                above.append(self.names[int(fields[at + 1])])
            elif symbol in ("~", "~i"):
                below.append(self.names[int(fields[at + 1])])
            elif symbol == "!":
                opposite.append(self.names[int(fields[at + 1])])
        definition, examples = split_gloss(gloss)
        offset = int(fields[0])
        return Synset(
            self.names[offset],
            offset,
            fields[2],
            tuple([word.replace("_", " ") for word in words]),  # a list first: faster, and there are 117,000
            definition,
            examples,
            tuple(above),
            tuple(below),
            tuple(dict.fromkeys(opposite)),
            LEXNAMES[int(fields[1])],
        )

    def closest(self, lemma: str) -> list[str]:
        """Words spelt like `lemma`. Only those of like length and first letter are compared: 117,000 take seconds."""
        near = [word for word in self.index if word[:1] == lemma[:1] and abs(len(word) - len(lemma)) <= 2]
        return difflib.get_close_matches(lemma, near, n=4)


def split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Definition and quoted examples of a gloss; quotation marks inside the definition stay there."""
    gloss = gloss.strip()
    start = _EXAMPLES.search(gloss)
    if start is None:
        return gloss.rstrip("; "), ()
    quoted = gloss[start.end() - 1 :]
    examples = re.findall(r'"([^"]+)(?:"|$)', quoted)
    return gloss[: start.start()].rstrip("; "), tuple(text.strip() for text in examples if text.strip(" ;:,."))


def _key(lemma: str) -> str:
    return lemma.strip().lower().replace(" ", "_")


def _read(file: Path) -> str:
    """Text of a whole file, one character a byte, so that byte offsets are indices (WordNet 3.0 is pure ASCII)."""
    try:
        text = file.read_bytes().decode("latin-1")
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}; WordNet needs data.* and index.* together") from error
    if not text.endswith("\n"):
        raise SourceError(f"{file} is cut short in line {text.count(chr(10)) + 1}; fetch it again")
    return text


def _damaged(file: Path, line: int, error: Exception) -> SourceError:
    return SourceError(f"{file}, line {line} is damaged ({error!r}); fetch WordNet again")
