"""Graduation and refinement within a training: told lens by lens, and refused where nothing can decide on them."""

from dataclasses import replace
from pathlib import Path

import pytest
from toy_encyclopedia import Sizes, toy_encyclopedia
from toy_pool import CONFIG

from ftw.errors import ConfigError
from ftw.map.concept import Concept, ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig
from ftw.map.training.graduation import GraduationConfig
from ftw.map.training.train import FitConfig, train_pack
from ftw.substrate.model import Substrate

CONCEPTS = ConceptPack.of("toy", "1.0.0", [Concept(name=f"c{n}", level=0, parents=[]) for n in range(3)], {})
FIT = FitConfig(
    training=replace(CONFIG, solver="lda", graduate=True, refine_siblings=True),
    graduation=GraduationConfig(sizes=[10, 30, 60], tiers=[0.9, 0.8], tier_names=["high", "relaxed"]),
    evaluate=EvaluateConfig(draws=20, floor_draws=5),
)


@pytest.fixture
def store(tiny_substrate: Substrate, tmp_path: Path) -> Encyclopedia:
    sizes = Sizes(train=160, test=80)
    made = toy_encyclopedia(tmp_path, sizes=sizes, width=tiny_substrate.width, fingerprint=tiny_substrate.fingerprint)
    return made


def test_what_was_decided_stands_with_every_lens_and_in_the_notes(store: Encyclopedia, tiny_substrate: Substrate):
    told: list[str] = []
    pack, evaluation = train_pack(
        store, FIT, substrate=tiny_substrate, concepts=CONCEPTS, validation=store, step=told.append
    )
    assert evaluation is not None
    for name in pack.names:
        record, ranks = pack.metrics[name]["graduation"], pack.metrics[name]["siblings"]
        assert record["state"]
        assert record["num_positive"] >= record["rounds"][0]["num_positive"]
        assert ranks["first_after"] is None or 0 <= ranks["first_after"] <= 1
        assert evaluation.concepts[name]["siblings"]["moved"] in (True, False)
    assert any(note.startswith("graduation: ") and "of 160 texts" in note for note in evaluation.notes)
    assert any(note.startswith("siblings: ") for note in evaluation.notes)
    assert any(step.startswith("graduation, round 1: ") for step in told)


def test_they_are_refused_where_nothing_can_decide_on_them(store: Encyclopedia, tiny_substrate: Substrate):
    recipe = replace(FIT, training=replace(FIT.training, solver="logistic"))
    with pytest.raises(ConfigError, match=r"graduate=true.*solver=lda"):
        train_pack(store, recipe, substrate=tiny_substrate, concepts=CONCEPTS, validation=store)
    for concepts, validation in ((None, store), (CONCEPTS, None)):
        with pytest.raises(ConfigError, match=r"graduate=true.*data=wordnet"):
            train_pack(store, FIT, substrate=tiny_substrate, concepts=concepts, validation=validation)
