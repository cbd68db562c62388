"""The story of a timeline: found where it was put, silent where there is none, the same words every time."""

import numpy as np
import pytest
from toy_story import CONCEPTS, acts, read_windows, timeline_of

from ftw.cat.narrative import NarrativeConfig, change_points, narrate, window_series
from ftw.errors import ConfigError, DataError


def test_a_story_in_three_acts_is_told_in_three_acts():
    story = narrate(timeline_of(acts()), NarrativeConfig(window=5, stride=5))
    assert [next(iter(segment.concepts)) for segment in story.segments] == CONCEPTS[:3]
    assert [abs(segment.start - 3 - place * 30) <= 5 for place, segment in enumerate(story.segments)] == [True] * 3
    assert story.text.startswith("Began with democracy, turned to voting at token ")
    assert "security" in story.text


def test_windows_that_were_read_are_told_as_they_are():
    values = read_windows(acts(), 20, 5)
    timeline = timeline_of(values, windows=(20, 5))
    series = window_series(timeline)
    assert series.starts[:5].tolist() == [3, 3, 3, 3, 8]
    assert series.ends[-1] == len(timeline)
    assert np.allclose(series.values_WN, values[~np.isnan(values).all(axis=1)], atol=1e-4)
    records = series.records(0.5)
    assert records[0]["concepts"].keys() == {"democracy"}
    assert next(iter(narrate(timeline).segments[0].concepts)) == "democracy"


def test_what_an_answer_only_begins_with_is_told_however_much_follows():
    values = np.full((60, 4), 0.3)
    values[:12, 3], values[12:, 3] = 0.95, 0.02  # the lowest mean of all
    timeline = timeline_of(values)
    series = window_series(timeline, NarrativeConfig(window=5, stride=5))
    assert series.leading(1).tolist() == series.in_turn(series.leading(4))[:1].tolist() == [3]
    story = narrate(timeline, NarrativeConfig(window=5, stride=5, top=1))
    assert story.text.startswith(f"Began with {CONCEPTS[3]}")


def test_the_same_timeline_gives_the_same_words():
    first, again = (narrate(timeline_of(acts())) for _ in range(2))
    assert first.record() == again.record()


def test_nothing_changes_where_nothing_changes():
    rng = np.random.default_rng(1)
    assert change_points(rng.uniform(0.4, 0.6, size=(60, 5))) == []
    assert change_points(np.full((40, 3), 0.7)) == []
    assert change_points(np.array([[0.1], [0.9]])) == []


def test_change_points_are_those_of_the_cheapest_split():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(m, 0.05, size=(8, 2)) for m in (0.2, 0.8, 0.3)])
    assert change_points(values) == [8, 16]


def test_a_concept_that_follows_another_is_said_to_follow_it():
    rng = np.random.default_rng(3)
    course = (np.convolve(rng.normal(size=203), np.ones(4) / 4, mode="valid") > 0).astype(float) * 0.8 + 0.1
    values = np.stack([course[3:], np.roll(course, 3)[3:], rng.uniform(0, 1, 197)], axis=1)
    leads = narrate(timeline_of(values), NarrativeConfig(window=1, stride=1)).leads
    assert (leads[0].first, leads[0].second, leads[0].tokens) == ("democracy", "voting", 3)
    assert not any("security" in (lead.first, lead.second) for lead in leads)


def test_pairs_are_told_above_chance_only():
    rng = np.random.default_rng(4)
    one, alone = rng.random(300) < 0.3, rng.random(300) < 0.3
    values = np.stack([one, one ^ (rng.random(300) < 0.03), alone], axis=1) * 0.8 + 0.1
    found = narrate(timeline_of(values), NarrativeConfig(window=1, stride=1)).together
    assert [{pair.first, pair.second} for pair in found] == [{"democracy", "voting"}]
    assert 1 < found[0].low <= found[0].lift <= found[0].high


def test_a_window_that_could_not_be_read_is_a_gap_that_is_told():
    values = read_windows(acts(), 20, 5)
    values[9] = np.nan
    story = narrate(timeline_of(values, windows=(20, 5)))
    assert story.num_missing == 1
    assert "1 windows could not be read" in story.text


def test_a_story_of_one_window_or_of_nothing_that_was_asked_for_is_told():
    assert narrate(timeline_of(acts()[:4])).text == "Began with democracy."
    assert narrate(timeline_of(np.full((40, 2), 0.1))).text == "Began about nothing that was asked for."


def test_a_timeline_without_readings_has_no_story():
    with pytest.raises(DataError, match="could be read"):
        narrate(timeline_of(np.full((30, 2), np.nan), windows=(20, 5)))
    with pytest.raises(ConfigError, match="threshold=2"):
        narrate(timeline_of(acts()), NarrativeConfig(threshold=2))
