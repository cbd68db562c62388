"""Packs by name: those on this machine, those on the Hub, and the way between them.

What is here is used without asking the network. What comes is pinned to a commit, verified before it is installed, and
installed in one step.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftw import paths
from ftw.errors import PackError, SourceError
from ftw.map.concept import ConceptPack
from ftw.map.hub import Hub, Progress, Snapshot
from ftw.map.installed import (
    CONCEPT,
    LENS,
    REGISTRY,
    InstalledPacks,
    Kind,
    PackRecord,
    declared_base,
    levels_of,
    now,
    write_record,
)
from ftw.map.manifest import NAME as MANIFEST
from ftw.map.manifest import PARTIAL, level_of, read_json
from ftw.map.model_card import write_card
from ftw.map.pack import read_info
from ftw.map.verified import content_hash, hash_tree, verify_pack
from ftw.map.versions import Version

DEFAULT_ORG = "ftw-project"
# Bytes that nothing runs. Anything else in a repository (pickles, scripts) stays there.
INERT = (".json", ".safetensors", ".md", ".txt", ".npy", ".kif", ".csv", ".tsv", ".sig")
WITHOUT_SUFFIX = ("LICENSE", "NOTICE")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pull brings.

    Attributes:
        snapshot: the repository at its commit. names: files of it that belong to the pack.
        levels: to be brought, of those available; None for a concept pack. left: files of the repository that stay.
    """

    name: str
    snapshot: Snapshot
    names: list[str]
    levels: list[int] | None
    left: list[str]

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return self.snapshot.num_bytes(self.names)


