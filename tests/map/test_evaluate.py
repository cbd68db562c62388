"""Claims about evaluation: intervals cover the truth, groups are drawn whole, differences are paired."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ftw.errors import ConfigError, DataError
from ftw.map.bootstrap import affordable_draws, bootstrap
from ftw.map.evaluate import EvaluateConfig, Evaluation, evaluate


def held_out(seed: int = 0, num_texts: int = 200, num_lenses: int = 4, shift: float = 1.5):
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_texts, num_lenses)) < 0.3).astype(np.int8)
    logits = (rng.normal(size=labels.shape) + shift * labels).astype(np.float32)
    weights = rng.choice([0, 1, 1, 1], size=labels.shape).astype(np.float32)
    labels[:4], weights[:4] = [[0], [1], [0], [1]], 1
    return logits, labels, weights


def run(logits, labels, weights, config=None, **more):
    scores = {"activation": logits, **more.pop("scores", {})}
    names = [f"concept {lens}" for lens in range(logits.shape[1])]
    more = {"groups": [f"article {row}" for row in range(len(logits))], "concepts": names, **more}
    return evaluate(scores, labels=labels, weights=weights, config=config or EvaluateConfig(draws=200), **more)


def test_every_draw_equals_scikit_learn_under_the_same_multiplicities():
    logits, labels, weights = held_out(num_texts=60, num_lenses=3)
    logits = logits.round(0)  # ties
    labels[:, 1] = 1 - labels[:, 1]  # more positives than negatives
    groups = np.arange(60) // 3
    drawn = bootstrap({"activation": logits}, labels, weights, groups, draws=150, seed=7)["activation"]
    counts = np.random.default_rng(7).multinomial(20, np.full(20, 1 / 20), size=150)
    for draw in range(0, 150, 7):
        for lens in range(3):
            weight = counts[draw][groups] * weights[:, lens]
            expected = roc_auc_score(labels[:, lens], logits[:, lens], sample_weight=weight)
            assert drawn[draw, lens] == pytest.approx(expected, abs=1e-9)


def test_intervals_cover_the_true_auroc_about_as_often_as_they_say():
    logits, labels, _ = held_out(seed=1, num_texts=200, num_lenses=150, shift=1.0)
    result = run(logits, labels, np.ones(labels.shape), EvaluateConfig(draws=200, confidence=0.9))
    truth = 0.7602499  # Φ(1/√2)
    covered = [figure["auroc_low"] <= truth <= figure["auroc_high"] for figure in result.concepts.values()]
    assert 0.82 <= np.mean(covered) <= 0.97
    assert result.mean["auroc_low"] < result.mean["auroc"] < result.mean["auroc_high"]


def test_copies_of_a_text_in_its_group_do_not_narrow_the_interval():
    logits, labels, weights = held_out(num_texts=80, num_lenses=2)
    once = run(logits, labels, weights)
    copied = [np.concatenate([part] * 5) for part in (logits, labels, weights)]
    grouped = run(*copied, groups=[f"article {row % 80}" for row in range(400)])
    alone = run(*copied)
    width = [
        r.concepts["concept 0"]["auroc_high"] - r.concepts["concept 0"]["auroc_low"] for r in (once, grouped, alone)
    ]
    assert width[1] == pytest.approx(width[0], rel=0.3)
    assert width[2] < 0.7 * width[0]


def test_a_control_with_the_same_scores_has_a_difference_of_exactly_zero_and_is_not_beaten():
    logits, labels, weights = held_out()
    noise = np.random.default_rng(1).normal(size=logits.shape)
    figures = run(logits, labels, weights, scores={"text": logits * 2 + 1, "first_layer": noise}).concepts["concept 1"]
    assert figures["difference"] == figures["difference_low"] == figures["difference_high"] == 0
    assert figures["difference_first_layer_low"] > 0
    assert figures["no_better_than"] == ["text"]


def test_shuffled_controls_stand_near_one_half_and_catch_a_lens_of_noise():
    logits, labels, weights = held_out(num_lenses=30)
    rng = np.random.default_rng(2)
    logits[:, 0] = rng.normal(size=len(logits))
    result = run(logits, labels, weights, scores={"shuffled": rng.normal(size=(5, *logits.shape))})
    assert result.mean["auroc_shuffled"] == pytest.approx(0.5, abs=0.02)
    assert result.concepts["concept 0"]["no_better_than"] == ["shuffled"]
    assert result.concepts["concept 1"]["no_better_than"] == []


def test_all_figures_of_the_report_are_there_and_thresholds_are_judged_on_these_texts():
    logits, labels, weights = held_out()
    thresholds = {"threshold": np.full(4, 0.5), "threshold_1": np.full(4, 2.0)}
    result = run(
        logits, labels, weights, scores={"text": logits * 0.5, "shuffled": [logits * 0]},
        probabilities=1 / (1 + np.exp(-logits)), thresholds=thresholds,
    )  # fmt: skip
    # The keys that the reports and metrics.json rely on.
    expected = {"auroc", "average_precision", "f1", "threshold", "recall_at_1fpr", "fpr_at_threshold_1", "ece"}
    expected |= {"ece_floor", "brier", "num_positive", "num_negative", "auroc_text", "auroc_shuffled", "difference"}
    expected |= {f"{key}_{end}" for key in ("auroc", "auroc_text", "difference") for end in ("low", "high")}
    expected |= {"no_better_than"}
    figures = result.concepts["concept 2"]
    assert expected <= set(figures)
    used = weights[:, 2] > 0
    negative = used & (labels[:, 2] == 0)
    assert figures["num_negative"] == negative.sum()
    assert figures["fpr_at_threshold_1"] == pytest.approx((logits[negative, 2] >= 2).mean())
    assert figures["auroc"] == pytest.approx(roc_auc_score(labels[used, 2], logits[used, 2]))
    assert result.mean["auroc"] == pytest.approx(np.mean([figure["auroc"] for figure in result.concepts.values()]))


def test_slices_hold_what_an_evaluation_of_their_texts_alone_holds():
    logits, labels, weights = held_out()
    kinds = ["short" if row % 3 else "long" for row in range(len(logits))]
    config = EvaluateConfig(draws=100, slices=["kind"])
    result = run(logits, labels, weights, config, slices={"kind": kinds, "other": kinds}, scores={"text": -logits})
    rows = np.array([kind == "long" for kind in kinds])
    names = [f"article {row}" for row in np.flatnonzero(rows)]
    part, scores = (logits[rows], labels[rows], weights[rows]), {"text": -logits[rows]}
    alone = run(*part, EvaluateConfig(draws=100), scores=scores, groups=names)
    assert set(result.slices) == {"kind"}
    assert result.slices["kind"]["long"]["mean"] == alone.mean
    assert result.slices["kind"]["long"]["num_rows"] == rows.sum()
    for name, auroc in result.slices["kind"]["long"]["concepts"].items():
        assert auroc == alone.concepts[name]["auroc"]
    with pytest.raises(ConfigError, match=r"no column 'kin'.*kind"):
        run(logits, labels, weights, EvaluateConfig(slices=["kin"]), slices={"kind": kinds})


def test_json_has_no_nan_and_reads_back():
    logits, labels, weights = held_out()
    labels[:, 1] = 0
    logits[0, 3] = np.nan
    result = run(logits, labels, weights)
    words = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(words)["concepts"]["concept 1"]["auroc"] is None
    again = Evaluation.from_json(json.loads(words))
    assert np.isnan(again.concepts["concept 1"]["auroc"])
    assert again.to_json() == result.to_json()
    assert result.mean["num_concepts"] == 2
    assert "concept 1" in result.notes[0]
    assert "concept 3" in result.notes[1]


def test_the_same_seed_gives_the_same_figures():
    held = held_out()
    assert run(*held).to_json() == run(*held).to_json()


def test_draws_fall_for_large_work_and_the_notes_say_so(monkeypatch):
    small, large = np.zeros((1300, 64), np.int8), np.zeros((9000, 600), np.int8)
    small[::5], large[::3] = 1, 1
    assert affordable_draws(1000, small, np.ones(small.shape, np.int8), num_systems=3) == 1000
    assert affordable_draws(1000, large, np.ones(large.shape, np.int8), num_systems=4) == 100
    assert affordable_draws(20, large, np.ones(large.shape, np.int8), num_systems=4) == 20
    monkeypatch.setattr("ftw.map.bootstrap.AFFORDABLE_WORK", 0)
    result = run(*held_out())
    assert result.mean["draws"] == 100
    assert any("100 bootstrap draws instead of 200" in note for note in result.notes)


def test_nothing_is_computed_on_nonsense():
    logits, labels, weights = held_out()
    with pytest.raises(DataError, match="none of 4 concepts"):
        run(logits, labels * 0, weights)
    with pytest.raises(DataError, match=r"labels: shape \(200, 3\), but there are 200 texts and 4 concepts"):
        run(logits, labels[:, :3], weights)
    with pytest.raises(DataError, match="no scores of 'activation'"):
        evaluate({"text": logits}, labels=labels, weights=weights, groups=["a"] * 200, concepts=list("abcd"))
    with pytest.raises(DataError, match="0 texts"):
        run(logits[:0], labels[:0], weights[:0])
