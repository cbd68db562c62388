"""Claims about the text lenses: the bank of plain arrays says what scikit-learn's own pipeline says."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ftw.errors import ConfigError, DataError, PackError
from ftw.hat import text as text_module
from ftw.hat.text import TextBank, TextLens, grams
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.text_control import TextConfig, fit_text_bank

SENTENCES = """The cat dog sat on a mat. Über straße 3rd I x_1 run runs, running. Was it? “quoted” naïve 数字"""
WORDS = SENTENCES.split()
UNSEEN = [
    "",
    "   ",
    "zzz unknown words",
    "The cat sat on the mat. The CAT!",
    "dog",
    "a I x",
    "straße Über 数字 naïve cat",
]


def pool(num_texts: int = 60, num_concepts: int = 3, seed: int = 0) -> SampleTable:
    """Texts of common words; concept n has its own marked texts, weights and telling word."""
    rng = random.Random(seed)
    builder = SampleTableBuilder([f"concept {n}" for n in range(num_concepts)])
    for number in range(num_texts):
        words = [rng.choice(WORDS) for _ in range(rng.randint(3, 25))]
        told = rng.randrange(num_concepts + 1)
        text = " ".join([*words, f"telling{told}", str(number)])
        row = builder.text(text, group=str(number), split="train" if number % 5 else "test", source="toy")
        for concept in range(num_concepts):
            if rng.random() < 0.8:
                builder.mark(row, f"concept {concept}", int(told == concept), rng.choice([1.0, 3.0]))
    return builder.build()


def pipelines(table: SampleTable, config: TextConfig):
    """The same lenses fitted plainly, one after the other."""
    train = table.where("train")
    vectoriser = TfidfVectorizer(ngram_range=(1, config.ngrams), sublinear_tf=config.sublinear_tf)
    vectoriser.fit([table.texts[row] for row in train])
    labels, weights = table.matrices(train)
    for lens in range(len(table.concepts)):
        used = weights[:, lens] > 0
        model = LogisticRegression(C=config.c, class_weight="balanced", solver="liblinear", tol=1e-9, max_iter=10_000)
        features = vectoriser.transform([table.texts[row] for row in train[used]])
        model.fit(features, labels[used, lens], sample_weight=weights[used, lens])
        yield vectoriser, model


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(1, 3))
def test_grams_are_those_of_scikit_learn(text, ngrams):
    assert grams(text, ngrams) == TfidfVectorizer(ngram_range=(1, ngrams)).build_analyzer()(text)


@pytest.mark.parametrize(
    "config", [TextConfig(), TextConfig(ngrams=1, sublinear_tf=False, c=1.0)], ids=["pairs", "words"]
)
def test_the_bank_equals_scikit_learn_lens_by_lens(config):
    table = pool()
    logits = fit_text_bank(table, config, progress=False).score(table.texts + UNSEEN)
    assert logits.dtype == torch.float32
    for lens, (vectoriser, model) in enumerate(pipelines(table, config)):
        expected = model.decision_function(vectoriser.transform(table.texts + UNSEEN))
        # Two solvers of one convex problem; the table itself is exact, as the next test shows.
        np.testing.assert_allclose(logits[:, lens], expected, atol=5e-3)


def test_lenses_with_vocabularies_of_their_own_equal_their_pipelines():
    table, lenses, expected = pool(), [], []
    labels, weights = table.matrices(np.arange(len(table)))
    for lens, name in enumerate(table.concepts):
        used = np.flatnonzero(weights[:, lens])
        pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0))
        pipeline.fit([table.texts[row] for row in used], labels[used, lens])
        vectoriser, model = pipeline[0], pipeline[1]
        vocabulary = vectoriser.get_feature_names_out()
        fitted = {"idf": vectoriser.idf_, "coefficients": model.coef_[0], "bias": model.intercept_[0]}
        lenses.append(TextLens(name=name, vocabulary=vocabulary, **fitted))
        expected.append(pipeline.decision_function(table.texts + UNSEEN))
    bank = TextBank.from_lenses(lenses)
    np.testing.assert_allclose(bank.score(table.texts + UNSEEN), np.stack(expected, axis=1), atol=1e-5)


def test_the_shared_layout_is_exact_to_float32():
    table, rng = pool(), np.random.default_rng(0)
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(table.texts)
    vocabulary, weights = (
        list(vectoriser.get_feature_names_out()),
        rng.normal(size=(len(vectoriser.vocabulary_), 5)) * 4,
    )
    bias = rng.normal(size=5)
    bank = TextBank(
        names=list("abcde"),
        vocabulary=vocabulary,
        row_starts=np.arange(len(vocabulary) + 1) * 5,
        lenses=np.tile(np.arange(5, dtype=np.int32), len(vocabulary)),
        numerators=(weights * vectoriser.idf_[:, None]).astype(np.float32).ravel(),
        bias=bias.astype(np.float32),
        idf=vectoriser.idf_.astype(np.float32),
    )
    expected = vectoriser.transform(table.texts + UNSEEN) @ weights + bias
    np.testing.assert_allclose(bank.score(table.texts + UNSEEN), expected, atol=1e-5)


def test_texts_scored_together_equal_texts_scored_alone(monkeypatch):
    table = pool()
    bank = fit_text_bank(table, progress=False)
    texts = table.texts + UNSEEN
    alone = torch.cat([bank.score([text]) for text in texts])
    torch.testing.assert_close(bank.score(texts), alone)
    monkeypatch.setattr(text_module, "ENTRIES_AT_ONCE", 37)
    torch.testing.assert_close(bank.score(texts), alone)
    assert bank.score([]).shape == (0, 3)


def test_a_bank_survives_its_tensors_and_json():
    bank = fit_text_bank(pool(), progress=False)
    again = TextBank.from_tensors(bank.tensors(), json.loads(json.dumps(bank.description())))
    assert again.names == bank.names
    assert torch.equal(again.score(UNSEEN), bank.score(UNSEEN))
    own = TextBank.from_lenses(
        [TextLens(name="a", vocabulary=["cat"], idf=np.ones(1), coefficients=np.ones(1), bias=0.5)]
    )
    assert torch.equal(TextBank.from_tensors(own.tensors(), own.description()).score(UNSEEN), own.score(UNSEEN))


def test_a_subset_and_a_calibration_say_what_the_whole_says():
    bank = fit_text_bank(pool(), progress=False)
    whole = bank.score(UNSEEN)
    torch.testing.assert_close(bank.subset(["concept 2", "concept 0"]).score(UNSEEN), whole[:, [2, 0]])
    scale, offset = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.0, -3.0])
    calibrated = bank.calibrated(scale, offset).score(UNSEEN)
    torch.testing.assert_close(
        calibrated, (whole * torch.tensor(scale) + torch.tensor(offset)).float(), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(PackError, match="no lens 'cat'"):
        bank.subset(["cat"])


def test_marks_and_training_texts_alone_decide():
    table = pool()
    bank = fit_text_bank(table, progress=False)
    changed = [
        text + " leak" if split == "test" else text for text, split in zip(table.texts, table.splits, strict=True)
    ]
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    other = fit_text_bank(SampleTable(**{**fields, "texts": changed}), progress=False)
    assert torch.equal(other.score(UNSEEN), bank.score(UNSEEN))
    fold = fit_text_bank(table, rows=table.where("train")[::2], progress=False)
    assert len(fold.vocabulary) < len(bank.vocabulary)


def test_a_concept_of_one_class_has_no_opinion_and_is_named(caplog):
    table = pool()
    labels = np.where(table.cols == 1, 0, table.labels)
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    with caplog.at_level(logging.WARNING):
        logits = fit_text_bank(SampleTable(**{**fields, "labels": labels}), progress=False).score(table.texts)
    assert "concept 1" in caplog.text
    assert (logits[:, 1] == 0).all()
    torch.testing.assert_close(logits[:, [0, 2]], fit_text_bank(table, progress=False).score(table.texts)[:, [0, 2]])
    with pytest.raises(DataError, match="none of 3 concepts"):
        fit_text_bank(SampleTable(**{**fields, "labels": labels * 0}), progress=False)


def test_unusable_input_is_refused_with_the_next_step():
    table = pool()
    with pytest.raises(DataError, match="texts of split 'train'"):
        fit_text_bank(table, rows=np.array([], dtype=int), progress=False)
    with pytest.raises(DataError, match="lower min_df"):
        fit_text_bank(table, TextConfig(min_df=50), progress=False)
    with pytest.raises(ConfigError, match="ngrams=0"):
        TextConfig(ngrams=0)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("lenses", torch.tensor([99], dtype=torch.int32), "outside"),
        ("row_starts", torch.tensor([0, 7]), "do not rise"),
        ("bias", torch.zeros(3), "shape"),
        ("numerators", None, "missing"),
        ("idf", None, "either"),
    ],
)
def test_damaged_packs_are_refused(part, value, words):
    bank = TextBank(
        names=["a"], vocabulary=["cat"], row_starts=np.array([0, 1]), lenses=np.zeros(1, np.int32),
        numerators=np.ones(1, np.float32), bias=np.zeros(1, np.float32), idf=np.ones(1, np.float32),
    )  # fmt: skip
    tensors = {name: tensor for name, tensor in {**bank.tensors(), part: value}.items() if tensor is not None}
    with pytest.raises(PackError, match=words):
        TextBank.from_tensors(tensors, bank.description())
