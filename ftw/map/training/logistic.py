"""Logistic regression with an L2 penalty for many penalties and folds at once: what a linear lens is fitted by.

1. The rows are turned into the eigenbasis of their Gram matrix (or covariance, whichever is smaller). One decomposition
   serves every penalty and every fold; there the Hessian is bounded by a diagonal, S/4 + 1/C (Böhning & Lindsay 1988).
2. All columns (copies x penalties) take L-BFGS steps together, scaled by that diagonal: two matrix products a step. A
   step that does not lower a column's loss enough is halved for that column alone.
3. Columns end when all gradients are small; the weights are turned back.

Sources: Böhning & Lindsay 1988, Monotonicity of quadratic-approximation algorithms; Liu & Nocedal 1989, On the limited
memory BFGS method for large scale optimization.

Axes: S rows, W input width, R rank, C penalties, F copies (all rows, then without each fold), K = F x C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ftw.errors import DataError

TOLERANCE = 3e-3  # of the gradient, against that at zero; AUROC has settled to three digits by then
MAX_STEPS = 100
HISTORY = 8
HALVINGS = 10
SUFFICIENT = 1e-4  # share of the promised decrease that a step must keep (Armijo)
# Directions in which the rows hardly move carry rounding errors, not information.
SMALLEST_EIGENVALUE = 1e-6


@dataclass(frozen=True)
class Rotated:
    """Rows in the eigenbasis of their Gram matrix: x_SW = z_SR back_WR^T; many lenses may share one."""

    x_SW: Tensor
    values_R: Tensor
    back_WR: Tensor
    z_SR: Tensor

    def take(self, rows: Tensor) -> "Rotated":
        """Some of the rows, in the basis of all."""
        return Rotated(self.x_SW[rows], self.values_R, self.back_WR, self.z_SR[rows])


@dataclass(frozen=True)
class LogisticPaths:
    """Solutions for every copy and penalty: weight_WFC and bias_FC; copy 0 is fitted on all rows."""

    weight_WFC: Tensor
    bias_FC: Tensor

    def logits(self, x_SW: Tensor) -> Tensor:
        """[S, F, C] for rows standardised as those of the fit."""
        width, copies, penalties = self.weight_WFC.shape
        return (x_SW @ self.weight_WFC.reshape(width, -1)).view(-1, copies, penalties) + self.bias_FC

    def held_out(self, x_SW: Tensor, folds_S: Tensor) -> Tensor:
        """[S, C]: each row by the copy that was fitted without its fold."""
        copy_S = folds_S + 1 if self.bias_FC.shape[0] > 1 else torch.zeros_like(folds_S)
        return self.logits(x_SW).gather(1, copy_S.view(-1, 1, 1).expand(-1, 1, self.bias_FC.shape[1]))[:, 0]


def logistic_paths(
    x_SW: Tensor | Rotated,
    labels_S: Tensor,
    weights_S: Tensor,
    folds_S: Tensor,
    *,
    num_folds: int,
    penalties: Sequence[float],
) -> LogisticPaths:
    """Minimise sum_s weight_s log(1 + exp(-±logit_s)) + ‖w‖² / 2C, for every C and every copy; the bias is free.

    Args:
        x_SW: standardised float32 rows, rotated or not. labels_S: 0 or 1. weights_S: >= 0. folds_S: 0 to num_folds - 1.
        penalties: C as in scikit-learn: inverse strength of the penalty beside a *sum* over rows.

    Raises:
        DataError: a copy has rows of one class only, or the rows are not finite.
    """
    copies = range(num_folds + 1)
    used_SF = torch.stack([folds_S != copy - 1 for copy in copies], dim=1) & (weights_S > 0)[:, None]
    for label in (0, 1):
        if not (used_SF & (labels_S == label)[:, None]).any(0).all():
            raise DataError(
                f"a fold leaves no row of label {label}; give each label texts of more groups, or fewer folds"
            )
    num = len(penalties)
    weight_WK, bias_K = _solve(
        x_SW,
        labels_SK=labels_S.float()[:, None],
        weights_SK=(used_SF * weights_S[:, None]).repeat_interleave(num, dim=1),
        ridge_K=1 / torch.tensor(list(penalties), dtype=torch.float32).repeat(len(copies)),
    )
    return LogisticPaths(weight_WK.view(-1, len(copies), num), bias_K.view(len(copies), num))


def logistic_columns(
    x_SW: Tensor | Rotated, labels_SK: Tensor, weights_S: Tensor, *, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights [W, K] and biases [K] for K label vectors of the same rows (shuffled labels, say), at one penalty."""
    num = labels_SK.shape[1]
    weights_SK = weights_S.float()[:, None].expand(-1, num)
    return _solve(x_SW, labels_SK=labels_SK.float(), weights_SK=weights_SK, ridge_K=torch.full((num,), 1 / penalty))


