"""Monitoring in windows: live as recorded, nothing between windows, the end always read, gaps where lenses fail."""

import numpy as np
import pytest
import torch
from random_lenses import random_stack
from temporal_lenses import stack_of

from ftw.cat.narrative import window_series
from ftw.errors import ConfigError, DataError
from ftw.hat.monitor import Monitor
from ftw.hat.temporal.bank import SequenceBank
from ftw.hat.timeline import Timeline, TokenReading
from ftw.substrate.model import Substrate

FAMILIES = ("lstm", "attention", "trunk_lstm")


def monitor_of(substrate: Substrate, family: str = "lstm", **options) -> Monitor:
    bank = stack_of(family, width=substrate.width).sequence_bank()
    return Monitor(substrate, bank, mode="timeline", **{"window": 6, "stride": 4, "top_k": 3, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_window_has_the_logits_of_its_tokens_read_again(tiny_substrate: Substrate, family: str):
    monitor = monitor_of(tiny_substrate, family)
    bank = monitor.bank.lenses
    assert isinstance(bank, SequenceBank)
    timeline = monitor.generate("Hm?", max_new_tokens=11, min_new_tokens=11, do_sample=True, seed=1)
    start = int(timeline.is_prompt.sum())
    assert len(timeline) == start + 11
    read = np.flatnonzero(~np.isnan(timeline.logits_TN).all(axis=1))
    assert (read - start + 1).tolist() == [4, 8, 11]
    ids = torch.from_numpy(timeline.token_ids)[None]
    with torch.inference_mode():
        hidden = tiny_substrate.model(ids, output_hidden_states=True).hidden_states
    states_TLD = torch.stack([hidden[layer + 1][0] for layer in bank.layers], dim=1)
    for end in (4, 8, 11):
        window = states_TLD[start + max(0, end - 6) : start + end]
        expected_N = bank(window[None])[0].numpy()
        assert np.abs(timeline.logits_TN[start + end - 1] - expected_N).max() < 1e-3


def test_the_windows_told_live_are_those_of_the_timeline_and_no_token_between_is_missing(tiny_substrate: Substrate):
    told: list[TokenReading] = []
    monitor = monitor_of(tiny_substrate)
    timeline = monitor.generate(
        "Hm?", max_new_tokens=11, min_new_tokens=11, do_sample=False, on_token=lambda _, reading: told.append(reading)
    )
    assert [reading.position for reading in told if reading.top] == np.flatnonzero(
        ~np.isnan(timeline.logits_TN).all(axis=1)
    ).tolist()
    assert not any(reading.is_missing for reading in told)
    assert timeline.meta["num_missing"] == 0
    assert (timeline.meta["window"], timeline.meta["stride"]) == (6, 4)


def test_a_text_is_read_in_windows_after_the_sink(tiny_substrate: Substrate):
    monitor = monitor_of(tiny_substrate)
    timeline = monitor.read("eleven byte")
    read = np.flatnonzero(~np.isnan(timeline.logits_TN).all(axis=1))
    assert read.tolist() == [4, 8, 11]


def test_every_answer_of_a_batch_is_read_to_its_own_end(tiny_substrate: Substrate):
    monitor = monitor_of(tiny_substrate)
    timelines = monitor.generate(["Hm?", "A longer prompt."], max_new_tokens=9, do_sample=True, seed=5)
    for timeline in timelines:
        assert not np.isnan(timeline.logits_TN[-1]).any()
        alone = monitor.generate(timeline.prompt, max_new_tokens=9, do_sample=True, seed=5)
        assert alone.concepts == timeline.concepts


def test_a_window_longer_than_the_text_is_a_window_of_the_text(tiny_substrate: Substrate):
    timeline = monitor_of(tiny_substrate, window=50, stride=50).read("abc")
    assert np.flatnonzero(~np.isnan(timeline.logits_TN).all(axis=1)).tolist() == [3]


def test_an_answer_of_one_token_is_a_window_and_one_that_ends_at_once_has_no_story(tiny_substrate: Substrate):
    monitor = monitor_of(tiny_substrate)
    one = monitor.generate("Hm?", max_new_tokens=1, min_new_tokens=1)
    assert isinstance(one, Timeline)
    assert np.flatnonzero(~np.isnan(one.logits_TN).all(axis=1)).tolist() == [len(one) - 1]
    assert len(window_series(one).ends) == 1
    nothing = monitor.generate("Hm?", max_new_tokens=1, forced_eos_token_id=tiny_substrate.tokenizer.eos_token_id)
    assert isinstance(nothing, Timeline)
    with pytest.raises(DataError, match="nothing to tell"):
        window_series(nothing)


def test_lenses_of_single_states_tell_windows_too(tiny_substrate: Substrate):
    bank = random_stack(width=tiny_substrate.width).bank()
    timeline = Monitor(tiny_substrate, bank, mode="timeline", window=5, stride=5).read("0123456789")
    assert np.flatnonzero(~np.isnan(timeline.logits_TN).all(axis=1)).tolist() == [5, 10]


def test_a_lens_that_fails_marks_its_window_and_leaves_the_generation_alone(tiny_substrate: Substrate):
    monitor = monitor_of(tiny_substrate)
    told: list[TokenReading] = []
    bank = monitor.bank.lenses
    bank.lenses.offset.fill_(torch.nan)
    timeline = monitor.generate(
        "Hm?", max_new_tokens=8, min_new_tokens=8, do_sample=False, on_token=lambda _, reading: told.append(reading)
    )
    assert [reading.is_missing for reading in told if not reading.is_prompt] == [False, False, False, True] * 2
    assert timeline.meta["num_missing"] == 2
    assert np.isnan(timeline.logits_TN).all()


def test_sequence_lenses_are_refused_token_by_token(tiny_substrate: Substrate):
    bank = stack_of("lstm", width=tiny_substrate.width).sequence_bank()
    with pytest.raises(ConfigError, match="mode='timeline'"):
        Monitor(tiny_substrate, bank)
