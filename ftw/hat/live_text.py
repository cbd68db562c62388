"""What is being written, read by the text lenses while it is written, and set against what is thought.

Every sequence has a window of its own. It is emptied at special tokens and where the answer begins, as in
`text_timeline`, so that the readings told live are those that a timeline gives afterwards.

Axes: N text lenses, A activation lenses, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from ftw.hat.readout import Readout, Told
from ftw.hat.text_embedding import AnyText
from ftw.hat.text_window import Window, open_window
from ftw.hat.timeline import Gap

CANDIDATES = 16  # of each kind: among their strongest, the largest differences are looked for


class LiveText:
    """Windows over the pieces of several sequences.

    Args:
        bank: the text lenses. tokens: of a window.
    """

    def __init__(self, bank: AnyText, *, tokens: int = 32) -> None:
        self.bank, self.tokens = bank, tokens
        self._windows: dict[int, Window] = {}
        self._was_prompt: dict[int, bool] = {}
        open_window(bank, tokens=tokens)  # refuses a window of no tokens before anything is generated
        self.num_failed, self.last_error = 0, ""

    def begin(self) -> None:
        """Forget the sequences before."""
        self._windows, self._was_prompt = {}, {}
        self.num_failed, self.last_error = 0, ""

    def push(self, row: int, piece: str, *, is_prompt: bool, is_special: bool) -> Tensor | None:
        """Logits after the next piece of a sequence, float32 [N]; None for a special token, which is no text."""
        window = self._windows.setdefault(row, open_window(self.bank, tokens=self.tokens))
        begins = self._was_prompt.get(row, False) and not is_prompt
        self._was_prompt[row] = is_prompt
        if is_special or begins:
            window.clear()
        if is_special:
            return None
        try:
            window.push(piece)
            return window.logits()
        except Exception as error:  # noqa: BLE001 (a generation must not die because a lens does)
            self.num_failed += 1
            self.last_error = f"{type(error).__name__}: {error}"
            window.clear()
            return None


@dataclass(kw_only=True, eq=False)
class Comparison:
    """Finds where the text lenses differ from the activation lenses at a token.

    Attributes:
        readout: of the text lenses. names: A activation lenses.
        by_percentile: both kinds have background; else probabilities are compared.
        top_k: differences told.
    """

    readout: Readout
    names: Sequence[str]
    by_percentile: bool
    top_k: int

    def __post_init__(self) -> None:
        place = {name: row for row, name in enumerate(self.names)}
        text = self.readout.lenses.names
        self._to_activation_N = torch.tensor([place.get(name, -1) for name in text], dtype=torch.long)
        self._to_text = {name: row for row, name in enumerate(text)}

    def candidates(self, logits_MN: Tensor) -> Tensor:
        """Activation lenses of the concepts that are written the most, [M, C]; -1 where one has no such lens."""
        return self._to_activation_N[self.readout.strongest(logits_MN, CANDIDATES)]

    def gaps(self, told: Told, logits_N: Tensor) -> list[Gap]:
        """The largest differences among the concepts that were read on the activation side."""
        thought = {self.names[cell.row]: cell for cell in told.cells if cell.logit == cell.logit}
        both = [(name, cell, self._to_text[name]) for name, cell in thought.items() if name in self._to_text]
        written = self.readout.cells(logits_N.numpy(), [row for _, _, row in both])
        of = attrgetter("percentile" if self.by_percentile else "probability")
        found = [Gap(name, of(a), of(t), of(a) - of(t)) for (name, a, _), t in zip(both, written, strict=True)]
        found = [gap for gap in found if gap.signed == gap.signed]
        return sorted(found, key=lambda gap: -abs(gap.signed))[: self.top_k]
