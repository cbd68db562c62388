"""Claims about dissonance: its sign, what has none, and that a lag is found where there is one and nowhere else."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftw.cat.divergence import Dissonance, dissonance, dissonance_rows
from ftw.errors import ConceptError, DataError
from ftw.hat.timeline import Timeline
from ftw.ui import plots

READINGS = st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6)


def of(activation_TN, text_TN, by: str = "percentile", names: list[str] | None = None) -> Dissonance:
    activation_TN, text_TN = np.asarray(activation_TN, np.float32), np.asarray(text_TN, np.float32)
    num_tokens, num_concepts = activation_TN.shape
    return Dissonance(
        tokens=[f" t{t}" for t in range(num_tokens)],
        counted=np.ones(num_tokens, dtype=bool),
        concepts=names or [f"c{n}" for n in range(num_concepts)],
        activation_TN=activation_TN,
        text_TN=text_TN,
        by=by,
    )


def random_pair(num_tokens: int = 30, num_concepts: int = 4, seed: int = 0) -> Dissonance:
    rng = np.random.default_rng(seed)
    activation_TN, text_TN = rng.random((2, num_tokens, num_concepts))
    activation_TN[:, 1], text_TN[3, 2] = np.nan, np.nan
    return of(activation_TN, text_TN)


def timeline(concepts: list[str], seed: int, *, background: bool = True, num_tokens: int = 6) -> Timeline:
    rng = np.random.default_rng(seed)
    shape = (num_tokens, len(concepts))
    return Timeline(
        tokens=[f" t{t}" for t in range(num_tokens)],
        token_ids=np.arange(num_tokens),
        is_prompt=np.arange(num_tokens) < 2,
        is_special=np.arange(num_tokens) == 0,
        concepts=concepts,
        logits_TN=rng.normal(size=shape),
        percentiles_TN=rng.random(shape) if background else np.full(shape, np.nan),
    )


def test_the_examples_of_the_design_have_their_signs_and_sizes():
    rows = dissonance_rows({"Animal": 0.92, "Weapon": 0.2, "Plant": 0.5}, {"Animal": 0.15, "Weapon": 0.9, "Sky": 0.1})
    assert [row["concept"] for row in rows] == ["Animal", "Weapon"]
    assert rows[0] == {
        "concept": "Animal",
        "activation_prob": 0.92,
        "text_prob": 0.15,
        "divergence": pytest.approx(0.77),
        "signed": pytest.approx(0.77),
    }
    assert rows[1]["signed"] == pytest.approx(-0.7)
    assert rows[1]["divergence"] == pytest.approx(0.7)


@given(READINGS, READINGS)
def test_changing_sides_changes_the_sign_and_nothing_else(activation, text):
    rows, back = dissonance_rows(activation, text), dissonance_rows(text, activation)
    assert {row["concept"] for row in rows} == activation.keys() & text.keys()
    assert [(row["concept"], row["signed"]) for row in rows] == [(row["concept"], -row["signed"]) for row in back]
    assert all(row["divergence"] == abs(row["signed"]) <= 1 for row in rows)
    sizes = [row["divergence"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_concepts_of_one_kind_and_logits_are_not_compared():
    assert dissonance_rows({"a": math.nan, "b": 0.5}, {"a": 0.5, "b": None}) == []  # type: ignore[dict-item]
    with pytest.raises(DataError, match="not logits"):
        dissonance_rows({"a": 3.2}, {"a": 0.5})
    with pytest.raises(DataError, match="not logits"):
        of([[3.2]], [[0.5]])


def test_values_are_signed_and_nan_where_there_is_one_kind_only():
    pair = random_pair()
    expected = pair.activation_TN - pair.text_TN
    np.testing.assert_array_equal(pair.values_TN, expected)
    assert np.isnan(pair.values_TN[:, 1]).all()
    assert np.isnan(pair.values_TN[3, 2])
    swapped = replace(pair, activation_TN=pair.text_TN, text_TN=pair.activation_TN)
    np.testing.assert_array_equal(swapped.values_TN, -pair.values_TN)
    assert swapped.writes_not_thinks() == [
        gap._replace(activation=gap.text, text=gap.activation, signed=-gap.signed) for gap in pair.thinks_not_writes()
    ]


def test_two_timelines_meet_in_the_concepts_that_both_have():
    activation, text = timeline(["a", "b", "c"], 0), timeline(["d", "c", "a"], 1)
    pair = dissonance(activation, text)
    assert pair.by == "percentile"
    assert pair.concepts == ["a", "b", "c", "d"]
    np.testing.assert_allclose(pair.values_TN[:, 0], activation.percentiles_TN[:, 0] - text.percentiles_TN[:, 2])
    np.testing.assert_allclose(pair.values_TN[:, 2], activation.percentiles_TN[:, 2] - text.percentiles_TN[:, 1])
    assert np.isnan(pair.values_TN[:, [1, 3]]).all()
    np.testing.assert_array_equal(pair.counted, activation.counted)
    probable = dissonance(activation, text, by="probability")
    np.testing.assert_allclose(
        probable.values_TN[:, 0], (activation.probabilities_TN[:, 0] - text.probabilities_TN[:, 2])
    )
    surprised = dissonance(activation, text, by="surprise")
    np.testing.assert_allclose(surprised.activation_TN[:, 0], activation.surprise_TN[:, 0] / 3, rtol=1e-5)


def test_without_background_probabilities_are_compared():
    activation, text = timeline(["a"], 0), timeline(["a"], 1, background=False)
    assert dissonance(activation, text).by == "probability"
    with pytest.raises(DataError, match="text lenses have no background"):
        dissonance(activation, text, by="percentile")
    with pytest.raises(DataError, match="no dissonance by 'rank'"):
        dissonance(activation, text, by="rank")
    with pytest.raises(DataError, match="different tokens"):
        dissonance(activation, timeline(["a"], 1, num_tokens=5))


def test_window_means_are_means_of_what_there_is():
    pair = random_pair()
    for width in (1, 4, 100):
        means = pair.window_means(width)
        for t in range(len(pair)):
            window = pair.values_TN[max(0, t + 1 - width) : t + 1]
            for n in (0, 2, 3):
                known = window[:, n][~np.isnan(window[:, n])]
                assert means[t, n] == pytest.approx(known.mean() if len(known) else math.nan, abs=1e-6, nan_ok=True)
        assert np.isnan(means[:, 1]).all()
    with pytest.raises(DataError, match="0 tokens"):
        pair.window_means(0)


def test_lists_and_summary_say_which_concepts_differ_and_where():
    activation_TN, text_TN = np.full((8, 4), 0.5), np.full((8, 4), 0.5)
    activation_TN[:, 0], text_TN[:, 1], activation_TN[:, 3] = 0.9, 0.8, np.nan
    activation_TN[5, 2] = 1.0
    text_TN[5, 2] = 0.0
    pair = of(activation_TN, text_TN, names=["thought", "written", "once", "text only"])
    assert [gap.concept for gap in pair.thinks_not_writes()] == ["thought", "once"]
    assert [gap.concept for gap in pair.writes_not_thinks()] == ["written"]
    assert [gap.concept for gap in pair.at(5)] == ["once", "thought", "written"]
    assert len(pair.at(-1, 1)) == 1
    summary = pair.summary()
    assert summary["num_concepts"] == 3
    assert summary["max_abs"] == {"concept": "once", "token": " t5", "position": 5, "signed": 1.0}
    assert summary["mean_abs"] == pytest.approx((8 * 0.4 + 8 * 0.3 + 1) / 24, abs=1e-4)
    assert summary["share_thought"] == pytest.approx(9 / 24, abs=1e-4)
    assert summary["share_written"] == pytest.approx(8 / 24, abs=1e-4)
    with pytest.raises(DataError, match="no token at position 8"):
        pair.at(8)


def test_only_counted_tokens_enter_figures():
    pair = random_pair()
    counted = np.arange(len(pair)) >= 10
    part = of(pair.activation_TN[10:], pair.text_TN[10:])
    whole = replace(pair, counted=counted)
    assert whole.thinks_not_writes() == part.thinks_not_writes()
    assert whole.summary()["mean_abs"] == part.summary()["mean_abs"]


def test_json_is_plain_and_complete():
    pair = random_pair()
    told = json.loads(json.dumps(pair.to_json(2), allow_nan=False))
    assert len(told["tokens"]) == len(pair)
    assert told["summary"]["by"] == "percentile"
    assert [row["concept"] for row in told["tokens"][0]["dissonance"]] == [gap.concept for gap in pair.at(0, 2)]
    assert "c1" not in json.dumps(told)
    empty = of(np.full((3, 1), np.nan), np.ones((3, 1)))
    assert json.loads(json.dumps(empty.to_json(), allow_nan=False))["summary"]["mean_abs"] is None


@pytest.mark.parametrize("shift", [-4, -1, 0, 3, 5])
def test_a_known_lag_is_recovered(shift):
    rng = np.random.default_rng(1)
    thought_T = rng.random(120)
    written_T = np.clip(np.roll(thought_T, shift) + rng.normal(0, 0.1, 120), 0, 1)
    other_T = rng.random(120)
    pair = of(np.stack([thought_T, thought_T], axis=1), np.stack([written_T, other_T], axis=1))
    led, unrelated = pair.lags()
    assert (led.concept, led.tokens) == ("c0", shift)
    assert led.correlation > 0.8
    assert led.p_value == pytest.approx(1 / (120 - 4 * 5))
    assert unrelated.p_value > 0.02
    assert pair.lags(["c1"]) == [unrelated]


def test_series_without_relation_are_rarely_significant_even_if_smooth():
    noise = np.random.default_rng(2).normal(size=(2, 200, 1000))
    kernel = np.ones(8) / 8
    smooth = np.apply_along_axis(lambda series: np.convolve(series, kernel, mode="same"), 1, noise)
    pair = of(*(0.5 * (1 + np.tanh(smooth))))
    p_values = np.array([lag.p_value for lag in pair.lags()])
    # Shuffled tokens would call most of these significant; 0.05 is the promise, the rest is luck and the ends.
    assert (p_values <= 0.05).mean() < 0.08
    assert 0.4 < p_values.mean() < 0.6


def test_lags_need_names_tokens_and_change():
    pair = random_pair()
    with pytest.raises(ConceptError, match="'whale'"):
        pair.lags(["whale"])
    with pytest.raises(DataError, match="need at least 42 tokens"):
        pair.lags(max_lag=10)
    constant = of(np.full((40, 1), 0.3), np.random.default_rng(0).random((40, 1)))
    assert constant.lags() == []
    assert {lag.concept for lag in pair.lags(max_lag=2)} == {"c0", "c3"}


def test_pictures_draw_pairs_of_rows_and_name_what_stands_apart():
    activation_TN, text_TN = np.random.default_rng(0).random((2, 25, 5)) * 0.1
    activation_TN[:, 0], text_TN[:, 1], text_TN[:, 2] = 0.9, 0.95, np.nan
    for by in ("percentile", "probability"):
        pair = of(activation_TN, text_TN, by=by, names=["thought", "$written$", "one kind", "d", "e"])
        heat = plots.dissonance_heatmap(pair, top=3, columns=10)
        assert len(heat.axes) == 3 + 2  # panels and two scales
        rows = [label.get_text() for label in heat.axes[0].get_yticklabels()]
        assert len(rows) == 3
        assert "one kind" not in rows
        scatter = plots.dissonance_scatter(pair)
        assert [text.get_text() for text in scatter.axes[0].texts] == ["thought", r"\$written\$"]
        assert plots.png(heat, dpi=40).startswith(b"\x89PNG")
        assert plots.png(scatter, dpi=40).startswith(b"\x89PNG")
    nothing = of(np.full((3, 1), np.nan), np.ones((3, 1)))
    for draw in (plots.dissonance_heatmap, plots.dissonance_scatter):
        with pytest.raises(DataError, match="no dissonance to draw"):
            draw(nothing)
