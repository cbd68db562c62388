"""States and words together: a logistic regression on two out-of-fold logits, lens by lens.

Weights are not negative: a system that ranks worse than chance out of fold is left out, not turned round. Where there
are rows enough to tell, a system counts only if its out-of-fold AUROC is above chance beyond doubt; where neither is,
the words stand alone, because a stack of two guesses is no better than the simpler one.

Sources: Wolpert 1992, Stacked generalization; Hanley & McNeil 1982, The meaning and use of the area under a receiver
operating characteristic curve (its standard error at chance, that of Wilcoxon's rank sum).

Axes: S rows of one lens, N lenses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ftw.map.metrics import auroc
from ftw.map.training.lens_rows import LensRows
from ftw.map.training.logistic import logistic_paths

# Of two standardised logits and hundreds of rows; anything between 0.1 and 10 gives the same ranks.
PENALTY = 1.0
# Standard errors above chance that count as beyond doubt (99 %), and the AUROC above chance that must be within them:
# from 112 rows of each class on. With fewer, the lack of evidence says little.
BEYOND_DOUBT, TELLING = 2.58, 0.1

STATES_ALONE, WORDS_ALONE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def stack_with_text(lenses: Sequence[LensRows], states: Sequence[np.ndarray], words: Sequence[np.ndarray]) -> Tensor:
    """Weight of the states' logit, weight of the words' logit, and offset of each lens: [N, 3].

    Args:
        states, words: calibrated out-of-fold logits of each lens's rows; NaN where there is none.
    """
    return torch.stack([_stacked(*each) for each in zip(lenses, states, words, strict=True)])


def _stacked(rows: LensRows, states_S: np.ndarray, words_S: np.ndarray) -> Tensor:
    known_S = np.isfinite(words_S) & np.isfinite(states_S)
    if len(np.unique(rows.labels[known_S])) < 2:
        return torch.tensor(STATES_ALONE)
    part = rows.take(np.flatnonzero(known_S))
    logits_S2 = np.stack([states_S[known_S], words_S[known_S]], axis=1).astype(np.float32)
    states_count, words_count = _above_chance(logits_S2, part)
    if not states_count:
        return torch.tensor(WORDS_ALONE)
    if not words_count:
        return torch.tensor(STATES_ALONE)
    weight_2, bias = _fit(torch.from_numpy(logits_S2), part)
    if (weight_2 >= 0).all():
        return torch.cat([weight_2, bias])
    if weight_2[0] < 0 <= weight_2[1]:
        weight_1, bias = _fit(torch.from_numpy(logits_S2[:, 1:]), part)
        return torch.cat([torch.zeros(1), weight_1.clamp_min(0), bias])
    return torch.tensor(STATES_ALONE)


def _above_chance(logits_SX: np.ndarray, rows: LensRows) -> list[bool]:
    """Whether each column ranks better than chance beyond doubt; True where the rows are too few to tell."""
    error = ((len(rows) + 1) / (12 * rows.num_positive * rows.num_negative)) ** 0.5
    if BEYOND_DOUBT * error > TELLING:
        return [True] * logits_SX.shape[1]
    return (auroc(logits_SX, *rows.columns(logits_SX.shape[1])) > 0.5 + BEYOND_DOUBT * error).tolist()


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
