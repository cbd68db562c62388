"""Descriptions without names, held out make by make; figures that agree with counting by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
from toy_dictionary import write_wordnet

from ftw.errors import ConfigError, DataError
from ftw.map.descriptions import DescriptionsConfig, describe
from ftw.map.interpreter_figures import SYSTEM, confusions, ece, figures, most_confused
from ftw.map.masking import names_it, without_lemmas
from ftw.map.wikipedia import Article, part
from ftw.map.wordnet import WordNet

ANIMALS = ["whale", "otter", "heron", "badger", "marten", "plover", "beetle", "salmon", "sparrow", "lizard"]
CONFIG = DescriptionsConfig(num=6, contexts=3, held_out_contexts=1)


@pytest.mark.parametrize(
    ("text", "lemmas", "bare"),
    [
        ("A whale is large. Whales sing.", ["whale"], "Something is large. Something sing."),
        ("The Sea-Lion's cousin, the lion", ["lion", "sea lion"], "Something cousin, something"),
        ("many fairies and a fairy", ["fairy"], "many something and something"),
        ("Tuberculosis (TB) is an illness", ["tuberculosis"], "Something is an illness"),
        ("antlers are no ants", ["ant"], "antlers are no something"),
        ("two lines\nof text", ["nothing"], "two lines of text"),
    ],
)
def test_lemmas_are_taken_out_in_all_their_forms_and_nothing_else(text: str, lemmas: list[str], bare: str) -> None:
    assert without_lemmas(text, lemmas) == bare
    assert not names_it(without_lemmas(text, lemmas), lemmas)


def test_a_text_without_lemmas_to_look_for_names_nothing() -> None:
    assert not names_it("a whale", [])
    assert not names_it("a whale", [" "])


@pytest.fixture
def dictionary(tmp_path: Path) -> WordNet:
    nouns = {"animal": (["animal"], [], 'a living thing that moves; "the animal slept"')}
    for number, name in enumerate(ANIMALS):
        gloss = f"a creature of kind {number} that a {name} keeper feeds with {number + 3} grains"
        nouns[name] = ([name, f"{name} beast"], ["animal"], gloss)
    return write_wordnet(tmp_path / "dictionary", nouns)


def articles() -> list[Article]:
    def text(number: int, name: str) -> str:
        return f"The {name} lives in valley {number}. It knows {number} songs. Every {name} sings at dawn in May."

    return [Article(name.capitalize(), text(number, name), f"Animal {number}") for number, name in enumerate(ANIMALS)]


def test_no_held_out_description_is_trained_on_and_every_concept_is(dictionary: WordNet) -> None:
    made = describe(dictionary, CONFIG, 0, articles=articles())
    table, part_of, kind_of = made.table, made.table.columns["part"], made.table.columns["kind"]
    lemmas = {name: made.concepts[name].lemmas for name in table.concepts}
    groups: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for row, concept in zip(table.rows, table.cols, strict=True):
        groups[part_of[row]].add(table.groups[row])
        if kind_of[row] == "unnamed":
            assert not names_it(table.texts[row], lemmas[table.concepts[concept]])
        else:
            assert names_it(table.texts[row], lemmas[table.concepts[concept]])
    assert not groups["train"] & (groups["dev"] | groups["test"])
    assert not groups["dev"] & groups["test"]
    trained = {int(col) for row, col in zip(table.rows, table.cols, strict=True) if part_of[row] == "train"}
    judged = {int(col) for row, col in zip(table.rows, table.cols, strict=True) if part_of[row] != "train"}
    assert trained == judged == set(range(len(table.concepts)))
    assert set(made.categories) == set(table.concepts)


def test_marks_belong_to_the_concept_that_the_text_was_made_from(dictionary: WordNet) -> None:
    made = describe(dictionary, CONFIG, 0, articles=articles())
    for row, concept in zip(made.table.rows, made.table.cols, strict=True):
        number = ANIMALS.index(made.table.concepts[concept])
        said = re.findall(r"kind (\d+)|valley (\d+)|Animal (\d+)|(\d+) songs", made.table.texts[row])
        assert all(str(number) in one for one in said)


def test_the_part_of_a_concept_is_that_of_its_article(dictionary: WordNet) -> None:
    made = describe(dictionary, CONFIG, 0, articles=articles())
    for row, concept in zip(made.table.rows, made.table.cols, strict=True):
        if made.table.columns["part"][row] != "train":
            assert made.table.columns["part"][row] == part(made.table.concepts[concept].capitalize())


def test_the_same_seed_draws_the_same_texts(dictionary: WordNet) -> None:
    first, again, other = (describe(dictionary, CONFIG, seed, articles=articles()) for seed in (0, 0, 1))
    assert first.table.content_hash() == again.table.content_hash() != other.table.content_hash()


def test_options_that_cannot_be_are_refused(dictionary: WordNet) -> None:
    with pytest.raises(DataError, match="have both a gloss and an article"):
        describe(dictionary, DescriptionsConfig(num=50), 0, articles=articles())
    for wrong in ({"num": 1}, {"contexts": 40}, {"written": 9}, {"held_out_contexts": 0}, {"sentences": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            describe(dictionary, DescriptionsConfig(**wrong), 0, articles=articles())
    with pytest.raises(ConfigError, match="needs a substrate"):
        describe(dictionary, DescriptionsConfig(num=2, written=1), 0, articles=articles())


def random_chances(num: int, num_concepts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(num_concepts), num)


def test_figures_are_what_counting_gives_and_intervals_hold_them() -> None:
    chance_SC, labels = random_chances(400, 10), np.arange(400) % 10
    chance_SC[:200, :] = 0.01
    chance_SC[np.arange(200), labels[:200]] = 0.91
    other_SC = random_chances(400, 10, 1)
    kinds = ["named"] * 200 + ["unnamed"] * 200
    found = figures({SYSTEM: chance_SC, "other": other_SC}, labels, kinds, draws=200)
    for kind, rows in (("named", slice(0, 200)), ("unnamed", slice(200, 400)), ("all", slice(0, 400))):
        for name, one in ((SYSTEM, chance_SC), ("other", other_SC)):
            order = np.argsort(-one[rows], axis=1)
            entry = found[kind]["systems"][name]
            assert entry["top1"] == pytest.approx((order[:, 0] == labels[rows]).mean())
            assert entry["top5"] == pytest.approx((order[:, :5] == labels[rows][:, None]).any(1).mean())
            assert entry["top1_low"] <= entry["top1"] <= entry["top1_high"]
        ahead = found[kind]["systems"]["other"]["minus"]
        systems = found[kind]["systems"]
        assert ahead["top1"] == pytest.approx(systems[SYSTEM]["top1"] - systems["other"]["top1"])
    assert found["named"]["systems"]["other"]["minus"]["top1_low"] > 0
    assert found["named"]["num_concepts"] == 10


def test_a_system_that_knows_nothing_is_right_by_chance() -> None:
    found = figures({"chance": np.full((50, 20), 0.05)}, np.arange(50) % 20, ["all"] * 50, draws=20)
    assert found["all"]["systems"]["chance"]["top1"] == pytest.approx(1 / 20)
    assert found["all"]["systems"]["chance"]["top5"] == pytest.approx(5 / 20)


def test_a_difference_of_a_system_to_itself_is_nothing() -> None:
    chance_SC = random_chances(60, 6)
    found = figures({SYSTEM: chance_SC, "same": chance_SC}, np.arange(60) % 6, ["all"] * 60, draws=50)
    minus = found["all"]["systems"]["same"]["minus"]
    assert minus["top1"] == minus["top1_low"] == minus["top1_high"] == 0


def test_calibration_error_is_nought_for_the_calibrated_and_large_for_the_boastful() -> None:
    random = np.random.default_rng(0)
    sure = random.uniform(0.5, 1, 20_000)
    right = random.uniform(size=20_000) < sure
    assert ece(np.stack([sure, 1 - sure], axis=1), np.where(right, 0, 1)) < 0.02
    boastful = np.tile([0.99, 0.01], (20_000, 1))
    assert ece(boastful, np.where(right, 0, 1)) == pytest.approx(0.99 - right.mean(), abs=1e-6)


def test_confusions_add_up_to_one_and_name_what_is_taken_for_what() -> None:
    chance_SC, labels = random_chances(30, 6), np.repeat(np.arange(3), 10)
    names, matrix_KK = confusions(chance_SC, labels, ["a", "b", "a", "c", "c", "b"])
    assert names == ["a", "b", "c"]
    assert np.allclose(matrix_KK[:2].sum(1), 1)
    assert np.isnan(matrix_KK[2]).all()  # no text is about one of its concepts
    chance_SC[:10] = [0.2, 0.7, 0.025, 0.025, 0.025, 0.025]
    assert most_confused(chance_SC, labels, [f"c{number}" for number in range(6)])[0][:2] == ("c0", "c1")


def test_no_texts_are_refused() -> None:
    with pytest.raises(DataError, match="no texts"):
        figures({}, np.array([]), [])
