"""What was chosen for each lens, and on what evidence: the part of a report that lets a reader disagree.

The evidence is out of fold, on training rows; held-out figures stand in a table of their own.
"""

import math
from collections.abc import Mapping
from typing import Any

from ftw.ui import figures
from ftw.ui.figures import Evaluated

# Evidence that is not of one pool: heading, key.
WHOLE = (("all alike", "all"), ("as chosen", "combined"), ("words alone", "text"))


def choices_part(evaluation: Evaluated | None) -> dict[str, Any] | None:
    """Headings and rows of the table of choices; None where the solver chose nothing lens by lens."""
    found = {
        name: row["choice"] for name, row in (evaluation.concepts if evaluation else {}).items() if "choice" in row
    }
    if not found:
        return None
    pools = list(dict.fromkeys(pool for choice in found.values() for pool in choice["pools"]))
    keys = [*((pool, pool) for pool in pools), *WHOLE]
    return {
        "pools": pools,
        "headings": [heading for heading, _ in keys],
        "rows": [_row(name, found[name], pools, [key for _, key in keys]) for name in found],
        "siblings": any(choice.get("siblings") for choice in found.values()),
    }


def _row(name: str, choice: Mapping[str, Any], pools: list[str], keys: list[str]) -> dict[str, Any]:
    evidence = choice.get("evidence") or {}
    shares, start = [], 0.0
    for pool in pools:
        share = 100 * float(choice["pools"].get(pool, 0.0))
        shares.append((pool, round(start, 2), round(share, 2)))
        start += share
    known = {key: figures.value(evidence, key) for key in keys if key != "combined"}
    # The strongest single piece of evidence is set off; what was made of all of them stands beside it.
    best = max((value for value in known.values() if not math.isnan(value)), default=math.nan)
    weight = float(choice.get("text_weight") or 0.0)
    return {
        "name": name,
        "rows": f"{choice.get('num_positive', 0)} + {choice.get('num_negative', 0)}",
        "num_rows": choice.get("num_positive", 0) + choice.get("num_negative", 0),
        "few": bool(choice.get("difference_of_means")),
        "shares": shares,
        "words": ", ".join(f"{pool} {share:.0f} %" for pool, _, share in shares if share >= 0.5),
        "evidence": [
            (figures.value(evidence, key), figures.number(evidence, key), key in known and known[key] == best)
            for key in keys
        ],
        "text_weight": (weight, f"{weight:.2f}"),
    }
