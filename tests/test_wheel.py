"""The wheel holds what it needs: it works in an empty folder, without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the freshly built wheel is installed in."""
    dist, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("target")
    build = ["build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)
    return target


def ftw(installed: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_configuration_templates_and_lock_file_and_no_tests(installed: Path):
    files = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    needed = {"conf/train.yaml", "substrate/sources.lock.json", "ui/templates/report.html.j2", "__main__.py"}
    assert {f"ftw/{path}" for path in needed} <= files
    here = {file.relative_to(ROOT / "conf").as_posix() for file in (ROOT / "conf").rglob("*.yaml")}
    assert {path.removeprefix("ftw/conf/") for path in files if path.startswith("ftw/conf/")} == here
    assert not [path for path in files if path.startswith(("tests", "conf", "notebooks"))]


def test_an_installed_ftw_works_in_an_empty_folder(installed: Path):
    assert ftw(installed, "-c", "import ftw; print(ftw.__file__)").strip() == str(installed / "ftw" / "__init__.py")
    assert "kind: wordnet" in ftw(installed, "-m", "ftw", "train", "--cfg", "job")
    assert "action=show" in ftw(installed, "-m", "ftw", "concepts", "--help")
    assert list(Path.cwd().iterdir()) == []
