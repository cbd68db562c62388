"""From prompts to a story on toy data: collect and train sequence lenses, watch them in windows, tell the timeline."""

import json
import re
from pathlib import Path

import pytest
from toy_run import ToyRun, run_verb

from ftw.hat.timeline import Timeline
from ftw.map.pack import load_pack

KEPT = ["map.encyclopedia.tokens_per_text.train=-1", "map.encyclopedia.tokens_per_text.test=-1"]


@pytest.fixture
def sequence_pack(toy: ToyRun) -> Path:
    """Attention lenses on the tokens of the toy texts."""
    folder = toy.folder / "sequences"
    if not folder.exists():
        run_verb("train", *toy.training, *KEPT, "hat/lens=attention", "logger=none", f"hydra.run.dir={folder}")
    return folder / "pack"


def test_sequence_lenses_train_on_kept_tokens_of_texts_and_beat_their_controls_or_say_so(
    toy: ToyRun, sequence_pack: Path
):
    pack = load_pack(sequence_pack)
    assert pack.recipe.family == "attention"
    figures = json.loads((sequence_pack.parent / "metrics.json").read_text())["mean"]
    assert {"auroc_token_max", "auroc_text", "auroc_shuffled", "accuracy_all"} <= set(figures)


def test_sequence_lenses_are_judged_on_other_texts_and_other_lenses_on_no_answers(
    toy: ToyRun, sequence_pack: Path, capsys: pytest.CaptureFixture[str]
):
    folder = toy.folder / "judged"
    words = [*toy.substrate, f"texts={toy.texts}"]
    run_verb("evaluate", *words, f"pack={sequence_pack}", f"hydra.run.dir={folder}")
    again = json.loads((folder / "metrics.json").read_text())["mean"]
    trained = json.loads((sequence_pack.parent / "metrics.json").read_text())["mean"]
    assert again["accuracy_all"] == pytest.approx(trained["accuracy_all"], abs=1e-6)
    assert {"auroc", "auroc_text"} <= set(again)
    assert not (folder / "cards.html").exists()


def test_monitoring_in_windows_tells_each_window_and_its_story_can_be_shown(
    toy: ToyRun, sequence_pack: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*toy.substrate, f"pack={sequence_pack}", "mode=timeline", "window=6", "stride=3", "threshold=0.001"]
    run_verb("monitor", *words, "prompt=Hm?", "generation.max_new_tokens=20", "save=story.json", "--json")
    windows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert windows
    assert all(window["window_end"] - window["window_position"] <= 6 for window in windows)
    assert set(windows[0]["concepts"]) == {"whale", "car"}
    timeline = Timeline.load(toy.folder / "story.json")
    assert timeline.meta["window"] == 6
    run_verb("timeline", "show", "story.json", "out=pictures", "formats=[png,svg,html,json,parquet]")
    assert "Began" in capsys.readouterr().out
    names = {path.name for path in (toy.folder / "pictures").iterdir()}
    assert {"story.html", "story-story.json", "story-windows.parquet", "story-stream.svg", "story-turns.png"} <= names
    told = json.loads((toy.folder / "pictures" / "story-story.json").read_text())
    assert [w["window_position"] for w in told["windows"]][: len(windows)] == [w["window_position"] for w in windows]


def test_a_text_is_told_in_windows_and_two_timelines_are_compared(
    toy: ToyRun, sequence_pack: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*toy.substrate, f"pack={sequence_pack}", "mode=timeline"]
    for number, text in enumerate(["whale sea fin krill", "car road, wheel engine"]):
        run_verb("monitor", *words, f"text={text}", f"save={number}.json")
    capsys.readouterr()
    run_verb("timeline", "compare", "0.json", "1.json")
    shown = capsys.readouterr().out
    assert re.search(r"whale\s+0\.\d\d\s+0\.\d\d", shown)
    run_verb("timeline", "show", "0.json", "--json")
    assert json.loads(capsys.readouterr().out)["text"].startswith("Began")


def test_lenses_of_single_states_are_watched_in_windows_too(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    words = [*toy.substrate, f"pack={toy.run / 'pack'}", "mode=timeline", "--json"]
    run_verb("monitor", *words, "text=whale sea fin krill", "window=8", "stride=8")
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["window_position"] == 1
    assert first["text"] == "whale se"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["show"], "takes 1 file"), (["show", "none.json"], "no timeline"), (["show", "a", "formats=[gif]"], "gif")],
)
def test_what_cannot_be_told_is_said(toy: ToyRun, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run_verb("timeline", *words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text= "], "no words to read"),
        (["prompt=Hm?", "generation.max_new_tokens=0"], "max_new_tokens=0"),
        (["text=whale", "window=0"], "window=0"),
        (["text=whale", "threshold=1.5"], "threshold=1.5"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(
    toy: ToyRun, sequence_pack: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        run_verb("monitor", *toy.substrate, f"pack={sequence_pack}", "mode=timeline", *words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("lens", ["lstm", "trunk_lstm"])
def test_lenses_that_could_not_read_what_would_be_collected_are_refused_before_it_is(
    toy: ToyRun, lens: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        run_verb("train", *toy.training, f"hat/lens={lens}", f"hydra.run.dir={toy.folder / 'never'}")
    assert stop.value.code == 2
    assert "tokens_per_text.train=-1" in capsys.readouterr().err


def test_sequence_lenses_read_token_by_token_are_refused(
    toy: ToyRun, sequence_pack: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run_verb("monitor", *toy.substrate, f"pack={sequence_pack}", "prompt=Hm?")
    assert "mode=timeline" in capsys.readouterr().err
