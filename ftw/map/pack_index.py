"""Opening a lens pack without reading it: index files and headers only, the weights when they are asked for.

Whether a file is the one that was packed is known from its hash; a hash that was computed once is remembered under
`home()` for as long as the file's size, times and inode stay the same. The same holds for the concepts of each level,
whose index carries all metrics.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftw import paths
from ftw.errors import PackError
from ftw.hat.cold import ColdLenses
from ftw.hat.lens import HeadConfig
from ftw.hat.shelf import Shelf, ShelfConfig
from ftw.hat.store import is_finite, read_tensors
from ftw.map.manifest import NAME, read_json, safe_member, sha256, verify_manifest
from ftw.map.pack import Recipe, read_info, read_rows


@dataclass(kw_only=True)
class PackIndex:
    """What a pack holds, without its weights.

    Attributes:
        folder, pack_id, version, recipe: of the pack. names_of: concepts of each level, in row order.
    """

    folder: Path
    pack_id: str
    version: str
    recipe: Recipe
    names_of: dict[int, list[str]]

    @classmethod
    def open(cls, folder: Path | str) -> "PackIndex":
        """Read the index of a pack, its files verified.

        Raises:
            PackError: the pack is damaged, hostile, or of another version.
        """
        folder = Path(folder).absolute()
        known = _verify(folder)
        info = read_info(folder)
        try:
            levels = {int(level): int(num) for level, num in info["levels"].items()}
            rows = known.get("rows")
            if rows is None:
                rows = {str(level): list(names) for level, names in read_rows(folder, levels).items()}
                _remember(folder, {**known, "rows": rows})
            names_of = {level: [str(name) for name in rows[str(level)]] for level in sorted(levels)}
            return cls(
                folder=folder,
                pack_id=str(info["pack_id"]),
                version=str(info["version"]),
                recipe=Recipe.from_json(info["recipe"]),
                names_of=names_of,
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PackError(
                f"pack {folder} contradicts its own index ({type(error).__name__}: {error}); fetch it again"
            ) from error

    @property
    def levels(self) -> dict[str, int]:
        """Level of each concept in its hierarchy."""
        return {name: level for level, names in self.names_of.items() for name in names}

    def cold(self) -> ColdLenses:
        """The lenses, on disk.

        Raises:
            PackError: tensors and index disagree.
        """
        recipe, folder = self.recipe, self.folder
        return ColdLenses(
            names_of={
                safe_member(folder, f"layer{level}/lenses.safetensors"): names for level, names in self.names_of.items()
            },
            layers=tuple(recipe.layers),
            width=recipe.width,
            head=HeadConfig(family=recipe.family, hidden=recipe.hidden),
            calibration=read_tensors(safe_member(folder, "calibration.safetensors")),
            basis=read_tensors(safe_member(folder, "basis.safetensors")) if recipe.basis_rank else None,
            basis_rank=recipe.basis_rank,
            where=str(folder),
        )


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
