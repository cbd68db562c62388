"""Where things live, and how a file comes to be there whole or not at all.

`$FTW_HOME` holds what is fetched or computed once (sources, converted models, encyclopedias). `runs/` in the current
folder holds what a command leaves. Every writer in FTW goes through `replace_file` or `replace_folder`: a killed process
leaves the old content or the new one, never half.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from ftw.errors import DiskFullError, FTWError


def home() -> Path:
    """Folder for sources, models and encyclopedias: `$FTW_HOME`, else the user's cache folder."""
    path = Path(os.environ.get("FTW_HOME") or platformdirs.user_cache_dir("ftw")).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FTWError(f"cannot create {path}: {error.strerror}; set FTW_HOME to a folder you can write") from error
    return path


def runs() -> Path:
    """Folder of results: `$FTW_RUNS`, else `runs/` in the current folder."""
    return Path(os.environ.get("FTW_RUNS") or "runs").expanduser().absolute()


def conf() -> Path:
    """Folder of the Hydra configuration: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FTWError(f"no configuration beside {package}; reinstall with: pip install --force-reinstall ftw-lenses")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success flush it to disk and rename it over `path`.

    Raises:
        DiskFullError: the disk has no room; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explain_full_disk(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it to `path`, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with explain_full_disk(path):
            yield temporary
            retired = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            if path.exists():
                path.rename(retired)
            temporary.rename(path)
            sync_folder(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into an error that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        # h5py reports a full disk as an OSError without errno, with the system's words in the text.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFullError(
                f"no room on the disk of {path.parent}; nothing finished was lost. "
                "Free some space (or set FTW_HOME to another disk) and run the same command again"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
