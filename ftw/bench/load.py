"""`ftw bench load`: what opening a pack costs, bringing lenses from it, and beginning cold.

Files are in the system's cache when they are read, for the case as for its baseline: what is measured is the format
and the code, not the disk. The first opening of a pack also hashes its files, once; it is not timed.

Axes: N lenses, L layers, D model width, T tokens.
"""

import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from ftw.bench.measure import Row, Stopwatch
from ftw.bench.synthetic import (
    HIDDEN,
    LAYERS,
    NUM_LENSES,
    WIDTH,
    made_up_lineage,
    made_up_pack,
    states,
)
from ftw.hat.aperture import Aperture, ApertureConfig
from ftw.hat.dynamic import LiveLenses
from ftw.hat.shelf import MB, Shelf, ShelfConfig
from ftw.map.pack import load_pack
from ftw.map.pack_index import open_shelf

NUM_BROUGHT, BUDGET_MB, TOKENS, FIRST_TOKENS = 300, 1024.0, 200, 5


def load_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    num, width = watch.size(NUM_LENSES, 80), watch.size(WIDTH, 32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(watch.config.pack or made_up_pack(Path(temporary), num, width=width))
        yield from _opening(watch, folder)
    hidden = watch.size(HIDDEN, 4)
    with tempfile.TemporaryDirectory() as temporary:
        if watch.fits(2 * num * width * hidden * 4):
            folder = made_up_pack(Path(temporary), num, hidden=hidden, width=width, layers=LAYERS[:1])
            yield _bringing(watch, folder, Path(temporary))
            yield _expanding(watch, folder)


def _opening(watch: Stopwatch, folder: Path) -> Iterator[Row]:
    """An index that brings lenses when they are asked for, and the whole pack."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    whole = load_pack(folder)
    num, width = len(whole.names), whole.recipe.width

    shelves: list[Shelf] = []

    def opened() -> None:
        shelves.append(open_shelf(folder))

    def close() -> None:
        while shelves:
            shelves.pop().close()

    def loaded() -> None:
        load_pack(folder)

    def read() -> None:
        for path in files:
            path.read_bytes()

    sizes = {"n": num, "d": width, "pack_mb": round(num_bytes / 1e6, 1)}
    yield watch.row("open a pack", opened, baseline=("load all of it, verified", loaded), tidy=close, **sizes)
    yield watch.row("load a pack", loaded, baseline=("read its files", read), **sizes)


def _bringing(watch: Stopwatch, folder: Path, temporary: Path) -> Row:
    """Lenses from disk into the bank, against one file a lens, as the ancestor kept them."""
    with open_shelf(folder, ShelfConfig(hot_mb=1e6)) as every:
        num, lens_bytes = min(watch.size(NUM_BROUGHT, 20), len(every.names) // 3), every.bank.slots.row_bytes
    with open_shelf(folder, ShelfConfig(hot_mb=(num + 0.5) * lens_bytes / MB, device=str(watch.device))) as shelf:
        turns = cycle([shelf.names[start : start + num] for start in range(0, 3 * num, num)])
        shelf.bring(next(turns))
        files = _single_files(shelf, temporary / "single")

        def one_by_one() -> None:
            for path in files:  # written above, tensors only; the baseline is this very way of reading them
                torch.load(path, weights_only=True, map_location=watch.device)

        return watch.row(
            f"bring {num} mlp lenses", lambda: shelf.bring(next(turns)), n=num, d=shelf.width,
            baseline=("torch.load of one file each", one_by_one), num_bytes=num * lens_bytes,
        )  # fmt: skip


def _single_files(shelf: Shelf, folder: Path) -> list[Path]:
    """The lenses of a bank as one file each."""
    folder.mkdir()
    files = []
    for row in range(len(shelf.bank)):
        path = folder / f"{row}.pt"
        torch.save({name: tensor[row].clone() for name, tensor in shelf.bank.slots.tensors.items()}, path)
        files.append(path)
    return files


def _expanding(watch: Stopwatch, folder: Path) -> Row:
    """Tokens through an aperture over a shelf that is empty at first, against reading all lenses at every token."""
    with open_shelf(folder, ShelfConfig(hot_mb=BUDGET_MB, device=str(watch.device))) as shelf:
        aperture = Aperture(made_up_lineage(shelf.names), ApertureConfig(load_threshold=0.8))
        lenses = LiveLenses(aperture, activation=shelf, text=None)
        drifting = states(watch.size(TOKENS, 20), layers=len(shelf.layers), width=shelf.width).split(1)
        ms_T = np.array([watch.once(lambda state=state: lenses.read(state)) for state in drifting])[FIRST_TOKENS:]
        counted = shelf.statistics()
        width, num = shelf.width, len(shelf.names)
    whole = load_pack(folder).bank().to(watch.device)

    def resident() -> None:
        with torch.inference_mode():
            whole(drifting[0].to(watch.device)).cpu()

    baseline_ms = float(np.median(watch.times({"baseline": resident})["baseline"]))
    return Row(
        case=f"expand, cold start, {BUDGET_MB:.0f} MB, P95 after {FIRST_TOKENS} tokens",
        n=num,
        d=width,
        ms=float(np.quantile(ms_T, 0.95)),
        baseline="all lenses resident, read at every token",
        baseline_ms=baseline_ms,
        more={
            "median_ms": float(np.median(ms_T)),
            "most_ms": float(ms_T.max()),
            **{name: counted[name] for name in ("hits", "misses", "evictions", "hot_bytes")},
        },
    )
