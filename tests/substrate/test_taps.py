"""A tap sees what transformers calls hidden states, can change them, and leaves nothing behind."""

import pytest
import torch
from torch import Tensor

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate
from ftw.substrate.prompts import generate_texts
from ftw.substrate.taps import Tap, plan_batches, read_states, resolve_precision
from tests.conftest import byte_tokenizer, tiny_llama
from tests.substrate.test_model import CONFIGS, tiny_model

TEXTS = ["a cat sat on the mat", "no", "rivers run to the sea, and the sea is not full", "snow", "a dog", "thirty"]


def num_hooks(substrate: Substrate) -> int:
    return sum(len(block._forward_hooks) for block in substrate.blocks)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tap_sees_the_hidden_states_of_transformers(architecture: str) -> None:
    substrate = Substrate.from_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    seen: dict[int, Tensor] = {}
    final_norm_input: list[Tensor] = []
    # The last hidden state of transformers has been through the final norm; what enters that norm is our last layer.
    base = substrate.model.base_model
    norm = next(child for name, child in base.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    handle = norm.register_forward_pre_hook(lambda _, args: final_norm_input.append(args[0]))
    tokens = torch.tensor([substrate.encode("a cat sat")])
    with torch.inference_mode(), Tap(substrate, range(3), seen.__setitem__):
        output = substrate.model(tokens, output_hidden_states=True)
    handle.remove()
    for layer in (0, 1):
        assert torch.equal(seen[layer], output.hidden_states[layer + 1])
    assert torch.equal(seen[2], final_norm_input[0])
    assert torch.equal(norm(seen[2]), output.hidden_states[3])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_goes_on_through_the_model(architecture: str) -> None:
    substrate = Substrate.from_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    tokens = torch.tensor([substrate.encode("a cat sat")])
    with torch.inference_mode():
        plain = substrate.model(tokens).logits
        with Tap(substrate, [1], lambda _, states_BTD: states_BTD * 1.0):
            assert torch.equal(substrate.model(tokens).logits, plain)
        with Tap(substrate, [1], lambda _, states_BTD: torch.zeros_like(states_BTD)):
            edited = substrate.model(tokens).logits
    assert not torch.allclose(edited, plain)
    assert num_hooks(substrate) == 0


def test_a_tuple_of_block_outputs_keeps_its_other_parts(tiny_substrate: Substrate) -> None:
    class Pair(torch.nn.Module):
        def forward(self, states_BTD: Tensor) -> tuple[Tensor, str]:
            return states_BTD + 1, "cache"

    pair = Pair()
    substrate = Substrate.from_model(tiny_llama(), byte_tokenizer(), name="pair")
    substrate.blocks[0] = pair
    with Tap(substrate, [0], lambda _, states_BTD: states_BTD * 2):
        states_BTD, rest = pair(torch.ones(1, 2, 3))
    assert rest == "cache"
    assert torch.equal(states_BTD, torch.full((1, 2, 3), 4.0))


def test_stop_ends_the_forward_after_the_deepest_block(tiny_substrate: Substrate) -> None:
    seen: dict[int, Tensor] = {}
    reached = []
    handles = [tiny_substrate.blocks[3].register_forward_pre_hook(lambda *_: reached.append("block 3"))]
    handles.append(tiny_substrate.model.lm_head.register_forward_pre_hook(lambda *_: reached.append("head")))
    with torch.inference_mode(), Tap(tiny_substrate, [2, 0], seen.__setitem__, stop=True) as tap:
        tiny_substrate.model(torch.tensor([[0, 9, 8]]))
        reached.append("after the call")
    for handle in handles:
        handle.remove()
    assert reached == []
    assert sorted(seen) == [0, 2]
    assert tap.num_fired == {2: 1, 0: 1}


def test_nested_taps_swallow_only_their_own_ending(tiny_substrate: Substrate) -> None:
    # transformers leaves hooks of its own on a model that was once asked for all its hidden states.
    before = num_hooks(tiny_substrate)
    order = []
    with (
        torch.inference_mode(),
        Tap(tiny_substrate, [1], lambda *_: order.append("outer"), stop=True),
        Tap(tiny_substrate, [0], lambda *_: order.append("inner")),
    ):
        tiny_substrate.model(torch.tensor([[0, 9]]))
    assert order == ["inner", "outer"]
    assert num_hooks(tiny_substrate) == before


def test_a_tap_that_never_fired_is_an_error(tiny_substrate: Substrate) -> None:
    with pytest.raises(SubstrateError, match="never fired"), Tap(tiny_substrate, [1], lambda *_: None):
        pass
    with pytest.raises(SubstrateError, match="0-3"):
        Tap(tiny_substrate, [4], lambda *_: None)


def test_hooks_are_gone_after_an_exception_and_the_exception_stays(tiny_substrate: Substrate) -> None:
    # transformers leaves hooks of its own on a model that was once asked for all its hidden states.
    before = num_hooks(tiny_substrate)

    def fail(layer: int, states_BTD: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Tap(tiny_substrate, [1, 2], fail):
        tiny_substrate.model(torch.tensor([[0, 9]]))
    with pytest.raises(KeyError), Tap(tiny_substrate, [1], lambda *_: None):
        raise KeyError("before any forward")
    with (
        pytest.raises(SubstrateError, match="shape"),
        Tap(tiny_substrate, [1], lambda _, states_BTD: states_BTD[:, :1]),
    ):
        tiny_substrate.model(torch.tensor([[0, 9]]))
    assert num_hooks(tiny_substrate) == before


def test_a_tap_fires_at_every_step_of_a_generation(tiny_substrate: Substrate) -> None:
    lengths = []
    tokens = torch.tensor([[0, 9, 8]])
    with torch.inference_mode(), Tap(tiny_substrate, [2], lambda _, states_BTD: lengths.append(states_BTD.shape[1])):
        tiny_substrate.model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
    assert lengths == [3, 1, 1, 1]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_reading_in_batches_equals_reading_alone(architecture: str) -> None:
    substrate = Substrate.from_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    token_ids = [substrate.encode(text) for text in TEXTS]
    batched = dict(read_states(substrate, token_ids, [2, 0], batch_tokens=70, precision="float32"))
    assert sorted(batched) == list(range(len(TEXTS)))
    for index, ids in enumerate(token_ids):
        with torch.inference_mode():
            hidden = substrate.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states_LTD = batched[index]
        assert states_LTD.dtype == torch.float32
        assert states_LTD.shape == (2, len(ids) - 1, substrate.width)
        torch.testing.assert_close(states_LTD[1], hidden[1][0, 1:], atol=1e-4, rtol=1e-4)


def test_order_of_texts_and_side_of_padding_change_nothing(tiny_substrate: Substrate) -> None:
    token_ids = [tiny_substrate.encode(text) for text in TEXTS]
    straight = dict(read_states(tiny_substrate, token_ids, [1], precision="float32"))
    backward = dict(read_states(tiny_substrate, token_ids[::-1], [1], precision="float32"))
    width = max(map(len, token_ids))
    left_BT = torch.tensor([[1] * (width - len(ids)) + ids for ids in token_ids])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids])
    places_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        padded_left = tiny_substrate.model(
            left_BT, attention_mask=mask_BT, position_ids=places_BT, output_hidden_states=True
        ).hidden_states[2]
    for index, ids in enumerate(token_ids):
        torch.testing.assert_close(straight[index], backward[len(TEXTS) - 1 - index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(straight[index][0], padded_left[index, width - len(ids) + 1 :], atol=1e-4, rtol=1e-4)


def test_reading_twice_gives_the_same_bits_in_the_same_order(tiny_substrate: Substrate) -> None:
    token_ids = [tiny_substrate.encode(text) for text in TEXTS]
    first, second = (list(read_states(tiny_substrate, token_ids, [1, 3], batch_tokens=64)) for _ in range(2))
    assert [index for index, _ in first] == [index for index, _ in second]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_bfloat16_reads_about_the_same(tiny_substrate: Substrate) -> None:
    token_ids = [tiny_substrate.encode(text) for text in TEXTS]
    exact = dict(read_states(tiny_substrate, token_ids, [2], precision="float32"))
    for index, states_LTD in read_states(tiny_substrate, token_ids, [2], precision="bfloat16"):
        assert states_LTD.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(states_LTD, exact[index], dim=-1).min() > 0.99


def test_batches_hold_every_text_once_and_respect_the_budget() -> None:
    lengths = [5, 90, 3, 3, 40, 41, 8]
    batches = plan_batches(lengths, 82)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 82 for batch in batches)
    assert batches[0] == [1]
    with pytest.raises(ConfigError, match="at least 1"):
        plan_batches(lengths, 0)


def test_texts_that_cannot_be_read_are_named(tiny_substrate: Substrate) -> None:
    with pytest.raises(SubstrateError, match="text 1 has 513 tokens"):
        list(read_states(tiny_substrate, [[0, 5], [0] * 513], [1]))
    with pytest.raises(SubstrateError, match="text 0 has no tokens"):
        list(read_states(tiny_substrate, [[0]], [1]))
    with pytest.raises(ConfigError, match="float32"):
        resolve_precision(tiny_substrate, "fp16")


def test_states_that_are_not_finite_name_the_text() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data[200] = torch.nan
    substrate = Substrate.from_model(model, byte_tokenizer(), name="nan", fingerprint="0" * 64)
    texts = [[0, 7, 8, 9], [0, 7, 200]]
    read = []
    with pytest.raises(SubstrateError, match="text 1 are not finite"):
        read += [index for index, _ in read_states(substrate, texts, [1], precision="float32")]
    assert num_hooks(substrate) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_texts_repeat_with_the_seed_and_keep_the_order(tiny_substrate: Substrate, temperature: float) -> None:
    def write(seed: int) -> list[str]:
        return generate_texts(
            tiny_substrate, TEXTS, max_new_tokens=6, temperature=temperature, seed=seed, batch_size=4, progress=False
        )

    before = torch.random.get_rng_state()
    assert write(0) == write(0)
    assert (write(0) == write(1)) == (temperature == 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any("<|" in text for text in write(0))


def test_greedy_texts_are_those_of_generating_one_by_one() -> None:
    # Float32 throughout: a copy in bfloat16 may break a near-tie the other way.
    substrate = Substrate.from_model(tiny_llama().bfloat16(), byte_tokenizer(), name="tiny")
    sequences = generate_texts(substrate, TEXTS, max_new_tokens=1, temperature=0, seed=0, progress=False)
    for prompt, text in zip(TEXTS, sequences, strict=True):
        alone = generate_texts(substrate, [prompt], max_new_tokens=1, temperature=0, seed=0, progress=False)
        assert alone == [text]


def test_a_prompt_too_long_for_the_context_is_refused(tiny_substrate: Substrate) -> None:
    with pytest.raises(SubstrateError, match="512 tokens"):
        generate_texts(tiny_substrate, ["x" * 600], max_new_tokens=4, temperature=0, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        generate_texts(tiny_substrate, ["x"], max_new_tokens=0, temperature=0, seed=0)
