"""AUROC under resampled groups: draws shared by all systems and concepts, so that their differences are paired.

The rows of one article are not independent, so whole groups are drawn. A draw only changes how often every text
counts. Where a class is small, the pairs that each of its texts wins are a row of a matrix, and all draws of many
lenses are one matrix product; where both are large, each lens is sorted once and a draw is a look-up in cumulative
sums.

Axes: S texts, N concepts, G groups, R draws, r draws of one block, L texts of the larger class, K of the smaller; U
texts that a block of lenses uses, B rows of that block, n its lenses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# Multiplications of one bootstrap before the number of draws is lowered (about a minute of one core).
AFFORDABLE_WORK = 600_000_000_000
FEWEST_DRAWS = 100
BLOCK_DRAWS = 128  # keeps one block of a thousand texts within the cache
# Up to so many texts in the smaller class a product of matrices is quicker than sums over the larger one.
SMALL_CLASS = 512
BLOCK_ROWS, BLOCK_CELLS = 1024, 8_000_000


def group_counts(groups_S: np.ndarray, *, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each group is drawn, float64 [G, R], when as many as there are are drawn with replacement.

    Returns:
        The counts, and the number of the group of each text [S].
    """
    names, numbers_S = np.unique(groups_S, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn_RG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.ascontiguousarray(drawn_RG.T, dtype=np.float64), numbers_S


def affordable_draws(draws: int, labels_SN: np.ndarray, weights_SN: np.ndarray, *, num_systems: int = 1) -> int:
    """Draws of a bootstrap that ends within a minute: as asked, or fewer (at least 100, or as asked if less)."""
    used_SN, positive_SN = weights_SN > 0, labels_SN > 0
    positive_N = (used_SN & positive_SN).sum(axis=0, dtype=np.int64)
    negative_N = used_SN.sum(axis=0, dtype=np.int64) - positive_N
    small_N = np.minimum(np.minimum(positive_N, negative_N), SMALL_CLASS)
    work = num_systems * int((small_N * np.maximum(positive_N, negative_N)).sum())
    return min(draws, max(FEWEST_DRAWS, AFFORDABLE_WORK // max(1, work)))


def bootstrap(
    scores: Mapping[str, np.ndarray],
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    groups_S: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """AUROC of every system and concept under resampled groups, [R, N] each; NaN where a draw has one class.

    As many groups as there are, are drawn with replacement; a text counts as often as its group was drawn. Draws are
    the same for all systems and concepts, so differences of the results are paired. Concepts of few texts are missing
    from many draws: a mean over the concepts of a draw is not one of all concepts (`ftw.map.influence` has that).

    Args:
        groups_S: group number of each text, or its name.

    Source: Efron & Tibshirani 1993, An introduction to the bootstrap (percentile intervals, cluster resampling).
    """
    counts_GR, numbers_S = group_counts(groups_S, draws=draws, seed=seed)
    results = {name: np.full((draws, labels_SN.shape[1]), np.nan) for name in scores}
    for name, scores_SN in scores.items():
        for block in _blocks(_lenses(scores_SN, labels_SN, weights_SN)):
            if len(block) == 1 and len(block[0].small_s) > SMALL_CLASS:
                results[name][:, block[0].number] = block[0].by_sums(counts_GR, numbers_S)
            else:
                results[name][:, [lens.number for lens in block]] = _by_product(block, counts_GR, numbers_S)
    return results


@dataclass(frozen=True)
class _Lens:
    """One lens on its texts, with numbers that rank the smaller class above the larger one.

    AUROC is the same when classes and signs are both swapped.
    """

    number: int
    large_s: np.ndarray
    small_s: np.ndarray
    signed_S: np.ndarray
    weights_S: np.ndarray

    def wins(self) -> np.ndarray:
        """Weight of the larger class that each text of the smaller one stands above, ties half, [K, L]."""
        small_K1, large_L = self.signed_S[self.small_s][:, None], self.signed_S[self.large_s]
        return ((large_L < small_K1) + 0.5 * (large_L == small_K1)) * self.weights_S[self.large_s]

    def by_sums(self, counts_GR: np.ndarray, numbers_S: np.ndarray) -> np.ndarray:
        """AUROC of each draw, [R], by cumulative sums over the larger class in order."""
        large_s = self.large_s[np.argsort(self.signed_S[self.large_s], kind="stable")]
        sorted_L, small_K = self.signed_S[large_s], self.signed_S[self.small_s]
        below_K, upto_K = (np.searchsorted(sorted_L, small_K, side) for side in ("left", "right"))
        result_R = np.empty(counts_GR.shape[1])
        for part, counts_Gr in _draw_blocks(counts_GR):
            large_Lr = counts_Gr[numbers_S[large_s]] * self.weights_S[large_s, None]
            small_Kr = counts_Gr[numbers_S[self.small_s]] * self.weights_S[self.small_s, None]
            sums_Lr = np.zeros((len(large_Lr) + 1, large_Lr.shape[1]))
            np.cumsum(large_Lr, axis=0, out=sums_Lr[1:])
            won_r = np.einsum("kr,kr->r", small_Kr, sums_Lr[below_K] + sums_Lr[upto_K]) / 2
            result_R[part] = _ratio(won_r, small_Kr.sum(axis=0) * sums_Lr[-1])
        return result_R


def _lenses(scores_SN: np.ndarray, labels_SN: np.ndarray, weights_SN: np.ndarray) -> Iterator[_Lens]:
    """The lenses that have an AUROC: two classes, no NaN."""
    for number in range(labels_SN.shape[1]):
        weights_S, scores_S = weights_SN[:, number], scores_SN[:, number]
        used_S, positive_S = weights_S > 0, labels_SN[:, number] > 0
        positive_s, negative_s = np.flatnonzero(used_S & positive_S), np.flatnonzero(used_S & ~positive_S)
        if len(positive_s) and len(negative_s) and not np.isnan(scores_S[used_S]).any():
            swap = len(positive_s) > len(negative_s)
            sides = (positive_s, negative_s) if swap else (negative_s, positive_s)
            signed_S = (-1 if swap else 1) * scores_S.astype(np.float64)
            yield _Lens(number, *sides, signed_S, weights_S.astype(np.float64))


def _blocks(lenses: Iterator[_Lens]) -> Iterator[list[_Lens]]:
    """Lenses in blocks whose matrix fits a budget; one whose classes are both large comes alone."""
    block: list[_Lens] = []
    rows = cells = 0
    for lens in lenses:
        size = len(lens.small_s)
        if size > SMALL_CLASS:
            yield [lens]
            continue
        if block and (rows + size > BLOCK_ROWS or cells + size * len(lens.large_s) > BLOCK_CELLS):
            yield block
            block, rows, cells = [], 0, 0
        block, rows, cells = [*block, lens], rows + size, cells + size * len(lens.large_s)
    if block:
        yield block


def _by_product(block: list[_Lens], counts_GR: np.ndarray, numbers_S: np.ndarray) -> np.ndarray:
    """AUROC of each draw for a block of lenses, [R, n]."""
    used_U = np.unique(np.concatenate([part for lens in block for part in (lens.large_s, lens.small_s)]))
    starts_n = np.cumsum([0, *(len(lens.small_s) for lens in block)])
    wins_BU, large_nU = np.zeros((starts_n[-1], len(used_U))), np.zeros((len(block), len(used_U)))
    for place, lens in enumerate(block):
        columns = np.searchsorted(used_U, lens.large_s)
        wins_BU[starts_n[place] : starts_n[place + 1], columns] = lens.wins()
        large_nU[place, columns] = lens.weights_S[lens.large_s]
    small_B = np.searchsorted(used_U, np.concatenate([lens.small_s for lens in block]))
    weights_B = np.concatenate([lens.weights_S[lens.small_s] for lens in block])
    result_Rn = np.empty((counts_GR.shape[1], len(block)))
    for part, counts_Gr in _draw_blocks(counts_GR):
        counts_Ur = counts_Gr[numbers_S[used_U]]
        small_Br = counts_Ur[small_B] * weights_B[:, None]
        won_nr = np.add.reduceat((wins_BU @ counts_Ur) * small_Br, starts_n[:-1], axis=0)
        pairs_nr = np.add.reduceat(small_Br, starts_n[:-1], axis=0) * (large_nU @ counts_Ur)
        result_Rn[part] = _ratio(won_nr, pairs_nr).T
    return result_Rn


def _draw_blocks(counts_GR: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, counts_GR.shape[1], BLOCK_DRAWS):
        part = slice(start, start + BLOCK_DRAWS)
        yield part, np.ascontiguousarray(counts_GR[:, part])


def _ratio(won: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Share of the pairs won; NaN where there are none."""
    return np.divide(won, pairs, out=np.full(won.shape, np.nan), where=pairs > 0)
