"""The rows of `ftw bench … --json FILE` as a table in Markdown: python experiments/bank/table.py FILE…"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("case", "n", "d", "ms", "baseline", "baseline_ms", "ratio", "over_floor")
HEADS = ("case", "n", "d", "ms", "held against", "ms", "ratio", "× floor")


def cell(value: Any) -> str:
    """A number as one reads it."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main(files: list[str]) -> None:
    """Print one table of all files."""
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for file in files:
        for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]:
            print(f"| {' | '.join(cell(row[name]) for name in COLUMNS)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
