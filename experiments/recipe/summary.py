"""Cases beside the default: paired differences with intervals over sets, as a table and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

DRAWS = 10_000


@dataclass
class Line:
    """One case: mean AUROC, difference to its reference with an interval over sets, calibration, time."""

    varied: str
    case: str
    reference: str
    auroc: float
    difference: float
    low: float
    high: float
    ece: float
    ece_floor: float
    fpr: float
    seconds: float
    num_sets: int

    def cells(self) -> list[str]:
        """For a table."""
        gap = f"{self.difference:+.4f}" if self.case != self.reference else ""
        ends = f"{self.low:+.4f} … {self.high:+.4f}" if self.case != self.reference else ""
        calibration = f"{self.ece:.3f} ({self.ece_floor:.3f})"
        return [self.varied, self.case, f"{self.auroc:.4f}", gap, ends, calibration, f"{self.seconds:.0f}"]


def summary(cases: list[dict[str, Any]], *references: str) -> list[Line]:
    """A line for each case, beside a reference that varies the same thing, or else beside the first reference."""
    known = {case["case"]: case for case in cases if case["case"] in references}
    by_varied = {case["varied"]: case for case in known.values()}
    lines = []
    for case in cases:
        base = by_varied.get(case["varied"], known[references[0]])
        place = {name: n for n, name in enumerate(base["sets"])}
        gap_N = np.array(case["auroc"]) - np.array(base["auroc"])[[place[name] for name in case["sets"]]]
        draws_RN = np.random.default_rng(0).integers(0, len(gap_N), (DRAWS, len(gap_N)))
        low, high = np.quantile(gap_N[draws_RN].mean(axis=1), [0.025, 0.975])
        mean = {key: float(np.nanmean(case.get(key, [np.nan]))) for key in ("auroc", "ece", "ece_floor")}
        rate = float(np.nanmean(case["fpr_at_threshold_1"])) if "fpr_at_threshold_1" in case else float("nan")
        lines.append(
            Line(
                **mean,
                varied=case["varied"],
                case=case["case"],
                reference=base["case"],
                difference=float(gap_N.mean()),
                low=float(low),
                high=float(high),
                fpr=rate,
                seconds=case["seconds"],
                num_sets=len(gap_N),
            )
        )
    return lines


def picture(lines: list[Line], path: Path) -> None:
    """Difference of every case to its reference, with its interval; cases that vary the same thing share a colour."""
    shown = [line for line in lines if line.case != line.reference]
    if not shown:
        return
    groups = list(dict.fromkeys(line.varied for line in shown))
    colours = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.24 * len(shown)), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    for at, line in enumerate(shown):
        colour = colours[groups.index(line.varied) % len(colours)]
        axes.plot([line.low, line.high], [at, at], color=colour, linewidth=2)
        axes.plot(line.difference, at, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(shown)), [f"{line.varied}: {line.case}" for line in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"AUROC minus the default's (of heads: minus the logistic head's); mean of {shown[0].num_sets} sets, 95 %"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
