"""The story of a generation, told from its timeline alone: what it was about, where it turned, what came first.

1. The timeline in windows: those that were read, or the means of its token readings.
2. Change points split the windows into segments of like concepts: least squares with a penalty for each segment, solved
   exactly.
3. Each segment has its dominant concepts; pairs of concepts have a lift (together, against chance) and a lead or lag.
4. A short text says it. The same timeline gives the same words.

Axes: W windows, N concepts, K concepts that are told of, R draws.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ftw.errors import ConfigError, DataError
from ftw.hat.timeline import Timeline

MOST_LAG = 5  # windows
DRAWS = 500
SEED = 0
ENOUGH = 0.5  # correlation from which one concept is said to lead another
LIKELY = 0.05


@dataclass(kw_only=True)
class NarrativeConfig:
    """How a story is told.

    Attributes:
        window, stride: in tokens, for a timeline that was not read in windows.
        threshold: value in [0, 1] from which a concept is active in a window.
        top: concepts told of, those with the highest mean over the quarter of the windows where they are strongest.
        dominant: concepts named for a segment.
        penalty: how much a further segment has to explain; larger gives fewer.
    """

    window: int = 20
    stride: int = 5
    threshold: float = 0.5
    top: int = 12
    dominant: int = 3
    penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowSeries:
    """Every concept in every window of a timeline.

    Attributes:
        starts, ends: W token positions, the end not included. words: W texts of the windows.
        concepts: N names. values_WN: in [0, 1]; NaN where a window could not be read.
        by: what the values are: "probability" or "percentile". overlap: windows that a token stands in.
    """

    starts: np.ndarray
    ends: np.ndarray
    words: list[str]
    concepts: list[str]
    values_WN: np.ndarray
    by: str
    overlap: int

    def leading(self, k: int) -> np.ndarray:
        """The k concepts that a part of the story is about, strongest first, among those that were read at all.

        By the mean over the quarter of its windows where a concept is strongest: what an answer begins with counts,
        however much follows.
        """
        known_N = ~np.isnan(self.values_WN).all(axis=0)
        quarter = -(-len(self.values_WN) // 4)
        strongest_QN = np.sort(np.nan_to_num(self.values_WN, nan=-1.0), axis=0)[len(self.values_WN) - quarter :]
        means_N = np.where(known_N, _mean(np.where(strongest_QN < 0, np.nan, strongest_QN)), -1.0)
        return np.argsort(-means_N, kind="stable")[: min(k, int(known_N.sum()))]

    def in_turn(self, rows: np.ndarray) -> np.ndarray:
        """The same concept indices, in the order of their centres of gravity."""
        weights_WK = np.nan_to_num(self.values_WN[:, rows]) ** 2  # squared: peaks, not plateaus
        centres_K = np.arange(len(weights_WK)) @ weights_WK / weights_WK.sum(axis=0).clip(1e-9)
        return rows[np.argsort(centres_K, kind="stable")]

    def records(self, threshold: float) -> list[dict[str, Any]]:
        """One object a window: its position and the concepts above the threshold, strongest first."""
        records = []
        for at, (start, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist(), strict=True)):
            strong = [n for n in np.argsort(-np.nan_to_num(self.values_WN[at]), kind="stable")
                      if self.values_WN[at, n] >= threshold]  # fmt: skip
            concepts = {self.concepts[n]: round(float(self.values_WN[at, n]), 4) for n in strong}
            records.append({"window_position": start, "window_end": end, "text": self.words[at], "concepts": concepts})
        return records


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive windows that are about the same: token positions, and the dominant concepts with their means."""

    start: int
    end: int
    first_window: int
    last_window: int
    concepts: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Lead:
    """One concept's course follows another's after so many tokens; p: share of shifted courses that follow as well."""

    first: str
    second: str
    tokens: int
    correlation: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Together:
    """Two concepts active in the same windows: how many times as often as chance, with its 95 % interval."""

    first: str
    second: str
    lift: float
    low: float
    high: float
    num_windows: int


@dataclass(frozen=True, kw_only=True)
class Narrative:
    """What a timeline tells.

    Attributes:
        segments: in order. leads: strongest first. together: highest lift first, only those above chance.
        text: the story in a few sentences. num_missing: windows that could not be read.
    """

    segments: list[Segment]
    leads: list[Lead]
    together: list[Together]
    text: str
    num_missing: int = 0
    by: str = "probability"
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return asdict(self)


