"""Every logger gets the losses and the figures; wandb works without account and network."""

import csv
import json
from pathlib import Path

import pytest
from toy_run import ToyRun, run_verb

WATCH = [
    "trainer.max_epochs=12",
    "map.training.patience=12",
    "hat/lens=mlp",
    "watch_prompt=The whale, the sea (and: krill).",
]


def test_csv_has_a_loss_for_every_epoch_and_the_mean_figures(toy: ToyRun):
    run_verb("train", *toy.training, "hat/lens=mlp", "map.training.patience=9", "hydra.run.dir=csv-run")
    with (toy.folder / "csv-run/csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["val/loss"]) for row in rows) == 6
    assert sum(bool(row["train/loss"]) for row in rows) == 6
    assert any(row["test/auroc"] for row in rows)


def test_tensorboard_gets_a_picture_of_the_watched_prompt(toy: ToyRun):
    run_verb("train", *toy.training, *WATCH, "logger=tensorboard", "hydra.run.dir=board")
    (events,) = (toy.folder / "board/tensorboard").glob("events.*")
    assert b"watch/epoch_10" in events.read_bytes()


def test_none_leaves_no_log(toy: ToyRun):
    run_verb("train", *toy.training, "logger=none", "hydra.run.dir=unlogged")
    assert not (toy.folder / "unlogged/csv").exists()
    assert (toy.folder / "unlogged/pack").is_dir()


def test_wandb_offline_has_losses_table_picture_and_pack(
    toy: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    run_verb("train", *toy.training, *WATCH, "logger=wandb", "hydra.run.dir=logged")
    out, err = capfd.readouterr()
    assert "wandb:" not in out + err
    assert "wandb sync logged/wandb/offline-*" in out
    (run,) = (toy.folder / "logged/wandb").glob("offline-run-*")
    (table,) = run.glob("files/media/table/test/concepts*.json")
    assert {row[0] for row in json.loads(table.read_text())["data"]} == {"whale", "car"}
    assert list(run.glob("files/media/images/watch/epoch_10*.png"))
    (record,) = run.glob("*.wandb")
    for logged in (b"val/loss", b"train/loss", b"test/auroc", b"lens-pack", b"lenses.safetensors"):
        assert logged in record.read_bytes()