class PackRegistry:
    """The packs of a home and of an organisation on the Hub.

    Args:
        root: folder of `lens_packs/` and `concept_packs/`; `$FTW_HOME` by default.
        org: organisation on the Hub; `$FTW_ORG`, else "ftw-project".
    """

    def __init__(self, root: Path | None = None, *, org: str | None = None, hub: Hub | None = None) -> None:
        self.root = root or paths.home()
        self.org = org or os.environ.get("FTW_ORG") or DEFAULT_ORG
        self.hub = hub or Hub()

    def packs(self, kind: Kind) -> InstalledPacks:
        """The packs of a kind on this machine."""
        return InstalledPacks(self.root, kind)

    def repo_id(self, kind: Kind, name: str) -> str:
        """Repository of a pack: where it came from, else by its name in the organisation."""
        with contextlib.suppress(PackError):
            if found := self.packs(kind).record(name).repo_id:
                return found
        return f"{self.org}/{kind.prefix}{name}"

    def listed(self, kind: Kind) -> list[dict[str, Any]]:
        """Name and record of every pack on this machine."""
        return [{"name": name, **asdict(record)} for name, record in self.packs(kind).records().items()]

    def status(self) -> list[dict[str, Any]]:
        """Every pack with `kind`, `modified`, and `outdated`: whether the Hub has moved on; None where it is not asked.

        A pack whose repository cannot be asked has the reason in `remark`.
        """
        rows = []
        for kind in (CONCEPT, LENS):
            for row in self.listed(kind):
                row |= {"kind": kind.word, "outdated": None, "latest": None, "remark": ""}
                repo_id = PackRecord(source=row["source"], version=row["version"]).repo_id
                if repo_id and Hub.is_offline():
                    row["remark"] = "HF_HUB_OFFLINE: the Hub was not asked"
                elif repo_id:
                    try:
                        latest = self.hub.commit(repo_id)
                        row["outdated"] = latest != row["revision"]
                        row["latest"] = _version_at(self.hub.versions(repo_id), latest)
                    except SourceError as error:
                        row["remark"] = str(error)
                rows.append(row)
        return rows

    # --- down ----------------------------------------------------------------------------------------------------

    def plan(
        self,
        kind: Kind,
        name: str,
        *,
        version: str | None = None,
        levels: Sequence[int] | None = None,
        repo_id: str | None = None,
    ) -> Plan:
        """What a pull would bring; asks the Hub and changes nothing.

        Raises:
            SourceError: the Hub does not have it, or not that version (those it has are named).
            PackError: the repository holds no such pack, or no such level.
        """
        self.packs(kind).folder(name)
        repo_id = repo_id or self.repo_id(kind, name)
        revision = "main" if version is None else self._commit_of(repo_id, version)
        snapshot = self.hub.snapshot(repo_id, revision)
        names = [file for file in snapshot.files if _belongs(file)]
        needed = [kind.index, MANIFEST] if kind is LENS else [kind.index]
        if missing := [file for file in needed if file not in names]:
            raise PackError(
                f"{repo_id} holds no {kind.word} pack of FTW: it has no {missing[0]}. A pack of HatCat is downloaded "
                "with the Hub's own tools and read with: ftw pack import FOLDER"
            )
        wanted = None
        if kind is LENS:
            available = sorted({level for file in names if (level := level_of(file)) is not None})
            if unknown := set(levels or []) - set(available):
                raise PackError(f"{repo_id} has no level {min(unknown)}; its levels are {available}")
            wanted = available if levels is None else sorted(set(levels))
            names = [file for file in names if level_of(file) in {None, *wanted}]
        left = [file for file in snapshot.files if not _belongs(file) and not file.startswith(".")]
        return Plan(name=name, snapshot=snapshot, names=names, levels=wanted, left=left)

    def pull(
        self,
        kind: Kind,
        name: str,
        *,
        version: str | None = None,
        levels: Sequence[int] | None = None,
        repo_id: str | None = None,
        force: bool = False,
        progress: Callable[[Plan], Progress] | None = None,
    ) -> Path:
        """Bring a pack, or further levels of one, and install it; the folder.

        Nothing is asked of the network when the wanted version is here, or when `$HF_HUB_OFFLINE` is set and any is.

        Args:
            version: a semantic version; None for the newest. levels: to be had afterwards beside those that are here.
            force: replace a pack that was changed here.

        Raises:
            SourceError, PackError: as `plan`; or what came is not the pack that the Hub lists.
            DiskFullError: no room; what was installed before is intact.
        """
        packs = self.packs(kind)
        with packs.locked(name):
            here = packs.record(name) if name in packs.names() else None
            if here is not None and not force:
                complete = set(levels or here.levels_available or []) <= set(here.levels_installed or [])
                if complete and (here.version == version or (version is None and Hub.is_offline())):
                    return packs.folder(name)
                if here.modified or here.repo_id is None:
                    raise PackError(
                        f"{kind.word} pack {name!r} was {'changed' if here.repo_id else 'made'} here; a pull would "
                        f"replace it. Rename {packs.folder(name)}, or pull with force=true"
                    )
                if levels is not None:
                    levels = sorted({*levels, *(here.levels_installed or [])})
            plan = self.plan(kind, name, version=version, levels=levels, repo_id=repo_id)
            if here is not None and _is_here(here, plan) and not (force and here.modified):
                return packs.folder(name)
            return self._install(packs, plan, version, progress(plan) if progress else None)

    def _install(self, packs: InstalledPacks, plan: Plan, version: str | None, progress: Progress | None) -> Path:
        snapshot, folder = plan.snapshot, packs.folder(plan.name)
        staging = packs.staging(plan.name, snapshot.commit)
        _clean(staging, plan.names)
        _reuse(folder, staging, snapshot, plan.names)
        self.hub.download(snapshot, plan.names, staging, progress=progress)
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's own notes
        if plan.levels is not None:
            available = levels_of(staging)["levels_available"]
            if plan.levels != available:
                (staging / PARTIAL).write_text(f'{{"levels": {plan.levels}}}\n', encoding="utf-8")
        info = check_folder(packs.kind, staging)
        found = str(info.get("version", "0.0.0"))
        if version is not None and found != version:
            raise PackError(
                f"{snapshot.repo_id} has version {found} under the tag of {version}; tell its authors, or pull "
                f"version={found}"
            )
        record = PackRecord(
            source=f"hf://{snapshot.repo_id}",
            version=found,
            revision=snapshot.commit,
            synced_at=now(),
            created_at=now(),
            based_on=declared_base(info),
            content=content_hash(hash_tree(staging)),
            **(levels_of(staging) if packs.kind is LENS else {}),
        )
        packs.put(plan.name, staging, record)
        return folder

    def _commit_of(self, repo_id: str, version: str) -> str:
        versions = self.hub.versions(repo_id)
        if version not in versions:
            known = ", ".join(sorted(versions, key=Version.sort_key)) or "none"
            raise SourceError(f"{repo_id} has no version {version}; it has {known}")
        return versions[version]

    # --- up ------------------------------------------------------------------------------------------------------

    def push(
        self, kind: Kind, name: str, *, repo_id: str | None = None, private: bool = True, message: str | None = None
    ) -> str:
        """Publish a pack as a version of its own; the commit.

        Raises:
            PackError: the pack is damaged or incomplete, its version is none or is published with other content.
            SourceError: the Hub refuses.
        """
        packs = self.packs(kind)
        with packs.locked(name):
            record, folder = packs.record(name), packs.folder(name)
            info = check_folder(kind, folder)
            version = str(Version.parse(str(info.get("version", ""))))
            if (folder / PARTIAL).exists():
                raise PackError(f"{name!r} has levels {record.levels_installed} only; pull all of them before a push")
            repo_id = repo_id or self.repo_id(kind, name)
            if kind is LENS:
                write_card(folder)
            hashes = hash_tree(folder)
            names = [file for file in hashes if _belongs(file)]
            commit = self._published(repo_id, version, names, folder) or self.hub.upload(
                folder, names, repo_id, version=version, message=message or f"Version {version}", private=private
            )
            record.source, record.revision, record.synced_at = f"hf://{repo_id}", commit, now()
            record.version, record.content = version, content_hash(hashes)
            write_record(folder, name, record)
            packs.records()
        return commit

    def _published(self, repo_id: str, version: str, names: Sequence[str], folder: Path) -> str | None:
        """Commit of a version that is published with these very files; None if the version is free."""
        try:
            commit = self.hub.versions(repo_id).get(version)
        except SourceError:  # no such repository yet, or no right to see it: creating it will tell
            return None
        if commit is None:
            return None
        snapshot = self.hub.snapshot(repo_id, commit)
        theirs = {file for file in snapshot.files if _belongs(file)}
        if theirs != set(names) or not all(snapshot.files[file].fits(folder / file) for file in names):
            raise PackError(
                f"{repo_id} has a version {version} with other content; a version never changes. Give yours the next "
                f"one ({Version.parse(version).next_patch()})"
            )
        return commit

    # --- here ----------------------------------------------------------------------------------------------------

    def adopt(self, kind: Kind, folder: Path, name: str, *, force: bool = False) -> Path:
        """Copy a pack from a folder into the registry, under a name; the new folder.

        Raises:
            PackError: it is no sound pack, or the name is taken.
        """
        packs = self.packs(kind)
        with packs.locked(name):
            if name in packs.names() and not force:
                raise PackError(f"there is a {kind.word} pack {name!r} already; choose another name, or force=true")
            check_folder(kind, folder)
            staging = packs.staging(name, "local")
            shutil.rmtree(staging)
            shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(".registry.json"))
            info = read_json(staging / kind.index)
            levels = levels_of(staging) if kind is LENS else {}
            content = content_hash(hash_tree(staging))
            record = PackRecord(
                source="local", version=str(info.get("version", "0.0.0")), created_at=now(), content=content, **levels
            )
            packs.put(name, staging, record)
        return packs.folder(name)

    def remove(self, kind: Kind, name: str, *, force: bool = False) -> None:
        """Delete a pack from this machine.

        Raises:
            PackError: there is none, or it was made or changed here and `force` is not given.
        """
        packs = self.packs(kind)
        with packs.locked(name):
            record = packs.record(name)
            if (record.repo_id is None or record.modified) and not force:
                raise PackError(f"{kind.word} pack {name!r} is nowhere else in this form; remove it with force=true")
            packs.remove(name)

    def ensure(self, kind: Kind, name: str, **wanted: Any) -> Path:
        """Folder of a pack, pulled if it is not here."""
        packs = self.packs(kind)
        version, levels = wanted.get("version"), wanted.get("levels")
        if name in packs.names():
            here = packs.record(name)
            has = version in (None, here.version) and set(levels or []) <= set(here.levels_installed or levels or [])
            if has:
                return packs.folder(name)
        return self.pull(kind, name, **wanted)


