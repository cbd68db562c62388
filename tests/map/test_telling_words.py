"""Claims about the test without telling words: they are found and taken out, and only what an edit changed is read."""

import numpy as np
import pytest
import torch

from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack
from ftw.hat.text import TextBank, TextLens
from ftw.map.concept import ConceptPack
from ftw.map.concept_record import Concept
from ftw.map.contributions import TextReader
from ftw.map.telling_words import HeldOut, remove_words, telling_words, without_words
from ftw.substrate.model import Substrate


@pytest.fixture
def text() -> TextBank:
    words = ["whale", "sea", "the", "krill", "blue whale"]
    lens = TextLens(
        name="whale",
        vocabulary=words,
        idf=np.ones(5),
        coefficients=np.array([2.0, 1.5, 0.4, 9.0, 3.0]),
        bias=-1.0,
    )
    return TextBank.from_lenses([lens])


@pytest.mark.parametrize(
    ("sentence", "words", "left"),
    [
        ("The whale, a WHALE!", ["whale"], "The, a!"),
        ("whales and whaling", ["whale"], "and whaling"),
        ("two cities, one city", ["city"], "two, one"),
        ("A blue  whale sings", ["whale", "blue whale"], "A sings"),
        ("foxes box", ["fox"], "box"),
        ("nothing here", ["whale"], "nothing here"),
        ("a.b (c)", ["a.b"], "(c)"),
    ],
)
def test_words_and_their_plurals_are_taken_out_whatever_their_case(sentence: str, words: list[str], left: str):
    assert without_words(sentence, words) == left


def test_telling_words_are_the_lemmas_and_what_tells_these_texts_apart(text: TextBank):
    concept = Concept(name="Cetacean", level=0, lemmas=["whale", "sea_mammal"])
    pack = ConceptPack.of("toy", "1.0.0", [concept], {})
    positives, negatives = ["the whale in the sea", "the sea"], ["the road", "the car"]
    assert telling_words("Cetacean", pack, None, positives, negatives, 5) == ["whale", "sea mammal"]
    # "krill" weighs most but is in no text, "the" is in all, and "blue whale" is not one word.
    assert telling_words("whale", None, text, positives, negatives, 5) == ["whale", "sea"]
    assert telling_words("whale", None, text, positives, negatives, 0) == ["whale"]
    assert telling_words("CivilEngineer", None, None, [], [], 3) == ["civil engineer"]


def held_out(texts: list[str], labels: list[int], logits: np.ndarray) -> HeldOut:
    column = np.array(labels, dtype=np.float32)[:, None]
    return HeldOut(["whale"], texts, [f"g{row}" for row in range(len(texts))], column, np.ones_like(column), logits)


def lens(width: int) -> LensStack:
    heads = [HeadConfig().build(1, width)]
    with torch.no_grad():
        heads[0].weights()[0].copy_(torch.randn(1, width, generator=torch.Generator().manual_seed(4)))
    return LensStack(names=["whale"], layers=(2,), heads=heads, scale_NL=torch.ones(1, 1), offset_NL=torch.zeros(1, 1))


def test_figures_before_and_after_are_those_of_the_texts_read_one_by_one(tiny_substrate: Substrate, text: TextBank):
    reader = TextReader(tiny_substrate, (2,), "mean", 64, "float32")
    texts = [f"the whale number {n} in the sea" for n in range(6)] + [f"the road number {n} sea" for n in range(8)]
    labels, stack = [1] * 6 + [0] * 8, lens(tiny_substrate.width)
    logits_S1 = reader.logits(stack, texts).numpy()
    words = [["whale", "sea"]]
    (found,) = remove_words(
        held_out(texts, labels, logits_S1), words, stack=stack, reader=reader, text=text, most=50, seed=0
    )
    assert found is not None
    assert (found.num_positive, found.num_negative, found.num_changed) == (6, 8, 14)
    after_S = reader.logits(stack, [without_words(each, words[0]) for each in texts]).numpy()[:, 0]

    def area(scores: np.ndarray) -> float:
        gaps = scores[:6, None] - scores[None, 6:]
        return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())

    assert found.auroc_before == pytest.approx(area(logits_S1[:, 0]))
    assert found.auroc_after == pytest.approx(area(after_S))
    assert found.drop_low <= found.auroc_before - found.auroc_after <= found.drop_high
    assert (found.text_before, found.text_after) == (1.0, 0.5)  # without its words the text lens knows nothing


def test_no_more_texts_are_read_than_asked_and_unchanged_negatives_all_count(tiny_substrate: Substrate):
    reader = TextReader(tiny_substrate, (2,), "mean", 64, "float32")
    texts = (
        [f"a whale {n}" for n in range(20)] + [f"whale road {n}" for n in range(20)] + [f"car {n}" for n in range(9)]
    )
    logits = np.random.default_rng(0).normal(size=(49, 1))
    stack = lens(tiny_substrate.width)
    words = [["whale"]]
    (found,) = remove_words(
        held_out(texts, [1] * 20 + [0] * 29, logits), words, stack=stack, reader=reader, text=None, most=5, seed=1
    )
    assert found is not None
    assert (found.num_positive, found.num_negative, found.num_changed) == (5, 5 + 9, 10)
    assert np.isnan(found.text_before)


def test_a_text_of_telling_words_alone_is_left_out_and_a_lens_without_texts_has_no_result(tiny_substrate: Substrate):
    reader = TextReader(tiny_substrate, (2,), "mean", 64, "float32")
    texts = ["whale", "a road", "a car"]
    options = {"stack": lens(tiny_substrate.width), "reader": reader, "text": None, "most": 5, "seed": 0}
    assert remove_words(held_out(texts, [1, 0, 0], np.zeros((3, 1))), [["whale"]], **options) == [None]
