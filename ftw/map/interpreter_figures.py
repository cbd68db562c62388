"""How well systems name the concept of a text: top-1, top-5, calibration, with intervals over concepts, and paired.

Texts of one concept are not independent, so concepts are resampled, with all their texts; the same draws serve all
systems, so that a difference is one between systems on the same concepts.

Axes: S texts, C concepts, R draws, Q bins.

Source: Efron & Tibshirani 1993, An introduction to the bootstrap (percentile intervals, cluster resampling).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftw.errors import DataError

TOPS = (1, 5)
BINS = 15
SYSTEM = "interpreter"


def figures(
    probabilities: Mapping[str, np.ndarray],
    labels_S: np.ndarray,
    kinds: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of several systems on the same texts, for each kind of text and for all together.

    Args:
        probabilities: by system, [S, C]; the system "interpreter" is compared with each of the others.
        labels_S: the concept of each text. kinds: what each text tests.

    Returns:
        By kind: num_texts, num_concepts, chance, and by system top1, top5 and ece with their 95 % intervals
        (`top1_low`, `top1_high`); `minus` has the interpreter's top1 and top5 minus another system's.

    Raises:
        DataError: there are no texts.
    """
    if not len(labels_S):
        raise DataError("no texts to judge the interpreter on; give rows of the part 'test'")
    hits = {name: _hits(chance_SC, labels_S) for name, chance_SC in probabilities.items()}
    groups = {kind: np.flatnonzero(np.asarray(kinds) == kind) for kind in sorted(set(kinds))}
    if len(groups) > 1:
        groups["all"] = np.arange(len(labels_S))
    found = {}
    for kind, rows in groups.items():
        counts_RC, size_C = _draws(labels_S[rows], draws, seed)
        systems = {}
        for name, tops in hits.items():
            drawn = {top: _mean(hit_S[rows], labels_S[rows], counts_RC, size_C) for top, hit_S in tops.items()}
            entry: dict[str, Any] = {}
            for top, hit_S in tops.items():
                entry |= _with_interval(f"top{top}", float(hit_S[rows].mean()), drawn[top])
            entry["ece"] = ece(probabilities[name][rows], labels_S[rows])
            systems[name] = (entry, drawn)
        if SYSTEM in systems:
            for name, (entry, drawn) in systems.items():
                if name == SYSTEM:
                    continue
                entry["minus"] = {}
                for top in TOPS:
                    difference = float(systems[SYSTEM][0][f"top{top}"] - entry[f"top{top}"])
                    entry["minus"] |= _with_interval(f"top{top}", difference, systems[SYSTEM][1][top] - drawn[top])
        found[kind] = {
            "num_texts": len(rows),
            "num_concepts": int((size_C > 0).sum()),
            "systems": {name: entry for name, (entry, _) in systems.items()},
        }
    return found


def ece(probabilities_SC: np.ndarray, labels_S: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the highest probability: mean gap between it and how often it is right, in bins
    that hold equally many texts (Guo et al. 2017; Nixon et al. 2019 for the bins)."""
    best_S = probabilities_SC.argmax(1)
    sure_S, right_S = probabilities_SC.max(1), best_S == labels_S
    parts = np.array_split(np.argsort(sure_S, kind="stable"), min(bins, len(labels_S)))
    return float(sum(len(part) * abs(sure_S[part].mean() - right_S[part].mean()) for part in parts) / len(labels_S))


def confusions(
    probabilities_SC: np.ndarray, labels_S: np.ndarray, groups: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Mean probability that texts of each category give to each category, [K, K]; `groups`: category by concept."""
    names, group_C = np.unique(np.asarray(groups), return_inverse=True)
    sums_SK = np.stack([probabilities_SC[:, group_C == number].sum(1) for number in range(len(names))], axis=1)
    matrix_KK = np.full((len(names), len(names)), np.nan)
    for number in range(len(names)):
        if (own := group_C[labels_S] == number).any():
            matrix_KK[number] = sums_SK[own].mean(0)
    return names.tolist(), matrix_KK


def most_confused(
    probabilities_SC: np.ndarray, labels_S: np.ndarray, names: Sequence[str], num: int = 20
) -> list[tuple]:
    """Pairs (concept, taken for, probability) where another concept has the highest mean probability."""
    pairs = []
    for concept in np.unique(labels_S):
        mean_C = probabilities_SC[labels_S == concept].mean(0)
        own, mean_C[concept] = mean_C[concept], -1.0
        other = int(mean_C.argmax())
        pairs.append((names[concept], names[other], float(mean_C[other]), float(own)))
    return sorted(pairs, key=lambda pair: -pair[2])[:num]


def _hits(chance_SC: np.ndarray, labels_S: np.ndarray) -> dict[int, np.ndarray]:
    """Whether the concept is among the top 1 and 5, [S]; of concepts that tie, each comes first equally often."""
    own_S1 = chance_SC[np.arange(len(labels_S)), labels_S][:, None]
    ahead_S, equal_S = (chance_SC > own_S1).sum(1), (chance_SC == own_S1).sum(1)
    return {top: np.clip((top - ahead_S) / equal_S, 0, 1) for top in TOPS}


def _draws(labels_S: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each concept is drawn, [R, C], and its number of texts, [C]; only those that have texts are drawn."""
    size_C = np.bincount(labels_S)
    there = np.flatnonzero(size_C)
    counts_RC = np.zeros((draws, len(size_C)))
    random = np.random.default_rng(seed)
    counts_RC[:, there] = random.multinomial(len(there), np.full(len(there), 1 / len(there)), size=draws)
    return counts_RC, size_C


def _mean(hit_S: np.ndarray, labels_S: np.ndarray, counts_RC: np.ndarray, size_C: np.ndarray) -> np.ndarray:
    """Share of texts that are hits in each draw, [R]."""
    hits_C = np.bincount(labels_S, weights=hit_S, minlength=len(size_C))
    return (counts_RC @ hits_C) / (counts_RC @ size_C)


def _with_interval(name: str, value: float, drawn_R: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
