"""Claims about text banks and windows: both say what scikit-learn says, the window without starting from scratch."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ftw.errors import ConfigError, PackError
from ftw.hat import text as text_module
from ftw.hat.text import CHARS_MARK, TextBank, TextLens, grams
from ftw.hat.text_window import TextWindow, text_timeline
from ftw.hat.timeline import Timeline

SENTENCE = "The cat dog sat on a mat. Über straße 3rd I x_1 run runs, running. Was it? “quoted” naïve 数字 ΟΔΟΣ"
WORDS = SENTENCE.split()
UNSEEN = [
    "",
    "   ",
    "zzz unknown words",
    "The cat sat on the mat. The CAT!",
    "dog",
    "a I x",
    "straße Über 数字 ΟΔΟΣ cat",
]
PIECES = [
    "cat",
    " c",
    "at",
    "at ",
    " ",
    "",
    "dog",
    " sat",
    "-",
    "\n",
    "don't",
    " 数字",
    "，",
    "x",
    " a",
    "ΟΔΟΣ",
    "Σ.",
    " The dog",
]


def texts(num: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 25))) + f" n{i % 7}" for i in range(num)]


def fitted(ngrams: int, chars: tuple[int, int] | None, sublinear: bool, num_lenses: int = 5, scale: float = 4.0):
    """A scikit-learn vectoriser, coefficients for it (a third of them zero), and the bank of both."""
    rng = np.random.default_rng(0)
    word = TfidfVectorizer(ngram_range=(1, max(ngrams, 1))).build_analyzer()
    char = TfidfVectorizer(analyzer="char_wb", ngram_range=chars or (1, 1)).build_analyzer()

    def analyzer(text: str) -> list[str]:
        return (word(text) if ngrams else []) + ([CHARS_MARK + run for run in char(text)] if chars else [])

    vectoriser = TfidfVectorizer(analyzer=analyzer, sublinear_tf=sublinear).fit(texts())
    vocabulary = [str(gram) for gram in vectoriser.get_feature_names_out()]
    weights_VN = rng.normal(size=(len(vocabulary), num_lenses)) * scale
    weights_VN *= rng.random(weights_VN.shape) > 1 / 3
    bias_N = rng.normal(size=num_lenses)
    row_V, lens_E = np.nonzero(weights_VN)
    bank = TextBank(
        names=[f"concept {n}" for n in range(num_lenses)],
        vocabulary=vocabulary,
        row_starts=np.concatenate([[0], np.cumsum(np.bincount(row_V, minlength=len(vocabulary)))]),
        lenses=lens_E.astype(np.int32),
        numerators=(weights_VN * vectoriser.idf_[:, None])[row_V, lens_E].astype(np.float32),
        bias=bias_N.astype(np.float32),
        idf=vectoriser.idf_.astype(np.float32),
        ngrams=ngrams,
        chars=chars,
        sublinear_tf=sublinear,
    )
    return vectoriser, weights_VN, bias_N, bank


def probability(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64)))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_grams_are_those_of_scikit_learn(text, ngrams, shortest, more):
    assert grams(text, ngrams) == TfidfVectorizer(ngram_range=(1, ngrams)).build_analyzer()(text)
    oracle = TfidfVectorizer(analyzer="char_wb", ngram_range=(shortest, shortest + more)).build_analyzer()
    assert sorted(grams(text, 0, (shortest, shortest + more))) == sorted(CHARS_MARK + run for run in oracle(text))


@pytest.mark.parametrize("dense", [True, False], ids=["dense rows", "sparse rows"])
@pytest.mark.parametrize(
    ("ngrams", "chars", "sublinear"),
    [(2, None, True), (1, None, False), (0, (3, 5), True), (2, (3, 5), True), (3, (2, 4), False)],
    ids=["pairs", "words", "characters", "both", "long"],
)
def test_probabilities_are_those_of_scikit_learn(ngrams, chars, sublinear, dense, monkeypatch):
    monkeypatch.setattr(text_module, "DENSE_ENTRIES", 3 if dense else 10**9)
    vectoriser, weights_VN, bias_N, bank = fitted(ngrams, chars, sublinear)
    expected = vectoriser.transform(texts() + UNSEEN) @ weights_VN + bias_N
    logits = bank.score(texts() + UNSEEN)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(probability(logits.numpy()), probability(expected), rtol=0, atol=1e-6)
    # A text alone goes another way through the arrays than one of many.
    alone = torch.cat([bank.score([text]) for text in texts() + UNSEEN])
    np.testing.assert_allclose(probability(alone.numpy()), probability(expected), rtol=0, atol=1e-6)


def test_lenses_with_vocabularies_of_their_own_equal_their_pipelines():
    lenses, expected, pool = [], [], texts()
    for lens in range(3):
        used = pool[lens::2]
        labels = [int("cat" in text) if lens else int("dog" in text) for text in used]
        pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0)).fit(used, labels)
        vectoriser, model = pipeline[0], pipeline[1]
        numbers = {"idf": vectoriser.idf_, "coefficients": model.coef_[0], "bias": model.intercept_[0]}
        lenses.append(TextLens(name=f"{lens}", vocabulary=vectoriser.get_feature_names_out(), **numbers))
        expected.append(pipeline.predict_proba(pool + UNSEEN)[:, 1])
    bank = TextBank.from_lenses(lenses)
    scored = probability(bank.score(pool + UNSEEN).numpy())
    np.testing.assert_allclose(scored, np.stack(expected, axis=1), rtol=0, atol=1e-6)


def test_unknown_words_leave_the_bias():
    *_, bank = fitted(2, None, True)
    for text in ("", "  ", "qqq www", "?!"):
        assert torch.equal(bank.score([text])[0], torch.from_numpy(bank.bias))
        window = TextWindow(bank)
        window.push(text)
        assert torch.equal(window.logits(), torch.from_numpy(bank.bias))


def test_texts_scored_together_equal_texts_scored_alone(monkeypatch):
    *_, bank = fitted(2, (3, 5), True)
    alone = torch.cat([bank.score([text]) for text in texts() + UNSEEN])
    torch.testing.assert_close(bank.score(texts() + UNSEEN), alone)
    monkeypatch.setattr(text_module, "ENTRIES_AT_ONCE", 37)
    torch.testing.assert_close(bank.score(texts() + UNSEEN), alone)
    assert bank.score([]).shape == (0, 5)


def own() -> TextBank:
    words = ["cat", "dog", "the dog"]
    lenses = [("a", words[:2], [1.0, 3.0]), ("b", words, [2.0, 1.0, 4.0])]
    return TextBank.from_lenses(
        [
            TextLens(name=n, vocabulary=v, idf=np.array(i), coefficients=np.arange(len(i)) - 0.5, bias=0.5)
            for n, v, i in lenses
        ]
    )


BANKS = {
    "words": fitted(2, None, True)[-1],
    "plain counts": fitted(3, None, False)[-1],
    "characters": fitted(2, (3, 5), True)[-1],
    "vocabularies of their own": own(),
}


def visible(pieces: list[str], tokens: int, inner: str) -> str:
    """The window's text by its definition: what the last pieces spell, without a word that the cut goes through."""
    whole, left = "".join(pieces), len("".join(pieces[:-tokens]))
    if left and re.match(inner, whole[left - 1]):
        left += len(re.match(f"{inner}*", whole[left:]).group())  # pyright: ignore[reportOptionalMemberAccess]
    return whole[left:]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(BANKS)),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=25),
    st.integers(1, 6),
)
def test_a_window_equals_its_text_from_scratch(name, pieces, tokens):
    bank, inner = BANKS[name], r"\S" if BANKS[name].chars else r"\w"
    window = TextWindow(bank, tokens=tokens)
    for number, piece in enumerate(pieces, start=1):
        window.push(piece)
        expected = visible(pieces[:number], tokens, inner)
        assert window.text == expected
        assert window.counts == bank.counts(expected)
        assert len(window) == min(number, tokens)
        if number % 3:  # sums that are caught up every step, and sums that have several steps to catch up
            torch.testing.assert_close(window.logits(), bank.score([expected])[0], rtol=1e-5, atol=1e-5)


