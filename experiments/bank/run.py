"""What does reading N lenses cost a token? Random linear lenses over three layers of width 576, one state at a time.

Every row is measured in turn within one run: the bank's reading (layer norm, product, top 5 with percentiles), the bare
product by torch beside it, and the floor, which is the bytes of the weights over the memory bandwidth of a plain sum.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ftw.hat.bank import LensBank, build_bank
from ftw.hat.linear import LinearHead

LAYERS, WIDTH, NUM_QUANTILES = (9, 18, 27), 576, 129


def random_bank(num_lenses: int) -> LensBank:
    """Linear lenses with random weights and quantiles."""
    generator = torch.Generator().manual_seed(0)
    heads = [LinearHead(num_lenses, WIDTH) for _ in LAYERS]
    for head in heads:
        head.weight.data = torch.randn(num_lenses, WIDTH, generator=generator) / WIDTH
    quantiles_NQ = torch.randn(num_lenses, NUM_QUANTILES, generator=generator).sort(dim=1).values
    return build_bank(
        names=[f"lens {row}" for row in range(num_lenses)],
        layers=LAYERS,
        heads=heads,
        scale_LN=torch.ones(len(LAYERS), num_lenses) / len(LAYERS),
        offset_N=torch.zeros(num_lenses),
        quantiles_NQ=quantiles_NQ,
        levels_Q=torch.linspace(0, 1, NUM_QUANTILES),
    )


def milliseconds(call: Callable[[], object], *, seconds: float = 1.0) -> float:
    """Median time of a call over about `seconds`, after a warm-up."""
    for _ in range(3):
        call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


@torch.inference_mode()
def measure(num_lenses: int) -> dict[str, float]:
    """One row of the table."""
    bank = random_bank(num_lenses)
    state_1LD = torch.randn(1, len(LAYERS), WIDTH)
    flat_1W, weight_NW = state_1LD.flatten(1), torch.randn(num_lenses, len(LAYERS) * WIDTH)
    ms = milliseconds(lambda: bank.read(state_1LD, k=5))
    baseline_ms = milliseconds(lambda: torch.nn.functional.linear(flat_1W, weight_NW))
    megabytes = weight_NW.numel() * weight_NW.element_size() / 1e6
    # A buffer as large as the weights, so that both find the same level of the memory hierarchy.
    floor_ms = milliseconds(weight_NW.sum)
    return {
        "n": num_lenses,
        "megabytes": round(megabytes, 1),
        "ms": round(ms, 3),
        "baseline_ms": round(baseline_ms, 3),
        "ratio": round(ms / baseline_ms, 2),
        "floor_ms": round(floor_ms, 3),
        "over_floor": round(ms / floor_ms, 2),
    }


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lenses", type=int, nargs="+", default=[65, 1000, 7947])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(num) for num in arguments.lenses]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.json is not None:
        machine = {"platform": platform.platform(), "threads": arguments.threads, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
