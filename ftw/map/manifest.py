"""The manifest of a pack: which files it has and the sha256 of each.

It shows that a pack is whole and unchanged since it was written; it does not show who wrote it.
"""

import hashlib
import json
import re
from pathlib import Path, PurePosixPath

from ftw.errors import PackError

NAME = "MANIFEST.json"
PARTIAL = ".levels.json"  # beside the manifest of a pack of which only some levels were fetched
BESIDE = ("README.md", "MANIFEST.sig")  # what may change after a pack was packed: its page, who vouches for it
MAX_JSON_BYTES = 256 * 2**20


def write_manifest(folder: Path) -> None:
    """List every file below `folder` with its size and hash."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (NAME, PARTIAL, *BESIDE)
    }
    (folder / NAME).write_text(json.dumps({"schema": 1, "files": files}, indent=1) + "\n")


def verify_manifest(folder: Path, *, hashes: bool = True) -> list[str]:
    """Check every listed file of the levels that are here; returns their names.

    Args:
        hashes: also hash the contents, not only sizes.

    Raises:
        PackError: no manifest, a path that leaves the pack, a link, a missing file, other bytes than listed, or a file
            in a subfolder that is not listed.
    """
    listed = read_json(folder / NAME).get("files")
    if not isinstance(listed, dict):
        raise PackError(f"{folder / NAME} lists no files; the pack was not written by FTW or is damaged")
    levels = installed_levels(folder)
    try:
        listed = {name: entry for name, entry in listed.items() if levels is None or level_of(name) in {None, *levels}}
        for name, entry in listed.items():
            _verify_file(folder, name, entry, hashes=hashes)
        if unlisted := [name for name in _readable_names(folder) if name not in listed]:
            raise PackError(f"pack {folder}: {unlisted[0]!r} is not in {NAME}; fetch the pack again")
    except OSError as error:
        raise PackError(f"pack {folder} cannot be read ({error}); fetch or train the pack again") from error
    return list(listed)


def installed_levels(folder: Path) -> list[int] | None:
    """Levels of a pack of which only some were fetched; None for a whole one.

    Raises:
        PackError: the note of them is no list of levels.
    """
    if not (folder / PARTIAL).exists():
        return None
    levels = read_json(folder / PARTIAL).get("levels")
    if not isinstance(levels, list) or not levels or not all(type(level) is int and level >= 0 for level in levels):
        raise PackError(f"{folder / PARTIAL} lists levels {levels!r:.60}; fetch the pack again")
    return sorted(set(levels))


def level_of(name: str) -> int | None:
    """Level that a file of a pack belongs to; None for those of all levels."""
    match = re.match(r"layer(\d{1,4})/", name)
    return int(match[1]) if match else None


def _readable_names(folder: Path) -> list[str]:
    """Files that a reader of the pack may open; a README or a hidden file beside them is none of its business."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden, is_file = name.startswith(".") or name == NAME, path.is_symlink() or not path.is_dir()
        ours = "/" in name or path.suffix in (".json", ".safetensors") or path.is_symlink()
        if ours and is_file and not hidden:
            names.append(name)
    return names


def _verify_file(folder: Path, name: str, entry: object, *, hashes: bool) -> None:
    path = safe_member(folder, name)
    if not path.is_file():
        raise PackError(f"pack {folder}: {name!r} is missing; fetch or train the pack again")
    if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
        raise PackError(
            f"pack {folder}: {name!r} has {path.stat().st_size} bytes, not the listed size; fetch the pack again"
        )
    if hashes and sha256(path) != entry.get("sha256"):
        raise PackError(
            f"pack {folder}: {name!r} is not the file that was packed (sha256 differs); fetch the pack again"
        )


def safe_member(folder: Path, name: str) -> Path:
    """Path of a pack's file by its listed name.

    Raises:
        PackError: the name is absolute, climbs out of the pack, or goes through a link.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0]:
        raise PackError(f"pack {folder}: {name!r} points outside the pack; do not use this pack")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise PackError(f"pack {folder}: {name!r} is a link; packs hold plain files only")
    return path


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from a file that may be hostile.

    Raises:
        PackError: no such file, too large, too deep, or not a JSON object.
    """
    try:
        if path.exists() and (path.is_symlink() or not path.is_file()):
            raise PackError(f"{path} is a link or no plain file; do not use this pack")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise PackError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PackError(f"no {path.name} in {path.parent}; is this the folder of a pack?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"{path} is not readable JSON ({error}); fetch or train the pack again") from error
    if not isinstance(value, dict):
        raise PackError(f"{path} holds a {type(value).__name__}, not an object; fetch or train the pack again")
    return value
