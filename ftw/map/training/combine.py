"""From the out-of-fold logits of a lens's layers and pools to one calibrated logit, its thresholds, and the evidence.

Steps 2 and 3 of `ftw.map.training.recipe`, one lens at a time.

Axes: S rows of one lens, L layers, P pools, U pools in use, X = L x U, F copies (all rows, then without each fold),
D model width.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ftw.hat.pooling import POOLS, STATE_POOLS
from ftw.map.calibrate import best_f1_threshold, fit_platt, fpr_threshold
from ftw.map.metrics import auroc
from ftw.map.training.lens_rows import LensRows
from ftw.map.training.logistic import logistic_paths

COMBINATIONS = ("stack", "choose", "average")
# C of the second regression, beside calibrated logits of unit spread and a sum over rows. On the 113 sets of sae-probes
# (cross-validated on training rows) anything between 0.001 and 0.01 is as good.
STACK_PENALTY = 0.003
# Fewer rows of a class cannot be standardised, divided into folds and calibrated: their mean is what they tell.
FEWEST_ROWS = 3
# With fewer rows of a class, choices by cross-validation are noise, and worse: held-out rows of a small set lean to the
# other class. Penalty and weights are fixed then (on sae-probes a stack learnt from 5 rows a class ranks below chance).
SMALL_ROWS, SMALL_PENALTY = 20, 1e-3
# Of a calibration whose logits tell nothing out of fold.
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class Choice:
    """What was chosen for a lens, and on what evidence.

    Attributes:
        pools: share of each pool in its decision about a text. penalties: C by layer and state ("9 mean", "9 last").
        evidence: out-of-fold AUROC of each pool, layers averaged, of all averaged, and of what was made ("combined");
            against siblings' positives where `siblings` is true. "text" is that of the text lens.
        text_weight: of the text lens's logit in states and words together.
        num_positive, num_negative: training rows. difference_of_means: too few rows for anything else.
    """

    pools: dict[str, float]
    penalties: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, float] = field(default_factory=dict)
    siblings: bool = False
    num_positive: int = 0
    num_negative: int = 0
    difference_of_means: bool = False
    text_weight: float = 0.0


@dataclass
class Draft:
    """One lens while it is made: weights on layer-normed states, out-of-fold logits of its rows by layer and pool."""

    rows: LensRows
    folds_S: np.ndarray
    num_folds: int
    token_LFD: Tensor
    token_bias_LF: Tensor
    other_LD: dict[str, Tensor]
    other_bias_L: dict[str, Tensor]
    held_out_LPS: np.ndarray
    penalties: dict[str, float] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Too few rows to choose anything by."""
        return min(self.rows.num_positive, self.rows.num_negative) < SMALL_ROWS

    @property
    def few(self) -> bool:
        return min(self.rows.num_positive, self.rows.num_negative) < FEWEST_ROWS


@dataclass(frozen=True)
class Lens:
    """One finished lens: its weights of (layer, pool) and of tokens alone, thresholds, and out-of-fold logits."""

    scale_LP: np.ndarray
    offset: float
    token_scale_L: np.ndarray
    token_offset_L: np.ndarray
    threshold: float
    threshold_1fpr: float
    held_out_S: np.ndarray
    choice: Choice


def finish_lens(draft: Draft, pools: list[str], combine: str) -> Lens:
    rows, num_layers, used = draft.rows, len(draft.held_out_LPS), [POOLS.index(pool) for pool in pools]
    if draft.few:
        return _few(draft, pools)
    held_out_SX = draft.held_out_LPS[:, used].reshape(-1, len(rows)).T
    if draft.small:
        scale_X, offset_X = 1 / held_out_SX.std(0).clip(1e-6), np.zeros(held_out_SX.shape[1])
        calibrated_SX, combine = held_out_SX * scale_X, "average"
    else:
        scale_X, offset_X = _lines(held_out_SX, *rows.columns(held_out_SX.shape[1]))
        calibrated_SX = _calibrated_out_of_fold(held_out_SX, draft)
    means_SU = calibrated_SX.reshape(len(rows), num_layers, -1).mean(1)
    weight_X, bias, combined_S = _combine(calibrated_SX, means_SU, draft, combine)
    scale, offset = _line(combined_S, rows)
    logits_S = (scale * combined_S + offset).astype(np.float32)
    scale_LP = np.zeros((num_layers, len(POOLS)))
    scale_LP[:, used] = (scale * weight_X * scale_X).reshape(num_layers, -1)
    # A single token is read by the token heads alone, layers averaged, with a calibration of their means.
    token_LS = draft.held_out_LPS[:, 0]
    token_scale_L, token_offset_L = _lines(token_LS.T, *rows.columns(num_layers))
    token_scale, token_offset = _line(_calibrated_out_of_fold(token_LS.T, draft).mean(1), rows)
    columns = logits_S[:, None], *rows.columns(1)
    return Lens(
        scale_LP,
        float(scale * (weight_X @ offset_X + bias) + offset),
        token_scale * token_scale_L,
        token_scale * token_offset_L + token_offset,
        float(np.nan_to_num(best_f1_threshold(*columns)[0])),
        float(np.nan_to_num(fpr_threshold(*columns)[0], nan=np.inf)),
        logits_S,
        Choice(
            pools=_shares(weight_X, pools),
            penalties=draft.penalties,
            evidence=_evidence(means_SU, combined_S, rows, pools),
            siblings=rows.has_siblings,
            num_positive=rows.num_positive,
            num_negative=rows.num_negative,
        ),
    )


