"""Claims about shares of tokens: they add up where they should, and pieces give the text back."""

from dataclasses import replace

import pytest
import torch

from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack
from ftw.map.contributions import TextReader, is_exact, pieces, pooled_state, shares_of_tokens
from ftw.substrate.model import Substrate

TEXTS = ["The whale sings.", "ab", "Zum Frühstück gibt es Äpfel und 🍎 für alle"]
LAYERS = (1, 3)


def stack_of(width: int, family: str = "linear", *, calibrated: bool = False) -> LensStack:
    generator = torch.Generator().manual_seed(0)
    heads = [HeadConfig(family=family, hidden=0 if family == "linear" else 6).build(2, width) for _ in LAYERS]
    for head in heads:
        for parameter in head.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scale_NL = torch.rand(2, 2, generator=generator)
    stack = LensStack(names=["a", "b"], layers=LAYERS, heads=heads, scale_NL=scale_NL, offset_NL=scale_NL - 1)
    if not calibrated:
        return stack
    quantiles_NQ = torch.tensor([[-2.0, 1.5, 4.0], [-1.0, 0.25, 2.0]])
    return replace(stack, quantiles_NQ=quantiles_NQ, levels_Q=torch.tensor([0, 0.5, 1]))


@pytest.fixture
def reader(tiny_substrate: Substrate) -> TextReader:
    return TextReader(tiny_substrate, LAYERS, "mean", 64, "float32")


@pytest.mark.parametrize("calibrated", [False, True])
def test_exact_shares_add_up_to_the_distance_from_background(reader: TextReader, calibrated: bool):
    stack = stack_of(reader.substrate.width, calibrated=calibrated)
    assert is_exact(stack, "mean")
    bank = stack.bank()
    base_N = torch.tensor([1.5, 0.25]) if calibrated else torch.zeros(2)
    pooled_SLD = reader.pooled(TEXTS)
    for index, normed_TLD in reader.tokens(TEXTS):
        logit_N, share_TN = shares_of_tokens(bank, normed_TLD, "mean", exact=True)
        assert len(share_TN) == len(reader.token_ids(TEXTS[index])) - 1
        assert torch.allclose(share_TN.sum(0), logit_N - base_N, atol=1e-4)
        assert torch.allclose(logit_N, bank.logits(pooled_SLD[index][None])[0], atol=1e-5)


@pytest.mark.parametrize(("family", "pool"), [("mlp", "mean"), ("linear", "last")])
def test_other_shares_are_what_the_logit_loses_without_the_token(reader: TextReader, family: str, pool: str):
    stack = stack_of(reader.substrate.width, family)
    assert not is_exact(stack, pool)
    bank, normed_TLD = stack.bank(), dict(reader.tokens(TEXTS))[0]
    logit_N, share_TN = shares_of_tokens(bank, normed_TLD, pool, exact=False)
    for token in range(len(normed_TLD)):
        left = torch.cat([normed_TLD[:token], normed_TLD[token + 1 :]])
        without_N = bank.logits(pooled_state(left, pool)[None])[0]
        assert torch.allclose(share_TN[token], logit_N - without_N, atol=1e-5)
    if pool == "last":
        assert (share_TN[:-1].abs() < 1e-6).all()


def test_pieces_give_the_text_back_and_a_character_of_several_tokens_stands_whole(reader: TextReader):
    for text in TEXTS:
        found = pieces(reader.substrate.tokenizer, reader.token_ids(text)[1:])
        assert "".join(found) == text
        assert len(found) == len(reader.token_ids(text)) - 1  # a byte a token
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
