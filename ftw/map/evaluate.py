"""How good the lenses are on held-out text, with intervals and beside their controls.

A figure without a control says little: beside the activation lenses stand text-only lenses on the same rows and lenses
trained on shuffled labels. Intervals come from a bootstrap over *groups* (articles, templates), never over rows,
because the rows of one article are not independent; every draw is shared by all concepts and systems, so that
differences are paired. That of a mean over concepts keeps every concept in every draw (`ftw.map.influence`).

Axes: S texts, N concepts, P permutations of the labels, R bootstrap draws.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftw.errors import ConfigError, DataError
from ftw.map import metrics
from ftw.map.bootstrap import affordable_draws, bootstrap, group_counts
from ftw.map.influence import Influence, influence

MANY_CELLS = 4_000_000  # texts × concepts
ACTIVATION, TEXT, SHUFFLED, BOTH = "activation", "text", "shuffled", "both"
# Controls that are far below any useful lens: the lens's own interval is held against them, which costs no draws.
UNPAIRED = frozenset({"length", "position", "random"})


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is computed beside the plain figures.

    Attributes:
        draws: bootstrap draws (for the intervals of single concepts fewer, with a note, where all would take minutes).
        confidence: mass of the intervals. slices: columns of the sample table to break the figures down by.
        max_slice_values: values of a column with figures of their own, the most frequent first.
        bins: bins of the calibration error. prior: base rate that the probabilities are for.
        floor_draws: simulations for the floor of the calibration error. seed: of every draw.
    """

    draws: int = 1000
    confidence: float = 0.95
    slices: list[str] = field(default_factory=list)
    max_slice_values: int = 20
    bins: int = 10
    prior: float = 0.5
    floor_draws: int = 200
    seed: int = 0


