"""Labelled rows divided into train and test: by group, near-duplicates together, capped, all by hashes of the seed.

A division depends on the words of a row and the seed alone, so further rows or concepts hardly move the others.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftw.map.near_duplicates import join, near_duplicate_groups, root


@dataclass(slots=True)
class Row:
    """One usable line of a file; `label` is as read until it is encoded."""

    place: str
    concept: str
    text: str
    label: Any
    split: str | None
    group: str
    columns: dict[str, str]


def rank(seed: int, *words: str) -> bytes:
    """A place in a seeded order that depends on these words alone."""
    return hashlib.blake2b("\0".join([str(seed), *words]).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def divide(rows: list[Row], fraction: float, seed: int) -> None:
    """Put whole groups into test until each label has its share there; the rest is train."""
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row.group, [0, 0])[row.label] += 1
    total = [sum(size[label] for size in sizes.values()) for label in (0, 1)]
    wanted = [max(1, round(fraction * count)) for count in total]
    taken = [0, 0]
    test: set[str] = set()

    def take(group: str) -> None:
        test.add(group)
        for label in (0, 1):
            taken[label] += sizes[group][label]

    order = sorted(sizes, key=lambda group: rank(seed, group))
    # The rarer label first: groups that hold both would not fit any more once the other label has its share.
    for label in sorted((0, 1), key=lambda label: total[label]):
        holding = [group for group in order if sizes[group][label]]
        for group in holding:
            if group not in test and all(taken[each] + sizes[group][each] <= wanted[each] for each in (0, 1)):
                take(group)
        # Where every group is larger than the share: the smallest that leaves some for training.
        fitting = [group for group in holding if group not in test and sizes[group][label] < total[label]]
        if not taken[label] and fitting:
            take(min(fitting, key=lambda group: sum(sizes[group])))
    for row in rows:
        row.split = "test" if row.group in test else "train"


def chosen_places(rows: Sequence[Row], limits: Mapping[str, int], seed: int) -> set[str]:
    """Places of at most so many rows of each label and split ("": not divided yet), drawn by hash of the text."""
    parts: defaultdict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        parts[row.split or "", row.label].append(row)
    chosen: set[str] = set()
    for (split, _), part in parts.items():
        part.sort(key=lambda row: rank(seed, "cap", row.text))
        chosen.update(row.place for row in part[: limits.get(split, len(part))])
    return chosen


def join_near_duplicates(rows: list[Row], similarity: float) -> int:
    """Give near-duplicates one group, in place; groups that they connect become one. Returns how many there are."""
    parent = near_duplicate_groups([row.text for row in rows], similarity=similarity)
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        join(parent, place, first.setdefault(row.group, place))
    groups = [rows[root(parent, place)].group for place in range(len(rows))]
    for row, group in zip(rows, groups, strict=True):
        row.group = group
    return len(rows) - sum(count == 1 for count in Counter(parent).values())
