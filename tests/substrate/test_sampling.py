"""Sampled answers: the model's own distribution, each token with the state that reading the whole text gives it."""

import numpy as np
import pytest
import torch

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate
from ftw.substrate.sampling import Answer, sample_answers
from ftw.substrate.taps import read_states

PROMPTS = ["What is a whale?", "Hm?", "What is a whale?", "Tell me about the sea, and about what lives in it."]
LAYERS = (1, 3)


def sampled(substrate: Substrate, texts: list[str] = PROMPTS, **options) -> list[Answer]:
    given = {"max_new_tokens": 9, "precision": "float32", "seed": 3, **options}
    answers = list(sample_answers(substrate, [substrate.chat(text) for text in texts], LAYERS, **given))
    return sorted(answers, key=lambda answer: answer.prompt)


def test_every_prompt_has_one_answer_and_every_token_the_state_that_a_plain_reading_gives(tiny_substrate: Substrate):
    answers = sampled(tiny_substrate)
    assert [answer.prompt for answer in answers] == list(range(len(PROMPTS)))
    assert any(answer.token_ids for answer in answers)
    for answer in answers:
        if not answer.token_ids:
            continue
        prompt = tiny_substrate.chat(PROMPTS[answer.prompt])
        ((_, whole_LTD),) = read_states(tiny_substrate, [[*prompt, *answer.token_ids]], LAYERS, precision="float32")
        assert answer.states_LTD.shape == (len(LAYERS), len(answer.token_ids), tiny_substrate.width)
        # read_states leaves position 0 out.
        assert (answer.states_LTD - whole_LTD[:, len(prompt) - 1 :]).abs().max() < 1e-4


def test_the_same_seed_gives_the_same_answers_and_leaves_torch_alone(tiny_substrate: Substrate):
    before = torch.get_rng_state()
    first, again, other = sampled(tiny_substrate), sampled(tiny_substrate), sampled(tiny_substrate, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in again]
    assert [answer.token_ids for answer in first] != [answer.token_ids for answer in other]


def test_samples_of_one_prompt_differ_and_greedy_ones_do_not(tiny_substrate: Substrate):
    many = sampled(tiny_substrate, ["Hm?"] * 6)
    assert len({tuple(answer.token_ids) for answer in many}) > 1
    greedy = sampled(tiny_substrate, ["Hm?"] * 3, temperature=0.0)
    assert len({tuple(answer.token_ids) for answer in greedy}) == 1


def test_first_tokens_follow_the_models_distribution(tiny_substrate: Substrate):
    ids = torch.tensor([tiny_substrate.chat("Hm?")])
    chance_V = tiny_substrate.model(ids).logits[0, -1].softmax(-1).numpy()
    answers = sampled(tiny_substrate, ["Hm?"] * 3000, max_new_tokens=1, batch_size=3000)
    first = [answer.token_ids[0] for answer in answers if answer.token_ids]
    found_V = np.bincount(first, minlength=len(chance_V)) / len(answers)
    ends = tiny_substrate.tokenizer.all_special_ids
    chance_V[ends] = 0
    assert np.abs(found_V - chance_V).sum() < 3 * np.sqrt(len(chance_V) / len(answers))


def test_answers_end_before_the_token_that_ends_them(tiny_substrate: Substrate):
    ends = set(tiny_substrate.tokenizer.all_special_ids)
    answers = sampled(tiny_substrate, ["Hm?"] * 200, max_new_tokens=12, batch_size=200)
    assert any(len(answer.token_ids) < 12 for answer in answers)
    assert not any(ends & set(answer.token_ids) for answer in answers)


def test_options_that_cannot_be_are_refused(tiny_substrate: Substrate):
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        sampled(tiny_substrate, max_new_tokens=0)
    with pytest.raises(SubstrateError, match="do not fit"):
        sampled(tiny_substrate, max_new_tokens=512)
