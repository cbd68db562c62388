"""Sweeps: what is swept is what was asked for, nothing is compared on test rows, and a stopped sweep goes on."""

import json
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from toy_run import ToyRun, run_verb

from ftw import paths
from ftw.cli._schema import register
from ftw.cli._schema_train import DATA, TrainJob
from ftw.cli._sweeper import search_space
from ftw.errors import ConfigError

pytest.importorskip("optuna")
QUICK = [
    "map.training.solver=logistic",
    "map.training.num_shuffles=0",
    "map.training.folds=3",
    "evaluate.draws=20",
    "evaluate.floor_draws=5",
]


@pytest.fixture(autouse=True)
def own_runs(toy: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/latest` of the toy run stays what other tests know."""
    monkeypatch.setenv("FTW_RUNS", str(tmp_path))


def sweep(toy: ToyRun, folder: str, *words: str) -> list[dict]:
    given = [*toy.substrate, "data=labelled", f"data.path={toy.texts}", *QUICK]
    run_verb("train", "sweep=recipe", *given, f"hydra.sweep.dir={folder}", *words)
    return json.loads(Path(folder, "trials.json").read_text("utf-8"))


def test_a_sweep_runs_its_trials_tells_them_in_one_table_and_goes_on(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    words = ["map.training.combine=choice(stack,average)", "hydra.sweeper.sampler=random"]
    two = sweep(toy, "swept", *words, "hydra.sweeper.num_trials=2")
    assert len(two) == 2
    assert {row["map.training.combine"] for row in two} <= {"stack", "average"}
    assert [row["value"] for row in two] == sorted((row["value"] for row in two), reverse=True)
    for row in two:
        metrics = json.loads(Path("swept", str(row["trial"]), "metrics.json").read_text("utf-8"))
        out_of_fold = [concept["choice"]["evidence"]["combined"] for concept in metrics["concepts"].values()]
        # Compared on training rows; the figures of the test rows stand beside.
        assert row["value"] == pytest.approx(sum(out_of_fold) / len(out_of_fold))
        assert row["auroc"] == metrics["mean"]["auroc"]
        assert list(Path("swept", str(row["trial"]), "pack").iterdir())
    assert "best: map.training.combine=" in capsys.readouterr().out
    three = sweep(toy, "swept", *words, "hydra.sweeper.num_trials=3")
    assert sorted(row["trial"] for row in three) == [0, 1, 2]


def test_the_table_of_trials_goes_to_wandb_offline(toy: ToyRun, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep(toy, "told", "hydra.sweeper.num_trials=1", "hydra.sweeper.wandb=ftw")
    (run,) = Path("told", "wandb").glob("offline-*")
    assert list(run.rglob("*.table.json"))


def test_words_of_hydra_become_distributions_and_the_command_line_wins():
    params = {"a": "choice(x,y)", "b": "tag(log,interval(1e-4,1))", "c": "int(interval(1,9))", "d": "range(1,10,3)"}
    space, fixed = search_space(params, ["c=4", "e=5"])
    assert fixed == ["c=4", "e=5"]
    assert set(space) == {"a", "b", "d"}
    assert space["a"].choices == ("x", "y")  # pyright: ignore[reportAttributeAccessIssue]
    assert space["b"].log  # pyright: ignore[reportAttributeAccessIssue]
    assert (space["d"].low, space["d"].high, space["d"].step) == (1, 7, 3)  # pyright: ignore[reportAttributeAccessIssue]
    whole, _ = search_space(params, ["c=int(interval(1,9))", "a=choice([1,2],[3])"])
    assert set(whole) == {"a", "c"}
    assert whole["a"].choices == ("[1,2]", "[3]")  # pyright: ignore[reportAttributeAccessIssue]
    assert type(whole["c"]).__name__ == "IntDistribution"


@pytest.mark.parametrize(("params", "words"), [({}, ["a=1"]), ({"a": "7"}, [])])
def test_a_sweep_of_nothing_is_refused(params: dict[str, str], words: list[str]):
    with pytest.raises(ConfigError, match=r"nothing is swept|is no choice"):
        search_space(params, words)


@pytest.mark.parametrize("choice", sorted(file.stem for file in (paths.conf() / "sweep").glob("*.yaml")))
def test_every_sweep_composes_with_keys_that_there_are(choice: str):
    register("train", TrainJob, DATA)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(paths.conf())):
        config = hydra.compose("train", overrides=[f"sweep={choice}"], return_hydra_config=True)
        space, _ = search_space(dict(config.hydra.sweeper.params), [])
        assert space
        for key, distribution in space.items():
            choices = getattr(distribution, "choices", None)
            value = choices[0] if choices else distribution.low  # pyright: ignore[reportAttributeAccessIssue]
            hydra.compose("train", overrides=[f"sweep={choice}", f"{key}={value}"])
    GlobalHydra.instance().clear()


def test_an_unknown_objective_is_refused(toy: ToyRun, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_verb("train", *toy.training, "objective=luck")
    assert "out_of_fold" in capsys.readouterr().err
