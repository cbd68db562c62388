"""States and words together: a logistic regression on two out-of-fold logits, lens by lens.

Weights are not negative: a system that ranks worse than chance out of fold is left out, not turned round.

Axes: S rows of one lens, N lenses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ftw.map.training.lens_rows import LensRows
from ftw.map.training.logistic import logistic_paths

# Of two standardised logits and hundreds of rows; anything between 0.1 and 10 gives the same ranks.
PENALTY = 1.0


def stack_with_text(lenses: Sequence[LensRows], states: Sequence[np.ndarray], words: Sequence[np.ndarray]) -> Tensor:
    """Weight of the states' logit, weight of the words' logit, and offset of each lens: [N, 3].

    Args:
        states, words: out-of-fold logits of each lens's rows; NaN where there is none.
    """
    return torch.stack([_stacked(*each) for each in zip(lenses, states, words, strict=True)])


def _stacked(rows: LensRows, states_S: np.ndarray, words_S: np.ndarray) -> Tensor:
    known_S = np.isfinite(words_S) & np.isfinite(states_S)
    alone = torch.tensor([1.0, 0.0, 0.0])
    if len(np.unique(rows.labels[known_S])) < 2:
        return alone
    part = rows.take(np.flatnonzero(known_S))
    logits_S2 = torch.from_numpy(np.stack([states_S[known_S], words_S[known_S]], axis=1).astype(np.float32))
    weight_2, bias = _fit(logits_S2, part)
    if (weight_2 >= 0).all():
        return torch.cat([weight_2, bias])
    if weight_2[0] < 0 <= weight_2[1]:
        weight_1, bias = _fit(logits_S2[:, 1:], part)
        return torch.cat([torch.zeros(1), weight_1.clamp_min(0), bias])
    return alone


def _fit(logits_SX: Tensor, rows: LensRows) -> tuple[Tensor, Tensor]:
    center_X, scale_X = logits_SX.mean(0), logits_SX.std(0).clamp_min(1e-6)
    paths = logistic_paths(
        (logits_SX - center_X) / scale_X,
        torch.from_numpy(rows.labels),
        torch.from_numpy(rows.balanced(rows.weights)),
        torch.zeros(len(rows), dtype=torch.long),
        num_folds=0,
        penalties=[PENALTY],
    )
    weight_X = paths.weight_WFC[:, 0, 0] / scale_X
    return weight_X, paths.bias_FC[0] - (center_X * weight_X).sum()
