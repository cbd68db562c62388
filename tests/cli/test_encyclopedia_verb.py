"""`ftw encyclopedia` goes through on a toy pack: bootstrap, tests, judgement, refinement, growth, status."""

import json

import pytest
from toy_run import ToyRun, run_verb

from ftw.map.concept import Concept, ConceptPack
from ftw.map.growing import GrowingEncyclopedia

QUICK = [
    "capture.layers=[1,3]",
    "interpreter.model.width=16",
    "interpreter.model.num_blocks=1",
    "interpreter.model.num_heads=2",
    "interpreter.model.feedforward=16",
    "interpreter.epochs=1",
]
ANIMALS = ("animal", "dog", "cat", "owl", "deer", "whale")


@pytest.fixture
def words(toy: ToyRun) -> list[str]:
    folder = toy.folder / "animals"
    if not folder.exists():
        concepts = [
            Concept(
                name=name, level=int(name != "animal"), parents=["animal"] if name != "animal" else [], lemmas=[name]
            )
            for name in ANIMALS
        ]
        ConceptPack.of("animals", "1.0.0", concepts, {}).save(folder)
    return [*toy.substrate, "concepts=pack", f"concepts.path={folder}", *QUICK]


def encyclopedia(*arguments: str) -> None:
    run_verb("encyclopedia", *arguments)


def test_the_steps_one_by_one(toy: ToyRun, words: list[str], capsys: pytest.CaptureFixture[str]):
    encyclopedia("bootstrap", "steps", *words)
    encyclopedia("test", "steps", *words)
    encyclopedia("judge", "steps", "confidence=nearest_mean", *words)
    encyclopedia("refine", "steps", "choose.share=0.5", "contexts=2", *words)
    encyclopedia("refine", "steps", "stage=1", "choose.names=[owl,deer]", "contexts=1", *words)
    encyclopedia("judge", "steps", *words)
    capsys.readouterr()
    encyclopedia("status", "steps", "--json", *words)
    found = json.loads(capsys.readouterr().out)
    assert found["num_concepts"] == len(ANIMALS)
    assert sum(stage["num_samples"] for stage in found["stages"]) == 6 + 3 * 2 + 2
    assert found["judged"]["by"] == "interpreter"
    encyclopedia("status", "steps", *words)
    assert "templates" in capsys.readouterr().out


def test_grow_goes_on_where_it_was(toy: ToyRun, words: list[str]):
    options = ["confidence=nearest_mean", "grow.highest_stage=1", "grow.share=0.5", "grow.contexts=1", "grow.target=1"]
    encyclopedia("grow", "grown", "grow.cycles=1", *options, *words)
    encyclopedia("grow", "grown", "grow.cycles=3", *options, *words)
    encyclopedia("grow", "whole", "grow.cycles=3", *options, *words)
    names = ("grown", "whole")
    grown, whole = (GrowingEncyclopedia.open(toy.home / "growing" / name) for name in names)
    assert grown.num_rounds == whole.num_rounds == 5  # terms, sentences to judge by, three refinements
    assert (grown.rows().texts, grown.confidence.tolist()) == (whole.rows().texts, whole.confidence.tolist())


def test_an_export_is_imported_under_another_name(toy: ToyRun, words: list[str]):
    encyclopedia("bootstrap", "out", *words)
    encyclopedia("export", "out", "out=dense.h5", *words)
    encyclopedia("import", "back", "path=dense.h5", *words)
    there, back = (GrowingEncyclopedia.open(toy.home / "growing" / name) for name in ("out", "back"))
    assert (there.concepts, there.layers, there.width) == (back.concepts, back.layers, back.width)


def test_what_is_not_there_is_said_in_a_sentence(toy: ToyRun, words: list[str], capsys: pytest.CaptureFixture[str]):
    for arguments, message in ((["refine", "nowhere"], "bootstrap"), (["polish"], "none of")):
        with pytest.raises(SystemExit) as stop:
            encyclopedia(*arguments, *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