@dataclass
class Evaluation:
    """Figures per concept, their means, and the same per slice.

    Attributes:
        concepts: figures of each concept by name; NaN where a concept has one class. Intervals are NaN where a class
            comes from a single group, which tells nothing of how others would read. `no_better_than`: the controls that
            the interval does not rule out.
        mean: mean of every figure over the concepts that have it. Its intervals `…_low`, `…_high` are for these
            concepts on other texts, `…_wide_low`, `…_wide_high` for other concepts like them too.
        slices: column -> value -> {"mean": figures, "concepts": {name: auroc}, "num_rows": texts}.
        notes: what a reader must know: concepts without figures, lowered draws, few groups.
    """

    concepts: dict[str, dict[str, Any]]
    mean: dict[str, Any]
    slices: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dictionaries and numbers; what is not a number becomes null, which any JSON reader takes."""
        parts = {"concepts": self.concepts, "mean": self.mean, "slices": self.slices, "notes": self.notes}
        return {key: _plain(value) for key, value in parts.items()}

    @classmethod
    def from_json(cls, parts: Mapping[str, Any]) -> "Evaluation":
        """Read what `to_json` gave; null becomes NaN again."""
        if missing := {"concepts", "mean"} - set(parts):
            raise DataError(f"metrics without {' and '.join(sorted(missing))}; run: ftw evaluate")
        concepts, mean, slices = (_numbers(parts.get(key, {})) for key in ("concepts", "mean", "slices"))
        return cls(concepts, mean, slices, list(parts.get("notes", [])))


@dataclass(frozen=True)
class _Readings:
    """What was read from the held-out texts and what is true of them, in rows that can be taken together."""

    scores: dict[str, np.ndarray]
    shuffled: list[np.ndarray]
    labels_SN: np.ndarray
    weights_SN: np.ndarray
    groups_S: np.ndarray
    probabilities_SN: np.ndarray | None
    thresholds: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> "_Readings":
        return _Readings(
            {name: scores_SN[rows] for name, scores_SN in self.scores.items()},
            [scores_SN[rows] for scores_SN in self.shuffled],
            self.labels_SN[rows],
            self.weights_SN[rows],
            self.groups_S[rows],
            None if self.probabilities_SN is None else self.probabilities_SN[rows],
            self.thresholds,
        )


def evaluate(
    scores: Mapping[str, Any],
    *,
    labels: np.ndarray,
    weights: np.ndarray,
    groups: Sequence[str],
    concepts: Sequence[str],
    probabilities: np.ndarray | None = None,
    thresholds: Mapping[str, np.ndarray] | None = None,
    slices: Mapping[str, Sequence[str]] | None = None,
    config: EvaluateConfig | None = None,
) -> Evaluation:
    """Figures of all concepts on held-out texts, beside the controls.

    Args:
        scores: logits [S, N] by system. "activation" is the one under test; "text" and any other name are controls with
            paired differences, those in `UNPAIRED` without; "both", which is states and words together, is no control;
            "shuffled" holds P arrays [P, S, N] of lenses trained on permuted labels.
        labels, weights: [S, N]; weight 0 where a text is not used for a concept.
        groups: S names; texts of one name are drawn together.
        concepts: N names.
        probabilities: [S, N] calibrated probabilities of "activation" at the base rate `config.prior`.
        thresholds: N logits each, set on other texts: "threshold" (for F1) and "threshold_1" (for 1 % false positives).
        slices: columns by name, S values each; those named in `config.slices` are broken down.

    Raises:
        DataError: shapes differ, there are no texts, or no concept has both classes.
        ConfigError: a column of `config.slices` does not exist.
    """
    config = config or EvaluateConfig()
    readings = _readings(scores, labels, weights, groups, probabilities, thresholds or {}, concepts)
    columns = dict(slices or {})
    if unknown := [column for column in config.slices if column not in columns]:
        raise ConfigError(f"evaluate.slices: no column {unknown[0]!r}; the columns are {sorted(columns) or 'none'}")
    notes = _warnings(readings, concepts)
    figures, mean = _figures(readings, config, notes)
    if not np.isfinite(figures["auroc"]).any():
        raise DataError(
            f"none of {len(concepts)} concepts has positives and negatives among the {len(readings.labels_SN)} texts; "
            "evaluate on texts that are marked 1 and others that are marked 0 for each concept"
        )
    return Evaluation(
        _per_concept(figures, concepts, list(readings.scores), bool(readings.shuffled)),
        mean,
        {column: _by_value(readings, column, columns[column], concepts, config, notes) for column in config.slices},
        notes,
    )


def _readings(
    scores: Mapping[str, Any],
    labels: np.ndarray,
    weights: np.ndarray,
    groups: Sequence[str],
    probabilities: np.ndarray | None,
    thresholds: Mapping[str, np.ndarray],
    concepts: Sequence[str],
) -> _Readings:
    """The arguments as arrays, all of one shape."""
    if ACTIVATION not in scores:
        raise DataError(f"no scores of 'activation' among {sorted(scores)}; it is the system under test")
    systems = {name: np.asarray(scores_SN) for name, scores_SN in scores.items() if name != SHUFFLED}
    systems = {ACTIVATION: systems.pop(ACTIVATION), **systems}
    shuffled = [np.asarray(scores_SN) for scores_SN in scores.get(SHUFFLED, [])]
    labels_SN, weights_SN = np.asarray(labels), np.asarray(weights)
    chances_SN = None if probabilities is None else np.asarray(probabilities)
    shape = (len(groups), len(concepts))
    arrays = {"labels": labels_SN, "weights": weights_SN, **{f"scores of {name!r}": a for name, a in systems.items()}}
    arrays |= {f"scores of 'shuffled' {number}": a for number, a in enumerate(shuffled)}
    arrays |= {} if chances_SN is None else {"probabilities": chances_SN}
    for what, array in arrays.items():
        if array.shape != shape:
            raise DataError(f"{what}: shape {array.shape}, but there are {shape[0]} texts and {shape[1]} concepts")
    if not shape[0] or not shape[1]:
        raise DataError(f"nothing to evaluate: {shape[0]} texts and {shape[1]} concepts")
    limits = {name: np.asarray(limit_N, dtype=np.float64) for name, limit_N in thresholds.items()}
    _, groups_S = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    return _Readings(systems, shuffled, labels_SN, weights_SN, groups_S, chances_SN, limits)


def _figures(
    readings: _Readings, config: EvaluateConfig, notes: list[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every figure as N numbers, and the means."""
    rows = readings.labels_SN, readings.weights_SN
    num_paired = sum(name not in UNPAIRED for name in readings.scores)
    draws = affordable_draws(config.draws, *rows, num_systems=num_paired)
    if notes is not None and draws < config.draws:
        notes.append(
            f"intervals of single concepts from {draws} bootstrap draws instead of {config.draws}: there are many texts"
        )
    figures = _plain_figures(readings, config)
    mean: dict[str, Any] = {name: _mean(values_N) for name, values_N in figures.items()}
    for name in ("num_positive", "num_negative", "threshold", "threshold_1"):
        mean.pop(name, None)  # a mean of logits of different lenses means nothing
    single_N = _add_intervals(readings, config, figures, mean, draws)
    if notes is not None and single_N.any():
        notes.append(
            f"{int(single_N.sum())} concepts without an interval of their own: one group holds all their positives or "
            "all their negatives; in the mean's interval they stand for one another"
        )
    if readings.shuffled:
        shuffled_PN = np.stack([metrics.auroc(scores_SN, *rows) for scores_SN in readings.shuffled])
        figures["auroc_shuffled"] = shuffled_PN.mean(axis=0)
        figures["auroc_shuffled_95"] = np.quantile(shuffled_PN, 0.95, axis=0)
        figures["selectivity"] = figures["auroc"] - figures["auroc_shuffled"]  # Hewitt & Liang 2019
        mean |= {name: _mean(figures[name]) for name in ("auroc_shuffled", "selectivity")}
    if readings.probabilities_SN is not None:
        mean["ece_pooled"] = _pooled_ece(readings, config)
    mean["num_concepts"] = int(np.isfinite(figures["auroc"]).sum())
    mean["num_texts"], mean["num_groups"] = len(readings.groups_S), len(np.unique(readings.groups_S))
    mean["draws"] = draws
    return figures, mean


