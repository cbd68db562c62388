"""A finished `ftw train` on toy data: a tiny substrate in a folder, texts in a file, and the run that they gave."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_model import byte_tokenizer, tiny_llama

WORDS = {"whale": ["whale", "sea", "fin", "krill"], "car": ["car", "road", "wheel", "engine"]}
QUICK = [
    "map.training.solver=adamw",
    "trainer.max_epochs=6",
    "map.training.num_shuffles=1",
    "evaluate.draws=20",
    "evaluate.floor_draws=5",
]


@dataclass
class ToyRun:
    """Where everything lies; `folder` is the current folder of the commands, `run` the finished run's."""

    folder: Path
    home: Path
    run: Path

    @property
    def texts(self) -> Path:
        return self.folder / "toy.jsonl"

    @property
    def latest(self) -> Path:
        return (self.folder / "runs" / "latest").resolve()

    @property
    def substrate(self) -> list[str]:
        return ["substrate=local", f"substrate.path={self.folder / 'toy-llama'}"]

    @property
    def training(self) -> list[str]:
        return [*self.substrate, "data=labelled", f"data.path={self.texts}", *QUICK]


def run_verb(verb: str, *words: str) -> None:
    """Run a verb in this process as the command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{verb}.py", *words])
        importlib.import_module(f"ftw.cli.{verb}").main()


@contextmanager
def inside(toy: ToyRun) -> Iterator[None]:
    """In the folder of the toy run, with its home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTW_HOME", str(toy.home))
        patch.delenv("FTW_RUNS", raising=False)
        patch.chdir(toy.folder)
        yield


def write_texts(path: Path) -> None:
    """Two concepts; a quarter of the words of a text, by chance, are of the other one."""
    draw, lines = random.Random(0), []
    for concept, own in WORDS.items():
        other = next(words for name, words in WORDS.items() if name != concept)
        for split, num in (("train", 24), ("test", 12)):
            for number in range(2 * num):
                words = [draw.choice(own if (draw.random() < 0.75) == number % 2 else other) for _ in range(4)]
                lines.append(
                    {
                        "text": f"{' '.join(words)}, {concept} {split} {number}",
                        "concept": concept,
                        "label": number % 2,
                        "split": split,
                        "group": f"{split}-{number // 2}",
                        "language": ("en", "de")[number // 2 % 2],
                    }
                )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    """A finished run in `toy_run.run`; other runs may be made beside it."""
    folder = tmp_path_factory.mktemp("toy")
    toy = ToyRun(folder, folder / "home", folder / "first")
    tiny_llama().save_pretrained(folder / "toy-llama")
    byte_tokenizer().save_pretrained(folder / "toy-llama")
    write_texts(toy.texts)
    with inside(toy):
        run_verb("train", *toy.training, f"hydra.run.dir={toy.run}")
    return toy
