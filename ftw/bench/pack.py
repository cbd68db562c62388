"""`ftw bench pack`: what checking a pack costs, what smaller forms of it save, and how quickly a foreign one comes in.

The pack is one of the ancestor's lenses (MLP 128-64-1) at First Light's width, or the one that is given. Files are in
the system's cache when they are read.

Axes: N lenses, D model width.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ftw.bench.measure import Row, Stopwatch
from ftw.bench.synthetic import HIDDEN, LAYERS, WIDTH, made_up_pack
from ftw.map.convert import convert
from ftw.map.foreign.hatcat_read import read_hatcat
from ftw.map.foreign.hatcat_write import write_hatcat
from ftw.map.manifest import sha256, verify_manifest
from ftw.map.pack import load_pack

NUM_MLP, NUM_IMPORTED = 3000, 2000
FORMS = (("as bfloat16", "bfloat16", 0), ("as int8", "int8", 0))
WIDE, RANK = 2560, 64


def pack_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    num, width, hidden = watch.size(NUM_MLP, 40), watch.size(WIDTH, 32), watch.size(HIDDEN, 4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = watch.config.pack or made_up_pack(Path(temporary), num, hidden=hidden, width=width, layers=LAYERS[:1])
        yield _verifying(watch, Path(folder))
        yield from _smaller(watch, Path(folder), Path(temporary), FORMS)
    with tempfile.TemporaryDirectory() as temporary:
        wide, rank = watch.size(WIDE, 64), watch.size(RANK, 8)
        folder = made_up_pack(Path(temporary), num // 10, hidden=hidden, width=wide, layers=LAYERS[:1])
        forms = (("as bfloat16", "bfloat16", 0), (f"on a basis of {rank}, bfloat16", "bfloat16", rank))
        yield from _smaller(watch, folder, Path(temporary), forms)
    with tempfile.TemporaryDirectory() as temporary:
        yield _importing(watch, Path(temporary))


def _verifying(watch: Stopwatch, folder: Path) -> Row:
    """Every hash, name, shape and number, per gigabyte."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9

    def verified() -> None:
        verify_manifest(folder)
        load_pack(folder)

    def hashed() -> None:
        for path in files:
            sha256(path)

    times = watch.times({"case": verified, "baseline": hashed}, rounds=3)
    ms, baseline_ms = (float(times[name].min()) / gigabytes for name in ("case", "baseline"))
    pack = load_pack(folder)
    more = {"gb": gigabytes, "files": len(files)}
    return Row(
        case="verify, a GB", n=len(pack.names), d=pack.recipe.width, ms=ms,
        baseline="hash the files, a GB", baseline_ms=baseline_ms, more=more,
    )  # fmt: skip


def _smaller(watch: Stopwatch, folder: Path, temporary: Path, forms: Sequence[tuple[str, str, int]]) -> Iterator[Row]:
    """The same lenses in fewer bits: the time to convert and save, beside saving them as they are; and the bytes."""
    pack, places = load_pack(folder), iter(range(1000))

    def saved(precision: str | None = None, rank: int = 0) -> int:
        out = temporary / f"out{next(places)}"
        (convert(pack, precision=precision, rank=rank)[0] if precision else pack).save(out)
        return sum(path.stat().st_size for path in out.rglob("*.safetensors"))

    sizes: list[int] = []
    baseline_ms = watch.once(lambda: sizes.append(saved()))  # each takes seconds: once is enough
    for case, precision, rank in forms:
        ms = watch.once(lambda p=precision, r=rank: sizes.append(saved(p, r)))
        more = {"mb": sizes[-1] / 1e6, "times_smaller": sizes[0] / sizes[-1]}
        yield Row(
            case=f"save {case}", n=len(pack.names), d=pack.recipe.width, ms=ms,
            baseline="save as it is", baseline_ms=baseline_ms, more=more,
        )  # fmt: skip


def _importing(watch: Stopwatch, temporary: Path) -> Row:
    """HatCat's files, one a lens, into a pack, beside `torch.load` of each."""
    num, width, hidden = watch.size(NUM_IMPORTED, 20), watch.size(WIDTH, 32), watch.size(HIDDEN, 4)
    pack = load_pack(made_up_pack(temporary, num, hidden=hidden, width=width, layers=LAYERS[:1]))
    write_hatcat(pack, temporary / "hatcat")
    files = sorted((temporary / "hatcat").glob("layer*/*.pt"))

    def imported() -> None:
        read_hatcat(temporary / "hatcat")

    def loaded() -> None:
        for path in files:  # made up above, tensors only; the baseline is this very way of reading them
            torch.load(path, weights_only=True)

    times = watch.times({"case": imported, "baseline": loaded}, rounds=3)
    ms = float(times["case"].min())
    return Row(
        case=f"import {num:,} .pt lenses", n=num, d=width, ms=ms, baseline="torch.load of one file each",
        baseline_ms=float(times["baseline"].min()), more={"lenses_a_second": 1000 * num / ms},
    )  # fmt: skip