def _few(draft: Draft, pools: list[str]) -> Lens:
    """A lens with nothing left to calibrate on: its logits are distances in units of half the gap between the means."""
    rows, num_layers = draft.rows, len(draft.held_out_LPS)
    states = [pool for pool in pools if pool in STATE_POOLS] or ["mean"]
    used = [POOLS.index(pool) for pool in states]
    scale_LP, ones_L = np.zeros((num_layers, len(POOLS))), np.ones(num_layers)
    scale_LP[:, used] = 1 / (num_layers * len(used))
    choice = Choice(
        dict.fromkeys(states, round(1 / len(states), 4)),
        num_positive=rows.num_positive,
        num_negative=rows.num_negative,
        difference_of_means=True,
    )
    return Lens(scale_LP, 0.0, ones_L, 0 * ones_L, 0.0, 1.0, draft.held_out_LPS[:, used].mean((0, 1)), choice)


def _combine(
    calibrated_SX: np.ndarray, means_SU: np.ndarray, draft: Draft, combine: str
) -> tuple[np.ndarray, float, np.ndarray]:
    """Weights [X] and bias of the combination, and its logits [S], out of fold where something was fitted."""
    rows, (_, num) = draft.rows, calibrated_SX.shape
    num_pools = means_SU.shape[1]
    weights_S = rows.sibling_weights()
    if combine == "stack" and num > 1:
        spread = max(float(calibrated_SX.std()), 1e-6)
        x_SX, folds_S = torch.from_numpy((calibrated_SX / spread).astype(np.float32)), torch.from_numpy(draft.folds_S)
        paths = logistic_paths(
            x_SX,
            torch.from_numpy(rows.labels),
            torch.from_numpy(rows.balanced(weights_S)),
            folds_S,
            num_folds=draft.num_folds,
            penalties=[STACK_PENALTY],
        )
        weight_X = paths.weight_WFC[:, 0, 0].numpy() / spread
        return weight_X, float(paths.bias_FC[0, 0]), paths.held_out(x_SX, folds_S)[:, 0].numpy()
    share_U = np.full(num_pools, 1 / num_pools)
    if combine == "choose" and num_pools > 1:
        candidates_SU = np.concatenate([means_SU.mean(1, keepdims=True), means_SU], axis=1)
        # All pools come first, so that they win ties.
        best = int(np.nanargmax(_areas(candidates_SU, rows)))
        share_U = share_U if best == 0 else np.eye(num_pools)[best - 1]
    weight_X = np.tile(share_U, num // num_pools) / (num // num_pools)
    return weight_X, 0.0, calibrated_SX @ weight_X


def _areas(logits_SX: np.ndarray, rows: LensRows) -> np.ndarray:
    """AUROC of each column, against siblings' positives where there are."""
    labels_SX, _ = rows.columns(logits_SX.shape[1])
    weights_SX = np.repeat(rows.sibling_weights()[:, None], logits_SX.shape[1], axis=1)
    return auroc(logits_SX, labels_SX, weights_SX).round(6)


def _evidence(means_SU: np.ndarray, combined_S: np.ndarray, rows: LensRows, pools: list[str]) -> dict[str, float]:
    columns_SX = np.concatenate([means_SU, means_SU.mean(1, keepdims=True), combined_S[:, None]], axis=1)
    return dict(zip([*pools, "all", "combined"], _areas(columns_SX, rows).tolist(), strict=True))


def _shares(weight_X: np.ndarray, pools: list[str]) -> dict[str, float]:
    """Share of each pool in the sum of the weights' sizes."""
    size_U = np.abs(weight_X).reshape(-1, len(pools)).sum(0)
    return dict(zip(pools, (size_U / max(size_U.sum(), 1e-12)).round(4).tolist(), strict=True))


def _calibrated_out_of_fold(held_out_SX: np.ndarray, draft: Draft) -> np.ndarray:
    """Each row calibrated by lines that were fitted without its fold: what turns noise away must not have seen it."""
    rows, num = draft.rows, held_out_SX.shape[1]
    calibrated_SX = np.empty_like(held_out_SX)
    for fold in range(max(draft.num_folds, 1)):
        inside_S = draft.folds_S == fold
        part = rows.take(np.flatnonzero(~inside_S)) if draft.num_folds else rows
        scale_X, offset_X = _lines(held_out_SX[~inside_S] if draft.num_folds else held_out_SX, *part.columns(num))
        calibrated_SX[inside_S] = scale_X * held_out_SX[inside_S] + offset_X
    return calibrated_SX


def _line(logits_S: np.ndarray, rows: LensRows) -> tuple[float, float]:
    """Platt's scale and offset."""
    scale_1, offset_1 = _lines(logits_S[:, None], *rows.columns(1))
    return float(scale_1[0]), float(offset_1[0])


def _lines(logits_SX: np.ndarray, labels_SX: np.ndarray, weights_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Platt's scale and offset of each column; one that ranks worse than chance hardly counts, and is not turned."""
    usable_X = np.ptp(logits_SX, axis=0) > 0
    if not usable_X.any():
        return np.full(logits_SX.shape[1], SMALLEST_SCALE), np.zeros(logits_SX.shape[1])
    fit = fit_platt(logits_SX, labels_SX, weights_SX, prior=0.5)
    useless_X = ~usable_X | (fit.scale_N < SMALLEST_SCALE)
    return np.where(useless_X, SMALLEST_SCALE, fit.scale_N), np.where(useless_X, 0, fit.offset_N)
