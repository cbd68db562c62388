"""Tables and tokens print whole on any terminal, and nothing from a model reaches it but text."""

import contextlib
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ftw.hat.timeline import Timeline
from ftw.ui.colours import concept_colours
from ftw.ui.steps import steps
from ftw.ui.terminal import (
    LiveTokens,
    answer_table,
    evaluation_table,
    legend,
    short_path,
    sparkline,
    token_text,
)


def printed(*renderables: Any, width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_best_come_first_and_means_last(evaluation: Any) -> None:
    lines = printed(evaluation_table(evaluation, limit=99)).splitlines()
    figures = [float(found[1]) for line in lines if (found := re.match(r" ?\s*\S.*?\s(0\.\d{3}) ", line))]
    assert figures[:-1] == sorted(figures[:-1], reverse=True)
    assert figures[-1] == 0.9
    assert any(line.lstrip().startswith("mean") for line in lines)


def test_long_tables_show_both_ends_and_where_the_rest_is(evaluation: Any) -> None:
    text = printed(evaluation_table(evaluation, where="runs/latest/metrics.json"))
    assert "… 11 more" in text
    assert "All 51 concepts: runs/latest/metrics.json" in text
    assert "concept 4 " in text  # without figures, last


def test_lenses_no_better_than_a_control_are_marked(evaluation: Any) -> None:
    text = printed(evaluation_table(evaluation))
    assert "concept 3 *ts" in text
    assert "1 of 51 lenses are no better than a control" in text
    assert "one note" in text


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 140])
def test_no_line_is_wider_than_the_terminal(evaluation: Any, timeline: Timeline, width: int) -> None:
    text = printed(evaluation_table(evaluation), answer_table(timeline, width=width), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "AUROC" in text


def test_a_path_is_shown_as_far_as_there_is_room() -> None:
    path = ["Living", "Animal", "Mammal", "Whale"]
    shown = {width: short_path(path, width).plain for width in (60, 29, 20, 9, 1)}
    assert shown[60] == "Living › Animal › Mammal › Whale"
    assert shown[29] == "Living › … › Mammal › Whale"
    assert shown[20] == "Living › … › Whale"
    assert shown[9] == shown[1] == "Whale"
    assert short_path(["Whale"], 3).plain == "Whale"


@pytest.mark.parametrize("width", [24, 60, 80, 100, 140])
def test_paths_do_not_break_the_table(timeline: Timeline, width: int) -> None:
    paths = {"whale": ["LivingThings", "Organism", "Animal", "Mammal", "AquaticMammal", "whale"]}
    lines = printed(answer_table(timeline, width=width, paths=paths), width=width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert sum("whale" in line for line in lines) == 1
    assert any("AquaticMammal › whale" in line for line in lines) == (width >= 100)


def test_without_a_terminal_there_are_no_control_codes(evaluation: Any, timeline: Timeline) -> None:
    colours = concept_colours(timeline.concepts)
    text = printed(evaluation_table(evaluation), token_text(timeline), legend({"whale": 3}, colours))
    assert "\x1b" not in text
    assert "whale" in text


def test_no_color_is_honoured(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*(38|48|3[0-7]|4[0-7])[;m]", printed(token_text(timeline), force_terminal=True))


def test_tokens_stand_on_their_concepts_colour(timeline: Timeline) -> None:
    colours = concept_colours(timeline.concepts)
    text = token_text(timeline, colours)
    shown = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert shown[" Whales"].bgcolor.name == colours["whale"].dark
    assert shown[" sing"].bgcolor.name == colours["music"].dark
    assert shown[" me"].dim
    assert "<|im_start|>" not in text.plain


def test_a_stream_of_readings_gives_the_same_text(timeline: Timeline) -> None:
    assert token_text(timeline.readings(3)) == token_text(timeline)


def test_hostile_tokens_cannot_steer_the_terminal(timeline: Timeline) -> None:
    console = Console(file=io.StringIO(), width=80)
    with LiveTokens(colours=concept_colours(timeline.concepts), console=console) as live:
        for reading in timeline.readings(3):
            live.add(reading)
        live.finish(timeline, note="lenses 3 %")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert "</script>·[2J·" in text
    assert "8 tokens · 20.0 ms a token · lenses 3 %" in text


def test_live_tokens_print_the_answer_word_by_word(timeline: Timeline) -> None:
    words = ["The", " whale", " swims", " slowly", "\n", " far", " away"]
    console = Console(file=io.StringIO(), width=12)
    reading = next(iter(timeline.readings(1)))
    with LiveTokens(colours={}, console=console) as live:
        for word in words:
            live.add(replace(reading, token=word, is_special=False, is_prompt=False, top=()))
    assert console.file.getvalue() == "The whale\nswims slowly\nfar away\n"  # type: ignore[attr-defined]


def test_the_generation_may_end_before_the_first_token() -> None:
    console = Console(file=io.StringIO())
    with LiveTokens(colours={}, console=console) as live:
        live.finish()
    assert "0 tokens" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sparkline_keeps_the_peaks(timeline: Timeline) -> None:
    surprise_T = timeline.surprise_TN[:, 0]
    assert sparkline(surprise_T, 100)[4] == "█"
    assert len(sparkline(surprise_T, 5)) == 5
    assert "█" in sparkline(surprise_T, 2)
    assert sparkline(surprise_T[:0], 8).strip() == ""


def test_steps_tell_their_time_and_notes() -> None:
    console = Console(file=io.StringIO(), width=80)
    run = steps(total=2, console=console)
    with run.step("Collect states") as step:
        step.advance(total=3)
        step.note("3 texts")
    with pytest.raises(ValueError, match="broken"), run.step("Train"):
        raise ValueError("broken")
    console.print(run.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert re.search(r"1/2  Collect states\n.*✓ 0\.\d s · 3 texts", text)
    assert "✗ stopped after" in text
    assert list(run.seconds) == ["Collect states", "Train"]
    assert "Where the time went" in text


def test_a_bar_gives_the_cursor_back_when_its_step_ends() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    run = steps(console=console)
    with contextlib.suppress(KeyboardInterrupt), run.step("Collect states") as step:
        step.advance(2, total=3)
        raise KeyboardInterrupt
    assert console.file.getvalue().rfind("\x1b[?25h") > 0  # type: ignore[attr-defined]  # the cursor is back
