"""The packs on this machine: one folder each, and `.registry.json`, which says where each came from.

A pack's record lies inside its folder and comes with it in one rename; the registry of all packs is put together from
the folders. Whatever process is killed, and when, the two cannot contradict each other.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftw import paths
from ftw.errors import PackError
from ftw.map.manifest import installed_levels, read_json
from ftw.map.verified import content_hash, hash_tree

REGISTRY = ".registry.json"
SCHEMA_VERSION = "1.0"
STAGING = ".staging"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of pack: its folder, the file that makes a folder one, and how its repositories are called."""

    word: str
    folder: str
    index: str
    prefix: str


LENS = Kind(word="lens", folder="lens_packs", index="pack_info.json", prefix="lens-")
CONCEPT = Kind(word="concept", folder="concept_packs", index="pack.json", prefix="concept-pack-")
KINDS = {kind.word: kind for kind in (LENS, CONCEPT)}


@dataclass(kw_only=True)
class PackRecord:
    """Where a pack came from and what it was then.

    Attributes:
        source: "hf://org/repository", or "local". version: semantic version.
        revision: commit on the Hub. synced_at: when it was pulled or pushed last. created_at: when it was first seen.
        modified: whether a file differs from what was pulled or pushed (for a local pack: from what it is based on).
        based_on: "name@version" of the pack that it was made from.
        size_bytes: of its files. content: hash of their names and contents, as pulled, pushed or first seen.
        levels_installed, levels_available: of the hierarchy (lens packs).
    """

    source: str
    version: str
    revision: str | None = None
    synced_at: str | None = None
    created_at: str | None = None
    modified: bool = False
    based_on: str | None = None
    size_bytes: int = 0
    content: str = ""
    levels_installed: list[int] | None = None
    levels_available: list[int] | None = None

    @property
    def repo_id(self) -> str | None:
        """Repository on the Hub, if it has one."""
        return self.source.removeprefix("hf://") if self.source.startswith("hf://") else None


class InstalledPacks:
    """All packs of a kind below a folder."""

    def __init__(self, root: Path, kind: Kind) -> None:
        self.root = root / kind.folder
        self.kind = kind

    def folder(self, name: str) -> Path:
        """Where a pack of that name is or would be.

        Raises:
            PackError: no name for a folder.
        """
        if not NAME.fullmatch(name):
            raise PackError(f"{name!r} is no name for a pack: letters, digits, dots and dashes, at most 96 of them")
        return self.root / name

    def names(self) -> list[str]:
        """Folders that hold a pack."""
        if not self.root.is_dir():
            return []
        found = (path.name for path in self.root.iterdir() if NAME.fullmatch(path.name))
        return sorted(name for name in found if (self.root / name / self.kind.index).is_file())

    def records(self) -> dict[str, PackRecord]:
        """Every pack with its record brought up to date; `.registry.json` is written anew where it says otherwise."""
        records = {name: self.record(name) for name in self.names()}
        text = _registry_text(records)
        path = self.root / REGISTRY
        if not self.root.is_dir() or (path.is_file() and path.read_text(encoding="utf-8") == text):
            return records
        with FileLock(self.root / ".registry.lock"):
            records = {name: self.record(name) for name in self.names()}
            with paths.replace_file(path) as temporary:
                temporary.write_text(_registry_text(records), encoding="utf-8")
        return records

    def record(self, name: str) -> PackRecord:
        """The record of a pack that is here; one without a record, or copied under another name, gets its own.

        Raises:
            PackError: there is none of that name, or its files cannot be read.
        """
        folder = self.folder(name)
        if not (folder / self.kind.index).is_file():
            raise PackError(
                f"no {self.kind.word} pack {name!r} under {self.root}; fetch it with: ftw pack pull {name}"
                + ("" if self.kind is LENS else " kind=concept")
            )
        content = content_hash(hash_tree(folder))
        known = _read_record(folder)
        if known is not None and name in known:
            record = known[name]
        else:
            record = self._first_seen(folder, known, content)
            write_record(folder, name, record)
        record.modified = record.content != content
        record.size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return record

    def put(self, name: str, prepared: Path, record: PackRecord) -> None:
        """Put a finished folder in the place of the pack of that name, with its record, in one step."""
        write_record(prepared, name, record)
        paths.install_folder(prepared, self.folder(name))
        self.records()

    def remove(self, name: str) -> None:
        """Delete a pack."""
        retired = self.root / STAGING / f"{name}.removed"
        retired.parent.mkdir(exist_ok=True)
        shutil.rmtree(retired, ignore_errors=True)
        self.folder(name).rename(retired)  # at once: a pack half deleted would be damaged, not gone
        shutil.rmtree(retired, ignore_errors=True)
        self.records()

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """While one process brings, changes or removes a pack, others wait."""
        self.folder(name)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{name}.lock"):
            yield

    def staging(self, name: str, commit: str) -> Path:
        """Folder where a commit of a pack is put together; what is there from a broken-off pull is used again."""
        place = self.root / STAGING
        for old in place.glob(f"{name}@*"):
            if old.name != f"{name}@{commit}":
                shutil.rmtree(old, ignore_errors=True)
        folder = place / f"{name}@{commit}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _first_seen(self, folder: Path, known: dict[str, PackRecord] | None, content: str) -> PackRecord:
        info = read_json(folder / self.kind.index)
        base = next(iter(known.items()), None) if known else None
        return PackRecord(
            source="local",
            version=str(info.get("version", "0.0.0")),
            created_at=now(),
            based_on=f"{base[0]}@{base[1].version}" if base else declared_base(info),
            content=base[1].content if base else content,
            **(levels_of(folder) if self.kind is LENS else {}),
        )


def levels_of(folder: Path) -> dict[str, Any]:
    """Levels of a lens pack that are here, and that it has.

    Raises:
        PackError: its index is damaged.
    """
    try:
        available = sorted(int(level) for level in read_json(folder / LENS.index)["levels"])
    except (LookupError, TypeError, ValueError) as error:
        raise PackError(f"pack {folder}: its index names no levels; fetch the pack again") from error
    return {"levels_installed": installed_levels(folder) or available, "levels_available": available}


def write_record(folder: Path, name: str, record: PackRecord) -> None:
    """Put a pack's record into its folder."""
    with paths.replace_file(folder / REGISTRY) as temporary:
        temporary.write_text(_registry_text({name: record}), encoding="utf-8")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _registry_text(records: dict[str, PackRecord]) -> str:
    packs = {
        name: {key: value for key, value in asdict(record).items() if value is not None}
        for name, record in records.items()
    }
    return json.dumps({"schema_version": SCHEMA_VERSION, "packs": packs}, indent=1) + "\n"


def _read_record(folder: Path) -> dict[str, PackRecord] | None:
    """Records in a pack's folder; None where there are none that can be read."""
    try:
        packs = read_json(folder / REGISTRY)["packs"]
        known = {entry.name for entry in fields(PackRecord)}
        return {name: PackRecord(**{key: packs[name][key] for key in packs[name] if key in known}) for name in packs}
    except (PackError, LookupError, TypeError, AttributeError):
        return None


def declared_base(info: dict[str, Any]) -> str | None:
    """What a pack says itself that it was made from: First Light's `forked_from`, or a provenance of FTW."""
    provenance = info.get("provenance")
    base = info.get("forked_from") or (provenance.get("based_on") if isinstance(provenance, dict) else None)
    return f"{base['pack_id']}@{base.get('version', '?')}" if isinstance(base, dict) and "pack_id" in base else None