def _plain_figures(readings: _Readings, config: EvaluateConfig) -> dict[str, np.ndarray]:
    """The figures that need no resampling."""
    rows = readings.labels_SN, readings.weights_SN
    used_SN, positive_SN = readings.weights_SN > 0, readings.labels_SN > 0
    logits_SN, limits = readings.scores[ACTIVATION], readings.thresholds
    figures = {
        "num_positive": (used_SN & positive_SN).sum(axis=0),
        "num_negative": (used_SN & ~positive_SN).sum(axis=0),
    }
    for name, scores_SN in readings.scores.items():
        figures["auroc" if name == ACTIVATION else f"auroc_{name}"] = metrics.auroc(scores_SN, *rows)
    figures["average_precision"] = metrics.average_precision(logits_SN, *rows)
    figures["recall_at_1fpr"] = metrics.recall_at_fpr(logits_SN, *rows, target=0.01)
    if "threshold" in limits:
        figures["threshold"] = limits["threshold"]
        figures["f1"] = metrics.f1_at(logits_SN, *rows, limits["threshold"])
    if "threshold_1" in limits:
        figures["threshold_1"] = limits["threshold_1"]
        recall_N, rate_N = metrics.rates_at(logits_SN, *rows, limits["threshold_1"])
        figures["recall_at_threshold_1"], figures["fpr_at_threshold_1"] = recall_N, rate_N
    if readings.probabilities_SN is not None:
        chances_SN, prior = readings.probabilities_SN, config.prior
        # The floor is a mean over simulations: a tenth of them is enough where they would take minutes.
        floor_draws = math.ceil(config.floor_draws / (10 if chances_SN.size > MANY_CELLS else 1))
        figures["ece"] = metrics.ece(chances_SN, *rows, bins=config.bins, prior=prior)
        figures["ece_floor"] = metrics.ece_floor(
            chances_SN, *rows, bins=config.bins, prior=prior, draws=floor_draws, seed=config.seed
        )
        figures["brier"] = metrics.brier(chances_SN, *rows, prior=prior)
    return figures


def _add_intervals(
    readings: _Readings, config: EvaluateConfig, figures: dict[str, np.ndarray], mean: dict[str, Any], draws: int
) -> np.ndarray:
    """Differences to the controls, intervals of each concept and of the means; tells where a class has one group."""
    rows = readings.labels_SN, readings.weights_SN
    counts_GR, numbers_S = group_counts(readings.groups_S, draws=config.draws, seed=config.seed)
    paired = {name: scores_SN for name, scores_SN in readings.scores.items() if name not in UNPAIRED}
    drawn = bootstrap(paired, *rows, readings.groups_S, draws=draws, seed=config.seed)
    own, own_RN = influence(readings.scores[ACTIVATION], *rows, numbers_S), drawn[ACTIVATION]
    figures_of: dict[str, tuple[Influence, np.ndarray]] = {"auroc": (own, own_RN)}
    for name in [name for name in drawn if name != ACTIVATION]:
        other = influence(readings.scores[name], *rows, numbers_S)
        key = "difference" if name == TEXT else f"difference_{name}"
        figures[key] = figures["auroc"] - figures[f"auroc_{name}"]
        mean[key] = _mean(figures[key])
        figures_of |= {f"auroc_{name}": (other, drawn[name]), key: (own - other, own_RN - drawn[name])}
    tails = (1 - config.confidence) / 2, (1 + config.confidence) / 2
    for key, (moved, drawn_RN) in figures_of.items():
        known_N = np.isfinite(drawn_RN).any(axis=0) & (moved.single_N < 0)
        low_N, high_N = np.full((2, len(known_N)), np.nan)
        if known_N.any():
            low_N[known_N], high_N[known_N] = np.nanquantile(drawn_RN[:, known_N], tails, axis=0)
        figures[f"{key}_low"], figures[f"{key}_high"] = low_N, high_N
        least = 0.0 if key.startswith("auroc") else -1.0
        for kind, drawn_R in zip(("", "_wide"), moved.mean_draws(counts_GR, seed=config.seed), strict=True):
            edges = np.clip(np.quantile(drawn_R, tails), least, 1.0).tolist()
            mean[f"{key}{kind}_low"], mean[f"{key}{kind}_high"] = edges
    return np.asarray(own.single_N >= 0)


