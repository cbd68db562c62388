"""Sequence families without recurrence: attention pooling with several queries, and plain token pooling.

The attention probe learns which tokens count: each query softly chooses tokens, its value reads what was chosen. The
token families read every token alike and keep the highest or the mean; they are what a sequence model has to beat.

Axes: N lenses, B sequences, T tokens, W input width, K queries.
"""

import math

import torch
from torch import Tensor, nn

from ftw.hat.temporal.sequence import SequenceHead, beyond, token_product, uniform


class AttentionHead(SequenceHead):
    """logit_n = sum_k softmax_t(q_nk . x_t) (v_nk . x_t) + b_n.

    Shapes:
        query [N, K, W], value [N, K, W], bias [N].

    Source: Bahdanau, Cho & Bengio 2015, Neural machine translation by jointly learning to align and translate (the
    attention); Kantamneni et al. 2025, Are sparse autoencoders useful? (as a probe).
    """

    def __init__(self, num_lenses: int, width: int, *, queries: int = 4) -> None:
        super().__init__()
        self.num_lenses, self.width, self.queries = num_lenses, width, queries
        # Queries near zero start as the mean over tokens; values at zero start as no opinion.
        self.query = uniform((num_lenses, queries, width), 0.1 / math.sqrt(width))
        self.value = nn.Parameter(torch.zeros(num_lenses, queries, width))
        self.bias = nn.Parameter(torch.zeros(num_lenses))

    @property
    def token_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (of the shape, not stored)
        return 16 * self.queries

    def tokens(self, x: Tensor) -> Tensor:
        return token_product(x, torch.cat([self.query, self.value], dim=1)).float()

    def pooled(self, tokens_NBTF: Tensor, lengths: Tensor | None = None) -> Tensor:
        query_NBTK, value_NBTK = tokens_NBTF.chunk(2, dim=-1)
        padding = beyond(lengths, tokens_NBTF.shape[2])
        if padding is not None:
            query_NBTK = query_NBTK.masked_fill(padding.unsqueeze(-1), -torch.inf)
            value_NBTK = value_NBTK.masked_fill(padding.unsqueeze(-1), 0)
        return (query_NBTK.softmax(2) * value_NBTK).sum((2, 3)).T + self.bias

    def empty(self, num_lenses: int) -> "AttentionHead":
        return AttentionHead(num_lenses, self.width, queries=self.queries)

    @torch.no_grad()
    def fold_norm(self, gain_NW: Tensor, shift_NW: Tensor) -> "AttentionHead":
        folded = self.rows(torch.arange(self.num_lenses))
        # A query's shift is the same for all tokens, and the softmax does not see it.
        folded.query.copy_(self.query * gain_NW.unsqueeze(1))
        folded.value.copy_(self.value * gain_NW.unsqueeze(1))
        folded.bias.copy_(self.bias + torch.einsum("nkw,nw->n", self.value, shift_NW))
        return folded

    def large(self) -> list[str]:
        return ["query", "value"]


class TokenHead(SequenceHead):
    """logit_n = max_t (w_n . x_t) + b_n, or the mean over tokens: a linear lens on every token.

    Shapes:
        weight [N, W], bias [N].
    """

    def __init__(self, num_lenses: int, width: int, *, pool: str = "max") -> None:
        super().__init__()
        self.num_lenses, self.width, self.pool = num_lenses, width, pool
        self.weight = nn.Parameter(torch.zeros(num_lenses, width))
        self.bias = nn.Parameter(torch.zeros(num_lenses))

    @property
    def token_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (of the shape, not stored)
        return 8

    def tokens(self, x: Tensor) -> Tensor:
        return token_product(x, self.weight.unsqueeze(1)).float()

    def pooled(self, tokens_NBTF: Tensor, lengths: Tensor | None = None) -> Tensor:
        logit_NBT, num_tokens = tokens_NBTF[..., 0], tokens_NBTF.shape[2]
        padding = beyond(lengths, num_tokens)
        if self.pool == "max":
            logit_NBT = logit_NBT if padding is None else logit_NBT.masked_fill(padding, -torch.inf)
            return logit_NBT.amax(-1).T + self.bias
        if padding is None or lengths is None:
            return logit_NBT.mean(-1).T + self.bias
        total_NB = logit_NBT.masked_fill(padding, 0).sum(-1)
        return (total_NB / lengths.view(-1, lengths.shape[-1])).T + self.bias

    def empty(self, num_lenses: int) -> "TokenHead":
        return TokenHead(num_lenses, self.width, pool=self.pool)

    @torch.no_grad()
    def fold_norm(self, gain_NW: Tensor, shift_NW: Tensor) -> "TokenHead":
        folded = self.rows(torch.arange(self.num_lenses))
        folded.weight.copy_(self.weight * gain_NW)
        folded.bias.copy_(self.bias + (self.weight * shift_NW).sum(-1))
        return folded

    def large(self) -> list[str]:
        return ["weight"]
