"""Alarms and differences print whole, strongest first, and nothing from a model steers the terminal."""

import io
import re
from dataclasses import replace
from typing import Any

from rich.console import Console

from ftw.hat.timeline import Alarm, Gap, Reading, Timeline
from ftw.ui.terminal import token_style
from ftw.ui.watch import alarm_table, gap_table


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


class Differences:
    def thinks_not_writes(self, k: int = 10) -> list[Gap]:
        return [Gap("whale", 0.99, 0.1, 0.89)][:k]

    def writes_not_thinks(self, k: int = 10) -> list[Gap]:
        return [Gap("music\x1b[2J", 0.2, 0.9, -0.7), Gap("sea", 0.2, 0.4, -0.2)][:k]


def test_alarms_come_strongest_first_with_what_they_are_guarded_for(timeline: Timeline) -> None:
    readings = list(timeline.readings(1))
    assert alarm_table(readings) is None
    for t, percentile in ((4, 0.995), (6, 0.9999)):
        alarm = Alarm("animal", Reading("whale\x07", 1.0, 0.7, percentile))
        readings[t] = replace(readings[t], alarms=[alarm])
    text = printed(alarm_table(readings))
    assert text.index("99.99") < text.index("99.50")
    assert "whale· (below animal)" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert printed(alarm_table(readings, limit=1)).count("whale") == 1
    assert token_style(readings[4], {}).underline


def test_differences_run_from_thought_to_written() -> None:
    text = printed(gap_table(Differences()))
    assert text.index("whale") < text.index("sea") < text.index("music·")
    assert "+89" in text
    assert "−70" in text
