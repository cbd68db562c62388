"""A WordNet of any few synsets, written in Princeton's grammar."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ftw.map.wordnet import WordNet

# key -> (lemmas, keys of hypernyms, gloss). The key is the first lemma in lower case.
Nouns = Mapping[str, tuple[Sequence[str], Sequence[str], str]]
VERBS = {
    "move": (["move"], [], 'change place; "they went on very quietly"; "the dog moved away"'),
    "shine": (["shine"], [], 'be bright; "it was bright outside all morning"; "bright"'),
}


def write_wordnet(folder: Path, nouns: Nouns, senses: Mapping[str, Sequence[str]] | None = None) -> WordNet:
    """WordNet in `folder` with these nouns and two verbs; `senses` orders the senses of words that have several."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_part(folder, "noun", "n", nouns, senses or {})
    _write_part(folder, "verb", "v", VERBS, {})
    _write_part(folder, "adj", "a", {"able": (["able"], [], "having power")}, {})
    _write_part(folder, "adv", "r", {"ably": (["ably"], [], "with power")}, {})
    return WordNet.open(folder)


def _write_part(folder: Path, word: str, pos: str, synsets: Nouns, senses: Mapping[str, Sequence[str]]) -> None:
    """One data file and its index; the first pass finds the offsets, the second writes them."""
    offsets = dict.fromkeys(synsets, 0)
    below = {key: [other for other, row in synsets.items() if key in row[1]] for key in synsets}
    text = ""
    for _ in range(2):
        text = "  licence  \n"
        for key, (lemmas, above, gloss) in synsets.items():
            offsets[key] = len(text)
            pairs = [("@", other) for other in above] + [("~", other) for other in below[key]]
            words = " ".join(f"{lemma.replace(' ', '_')} 0" for lemma in lemmas)
            pointers = "".join(f"{symbol} {offsets[other]:08d} {pos} 0000 " for symbol, other in pairs)
            text += f"{offsets[key]:08d} 03 {pos} {len(lemmas):02x} {words} {len(pairs):03d} {pointers}| {gloss}  \n"
    (folder / f"data.{word}").write_text(text)
    index = "  licence  \n"
    for lemma in sorted({lemma.lower().replace(" ", "_") for lemmas, _, _ in synsets.values() for lemma in lemmas}):
        keys = senses.get(lemma) or [
            key for key, row in synsets.items() if lemma in (word.lower().replace(" ", "_") for word in row[0])
        ]
        places = " ".join(f"{offsets[key]:08d}" for key in keys)
        index += f"{lemma} {pos} {len(keys)} 0 {len(keys)} 0 {places}  \n"
    (folder / f"index.{word}").write_text(index)
