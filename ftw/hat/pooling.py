"""One decision about a whole text: a weighted sum, lens by lens, of what its heads say of the text's pooled tokens.

A text has several pooled states: the mean of its tokens, the last token, the mean of the last eight ("tail"), and the
standard deviation over the tokens, feature by feature ("spread"). Each has a head of its own, and the head of the means
also reads every token, of whose logits the largest counts ("max"). Which of them a lens uses, and with what weight, was
learnt out of fold; the weights hold the calibration, so the sum is a logit.

Axes: S texts, T tokens, N lenses, L layers, D model width, P pools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftw.errors import ConfigError, PackError
from ftw.hat.lens import Head
from ftw.hat.linear import LinearHead

# Pooled states, and all that a decision can be made of.
STATE_POOLS = ("mean", "last", "tail", "spread")
POOLS = ("mean", "max", "last", "tail", "spread")
TAIL_TOKENS = 8


def pool_tokens(normed_TD: Tensor, pool: str) -> Tensor:
    """One state [..., D] of a text from its layer-normed tokens [..., T, D].

    Raises:
        ConfigError: no such pool.
    """
    if pool == "mean":
        return normed_TD.mean(dim=-2)
    if pool == "last":
        return normed_TD[..., -1, :]
    if pool == "tail":
        return normed_TD[..., -TAIL_TOKENS:, :].mean(dim=-2)
    if pool == "spread":
        return normed_TD.std(dim=-2, correction=0)
    raise ConfigError(f"no pool {pool!r}; the pools are {', '.join(STATE_POOLS)}")


@dataclass(kw_only=True)
class Pooling:
    """How N lenses read texts.

    Attributes:
        heads: for each pooled state but the mean, one head a layer. scale_NLP: weights, pools in the order of `POOLS`;
            0 is not used. offset_N: what is added, so that the sum is a calibrated logit.
        both_N3: weights of that logit and of the text lens's, and offset, for both together; None without such.
    """

    heads: Mapping[str, Sequence[LinearHead]]
    scale_NLP: Tensor
    offset_N: Tensor
    both_N3: Tensor | None = None

    @property
    def states(self) -> list[str]:
        """The pooled states that are read."""
        return ["mean", *self.heads]

    def uses(self, pool: str) -> bool:
        """Whether any lens uses a pool."""
        return bool((self.scale_NLP[..., POOLS.index(pool)] != 0).any())

    def with_text(self, logits_SN: Tensor, text_SN: Tensor) -> Tensor:
        """Logits of states and words together, [S, N]."""
        if self.both_N3 is None:
            raise PackError("these lenses were not stacked with text lenses; train them with map.text")
        of_states_N, of_words_N, offset_N = self.both_N3.unbind(-1)
        return of_states_N * logits_SN + of_words_N * text_SN + offset_N

    def rows(self, index: Tensor) -> "Pooling":
        """Of some lenses."""
        return Pooling(
            heads={pool: [head.rows(index) for head in heads] for pool, heads in self.heads.items()},
            scale_NLP=self.scale_NLP[index],
            offset_N=self.offset_N[index],
            both_N3=None if self.both_N3 is None else self.both_N3[index],
        )

    @torch.no_grad()
    def combine(self, token_heads: Sequence[Head], states: Mapping[str, Tensor], highest_SLN: Tensor | None) -> Tensor:
        """Logits [S, N] of texts.

        Args:
            token_heads: one head a layer, as in the stack. states: layer-normed pooled states [S, L, D] by pool.
            highest_SLN: largest logit of each token head over a text; None where no lens uses it.
        """
        logits_SN = self.offset_N.expand(len(states["mean"]), -1).clone()
        for pool, heads in {"mean": token_heads, **self.heads}.items():
            scale_NL = self.scale_NLP[..., POOLS.index(pool)]
            for layer, head in enumerate(heads):
                logits_SN += scale_NL[:, layer] * head(states[pool][:, layer])
        if highest_SLN is not None:
            logits_SN += torch.einsum("nl,sln->sn", self.scale_NLP[..., POOLS.index("max")], highest_SLN)
        return logits_SN

    def read(self, token_heads: Sequence[Head], tokens_LTD: Tensor) -> Tensor:
        """Logits [N] of one text from its layer-normed tokens."""
        with torch.no_grad():
            highest_LN = torch.stack([head(x_TD).amax(0) for head, x_TD in zip(token_heads, tokens_LTD, strict=True)])
        states = {pool: pool_tokens(tokens_LTD, pool)[None] for pool in self.states}
        return self.combine(token_heads, states, highest_LN[None])[0]

    def tensors(self) -> dict[str, Tensor]:
        """By name, lens axis first; what a pack stores."""
        tensors = {"scale": self.scale_NLP, "offset": self.offset_N}
        for pool, heads in self.heads.items():
            tensors[f"{pool}_weight"] = torch.stack([head.weight.detach() for head in heads], dim=1)
            tensors[f"{pool}_bias"] = torch.stack([head.bias.detach() for head in heads], dim=1)
        if self.both_N3 is not None:
            tensors["both"] = self.both_N3
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def pooling_from_tensors(
    tensors: Mapping[str, Tensor], *, num_lenses: int, num_layers: int, width: int, where: str
) -> Pooling:
    """A pooling from a pack's tensors, every name and shape checked.

    Raises:
        PackError: a tensor is missing, of another shape, or not finite.
    """
    pools = [pool for pool in STATE_POOLS[1:] if f"{pool}_weight" in tensors]
    shapes: dict[str, tuple[int, ...]] = {"scale": (num_lenses, num_layers, len(POOLS)), "offset": (num_lenses,)}
    for pool in pools:
        shapes[f"{pool}_weight"], shapes[f"{pool}_bias"] = (num_lenses, num_layers, width), (num_lenses, num_layers)
    if "both" in tensors:
        shapes["both"] = (num_lenses, 3)
    exact = {name: _checked(tensors.get(name), name, shape, where) for name, shape in shapes.items()}
    return Pooling(
        heads={
            pool: [linear_head(exact[f"{pool}_weight"][:, n], exact[f"{pool}_bias"][:, n]) for n in range(num_layers)]
            for pool in pools
        },
        scale_NLP=exact["scale"],
        offset_N=exact["offset"],
        both_N3=exact.get("both"),
    )


def _checked(found: Tensor | None, name: str, shape: tuple[int, ...], where: str) -> Tensor:
    if found is None or tuple(found.shape) != shape or not found.is_floating_point() or not found.isfinite().all():
        told = "missing" if found is None else f"of shape {tuple(found.shape)} and type {found.dtype}, or not finite"
        raise PackError(f"{where}: pooling tensor {name!r} is {told}; {shape} is due; fetch or train the pack again")
    return found.float()


def linear_head(weight_NW: Tensor, bias_N: Tensor) -> LinearHead:
    """A linear head of given numbers, for reading."""
    head = LinearHead(0, weight_NW.shape[1])
    head.num_lenses = len(weight_NW)
    head.weight = torch.nn.Parameter(weight_NW.contiguous(), requires_grad=False)
    head.bias = torch.nn.Parameter(bias_N.contiguous(), requires_grad=False)
    return head
