"""A few concepts in words, and a growing encyclopedia of them on the tiny substrate."""

from pathlib import Path

from ftw.map.collect import CollectConfig
from ftw.map.growing.entries import Entry
from ftw.map.growing.rounds import bootstrap
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.substrate.model import Substrate

WORDS = ("heron", "wolf", "dog", "Lake Erie", "city", "anger")
LAYERS = (1, 3)


def entries(words: tuple[str, ...] = WORDS) -> list[Entry]:
    return [
        Entry(
            name=word,
            term=word,
            phrase=word if word[0].isupper() else f"the {word}",
            lemmas=(word,),
            definition=f"something that others call a {word} or worse",
            examples=(f"we met two of them, a {word} and another one", "it rained"),
        )
        for word in words
    ]


def capture() -> CollectConfig:
    return CollectConfig(
        layers=list(LAYERS), pools=["mean"], tokens_per_text={}, batch_tokens=256, precision="float32", shard_texts=4
    )


def started(folder: Path, substrate: Substrate, words: tuple[str, ...] = WORDS) -> GrowingEncyclopedia:
    """A growing encyclopedia after stage 0."""
    return bootstrap(folder, substrate, entries(words), capture(), progress=False)
