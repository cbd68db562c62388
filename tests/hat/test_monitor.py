"""Monitoring changes no token, reads every token as one plain forward pass would, and leaves nothing behind."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from random_lenses import random_stack
from toy_model import byte_tokenizer
from transformers import GenerationConfig, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ftw.errors import ConceptError, ConfigError, SubstrateError
from ftw.hat.bank import LensBank
from ftw.hat.monitor import Monitor
from ftw.hat.recorder import Pieces, pieces
from ftw.hat.timeline import Timeline, TokenReading
from ftw.substrate.model import Substrate
from ftw.substrate.taps import Tap

PROMPTS = ["Why is the sky blue?", "Hi", "Tell me about a cat."]
SAMPLING = {"do_sample": True, "temperature": 0.8}


@pytest.fixture(scope="module")
def bank() -> LensBank:
    return random_stack(layers=(2, 0)).bank()


@pytest.fixture
def monitor(tiny_substrate: Substrate, bank: LensBank) -> Monitor:
    return Monitor(tiny_substrate, bank, top_k=3, watch=["concept4", "concept0"])


def plain(substrate: Substrate, prompts: list[str], seed: int, **options: Any) -> list[list[int]]:
    """Sequences of plain `generate`: what the monitor must not change."""
    encoded = [substrate.chat(prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    ids = torch.tensor([[1] * (longest - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    torch.manual_seed(seed)
    options = {"pad_token_id": 1, **options}
    return substrate.model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()


def answer(timeline: Timeline) -> list[int]:
    return timeline.token_ids[~timeline.is_prompt].tolist()


def num_hooks(substrate: Substrate) -> int:
    # transformers leaves hooks of its own on blocks, for output_hidden_states.
    hooks = [hook for block in substrate.blocks for hook in block._forward_hooks.values()]
    return sum(hook.__qualname__.startswith("Tap.") for hook in hooks)


def logits_of_one_forward(substrate: Substrate, bank: LensBank, token_ids: np.ndarray) -> np.ndarray:
    ids = torch.tensor(token_ids)[None]
    hidden = substrate.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return bank(torch.stack([hidden[layer + 1][0] for layer in bank.layers], dim=1)).numpy()


class StopAt(StoppingCriteria):
    """Stops row 0 at a length, the others later."""

    def __init__(self, length: int, later: int) -> None:
        self.length, self.later = length, later

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = torch.full((len(input_ids),), input_ids.shape[1] >= self.later)
        done[0] |= input_ids.shape[1] >= self.length
        return done


@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLING,
        {**SAMPLING, "top_p": 0.9, "top_k": 0},
        {**SAMPLING, "top_k": 20},
        {"repetition_penalty": 1.3},
        {**SAMPLING, "use_cache": False},
        {**SAMPLING, "min_new_tokens": 12, "eos_token_id": list(range(100))},
        {**SAMPLING, "cache_implementation": "static"},
        {"generation_config": GenerationConfig(do_sample=True, temperature=1.2, top_k=0)},
        {"stop_strings": ["e", "a", "i"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "batch"])
def test_tokens_are_those_of_plain_generate(monitor: Monitor, prompts: list[str], options: dict[str, Any]):
    substrate = monitor.substrate
    further = {"tokenizer": substrate.tokenizer} if "stop_strings" in options else {}
    expected = plain(substrate, prompts, 7, max_new_tokens=16, **options, **further)
    timelines = monitor.generate(prompts, seed=7, max_new_tokens=16, **options)
    assert isinstance(timelines, list)
    for timeline, ids in zip(timelines, expected, strict=True):
        told = answer(timeline)
        assert told == ids[: len(told)]
        assert set(ids[len(told) :]) <= {1}  # padding behind the answer
        assert len(told) >= 1


@pytest.mark.parametrize(
    "options", [{}, {**SAMPLING, "use_cache": False}, {**SAMPLING, "num_return_sequences": 2}], ids=str
)
def test_every_token_is_read_as_in_one_plain_forward_pass(monitor: Monitor, options: dict[str, Any]):
    timelines = monitor.generate(PROMPTS, seed=3, max_new_tokens=9, **options)
    assert len(timelines) == len(PROMPTS) * options.get("num_return_sequences", 1)
    for timeline in timelines:
        expected_TN = logits_of_one_forward(monitor.substrate, monitor.bank, timeline.token_ids)
        np.testing.assert_allclose(timeline.logits_TN, expected_TN, atol=1e-4)
        expected_TN = monitor.bank.percentile(torch.tensor(timeline.logits_TN)).numpy()
        np.testing.assert_allclose(timeline.percentiles_TN, expected_TN, atol=1e-6)


def test_several_answers_to_one_prompt_are_those_of_plain_generate(monitor: Monitor):
    options = {**SAMPLING, "max_new_tokens": 8, "num_return_sequences": 2}
    expected = plain(monitor.substrate, PROMPTS, 5, **options)
    assert [answer(timeline) for timeline in monitor.generate(PROMPTS, seed=5, **options)] == expected
    several = monitor.generate(PROMPTS[0], seed=5, **options)
    assert isinstance(several, list)
    assert [timeline.prompt for timeline in several] == PROMPTS[:1] * 2


def test_a_row_that_ends_early_is_read_up_to_its_stop_token_and_no_further(monitor: Monitor):
    rows = plain(monitor.substrate, PROMPTS, 0, max_new_tokens=20)
    stop = next(token for token in rows[0][2:8] if token not in rows[1])
    length = rows[0].index(stop) + 1
    first, second, _ = monitor.generate(PROMPTS, max_new_tokens=20, eos_token_id=stop)
    assert answer(first) == rows[0][:length]
    assert answer(second) == rows[1]
    expected_TN = logits_of_one_forward(monitor.substrate, monitor.bank, first.token_ids)
    np.testing.assert_allclose(first.logits_TN, expected_TN, atol=1e-4)


def test_stopping_criteria_of_the_caller_end_rows_where_they_say(monitor: Monitor):
    width = max(len(monitor.substrate.chat(prompt)) for prompt in PROMPTS)
    expected = plain(monitor.substrate, PROMPTS, 0, max_new_tokens=20)
    criteria = [StopAt(width + 3, width + 6)]
    first, *others = monitor.generate(PROMPTS, max_new_tokens=20, stopping_criteria=criteria)
    assert answer(first) == expected[0][:3]
    assert [answer(timeline) for timeline in others] == [ids[:6] for ids in expected[1:]]


def test_a_streamer_of_the_caller_is_fed(monitor: Monitor, capsys: pytest.CaptureFixture[str]):
    streamer: BaseStreamer = TextStreamer(monitor.substrate.tokenizer, skip_prompt=True, skip_special_tokens=True)
    timeline = monitor.generate(PROMPTS[0], seed=0, max_new_tokens=12, streamer=streamer)
    assert isinstance(timeline, Timeline)
    assert capsys.readouterr().out.strip("\n") == timeline.text.strip("\n")


def test_seed_is_for_one_call_only(monitor: Monitor):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    monitor.generate("Hi", seed=3, max_new_tokens=4, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    monitor.generate("Hi", max_new_tokens=4, **SAMPLING)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_token_of_every_row_is_told_once_in_order(monitor: Monitor):
    told: dict[int, list[TokenReading]] = {0: [], 1: [], 2: []}
    stop = plain(monitor.substrate, PROMPTS, 0, max_new_tokens=20)[0][4]
    options = {"max_new_tokens": 20, "eos_token_id": stop}
    timelines = monitor.generate(PROMPTS, on_token=lambda row, reading: told[row].append(reading), **options)
    for row, timeline in enumerate(timelines):
        assert [reading.position for reading in told[row]] == list(range(len(timeline)))
        assert [reading.token for reading in told[row]] == timeline.tokens
        assert [reading.token_id for reading in told[row]] == timeline.token_ids.tolist()
        assert [reading.is_prompt for reading in told[row]] == timeline.is_prompt.tolist()
        assert [reading.is_special for reading in told[row]] == timeline.is_special.tolist()
        assert {len(reading.top) for reading in told[row]} == {3}
        for reading in told[row]:
            rank_N = timeline.rank_TN[reading.position]
            strongest = [timeline.concepts[n] for n in (-rank_N).argsort(kind="stable")[:3]]
            assert [one.concept for one in reading.top] == strongest
            watched = [(one.concept, one.logit) for one in reading.watch]
            expected = timeline.logits_TN[reading.position][[4, 0]].tolist()
            assert watched == list(zip(["concept4", "concept0"], expected, strict=True))


def test_joined_tokens_are_the_text(monitor: Monitor):
    timeline = monitor.generate("Grüße an die Möwe", seed=0, max_new_tokens=60, **SAMPLING)
    assert isinstance(timeline, Timeline)
    decode = monitor.substrate.tokenizer.decode
    assert "".join(timeline.tokens) == decode(timeline.token_ids)
    assert timeline.text == decode(answer(timeline), skip_special_tokens=True)
    assert "Grüße an die Möwe" in "".join(timeline.tokens)


@pytest.mark.parametrize("text", ["naïve 🐈‍⬛ 日本語", "\ufffd" * 7 + " a \ufffd", "", "🐈"])
def test_letters_of_several_tokens_appear_when_they_are_whole(tiny_substrate: Substrate, text: str):
    ids = tiny_substrate.encode(text)
    parts = pieces(tiny_substrate, ids)
    assert "".join(parts) == "<|begin|>" + text
    letters = set(text)
    assert all(set(part) <= letters for part in parts[1:])


def test_bytes_that_are_no_letter_lose_nothing():
    substrate = type("Words", (), {"tokenizer": byte_tokenizer()})()
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(5, 261, size=40).tolist()
        assert "".join(pieces(substrate, ids)) == substrate.tokenizer.decode(ids)
    told = Pieces(substrate)
    cat = substrate.tokenizer("🐈")["input_ids"]
    assert [told.add(token) for token in cat] == ["", "", "", "🐈"]


def test_template_is_special_and_the_words_of_the_user_are_not(monitor: Monitor):
    timeline = monitor.generate("  What is a cat?\n", system="Be brief.", max_new_tokens=3)
    assert isinstance(timeline, Timeline)
    shown = [
        token
        for token, special, prompt in zip(timeline.tokens, timeline.is_special, timeline.is_prompt, strict=True)
        if prompt and not special
    ]
    assert "".join(shown).strip() == "What is a cat?"
    text = monitor.read("What is a cat?")
    assert text.is_special.tolist() == [True] + [False] * 14
    assert text.is_prompt.all()


def test_a_given_text_is_read_without_generating(monitor: Monitor):
    timeline = monitor.read("A cat sat.")
    assert timeline.token_ids.tolist() == monitor.substrate.encode("A cat sat.")
    expected_TN = logits_of_one_forward(monitor.substrate, monitor.bank, timeline.token_ids)
    np.testing.assert_allclose(timeline.logits_TN, expected_TN, atol=1e-4)
    assert (timeline.text, num_hooks(monitor.substrate)) == ("A cat sat.", 0)


def test_reading_in_parts_is_reading_at_once(monitor: Monitor, monkeypatch: pytest.MonkeyPatch):
    whole, told = monitor.generate(PROMPTS, max_new_tokens=5), []
    monkeypatch.setattr("ftw.hat.recorder.POSITIONS_AT_ONCE", 4)
    parts = monitor.generate(
        PROMPTS, max_new_tokens=5, on_token=lambda row, reading: told.append((row, reading.position))
    )
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.logits_TN, other.logits_TN, atol=1e-5)
        np.testing.assert_allclose(one.percentiles_TN, other.percentiles_TN, atol=1e-5)
    assert len(told) == len(set(told)) == sum(len(timeline) for timeline in whole)


def test_a_stream_gives_every_token_and_then_the_timeline(monitor: Monitor):
    expected = monitor.generate("Hi", seed=2, max_new_tokens=10, **SAMPLING)
    with monitor.stream("Hi", seed=2, max_new_tokens=10, **SAMPLING) as stream:
        told = [reading.token_id for reading in stream]
        assert next(stream, None) is None
    assert isinstance(expected, Timeline)
    assert told == expected.token_ids.tolist() == stream.timeline.token_ids.tolist()


def test_leaving_a_stream_early_stops_the_model_and_removes_the_hooks(monitor: Monitor):
    threads, began = threading.active_count(), time.monotonic()
    with monitor.stream("Hi", max_new_tokens=400, eos_token_id=-1) as stream:
        next(stream)
    assert threading.active_count() == threads
    assert num_hooks(monitor.substrate) == 0
    assert len(stream.timeline) < 400
    assert time.monotonic() - began < 10


def test_an_error_in_a_stream_reaches_the_reader(monitor: Monitor):
    with monitor.stream("x" * 600, max_new_tokens=3) as stream:
        for _ in range(2):
            with pytest.raises(SubstrateError, match="context"):
                next(stream)
        with pytest.raises(SubstrateError, match="context"):
            _ = stream.timeline
    with pytest.raises(SubstrateError, match="one sequence"):
        monitor.stream("Hi", num_return_sequences=2)


def test_an_exception_in_the_callback_propagates_and_leaves_no_hook(monitor: Monitor):
    def fail(_: int, reading: TokenReading) -> None:
        if not reading.is_prompt:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        monitor.generate("Hi", max_new_tokens=5, on_token=fail)
    assert num_hooks(monitor.substrate) == 0


def test_an_exception_in_the_model_propagates_and_leaves_no_hook(monitor: Monitor):
    def fail(layer: int, states_BTD: torch.Tensor) -> None:
        if states_BTD.shape[1] == 1:
            raise RuntimeError("broken block")

    with pytest.raises(RuntimeError, match="broken block"), Tap(monitor.substrate, [3], fail):
        monitor.generate("Hi", max_new_tokens=5)
    assert num_hooks(monitor.substrate) == 0


def test_the_callback_may_use_the_model_itself(monitor: Monitor):
    expected = monitor.generate("Hi", max_new_tokens=4)
    timeline = monitor.generate("Hi", max_new_tokens=4, on_token=lambda *_: monitor.read("something else"))
    assert isinstance(timeline, Timeline)
    assert isinstance(expected, Timeline)
    np.testing.assert_array_equal(timeline.logits_TN, expected.logits_TN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids"),
        ({"max_new_tokens": 510}, "context of 512"),
        ({"max_length": 600}, "context of 512"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(monitor: Monitor, options: dict[str, Any], words: str):
    with pytest.raises(SubstrateError, match=words):
        monitor.generate("Hi", **options)
    assert num_hooks(monitor.substrate) == 0


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 4}])
def test_a_prompt_longer_than_the_context_is_refused(monitor: Monitor, options: dict[str, int]):
    with pytest.raises(SubstrateError, match=r"exceed the context of 512 tokens of 'tiny-llama'"):
        monitor.generate("x" * 511, **options)
    with pytest.raises(SubstrateError, match="exceed the context"):
        monitor.read("x" * 512)
    assert len(monitor.read("x" * 511)) == 512
    with pytest.raises(SubstrateError, match="no prompt"):
        monitor.generate([])


def test_a_monitor_refuses_lenses_that_cannot_be_right(tiny_substrate: Substrate, bank: LensBank):
    with pytest.raises(SubstrateError, match="width 16"):
        Monitor(tiny_substrate, random_stack(width=16).bank())
    with pytest.raises(SubstrateError, match="no layer 9"):
        Monitor(tiny_substrate, random_stack(layers=(9,)).bank())
    with pytest.raises(ConceptError, match="concept3"):
        Monitor(tiny_substrate, bank, watch=["concept33"])
    with pytest.raises(ConfigError, match="top_k=-1"):
        Monitor(tiny_substrate, bank, top_k=-1)


def test_meta_says_what_was_read_with_what(monitor: Monitor):
    timeline = monitor.generate("Hi", seed=4, max_new_tokens=2, **SAMPLING)
    assert isinstance(timeline, Timeline)
    assert timeline.meta["fingerprint"] == monitor.substrate.fingerprint
    assert timeline.meta["layers"] == [2, 0]
    assert timeline.meta["generation"] == {"max_new_tokens": 2, **SAMPLING}
    assert timeline.meta["seed"] == 4
    assert timeline.ms_per_token is not None
    assert np.isnan(timeline.ms_per_token).tolist() == timeline.is_prompt.tolist()
