"""In every mode the tokens are the same, what is told live is what timelines hold, and no lens stops a generation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from random_lenses import random_stack

from ftw.cat.divergence import dissonance
from ftw.errors import ConceptError, ConfigError
from ftw.hat.aperture import Aperture, ApertureConfig
from ftw.hat.bank import LensBank
from ftw.hat.dynamic import ApertureBank, LiveLenses
from ftw.hat.holder import ResidentLenses
from ftw.hat.lineage import Lineage
from ftw.hat.monitor import Monitor
from ftw.hat.readout import Readout, TextLenses
from ftw.hat.text import TextBank, TextLens
from ftw.hat.text_window import TextWindow
from ftw.hat.timeline import Timeline, TokenReading
from ftw.substrate.model import Substrate

NAMES = [f"concept{n}" for n in range(6)]
WRITTEN = ["concept5", "concept1", "only written", "concept0"]
OPTIONS = {"max_new_tokens": 12, "do_sample": True, "seed": 3}


class Tree(dict[str, list[str]]):
    def parents(self, name: str) -> list[str]:
        return self[name]


LINEAGE = Lineage(NAMES, {}, Tree({name: ["concept0"] if name in ("concept4", "concept2") else [] for name in NAMES}))


def text_bank(*, calibrated: bool = True) -> TextBank:
    rng = np.random.default_rng(0)
    letters = ["ab", "th", "he", "cat", "sat", "on"]
    ones = np.ones(len(letters))
    lenses = [
        TextLens(name=name, vocabulary=letters, idf=ones, coefficients=rng.normal(size=len(letters)), bias=rng.normal())
        for name in WRITTEN
    ]
    bank = TextBank.from_lenses(lenses)
    if not calibrated:
        return bank
    quantiles_NQ = np.sort(rng.normal(size=(len(WRITTEN), 9)), axis=1).astype(np.float32)
    levels_Q = np.array([0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1], dtype=np.float32)
    return replace(bank, quantiles_NQ=quantiles_NQ, levels_Q=levels_Q)


@pytest.fixture(scope="module")
def bank() -> LensBank:
    return random_stack(layers=(2, 0)).bank()


def told(monitor: Monitor, prompt: str = "The cat sat on", **options: Any) -> tuple[Timeline, list[TokenReading]]:
    readings: list[TokenReading] = []
    options = {**OPTIONS, **options}
    timeline = monitor.generate(prompt, on_token=lambda _, reading: readings.append(reading), **options)
    assert isinstance(timeline, Timeline)
    return timeline, readings


def test_the_mode_changes_no_token_and_no_activation(tiny_substrate: Substrate, bank: LensBank):
    thinks, _ = told(Monitor(tiny_substrate, bank))
    writes, _ = told(Monitor(tiny_substrate, text=text_bank()))
    both, _ = told(Monitor(tiny_substrate, bank, text=text_bank()))
    assert thinks.token_ids.tolist() == writes.token_ids.tolist() == both.token_ids.tolist()
    np.testing.assert_array_equal(thinks.logits_TN, both.logits_TN)
    assert (thinks.concepts, writes.concepts) == (NAMES, WRITTEN)
    assert [timeline.meta["mode"] for timeline in (thinks, writes, both)] == ["activation", "text", "dual"]
    assert "text_ms_per_token" in both.meta
    assert writes.ms_per_token is not None


@pytest.mark.parametrize("calibrated", [True, False])
def test_dual_tells_live_what_both_timelines_hold(tiny_substrate: Substrate, bank: LensBank, calibrated: bool):
    monitor = Monitor(tiny_substrate, bank, text=text_bank(calibrated=calibrated), top_k=3)
    timeline, readings = told(monitor)
    written = monitor.written(timeline)
    differences = dissonance(timeline, written)
    assert differences.by == ("percentile" if calibrated else "probability")
    for t, reading in enumerate(readings):
        if reading.is_special:
            assert (reading.text, reading.dissonance) == ([], [])
            continue
        assert reading.text is not None
        assert reading.dissonance is not None
        for one in reading.text:
            column = WRITTEN.index(one.concept)
            assert one.logit == pytest.approx(written.logits_TN[t, column], abs=1e-5)
            assert one.percentile == pytest.approx(written.percentiles_TN[t, column], abs=1e-5, nan_ok=True)
        expected = differences.at(t, 3)
        assert [gap.concept for gap in reading.dissonance] == [gap.concept for gap in expected]
        for gap, other in zip(reading.dissonance, expected, strict=True):
            assert gap[1:] == pytest.approx(tuple(other[1:]), abs=1e-5)
        assert "only written" not in [gap.concept for gap in reading.dissonance]
        assert set(reading.record()) >= {"text", "dissonance"}


def test_text_mode_tells_live_what_its_timeline_holds(tiny_substrate: Substrate):
    timeline, readings = told(Monitor(tiny_substrate, text=text_bank(), top_k=2, watch=["concept0"]))
    for t, reading in enumerate(readings):
        column = WRITTEN.index("concept0")
        np.testing.assert_allclose(reading.watch[0].logit, timeline.logits_TN[t, column], atol=1e-5)
        assert len(reading.top) == (0 if reading.is_special else 2)
        assert reading.text is reading.dissonance is None
    read = Monitor(tiny_substrate, text=text_bank()).read("the cat")
    np.testing.assert_allclose(read.logits_TN[-1], text_bank().score(["the cat"])[0], atol=1e-5)


def test_a_given_text_is_told_as_its_timeline_has_it(tiny_substrate: Substrate, bank: LensBank):
    monitor, readings = Monitor(tiny_substrate, bank, text=text_bank(), top_k=6), list[TokenReading]()
    timeline = monitor.read("the cat sat on", on_token=lambda _, reading: readings.append(reading))
    assert [reading.token for reading in readings] == timeline.tokens
    for t, reading in enumerate(readings):
        logits = {one.concept: one.logit for one in reading.top}
        assert logits == pytest.approx(dict(zip(NAMES, timeline.logits_TN[t].tolist(), strict=True)), abs=1e-5)
        assert (reading.text == []) == reading.is_special


def test_a_batch_has_a_window_for_each_sequence(tiny_substrate: Substrate, bank: LensBank):
    monitor, rows = Monitor(tiny_substrate, bank, text=text_bank()), dict[int, list[TokenReading]]()
    timelines = monitor.generate(
        ["The cat", "sat on"], on_token=lambda row, one: rows.setdefault(row, []).append(one), **OPTIONS
    )
    for row, timeline in enumerate(timelines):
        written = monitor.written(timeline)
        for t, reading in enumerate(rows[row]):
            for one in reading.text or ():
                assert one.logit == pytest.approx(written.logits_TN[t, WRITTEN.index(one.concept)], abs=1e-5)


@pytest.mark.parametrize("alarm", [None, 0.5, 0.95, 1.0])
def test_alarms_are_the_guarded_concepts_above_the_percentile(
    tiny_substrate: Substrate, bank: LensBank, alarm: float | None
):
    monitor = Monitor(tiny_substrate, bank, watch=["concept0"], alarm=alarm, lineage=LINEAGE, top_k=1)
    timeline, readings = told(monitor)
    for t, reading in enumerate(readings):
        high = {name for name in ("concept0", "concept2", "concept4")
                if timeline.percentiles_TN[t, NAMES.index(name)] >= (0.99 if alarm is None else alarm)}  # fmt: skip
        assert {one.reading.concept for one in reading.alarms} == (set() if reading.is_special else high)
        for one in reading.alarms:
            assert one.watched == "concept0"
            assert one.reading.percentile == pytest.approx(
                timeline.percentiles_TN[t, NAMES.index(one.reading.concept)], abs=1e-6
            )
        assert [one.concept for one in reading.watch] == ["concept0"]


def test_an_alarm_needs_no_hierarchy_and_no_calibration_to_be_silent(tiny_substrate: Substrate, bank: LensBank):
    _, alone = told(Monitor(tiny_substrate, bank, watch=["concept0"], alarm=0.3))
    assert {one.reading.concept for reading in alone for one in reading.alarms} == {"concept0"}
    raw = random_stack(layers=(2, 0), calibrated=False).bank()
    _, readings = told(Monitor(tiny_substrate, raw, watch=["concept0"]))
    assert not any(reading.alarms for reading in readings)
    with pytest.raises(ConfigError, match=r"alarm=0\.9: these lenses have no background"):
        Monitor(tiny_substrate, raw, watch=["concept0"], alarm=0.9)
    with pytest.raises(ConfigError, match="alarm=99"):
        Monitor(tiny_substrate, bank, alarm=99)


class Fragile(LensBank):
    """A bank that fails on one token of the answer."""

    calls = 0

    def forward(self, states_BLD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 4:
            raise RuntimeError("a lens fell down")
        logits_BN = super().forward(states_BLD)
        return logits_BN.clone().fill_(torch.inf) if self.calls == 6 else logits_BN


def test_a_lens_that_fails_costs_its_reading_and_nothing_else(tiny_substrate: Substrate, bank: LensBank):
    fragile = random_stack(layers=(2, 0)).bank()
    fragile.__class__ = Fragile
    timeline, readings = told(Monitor(tiny_substrate, fragile, text=text_bank(), watch=["concept1"]))
    expected, whole = told(Monitor(tiny_substrate, bank, text=text_bank()))
    assert timeline.token_ids.tolist() == expected.token_ids.tolist()
    missing = [t for t, reading in enumerate(readings) if reading.is_missing]
    first = int(timeline.is_prompt.sum())
    assert missing == [first + 2, first + 4]
    assert timeline.meta["num_missing"] == 2
    assert "a lens fell down" in timeline.meta["last_lens_error"]
    for t, reading in enumerate(readings):
        if t in missing:
            assert (reading.top, reading.dissonance) == ([], [])
            assert np.isnan(reading.watch[0].logit)
            assert reading.text == whole[t].text
    assert np.isnan(timeline.logits_TN).all(axis=1).nonzero()[0].tolist() == missing


def test_a_text_lens_that_fails_costs_its_reading_and_nothing_else(
    tiny_substrate: Substrate, bank: LensBank, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: TextWindow) -> torch.Tensor:
        raise RuntimeError("no words")

    monkeypatch.setattr(TextWindow, "logits", fail)
    timeline, readings = told(Monitor(tiny_substrate, bank, text=text_bank()))
    content = [reading for reading in readings if not reading.is_special]
    assert all(reading.text == [] and reading.top for reading in content)
    assert timeline.meta["num_text_missing"] == len(content)


def test_modes_without_their_lenses_are_refused(tiny_substrate: Substrate, bank: LensBank):
    for options, words in (
        ({"mode": "both"}, "mode='both'"),
        ({"mode": "dual"}, "needs text lenses"),
        ({"mode": "text"}, "needs text lenses"),
    ):
        with pytest.raises(ConfigError, match=words):
            Monitor(tiny_substrate, bank, **options)
    with pytest.raises(ConfigError, match="needs activation lenses"):
        Monitor(tiny_substrate, text=text_bank(), mode="dual")
    with pytest.raises(ConfigError, match="no text lenses"):
        Monitor(tiny_substrate, bank).written(Monitor(tiny_substrate, bank).read("Hi"))
    with pytest.raises(ConceptError, match="only written"):
        Monitor(tiny_substrate, text=text_bank(), watch=["onlywritten"])
    with pytest.raises(ConfigError, match="text window of 0"):
        Monitor(tiny_substrate, bank, text=text_bank(), text_window=0)


def test_text_lenses_are_compared_by_their_own_background():
    text = text_bank()
    lenses, logits_BN = TextLenses(text), text.score(["the cat", "ab on", ""])
    every = torch.arange(len(text)).expand(3, -1)
    np.testing.assert_array_equal(lenses.percentile(logits_BN, every), text.percentile(logits_BN))
    limits_G = Readout(lenses, top_k=1, watch=WRITTEN, alarm=0.8)._limits_G
    assert (lenses.percentile(limits_G[None]) >= 0.8).all()
    assert (lenses.percentile(limits_G[None] - 1e-3) < 0.8).all()


def behind_aperture(bank: LensBank, **options: Any) -> ApertureBank:
    above = {name: ["concept0"] if name in ("concept4", "concept2") else [] for name in NAMES}
    lineage = Lineage(NAMES, {name: len(up) for name, up in above.items()}, Tree(above))
    aperture = Aperture(lineage, ApertureConfig(**options))
    return ApertureBank(LiveLenses(aperture, activation=ResidentLenses(bank), text=None))


def test_a_monitor_reads_through_an_aperture_as_through_the_bank(tiny_substrate: Substrate, bank: LensBank):
    wide = behind_aperture(bank, load_threshold=0, unload_threshold=0)
    through, readings = told(Monitor(tiny_substrate, wide, text=text_bank(), watch=["concept2"], alarm=0.5))
    expected, _ = told(Monitor(tiny_substrate, bank))
    np.testing.assert_allclose(through.logits_TN, expected.logits_TN, atol=1e-5)
    np.testing.assert_allclose(through.percentiles_TN, expected.percentiles_TN, atol=1e-5)
    assert all(len(reading.top) == 5 for reading in readings)
    assert any(reading.alarms for reading in readings)
    closed = behind_aperture(bank, load_threshold=1, unload_threshold=1, watch=["concept4"])
    narrow, _ = told(Monitor(tiny_substrate, closed))
    # concept2 is a sibling of the watched concept4: a child is read with its family.
    np.testing.assert_allclose(narrow.logits_TN, expected.logits_TN, atol=1e-5)
    shut, _ = told(Monitor(tiny_substrate, behind_aperture(bank, load_threshold=1, unload_threshold=1)))
    assert np.isnan(shut.logits_TN).all(axis=0).tolist() == [name in ("concept2", "concept4") for name in NAMES]
    assert shut.meta["num_missing"] == 0
