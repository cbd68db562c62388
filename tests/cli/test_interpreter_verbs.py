"""`ftw train experiment=interpreter` and `ftw interpret` on toy data: what is written, read and refused."""

import json
import time
from pathlib import Path

import pytest
from pytorch_lightning.loggers import WandbLogger
from toy_rows import toy_fit, toy_rows
from toy_run import ToyRun, inside, run_verb

from ftw.cli._interpreter import evaluate_run
from ftw.cli._schema_train import MapNode, TrainJob
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter
from ftw.map.training.interpreter import train_interpreter
from ftw.map.training.interpreter_task import InterpreterTrainingConfig
from ftw.ui.steps import Steps

SMALL = [
    "experiment=interpreter",
    "data=labelled",
    "layers=[0.3,0.6]",
    "model.width=16",
    "model.feedforward=32",
    "trainer.max_epochs=2",
    "map.interpreter.batch=16",
    "evaluate.draws=20",
]


def words_of(toy: ToyRun, *more: str) -> list[str]:
    return [*SMALL, *toy.substrate, f"data.path={toy.texts}", *more]


@pytest.fixture(scope="module")
def trained(toy_run: ToyRun) -> ToyRun:
    run = ToyRun(toy_run.folder, toy_run.home, toy_run.folder / "interpreter-run")
    with inside(toy_run):
        run_verb("train", *words_of(toy_run, f"hydra.run.dir={run.run}"))
    return run


def test_a_run_leaves_interpreter_figures_configuration_and_checkpoint(trained: ToyRun) -> None:
    assert Interpreter.load(trained.run / "interpreter").names == ["whale", "car"]
    found = json.loads((trained.run / "metrics.json").read_text())
    systems = found["all"]["systems"]
    assert set(systems) == {
        "interpreter",
        "linear softmax",
        "linear, whitened",
        "nearest mean",
        "TF-IDF",
        "chance",
    }
    assert systems["chance"]["top1"] == 0.5
    assert 0 <= systems["interpreter"]["top1"] <= 1
    assert "minus" in systems["TF-IDF"]
    assert (trained.run / "checkpoints" / "last.ckpt").is_file()
    assert "similarity: 0" in (trained.run / "config.yaml").read_text()


def test_a_text_is_interpreted_as_a_table_and_as_json(trained: ToyRun, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*trained.substrate, f"interpreter={trained.run}/interpreter", "text=whale sea fin"]
    with inside(trained):
        run_verb("interpret", *words)
        table = capsys.readouterr().out
        run_verb("interpret", *words, "--json")
        record = json.loads(capsys.readouterr().out)
    assert "confidence" in table
    assert "whale" in table
    assert {one["concept"] for one in record["concepts"]} == {"car", "whale"}
    assert sum(one["probability"] for one in record["concepts"]) == pytest.approx(1, abs=1e-3)


def test_each_token_of_an_answer_is_interpreted(trained: ToyRun, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*trained.substrate, f"interpreter={trained.run}/interpreter", "prompt=whale", "top_k=1"]
    with inside(trained):
        run_verb("interpret", *words, "generation.max_new_tokens=3", "--json")
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        run_verb("interpret", *words, "generation.max_new_tokens=3")
        shown = capsys.readouterr().out
    assert 1 <= len(lines) <= 3
    assert [line["position"] for line in lines] == list(range(lines[0]["position"], lines[0]["position"] + len(lines)))
    assert all(len(line["concepts"]) == 1 and 0 <= line["confidence"] <= 1 for line in lines)
    assert "leading:" in shown


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("interpret", [], "one of the two"),
        ("interpret", ["text=a", "interpreter=nowhere"], "no interpreter at nowhere"),
        ("interpret", ["text=a", "top_k=0"], "1 concept or more"),
        ("train", ["model.width=17"], "multiple"),
        ("train", ["model=interpreter_hierarchical"], "tree"),
        ("train", ["resume=nothing.ckpt"], "no such checkpoint"),
        ("train", ["map.interpreter.warmup=2"], "warmup"),
        ("train", ["watch_prompt=a"], "ftw interpret"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    trained: ToyRun, verb: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = words_of(trained, *words) if verb == "train" else [*trained.substrate, *words]
    with inside(trained), pytest.raises(SystemExit) as stop:
        run_verb(verb, *own)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_wandb_offline_has_the_figures_and_the_picture_of_confusions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = toy_rows()
    tree = ConceptTree.of_categories(rows.names, {name: "ab"[place % 2] for place, name in enumerate(rows.names)})
    interpreter = train_interpreter(rows, toy_fit(epochs=1, direct=4), tree=tree)
    job = TrainJob(map=MapNode(interpreter=InterpreterTrainingConfig(baselines=False)))
    logger = WandbLogger(project="ftw", save_dir=str(tmp_path), offline=True)
    try:
        evaluate_run(job, Steps(), interpreter, rows, [logger], tmp_path)
    finally:
        wandb.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("files/media/images/test/confusions*.png"))
    (record,) = run.glob("*.wandb")
    deadline = time.monotonic() + 60  # wandb's service writes the record when it likes
    while b"test/named_top1" not in record.read_bytes():
        assert time.monotonic() < deadline, "the figures are not in the run's record"
        time.sleep(0.1)
