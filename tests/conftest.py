"""What every test stands on: a tiny random language model with a real tokenizer, and a home of its own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch
from toy_model import byte_tokenizer, tiny_llama

from ftw.substrate.model import Substrate

# Tests run side by side on few cores: threads that wait for each other would take most of the time.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_substrate() -> Substrate:
    return Substrate.from_model(tiny_llama(), byte_tokenizer(), name="tiny-llama")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty `$FTW_HOME` and runs in an empty folder."""
    folder = tmp_path / "home"
    monkeypatch.setenv("FTW_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder
