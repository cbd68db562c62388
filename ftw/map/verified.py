"""Hashes of a pack's files, computed once: known under `home()` while a file's size, times and inode stay the same.

What was found out about files (the concepts of a level) is remembered beside them, and forgotten with them.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ftw import paths
from ftw.errors import PackError
from ftw.map.manifest import BESIDE, NAME, read_json, sha256, verify_manifest

# A clock of the file system may stand still for some milliseconds, in which a file could change unseen.
SETTLED_SECONDS = 0.1


class Verified:
    """What is known of the files below a folder.

    Attributes:
        facts: what else is known while no file changes; JSON.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._files: dict[str, list[Any]] = {}
        try:
            known = json.loads(_cache_file(folder).read_text(encoding="utf-8"))
            if known["schema"] == 2:
                self._files, self.facts = dict(known["files"]), dict(known["facts"])
        except (OSError, ValueError, LookupError, TypeError):  # not there, or not ours: everything is hashed again
            pass

    def sha256(self, name: str) -> tuple[str, bool]:
        """Hash of a file, and whether it had to be computed."""
        path = self.folder / name
        state = _state(path)
        known = self._files.get(name)
        if known and known[:-1] == state:
            return str(known[-1]), False
        self.facts = {}
        self._files.pop(name, None)
        digest = sha256(path)
        if time.time_ns() - max(state[1], state[2]) > SETTLED_SECONDS * 1e9 and _state(path) == state:
            self._files[name] = [*state, digest]
        return digest, True

    def keep(self, names: Collection[str]) -> None:
        """Remember what is known; the facts only if none of these files has changed just now."""
        facts = self.facts if all(name in self._files for name in names) else {}
        known = {"schema": 2, "files": self._files, "facts": facts}
        with paths.replace_file(_cache_file(self.folder)) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")


def verify_pack(folder: Path, *, only: Collection[str] | None = None) -> tuple[Verified, list[str]]:
    """Check the files of a pack against its manifest, hashing only what has changed since it was hashed last.

    Args:
        only: names of files whose content is checked, None for all; sizes and names are checked of all.

    Returns:
        What is known of the files, and their names.

    Raises:
        PackError: as `verify_manifest`.
    """
    folder = folder.absolute()
    names = verify_manifest(folder, hashes=False)
    listed = read_json(folder / NAME)["files"]
    known, changed = Verified(folder), False
    try:
        for name in names if only is None else [name for name in names if name in only]:
            digest, computed = known.sha256(name)
            if digest != listed[name].get("sha256"):
                raise PackError(
                    f"pack {folder}: {name!r} is not the file that was packed (sha256 differs); fetch the pack again"
                )
            changed |= computed
    except OSError as error:
        raise PackError(f"pack {folder} cannot be read ({error}); fetch or train the pack again") from error
    if changed:
        known.keep(names)
    return known, names


def hash_tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by path inside it, hidden ones left out; links are refused.

    Raises:
        PackError: a link, or a file that cannot be read.
    """
    folder = folder.absolute()
    names = list(_files(folder))
    known = Verified(folder)
    try:
        hashes = {name: known.sha256(name) for name in names}
    except OSError as error:
        raise PackError(f"pack {folder} cannot be read ({error}); fetch it again") from error
    if any(computed for _, computed in hashes.values()):
        known.keep(names)
    return {name: digest for name, (digest, _) in hashes.items()}


def content_hash(hashes: dict[str, str]) -> str:
    """One hash for the names and contents of a folder; a page or a signature beside the pack do not change it."""
    counted = sorted((name, digest) for name, digest in hashes.items() if name not in BESIDE)
    return hashlib.sha256(json.dumps(counted, separators=(",", ":")).encode()).hexdigest()


def _files(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(".") or "/." in name:
            continue
        if path.is_symlink():
            raise PackError(f"pack {folder}: {name!r} is a link; packs hold plain files only")
        if path.is_file():
            yield name


def _state(path: Path) -> list[int]:
    """What changes when a file does; the time of change, unlike that of modification, cannot be set."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache_file(folder: Path) -> Path:
    return paths.home() / "verified" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
