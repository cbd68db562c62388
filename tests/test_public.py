"""The public names are there, load late, and reading a pack live loads no trainer."""

import subprocess
import sys

import pytest

import ftw

TRAINERS = ("pytorch_lightning", "hydra", "omegaconf", "sklearn", "h5py", "matplotlib", "wandb", "scipy")


def loaded_after(statement: str, packages: tuple[str, ...]) -> str:
    code = f"{statement}\nimport sys; print([name for name in {packages!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ftw.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(ftw, name).__name__ == name
    assert name in dir(ftw)


def test_there_are_about_fifteen_names_and_no_others():
    assert 12 <= len(ftw.__all__) <= 18
    with pytest.raises(AttributeError, match=r"no attribute 'Lens'.*LensPack"):
        _ = ftw.Lens


def test_importing_ftw_loads_nothing():
    assert loaded_after("import ftw", ("torch", "numpy", "transformers", *TRAINERS)) == "[]"


def test_reading_live_loads_no_trainer():
    assert loaded_after("import ftw.hat.monitor, ftw.map.pack", TRAINERS) == "[]"
