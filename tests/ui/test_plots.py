"""Pictures draw what they are given, leave nothing behind, and survive hostile names."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ftw.errors import DataError
from ftw.hat.timeline import Timeline
from ftw.ui import plots
from ftw.ui.architecture import architecture_picture


def words(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]


def test_pictures_leave_no_global_state(timeline: Timeline, evaluation: Any) -> None:
    import matplotlib as mpl

    before = mpl.rcParams.copy()
    for figure in (
        plots.timeline_heatmap(timeline),
        plots.concept_streams(timeline),
        plots.evaluation_dots(evaluation),
        plots.reliability(np.linspace(0, 1, 50), np.arange(50) % 2),
    ):
        assert plots.png(figure, dpi=40).startswith(b"\x89PNG")
    assert mpl.rcParams == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_heat_map_splits_prompt_and_answer_and_wraps(timeline: Timeline) -> None:
    assert [axes.get_title("left") for axes in plots.timeline_heatmap(timeline, columns=5).axes[:3]] == [
        "prompt",
        "answer",
        "answer",
    ]
    whole = plots.timeline_heatmap(timeline, split=False, columns=60)
    assert len(whole.axes) == 2  # one panel and its scale
    assert "Whales" in words(whole)
    assert not any("im_start" in word for word in words(whole))


def test_heat_map_needs_content(timeline: Timeline) -> None:
    with pytest.raises(DataError, match="only special tokens"):
        plots.timeline_heatmap(replace(timeline, is_special=np.ones(len(timeline), bool)))


def test_streams_have_a_row_each(timeline: Timeline) -> None:
    assert len(plots.concept_streams(timeline, top=3).axes) == 3


def test_a_moving_mean_of_a_constant_is_the_constant_and_gaps_do_not_spread() -> None:
    np.testing.assert_allclose(plots.moving_mean(np.full(9, 0.7), 5), 0.7)
    gap = np.array([1.0, np.nan, 1.0, 1.0])
    np.testing.assert_allclose(plots.moving_mean(gap, 3), 1.0)
    assert np.isnan(plots.moving_mean(np.full(3, np.nan), 3)).all()


def test_dots_show_every_concept_that_has_figures(evaluation: Any) -> None:
    shown = words(plots.evaluation_dots(evaluation))
    assert "concept 3 *" in shown
    assert "concept 4" not in shown
    evaluation.concepts = {"a": {"auroc": float("nan")}}
    with pytest.raises(DataError, match="no concept has an AUROC"):
        plots.evaluation_dots(evaluation)


def test_intervals_contain_their_shares() -> None:
    shares, counts = np.array([0.0, 0.5, 1.0]), np.array([4, 10, 400])
    low, high = plots.wilson(shares, counts)
    assert (low <= shares).all()
    assert (shares <= high).all()
    np.testing.assert_allclose((low[1], high[1]), (0.2366, 0.7634), atol=1e-3)  # the textbook's 5 of 10


def test_reliability_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="there are none"):
        plots.reliability(np.array([np.nan]), np.array([1]))


def test_svg_is_well_formed_repeatable_and_keeps_its_ids_apart(timeline: Timeline) -> None:
    one, two = (plots.svg(plots.concept_streams(timeline), prefix="a", themed=True) for _ in range(2))
    assert one == two
    root = ElementTree.fromstring(one)
    assert all(node.get("id", "a-").startswith("a-") for node in root.iter())
    assert "currentColor" in one
    assert "<script" not in one


def test_the_architecture_picture_is_well_formed_and_names_the_parts() -> None:
    root = ElementTree.fromstring(architecture_picture())
    shown = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Concept pack", "Texts", "Substrate", "Encyclopedia", "Lenses", "Lens pack", "Monitor"} <= shown
