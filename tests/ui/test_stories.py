"""Pictures of a story hold what it tells, and its page asks nobody for anything."""

import re
from pathlib import Path

import numpy as np
import pytest
from toy_story import acts, read_windows, timeline_of

from ftw.cat.narrative import narrate, window_series
from ftw.ui.plots import png, svg
from ftw.ui.stories import pictures, write_page


def drawn(values: np.ndarray, **options):
    timeline = timeline_of(values, **options)
    return pictures(window_series(timeline), narrate(timeline))


def test_every_picture_is_drawn_with_its_names():
    found = drawn(read_windows(acts(), 20, 5), windows=(20, 5))
    assert set(found) == {"heat-map", "stream", "together", "turns"}
    for name, figure in found.items():
        assert "democracy" in svg(figure), name
        assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("values", [acts()[:3], np.full((40, 2), 0.1)])
def test_stories_of_one_window_or_of_nothing_are_drawn(values: np.ndarray):
    for figure in drawn(values).values():
        assert svg(figure).startswith("<svg")


def test_a_page_holds_all_and_runs_nothing(tmp_path: Path):
    figures = drawn(acts())
    page = write_page(tmp_path / "story.html", "<script>", [("<b>one", "Began & ended.", figures)]).read_text()
    assert page.count("<svg") == len(figures)
    assert "<script" not in page
    assert "<b>one" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=.?https?:", page.replace("http://www.w3.org", ""))
