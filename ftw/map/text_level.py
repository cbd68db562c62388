"""How lenses read whole texts: from the pooled states of an encyclopedia, and its tokens where a lens asks for them.

Axes: S texts, N lenses, L layers, D model width, T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from ftw.hat.pooling import POOLS, Pooling
from ftw.hat.store import LensStack
from ftw.map.derived import pooled
from ftw.map.encyclopedia import Encyclopedia

# Texts whose tokens are held at once.
BLOCK_TEXTS = 512


def text_level_logits(
    stack: LensStack, encyclopedia: Encyclopedia, rows: np.ndarray, *, pool: str = "mean", wanted_SN: np.ndarray
) -> np.ndarray:
    """Logit of every lens for every text, float32 [S, N].

    Args:
        rows: S texts. pool: read by lenses without a pooling of their own.
        wanted_SN: pairs that will be looked at; for the others the strongest token may be left out.

    Raises:
        DataError: a lens reads the strongest token of a text whose tokens are not stored.
    """
    if stack.pooling is None:
        return stack.bank().logits(pooled_states(encyclopedia, stack.layers, pool, rows)).numpy()
    highest_SLN = None
    if stack.pooling.uses("max"):
        highest_SLN = strongest_tokens(stack, stack.pooling, encyclopedia, rows, wanted_SN)
    states = {name: pooled_states(encyclopedia, stack.layers, name, rows) for name in stack.pooling.states}
    return stack.pooling.combine(stack.heads, states, highest_SLN).numpy()


def pooled_states(encyclopedia: Encyclopedia, layers: tuple[int, ...], pool: str, rows: np.ndarray) -> Tensor:
    """Pooled states of texts, float32 [S, L, D]."""
    return torch.stack([torch.from_numpy(pooled(encyclopedia, layer, pool, rows)).float() for layer in layers], dim=1)


@torch.no_grad()
def strongest_tokens(
    stack: LensStack, pooling: Pooling, encyclopedia: Encyclopedia, rows: np.ndarray, wanted_SN: np.ndarray
) -> Tensor:
    """Largest logit of each token head over each text, [S, L, N]; 0 where it is not wanted or not used."""
    highest_SLN = torch.zeros(len(rows), len(stack.layers), len(stack.names))
    for start in range(0, len(rows), BLOCK_TEXTS):
        block = slice(start, start + BLOCK_TEXTS)
        for layer, (number, head) in enumerate(zip(stack.layers, stack.heads, strict=True)):
            used_N = pooling.scale_NLP[:, layer, POOLS.index("max")] != 0
            lenses = torch.from_numpy(wanted_SN[block].any(axis=0)).logical_and(used_N).nonzero()[:, 0]
            if not len(lenses):
                continue
            tokens_TD, offsets = encyclopedia.token_states(number, rows[block])
            logits_Tn = head.rows(lenses)(torch.from_numpy(tokens_TD.astype(np.float32))).numpy()
            highest_Sn = torch.from_numpy(np.maximum.reduceat(logits_Tn, offsets[:-1], axis=0))
            highest_SLN[block, layer, lenses] = highest_Sn
    return highest_SLN
