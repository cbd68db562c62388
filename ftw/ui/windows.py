"""Windows of a generation as they come: where each stands, its words, and the concepts above a threshold."""

import json
from collections import deque
from typing import Any

from rich.console import Console
from rich.text import Text

from ftw.hat.timeline import TokenReading, plain

WORDS = 32  # characters of a window's newest tokens that are shown


class LiveWindows:
    """Prints one line a window.

    Args:
        window: tokens of a window. threshold: probability from which a concept is told. as_json: for machines.
    """

    def __init__(self, *, window: int, threshold: float, as_json: bool = False, console: Console | None = None) -> None:
        self._window, self._threshold, self._as_json = window, threshold, as_json
        self._console = console or Console()
        self._tokens: deque[TokenReading] = deque(maxlen=window)
        self._was_prompt = False

    def add(self, reading: TokenReading) -> None:
        """The next token; a window is told at the token that it ends with."""
        if self._was_prompt and not reading.is_prompt:
            self._tokens.clear()  # windows are of the answer
        self._was_prompt = reading.is_prompt
        if self._tokens or not reading.is_special:  # the sink stands before the first window
            self._tokens.append(reading)
        if not reading.top and not reading.is_missing:
            return
        if self._as_json:
            print(json.dumps(self.record(), ensure_ascii=False), flush=True)
        else:
            self._console.print(self._line(), highlight=False)

    def record(self) -> dict[str, Any]:
        """The newest window: its first position, its end, its text and the concepts with their probabilities."""
        first, last = self._tokens[0], self._tokens[-1]
        record: dict[str, Any] = {
            "window_position": first.position,
            "window_end": last.position + 1,
            "text": "".join(token.token for token in self._tokens if not token.is_special),
            "concepts": {name: round(chance, 4) for name, chance in self._concepts()},
        }
        return record | ({"is_missing": True} if last.is_missing else {})

    def _concepts(self) -> list[tuple[str, float]]:
        strong = [(one.concept, one.probability) for one in self._tokens[-1].top if one.probability >= self._threshold]
        return sorted(strong, key=lambda one: -one[1])

    def _line(self) -> Text:
        words = plain("".join(token.token for token in self._tokens if not token.is_special))
        line = Text.assemble((f"{self._tokens[0].position:>5} ", "dim"), (words[-WORDS:].ljust(WORDS), "italic"), "  ")
        if self._tokens[-1].is_missing:
            return line.append("could not be read", "red")
        concepts = self._concepts()
        for name, chance in concepts:
            line.append(f"{name} ", "bold").append(f"{chance:.2f}  ")
        return line if concepts else line.append("–", "dim")
