"""Opening a lens pack without reading it: index files and headers only, all else when it is asked for.

Whether a file is the one that was packed is known from its hash; a hash that was computed once is remembered under
`home()` for as long as the file's size, times and inode stay the same. The same holds for the concepts of each level,
whose index carries all metrics.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ftw import paths
from ftw.errors import FTWError, PackError
from ftw.hat.bank import LensBank
from ftw.hat.cold import ColdLenses
from ftw.hat.lens import HeadConfig
from ftw.hat.shelf import Shelf, ShelfConfig
from ftw.hat.store import is_finite, read_tensors
from ftw.hat.text import TextBank
from ftw.map.concept import ConceptPack
from ftw.map.manifest import NAME, read_json, safe_member, sha256, verify_manifest
from ftw.map.pack import Recipe, check_substrate, read_concepts, read_info, read_rows, read_text
from ftw.substrate.model import Substrate


@dataclass(kw_only=True)
class PackIndex:
    """A pack, of which only the index is read: concepts, text lenses and weights come when they are first asked for.

    Attributes:
        folder, pack_id, version, recipe: of the pack. rows_of: concepts of each level, in row order.
        chosen: levels that are read.
    """

    folder: Path
    pack_id: str
    version: str
    recipe: Recipe
    rows_of: dict[int, list[str]]
    chosen: list[int]

    @classmethod
    def open(cls, folder: Path | str, *, levels: Sequence[int] | None = None) -> "PackIndex":
        """Read the index of a pack, its files verified; `levels`: of the hierarchy that are read, None for all.

        Raises:
            PackError: the pack is damaged, hostile, of another version, or has no such level.
        """
        folder = Path(folder).absolute()
        known = _verify(folder)
        info = read_info(folder)
        with _sound(folder):
            num_of = {int(level): int(num) for level, num in info["levels"].items()}
            rows = known.get("rows")
            if rows is None:
                rows = {str(level): list(names) for level, names in read_rows(folder, num_of).items()}
                _remember(folder, {**known, "rows": rows})
            rows_of = {level: [str(name) for name in rows[str(level)]] for level in sorted(num_of)}
            chosen = [level for level in rows_of if levels is None or level in levels]
            if not chosen:
                raise PackError(f"pack {info['pack_id']!r} has no levels {levels}; its levels are {sorted(rows_of)}")
            return cls(
                folder=folder,
                pack_id=str(info["pack_id"]),
                version=str(info["version"]),
                recipe=Recipe.from_json(info["recipe"]),
                rows_of=rows_of,
                chosen=chosen,
            )

    @cached_property
    def levels(self) -> dict[str, int]:
        """Level of each concept in its hierarchy."""
        return {name: level for level in self.chosen for name in self.rows_of[level]}

    @property
    def names(self) -> list[str]:
        """The concepts that it reads."""
        return list(self.levels)

    @cached_property
    def concepts(self) -> ConceptPack | None:
        """The concept pack; None where the lenses are of labelled data.

        Raises:
            PackError: it is damaged, or another than the pack names.
        """
        with _sound(self.folder):
            return read_concepts(self.folder, read_info(self.folder)["concept_pack"])

    @cached_property
    def text(self) -> TextBank | None:
        """The text lenses, or None; tens to hundreds of megabytes.

        Raises:
            PackError: they are damaged, or not those of the pack's concepts.
        """
        with _sound(self.folder):
            text = read_text(self.folder, [name for names in self.rows_of.values() for name in names])
        return text if text is None or len(self.chosen) == len(self.rows_of) else text.subset(self.names)

    def check(self, substrate: Substrate) -> None:
        """Refuse another substrate than the one the lenses were trained on.

        Raises:
            PackError: naming what differs.
        """
        check_substrate(self.pack_id, self.recipe, substrate)

    def bank(self) -> LensBank:
        """All lenses as one module.

        Raises:
            PackError: tensors and index disagree, the disk fails, or the lenses read sequences.
        """
        cold = self.cold()
        try:
            bank = cold.bank(len(cold))
            failed = cold.fill(bank.slots, cold.names, precision="float32")
        finally:
            cold.close()
        if failed:
            name, why = next(iter(failed.items()))
            raise PackError(f"pack {self.folder}: {len(failed)} lenses cannot be read, {name!r} first: {why}")
        bank.refresh()
        return bank

    def cold(self) -> ColdLenses:
        """The lenses, on disk.

        Raises:
            PackError: tensors and index disagree, or the lenses read sequences.
        """
        recipe, folder = self.recipe, self.folder
        head = HeadConfig(family=recipe.family, hidden=recipe.hidden)
        if head.reads_sequences:
            raise PackError("these lenses read sequences, not single states; read windows: ftw monitor mode=timeline")
        calibration = read_tensors(safe_member(folder, "calibration.safetensors"))
        if len(self.chosen) < len(self.rows_of):
            is_read = [level in self.chosen for level, names in self.rows_of.items() for _ in names]
            rows = {name: tensor for name, tensor in calibration.items() if name != "levels"}
            if any(len(tensor) != len(is_read) for tensor in rows.values()):
                raise PackError(f"pack {folder}: calibration of another number of lenses; fetch it again")
            calibration |= {name: tensor[torch.tensor(is_read)] for name, tensor in rows.items()}
        return ColdLenses(
            names_of={
                safe_member(folder, f"layer{level}/lenses.safetensors"): self.rows_of[level] for level in self.chosen
            },
            layers=tuple(recipe.layers),
            width=recipe.width,
            head=head,
            calibration=calibration,
            basis=read_tensors(safe_member(folder, "basis.safetensors")) if recipe.basis_rank else None,
            basis_rank=recipe.basis_rank,
            where=str(folder),
        )


@contextmanager
def _sound(folder: Path) -> Iterator[None]:
    """Whatever a damaged file makes go wrong is an error of the pack."""
    try:
        yield
    except PackError:
        raise
    except FTWError as error:  # of the concept pack inside
        raise PackError(f"pack {folder}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, OSError) as error:
        raise PackError(
            f"pack {folder} contradicts its own index ({type(error).__name__}: {error}); fetch it again"
        ) from error


def open_shelf(folder: Path | str, config: ShelfConfig | None = None, *, always: Sequence[str] = ()) -> Shelf:
    """A shelf of a pack's lenses: opened in a moment, the weights brought when they are asked for.

    Raises:
        PackError: the pack is damaged or hostile. ConfigError, ConceptError: as `Shelf`.
    """
    return Shelf(PackIndex.open(folder).cold(), config, always=always)


def _verify(folder: Path) -> dict[str, Any]:
    """Check every file of a pack, hashing only what has changed; what is known of it.

    Raises:
        PackError: as `verify_manifest`; or a tensor with numbers that are not finite.
    """
    names = verify_manifest(folder, hashes=False)
    listed = read_json(folder / NAME)["files"]
    known = _recall(folder)
    states = {name: [*_state(folder / name), listed[name].get("sha256")] for name in names}
    changed = [name for name in names if known.get("files", {}).get(name) != states[name]]
    for name in changed:
        if sha256(folder / name) != listed[name].get("sha256"):
            raise PackError(
                f"pack {folder}: {name!r} is not the file that was packed (sha256 differs); fetch the pack again"
            )
        if name.endswith("/lenses.safetensors"):
            _check_finite(folder / name)
    if changed or set(known.get("files", {})) != set(states):
        known = {"schema": 1, "files": states}
        _remember(folder, known)
    return known


def _check_finite(path: Path) -> None:
    """A lens that is read later, row by row, is not looked through again."""
    for name, tensor in read_tensors(path).items():
        if tensor.is_floating_point() and not all(is_finite(rows) for rows in tensor.split(64)):
            raise PackError(f"{path}: tensor {name!r} holds numbers that are not finite; do not use this pack")


def _state(path: Path) -> tuple[int, int, int, int]:
    """What changes when a file does; the time of change, unlike that of modification, cannot be set."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _cache_file(folder: Path) -> Path:
    return paths.home() / "verified" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"


def _recall(folder: Path) -> dict[str, Any]:
    path = _cache_file(folder)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not ours: everything is verified again
        return {}
    usable = isinstance(known, dict) and known.get("schema") == 1 and isinstance(known.get("files"), dict)
    return known if usable else {}


def _remember(folder: Path, known: Mapping[str, Any]) -> None:
    with paths.replace_file(_cache_file(folder)) as temporary:
        temporary.write_text(json.dumps(known), encoding="utf-8")
