"""A timeline says what was read, survives the disk, refuses what is not one, and escapes what it draws."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ftw.errors import DataError
from ftw.hat.timeline import Reading, Timeline, TokenReading

TOKENS = ["<s>", "user", "Why", " whales", "?", "</s>", "A", " whale", " <b>&", "\n", " mammal", ".\ud83d"]


@pytest.fixture
def timeline() -> Timeline:
    rng = np.random.default_rng(3)
    logits_TN = rng.normal(-2, 1, (12, 5)).astype(np.float32)
    percentiles_TN = rng.uniform(0, 0.9, (12, 5)).astype(np.float32)
    percentiles_TN[7, 1] = percentiles_TN[10, 2] = percentiles_TN[10, 3] = 1.0
    percentiles_TN[5, 4] = 1.0  # a special token
    rank_TN = logits_TN * 2
    rank_TN[10, 2:4] = 4.0, 6.0
    for values_TN in (logits_TN, percentiles_TN, rank_TN):
        values_TN[0] = np.nan  # the sink is never read
        values_TN[3:6, 0] = np.nan
    return Timeline(
        tokens=TOKENS,
        token_ids=np.arange(12),
        is_prompt=np.arange(12) < 6,
        is_special=np.isin(np.arange(12), [0, 1, 5]),
        concepts=["animal", "whale", "mammal", "dolphin <i>", "music"],
        logits_TN=logits_TN,
        percentiles_TN=percentiles_TN,
        rank_TN=rank_TN,
        ms_per_token=np.linspace(1, 12, 12),
        prompt="Why whales?",
        text="A whale <b>&\n mammal.",
        meta={"layers": np.array([9, 18]), "seed": np.int64(5), "pack": {"id": "demo", "version": "1.0.0"}},
    )


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_save_then_load_is_equal_to_rounding(timeline: Timeline, tmp_path: Path, suffix: str) -> None:
    timeline = replace(timeline, floor=5.0)
    again = Timeline.load(timeline.save(tmp_path / f"timeline{suffix}"))
    assert again.floor == 5.0
    np.testing.assert_array_equal(again.strongest(), timeline.strongest())
    for name in ("tokens", "concepts", "prompt", "text"):
        assert getattr(again, name) == getattr(timeline, name)
    for name in ("token_ids", "is_prompt", "is_special"):
        np.testing.assert_array_equal(getattr(again, name), getattr(timeline, name))
    for name in ("logits_TN", "percentiles_TN", "rank_TN", "ms_per_token", "probabilities_TN"):
        np.testing.assert_allclose(getattr(again, name), getattr(timeline, name), atol=1e-4)
    assert again.meta == {"layers": [9, 18], "seed": 5, "pack": {"id": "demo", "version": "1.0.0"}}
    assert [row.concept for row in again.top(3)] == [row.concept for row in timeline.top(3)]


def test_optional_parts_stay_absent(timeline: Timeline, tmp_path: Path) -> None:
    bare = replace(timeline, rank_TN=None, ms_per_token=None)
    for suffix in (".json", ".parquet"):
        again = Timeline.load(bare.save(tmp_path / f"bare{suffix}"))
        assert again.rank_TN is None
        assert again.ms_per_token is None


def test_json_has_null_where_nothing_was_read(timeline: Timeline, tmp_path: Path) -> None:
    payload = json.loads(timeline.save(tmp_path / "t.json").read_text("utf-8"))
    assert payload["schema"] == "ftw.timeline"
    assert payload["logit"][0] == [None] * 5
    assert len(payload["percentile"]) == 12


def test_parquet_is_a_table_of_one_row_per_token_and_concept(timeline: Timeline, tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(timeline.save(tmp_path / "t.parquet")).to_pylist()
    assert len(rows) == 12 * 5
    there = [row for row in rows if row["logit"] is not None]
    assert [(row["position"], row["concept"]) for row in there] == [
        (row["position"], row["concept"]) for row in timeline.table()
    ]
    assert there[0]["probability"] == pytest.approx(1 / (1 + np.exp(-there[0]["logit"])), abs=1e-6)


def test_top_at_a_position_agrees_with_sorting_by_hand(timeline: Timeline) -> None:
    for by in ("percentile", "probability", "logit"):
        found = timeline.top(5, position=8, by=by)
        values = [getattr(reading, by) for reading in found]
        assert values == sorted(values, reverse=True)
        assert len(found) == 5
    assert [reading.concept for reading in timeline.top(2, position=10)] == ["dolphin <i>", "mammal"]  # tie: z-score
    assert timeline.top(5, position=-12) == []  # the sink has no reading
    assert "animal" not in [reading.concept for reading in timeline.top(9, position=4)]


def test_top_over_the_answer_is_the_mean_over_its_tokens(timeline: Timeline) -> None:
    means = {name: timeline.percentiles_TN[6:, n].mean() for n, name in enumerate(timeline.concepts)}
    assert {reading.concept: reading.percentile for reading in timeline.top(5)} == pytest.approx(means, abs=1e-6)
    assert timeline.concept_means() == pytest.approx(np.array(list(means.values())), abs=1e-6)


def test_strongest_leaves_out_special_tokens_and_weak_ones(timeline: Timeline) -> None:
    expected = np.full(12, -1)
    expected[7], expected[10] = 1, 3
    np.testing.assert_array_equal(timeline.strongest(), expected)
    assert (replace(timeline, floor=6.1).strongest() == -1).all()
    assert (replace(timeline, floor=6.0).strongest() == np.where(np.arange(12) == 10, 3, -1)).all()


def test_without_a_floor_only_what_chance_hardly_gives_stands_out(timeline: Timeline) -> None:
    percentiles_TN = np.full((12, 500), 0.5, dtype=np.float32)
    percentiles_TN[6], percentiles_TN[7, 3] = 0.9995, 1.0
    many = {"logits_TN": percentiles_TN, "percentiles_TN": percentiles_TN, "rank_TN": None}
    wide = replace(timeline, concepts=[f"c{n}" for n in range(500)], **many)
    assert np.flatnonzero(wide.strongest() >= 0).tolist() == [7]


def test_readings_replay_what_the_arrays_hold(timeline: Timeline) -> None:
    replay = list(timeline.readings(2, watch=["music"]))
    assert [reading.token for reading in replay] == TOKENS
    assert replay[7].top[0].concept == "whale"
    assert replay[7].watch[0] == Reading(
        "music",
        *(float(a[7, 4]) for a in (timeline.logits_TN, timeline.probabilities_TN, timeline.percentiles_TN)),
    )
    json.dumps(replay[0].record(), allow_nan=False)
    with pytest.raises(DataError, match="no concept 'opera'"):
        next(timeline.readings(watch=["opera"]))


def test_a_text_without_an_answer_counts_all_its_content(timeline: Timeline) -> None:
    only = replace(timeline, is_prompt=np.ones(12, bool))
    np.testing.assert_array_equal(only.counted, ~only.is_special)


def test_a_concept_never_read_is_never_on_top(timeline: Timeline) -> None:
    logits_TN, percentiles_TN = timeline.logits_TN.copy(), timeline.percentiles_TN.copy()
    logits_TN[:, 1] = percentiles_TN[:, 1] = np.nan
    gap = replace(timeline, logits_TN=logits_TN, percentiles_TN=percentiles_TN, rank_TN=logits_TN)
    assert "whale" not in [reading.concept for reading in gap.top(9)]
    assert 1 not in replace(gap, floor=-99.0).strongest()
    assert 1 not in gap.leading(9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [], "token_ids": []}, "at least one token"),
        ({"concepts": []}, "at least one concept"),
        ({"is_prompt": np.zeros(3, bool)}, "is_prompt has shape"),
        ({"logits_TN": np.zeros((12, 4))}, "logits_TN has shape"),
        ({"logits_TN": np.full((12, 5), np.inf)}, "infinite logit for 'animal' at token 0"),
        ({"percentiles_TN": np.full((12, 5), 99.0)}, "percentile outside"),
    ],
)
def test_impossible_timelines_are_refused(timeline: Timeline, change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        replace(timeline, **change)


@pytest.mark.parametrize("position", [12, -13])
def test_a_position_outside_is_refused(timeline: Timeline, position: int) -> None:
    with pytest.raises(DataError, match="0-11"):
        timeline.top(1, position=position)


def test_unknown_orders_and_formats_are_refused(timeline: Timeline, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose percentile"):
        timeline.top(1, by="score")
    with pytest.raises(DataError, match=r"\.json or \.parquet"):
        timeline.save(tmp_path / "t.pkl")
    with pytest.raises(DataError, match="there is no timeline"):
        Timeline.load(tmp_path / "none.json")


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_refused(timeline: Timeline, tmp_path: Path, suffix: str, share: float) -> None:
    path = timeline.save(tmp_path / f"t{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="cut off"):
        Timeline.load(path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"schema": "other"}',
        '{"schema": "ftw.timeline", "version": 99}',
        '{"schema": "ftw.timeline", "version": 1}',
        "[" * 100_000,
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(DataError):
        Timeline.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 3},
        {"tokens": ["a"]},
        {"logit": [[1], [2, 3]]},
        {"logit": None},
        {"logit": [["x"] * 5] * 12},
        {"logit": [[1e300] * 5] * 12},
        {"token_ids": [10**30] * 12},
        {"meta": 7},
        {"percentile": "abc"},
    ],
)
def test_a_damaged_timeline_is_refused(timeline: Timeline, tmp_path: Path, change: dict) -> None:
    path = timeline.save(tmp_path / "t.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="damaged timeline"):
        Timeline.load(path)


def test_a_parquet_table_of_something_else_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no timeline"):
        Timeline.load(tmp_path / "t.parquet")


def test_notebook_html_escapes_tokens_and_concepts(timeline: Timeline) -> None:
    page = timeline._repr_html_()
    assert " &lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;/s&gt;" not in page  # special tokens are not shown


def test_plot_shows_the_leading_concepts(timeline: Timeline) -> None:
    axes = timeline.plot(top=3).axes[0]
    assert len(axes.get_yticklabels()) == 3
    assert len(axes.get_xticklabels()) == 12


def test_plot_shows_itself_in_a_notebook(timeline: Timeline) -> None:
    from ftw.hat.picture import Picture

    figure = timeline.plot()
    assert isinstance(figure, Picture)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_token_reading_without_time_is_plain_data() -> None:
    record = TokenReading(position=0, token="a", token_id=1, top=[Reading("x", float("nan"), 0.5, 0.25)]).record()
    assert record["ms"] is None
    assert record["top"] == [{"concept": "x", "logit": None, "probability": 0.5, "percentile": 0.25}]
