"""Claims about shares of tokens: they add up where they should, and pieces give the text back."""

from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from ftw.hat.lens import Head, HeadConfig
from ftw.hat.linear import LinearHead
from ftw.hat.pooling import POOLS, STATE_POOLS, Pooling
from ftw.hat.store import LensStack
from ftw.map.contributions import TextReader, is_exact, pieces, shares_of_tokens, text_logits
from ftw.substrate.model import Substrate

TEXTS = ["The whale sings.", "ab", "Zum Frühstück gibt es Äpfel und 🍎 für alle"]
LAYERS = (1, 3)


HeadT = TypeVar("HeadT", bound=Head)


def filled(head: HeadT, generator: torch.Generator) -> HeadT:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def stack_of(width: int, family: str = "linear", *, pools: tuple[str, ...] = ()) -> LensStack:
    """Two lenses with random weights; with a pooling of their own over these pools if there are some."""
    generator = torch.Generator().manual_seed(0)
    config = HeadConfig(family=family, hidden=0 if family == "linear" else 6)
    heads = [filled(config.build(2, width), generator) for _ in LAYERS]
    scale_NL, pooling = torch.rand(2, 2, generator=generator), None
    if pools:
        more = {
            pool: [filled(LinearHead(2, width), generator) for _ in LAYERS] for pool in pools if pool in STATE_POOLS[1:]
        }
        scale_NLP = torch.rand(2, 2, len(POOLS), generator=generator)
        scale_NLP *= torch.tensor([float(pool in ("mean", *pools)) for pool in POOLS])
        pooling = Pooling(heads=more, scale_NLP=scale_NLP, offset_N=torch.tensor([0.5, -2.0]))
    return LensStack(
        names=["a", "b"], layers=LAYERS, heads=heads, scale_NL=scale_NL, offset_NL=scale_NL - 1, pooling=pooling
    )


@pytest.fixture
def reader(tiny_substrate: Substrate) -> TextReader:
    return TextReader(tiny_substrate, LAYERS, "mean", 64, "float32")


@pytest.mark.parametrize("pools", [(), ("max",), ("last", "tail"), ("max", "last", "tail")])
def test_exact_shares_add_up_to_the_logit(reader: TextReader, pools: tuple[str, ...]):
    stack = stack_of(reader.substrate.width, pools=pools)
    assert is_exact(stack, "mean")
    logits_SN = reader.logits(stack, TEXTS)
    for index, normed_TLD in reader.tokens(TEXTS):
        logit_N, share_TN = shares_of_tokens(stack, normed_TLD, "mean")
        assert len(share_TN) == len(reader.token_ids(TEXTS[index])) - 1
        assert torch.allclose(share_TN.sum(0), logit_N, atol=1e-4)
        assert torch.allclose(logit_N, logits_SN[index], atol=1e-5)


def test_without_a_pooling_of_its_own_a_stack_reads_as_its_bank(reader: TextReader):
    stack, normed_TLD = stack_of(reader.substrate.width), dict(reader.tokens(TEXTS))[0]
    assert torch.allclose(text_logits(stack, normed_TLD, "mean"), stack.bank().logits(normed_TLD).mean(0), atol=1e-4)
    assert torch.allclose(text_logits(stack, normed_TLD, "last"), stack.bank().logits(normed_TLD)[-1], atol=1e-4)


def test_the_strongest_token_alone_has_the_share_of_the_maximum(reader: TextReader):
    stack, normed_TLD = stack_of(reader.substrate.width, pools=("max",)), dict(reader.tokens(TEXTS))[2]
    pooling = stack.pooling
    assert pooling is not None
    only = replace(stack, pooling=replace(pooling, scale_NLP=pooling.scale_NLP * torch.tensor([0.0, 1, 0, 0, 0])))
    _, share_TN = shares_of_tokens(only, normed_TLD, "mean")
    highest = {int(head(normed_TLD[:, layer])[:, 0].argmax()) for layer, head in enumerate(stack.heads)}
    even = float(pooling.offset_N[0]) / len(normed_TLD)
    assert {token for token in range(len(normed_TLD)) if abs(float(share_TN[token, 0]) - even) > 1e-6} == highest


@pytest.mark.parametrize(
    ("family", "pool", "pools"), [("mlp", "mean", ()), ("linear", "last", ()), ("linear", "", ("spread",))]
)
def test_other_shares_are_what_the_logit_loses_without_the_token(
    reader: TextReader, family: str, pool: str, pools: tuple[str, ...]
):
    stack = stack_of(reader.substrate.width, family, pools=pools)
    assert not is_exact(stack, pool)
    normed_TLD = dict(reader.tokens(TEXTS))[0]
    logit_N, share_TN = shares_of_tokens(stack, normed_TLD, pool)
    for token in range(len(normed_TLD)):
        left = torch.cat([normed_TLD[:token], normed_TLD[token + 1 :]])
        assert torch.allclose(share_TN[token], logit_N - text_logits(stack, left, pool), atol=1e-5)
    if pool == "last":
        assert (share_TN[:-1].abs() < 1e-6).all()


def test_pieces_give_the_text_back_and_a_character_of_several_tokens_stands_whole(reader: TextReader):
    for text in TEXTS:
        found = pieces(reader.substrate.tokenizer, reader.token_ids(text)[1:])
        assert "".join(found) == text
        assert len(found) == len(reader.token_ids(text)) - 1  # a byte a token
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
