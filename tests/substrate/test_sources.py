"""What comes from outside is the promised bytes or an error that says where it was sought; it is fetched once."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ftw.errors import ConfigError, SourceError
from ftw.substrate import sources
from ftw.substrate.sources import fetch, verify

VERSION = "1.0"
CONTENT = b"lens\n" * 100


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """A wheel as an index would serve it; its code would be noticed if it ran."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{VERSION}"
    meta = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name.replace('-', '_')}/__init__.py": b"raise SystemExit('the code of a package ran')\n",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in {**members, **meta}.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return folder / f"{stem}-py3-none-any.whl"


def write_tarball(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as tarball:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tarball.addfile(info, io.BytesIO(content))
    return file


def package(archive: Path, members: dict[str, str | None], **more: Any) -> dict[str, Any]:
    name = archive.name.split("-")[0].replace("_", "-")
    own_hash = sha256(archive.read_bytes())
    return {"client": "pip", "name": name, "version": VERSION, "sha256": own_hash, "members": members, **more}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that pip really reads: a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def add_source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put an entry into the lock file's content, for this test."""
    entries = dict(sources.lock())
    monkeypatch.setattr(sources, "lock", lambda: entries)

    def add(name: str, *packages: dict[str, Any], **more: Any) -> None:
        entries[name] = {"notice": "free", **({"package": list(packages)} if packages else {}), **more}

    return add


@pytest.fixture
def toy(index: Path, add_source: Any) -> str:
    members = {"toy_data/data/a.txt": CONTENT, "toy_data/data/b.txt": b"unwanted"}
    wheel = write_wheel(index, "toy-data", members)
    add_source("toy", package(wheel, {"toy_data/data/a.txt": sha256(CONTENT)}))
    return "toy"


def test_only_the_named_members_are_unpacked_and_hashed(toy: str, own_home: Path) -> None:
    fetched = fetch(toy)
    assert fetched.address == "package"
    assert fetched.folder == own_home / "sources" / "toy" / "package"
    assert (fetched.folder / "a.txt").read_bytes() == CONTENT
    assert fetched.sha256 == {"a.txt": sha256(CONTENT)}
    assert fetched.notice == "free"
    assert {file.name for file in fetched.folder.iterdir()} == {"a.txt", sources.RECORD}


def test_a_second_call_needs_no_network(toy: str, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(toy)
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a client was started"))
    assert fetch(toy) == first
    # An address that comes later in the order but is cached goes before one that must be downloaded.
    assert fetch(toy, order=["hub", "package"]) == first


def test_a_new_version_in_the_lock_file_is_fetched_anew(toy: str, index: Path, add_source: Any) -> None:
    fetch(toy)
    wheel = write_wheel(index, "toy-data", {"toy_data/data/a.txt": b"newer"})
    add_source(toy, package(wheel, {"toy_data/data/*.txt": None}))
    assert (fetch(toy).folder / "a.txt").read_bytes() == b"newer"


def test_verify_finds_a_changed_file(toy: str) -> None:
    with pytest.raises(SourceError, match="nothing of 'toy' is cached"):
        verify(toy)
    fetched = fetch(toy)
    assert verify(toy) == {"package/a.txt": sha256(CONTENT)}
    (fetched.folder / "a.txt").write_bytes(CONTENT[:-1])
    with pytest.raises(SourceError, match=f"expected {sha256(CONTENT)}"):
        verify(toy)


@pytest.mark.parametrize("wrong", ["archive", "member"])
def test_wrong_checksums_are_refused_and_leave_nothing(
    wrong: str, index: Path, add_source: Any, own_home: Path
) -> None:
    wheel = write_wheel(index, "toy-data", {"toy_data/a.txt": CONTENT})
    entry = package(wheel, {"toy_data/a.txt": sha256(b"other") if wrong == "member" else None})
    add_source("toy", {**entry, "sha256": sha256(b"other")} if wrong == "archive" else entry)
    with pytest.raises(SourceError, match="wrong checksum"):
        fetch("toy")
    assert [path.name for path in (own_home / "sources" / "toy").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("member", ["../../evil.txt", "/evil.txt", "toy_data/../../evil.txt", "toy_data\\..\\evil.txt"])
def test_members_that_leave_their_folder_are_refused(member: str, tmp_path: Path) -> None:
    (target := tmp_path / "out").mkdir()
    wheel = write_wheel(tmp_path / "index", "toy-data", {member: b"evil"})
    tarball = write_tarball(tmp_path / "toy.tgz", {member: b"evil"})
    for archive in (wheel, tarball):
        with pytest.raises(SourceError, match="would leave its folder"):
            sources._unpack(archive, {"*evil.txt": None}, target)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_two_files_of_one_name_and_missing_members_are_refused(tmp_path: Path) -> None:
    (target := tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "link.tgz", "w:gz") as tarball:
        link = tarfile.TarInfo("package/a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tarball.addfile(link)
    with pytest.raises(SourceError, match=r"has no package/a\.txt"):
        sources._unpack(tmp_path / "link.tgz", {"package/a.txt": None}, target)
    twice = write_tarball(tmp_path / "twice.tgz", {"package/x/a.txt": b"1", "package/y/a.txt": b"2"})
    with pytest.raises(SourceError, match="hide another"):
        sources._unpack(twice, {"package/*": None}, target)


def test_sizes_are_limited_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target := tmp_path / "out").mkdir()
    monkeypatch.setattr(sources, "MEMBER_BYTES", 10)
    tarball = write_tarball(tmp_path / "toy.tgz", {"package/a.txt": CONTENT})
    with pytest.raises(SourceError, match="the limit is 10"):
        sources._unpack(tarball, {"package/a.txt": None}, target)
    assert list(target.iterdir()) == []


def test_a_damaged_archive_is_said_to_be_damaged(tmp_path: Path) -> None:
    tarball = write_tarball(tmp_path / "toy.tgz", {"package/a.txt": os.urandom(50_000)})
    tarball.write_bytes(tarball.read_bytes()[:20_000])
    (tmp_path / "toy.whl").write_bytes(b"PK\x03\x04 and no more")
    (target := tmp_path / "out").mkdir()
    for archive in ("toy.tgz", "toy.whl"):
        with pytest.raises(SourceError, match="damaged"):
            sources._unpack(tmp_path / archive, {"package/a.txt": None}, target)


def test_parts_of_a_split_file_are_joined_in_order(index: Path, add_source: Any) -> None:
    halves = [CONTENT[:123], CONTENT[123:]]
    wheels = [write_wheel(index, f"part{i}", {f"part{i}/big.part0{i}": half}) for i, half in enumerate(halves)]
    join = {"big.bin": {"parts": "big.part0?", "sha256": sha256(CONTENT)}}
    entries = [package(wheel, {f"part{i}/*.part0{i}": None}) for i, wheel in enumerate(wheels)]
    add_source("big", {**entries[0], "join": join}, entries[1])
    fetched = fetch("big")
    assert (fetched.folder / "big.bin").read_bytes() == CONTENT
    assert list(fetched.sha256) == ["big.bin"]


def test_the_error_lists_every_address_with_its_reason(index: Path, add_source: Any, monkeypatch: Any) -> None:
    absent = {"client": "pip", "name": "not-there", "version": "1.0", "sha256": "", "members": {}}
    add_source("toy", absent, hub={"repo": "no-such-org/no-such-repo", "revision": "main"})
    with pytest.raises(SourceError) as caught:
        fetch("toy")
    message = str(caught.value)
    assert "package: pip could not download not-there==1.0" in message
    assert "hub: no-such-org/no-such-repo" in message
    assert "path: none given" in message
    with pytest.raises(ConfigError, match="path, package, hub"):
        fetch("toy", order=["pypi"])


def test_missing_clients_say_what_to_install(add_source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"client": "npm", "name": "toy", "version": "1.0", "sha256": "", "members": {}}
    add_source("toy", entry)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="npm is not installed"):
        fetch("toy")
    add_source("toy", {**entry, "client": "pip"})
    monkeypatch.setattr(sources.util, "find_spec", lambda _: None)
    with pytest.raises(SourceError, match="ensurepip"):
        fetch("toy")


@pytest.mark.skipif(sources.shutil.which("npm") is None, reason="npm is not installed")
def test_npm_tarballs_are_packed_by_npm_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npm packs a folder offline; the tarball has npm's own layout."""
    (source := tmp_path / "toy").mkdir()
    (source / "package.json").write_text(json.dumps({"name": "toy", "version": "1.0.0"}))
    (source / "a.txt").write_bytes(CONTENT)
    (downloads := tmp_path / "downloads").mkdir()
    command = ["npm", "pack", str(source), "--pack-destination", str(downloads), "--ignore-scripts", "--offline"]
    archive = sources._run_client("npm", command, downloads, "*.tgz")
    (target := tmp_path / "out").mkdir()
    sources._unpack(archive, {"package/a.txt": sha256(CONTENT)}, target)
    assert (target / "a.txt").read_bytes() == CONTENT


def test_a_local_folder_is_used_as_it_is(toy: str, tmp_path: Path) -> None:
    (folder := tmp_path / "mine").mkdir()
    (folder / "a.txt").write_bytes(CONTENT)
    fetched = fetch(toy, path=str(folder))
    assert (fetched.folder, fetched.address, fetched.sha256) == (folder, "path", {"a.txt": sha256(CONTENT)})
    assert fetch(str(folder)).folder == folder
    (folder / "a.txt").write_bytes(b"something else")
    with pytest.raises(SourceError, match=f"'toy' is {sha256(CONTENT)}"):
        fetch(toy, path=str(folder))
    with pytest.raises(SourceError, match="does not exist"):
        fetch(toy, path=str(tmp_path / "nowhere"))


FETCH_SLOWLY = """
import sys, time
from ftw.substrate import sources
sources.lock = lambda: {"toy": {"notice": "", "package": [{}]}}
def fill(packages, folder):
    (folder / "a.txt").write_text("half")
    print("half way", flush=True)
    time.sleep(60)
sources._from_packages = fill
sources.fetch("toy")
"""


def test_a_killed_download_leaves_no_half_cache_and_its_rest_is_cleared(toy: str, own_home: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", FETCH_SLOWLY], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    folder = own_home / "sources" / "toy"
    assert not (folder / "package").exists()
    assert list(folder.glob(".package.*.tmp"))
    assert (fetch(toy).folder / "a.txt").read_bytes() == CONTENT
    assert not list(folder.glob(".package.*.tmp"))


def test_the_lock_file_pins_every_archive_and_names_no_host() -> None:
    text = Path(sources.__file__).with_name("sources.lock.json").read_text()
    assert "://" not in text
    for name, entry in json.loads(text).items():
        assert entry["notice"], name
        for one in entry["package"]:
            assert len(one["sha256"]) == 64
            assert one["client"] in ("pip", "npm")
