"""Which tokens a lens's reading of a text came from.

A linear lens that reads the mean over tokens is itself a mean: the text's logit is the average of what the lens reads
at each token, so a token's share is exact. For any other lens (maximum, last token, hidden units) a token's share is
what the logit loses when that token is left out.

Axes: T tokens, L layers, D model width, N lenses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ftw.hat.bank import LensBank, normalise
from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.map.collect import pool_tokens
from ftw.substrate.model import Substrate
from ftw.substrate.taps import read_states


@dataclass(frozen=True)
class TextReader:
    """Reads whole texts as the lenses of a stack were trained to: same cut, same precision, same pool.

    Attributes:
        pool: "mean" or "last". max_tokens: of a text, the sink included. precision: of the substrate's arithmetic.
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

    def pooled(self, texts: Sequence[str], *, telling: str = "") -> Tensor:
        """States that a text-level reading is made on: [len(texts), L, D]."""
        states_SLD = torch.empty(len(texts), len(self.layers), self.substrate.width)
        for index, normed_TLD in self.tokens(texts, telling=telling):
            states_SLD[index] = pooled_state(normed_TLD, self.pool)
        return states_SLD


def pooled_state(normed_TLD: Tensor, pool: str) -> Tensor:
    """[L, D] of a text, as collecting makes it."""
    return pool_tokens(normed_TLD.transpose(0, 1), pool)


def is_exact(stack: LensStack, pool: str) -> bool:
    """Whether the shares of `shares_of_tokens` add up to the logit."""
    return pool == "mean" and all(isinstance(head, LinearHead) for head in stack.heads)


def shares_of_tokens(bank: LensBank, normed_TLD: Tensor, pool: str, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Logit of a text, [N], and what each token gave to it, [T, N] in logits.

    Args:
        exact: shares that add up to the logit's distance from where the lens stands on background tokens (its median;
            0 for lenses without percentiles). Otherwise logit minus the logit of the text without the token.
    """
    logit_N = bank.logits(pooled_state(normed_TLD, pool)[None])[0]
    base_N = bank.median if bank.calibrated else torch.zeros_like(logit_N)
    num_tokens = len(normed_TLD)
    if exact or num_tokens == 1:
        return logit_N, (bank.logits(normed_TLD) - base_N) / num_tokens
    kept = ~torch.eye(num_tokens, dtype=torch.bool)
    without_TLD = torch.stack([pooled_state(normed_TLD[row], pool) for row in kept])
    return logit_N, logit_N - bank.logits(without_TLD)


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
