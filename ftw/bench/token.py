"""The measure of live reading: what one token costs the default substrate."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ftw.bench.measure import Call, Stopwatch
from ftw.bench.synthetic import WIDTH


def substrate_token(watch: Stopwatch) -> tuple[str, Call]:
    """One decoding step of a random model of the default substrate's shape (SmolLM2-135M), 64 tokens behind it."""
    width, blocks = watch.size(WIDTH, 64), watch.size(30, 2)
    shape = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        vocab_size=watch.size(49152, 512),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(), watch.device:
        torch.manual_seed(watch.config.seed)
        model = LlamaForCausalLM(shape).eval().requires_grad_(False)
    ids_1T, cache = torch.ones(1, 65, dtype=torch.long, device=watch.device), DynamicCache()

    def step() -> None:
        model(input_ids=ids_1T[:, :1], past_key_values=cache)
        cache.crop(-1)

    with torch.inference_mode():
        model(input_ids=ids_1T[:, :64], past_key_values=cache)
    return "a token of a model of SmolLM2-135M's shape", without_gradients(step)


def without_gradients(call: Call) -> Call:
    """The call in inference mode."""

    def quiet() -> None:
        with torch.inference_mode():
            call()

    return quiet