def _solve(x_SW: Tensor | Rotated, *, labels_SK: Tensor, weights_SK: Tensor, ridge_K: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [W, K] and biases [K] of every column."""
    rotated = x_SW if isinstance(x_SW, Rotated) else rotate(x_SW)
    values_R = rotated.values_R
    problem = _Problem(
        rows=torch.cat([rotated.z_SR, torch.ones(len(rotated.z_SR), 1)], dim=1),
        labels_SK=labels_SK,
        weights_SK=weights_SK,
        ridge_RK=torch.cat([ridge_K.expand(len(values_R), -1), torch.zeros(1, len(ridge_K))]),
    )
    bound_RK = torch.cat(
        [
            values_R[:, None] * weights_SK.mean(0) / 4 + ridge_K,
            (weights_SK.sum(0, keepdim=True) / 4).clamp_min(1e-6),
        ]
    )
    solution_RK = _descend(problem, bound_RK)
    weight_WK = rotated.back_WR @ solution_RK[:-1]
    if not weight_WK.isfinite().all():
        raise DataError("states that a lens is fitted on are not finite; collect again with precision=float32")
    return weight_WK, solution_RK[-1]


def rotate(x_SW: Tensor) -> Rotated:
    """The eigenbasis of some rows: of their Gram matrix or their covariance, whichever is smaller."""
    rows, width = x_SW.shape
    gram = x_SW @ x_SW.T if rows < width else x_SW.T @ x_SW
    values_R, vectors = torch.linalg.eigh(gram)
    kept = values_R > values_R[-1].clamp_min(1e-12) * SMALLEST_EIGENVALUE
    values_R, vectors = values_R[kept], vectors[:, kept]
    if rows < width:
        root_R = values_R.sqrt()
        return Rotated(x_SW, values_R, x_SW.T @ (vectors / root_R), vectors * root_R)
    return Rotated(x_SW, values_R, vectors, x_SW @ vectors)


@dataclass(frozen=True)
class _Problem:
    """Rows with a column of ones; labels and weight of each row in each column; penalty of each coordinate."""

    rows: Tensor
    labels_SK: Tensor
    weights_SK: Tensor
    ridge_RK: Tensor

    def __call__(self, solution_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [K] and gradient [R, K]."""
        logits_SK = self.rows @ solution_RK
        each_SK = softplus(logits_SK) - self.labels_SK * logits_SK
        pulled_RK = self.ridge_RK * solution_RK
        loss_K = (self.weights_SK * each_SK).sum(0) + (pulled_RK * solution_RK).sum(0) / 2
        return loss_K, self.rows.T @ (self.weights_SK * (logits_SK.sigmoid_() - self.labels_SK)) + pulled_RK


def _descend(problem: _Problem, bound_RK: Tensor) -> Tensor:
    """L-BFGS from zero, all columns together, in units of the bound on the Hessian."""
    solution_RK = torch.zeros_like(bound_RK)
    loss_K, gradient_RK = problem(solution_RK)
    goal_K = TOLERANCE**2 * (gradient_RK**2 / bound_RK).sum(0)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_STEPS):
        direction_RK = _direction(gradient_RK, bound_RK, history)
        moved_RK, new_loss_K, new_gradient_RK = _step(problem, solution_RK, loss_K, gradient_RK, direction_RK)
        step_RK, change_RK = moved_RK - solution_RK, new_gradient_RK - gradient_RK
        curvature_K = (step_RK * change_RK).sum(0)
        inverse_K = torch.where(curvature_K > 1e-12, 1 / curvature_K.clamp_min(1e-12), 0)
        history = [*history[-HISTORY + 1 :], (step_RK, change_RK, inverse_K)]
        solution_RK, loss_K, gradient_RK = moved_RK, new_loss_K, new_gradient_RK
        if bool(((gradient_RK**2 / bound_RK).sum(0) <= goal_K).all()):
            break
    return solution_RK


def _step(
    problem: _Problem, solution_RK: Tensor, loss_K: Tensor, gradient_RK: Tensor, direction_RK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The full step, halved for the columns whose loss it does not lower enough: solution, loss and gradient there."""
    slope_K = (gradient_RK * direction_RK).sum(0)
    size_K = torch.ones_like(loss_K)
    for halving in range(HALVINGS + 1):
        moved_RK = solution_RK + size_K * direction_RK
        new_loss_K, new_gradient_RK = problem(moved_RK)
        # 1e-6: float32 losses of hundreds cannot show a decrease below that.
        short_K = new_loss_K > loss_K + SUFFICIENT * size_K * slope_K + 1e-6 * loss_K.abs()
        if halving == HALVINGS or not short_K.any():
            return moved_RK, new_loss_K, new_gradient_RK
        size_K = torch.where(short_K, size_K / 2, size_K)
    raise AssertionError("unreachable: the last halving returns")


def _direction(gradient_RK: Tensor, bound_RK: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion, column by column, from the inverse of the bound."""
    left_RK, shares = gradient_RK.clone(), []
    for step_RK, change_RK, inverse_K in reversed(history):
        share_K = inverse_K * (step_RK * left_RK).sum(0)
        left_RK -= share_K * change_RK
        shares.append(share_K)
    left_RK /= bound_RK
    if history:
        step_RK, change_RK, inverse_K = history[-1]
        # The bound is too large where rows are far from the boundary: scale by the curvature met last.
        scaled_K = (change_RK**2 / bound_RK).sum(0) * inverse_K
        left_RK *= torch.where(scaled_K > 0, 1 / scaled_K.clamp_min(1e-12), 1)
    for (step_RK, change_RK, inverse_K), share_K in zip(history, reversed(shares), strict=True):
        left_RK += step_RK * (share_K - inverse_K * (change_RK * left_RK).sum(0))
    return -left_RK
