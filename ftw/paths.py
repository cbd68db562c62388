"""Where things live, and how a file comes to be there whole or not at all.

`$FTW_HOME` holds what is fetched or computed once (sources, converted models, encyclopedias). `runs/` in the current
folder holds what a command leaves. Every writer in FTW goes through `replace_file` or `replace_folder`: a killed
process leaves the old content or the new one, never half.
"""

import contextlib
import ctypes
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
    """Yield a temporary folder beside `path`; on success flush it to disk and put it in the place of `path`.

    Raises:
        DiskFullError: the disk has no room; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with explain_full_disk(path):
            yield temporary
            _put(temporary, path)
    finally:
        _discard(temporary)


def install_folder(prepared: Path, path: Path) -> None:
    """Put a finished folder in the place of `path`, on the same disk; `prepared` is gone afterwards.

    Raises:
        DiskFullError: the disk has no room; `path` is as it was.
    """
    with explain_full_disk(path):
        _put(prepared, path)
    _discard(prepared)


def _put(prepared: Path, path: Path) -> None:
    """Flush a folder to disk and put it in the place of `path`; `prepared` then holds what was there, if anything."""
    _sync_tree(prepared)
    if path.exists():
        _exchange(prepared, path)
    else:
        prepared.rename(path)
    sync_folder(path.parent)


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # what stood in the place of a folder was a link or a file
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, so that at no moment there is none.

    Where the system cannot (renameat2 is Linux's), two renames come close: a kill between them leaves the old folder
    under a hidden name beside.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        renameat2 = None
    at_cwd, exchange = -100, 2
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return
    retired = other.with_name(f"{one.name}.old")
    other.rename(retired)
    try:
        one.rename(other)
    except BaseException:
        retired.rename(other)
        raise
    retired.rename(one)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            if not file.is_symlink():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
