"""The direct path of an interpreter: directions in which concepts differ, and texts about one concept do not.

Texts about one concept differ by their sentences, and states vary much along that difference without saying anything
about concepts. It is the same for all of them, so it is measured over all, and counted out:

1. S is the covariance of the rows about their concepts' means, all slots side by side, shrunk towards a multiple of the
   identity.
2. In coordinates where S is the identity, the directions in which the concepts' means differ most are kept.
3. There each concept has a place: the direction of its mean. Nothing is trained.

Axes: S rows, C concepts, J slots, D model width, F = J * D features, R directions.

Source: Fisher 1936, The use of multiple measurements in taxonomic problems; Rao 1948, The utilization of multiple
measurements in problems of biological classification (more than two classes).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ftw.errors import ConfigError
from ftw.map.training.interpreter_data import TRAIN, InterpreterRows

BLOCK_ROWS = 2048
MOST_FEATURES = 16_384  # S has the square of it: 1 GiB


class Directions(NamedTuple):
    """Directions over the standardised states of all slots, [J, D, R], and each concept's unit place there, [C, R]."""

    directions_JDR: Tensor
    places_CR: Tensor


def find_directions(
    rows: InterpreterRows, center_JD: Tensor, scale_JD: Tensor, *, num: int, shrinkage: float
) -> Directions:
    """The directions of the rows trained on; `center_JD` and `scale_JD` standardise each slot.

    Raises:
        ConfigError: more features than S can have.
    """
    if center_JD.numel() > MOST_FEATURES:
        raise ConfigError(
            f"a direct path of {center_JD.numel():,} features ({len(center_JD)} slots of width {center_JD.shape[1]}); "
            f"its covariance takes at most {MOST_FEATURES:,}: read fewer layers or pools, or set direct=0 of the model"
        )
    within_FF, means_CF = scatter(rows, center_JD, scale_JD)
    within_FF.diagonal().add_(shrinkage * within_FF.diagonal().mean().clamp_min(1e-6))
    factor_FF = torch.linalg.cholesky(within_FF)
    white_CF = torch.linalg.solve_triangular(factor_FF, means_CF.T, upper=False).T
    kept_FR = _principal(white_CF, num)
    directions_FR = torch.linalg.solve_triangular(factor_FF.T, kept_FR, upper=True)
    return Directions(directions_FR.view(*center_JD.shape, num), normalize(white_CF @ kept_FR, dim=1))


def scatter(rows: InterpreterRows, center_JD: Tensor, scale_JD: Tensor) -> tuple[Tensor, Tensor]:
    """S [F, F] before it is shrunk, and the concepts' means [C, F] less their own mean; zero for one without rows.

    Where no concept has two rows, S is the covariance of all rows.
    """
    used = rows.where(TRAIN)
    weights_S, labels_S = rows.weights[torch.from_numpy(used)], rows.labels_S[torch.from_numpy(used)]
    num_concepts, num_features = len(rows.names), center_JD.numel()
    total_FF, sums_CF = torch.zeros(num_features, num_features), torch.zeros(num_concepts, num_features)
    size_C = torch.zeros(num_concepts).index_add_(0, labels_S, weights_S)
    first = 0
    for x_SF in _features(rows, used, center_JD, scale_JD):
        part = slice(first, first + len(x_SF))
        weighted_SF = x_SF * weights_S[part].unsqueeze(1)
        total_FF += weighted_SF.T @ x_SF
        sums_CF.index_add_(0, labels_S[part], weighted_SF)
        first = part.stop
    there_C = size_C > 0
    means_CF = sums_CF / size_C.clamp_min(1e-6).unsqueeze(1)
    spare = float(size_C.sum() - there_C.sum())  # degrees of freedom
    within_FF = (total_FF - sums_CF.T @ means_CF) / spare if spare > 0.5 else total_FF / float(size_C.sum())
    return within_FF, (means_CF - means_CF[there_C].mean(0)) * there_C.unsqueeze(1)


def slot_states(rows: InterpreterRows, at: Tensor) -> Tensor:
    """Some rows' states by slot, float32 [S, J, D]; the mean of a text's tokens."""
    states_STD = rows.states_STD[at].float()
    if rows.mask_ST is None:
        return states_STD
    there_ST1 = rows.mask_ST[at].unsqueeze(-1)
    sums_S1D = states_STD.masked_fill(~there_ST1, 0).sum(1, keepdim=True)
    return sums_S1D / there_ST1.sum(1, keepdim=True).clamp_min(1)


def _features(rows: InterpreterRows, used: np.ndarray, center_JD: Tensor, scale_JD: Tensor) -> Iterator[Tensor]:
    """Standardised states of rows side by side, [S, F], block by block."""
    for first in range(0, len(used), BLOCK_ROWS):
        at = torch.from_numpy(used[first : first + BLOCK_ROWS])
        yield ((slot_states(rows, at) - center_JD) / scale_JD).flatten(1)


def _principal(x_CF: Tensor, num: int) -> Tensor:
    """The orthonormal directions in which rows have most of their squares, [F, num]; nought beyond their rank."""
    if len(x_CF) > x_CF.shape[1]:
        return torch.linalg.eigh(x_CF.T @ x_CF)[1].flip(1)[:, :num]  # the eigenvalues ascend
    squares_C, parts_CC = torch.linalg.eigh(x_CF @ x_CF.T)
    kept = squares_C.flip(0)[:num] > 1e-6 * squares_C[-1]
    return normalize(x_CF.T @ parts_CC.flip(1)[:, :num], dim=0) * kept