def window_series(timeline: Timeline, config: NarrativeConfig | None = None) -> WindowSeries:
    """The windows of a timeline: those it was read in, else means over windows of its counted tokens.

    Raises:
        DataError: nothing in it was read.
    """
    config = config or NarrativeConfig()
    is_answer = bool((~timeline.is_prompt).any())
    content = np.flatnonzero(~timeline.is_special & (~timeline.is_prompt | (not is_answer)))
    if not len(content):
        raise DataError("this timeline has no tokens but special ones; there is nothing to tell")
    first = int(content[0])
    if "window" in timeline.meta:
        return _read_windows(timeline, first, int(content[-1]) + 1)
    if config.window < 1 or not 1 <= config.stride <= config.window:
        raise ConfigError(f"window={config.window}, stride={config.stride}: choose 1 <= stride <= window")
    by = "probability" if np.isnan(timeline.percentiles_TN).all() else "percentile"
    values_TN = timeline.probabilities_TN if by == "probability" else timeline.percentiles_TN
    last = int(content[-1]) + 1
    ends = [*range(first + config.stride, last, config.stride), last]
    starts = [max(first, end - config.window) for end in ends]
    usable_TN = np.where(timeline.is_special[:, None], np.nan, values_TN)
    values = [_mean(usable_TN[start:end]) for start, end in zip(starts, ends, strict=True)]
    return _series(timeline, starts, ends, np.stack(values), by, -(-config.window // config.stride))


def _read_windows(timeline: Timeline, first: int, length: int) -> WindowSeries:
    size, stride = (int(timeline.meta.get(name, 0)) for name in ("window", "stride"))
    if not 1 <= stride <= size:
        raise DataError(f"this timeline says window={size}, stride={stride}, which cannot be; read the text again")
    ends = [*range(first + stride, length, stride), length]
    if np.isnan(timeline.logits_TN[[end - 1 for end in ends]]).all():
        raise DataError("none of this timeline's windows could be read; are the lenses those of its substrate?")
    starts = [max(first, end - size) for end in ends]
    values_WN = timeline.probabilities_TN[[end - 1 for end in ends]]
    return _series(timeline, starts, ends, values_WN, "probability", -(-size // stride))


def _series(
    timeline: Timeline, starts: Sequence[int], ends: Sequence[int], values_WN: np.ndarray, by: str, overlap: int
) -> WindowSeries:
    words = ["".join(timeline.tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return WindowSeries(
        starts=np.array(starts),
        ends=np.array(ends),
        words=words,
        concepts=list(timeline.concepts),
        values_WN=values_WN,
        by=by,
        overlap=overlap,
    )


def narrate(timeline: Timeline, config: NarrativeConfig | None = None) -> Narrative:
    """Tell the story of a timeline.

    Raises:
        DataError: nothing in it was read. ConfigError: an option out of its range.
    """
    config = config or NarrativeConfig()
    if not 0 < config.threshold < 1 or config.top < 1 or config.dominant < 1 or config.penalty < 0:
        raise ConfigError(
            f"threshold={config.threshold} must lie between 0 and 1, top={config.top} and dominant={config.dominant} "
            f"be at least 1, penalty={config.penalty} not negative"
        )
    series = window_series(timeline, config)
    read_W = ~np.isnan(series.values_WN).all(axis=1)
    kept = np.flatnonzero(read_W)
    if not len(kept):
        raise DataError("no window of this timeline could be read; there is no story in it")
    leading_K = series.leading(config.top)
    values_WK = np.nan_to_num(series.values_WN[kept][:, leading_K])
    names = [series.concepts[n] for n in leading_K]
    cuts = change_points(values_WK, penalty=config.penalty * series.overlap)
    segments = _segments(series, kept, values_WK, names, cuts, config)
    stride = int(np.median(np.diff(series.ends))) if len(series.ends) > 1 else 1
    leads = _leads(values_WK, names, stride)
    together = _together(values_WK >= config.threshold, names, series.overlap)
    missing = int((~read_W).sum())
    text = _story(segments, leads, together, missing)
    return Narrative(segments=segments, leads=leads, together=together, text=text, num_missing=missing, by=series.by)


def change_points(values_WK: np.ndarray, *, penalty: float = 1.0) -> list[int]:
    """First windows of all segments but the first: where the concepts change for good.

    The split with the least sum of squares around the segments' means, plus a price for each further segment: `penalty`
    x noise x ln W for each concept, the noise taken from differences of neighbours. Exact, by dynamic programming.

    Source: Jackson et al. 2005, An algorithm for optimal partitioning of data on an interval; Yao 1988, Estimating the
    number of change-points via Schwarz' criterion.
    """
    num = len(values_WK)
    if num < 3:
        return []
    steps = np.diff(values_WK, axis=0)
    noise = float((steps**2).mean(axis=0).sum() / 2)
    # What hardly moves at all has no change worth telling.
    price = penalty * max(noise, 1e-3 * values_WK.shape[1]) * np.log(num)
    sums = np.concatenate([np.zeros((1, values_WK.shape[1])), np.cumsum(values_WK, axis=0)])
    squares = np.concatenate([[0.0], np.cumsum((values_WK**2).sum(axis=1))])
    best, before = np.zeros(num + 1), np.zeros(num + 1, dtype=np.int64)
    best[0] = -price
    for end in range(1, num + 1):
        starts = np.arange(end)
        inside = squares[end] - squares[starts] - ((sums[end] - sums[starts]) ** 2).sum(axis=1) / (end - starts)
        total = best[starts] + inside + price
        before[end] = int(total.argmin())
        best[end] = total[before[end]]
    cuts, place = [], num
    while (place := int(before[place])) > 0:
        cuts.append(place)
    return cuts[::-1]


def _segments(
    series: WindowSeries,
    kept: np.ndarray,
    values_WK: np.ndarray,
    names: list[str],
    cuts: list[int],
    config: NarrativeConfig,
) -> list[Segment]:
    segments = []
    for first, stop in itertools.pairwise([0, *cuts, len(kept)]):
        mean_K = values_WK[first:stop].mean(axis=0)
        strong = [k for k in np.argsort(-mean_K, kind="stable") if mean_K[k] >= config.threshold][: config.dominant]
        begin = int(series.starts[kept[0]]) if first == 0 else int(series.ends[kept[first - 1]])
        segments.append(
            Segment(
                start=begin,
                end=int(series.ends[kept[stop - 1]]),
                first_window=int(kept[first]),
                last_window=int(kept[stop - 1]),
                concepts={names[k]: round(float(mean_K[k]), 4) for k in strong},
            )
        )
    return segments


def _leads(values_WK: np.ndarray, names: list[str], stride: int) -> list[Lead]:
    """Pairs whose courses fit best with one of them later, against all circular shifts of the other."""
    num = len(values_WK)
    if num < 3 * MOST_LAG:
        return []
    spread_K = values_WK.std(axis=0)
    scaled_WK = (values_WK - values_WK.mean(axis=0)) / np.maximum(spread_K, 1e-9)
    found = []
    for a, b in itertools.combinations(np.flatnonzero(spread_K > 0.05).tolist(), 2):
        turns = np.array([(scaled_WK[:, a] * np.roll(scaled_WK[:, b], -lag)).mean() for lag in range(num)])
        near = [*range(MOST_LAG + 1), *range(num - MOST_LAG, num)]
        best = max(near, key=lambda lag: turns[lag])
        lag = best if best <= MOST_LAG else best - num
        far = np.delete(turns, near)
        p = float((1 + (far >= turns[best]).sum()) / (1 + len(far)))
        if lag and turns[best] >= ENOUGH and p <= LIKELY:
            first, second = (a, b) if lag > 0 else (b, a)
            correlation = round(float(turns[best]), 4)
            found.append(
                Lead(first=names[first], second=names[second], tokens=abs(lag) * stride, correlation=correlation, p=p)
            )
    return sorted(found, key=lambda lead: -lead.correlation)


def _together(active_WK: np.ndarray, names: list[str], overlap: int) -> list[Together]:
    """Pairs that are active together more often than chance: lift with an interval from resampled blocks of windows."""
    num = len(active_WK)
    if num < 4:
        return []
    rng = np.random.default_rng(SEED)
    block = min(overlap, num)
    starts_RB = rng.integers(0, num, size=(DRAWS, -(-num // block)))
    drawn_RW = ((starts_RB[..., None] + np.arange(block)) % num).reshape(DRAWS, -1)[:, :num]
    found = []
    for a, b in itertools.combinations(range(len(names)), 2):
        both = active_WK[:, a] & active_WK[:, b]
        if both.sum() < 2 or active_WK[:, a].all() or active_WK[:, b].all():
            continue
        share = [column[drawn_RW].mean(axis=1) for column in (active_WK[:, a], active_WK[:, b], both)]
        chance = share[0] * share[1]
        lifts = np.divide(share[2], chance, out=np.ones(DRAWS), where=chance > 0)
        low, high = (float(edge) for edge in np.quantile(lifts, (0.025, 0.975)))
        lift = float(both.mean() / (active_WK[:, a].mean() * active_WK[:, b].mean()))
        if low > 1:
            found.append(
                Together(
                    first=names[a],
                    second=names[b],
                    lift=round(lift, 4),
                    low=round(low, 4),
                    high=round(high, 4),
                    num_windows=int(both.sum()),
                )
            )
    return sorted(found, key=lambda pair: -pair.low)


def _story(segments: list[Segment], leads: list[Lead], together: list[Together], missing: int) -> str:
    """A few sentences, from the numbers alone."""
    words = []
    told: set[str] = set()
    for place, segment in enumerate(segments):
        names = list(segment.concepts)
        if place and set(names) == told:
            continue
        fresh = [name for name in names if name not in told] or names
        if not names:
            words.append("about nothing that was asked for" if not place else f"to nothing at token {segment.start}")
        else:
            words.append(f"with {_listed(names)}" if not place else f"to {_listed(fresh)} at token {segment.start}")
        told = set(names)
    text = f"Began {words[0]}" + "".join(f", turned {turn}" for turn in words[1:]) + "."
    if leads:
        lead = leads[0]
        text += f" {lead.first} came {lead.tokens} tokens before {lead.second} (correlation {lead.correlation:.2f})."
    if together:
        pair = together[0]
        text += (
            f" {pair.first} and {pair.second} came together {pair.lift:.1f} times as often as chance "
            f"({pair.low:.1f} to {pair.high:.1f})."
        )
    return text + (f" {missing} windows could not be read." if missing else "")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there; NaN where there is nothing."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)
