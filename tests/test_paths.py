"""A file or folder is there whole, old or new, whatever happens to the writer."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftw import paths
from ftw.errors import DiskFullError, FTWError


class Broken(Exception):
    pass


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_replaced_file_is_the_new_one_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "deep" / "x.txt"
    for text in ("old", "new"):
        with paths.replace_file(path) as temporary:
            assert not path.exists() or path.read_text() == "old"
            temporary.write_text(text)
    assert contents(tmp_path) == {"deep/x.txt": "new"}


def test_a_replaced_folder_is_the_new_one_and_nothing_of_the_old(tmp_path: Path):
    path = tmp_path / "pack"
    for name in ("old", "new"):
        with paths.replace_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert contents(tmp_path) == {"pack/sub/new": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack"]


def write_half(replace: Callable, target: Path, error: BaseException) -> None:
    with replace(target) as temporary:
        (temporary if replace is paths.replace_file else temporary / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")], ids=repr)
def test_an_exception_leaves_the_old_content(tmp_path: Path, error: BaseException):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a").write_text("old")
    for replace in (paths.replace_file, paths.replace_folder):
        target = tmp_path / "pack" / "a" if replace is paths.replace_file else tmp_path / "pack"
        with pytest.raises(type(error)):
            write_half(replace, target, error)
    assert contents(tmp_path) == {"pack/a": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_folder_and_the_remedy(tmp_path: Path, number: int):
    (tmp_path / "x").write_text("old")
    for replace in (paths.replace_file, paths.replace_folder):
        with pytest.raises(DiskFullError, match=f"{tmp_path}.*Free some space"), replace(tmp_path / "x"):
            raise OSError(number, "full")
    assert contents(tmp_path) == {"x": "old"}


def test_where_two_folders_cannot_be_swapped_in_one_step_the_old_one_survives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "pack"
    path.mkdir()
    (path / "a").write_text("old")
    monkeypatch.setattr(paths.ctypes, "CDLL", lambda *_, **__: object())
    with paths.replace_folder(path) as temporary:
        (temporary / "a").write_text("new")
    assert contents(tmp_path) == {"pack/a": "new"}
    rename = Path.rename

    def fails_once(self: Path, target: Path) -> Path:
        if target == path and self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError), paths.replace_folder(path) as temporary:
        (temporary / "a").write_text("newer")
    assert contents(tmp_path) == {"pack/a": "new"}


def test_a_link_is_replaced_not_followed(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with paths.replace_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("new")
    assert contents(tmp_path / "link") == {"a": "new"}
    assert contents(tmp_path / "real") == {"a": "old"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


WRITER = """
import sys
from pathlib import Path
from ftw.paths import replace_folder
for turn in range(10**9):
    with replace_folder(Path(sys.argv[1])) as folder:
        for name in "abc":
            (folder / name).write_text(str(turn))
    print(turn, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_one_whole_folder(tmp_path: Path):
    path = tmp_path / "pack"
    for turn in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.003 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        whole = contents(path)
        assert whole.keys() == {"a", "b", "c"}
        assert len(set(whole.values())) == 1


def test_home_is_what_the_variable_says_and_is_made(own_home: Path, monkeypatch: pytest.MonkeyPatch):
    assert paths.home() == own_home
    assert own_home.is_dir()
    monkeypatch.setenv("FTW_HOME", "~/x")
    monkeypatch.setenv("HOME", str(own_home))
    assert paths.home() == own_home / "x"
    (own_home / "file").write_text("")
    monkeypatch.setenv("FTW_HOME", str(own_home / "file" / "below"))
    with pytest.raises(FTWError, match="set FTW_HOME to a folder you can write"):
        paths.home()


def test_runs_are_in_the_current_folder_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FTW_RUNS", raising=False)
    assert paths.runs() == Path(os.getcwd()) / "runs"  # noqa: PTH109
    monkeypatch.setenv("FTW_RUNS", str(tmp_path / "elsewhere"))
    assert paths.runs() == tmp_path / "elsewhere"


def test_configuration_is_found():
    assert (paths.conf() / "train.yaml").is_file()
