"""Every verb goes through on toy data and leaves what it promises."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_encoder import toy_encoder
from toy_run import ToyRun, run_verb

from ftw.cli import _run
from ftw.hat.timeline import Timeline
from ftw.map.concept import Concept, ConceptPack

PETS = [("animal", 0, []), ("dog", 1, ["animal"]), ("cat", 1, ["animal"])]


def newest(toy: ToyRun, verb: str) -> Path:
    return max(toy.folder.glob(f"runs/*-{verb}"), key=lambda folder: folder.stat().st_mtime_ns)


def test_train_leaves_pack_figures_report_and_record(toy: ToyRun):
    metrics = json.loads((toy.run / "metrics.json").read_text())
    assert set(metrics["concepts"]) == {"whale", "car"}
    assert {"auroc", "auroc_low", "auroc_text", "auroc_shuffled", "f1", "ece"} <= set(metrics["mean"])
    record = json.loads((toy.run / "run.json").read_text())
    assert record["seed"] == 0
    assert record["versions"]["torch"]
    inputs = {entry["name"]: entry["sha256"] for entry in record["inputs"]}
    assert len(inputs["texts"]["toy.jsonl"]) == 64
    assert len(inputs["local"]["model.safetensors"]) == 64
    assert "num_shuffles: 1" in (toy.run / "config.yaml").read_text()
    report = (toy.run / "report.html").read_text(encoding="utf-8")
    assert "whale" in report
    assert not re.search(r"(src|href)=.?https?:", report)
    assert load_file(toy.run / "pack" / "layer0" / "lenses.safetensors")
    assert (toy.run / "checkpoints" / "last.ckpt").is_file()
    assert (toy.run / "csv" / "metrics.csv").is_file()


def test_a_resumed_training_ends_with_the_same_lenses_as_an_unbroken_one(toy: ToyRun):
    family = ["hat/lens=mlp", "hat.lens.hidden=4", "logger=none"]
    run_verb("train", *toy.training, *family)
    whole = toy.latest
    run_verb("train", *toy.training, *family, "trainer.max_epochs=3", f"hydra.run.dir={toy.folder / 'half'}")
    run_verb(
        "train", *toy.training, *family, f"resume={toy.folder / 'half/checkpoints/last.ckpt'}", "hydra.run.dir=rest"
    )
    for name, tensor in load_file(whole / "pack/layer0/lenses.safetensors").items():
        assert (load_file(toy.folder / "rest/pack/layer0/lenses.safetensors")[name] - tensor).abs().max() < 1e-6


def test_a_sweep_makes_one_run_for_each_value_and_latest_is_the_last(toy: ToyRun):
    run_verb("train", *toy.training, "-m", "hat.lens.hidden=2,3", "hat/lens=mlp", "debug=fast")
    sweep = newest(toy, "sweep")
    for number, hidden in (("0", 2), ("1", 3)):
        assert f"hidden: {hidden}" in (sweep / number / "config.yaml").read_text()
        assert (sweep / number / "pack" / "MANIFEST.json").is_file()
    assert toy.latest == sweep / "1"
    assert not (sweep / "latest").exists()


def test_evaluate_reads_a_file_and_leaves_latest_alone(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    run_verb("train", *toy.training)
    before = toy.latest
    shutil.copy(toy.texts, toy.folder / "my texts, (new).jsonl")
    run_verb(
        "evaluate", *toy.substrate, "texts=my texts, (new).jsonl", "evaluate.slices=[language]", "evaluate.draws=20"
    )
    folder = newest(toy, "evaluate")
    assert toy.latest == before
    figures, trained = (json.loads((run / "metrics.json").read_text()) for run in (folder, before))
    assert set(figures["slices"]["language"]) == {"en", "de"}
    assert figures["mean"]["auroc"] == pytest.approx(trained["mean"]["auroc"], abs=1e-6)
    assert {"config.yaml", "run.json", "report.html"} <= {path.name for path in folder.iterdir()}
    assert "AUROC" in capsys.readouterr().out
    cards = json.loads((folder / "cards.json").read_text())
    assert set(cards["cards"]) == {"whale", "car"}
    assert cards["cards"]["whale"]["strongest"]
    assert cards["cards"]["whale"]["training"]
    assert "auroc_length" in cards["lenses"]["whale"]  # as training measured it
    assert "whale" in (folder / "cards.html").read_text(encoding="utf-8")


def test_a_pack_without_concepts_is_not_evaluated_on_articles(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_verb("evaluate", *toy.substrate, f"pack={toy.run / 'pack'}", "data=wordnet")
    assert "texts=FILE" in capsys.readouterr().err


def test_collect_collects_once_and_a_dry_run_leaves_nothing(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    words = [*toy.substrate, "data=labelled", f"data.path={toy.texts}", "layers=[0,2]"]
    num_runs, stores = len(list(toy.folder.glob("runs/*"))), set(toy.home.glob("encyclopedias/*"))
    run_verb("collect", *words, "--dry-run")
    assert "tokens" in capsys.readouterr().out
    assert len(list(toy.folder.glob("runs/*"))) == num_runs
    assert set(toy.home.glob("encyclopedias/*")) == stores
    run_verb("collect", *words)
    assert json.loads((newest(toy, "collect") / "run.json").read_text())["inputs"]
    assert len(set(toy.home.glob("encyclopedias/*")) - stores) >= 1


PROMPTS = [
    "What, then?",
    "Tell me: a=b (yes) [1, 2] {x}",
    "\"quoted\" and 'quoted'",
    "${oc.env:HOME} Grüße, 你好",
    " \\",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_monitor_takes_any_prompt_letter_by_letter(toy: ToyRun, prompt: str):
    run_verb("monitor", *toy.substrate, f"prompt={prompt}", "generation.max_new_tokens=3", "save=answer, 1.json")
    timeline = Timeline.load(toy.folder / "answer, 1.json")
    assert timeline.prompt == prompt
    assert 1 <= (~timeline.is_prompt).sum() <= 3


def test_monitor_prints_one_json_object_a_token(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    run_verb("monitor", *toy.substrate, "prompt=Hello", "--json", "generation.max_new_tokens=4", "watch=[car]")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["position"] for line in lines] == sorted(line["position"] for line in lines)
    assert all(line["watch"][0]["concept"] == "car" for line in lines if not line["is_special"])


def test_monitor_reads_a_given_text(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    run_verb("monitor", *toy.substrate, "text=The whale, the sea.", "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(line["token"] for line in lines if not line["is_special"]) == "The whale, the sea."


def test_monitor_reads_through_an_aperture_and_tells_what_the_shelf_did(
    toy: ToyRun, capsys: pytest.CaptureFixture[str]
):
    words = [*toy.substrate, "prompt=Hello", "generation.max_new_tokens=4"]
    run_verb("monitor", *words, "--json", "hat.aperture.precision=float32")
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    run_verb("monitor", *words, "--json", "hat/aperture=dynamic", "hat.aperture.shelf.hot_mb=1")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["token_id"] for line in lines] == [line["token_id"] for line in plain]
    assert lines[-1]["top"] == plain[-1]["top"]
    assert all(row["path"][-1] == row["concept"] for line in lines for row in line["top"])
    assert set(lines[-1]["lenses"]) == {"read", "hits", "misses", "loads", "stalls", "failed", "missing"}
    hits = [line["lenses"]["hits"] for line in lines]
    assert hits == sorted(hits)
    run_verb("monitor", *words, "hat/aperture=dynamic", "watch=[car]", "save=answer.json")
    out = capsys.readouterr().out
    assert re.search(r"2 read at the end · \d+ hits", " ".join(out.split()))
    assert Timeline.load(toy.folder / "answer.json").meta["lenses"]["read"] == 2


def test_monitor_keeps_to_a_deployment_manifest(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    manifest = {"manifest_id": "no-cars", "explicit_concepts": {"always_exclude": ["car", "tank"]}}
    (toy.folder / "rules, 1.json").write_text(json.dumps(manifest))
    words = [*toy.substrate, "text=The whale, the car.", "manifest=rules, 1.json", "mode=dual"]
    run_verb("monitor", *words, "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["concept"] for line in lines for row in [*line["top"], *line["text"]]} == {"whale"}
    run_verb("monitor", *words)
    out = " ".join(capsys.readouterr().out.split())
    assert "the manifest admits 1 of 2 concepts; 1 of its names have no lens here: tank" in out
    for wrong, message in (
        (["mode=text"], "reads no activation lenses"),
        (["manifest=chat"], "no deployment preset"),
        (["hat/aperture=dynamic", "hat.aperture.shelf.hot_mb=0.0001"], "smallest workable budget is hot_mb="),
        (["hat/aperture=dynamic", "watch=[whales]"], "nearest: whale"),
        (["hat.aperture.base_levels=[0]"], "The keys of hat.aperture are: precision"),
    ):
        with pytest.raises(SystemExit):
            run_verb("monitor", *words, *wrong)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["embedding", "centroid"])
def test_text_lenses_over_embeddings_are_trained_and_read_live(
    toy: ToyRun, capsys: pytest.CaptureFixture[str], family: str
):
    encoder = toy_encoder(toy.folder / "encoder")
    text = [f"map.text.family={family}", f"map.text.encoder={encoder}", f"hydra.run.dir={family}"]
    run_verb("train", *toy.training, "debug=fast", *text)
    capsys.readouterr()
    words = [f"pack={family}/pack", "prompt=The whale", "generation.max_new_tokens=3", "mode=dual", "--json"]
    run_verb("monitor", *toy.substrate, *words, f"text_encoder={encoder}")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["concept"] for line in lines for row in line["text"]} == {"whale", "car"}
    with pytest.raises(SystemExit):
        run_verb("monitor", *toy.substrate, *words)
    assert "give the encoder: text_encoder=FOLDER" in capsys.readouterr().err


def test_demo_adds_a_live_reading_to_a_training(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    run_verb("demo", *toy.training, "debug=fast", "prompt=Tell me, please: why?", "generation.max_new_tokens=5")
    assert toy.latest.name.endswith("-demo")
    assert Timeline.load(toy.latest / "timeline.json").prompt == "Tell me, please: why?"
    assert "runs/latest/report.html" in capsys.readouterr().out


def test_concepts_are_built_shown_and_verified(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    ConceptPack.of("pets", "1.0.0", [Concept(name=n, level=level, parents=above) for n, level, above in PETS], {}).save(
        toy.folder / "pets"
    )
    pack = ["concepts=pack", "concepts.path=pets"]
    run_verb("concepts", *pack)
    run_verb("concepts", "verify", *pack)
    run_verb("concepts", "build", *pack, "out=copy, of it")
    assert (
        ConceptPack.load(toy.folder / "copy, of it").content_hash()
        == ConceptPack.load(toy.folder / "pets").content_hash()
    )
    out = capsys.readouterr().out
    assert "dog" in out
    assert "pets is sound" in out


def test_the_command_ends_quietly_when_its_reader_has_seen_enough(toy: ToyRun):
    words = [sys.executable, "-m", "ftw", "monitor", *toy.substrate, "prompt=Hello", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["position"] == 0
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""


def test_ctrl_c_while_training_names_the_checkpoint_to_go_on_from(toy: ToyRun):
    forever = ["trainer.max_epochs=1000000", "map.training.patience=1000000", "hat/lens=mlp", "hydra.run.dir=stopped"]
    # Who starts the tests in the background has them ignore Ctrl-C, and every child with them.
    heeding = "import signal; from ftw.__main__ import main; signal.signal(signal.SIGINT, signal.SIG_DFL); main()"
    words = [sys.executable, "-c", heeding, "train", *toy.training, *forever]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (toy.folder / "stopped/checkpoints/last.ckpt").is_file():
                assert time.monotonic() < deadline, "no checkpoint within two minutes"
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # it would train for ever
    assert process.returncode == 130
    assert "resume=stopped/checkpoints/last.ckpt" in err
    assert "Traceback" not in err
    assert not (toy.folder / "stopped/pack").exists()


def test_the_record_has_the_command_as_it_was_typed(monkeypatch: pytest.MonkeyPatch):
    typed = ["python", "-m", "ftw.cli.train", "watch_prompt=What, then?", "seed=1"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys, "argv", ["ftw/cli/train.py", "watch_prompt='What, then?'", "seed=1"])
    assert _run.command() == "ftw train 'watch_prompt=What, then?' seed=1"
