"""A wrong word on the command line ends before any work with status 2 and says which words there are."""

from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from toy_run import ToyRun, run_verb

from ftw import paths
from ftw.cli._arguments import check, readable
from ftw.cli._schema import MonitorJob, register
from ftw.cli._schema_train import DATA, DemoJob, EvaluateJob, TrainJob
from ftw.errors import ConfigError

CONF = str(paths.conf())
WRONG = [
    ("hat.lens.hiden=3", ["hat.lens.hiden", "did you mean hidden", "family, hidden, dropout"]),
    ("map.trainig.folds=3", ["did you mean training", "encyclopedia, training, text"]),
    ("sede=3", ["sede", "did you mean seed"]),
    ("+foo=3", ["no key foo"]),
    ("hat.lens.hidden=abc", ["hat.lens.hidden", "abc", "Integer"]),
    ("seed=1.5", ["seed", "1.5"]),
    ("layers=abc", ["layers", "a list is needed"]),
    ("hat/lens=mpl", ["hat/lens=mpl", "did you mean mlp", "linear, lstm, mlp"]),
    ("logger=wandbb", ["csv, none, tensorboard, wandb"]),
    ("experiment=nothing", ["experiment=nothing", "wordnet"]),
    ("+experiment=wordnet", ["leave out the +"]),
    ("data=labelled", ["data.path needs a value"]),
    ("data=labelled data.path=x data.text_colum=t", ["did you mean text_column"]),
    ("hat.lens.hidden=32,64", ["add -m"]),
    ("-m hat.lens.hidden=32,x", ["hat.lens.hidden", "'x'"]),
    ("pack_id=a:b(c", ["pack_id=a:b(c", "quotes"]),
    ("--jsno", ["--jsno", "did you mean --json"]),
    ("whales", ["'whales'", "key=value"]),
]


@pytest.fixture(autouse=True)
def schemas():
    register("train", TrainJob, DATA)
    register("demo", DemoJob, DATA)
    register("evaluate", EvaluateJob, DATA)
    register("monitor", MonitorJob, {})
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_word_is_named_with_the_choices(words: str, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        check("train", readable("train", words.split()), CONF)
    for part in said:
        assert part in str(caught.value)
    assert "search path" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_ends_with_status_2_and_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run_verb("train", "hat.lens.hiden=3")
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("ftw: no key hat.lens.hiden")
    assert not Path("runs").exists()


def test_yaml_that_is_none_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [b\n")
    with pytest.raises(ConfigError, match=r"not YAML.*mine\.yaml.*line 1"):
        check("train", ["--config-dir", str(tmp_path), "experiment=mine"], CONF)
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    check("train", ["--config-dir", str(tmp_path), "experiment=mine"], CONF)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("resume=gone.ckpt", "no such checkpoint"),
        ("logger.csv._target_=os.system", "not allowed"),
        ("trainer.accelerator=abacus", "invalid accelerator name"),
        ("+trainer.epochs=3", "unexpected keyword argument 'epochs'"),
        ("resume=runs/latest/checkpoints/last.ckpt layers=[0]", "checkpoint of another training"),
    ],
)
def test_what_only_lightning_can_know_is_one_line_too(
    toy: ToyRun, capsys: pytest.CaptureFixture[str], words: str, said: str
):
    with pytest.raises(SystemExit) as stop:
        run_verb("train", *toy.training, *words.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_pack_the_next_step_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_verb("monitor", "prompt=Hello")
    assert "no lens pack at runs/latest/pack; make one with `ftw train`" in capsys.readouterr().err


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30))
def test_any_prompt_reaches_the_job_letter_by_letter(prompt: str):
    if prompt == "null" or prompt[:1] in ("'", '"'):
        return
    # What Hydra does with an override, without the search for files: 0.2 s each would be too many.
    (override,) = OverridesParser.create().parse_overrides(readable("monitor", [f"prompt={prompt}"]))
    config = OmegaConf.structured(MonitorJob)
    OmegaConf.update(config, "prompt", override.value())
    assert OmegaConf.to_container(config, resolve=True)["prompt"] == prompt


@pytest.mark.parametrize("value", ["'a, b'", '"a, b"'])
def test_a_value_that_is_quoted_for_hydra_already_is_not_quoted_twice(value: str):
    assert composed("monitor", f"prompt={value}").prompt == "a, b"


def test_aliases_flags_and_options_are_written_out():
    words = ["texts=a b.jsonl", "-m", "seed=1,2", "--cfg", "job"]
    assert readable("evaluate", words) == ["-m", "--cfg", "job", "data.path='a b.jsonl'", "seed=1,2"]
    assert readable("monitor", ["--json"]) == ["json=true"]
    assert readable("bench", ["bank", "--json", "out.json"]) == ["bench=bank", "json=out.json"]
    assert readable("bench", ["bank", "--json", "threads=1"]) == ["bench=bank", "json=''", "threads=1"]
    assert readable("bench", ["--json", "bank"]) == ["json=''", "bench=bank"]
    assert readable("concepts", ["build"]) == ["action=build"]
    assert readable("train", ["data.path=~/x.jsonl"]) == [f"data.path={Path.home()}/x.jsonl"]
    assert readable("train", ["-m", "data.path=a.jsonl,b.jsonl"]) == ["-m", "data.path=a.jsonl,b.jsonl"]


def composed(verb: str, *words: str):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = hydra.compose(verb, overrides=readable(verb, words))
    GlobalHydra.instance().clear()
    return OmegaConf.to_object(config)
