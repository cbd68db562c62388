"""How often sequence lenses are right, by kind of negative: means over concepts with intervals over prompts.

Balanced accuracy at even odds: the share of a concept's positives above zero logit, averaged with the share of one
kind of its negatives below. Whole prompts are resampled, the same for all systems, so that differences are paired.

Axes: S answers, N concepts, G prompts, R draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftw.map.sequences import KINDS

DRAWS = 1000


def accuracies(
    logits: Mapping[str, np.ndarray],
    *,
    labels_SN: np.ndarray,
    weights_SN: np.ndarray,
    kinds_SN: np.ndarray,
    groups: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean balanced accuracy of every system by kind of negative, with 95 % intervals, and differences to the first.

    Args:
        logits: [S, N] by system; the first one is compared with the others.
        labels_SN, weights_SN: marks. kinds_SN: place in `KINDS` of a negative, -1 elsewhere. groups: S prompts.

    Returns:
        By kind, and "all": {system: {"accuracy", "low", "high"}}, and under "difference": the first system minus each
        other one. A kind without answers is left out.
    """
    _, number_S = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    num_groups = int(number_S.max()) + 1 if len(number_S) else 0
    rng = np.random.default_rng(seed)
    counts_RG = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=draws) if num_groups else None
    used_SN, positive_SN = weights_SN > 0, labels_SN > 0.5
    result: dict[str, Any] = {}
    for kind in ("all", *KINDS):
        negative_SN = used_SN & ~positive_SN
        if kind != "all":
            negative_SN &= kinds_SN == KINDS.index(kind)
        if counts_RG is None or not negative_SN.any():
            continue
        drawn = {
            name: _balanced(values_SN, used_SN & positive_SN, negative_SN, number_S, counts_RG)
            for name, values_SN in logits.items()
        }
        first = next(iter(logits))
        result[kind] = {name: _interval(*both) for name, both in drawn.items()}
        result[kind]["difference"] = {
            name: _interval(drawn[first][0] - both[0], drawn[first][1] - both[1])
            for name, both in drawn.items()
            if name != first
        }
    return result


def _balanced(
    logits_SN: np.ndarray,
    positive_SN: np.ndarray,
    negative_SN: np.ndarray,
    number_S: np.ndarray,
    counts_RG: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Mean over concepts of the balanced accuracy: on the answers as they are, and under each draw [R]."""
    num_groups = counts_RG.shape[1]
    shares = []
    for class_SN, right_SN in ((positive_SN, logits_SN > 0), (negative_SN, logits_SN <= 0)):
        total_GN, hits_GN = np.zeros((2, num_groups, logits_SN.shape[1]))
        np.add.at(total_GN, number_S, class_SN)
        np.add.at(hits_GN, number_S, class_SN & right_SN)
        counts = np.concatenate([np.ones((1, num_groups)), counts_RG])
        totals_RN, found_RN = counts @ total_GN, counts @ hits_GN
        shares.append(np.divide(found_RN, totals_RN, out=np.full(totals_RN.shape, np.nan), where=totals_RN > 0))
    both_RN = (shares[0] + shares[1]) / 2
    known_RN = np.isfinite(both_RN)
    mean_R = np.where(known_RN, both_RN, 0).sum(axis=1) / known_RN.sum(axis=1).clip(1)
    return float(mean_R[0]), mean_R[1:]


def _interval(value: float, drawn_R: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    return {"accuracy": value, "low": float(low), "high": float(high)}


def flat(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures by names of one word each: accuracy_KIND of the first system, accuracy_KIND_SYSTEM of the others."""
    figures: dict[str, float] = {}
    for kind, systems in found.items():
        for place, (name, figure) in enumerate(one for one in systems.items() if one[0] != "difference"):
            key = f"accuracy_{kind}" if place == 0 else f"accuracy_{kind}_{name}"
            figures |= {key: figure["accuracy"], f"{key}_low": figure["low"], f"{key}_high": figure["high"]}
        for name, figure in systems["difference"].items():
            key = f"accuracy_difference_{kind}_{name}"
            figures |= {key: figure["accuracy"], f"{key}_low": figure["low"], f"{key}_high": figure["high"]}
    return figures


def lines(found: Mapping[str, Any]) -> list[str]:
    """The figures as sentences for people, a kind of negative each."""
    words = []
    for kind, systems in found.items():
        shown = "; ".join(
            f"{name} {100 * figure['accuracy']:.1f} % ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"
            for name, figure in systems.items()
            if name != "difference"
        )
        words.append(f"balanced accuracy against {kind} negatives: {shown}")
    return words