def _pooled_ece(readings: _Readings, config: EvaluateConfig) -> float:
    """Calibration error over all readings of all concepts together, each concept at the prior and counting the same."""
    assert readings.probabilities_SN is not None
    usable_N = metrics.usable(readings.probabilities_SN, readings.labels_SN, readings.weights_SN)
    if not usable_N.any():
        return math.nan
    labels_SN = readings.labels_SN[:, usable_N]
    shares_SN = metrics.weights_at_prior(labels_SN, readings.weights_SN[:, usable_N], config.prior)
    chances_SN = readings.probabilities_SN[:, usable_N]
    flat = (array.reshape(-1, 1) for array in (chances_SN, labels_SN, shares_SN))
    return float(metrics.ece(*flat, bins=config.bins)[0])


def _per_concept(
    figures: dict[str, np.ndarray], concepts: Sequence[str], systems: list[str], shuffled: bool
) -> dict[str, dict[str, Any]]:
    """Figures by concept, with the controls that the lens does not beat."""
    beaten = {
        name: figures["auroc_low"] - figures[f"auroc_{name}"]
        if name in UNPAIRED
        else figures["difference_low" if name == TEXT else f"difference_{name}_low"]
        for name in systems[1:]
        if name != BOTH
    }
    if shuffled:
        beaten[SHUFFLED] = figures["auroc_low"] - figures["auroc_shuffled_95"]
    result: dict[str, dict[str, Any]] = {}
    for lens, concept in enumerate(concepts):
        result[concept] = {key: values_N[lens].item() for key, values_N in figures.items()}
        result[concept]["no_better_than"] = [name for name, margin_N in beaten.items() if margin_N[lens] <= 0]
    return result


def _by_value(
    readings: _Readings,
    column: str,
    values: Sequence[str],
    concepts: Sequence[str],
    config: EvaluateConfig,
    notes: list[str],
) -> dict[str, dict[str, Any]]:
    """The means and the AUROC of each concept among the texts with one value of a column, value by value."""
    if len(values) != len(readings.groups_S):
        raise DataError(f"column {column!r} has {len(values)} values for {len(readings.groups_S)} texts")
    counts = Counter(map(str, values)).most_common()
    if len(counts) > config.max_slice_values:
        notes.append(
            f"column {column!r} has {len(counts)} values; figures for the {config.max_slice_values} most frequent only "
            "(evaluate.max_slice_values)"
        )
    result: dict[str, dict[str, Any]] = {}
    values_S = np.asarray([str(value) for value in values], dtype=object)
    for value, count in counts[: config.max_slice_values]:
        figures, mean = _figures(readings.take(np.flatnonzero(values_S == value)), config)
        aurocs = {concept: float(figures["auroc"][lens]) for lens, concept in enumerate(concepts)}
        result[value] = {"mean": mean, "concepts": aurocs, "num_rows": count}
    return result


def _warnings(readings: _Readings, concepts: Sequence[str]) -> list[str]:
    """What the reader must know before the figures, with names."""
    notes = []
    used_SN, positive_SN = readings.weights_SN > 0, readings.labels_SN > 0
    one_class_N = np.invert((used_SN & positive_SN).any(axis=0) & (used_SN & ~positive_SN).any(axis=0))
    if one_class_N.any():
        notes.append(f"{_named(one_class_N, concepts)} without figures: positives or negatives are missing")
    for name, scores_SN in readings.scores.items():
        broken_N = (np.isnan(scores_SN) & used_SN).any(axis=0)
        if broken_N.any():
            notes.append(f"{_named(broken_N, concepts)} without figures: {name} scores are NaN")
    if (num_groups := len(np.unique(readings.groups_S))) < 10:
        notes.append(f"intervals rest on {num_groups} groups; read them as a hint")
    return notes


def _named(which_N: Any, concepts: Sequence[str], limit: int = 20) -> str:
    names = [concepts[lens] for lens in np.flatnonzero(which_N).tolist()]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} concept{'s'[: len(names) > 1]} ({', '.join(names[:limit])}{more})"


def _mean(values_N: np.ndarray) -> float:
    """Mean over the concepts that have the figure."""
    known_N = np.isfinite(values_N)
    return float(values_N[known_N].mean()) if known_N.any() else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _numbers(part) for key, part in value.items()}
    return math.nan if value is None else value
