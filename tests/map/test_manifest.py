"""A manifest vouches for every file that is read, and its reader opens nothing outside of the pack."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from ftw.errors import PackError
from ftw.map import manifest
from ftw.map.manifest import read_json, safe_member, sha256, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    (folder / "layer0").mkdir(parents=True)
    (folder / "info.json").write_text("{}")
    (folder / "layer0" / "lenses.safetensors").write_bytes(bytes(range(256)))
    write_manifest(folder)
    return folder


def relist(folder: Path, name: str, entry: object = None) -> None:
    listed = json.loads((folder / manifest.NAME).read_text())
    listed["files"][name] = entry or {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / manifest.NAME).write_text(json.dumps(listed))


def test_what_was_written_verifies(folder: Path):
    assert sorted(verify_manifest(folder)) == ["info.json", "layer0/lenses.safetensors"]
    assert sha256(folder / "info.json") == hashlib.sha256(b"{}").hexdigest()


def test_a_readme_or_a_hidden_file_beside_the_pack_is_harmless(folder: Path):
    (folder / "README.md").write_text("hello")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    assert "README.md" not in verify_manifest(folder)


@pytest.mark.parametrize("name", ["text.json", "basis.safetensors", "layer0/more", "hierarchy/pack.json"])
def test_a_file_that_nobody_vouches_for_is_refused(folder: Path, name: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(PackError, match="is not in MANIFEST"):
        verify_manifest(folder)


def test_every_changed_byte_and_length_is_seen(folder: Path):
    path = folder / "layer0" / "lenses.safetensors"
    whole = path.read_bytes()
    for place in range(0, 256, 17):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(PackError, match="sha256 differs"):
            verify_manifest(folder)
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(PackError, match="not the listed size"):
            verify_manifest(folder)
    path.unlink()
    with pytest.raises(PackError, match="is missing"):
        verify_manifest(folder)


OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "..", "", ".", "c:/x", "a\\b", "layer0/../../x", "//x"]
ODD = ["x" * 5000, "a/" * 3000, "nul\0", "\ud800", "info.json/below", "layer0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_pack_is_refused(folder: Path, name: str):
    with pytest.raises(PackError, match="outside the pack"):
        safe_member(folder, name)
    relist(folder, name)
    with pytest.raises(PackError, match="outside the pack"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name[:12]))
def test_a_name_that_no_file_can_have_is_refused(folder: Path, name: str):
    relist(folder, name)
    with pytest.raises(PackError):
        verify_manifest(folder)


@pytest.mark.parametrize("entry", [7, "x", [], {"bytes": 2}, {"bytes": "2"}, {"bytes": 2, "sha256": 5}], ids=str)
def test_an_entry_that_says_nothing_is_refused(folder: Path, entry: object):
    relist(folder, "info.json", entry)
    with pytest.raises(PackError, match=r"info\.json"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["info.json", "layer0", manifest.NAME])
def test_a_link_is_refused(folder: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(PackError, match="link"):
        verify_manifest(folder)


def test_a_pipe_or_a_device_is_not_waited_for(folder: Path):
    (folder / manifest.NAME).unlink()
    os.mkfifo(folder / manifest.NAME)
    with pytest.raises(PackError, match="no plain file"):
        verify_manifest(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 9999, b'{"files": []}', b"{}"],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_no_manifest_is_a_pack_error(folder: Path, content: bytes):
    (folder / manifest.NAME).write_bytes(content)
    with pytest.raises(PackError):
        verify_manifest(folder)


def test_json_beyond_the_limit_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 1)
    with pytest.raises(PackError, match="at most 1 are read"):
        read_json(folder / "info.json")


def test_a_folder_that_is_no_pack_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(PackError):
            verify_manifest(path)
