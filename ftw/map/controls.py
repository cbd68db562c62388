"""Controls that a lens has to beat besides words and shuffled labels: what needs no understanding at all.

Each is fitted on the training marks as a small discriminant for every concept: `length` sees how long a text is as it
was written, `position` how many of its tokens were read (which states know from their place), `random` one random
direction of the states, and `first_layer`, where the encyclopedia holds layer 0, the output of the first block, which
knows words and little else. Fisher's discriminant on class means and one shared covariance; thousands of concepts
cost one sparse product.

Sources: Hewitt & Liang 2019, Designing and interpreting probes with control tasks; Fisher 1936.

Axes: S texts, N concepts, F features, D model width, R random directions.
"""

from dataclasses import replace

import numpy as np
import scipy.sparse
import torch

from ftw.map.encyclopedia import Encyclopedia
from ftw.map.samples import SampleTable
from ftw.map.training.solver import DEFAULT_SHRINKAGE, solve_stack
from ftw.map.training.sparse import read_sparse_pool

LENGTH, POSITION, RANDOM, FIRST_LAYER = "length", "position", "random", "first_layer"
# Directions that the concepts share among them: one each would take N x D numbers for a control.
NUM_DIRECTIONS = 16
RIDGE = 1e-3


def control_scores(
    encyclopedia: Encyclopedia, rows: np.ndarray, *, layers: tuple[int, ...], pool: str = "mean", seed: int = 0
) -> dict[str, np.ndarray]:
    """What each control says of some texts: scores [len(rows), N] by name, in the table's order of concepts.

    Empty where the encyclopedia has no training texts to fit them on.

    Args:
        layers: that the lenses under test read; a lens that reads layer 0 alone is not its own control.
    """
    table, train = encyclopedia.table, encyclopedia.table.where("train")
    if not len(train):
        return {}
    both = np.concatenate([train, rows])
    features = {LENGTH: _lengths([table.texts[row] for row in both]), POSITION: _curve(encyclopedia.num_tokens[both])}
    scores = {name: _discriminant(table, train, with_SF) for name, with_SF in features.items()}
    scores[RANDOM] = _oriented(table, train, _projected(encyclopedia, both, pool, seed), seed)
    if 0 in encyclopedia.spec.layers and tuple(layers) != (0,):
        scores[FIRST_LAYER] = _first_layer(encyclopedia, rows, pool, seed)
    return scores


def _lengths(texts: list[str]) -> np.ndarray:
    """Features of the length in characters and in words, [S, F]."""
    return np.concatenate(
        [_curve(np.array([len(text) for text in texts])), _curve(np.array([len(text.split()) for text in texts]))],
        axis=1,
    )


def _curve(counts_S: np.ndarray) -> np.ndarray:
    """Logarithm of a count and its square, so that "neither short nor long" can be said too: [S, 2]."""
    log_S = np.log1p(counts_S.astype(np.float64))
    log_S = (log_S - log_S.mean()) / max(float(log_S.std()), 1e-9)
    return np.stack([log_S, log_S**2], axis=1)


def class_gaps(table: SampleTable, train: np.ndarray, features_SF: np.ndarray) -> np.ndarray:
    """Weighted mean of positives minus that of negatives, by concept: [N, F]; 0 where a class is missing."""
    place = np.full(len(table), -1, dtype=np.int64)
    place[train] = np.arange(len(train))
    kept_E = np.flatnonzero((place[table.rows] >= 0) & (table.weights > 0))
    means_NF = np.zeros((2, len(table.concepts), features_SF.shape[1]))
    counts_N = np.zeros((2, len(table.concepts)))
    for label in (0, 1):
        of_E = kept_E[table.labels[kept_E] == label]
        marks_NS = scipy.sparse.csr_array(
            (table.weights[of_E].astype(np.float64), (table.cols[of_E], place[table.rows[of_E]])),
            shape=(len(table.concepts), len(train)),
        )
        counts_N[label] = marks_NS.sum(axis=1)
        means_NF[label] = (marks_NS @ features_SF) / counts_N[label].clip(1e-12)[:, None]
    both_N1 = np.logical_and(counts_N[0] > 0, counts_N[1] > 0)[:, None]
    return np.where(both_N1, means_NF[1] - means_NF[0], 0)


def _discriminant(table: SampleTable, train: np.ndarray, features_SF: np.ndarray) -> np.ndarray:
    """Fisher's direction of each concept on the training texts, which come first, applied to the rest: [rest, N]."""
    fitted_SF = features_SF[: len(train)]
    covariance_FF = np.cov(fitted_SF, rowvar=False) + RIDGE * np.eye(features_SF.shape[1])
    weight_NF = np.linalg.solve(covariance_FF, class_gaps(table, train, fitted_SF).T).T
    return features_SF[len(train) :] @ weight_NF.T


def _projected(encyclopedia: Encyclopedia, rows: np.ndarray, pool: str, seed: int) -> np.ndarray:
    """States of all layers side by side along R random directions: [S, R]."""
    random = np.random.default_rng(seed)
    total_SR = np.zeros((len(rows), NUM_DIRECTIONS), dtype=np.float32)
    for layer in encyclopedia.spec.layers:
        direction_DR = random.normal(size=(encyclopedia.spec.width, NUM_DIRECTIONS)).astype(np.float32)
        total_SR += encyclopedia.pooled(layer, pool, rows).astype(np.float32) @ direction_DR
    return total_SR


def _oriented(table: SampleTable, train: np.ndarray, along_SR: np.ndarray, seed: int) -> np.ndarray:
    """For each concept one of the directions, with the sign that the training texts give it: [rest, N]."""
    gaps_NR = class_gaps(table, train, along_SR[: len(train)])
    chosen_N = np.random.default_rng([seed, 1]).integers(along_SR.shape[1], size=len(gaps_NR))
    sign_N = np.sign(gaps_NR[np.arange(len(gaps_NR)), chosen_N])
    return along_SR[len(train) :, chosen_N] * sign_N


def _first_layer(encyclopedia: Encyclopedia, rows: np.ndarray, pool: str, seed: int) -> np.ndarray:
    """Lenses on the output of the first block alone, fitted in closed form."""
    every = read_sparse_pool(encyclopedia, pool=pool, seed=seed)
    place = every.layers.index(0)
    alone = replace(every, states_SLD=every.states_SLD[:, place : place + 1], layers=(0,))
    stack = solve_stack(alone, shrinkage=DEFAULT_SHRINKAGE, seed=seed, progress=False)
    x_SLD = torch.from_numpy(encyclopedia.pooled(0, pool, rows)).float()[:, None]
    return stack.bank().logits(x_SLD).numpy()
