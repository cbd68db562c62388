"""What was read while a text was written: every concept at every token, with what is needed to say where it came from.

The monitor yields one `TokenReading` a token; a `Timeline` holds the whole generation (or one given text). It answers
which concepts stood out, saves itself as JSON or Parquet, and draws itself. It needs neither a model nor a lens.

Axes: T tokens, N concepts, K kept.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ftw.errors import DataError, FTWError
from ftw.hat import timeline_file
from ftw.hat.floor import CHANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 0.99  # tokens of a concept are counted where 99 % of background tokens read lower
SURPRISE_LIMIT = 3.0  # three nines: background quantiles resolve no further
ORDERS = ("percentile", "probability", "logit")


class Reading(NamedTuple):
    """One concept at one token (or the mean over several): logit, probability σ(logit), percentile in [0, 1]."""

    concept: str
    logit: float
    probability: float
    percentile: float


class Gap(NamedTuple):
    """One concept, thought and written: its activation and text reading in [0, 1], and activation − text."""

    concept: str
    activation: float
    text: float
    signed: float

    def record(self) -> dict[str, Any]:
        """The same as plain data for JSON, with the size of the difference beside its sign."""
        numbers = {"activation": self.activation, "text": self.text, "divergence": abs(self.signed)}
        numbers |= {"signed": self.signed}
        return {"concept": self.concept, **{name: round(value, 4) for name, value in numbers.items()}}


class Alarm(NamedTuple):
    """A watched concept, or one below it, above the alarm percentile."""

    watched: str
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class TokenReading:
    """What the lenses said at one token.

    Attributes:
        position: index of the token in the sequence; 0 is the sink.
        token: decoded piece, with its leading space.
        top: the strongest concepts, strongest first.
        watch: the concepts on the watch list, in its order.
        ms: milliseconds from the token before to this one; None where nobody measured. lens_ms: of all lenses.
        text: the concepts written the most, by the text lenses; None where they were not asked.
        dissonance: the largest differences between thought and written; None as above.
        alarms: watched concepts, and those below them, above the alarm percentile.
        is_missing: the lenses could not read this token's state.
        lead: the strongest concept, if it stands out; what a token is coloured by.
    """

    position: int
    token: str
    token_id: int
    is_prompt: bool = False
    is_special: bool = False
    top: Sequence[Reading] = ()
    watch: Sequence[Reading] = ()
    ms: float | None = None
    lens_ms: float | None = None
    text: Sequence[Reading] | None = None
    dissonance: Sequence[Gap] | None = None
    alarms: Sequence[Alarm] = ()
    is_missing: bool = False
    lead: str | None = None

    def record(self) -> dict[str, Any]:
        """The same as plain data for JSON, numbers rounded; what was not asked for is left out."""
        record: dict[str, Any] = {
            "position": self.position,
            "token": self.token,
            "token_id": self.token_id,
            "is_prompt": self.is_prompt,
            "is_special": self.is_special,
            "top": [_record(reading) for reading in self.top],
            "watch": [_record(reading) for reading in self.watch],
            "ms": None if self.ms is None else round(self.ms, 3),
        }
        if self.lens_ms is not None:
            record["lens_ms"] = round(self.lens_ms, 3)
        if self.text is not None:
            record["text"] = [_record(reading) for reading in self.text]
        if self.dissonance is not None:
            record["dissonance"] = [gap.record() for gap in self.dissonance]
        if self.lead is not None:
            record["lead"] = self.lead
        if self.alarms:
            record["alarms"] = [{"watched": alarm.watched, **_record(alarm.reading)} for alarm in self.alarms]
        return record | ({"is_missing": True} if self.is_missing else {})


@dataclass(kw_only=True, eq=False)
class Timeline:
    """Readings of N concepts at T tokens of one text.

    Attributes:
        tokens: T decoded pieces. token_ids: their T ids.
        is_prompt: bool [T], the token was given, not generated.
        is_special: bool [T], the token belongs to the chat template or the tokenizer; never coloured, never counted.
        concepts: N names.
        logits_TN: calibrated logits, float32; NaN where a concept was not read.
        percentiles_TN: share of background tokens that read lower, in [0, 1], float32; NaN as above.
        rank_TN: heights of the logits above the background; breaks ties between percentiles. None: logits do.
        floor: rank from which a concept stands out among all N (`ftw.hat.floor`); None where it is not known.
        ms_per_token: milliseconds each token took; None where nobody measured.
        prompt, text: what was asked (or ""), what was generated (or read).
        meta: substrate, fingerprint, pack, layers, seed, generation options, versions; plain data.

    Raises:
        DataError: no token, no concept, arrays of unequal length, an infinite logit, a percentile outside [0, 1].
    """

    tokens: list[str]
    token_ids: np.ndarray
    is_prompt: np.ndarray
    is_special: np.ndarray
    concepts: list[str]
    logits_TN: np.ndarray
    percentiles_TN: np.ndarray
    rank_TN: np.ndarray | None = None
    floor: float | None = None
    ms_per_token: np.ndarray | None = None
    prompt: str = ""
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise DataError("a timeline needs at least one token; nothing was generated or read")
        if not self.concepts:
            raise DataError("a timeline needs at least one concept; is the lens pack empty?")
        num_tokens, shape = len(self.tokens), (len(self.tokens), len(self.concepts))
        self.token_ids = _shaped("token_ids", self.token_ids, np.int64, (num_tokens,))
        self.is_prompt = _shaped("is_prompt", self.is_prompt, np.bool_, (num_tokens,))
        self.is_special = _shaped("is_special", self.is_special, np.bool_, (num_tokens,))
        self.logits_TN = _shaped("logits_TN", self.logits_TN, np.float32, shape)
        self.percentiles_TN = _shaped("percentiles_TN", self.percentiles_TN, np.float32, shape)
        if self.rank_TN is not None:
            self.rank_TN = _shaped("rank_TN", self.rank_TN, np.float32, shape)
        if self.ms_per_token is not None:
            self.ms_per_token = _shaped("ms_per_token", self.ms_per_token, np.float32, (num_tokens,))
        for name, bad_TN in (
            ("an infinite logit", np.isinf(self.logits_TN)),
            ("a percentile outside [0, 1]", (self.percentiles_TN < 0) | (self.percentiles_TN > 1)),
        ):
            if bad_TN.any():
                position, concept = np.argwhere(bad_TN)[0]
                raise DataError(f"{name} for {self.concepts[concept]!r} at token {position}; the lens pack is damaged")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def positions(self) -> np.ndarray:
        """Index of every token, int [T]."""
        return np.arange(len(self))

    @property
    def probabilities_TN(self) -> np.ndarray:
        """σ(logit), float32; NaN where a concept was not read."""
        return sigmoid(self.logits_TN)

    @property
    def surprise_TN(self) -> np.ndarray:
        """-log10(1 - percentile): 1 at 90 %, 2 at 99 %, at most 3; what pictures show, since all news is near 100 %."""
        return -np.log10(np.maximum(1.0 - self.percentiles_TN, 10.0**-SURPRISE_LIMIT))

    @property
    def counted(self) -> np.ndarray:
        """Tokens that figures are made of, bool [T]: the generated ones (all, if none was), without special tokens."""
        content = ~self.is_special & ~np.isnan(self.logits_TN).all(axis=1)
        answer = content & ~self.is_prompt
        return answer if answer.any() else content

    def top(self, k: int, *, position: int | None = None, by: str = "percentile") -> list[Reading]:
        """The k strongest concepts at one token, or by their means over the answer.

        Args:
            position: token index, negative from the end. None: means over the `counted` tokens.
            by: "percentile" (against background text; ties go to the higher z-score), "probability" or "logit".

        Raises:
            DataError: no such position or order.
        """
        rows = self.counted if position is None else [self._position(position)]
        logits_TN = self.logits_TN[rows]
        logits_N, probabilities_N = _mean(logits_TN), _mean(sigmoid(logits_TN))
        percentiles_N = _mean(self.percentiles_TN[rows])
        orders = {"percentile": percentiles_N, "probability": probabilities_N, "logit": logits_N}
        if by not in orders:
            raise DataError(f"cannot order concepts by {by!r}; choose {', '.join(ORDERS)}")
        ties_N = logits_N if self.rank_TN is None else _mean(self.rank_TN[rows])
        order = np.lexsort((-ties_N, -orders[by]))
        kept = [index for index in order if not np.isnan(orders[by][index])][: max(k, 0)]
        return [
            Reading(self.concepts[n], float(logits_N[n]), float(probabilities_N[n]), float(percentiles_N[n]))
            for n in kept
        ]

    def strongest(self) -> np.ndarray:
        """Index of the concept that stands out at every token, int [T]; -1 where none does, and on special tokens.

        Without a `floor` it is the percentile that `CHANCE` lenses of all N are expected to reach: where that is more
        than the background resolves, only readings above all of it stand out.
        """
        rank_TN = np.nan_to_num(self.logits_TN if self.rank_TN is None else self.rank_TN, nan=-1e30)
        if self.rank_TN is not None and self.floor is not None:
            is_out_T = rank_TN.max(axis=1) >= self.floor
        else:
            percentiles_TN = np.nan_to_num(self.percentiles_TN, nan=-1.0)
            best_T1 = percentiles_TN.max(axis=1, keepdims=True)
            is_out_T = best_T1[:, 0] >= max(FLOOR, 1 - CHANCE / len(self.concepts))
            rank_TN = np.where(percentiles_TN == best_T1, rank_TN, -np.inf)
        return np.where(is_out_T & ~self.is_special, rank_TN.argmax(axis=1), -1)

    def concept_means(self, by: str = "percentile") -> np.ndarray:
        """Mean of every concept over the `counted` tokens, float [N]; NaN for a concept never read."""
        values = {
            "percentile": self.percentiles_TN,
            "probability": self.probabilities_TN,
            "logit": self.logits_TN,
            "surprise": self.surprise_TN,
        }
        if by not in values:
            raise DataError(f"no means of {by!r}; choose {', '.join(values)}")
        return _mean(values[by][self.counted])

    def leading(self, k: int) -> np.ndarray:
        """Indices of the k concepts with the largest mean surprise, largest first; short peaks count too."""
        means_N = self.concept_means("surprise")
        num_read = int((~np.isnan(means_N)).sum())
        return np.argsort(-np.nan_to_num(means_N, nan=-1.0), kind="stable")[: min(max(k, 0), num_read)]

    def by_peak(self, rows: np.ndarray) -> np.ndarray:
        """The same concept indices, in the order of their centres of gravity over the `counted` tokens."""
        weight_TN = np.nan_to_num(self.surprise_TN[self.counted][:, rows]) ** 2  # squared: peaks, not plateaus
        places_T1 = np.arange(len(weight_TN))[:, None]
        centre_N = (weight_TN * places_T1).sum(axis=0) / np.maximum(weight_TN.sum(axis=0), 1e-9)
        return rows[np.argsort(centre_N, kind="stable")]

    def readings(self, k: int = 5, *, watch: Sequence[str] = ()) -> Iterator[TokenReading]:
        """The tokens one by one, as the monitor gives them live."""
        column = {name: index for index, name in enumerate(self.concepts)}
        if unknown := [name for name in watch if name not in column]:
            raise DataError(f"this timeline has no concept {unknown[0]!r}; it has {len(self.concepts)}, see .concepts")
        probabilities_TN, strongest_T = self.probabilities_TN, self.strongest()
        for t, token in enumerate(self.tokens):
            values = (self.logits_TN[t], probabilities_TN[t], self.percentiles_TN[t])
            yield TokenReading(
                position=t,
                token=token,
                token_id=int(self.token_ids[t]),
                is_prompt=bool(self.is_prompt[t]),
                is_special=bool(self.is_special[t]),
                top=self.top(k, position=t),
                watch=[Reading(name, *(float(row[column[name]]) for row in values)) for name in watch],
                ms=None if self.ms_per_token is None else float(self.ms_per_token[t]),
                lead=None if strongest_T[t] < 0 else self.concepts[strongest_T[t]],
            )

    def table(self) -> list[dict[str, Any]]:
        """One row for every reading there is: position, token, flags, concept, logit, probability, percentile."""
        probabilities_TN = self.probabilities_TN
        return [
            {
                "position": int(t),
                "token": self.tokens[t],
                "is_prompt": bool(self.is_prompt[t]),
                "is_special": bool(self.is_special[t]),
                "concept": self.concepts[n],
                "logit": float(self.logits_TN[t, n]),
                "probability": float(probabilities_TN[t, n]),
                "percentile": float(self.percentiles_TN[t, n]),
            }
            for t, n in np.argwhere(~np.isnan(self.logits_TN))
        ]

    def save(self, path: str | Path) -> Path:
        """Write `.json` (whole, numbers rounded to 4 decimals) or `.parquet` (a row per token and concept).

        Raises:
            DataError: another suffix. FTWError: Parquet without pyarrow. DiskFullError: no room; the old file stays.
        """
        ms = self.ms_per_token
        header = {
            "meta": self.meta,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "token_ids": self.token_ids.tolist(),
            "is_prompt": self.is_prompt.tolist(),
            "is_special": self.is_special.tolist(),
            "ms_per_token": None if ms is None else [timeline_file.rounded(value) for value in ms],
            "floor": None if self.floor is None else timeline_file.rounded(self.floor),
            "concepts": list(self.concepts),
        }
        matrices = {"logit": self.logits_TN, "percentile": self.percentiles_TN, "rank": self.rank_TN}
        return timeline_file.write(Path(path), header, matrices, derived={"probability": self.probabilities_TN})

    @classmethod
    def load(cls, path: str | Path) -> "Timeline":
        """Read what `save` wrote.

        Raises:
            DataError: no such file, truncated, or not a timeline of a version that this FTW reads.
        """
        header, matrices = timeline_file.read(Path(path))
        try:
            return cls(
                tokens=[str(token) for token in header["tokens"]],
                token_ids=header["token_ids"],
                is_prompt=header["is_prompt"],
                is_special=header["is_special"],
                concepts=[str(name) for name in header["concepts"]],
                logits_TN=matrices["logit"],
                percentiles_TN=matrices["percentile"],
                rank_TN=matrices["rank"],
                ms_per_token=header["ms_per_token"],
                floor=None if header.get("floor") is None else float(header["floor"]),
                prompt=str(header["prompt"]),
                text=str(header["text"]),
                meta=dict(header["meta"]),
            )
        except KeyError as error:
            raise DataError(f"{path} lacks {error.args[0]!r}; it was written by something else") from error
        except (DataError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is a damaged timeline: {error}") from error

    def plot(self, top: int = 16, *, axes: "Axes | None" = None) -> "Figure":
        """Heat map of the leading concepts over the tokens; colour is surprise, -log10(1 - percentile).

        Args:
            axes: draw there instead of on a figure of its own.

        Raises:
            FTWError: matplotlib is not installed.
        """
        try:
            from ftw.hat.picture import Picture
        except ImportError as error:
            raise FTWError("pictures need matplotlib; install it with: pip install 'ftw-lenses[train]'") from error
        rows = self.leading(top)
        if axes is None:
            width = float(np.clip(2.5 + 0.17 * len(self), 6, 40))
            figure = Picture(figsize=(width, 1.5 + 0.24 * max(len(rows), 1)), layout="constrained")
            axes = figure.subplots()
        shown_NT = np.ma.masked_invalid(np.where(self.is_special[:, None], np.nan, self.surprise_TN)[:, rows].T)
        mesh = axes.pcolormesh(shown_NT, cmap="Blues", vmin=0, vmax=SURPRISE_LIMIT)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(self.concepts[n]) for n in rows])
        axes.set_xticks(self.positions + 0.5, [plain(token) for token in self.tokens], rotation=90, fontsize=7)
        axes.tick_params(length=0)
        if 0 < (start := int(self.is_prompt.sum())) < len(self):
            axes.axvline(start, color="black", linewidth=1)
        figure = axes.get_figure(root=True)
        assert figure is not None  # axes always have a figure
        bar = figure.colorbar(mesh, ax=axes, ticks=[0, 1, 2, 3], pad=0.01)
        bar.ax.set_yticklabels(["0 %", "90 %", "99 %", "99.9 %"])
        bar.set_label("percentile")
        return figure

    def _repr_html_(self) -> str:
        """Tokens over the colour of their strongest concept, for notebooks; everything from outside is escaped."""
        strongest_T = self.strongest()
        leading = dict.fromkeys(strongest_T[strongest_T >= 0].tolist())
        shades = {n: f"oklch(0.87 0.09 {(40 + 137.508 * order) % 360:.0f})" for order, n in enumerate(leading)}
        parts = ['<div style="white-space:pre-wrap;line-height:1.9;max-width:60em">']
        for reading in self.readings(3):
            if reading.is_special:
                continue
            words = " · ".join(f"{name} {100 * percentile:.1f} %" for name, _, _, percentile in reading.top)
            shade = shades.get(int(strongest_T[reading.position]))
            style = f"background:{shade};color:#111;border-radius:3px" if shade else "opacity:.75"
            parts.append(f'<span title="{html.escape(words)}" style="{style}">{html.escape(reading.token)}</span>')
        parts.append('</div><div style="font-size:smaller;margin-top:.6em">')
        for n, shade in list(shades.items())[:24]:
            parts.append(f'<span style="background:{shade};color:#111;border-radius:3px;padding:0 .4em">')
            parts.append(f"{html.escape(self.concepts[n])}</span> ")
        return "".join([*parts, "</div>"])

    def _position(self, position: int) -> int:
        if not -len(self) <= position < len(self):
            raise DataError(f"no token at position {position}; this timeline has 0-{len(self) - 1}")
        return position % len(self)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def plain(text: str) -> str:
    """A piece of text on one line for a picture: breaks visible, control characters and TeX dollars harmless."""
    marks = {"\n": "↵", "\t": "⇥", "$": r"\$"}
    return "".join(marks.get(mark, mark if mark.isprintable() else "·") for mark in text.strip(" ")) or "␣"


def _record(reading: Reading) -> dict[str, Any]:
    numbers = {"logit": reading.logit, "probability": reading.probability, "percentile": reading.percentile}
    return {"concept": reading.concept, **{name: timeline_file.rounded(value) for name, value in numbers.items()}}


def _mean(values_TN: np.ndarray) -> np.ndarray:
    """Mean over tokens of the readings there are; NaN where there is none (np.nanmean would warn)."""
    there_TN = ~np.isnan(values_TN)
    num_N = there_TN.sum(axis=0)
    total_N = np.where(there_TN, values_TN, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(num_N > 0, total_N / np.maximum(num_N, 1), np.nan)


def _shaped(name: str, values: Any, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is refused as such
        array = np.asarray(values, dtype=dtype)
    if array.shape != shape:
        raise DataError(f"timeline: {name} has shape {array.shape}, expected {shape}")
    return array
