"""Texts that nearly repeat each other: found by MinHash, confirmed by Jaccard similarity, joined into groups.

Two texts are alike when they share most of their runs of one to three words. A split that puts such twins on both sides
measures memory instead of meaning, so they are put into one group, and splits go by group.

Source: Broder 1997, On the resemblance and containment of documents; the sketches and their index are datasketch's.
"""

import re
from collections.abc import Sequence
from typing import cast

from datasketch import MinHash, MinHashLSH
from rich.progress import track

from ftw.errors import DataError

WORDS = re.compile(r"\w+")
PERMUTATIONS = 128
LONGEST_RUN = 3
# The index must propose pairs a little below the similarity asked for: a sketch of 128 is off by up to 0.1.
INDEX_MARGIN = 0.1
# A bar for what takes more than two seconds.
LONG_JOB = 5000


def near_duplicate_groups(texts: Sequence[str], *, similarity: float = 0.7) -> list[int]:
    """Group of each text, named by the index of its first member; chains of near-duplicates are one group.

    Args:
        similarity: Jaccard similarity of the sets of word runs at which two texts are one; 0 to 1, 1 joins texts that
            differ in case and punctuation only.

    Raises:
        DataError: a similarity outside of its range.
    """
    if not 0 < similarity <= 1:
        raise DataError(f"near-duplicates at a similarity of {similarity}: it lies above 0 and is at most 1")
    runs = [word_runs(text) for text in texts]
    index = MinHashLSH(threshold=max(0.05, similarity - INDEX_MARGIN), num_perm=PERMUTATIONS)
    parent = list(range(len(texts)))
    sketches = MinHash.generator([list(each) for each in runs], num_perm=PERMUTATIONS, seed=1)
    for place, sketch in enumerate(
        track(sketches, "near-duplicates", total=len(texts), disable=len(texts) < LONG_JOB, transient=True)
    ):
        for other in cast("list[int]", index.query(sketch)):
            shared = len(runs[place] & runs[other])
            if shared >= similarity * (len(runs[place]) + len(runs[other]) - shared):
                join(parent, place, other)
        index.insert(place, sketch)
    return [root(parent, place) for place in range(len(texts))]


def word_runs(text: str) -> set[bytes]:
    """The runs of one to three words of a text, lower case; the text itself where it has no word."""
    words = WORDS.findall(text.lower())
    runs = {
        " ".join(words[start : start + length]).encode("utf-8", "surrogatepass")
        for length in range(1, LONGEST_RUN + 1)
        for start in range(len(words) - length + 1)
    }
    return runs or {text.encode("utf-8", "surrogatepass")}


def root(parent: list[int], place: int) -> int:
    """The first member of a place's group."""
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


def join(parent: list[int], one: int, other: int) -> None:
    """Make two groups one; the earlier first member names it."""
    first, second = sorted((root(parent, one), root(parent, other)))
    parent[second] = first
