"""Dissonance: what a model thinks set against what it writes, concept by concept and token by token.

An activation lens reads the state, a text lens the words. Both are calibrated; their signed difference, activation
minus text, is positive where the model thinks what it does not write and negative where it writes what it does not
think. A concept that has one kind of lens only has no dissonance: its values are NaN, never a difference from nothing.

Which numbers are subtracted matters:

- *percentile* (the default, where both sides have background text): the share of background that reads lower. On
  background both sides are then spread alike for every concept, so that no badly scaled lens leads the list.
- *probability*: σ of the calibrated logit. Platt's calibration is made for whole texts at a base rate of one half; at a
  single token it ranks well but claims too much. It is what there is without background text.
- *surprise*: -log10(1 - percentile) / 3, at most 1. From the median to 90 % is 0.23 instead of 0.4, from 90 % to 99.9 %
  is 0.67 instead of 0.1: differences among unremarkable readings fade, those among remarkable ones show.

Axes: T tokens, N concepts, K lags either way.

Source: the dual lens design (activation and text lenses of one concept side by side, dissonance as their difference).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ftw.errors import ConceptError, DataError
from ftw.hat.timeline import SURPRISE_LIMIT, Gap, Timeline

KINDS = ("percentile", "probability", "surprise")
# Beyond a fifth on either side a concept counts as thought and not written, or as written and not thought.
ALIGNED = 0.2
CONCEPTS_AT_ONCE = 512


class Lag(NamedTuple):
    """Whether the thought of a concept leads its word.

    Attributes:
        tokens: by how many tokens the text reading follows the activation; negative: the word came first.
        correlation: of the two at that lag. p_value: chance of so high a peak without any relation.
    """

    concept: str
    tokens: int
    correlation: float
    p_value: float


def dissonance_rows(activation: Mapping[str, float], text: Mapping[str, float]) -> list[dict[str, Any]]:
    """Concepts with both kinds of reading, the largest difference first.

    Args:
        activation, text: probability in [0, 1] by concept; a concept missing in either (or None, or NaN) is left out.

    Returns:
        `{"concept", "activation_prob", "text_prob", "divergence", "signed"}` each; divergence = |signed|, signed =
        activation_prob − text_prob.

    Raises:
        DataError: a number outside [0, 1], such as a raw logit.
    """
    rows = []
    for concept in activation:
        pair = activation[concept], text.get(concept)
        if any(value is None or value != value for value in pair):
            continue
        thought, written = (float(value) for value in pair if value is not None)
        for value in (thought, written):
            if not 0 <= value <= 1:
                raise DataError(
                    f"{concept!r} reads {value:g}; dissonance is made of probabilities in [0, 1], not logits"
                )
        signed = thought - written
        found = {"activation_prob": thought, "text_prob": written, "divergence": abs(signed), "signed": signed}
        rows.append({"concept": concept, **found})
    return sorted(rows, key=lambda row: (-row["divergence"], row["concept"]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Dissonance:
    """Activation and text readings of the same tokens, and their difference.

    Attributes:
        tokens: T decoded pieces. counted: bool [T], tokens that means are taken over.
        concepts: N names, those of the activation lenses first.
        activation_TN, text_TN: readings in [0, 1], float32; NaN where a concept has none of that kind.
        by: "percentile", "probability" or "surprise".

    Raises:
        DataError: arrays of unequal shape, or a reading outside [0, 1].
    """

    tokens: list[str]
    counted: np.ndarray
    concepts: list[str]
    activation_TN: np.ndarray
    text_TN: np.ndarray
    by: str

    def __post_init__(self) -> None:
        shape = (len(self.tokens), len(self.concepts))
        if self.by not in KINDS:
            raise DataError(f"no dissonance by {self.by!r}; choose {', '.join(KINDS)}")
        if self.counted.shape != shape[:1]:
            raise DataError(f"dissonance: counted has shape {self.counted.shape} for {shape[0]} tokens")
        for name, values_TN in (("activation", self.activation_TN), ("text", self.text_TN)):
            if values_TN.shape != shape:
                raise DataError(f"dissonance: {name} readings have shape {values_TN.shape}, expected {shape}")
            if ((values_TN < 0) | (values_TN > 1)).any():
                raise DataError(
                    f"dissonance: {name} readings outside [0, 1]; give percentiles or probabilities, not logits"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def values_TN(self) -> np.ndarray:
        """Activation − text, in [-1, 1], float32; NaN where a concept has one kind only."""
        return self.activation_TN - self.text_TN

    def window_means(self, tokens: int) -> np.ndarray:
        """Mean of the values over the last `tokens` tokens up to each, float32 [T, N]; NaN where none has a value."""
        if tokens < 1:
            raise DataError(f"a window of {tokens} tokens has no mean; give at least 1")
        values_TN = self.values_TN
        there_TN = ~np.isnan(values_TN)
        sums_TN = _trailing(np.where(there_TN, values_TN, 0.0), tokens)
        num_TN = _trailing(there_TN.astype(np.float64), tokens)
        return np.where(num_TN > 0, sums_TN / np.maximum(num_TN, 1), np.nan).astype(np.float32)

    def at(self, position: int, k: int | None = None) -> list[Gap]:
        """The k largest differences at one token, by size (all without k).

        Raises:
            DataError: no such position.
        """
        if not -len(self) <= position < len(self):
            raise DataError(f"no token at position {position}; there are 0-{len(self) - 1}")
        return self._gaps(self.activation_TN[position], self.text_TN[position], np.abs(self.values_TN[position]), k)

    def thinks_not_writes(self, k: int = 10) -> list[Gap]:
        """Concepts whose activation exceeds their text the most, by means over the counted tokens."""
        return self._mean_gaps(+1, k)

    def writes_not_thinks(self, k: int = 10) -> list[Gap]:
        """Concepts whose text exceeds their activation the most, by means over the counted tokens."""
        return self._mean_gaps(-1, k)

    def leading(self, k: int) -> np.ndarray:
        """Indices of the k concepts with the largest mean |difference| over the counted tokens, largest first."""
        size_N = _mean(np.abs(self._counted(self.values_TN)))
        order_N = np.argsort(-np.nan_to_num(size_N, nan=-1.0), kind="stable")
        return order_N[: min(max(k, 0), int((~np.isnan(size_N)).sum()))]

    def lags(self, concepts: Sequence[str] | None = None, *, max_lag: int = 5) -> list[Lag]:
        """By how many tokens the text of a concept follows its activation, most significant first.

        The cross-correlation of both series over the counted tokens is taken at lags of ±`max_lag`; its highest point
        is the lag. The same peak is looked for with the text moved round by every number of tokens that takes it out
        of reach of the lags: the share of moves (and of the original) with a peak as high is the p-value, smallest
        1 / (T − 4·max_lag). Moves keep the rhythm of each series, which shuffled tokens would not: smooth series
        correlate by chance.

        A text window of W tokens spreads a word over the W tokens after it, which looks as if thought led by up to
        W/2. Take text readings of a few tokens at most (`text_timeline(..., tokens=2)`) before asking this question.
        The p-values are of one concept each: of a hundred concepts without any relation five are below 0.05.

        Args:
            concepts: names; None takes those with both kinds of lens. One with a constant reading is left out.

        Raises:
            ConceptError: a name that is not among the concepts. DataError: too few tokens for one move.

        Source: Box & Jenkins 1970, Time series analysis (cross-correlation); Harris 2020, A shift test for independence
        in generic time series (moves round the end are its circular form, valid for series that do not drift); Phipson
        & Smyth 2010, Permutation p-values should never be zero.
        """
        place = {name: index for index, name in enumerate(self.concepts)}
        if unknown := [name for name in concepts or () if name not in place]:
            raise ConceptError(
                f"no concept {unknown[0]!r} among the {len(self.concepts)} of this dissonance; see .concepts"
            )
        chosen = (
            np.arange(len(self.concepts)) if concepts is None else np.array([place[name] for name in concepts], int)
        )
        values_TN = self._counted(self.values_TN)
        # Concepts may be read at some tokens only; a series needs all of them.
        chosen = chosen[~np.isnan(values_TN[:, chosen]).any(axis=0)]
        if max_lag < 0 or len(values_TN) < 4 * max_lag + 2:
            raise DataError(
                f"lags of ±{max_lag} need at least {4 * max(max_lag, 0) + 2} tokens; there are {len(values_TN)}"
            )
        activation_TN, text_TN = self._counted(self.activation_TN), self._counted(self.text_TN)
        found: list[Lag] = []
        for start in range(0, len(chosen), CONCEPTS_AT_ONCE):
            part = chosen[start : start + CONCEPTS_AT_ONCE]
            lag_n, height_n, p_n = _peaks(activation_TN[:, part], text_TN[:, part], max_lag)
            rows = zip(part.tolist(), lag_n.tolist(), height_n.tolist(), p_n.tolist(), strict=True)
            found += [Lag(self.concepts[n], lag, height, p) for n, lag, height, p in rows if height == height]
        return sorted(found, key=lambda lag: (lag.p_value, -lag.correlation))

    def summary(self, k: int = 5) -> dict[str, Any]:
        """A whole answer in a few numbers, plain data.

        Returns:
            by, num_tokens, num_concepts (with both kinds); mean_abs over both; max_abs with its concept, token and
            position; share_thought, share_written: of readings beyond ±0.2; thinks_not_writes, writes_not_thinks: k
            each.
        """
        values_TN = self.values_TN
        known_TN = ~np.isnan(values_TN) & self.counted[:, None]
        head = {"by": self.by, "num_tokens": int(self.counted.sum()), "num_concepts": int(known_TN.any(axis=0).sum())}
        if not known_TN.any():
            return {**head, "mean_abs": None, "max_abs": None, "thinks_not_writes": [], "writes_not_thinks": []}
        known = values_TN[known_TN].astype(np.float64)
        t, n = np.unravel_index(np.argmax(np.where(known_TN, np.abs(values_TN), -1)), values_TN.shape)
        peak = {"concept": self.concepts[n], "token": self.tokens[t], "position": int(t)}
        return {
            **head,
            "mean_abs": round(float(np.abs(known).mean()), 4),
            "max_abs": {"signed": round(float(values_TN[t, n]), 4), **peak},
            "share_thought": round(float((known > ALIGNED).mean()), 4),
            "share_written": round(float((known < -ALIGNED).mean()), 4),
            "thinks_not_writes": [gap.record() for gap in self.thinks_not_writes(k)],
            "writes_not_thinks": [gap.record() for gap in self.writes_not_thinks(k)],
        }

    def to_json(self, k: int = 5) -> dict[str, Any]:
        """Summary, and the k largest differences of every token; plain data."""
        tokens = [
            {
                "position": position,
                "token": token,
                "counted": bool(self.counted[position]),
                "dissonance": [gap.record() for gap in self.at(position, k)],
            }
            for position, token in enumerate(self.tokens)
        ]
        return {"summary": self.summary(k), "tokens": tokens}

    def _counted(self, values_TN: np.ndarray) -> np.ndarray:
        return values_TN[self.counted]

    def _mean_gaps(self, sign: int, k: int) -> list[Gap]:
        # Over tokens that have both readings, so that the difference of the means is the mean difference.
        values_TN = self._counted(self.values_TN)
        known_TN = ~np.isnan(values_TN)
        activation_N, text_N = (
            _mean(np.where(known_TN, self._counted(side_TN), np.nan)) for side_TN in (self.activation_TN, self.text_TN)
        )
        gaps = self._gaps(activation_N, text_N, sign * (activation_N - text_N), k)
        return [gap for gap in gaps if sign * gap.signed > 0]

    def _gaps(self, activation_N: np.ndarray, text_N: np.ndarray, order_N: np.ndarray, k: int | None) -> list[Gap]:
        """Concepts with both readings, the largest of `order_N` first."""
        num = int((~np.isnan(order_N)).sum())
        best = np.argsort(-np.nan_to_num(order_N, nan=-np.inf), kind="stable")[
            : num if k is None else min(max(k, 0), num)
        ]
        signed_N = activation_N - text_N
        return [Gap(self.concepts[n], float(activation_N[n]), float(text_N[n]), float(signed_N[n])) for n in best]


def dissonance(activation: Timeline, text: Timeline, *, by: str | None = None) -> Dissonance:
    """Two timelines of the same tokens, the lenses' and the text lenses' (`ftw.hat.text_window.text_timeline`).

    Args:
        by: what is subtracted; None takes percentiles if both timelines have them, else probabilities.

    Raises:
        DataError: different tokens, an unknown `by`, or percentiles asked for that one side does not have.
    """
    if activation.tokens != text.tokens:
        raise DataError(
            f"activation and text readings are of different tokens ({len(activation)} and {len(text)}); read the "
            "text of the very timeline: text_timeline(timeline, bank)"
        )
    ranked = [not np.isnan(side.percentiles_TN).all() for side in (activation, text)]
    by = by or ("percentile" if all(ranked) else "probability")
    if by not in KINDS:
        raise DataError(f"no dissonance by {by!r}; choose {', '.join(KINDS)}")
    if by != "probability" and not all(ranked):
        missing = "activation" if not ranked[0] else "text"
        raise DataError(f"the {missing} lenses have no background to take a {by} from; use by='probability'")
    known = set(activation.concepts)
    concepts = [*activation.concepts, *(name for name in text.concepts if name not in known)]
    return Dissonance(
        tokens=list(activation.tokens),
        counted=activation.counted,
        concepts=concepts,
        activation_TN=_spread(activation, concepts, by),
        text_TN=_spread(text, concepts, by),
        by=by,
    )


def _spread(side: Timeline, concepts: list[str], by: str) -> np.ndarray:
    """Readings of one side in the columns of all concepts, NaN elsewhere."""
    values_TN = {
        "percentile": lambda: side.percentiles_TN,
        "probability": lambda: side.probabilities_TN,
        "surprise": lambda: side.surprise_TN / SURPRISE_LIMIT,
    }[by]()
    column = {name: index for index, name in enumerate(side.concepts)}
    place_N = np.array([column.get(name, -1) for name in concepts])
    spread_TN = np.full((len(side), len(concepts)), np.nan, dtype=np.float32)
    # A rounding above 1 or below 0 is none of the reader's business.
    spread_TN[:, place_N >= 0] = np.clip(values_TN[:, place_N[place_N >= 0]], 0, 1)
    return spread_TN


def _peaks(activation_TN: np.ndarray, text_TN: np.ndarray, max_lag: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lag, height and p-value of the highest cross-correlation within ±max_lag; height NaN for a constant series."""
    num = len(activation_TN)
    a_TN, x_TN = _standardised(activation_TN), _standardised(text_TN)
    # Correlation of a at t with x at t + shift, for every shift round the end at once.
    spectrum = np.conj(np.fft.rfft(a_TN, axis=0)) * np.fft.rfft(x_TN, axis=0)
    correlation_TN = np.fft.irfft(spectrum, n=num, axis=0) / num
    reach_K = np.arange(-max_lag, max_lag + 1)
    near_KN = correlation_TN[reach_K]
    best_N = near_KN.argmax(axis=0)
    height_N = near_KN[best_N, np.arange(near_KN.shape[1])]
    moves = np.arange(2 * max_lag + 1, num - 2 * max_lag)
    highest_MN = correlation_TN[(moves[:, None] + reach_K) % num].max(axis=1)
    # 1e-9: equal peaks that differ in rounding count as equal.
    p_N = (1 + (highest_MN >= height_N - 1e-9).sum(axis=0)) / (1 + len(moves))
    return reach_K[best_N], height_N, p_N


def _standardised(values_TN: np.ndarray) -> np.ndarray:
    values_TN = values_TN.astype(np.float64)
    centred_TN = values_TN - values_TN.mean(axis=0)
    spread_N = np.sqrt((centred_TN**2).mean(axis=0))
    # Readings are float32: a spread below their rounding is none.
    return centred_TN / np.where(spread_N > 1e-6, spread_N, np.nan)


def _trailing(values_TN: np.ndarray, tokens: int) -> np.ndarray:
    """Sum over the last `tokens` rows up to each, float64."""
    total_TN = np.cumsum(values_TN, axis=0, dtype=np.float64)
    total_TN[tokens:] -= total_TN[:-tokens].copy()
    return total_TN


def _mean(values_TN: np.ndarray) -> np.ndarray:
    """Mean over tokens of the values there are; NaN where there is none (np.nanmean would warn)."""
    there_TN = ~np.isnan(values_TN)
    num_N = there_TN.sum(axis=0)
    total_N = np.where(there_TN, values_TN, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(num_N > 0, total_N / np.maximum(num_N, 1), np.nan)