def test_a_long_stream_leaves_no_rounding_behind(monkeypatch):
    monkeypatch.setattr(text_module, "DENSE_ENTRIES", 3)
    bank = replace(BANKS["words"])
    window, rng = TextWindow(bank, tokens=8), random.Random(1)
    for _ in range(3000):
        window.push(rng.choice(PIECES + WORDS) + rng.choice(["", " "]))
        window.logits()
    torch.testing.assert_close(window.logits(), bank.score([window.text])[0], rtol=0, atol=2e-6)
    window.clear()
    assert torch.equal(window.logits(), torch.from_numpy(bank.bias))


def test_a_word_cut_at_the_left_is_dropped_and_one_unfinished_is_read():
    window = TextWindow(BANKS["words"], tokens=3)
    seen = []
    for piece in ["un", "cat", " the", " do", "g"]:
        window.push(piece)
        seen.append(window.text)
    assert seen == ["un", "uncat", "uncat the", " the do", " the dog"]
    with pytest.raises(ConfigError, match="0 tokens"):
        TextWindow(BANKS["words"], tokens=0)


def test_a_bank_survives_its_tensors_and_json():
    bank = replace(
        BANKS["characters"],
        quantiles_NQ=np.sort(np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)),
        levels_Q=np.linspace(0, 1, 9, dtype=np.float32),
        is_calibrated=True,
    )
    for known in (bank, own()):
        again = TextBank.from_tensors(known.tensors(), json.loads(json.dumps(known.description())))
        assert again.description() == known.description()
        logits = known.score(texts())
        assert torch.equal(again.score(texts()), logits)
        assert torch.equal(again.percentile(logits).nan_to_num(-1), known.percentile(logits).nan_to_num(-1))


