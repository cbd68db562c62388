"""`ftw bench shelf`: what lenses cost that are brought when they are asked for.

A bank with room for some of the lenses of a pack, the others in memory or on disk. Held against a bank that has the
same lenses for good, and against building a bank of the new set.

Axes: N lenses, L layers, D model width.
"""

import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from ftw.bench.measure import Row, Stopwatch
from ftw.bench.synthetic import HIDDEN, WIDTH, made_up_pack, states
from ftw.hat.shelf import MB, Shelf, ShelfConfig
from ftw.map.pack import LensPack, load_pack
from ftw.map.pack_index import open_shelf

NUM_LENSES, NUM_HOT, NUM_COMING = 1000, 200, 64


def shelf_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = watch.config.pack or made_up_pack(
            Path(temporary),
            watch.size(NUM_LENSES, 60),
            hidden=watch.size(HIDDEN, 4),
            width=watch.size(WIDTH, 32),
            layers=(0,),
        )
        pack = load_pack(folder)
        yield _hot(watch, pack, folder)
        for tier in ("memory", "disk"):
            yield _coming(watch, pack, folder, tier)


def _hot(watch: Stopwatch, pack: LensPack, folder: Path | str) -> Row:
    """A token over lenses that are hot already, against a bank that has just these."""
    num = watch.size(NUM_HOT, 12)
    bank = pack.stack.rows(pack.names[:num]).bank().hot(num).to(watch.device)
    state_1LD = states(1, layers=len(bank.layers), width=bank.width).to(watch.device)
    rows = np.arange(num)
    with _open(watch, folder, num, num) as shelf:

        def token() -> None:
            shelf.begin(state_1LD)
            shelf.logits(rows)

        def resident() -> None:
            with torch.inference_mode():
                bank(state_1LD).float().cpu()

        baseline = ("a bank that has them for good", resident)
        return watch.row(
            f"{num} hot lenses, a token", token, n=num, d=bank.width, baseline=baseline, num_bytes=_bytes(shelf, num)
        )


def _coming(watch: Stopwatch, pack: LensPack, folder: Path | str, tier: str) -> Row:
    """Some lenses come in place of others, against building the bank anew."""
    num, coming = watch.size(NUM_HOT, 12), watch.size(NUM_COMING, 4)
    # More sets than the bank has room for, so that each is gone when its turn comes again.
    sets = [pack.names[start : start + coming] for start in range(0, 5 * coming, coming)]
    turns, others = cycle(sets), pack.names[-(num - coming) :]
    with _open(watch, folder, num, 0 if tier == "disk" else len(pack.names)) as shelf:
        if tier == "memory":
            shelf.preload(2**62)
        shelf.bring(others)

        def rebuild() -> None:
            pack.stack.rows([*others, *sets[0]]).bank().to(watch.device)

        return watch.row(
            f"{coming} of {num} come from {tier}", lambda: shelf.bring(next(turns)), n=coming, d=shelf.width,
            baseline=("rebuild the bank", rebuild), num_bytes=_bytes(shelf, coming),
        )  # fmt: skip


def _open(watch: Stopwatch, folder: Path | str, num_hot: int, num_tepid: int) -> Shelf:
    """A shelf with room for so many lenses in each tier."""
    with open_shelf(folder, ShelfConfig(hot_mb=1e6)) as whole:
        lens_mb = whole.bank.slots.row_bytes / MB
    tepid_mb = (num_tepid + 0.5) * lens_mb if num_tepid else 0.0
    config = ShelfConfig(hot_mb=(num_hot + 0.5) * lens_mb, tepid_mb=tepid_mb, device=str(watch.device))
    return open_shelf(folder, config)


def _bytes(shelf: Shelf, num: int) -> int:
    return num * shelf.bank.slots.row_bytes