def check_folder(kind: Kind, folder: Path) -> dict[str, Any]:
    """Read a pack's index after all its files were found sound.

    Raises:
        PackError: what is wrong with it. ConceptError: of a concept pack.
    """
    if kind is CONCEPT:
        ConceptPack.load(folder, strict=False)
        return read_json(folder / kind.index)
    verify_pack(folder)
    return read_info(folder)


def _belongs(name: str) -> bool:
    path = Path(name)
    inert = path.suffix in INERT or path.name in WITHOUT_SUFFIX
    return inert and not re.search(r"(^|/)\.", name) and path.name != REGISTRY


def _is_here(record: PackRecord, plan: Plan) -> bool:
    same = record.revision == plan.snapshot.commit and record.source == f"hf://{plan.snapshot.repo_id}"
    return same and set(plan.levels or []) <= set(record.levels_installed or [])


def _clean(staging: Path, names: Sequence[str]) -> None:
    """Remove what does not belong to the pack: an older one that was exchanged, halves of a killed download."""
    kept = set(names)
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path.relative_to(staging).as_posix() not in kept):
            path.unlink()


def _reuse(folder: Path, staging: Path, snapshot: Snapshot, names: Sequence[str]) -> None:
    """Take files that an installed version has in common with the new one."""
    for name in names:
        if not (staging / name).exists() and snapshot.files[name].fits(folder / name):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)


def _version_at(versions: dict[str, str], commit: str | None) -> str | None:
    return next((version for version, at in versions.items() if at == commit), None)
