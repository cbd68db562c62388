"""Whatever is done to a pack's files, and with fitting hashes: it loads as a sound bank, or is a typed error, soon.

A mutation is drawn from a seed, so that a failure names the pack that made it. The default tier tries a few hundred;
`-m slow` ten thousand, in a process that may not take more than a gigabyte above what it has.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_pack import make_pack

from ftw.errors import FTWError
from ftw.map.convert import convert
from ftw.map.manifest import NAME, write_manifest
from ftw.map.pack import load_pack
from ftw.map.pack_index import PackIndex

SECONDS, BYTES = 2.0, 2**30
WORDS: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**40,
    1e308,
    "",
    "..",
    "../../etc",
    "layer0",
    "\0",
    [],
    {},
    [[]],
    {"a": {}},
]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    kinds = [make_pack(rank=5), make_pack(hidden=6), convert(make_pack(), precision="int8")[0]]
    return [pack.save(folder / str(number)) for number, pack in enumerate(kinds)]


def files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())


def flip_bits(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder, ".json", ".safetensors"))
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder, ".json", ".safetensors"))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def change_json(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder, ".json"))
    node = whole = json.loads(path.read_text())
    while True:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], dict | list) and node[key]) or draw.random() < 0.2:
            break
        node = node[key]
    what = draw.random()
    if what < 0.2:
        del node[key]
    elif what < 0.3 and isinstance(node, list):
        node.append(node[key])  # a duplicate row
    else:
        node[key] = draw.choice(WORDS)
    path.write_text(json.dumps(whole))


def deepen_json(folder: Path, draw: random.Random) -> None:
    depth = draw.choice([100, 10**4, 10**5])
    draw.choice(files(folder, ".json")).write_text(
        draw.choice(["[" * depth, '{"a":' * depth, "[" * depth + "]" * depth])
    )


def change_header(folder: Path, draw: random.Random) -> None:
    """Shapes, types and offsets of a safetensors header."""
    path = draw.choice(files(folder, ".safetensors"))
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    what = draw.randrange(5)
    if what == 0:
        draw.shuffle(entry["shape"])
    elif what == 1:
        entry["shape"] = [draw.choice([0, 1, 2**20, 2**40, 2**63]), *entry["shape"][1:]]
    elif what == 2:
        entry["dtype"] = draw.choice(["F64", "F32", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "X"])
    elif what == 3:
        entry["data_offsets"] = [draw.choice([0, 2**40]), draw.choice([0, 16, 2**50])]
    else:
        header[draw.choice(["weight", "bias", "scale", "x" * 300])] = header.pop(name)
    text = json.dumps(header).encode()
    length = draw.choice([len(text), len(text), len(text), 2**60, 0])
    path.write_bytes(struct.pack("<Q", length) + text + content[8 + struct.unpack("<Q", content[:8])[0] :])


def write_numbers(folder: Path, draw: random.Random) -> None:
    """NaN, infinities and huge numbers amid a tensor's bytes."""
    path = draw.choice(files(folder, ".safetensors"))
    content = bytearray(path.read_bytes())
    place = draw.randrange(8, max(9, len(content) - 4)) // 4 * 4
    content[place : place + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf"), 3e38, -3e38, 1e-45]))
    path.write_bytes(content)


def exchange_files(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(files(folder, ".json", ".safetensors"), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def link(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder, ".json", ".safetensors"))
    target = draw.choice([path.with_suffix(".moved"), Path("/etc/passwd"), Path("/dev/zero"), folder, Path("missing")])
    if draw.random() < 0.5:
        shutil.copy(path, path.with_suffix(".moved"))
    path.unlink()
    path.symlink_to(target)


def replace_by_folder(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder, ".json", ".safetensors"))
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()


def change_manifest(folder: Path, draw: random.Random) -> None:
    if (folder / NAME).is_symlink():  # to a device without an end, perhaps
        return
    manifest = json.loads((folder / NAME).read_text())
    name = draw.choice(list(manifest["files"]))
    what = draw.randrange(4)
    if what == 0:
        manifest["files"][draw.choice(["../outside", "/etc/passwd", "a\\..\\b", "C:x", ".", "", "layer0"])] = {
            "bytes": 0
        }
    elif what == 1:
        del manifest["files"][name]
    elif what == 2:
        manifest["files"][name] = draw.choice(WORDS)
    else:
        manifest["files"][name]["bytes"] = draw.choice([-1, 2**60, "1", None])
    (folder / NAME).write_text(json.dumps(manifest))


def note_levels(folder: Path, draw: random.Random) -> None:
    """A note that only some levels were fetched, true or not."""
    levels = draw.choice([[0], [1, 2], [], [99], [True], ["0"], [-1], 5, None, [0, 1, 2]])
    (folder / ".levels.json").write_text(json.dumps({"levels": levels}))
    if draw.random() < 0.5:
        shutil.rmtree(folder / f"layer{draw.randrange(3)}")


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bits, truncate, change_json, change_json, change_json, deepen_json, change_header, change_header,
    write_numbers, exchange_files, link, replace_by_folder, note_levels,
]  # fmt: skip


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """No more than a gigabyte of address space beyond what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def try_pack(source: Path, folder: Path, seed: int) -> str:
    """Mutate a copy of a pack and load it both ways: how that ended. Any other error than a typed one is raised."""
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    changes = [draw.choice(MUTATIONS) for _ in range(draw.choice([1, 1, 1, 2]))]
    if draw.random() < 0.8:
        changes.append(lambda folder, draw: write_fitting_manifest(folder))
    if draw.random() < 0.2:
        changes.append(change_manifest)
    for change in changes:
        # What an earlier change has ruined, a later one may not be able to change.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            change(folder, draw)
    begun, outcome = time.process_time(), "loaded"
    try:
        pack = load_pack(folder)
        bank = pack.bank()
        assert len(bank) == len(set(bank.names)) == len(pack.levels) > 0
        assert all(torch.isfinite(tensor).all() for tensor in bank.state_dict().values())
        assert bank(torch.randn(2, len(bank.layers), bank.width)).shape == (2, len(bank))
        PackIndex.open(folder).cold().close()
    except FTWError:
        outcome = "refused"
    assert time.process_time() - begun < SECONDS, f"seed {seed} took too long"
    return outcome


def write_fitting_manifest(folder: Path) -> None:
    """Fitting hashes, as far as the files can be read: what an attacker would write."""
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    targets = [path.readlink() for path in links]
    for path in links:
        path.unlink()
    write_manifest(folder)
    for path, target in zip(links, targets, strict=True):
        path.symlink_to(target)


def tally(packs: list[Path], folder: Path, seeds: range) -> dict[str, int]:
    outcomes = {"loaded": 0, "refused": 0}
    with limited_memory():
        for seed in seeds:
            try:
                outcomes[try_pack(packs[seed % len(packs)], folder, seed)] += 1
            except Exception as error:
                raise AssertionError(f"the pack of seed {seed} ended in {type(error).__name__}: {error}") from error
    return outcomes


def test_a_mutated_pack_is_sound_or_a_typed_error(packs: list[Path], tmp_path: Path):
    outcomes = tally(packs, tmp_path / "pack", range(300))
    assert outcomes["refused"] > 150
    assert outcomes["loaded"] > 5


@pytest.mark.slow
def test_ten_thousand_mutated_packs_are_sound_or_typed_errors(packs: list[Path], tmp_path: Path):
    outcomes = tally(packs, tmp_path / "pack", range(10_000))
    print(outcomes)
    assert sum(outcomes.values()) == 10_000
