"""How figures are written, in terminal and report alike: same order, same digits, a dash for what is missing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

DASH = "–"
Metrics = Mapping[str, Any]


@runtime_checkable
class Evaluated(Protocol):
    """What tables and pictures need of an evaluation: metrics by concept, their means, and what to know."""

    @property
    def concepts(self) -> Mapping[str, Metrics]: ...

    @property
    def mean(self) -> Metrics: ...

    @property
    def notes(self) -> Sequence[str]: ...


def ranked(evaluation: Evaluated) -> list[tuple[str, Metrics]]:
    """Concepts with their metrics, best AUROC first; those without one last."""
    return sorted(evaluation.concepts.items(), key=lambda row: (-value(row[1], "auroc", -1.0), row[0]))


def value(metrics: Metrics, key: str, missing: float = math.nan) -> float:
    """A metric as a float; `missing` where it is absent, None or NaN."""
    found = metrics.get(key)
    number = math.nan if found is None else float(found)
    return missing if math.isnan(number) else number


def number(metrics: Metrics, key: str, digits: int = 3) -> str:
    """A metric as "0.987", or a dash."""
    found = value(metrics, key)
    return DASH if math.isnan(found) else f"{found:.{digits}f}"


def signed(metrics: Metrics, key: str, digits: int = 3) -> str:
    """A difference as "+0.012" with a true minus, or a dash."""
    found = value(metrics, key)
    # A difference that rounds to nothing has no sign.
    return DASH if math.isnan(found) else f"{found:+z.{digits}f}".replace("-", "−")


def interval(metrics: Metrics, key: str, digits: int = 2) -> str:
    """The interval of a metric as "0.95–0.99" ("" where it has none); signed ends are set apart by "to"."""
    low, high = value(metrics, f"{key}_low"), value(metrics, f"{key}_high")
    if math.isnan(low) or math.isnan(high):
        return ""
    if key == "difference":
        return f"{signed(metrics, 'difference_low', digits)} to {signed(metrics, 'difference_high', digits)}"
    return f"{low:.{digits}f}–{high:.{digits}f}"


def count(metrics: Metrics, key: str) -> str:
    """A number of texts, or a dash."""
    found = value(metrics, key)
    return DASH if math.isnan(found) else f"{found:,.0f}".replace(",", " ")


def weak(metrics: Metrics) -> list[str]:
    """Controls that this lens does not beat, as words ("text", "shuffled")."""
    found = metrics.get("no_better_than") or ()
    return [found] if isinstance(found, str) else [str(word) for word in found]


def percent(share: float, digits: int = 1) -> str:
    """A share of one as "98.7 %" (the space does not break), or a dash."""
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Seconds as "0.4 s", "12.3 s", "3 min 05 s" or "2 h 04 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
