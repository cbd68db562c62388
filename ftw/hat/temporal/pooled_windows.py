"""Lenses of whole texts that read windows: each window is decided as they learned to decide a text.

A window has the pooled states of a text (mean, last, tail, spread) and the highest logit of its tokens; each lens
weighs them by its own pooling. Percentiles are of single tokens, which such a decision is not, so none are given.

Axes: N lenses, B sequences (or windows), T tokens, L layers, D model width, F = L x D (or L x N).
"""

import torch
from torch import Tensor

from ftw.errors import SubstrateError
from ftw.hat.bank import LensBank, normalise
from ftw.hat.lens import Head
from ftw.hat.pooling import TAIL_TOKENS, Pooling


class PooledWindows:
    """Lenses with a pooling of their own, as what reads windows.

    Args:
        bank: the lenses. heads: one a layer, as in the stack. pooling: how each lens reads a text.
    """

    calibrated = False

    def __init__(self, bank: LensBank, heads: list[Head], pooling: Pooling) -> None:
        self.bank, self._heads, self.pooling = bank, heads, pooling
        self.names, self.layers, self.width = bank.names, bank.layers, bank.width
        self.rows_of = bank.rows_of

    def __len__(self) -> int:
        return len(self.names)

    def rank(self, logits_BN: Tensor, /) -> Tensor:
        """Logits as they are: they are calibrated, lens by lens."""
        return logits_BN

    def background(self) -> tuple[Tensor, Tensor]:
        """No quantiles."""
        return torch.empty(len(self), 0), torch.empty(0)

    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor:
        """NaN: there is no background of windows to rank among."""
        return torch.full_like(logits_BN, torch.nan)

    @torch.no_grad()
    def tokens(self, states_BTLD: Tensor, /) -> list[Tensor]:
        """Layer-normed states [1, B, T, L D], and the token heads' logits [1, B, T, L N] where a lens uses the highest.

        Raises:
            SubstrateError: states of another width or number of layers.
        """
        if states_BTLD.shape[2:] != (len(self.layers), self.width):
            raise SubstrateError(
                f"states of shape {tuple(states_BTLD.shape)} for lenses that read layers {list(self.layers)} of width "
                f"{self.width}; give [sequences, tokens, layers, width]"
            )
        normed_BTLD = normalise(states_BTLD)
        parts = [normed_BTLD.flatten(2).unsqueeze(0)]
        if self.pooling.uses("max"):
            logits = [head(normed_BTLD[:, :, layer].flatten(0, 1)) for layer, head in enumerate(self._heads)]
            parts.append(torch.cat(logits, dim=-1).unflatten(0, states_BTLD.shape[:2]).unsqueeze(0))
        return parts

    def pooled(self, parts_XBTF: list[Tensor], lengths_B: Tensor, /) -> Tensor:
        """Logits of windows, [B, N]; NaN for one without tokens."""
        tokens_BTF, num_layers = parts_XBTF[0][0], len(self.layers)
        states = {
            pool: state_BF.unflatten(1, (num_layers, -1))
            for pool, state_BF in window_states(tokens_BTF, lengths_B, self.pooling.states).items()
        }
        highest_BLN = None
        if len(parts_XBTF) > 1:
            padding_BT1 = _from(lengths_B, tokens_BTF.shape[1])
            highest_BF = parts_XBTF[1][0].masked_fill(padding_BT1, -torch.inf).amax(1)
            # A window without tokens has no highest; it becomes NaN below.
            highest_BLN = highest_BF.nan_to_num(neginf=0.0).unflatten(1, (num_layers, -1))
        logits_BN = self.pooling.combine(self._heads, states, highest_BLN)
        return logits_BN.masked_fill((lengths_B < 1).unsqueeze(1), torch.nan)


def window_states(tokens_BTF: Tensor, lengths_B: Tensor, pools: list[str]) -> dict[str, Tensor]:
    """Pooled states [B, F] of windows that are padded on the right, as `ftw.hat.pooling.pool_tokens` makes them."""
    num_tokens = tokens_BTF.shape[1]
    counts_B = lengths_B.clamp_min(1)
    padding_BT1 = _from(lengths_B, num_tokens)
    states = {"mean": tokens_BTF.masked_fill(padding_BT1, 0).sum(1) / counts_B.unsqueeze(1)}
    if "last" in pools:
        last_B1F = (counts_B - 1).view(-1, 1, 1).expand(-1, 1, tokens_BTF.shape[2])
        states["last"] = tokens_BTF.gather(1, last_B1F)[:, 0]
    if "tail" in pools:
        before_BT1 = ~_from(lengths_B - TAIL_TOKENS, num_tokens)
        tail_B1 = counts_B.clamp_max(TAIL_TOKENS).unsqueeze(1)
        states["tail"] = tokens_BTF.masked_fill(padding_BT1 | before_BT1, 0).sum(1) / tail_B1
    if "spread" in pools:
        off_BTF = (tokens_BTF - states["mean"].unsqueeze(1)).masked_fill(padding_BT1, 0)
        states["spread"] = (off_BTF.square().sum(1) / counts_B.unsqueeze(1)).sqrt()
    return states


def _from(starts_B: Tensor, num_tokens: int) -> Tensor:
    """Which tokens stand at or behind a place of each window, bool [B, T, 1]."""
    return torch.arange(num_tokens, device=starts_B.device).view(1, -1, 1) >= starts_B.view(-1, 1, 1)
