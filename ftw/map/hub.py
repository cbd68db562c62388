"""The Hugging Face Hub as a place for packs: what a repository holds at a commit, down and up.

Everything is pinned: a branch or tag becomes a commit once, and all files are those of that commit. What came is
compared with the hashes that the Hub lists for it before anyone reads it. A token comes from `$HF_TOKEN` alone.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ftw import paths
from ftw.errors import DiskFullError, PackError, SourceError
from ftw.map.manifest import sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_FILES = 20_000
MAX_BYTES = 1 << 40
CHUNK_BYTES = 1 << 20
Progress = Callable[[str, int], None]  # file and bytes of it that have come since the last call


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as the Hub lists it: its size, its sha256 if it is stored apart (LFS), and git's hash of it otherwise."""

    num_bytes: int
    sha256: str | None
    git_hash: str

    def fits(self, path: Path) -> bool:
        """Whether a local file is this one."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        return sha256(path) == self.sha256 if self.sha256 else _git_hash(path) == self.git_hash


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The files of a repository at one commit."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]

    def num_bytes(self, names: Sequence[str]) -> int:
        """Size of some of its files."""
        return sum(self.files[name].num_bytes for name in names)


class Hub:
    """A Hub, by default the one that `$HF_ENDPOINT` names.

    Raises (all methods):
        SourceError: the Hub cannot be reached, refuses, or does not have it; the message says which and what to do.
    """

    def __init__(self, *, endpoint: str | None = None) -> None:
        self.endpoint = endpoint or os.environ.get("HF_ENDPOINT")

    @staticmethod
    def is_offline() -> bool:
        """Whether `$HF_HUB_OFFLINE` forbids to ask."""
        from huggingface_hub import constants

        return constants.is_offline_mode()

    def snapshot(self, repo_id: str, revision: str = "main") -> Snapshot:
        """What a repository holds at a branch, tag or commit, file names checked.

        Raises:
            PackError: a file name that leaves the folder, two that one file system could not tell apart, or too many.
        """
        from huggingface_hub.hf_api import RepoFile

        with self._explained(f"{repo_id} at {revision}"):
            commit = self._api.repo_info(repo_id, revision=revision).sha
            if not commit:
                raise SourceError(f"{repo_id} at {revision}: the Hub names no commit; try again later")
            files: dict[str, RemoteFile] = {}
            for entry in self._api.list_repo_tree(repo_id, recursive=True, revision=commit):
                if isinstance(entry, RepoFile):
                    digest = entry.lfs.sha256 if entry.lfs else None
                    files[entry.path] = RemoteFile(num_bytes=entry.size, sha256=digest, git_hash=entry.blob_id)
                if len(files) > MAX_FILES:
                    raise PackError(f"{repo_id} has more than {MAX_FILES:,} files; a pack has fewer than 50")
        _check_names(repo_id, files)
        return Snapshot(repo_id=repo_id, commit=commit, files=files)

    def versions(self, repo_id: str) -> dict[str, str]:
        """Commit of each version: the tags "v1.2.0", without their v."""
        with self._explained(repo_id):
            tags = self._api.list_repo_refs(repo_id).tags
        return {tag.name.removeprefix("v"): tag.target_commit for tag in tags}

    def commit(self, repo_id: str, revision: str = "main") -> str | None:
        """Commit that a branch or tag stands at."""
        with self._explained(f"{repo_id} at {revision}"):
            return self._api.repo_info(repo_id, revision=revision).sha

    def repositories(self, org: str, prefix: str) -> list[str]:
        """Repositories of an organisation whose name begins so."""
        with self._explained(org):
            found = [model.id for model in self._api.list_models(author=org, search=prefix)]
        return sorted(name for name in found if name.startswith(f"{org}/{prefix}"))

    def download(
        self, snapshot: Snapshot, names: Sequence[str], folder: Path, *, progress: Progress | None = None
    ) -> None:
        """Bring files of a snapshot into a folder; those that are there already stay.

        Raises:
            DiskFullError: there is no room for them. PackError: other bytes came than the Hub lists.
        """
        missing = [name for name in names if not snapshot.files[name].fits(folder / name)]
        if progress:
            for name in set(names) - set(missing):
                progress(name, snapshot.files[name].num_bytes)
        needed, free = snapshot.num_bytes(missing), shutil.disk_usage(folder).free
        if needed > free:
            raise DiskFullError(
                f"{snapshot.repo_id}: {needed / 1e6:,.0f} MB are to come and {free / 1e6:,.0f} MB are free on the disk "
                f"of {folder.parent}; free some space, or set FTW_HOME to another disk"
            )
        for name in missing:
            (folder / name).unlink(missing_ok=True)
            with self._explained(f"{name} of {snapshot.repo_id}"), paths.explain_full_disk(folder):
                self._fetch(snapshot, name, folder, progress)
            if not snapshot.files[name].fits(folder / name):
                (folder / name).unlink(missing_ok=True)
                raise PackError(
                    f"{name} of {snapshot.repo_id} is not the file that the Hub lists (hash differs): damaged on the "
                    "way, or exchanged; nothing was installed. Try again, and tell its authors if it stays so"
                )

    def _fetch(self, snapshot: Snapshot, name: str, folder: Path, progress: Progress | None) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            snapshot.repo_id,
            name,
            revision=snapshot.commit,
            local_dir=folder,
            endpoint=self.endpoint,
            token=_token(),
            tqdm_class=_bar(lambda num: progress(name, num)) if progress else _bar(lambda _: None),
        )

    def upload(
        self, folder: Path, names: Sequence[str], repo_id: str, *, version: str, message: str, private: bool = True
    ) -> str:
        """Put files into a repository as one commit, tagged with the version; the commit.

        Files of an earlier version that are not among the names are deleted in the same commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._explained(repo_id), _quiet():
            self._api.create_repo(repo_id, private=private, exist_ok=True)
            there = self.snapshot(repo_id)
            stale = [name for name in there.files if name not in names and name != ".gitattributes"]
            operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
            changed = [name for name in names if name not in there.files or not there.files[name].fits(folder / name)]
            operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in changed]
            # The parent is named, so that a push of somebody else in between is a conflict and not overwritten.
            commit = there.commit
            if operations:
                commit = self._api.create_commit(
                    repo_id, operations, commit_message=message, parent_commit=there.commit
                ).oid
            self._api.create_tag(repo_id, tag=f"v{version}", revision=commit)
        return commit

    @property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=_token())

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say in one sentence what the Hub's client reports in ten kinds of error."""
        from huggingface_hub import errors

        try:
            yield
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
            raise SourceError(f"{what}: {_reason(error)}") from error
        except OSError as error:
            if error.errno is not None and not isinstance(error, ConnectionError):
                raise  # of the disk, not of the network
            raise SourceError(f"{what}: {_first_line(error)}; run the same command again to go on") from error
        except (errors.OfflineModeIsEnabled, RuntimeError, ValueError) as error:
            raise SourceError(f"{what}: {_reason(error)}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "hf_xet"):
                raise
            raise SourceError(
                f"{what}: the Hub cannot be reached ({_first_line(error)}); check the network and run the same "
                "command again: what has come is kept"
            ) from error


_ADVICE = {
    401: "the Hub asks who you are; set HF_TOKEN to a token that may read it (the repository may also not exist)",
    403: "your token may not do this; ask its owner for access, or set HF_TOKEN to another one",
    404: "there is no such repository, version or file; check the name, or set HF_TOKEN if it is private",
    409: "somebody else changed the repository in the meantime; run the same command again",
    412: "somebody else changed the repository in the meantime; run the same command again",
    429: "the Hub is asked too often; wait some minutes and run the same command again: what has come is kept",
}


def _reason(error: BaseException) -> str:
    """What went wrong and what to do, from the status that lies somewhere in a chain of errors."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "not here, and HF_HUB_OFFLINE forbids to ask the Hub; unset it to fetch"
        if isinstance(cause, errors.GatedRepoError):
            return "it is gated; accept its conditions on the Hub, then set HF_TOKEN"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            sick = f"the Hub is not well (status {status}); run the same command again later: what has come is kept"
            return _ADVICE.get(status, sick if status >= 500 else f"the Hub refuses with status {status}")
        cause = cause.__cause__ or cause.__context__
    return f"{_first_line(error)}; check the name and the network"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _token() -> str | bool:
    """`$HF_TOKEN`, or none: what another tool left on the disk was not given to FTW."""
    return os.environ.get("HF_TOKEN") or False


def _check_names(repo_id: str, files: Mapping[str, RemoteFile]) -> None:
    folded: dict[str, str] = {}
    for name, file in files.items():
        parts = PurePosixPath(name).parts
        climbs = name.startswith("/") or "\\" in name or ":" in name or any(part in ("..", ".") for part in parts)
        if not parts or climbs or not name.isprintable():
            raise PackError(f"{repo_id}: the file name {name!r} leads out of its folder; do not use this pack")
        if not 0 <= file.num_bytes <= MAX_BYTES:
            raise PackError(f"{repo_id}: {name} claims {file.num_bytes:,} bytes; do not use this pack")
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise PackError(f"{repo_id}: {other} and {name} differ by case alone, which not every disk can hold")


def _git_hash(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _bar(report: Callable[[int], None]) -> Any:
    """A class that takes the place of tqdm, which would draw a bar of its own into ours."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

    return Bar


@contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()