def test_a_bank_of_the_first_format_is_read():
    bank = BANKS["words"]
    first = {key: value for key, value in bank.description().items() if key not in ("chars", "is_calibrated")} | {
        "format": 1
    }
    assert torch.equal(TextBank.from_tensors(bank.tensors(), first).score(UNSEEN), bank.score(UNSEEN))


def test_percentiles_are_those_of_the_background():
    bank, background = BANKS["words"], texts(400, seed=3)
    logits = bank.score(background)
    levels = np.linspace(0, 1, 101, dtype=np.float32)
    quantiles = np.quantile(logits.numpy(), levels, axis=0).T.astype(np.float32)
    ranked = replace(bank, quantiles_NQ=quantiles, levels_Q=levels)
    expected = (logits.unsqueeze(0) < logits.unsqueeze(1)).float().mean(dim=1)
    torch.testing.assert_close(ranked.percentile(logits), expected, rtol=0, atol=0.02)
    assert bank.percentile(logits).isnan().all()
    part = ranked.subset(["concept 3", "concept 0"])
    torch.testing.assert_close(part.percentile(part.score(UNSEEN)), ranked.percentile(ranked.score(UNSEEN))[:, [3, 0]])
    with pytest.raises(PackError, match="calibrate the logits first"):
        ranked.calibrated(np.ones(5), np.zeros(5))


def test_a_subset_and_a_calibration_say_what_the_whole_says():
    bank = BANKS["characters"]
    whole = bank.score(UNSEEN)
    torch.testing.assert_close(bank.subset(["concept 2", "concept 0"]).score(UNSEEN), whole[:, [2, 0]])
    scale, offset = np.array([2.0, -1.0, 0.5, 1.0, 3.0]), np.array([1.0, 0.0, -3.0, 0.0, 1.0])
    calibrated = bank.calibrated(scale, offset)
    expected = (whole * torch.tensor(scale) + torch.tensor(offset)).float()
    torch.testing.assert_close(calibrated.score(UNSEEN), expected, rtol=1e-5, atol=1e-5)
    assert calibrated.is_calibrated
    assert not bank.is_calibrated
    with pytest.raises(PackError, match="no lens 'cat'"):
        bank.subset(["cat"])


def test_a_timeline_of_text_reads_what_the_model_wrote():
    tokens = ["<|user|>", "cat", "<|end|>", " Was", " the", " do", "g", " sat"]
    shape = (len(tokens), 1)
    timeline = Timeline(
        tokens=tokens,
        token_ids=np.arange(len(tokens)),
        is_prompt=np.arange(len(tokens)) < 4,
        is_special=np.isin(np.arange(len(tokens)), [0, 2]),
        concepts=["whale"],
        logits_TN=np.zeros(shape),
        percentiles_TN=np.zeros(shape),
    )
    bank = BANKS["words"]
    read = text_timeline(timeline, bank, tokens=3)
    assert read.tokens == tokens
    assert read.concepts == bank.names
    assert np.isnan(read.logits_TN[[0, 2]]).all()
    # The window forgets the question, and what stood before the answer began.
    written = ["cat", " Was", " the", " the do", " the dog", " dog sat"]
    torch.testing.assert_close(torch.from_numpy(read.logits_TN[[1, 3, 4, 5, 6, 7]]), bank.score(written))
    assert np.isnan(read.percentiles_TN).all()


SMALL = TextBank(
    names=["a"], vocabulary=["cat"], row_starts=np.array([0, 1]), lenses=np.zeros(1, np.int32),
    numerators=np.ones(1, np.float32), bias=np.zeros(1, np.float32), idf=np.ones(1, np.float32),
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("lenses", torch.tensor([99], dtype=torch.int32), "outside"),
        ("row_starts", torch.tensor([0, 7]), "do not rise"),
        ("bias", torch.zeros(3), "shape"),
        ("numerators", None, "missing"),
        ("idf", None, "either"),
        ("levels_Q", torch.zeros(2), "both quantiles"),
        ("quantiles_NQ", torch.zeros(1, 4), "shape"),
    ],
)
def test_damaged_tensors_are_refused(part, value, words):
    tensors = {name: tensor for name, tensor in {**SMALL.tensors(), part: value}.items() if tensor is not None}
    with pytest.raises(PackError, match=words):
        TextBank.from_tensors(tensors, SMALL.description())


def test_quantiles_that_fall_are_refused():
    tensors = SMALL.tensors() | {"quantiles_NQ": torch.tensor([[1.0, 0.0]]), "levels_Q": torch.tensor([0.0, 1.0])}
    with pytest.raises(PackError, match="do not rise"):
        TextBank.from_tensors(tensors, SMALL.description())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocabulary": ["cat", "cat"]}, "shape"),
        ({"format": 9}, "format 9"),
        ({"ngrams": 10**9}, "ngrams=1000000000"),
        ({"chars": [3]}, "chars="),
        ({"chars": [5, 3]}, "chars="),
        ({"chars": [0, 10**9]}, "chars="),
    ],
)
def test_damaged_descriptions_are_refused(change, words):
    with pytest.raises(PackError, match=words):
        TextBank.from_tensors(SMALL.tensors(), SMALL.description() | change)
