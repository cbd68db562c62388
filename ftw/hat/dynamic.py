"""Lenses behind an aperture: tick by tick, what is read of one stream of states and words.

`LiveLenses` puts three parts together: a holder of activation lenses (a shelf that loads them, or a bank that has them
all), a window of written words for the text lenses, and the aperture that decides what is read. A branch opens when
either kind passes. A state that is not finite, or a lens that cannot be loaded, makes a reading missing: it is counted,
and the generation goes on.

Axes: N concepts, K kinds (activation, text), B states, L layers, D model width, M rows asked for.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, SubstrateError
from ftw.hat.aperture import Aperture, Decision
from ftw.hat.holder import Holder
from ftw.hat.lens import find_rows
from ftw.hat.lineage import Lineage
from ftw.hat.percentile import interpolate
from ftw.hat.text_embedding import AnyText
from ftw.hat.text_window import open_window
from ftw.hat.timeline import sigmoid

ACTIVATION, TEXT = "activation", "text"
ORDERS = ("probability", "percentile")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tick:
    """What one tick read.

    Attributes:
        kinds: K kinds, in the order of the axis. logits_KN: float32; NaN where not read. decision: of the aperture.
        missing: kinds that were asked for and could not be read.
        ms: milliseconds by part: `initial_detection`, `child_loading`, `cache_management`, `total`.
    """

    kinds: tuple[str, ...]
    logits_KN: np.ndarray
    decision: Decision
    missing: tuple[str, ...] = ()
    ms: dict[str, float] = field(default_factory=dict)

    def shown(self, kind: str) -> np.ndarray:
        """Rows that are shown of a kind, strongest first; none if it was not read."""
        return self.decision.visible[self.kinds.index(kind)] if kind in self.kinds else np.array([], dtype=np.int64)

    def logits(self, kind: str) -> np.ndarray:
        """Logits of a kind, [N]; NaN where not read."""
        if kind in self.kinds:
            return self.logits_KN[self.kinds.index(kind)]
        return np.full(self.logits_KN.shape[1], np.nan, dtype=np.float32)


class LiveLenses:
    """Activation and text lenses of one stream, behind one aperture.

    Args:
        aperture: over concepts among which every name of the holder and of the text bank is.
        activation, text: either may be None, not both.
        by: what thresholds and order are about: "probability" (calibrated for whole texts) or "percentile" (against
            background tokens).
        window_tokens: pieces that the text lenses read together; 1 reads each piece alone.

    Raises:
        ConfigError: no lenses, an unknown `by`, percentiles without background.
    """

    def __init__(
        self,
        aperture: Aperture,
        *,
        activation: Holder | None,
        text: AnyText | None,
        by: str = "probability",
        window_tokens: int = 32,
    ) -> None:
        if activation is None and text is None:
            raise ConfigError("no lenses to read with: use activation lenses, text lenses or both")
        if by not in ORDERS:
            raise ConfigError(f"by={by!r}: order readings by {' or '.join(ORDERS)}")
        backgrounds = {
            ACTIVATION: activation is None or activation.calibrated,
            TEXT: text is None or text.quantiles_NQ is not None,
        }
        if by == "percentile" and (without := [kind for kind, has in backgrounds.items() if not has]):
            raise ConfigError(
                f"by='percentile': the {without[0]} lenses of this pack have no background; use by='probability'"
            )
        self.aperture, self.lineage = aperture, aperture.lineage
        self.activation, self.text, self._by = activation, text, by
        self.window = None if text is None else open_window(text, tokens=window_tokens)
        self._place_N = {
            ACTIVATION: _places(self.lineage, () if activation is None else activation.names),
            TEXT: _places(self.lineage, () if text is None else text.names),
        }
        self.counts: Counter[str] = Counter()
        self.last_error = ""

    def open(self, row: int) -> np.ndarray:
        """Read a concept's children on request; returns rows that are read from now on."""
        fresh = self.aperture.open(row)
        self._prefetch(fresh)
        return fresh

    def close(self, row: int) -> np.ndarray:
        """Close a concept on request; returns rows that are read no more."""
        gone = self.aperture.close(row)
        self._drop(gone)
        return gone

    def reset(self) -> None:
        """Back to the base: every parent closed, the window of words empty."""
        self._drop(np.flatnonzero(self.aperture.scored_N & ~self.aperture.base_N))
        self.aperture.reset()
        if self.window is not None:
            self.window.clear()

    def read(self, state: Tensor | None = None, token_text: str | None = None) -> Tick:
        """One tick over a state, a piece of text, or both.

        Args:
            state: [1, L, D], or [1, D] where the lenses read one layer.

        Raises:
            SubstrateError: a state of another shape or dtype. ConfigError: a kind that there are no lenses for.
        """
        states_BLD = None if state is None else self._checked(state)
        return self._tick(states_BLD, token_text)

    def read_all(self, states_BLD: Tensor) -> Tick:
        """One tick over several states, each lens at its strongest: opens what a whole prompt calls for."""
        return self._tick(self._checked(states_BLD, many=True), None)

    def percentiles(self, kind: str, logits_M: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Share of background that each logit exceeds, [M]; NaN without background."""
        result_M = np.full(len(rows), np.nan)
        place_M = self._place_N[kind][rows]
        there_M = (place_M >= 0) & ~np.isnan(logits_M)
        if kind == ACTIVATION and self.activation is not None:
            result_M[there_M] = self.activation.percentile(logits_M[there_M], place_M[there_M])
        elif self.text is not None:
            result_M[there_M] = text_percentiles(self.text, logits_M[there_M], place_M[there_M])
        return result_M

    def _tick(self, states_BLD: Tensor | None, token_text: str | None) -> Tick:
        clock, failed = _Clock(), set[str]()
        kinds = self._begin(states_BLD, token_text, failed)
        logits_KN = np.full((len(kinds), len(self.lineage)), np.nan, dtype=np.float32)

        def score(rows: np.ndarray) -> np.ndarray:
            values_KM = np.empty((len(kinds), len(rows)))
            for k, kind in enumerate(kinds):
                logits_KN[k, rows] = logits_M = self._logits(kind, rows, failed)
                percentile = self._by == "percentile"
                values_KM[k] = self.percentiles(kind, logits_M, rows) if percentile else sigmoid(logits_M)
            clock.lap("child_loading" if "initial_detection" in clock.ms else "initial_detection")
            return values_KM

        decision = self.aperture.step(score, self._drop)
        logits_KN[:, ~self.aperture.scored_N] = np.nan
        self._prefetch(decision.likely)
        clock.lap("cache_management")
        self._count(decision, failed)
        missing = tuple(kind for kind in kinds if kind in failed)
        return Tick(kinds=kinds, logits_KN=logits_KN, decision=decision, missing=missing, ms=clock.done())

    def _begin(self, states_BLD: Tensor | None, token_text: str | None, failed: set[str]) -> tuple[str, ...]:
        """Hand the input to those who read it; returns the kinds of this tick."""
        kinds = []
        if states_BLD is not None:
            if self.activation is None:
                raise ConfigError("a hidden state for text lenses only; use activation lenses too, or give token_text")
            kinds.append(ACTIVATION)
            if bool(states_BLD.isfinite().all()):
                self._survive(ACTIVATION, lambda holder=self.activation: holder.begin(states_BLD), failed)
            else:
                failed.add(ACTIVATION)
        if token_text is not None:
            if self.window is None or self.text is None:
                raise ConfigError("token_text for activation lenses only; use text lenses too, or give hidden_state")
            kinds.append(TEXT)
            if self.window.tokens == 1:
                self.window.clear()  # a bare piece does not go on with the one before
            self.window.push(token_text)
            self._text_logits_N = self.window.logits().numpy()
            self.counts["texts_without_known_words"] += not self.window.has_words
        if not kinds:
            raise ConfigError("nothing to read: give a hidden_state, a token_text or both")
        return tuple(kinds)

    def _logits(self, kind: str, rows: np.ndarray, failed: set[str]) -> np.ndarray:
        """Logits of some concepts, float32 [M]; of several states the highest; NaN where there is none."""
        place_M = self._place_N[kind][rows]
        result_M, there_M = np.full(len(rows), np.nan, dtype=np.float32), place_M >= 0
        if kind == TEXT:
            result_M[there_M] = self._text_logits_N[place_M[there_M]]
        elif kind not in failed and self.activation is not None:
            holder, found = self.activation, list[np.ndarray]()
            self._survive(kind, lambda: found.append(holder.logits(place_M[there_M])), failed)
            if found:
                result_M[there_M] = np.fmax.reduce(found[0], axis=0)
            self.counts["missing_lenses"] += int(np.isnan(result_M[there_M]).sum()) if found else 0
        # An overflow is no reading.
        return np.where(np.isfinite(result_M), result_M, np.nan)

    def _survive(self, kind: str, act: Callable[[], object], failed: set[str]) -> None:
        """Act; whatever a lens or a disk does wrong makes readings missing and is counted."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 (a generation must not die because a lens does)
            failed.add(kind)
            self.last_error = f"{type(error).__name__}: {error}"
            self.counts["errors"] += 1

    def _drop(self, rows: np.ndarray) -> None:
        self._tell_holder(rows, lambda holder, places: holder.drop(places))

    def _prefetch(self, rows: np.ndarray) -> None:
        self._tell_holder(rows, lambda holder, places: holder.prefetch(places))

    def _tell_holder(self, rows: np.ndarray, tell: Callable[[Holder, np.ndarray], None]) -> None:
        places = self._place_N[ACTIVATION][rows]
        if self.activation is not None and (places >= 0).any():
            holder = self.activation
            self._survive(ACTIVATION, lambda: tell(holder, places[places >= 0]), set())

    def _count(self, decision: Decision, failed: Collection[str]) -> None:
        numbers = {
            "ticks": 1,
            "loads": len(decision.to_load),
            "unloads": len(decision.to_unload),
            "opened": len(decision.opened),
            "closed": len(decision.closed),
            "refused": decision.num_refused,
            "missing": len(failed),
        }
        self.counts.update(numbers)

    def _checked(self, state: Tensor, *, many: bool = False) -> Tensor:
        """States as [B, L, D], of the holder's layers and width.

        Raises:
            SubstrateError: another shape or dtype.
        """
        if self.activation is None:
            raise ConfigError("a hidden state for text lenses only; use activation lenses too, or give token_text")
        num_layers, width = len(self.activation.layers), self.activation.width
        wanted = f"[1, {width}]" if num_layers == 1 else f"[1, {num_layers}, {width}]"
        if not isinstance(state, Tensor) or not state.is_floating_point():
            found = f"a {state.dtype} tensor" if isinstance(state, Tensor) else type(state).__name__
            raise SubstrateError(f"the hidden state is {found}; give a floating-point tensor of shape {wanted}")
        states_BLD = state.detach()
        if num_layers == 1:  # the axis of layers may be left out, and so may that of one state
            states_BLD = states_BLD[None] if states_BLD.ndim == 1 else states_BLD
            states_BLD = states_BLD[:, None] if states_BLD.ndim == 2 else states_BLD
        if states_BLD.ndim != 3 or states_BLD.shape[1:] != (num_layers, width) or (not many and len(states_BLD) != 1):
            raise SubstrateError(
                f"the hidden state has shape {tuple(state.shape)}; these lenses read {wanted}: the outputs of layers "
                f"{list(self.activation.layers)}, one token at a time"
            )
        return states_BLD


def text_percentiles(text: AnyText, logits_M: np.ndarray, places_M: np.ndarray) -> np.ndarray:
    """Share of background text that the logits of some text lenses exceed, [M]; NaN without background."""
    if text.quantiles_NQ is None or text.levels_Q is None:
        return np.full(len(places_M), np.nan)
    quantiles_MQ = torch.from_numpy(text.quantiles_NQ[places_M])
    logits_M1 = torch.from_numpy(np.asarray(logits_M, dtype=np.float32))[:, None]
    return interpolate(logits_M1, quantiles_MQ, torch.from_numpy(text.levels_Q))[:, 0].numpy()


def _places(lineage: Lineage, names: Sequence[str]) -> np.ndarray:
    """Place of each concept among some names, [N]; -1 where it has none."""
    place_N = np.full(len(lineage), -1, dtype=np.int64)
    place_N[lineage.rows(names)] = np.arange(len(names))
    return place_N


class _Clock:
    """Milliseconds by part."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now

    def done(self) -> dict[str, float]:
        parts = {name: self.ms.get(name, 0.0) for name in ("initial_detection", "child_loading", "cache_management")}
        return {**parts, "total": 1000 * (time.perf_counter() - self._start)}


class ApertureBank:
    """Lenses behind an aperture as a bank for the monitor: N logits a state, NaN where the aperture is closed.

    The states of several sequences go through one aperture, in order: what opens for one is read for all.
    """

    def __init__(self, lenses: LiveLenses) -> None:
        if lenses.activation is None:
            raise ConfigError("a monitor reads states; use activation lenses")
        self._lenses, self._holder = lenses, lenses.activation
        self.names, self._index = list(self._holder.names), {name: n for n, name in enumerate(self._holder.names)}
        self._rows_N = lenses.lineage.rows(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._holder.layers)

    @property
    def width(self) -> int:
        return self._holder.width

    @property
    def calibrated(self) -> bool:
        return self._holder.calibrated

    def __call__(self, states_BLD: Tensor, /) -> Tensor:
        """One tick for each state."""
        ticks = [self._lenses.read(state_1LD).logits(ACTIVATION) for state_1LD in states_BLD.split(1)]
        return torch.from_numpy(np.stack(ticks)[:, self._rows_N])

    def rows_of(self, names: Sequence[str], /) -> Tensor:
        return torch.tensor(find_rows(names, self._index), dtype=torch.long)

    def rank(self, logits_BN: Tensor, /) -> Tensor:
        """What lenses are compared by, as in a bank; NaN where it was not read."""
        return self._holder.rank(logits_BN)

    def background(self) -> tuple[Tensor, Tensor]:
        """Quantiles of each lens's logits on background, [N, Q], and the levels they stand for."""
        return self._holder.background()

    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor:
        """Share of background that each logit exceeds; NaN where it was not read."""
        logits = logits_BN.numpy()
        places = np.broadcast_to(np.arange(len(self)), logits.shape) if lenses is None else lenses.numpy()
        result, there = np.full(logits.shape, np.nan, dtype=np.float32), ~np.isnan(logits)
        if self.calibrated and there.any():
            result[there] = self._holder.percentile(logits[there], places[there])
        return torch.from_numpy(result)
