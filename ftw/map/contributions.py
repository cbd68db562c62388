"""Which tokens a lens's reading of a text came from.

Linear lenses take a text apart exactly. What reads the mean over tokens is itself a mean over what it reads at each of
them; the last token, the mean of the last few and the strongest token belong to the tokens that they are. Constants are
shared out evenly, so the shares add up to the logit. For other lenses (hidden units, the spread over tokens) a token's
share is what the logit loses when it is left out.

Axes: S texts, T tokens, L layers, D model width, N lenses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ftw.hat.bank import normalise
from ftw.hat.linear import LinearHead
from ftw.hat.pooling import POOLS, TAIL_TOKENS, Pooling, pool_tokens
from ftw.hat.store import LensStack
from ftw.substrate.model import Substrate
from ftw.substrate.taps import read_states


@dataclass(frozen=True)
class TextReader:
    """Reads whole texts as the lenses of a stack were trained to: same cut, same precision, same pool.

    Attributes:
        pool: read by lenses without a pooling of their own. max_tokens: of a text, the sink included.
        precision: of the substrate's arithmetic.
    """

    substrate: Substrate
    layers: tuple[int, ...]
    pool: str
    max_tokens: int
    precision: str

    def token_ids(self, text: str) -> list[int]:
        """Ids that are read of a text, the sink first; one id where the text has no tokens."""
        return self.substrate.encode(text, max_tokens=self.max_tokens)

    def tokens(self, texts: Sequence[str], *, telling: str = "") -> Iterator[tuple[int, Tensor]]:
        """(place in `texts`, layer-normed states_TLD) of each text, in the order of the batches.

        Args:
            telling: words for a bar on stderr; none without.

        Raises:
            SubstrateError: a text without tokens, or states that are not finite.
        """
        encoded = [self.token_ids(text) for text in texts]
        states = read_states(self.substrate, encoded, self.layers, precision=self.precision)
        console = Console(stderr=True)
        shown = track(states, telling, len(texts), console=console, transient=True, disable=not telling)
        for index, states_LTD in shown:
            yield index, normalise(states_LTD).transpose(0, 1)

    def logits(self, stack: LensStack, texts: Sequence[str], *, telling: str = "") -> Tensor:
        """Logit of every lens for every text: [S, N]."""
        logits_SN = torch.empty(len(texts), len(stack.names))
        for index, normed_TLD in self.tokens(texts, telling=telling):
            logits_SN[index] = text_logits(stack, normed_TLD, self.pool)
        return logits_SN


def text_logits(stack: LensStack, normed_TLD: Tensor, pool: str) -> Tensor:
    """Logit [N] of a text from its layer-normed tokens; `pool` is read by lenses without a pooling of their own."""
    tokens_LTD = normed_TLD.transpose(0, 1)
    if stack.pooling is not None:
        return stack.pooling.read(stack.heads, tokens_LTD)
    return stack.bank().logits(pool_tokens(tokens_LTD, pool)[None])[0]


def is_exact(stack: LensStack, pool: str) -> bool:
    """Whether the shares of `shares_of_tokens` add up to the logit."""
    linear = all(isinstance(head, LinearHead) for head in stack.heads)
    return linear and (pool == "mean" if stack.pooling is None else not stack.pooling.uses("spread"))


def shares_of_tokens(stack: LensStack, normed_TLD: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Logit of a text, [N], and what each token gave to it, [T, N] in logits."""
    logit_N, num_tokens = text_logits(stack, normed_TLD, pool), len(normed_TLD)
    if num_tokens == 1:
        return logit_N, logit_N[None]
    if not is_exact(stack, pool):
        kept = ~torch.eye(num_tokens, dtype=torch.bool)
        return logit_N, torch.stack([logit_N - text_logits(stack, normed_TLD[row], pool) for row in kept])
    if stack.pooling is None:
        return logit_N, stack.bank().logits(normed_TLD) / num_tokens
    return logit_N, _shares_by_pool(stack, stack.pooling, normed_TLD)


@torch.no_grad()
def _shares_by_pool(stack: LensStack, pooling: Pooling, normed_TLD: Tensor) -> Tensor:
    """Exact shares of linear lenses with a pooling of their own, [T, N]."""
    num_tokens = len(normed_TLD)
    share_TN = (pooling.offset_N / num_tokens).expand(num_tokens, -1).clone()
    tail = min(TAIL_TOKENS, num_tokens)
    # First token of those that a pool averages.
    start = {"mean": 0, "last": num_tokens - 1, "tail": num_tokens - tail}
    for pool, heads in {"mean": stack.heads, **pooling.heads}.items():
        scale_NL = pooling.scale_NLP[..., POOLS.index(pool)]
        for layer, head in enumerate(heads if pool in start else ()):
            first = start[pool]
            share_TN[first:] += scale_NL[:, layer] * head(normed_TLD[first:, layer]) / (num_tokens - first)
    for layer, head in enumerate(stack.heads):
        highest_N, token_N = head(normed_TLD[:, layer]).max(dim=0)
        weighed_N = pooling.scale_NLP[:, layer, POOLS.index("max")] * highest_N
        share_TN[token_N, torch.arange(len(token_N))] += weighed_N
    return share_TN


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; a character of several tokens stands at the last of them."""
    found: list[str] = []
    done = ""
    for stop in range(1, len(token_ids) + 1):
        whole = tokenizer.decode(list(token_ids[:stop]), clean_up_tokenization_spaces=False)
        # An unfinished character decodes as U+FFFD at the end; the token that completes it shows it.
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(token_ids):
            found.append("")
            continue
        found.append(whole[len(done) :])
        done = whole
    return found
