"""The table of an encyclopedia's samples: what a reader of states learns from, or is tested on.

Axes: S rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples: each is one text as a positive of one concept.

    Attributes:
        concept: S indices into `GrowingEncyclopedia.concepts`. stage: S stages of the texts.
        groups: S names of the template (or kind of prompt, or article) a text came from; splits go by these.
        texts: S texts. sources: S words for their make (term, template, written, opposed, definition, ...).
        named: S bools, whether the text holds a word for the concept.
        rounds, text_rows: S, where the states lie: the round, and the text's row in it.
    """

    concept: np.ndarray
    stage: np.ndarray
    groups: list[str]
    texts: list[str]
    sources: list[str]
    named: np.ndarray
    rounds: np.ndarray
    text_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.concept)

    def take(self, index: np.ndarray) -> "Rows":
        """Some of the rows, by index or by a mask."""
        index = np.flatnonzero(index) if np.asarray(index).dtype == bool else np.asarray(index, dtype=np.int64)
        return Rows(
            self.concept[index],
            self.stage[index],
            [self.groups[row] for row in index],
            [self.texts[row] for row in index],
            [self.sources[row] for row in index],
            self.named[index],
            self.rounds[index],
            self.text_rows[index],
        )

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Several tables one after another."""
        none = np.zeros(0, dtype=np.int32)
        empty = cls(none, none.astype(np.int8), [], [], [], none.astype(bool), none, none)
        every = [empty, *parts]
        return cls(
            np.concatenate([part.concept for part in every]),
            np.concatenate([part.stage for part in every]),
            [word for part in every for word in part.groups],
            [word for part in every for word in part.texts],
            [word for part in every for word in part.sources],
            np.concatenate([part.named for part in every]),
            np.concatenate([part.rounds for part in every]),
            np.concatenate([part.text_rows for part in every]),
        )
