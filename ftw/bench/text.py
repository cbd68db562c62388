"""`ftw bench text`: what the text lenses cost, against the scikit-learn pipelines that they equal.

Without a pack the bank is made up: words by Zipf's law, and a lens knows a gram with the chance that one of the texts
it would have learned from has it. Pipelines are timed for a few lenses and multiplied: each costs the same.

Axes: N lenses, V grams, E entries.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from ftw.bench.measure import Row, Stopwatch
from ftw.errors import PackError
from ftw.hat.text import TextBank
from ftw.hat.text_window import TextWindow
from ftw.map.pack import load_pack

NUM_LENSES, NUM_TEXTS, TEXT_WORDS, NUM_WORDS = 8000, 8000, 24, 20_000
LEARNED_TEXTS = 70  # that a lens of First Light has marks on
MOST_GRAMS, WINDOW_TOKENS, TIMED_PIPELINES = 40_000, 32, 20


def text_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    random = np.random.default_rng(watch.config.seed)
    bank, texts = _packs_bank(watch, random) if watch.config.pack else made_up_bank(watch, random)
    pipelines = [pipeline(bank, lens) for lens in range(min(TIMED_PIPELINES, len(bank)))]
    text, num_bytes = texts[0], _touched_bytes(bank, texts[0])
    one_by_one = watch.row(
        "score a text", lambda: bank.score([text]), n=len(bank), d=len(bank.vocabulary), num_bytes=num_bytes,
        baseline=("scikit-learn pipelines", lambda: [one.decision_function([text]) for one in pipelines]),
        pipelines_timed=len(pipelines),
    )  # fmt: skip
    # A loop over all lenses would take ten seconds a call.
    yield replace(one_by_one, baseline_ms=one_by_one.baseline_ms * len(bank) / len(pipelines))
    window, words = TextWindow(bank, tokens=WINDOW_TOKENS), cycle(" ".join(texts).split())

    def step() -> None:
        window.push(" " + next(words))
        window.logits()

    for _ in range(WINDOW_TOKENS):
        step()
    yield watch.row(
        "a token of a window", step, n=len(bank), d=len(bank.vocabulary), num_bytes=num_bytes,
        baseline=("score the window anew", lambda: bank.score([window.text])), window_tokens=WINDOW_TOKENS,
    )  # fmt: skip


def made_up_bank(watch: Stopwatch, random: np.random.Generator) -> tuple[TextBank, list[str]]:
    """A bank over the vocabulary of made-up texts, and the texts."""
    num_words = watch.size(NUM_WORDS, 200)
    chance_V = 1 / np.arange(1, num_words + 1)
    drawn = random.choice(num_words, size=(watch.size(NUM_TEXTS, 60), TEXT_WORDS), p=chance_V / chance_V.sum())
    texts = [" ".join(f"word{number}" for number in row) for row in drawn.tolist()]
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=watch.size(MOST_GRAMS, 300))
    counts_SV = vectoriser.fit_transform(texts)
    known_V = 1 - (1 - np.asarray((counts_SV > 0).mean(axis=0)).ravel()) ** LEARNED_TEXTS
    num_lenses = watch.size(NUM_LENSES, 20)
    lenses = [np.flatnonzero(random.random(num_lenses) < known).astype(np.int32) for known in known_V]
    starts_V = np.concatenate([[0], np.cumsum([len(row) for row in lenses])]).astype(np.int64)
    bank = TextBank(
        names=[f"concept {n}" for n in range(num_lenses)],
        vocabulary=vectoriser.get_feature_names_out().tolist(),
        row_starts=starts_V,
        lenses=np.concatenate(lenses),
        numerators=random.normal(size=starts_V[-1]).astype(np.float32),
        bias=random.normal(size=num_lenses).astype(np.float32),
        idf=vectoriser.idf_.astype(np.float32),
    )
    return bank, texts


def pipeline(bank: TextBank, lens: int) -> Pipeline:
    """A text lens as scikit-learn would have it."""
    assert bank.idf is not None  # banks with vocabularies of their own are refused above
    vectoriser = TfidfVectorizer(ngram_range=(1, bank.ngrams), sublinear_tf=bank.sublinear_tf, vocabulary=bank.rows)
    vectoriser.idf_ = bank.idf
    gram_E = np.repeat(np.arange(len(bank.vocabulary)), np.diff(bank.row_starts))[bank.lenses == lens]
    classifier = LogisticRegression()
    classifier.coef_ = np.zeros((1, len(bank.vocabulary)))
    classifier.coef_[0, gram_E] = bank.numerators[bank.lenses == lens] / bank.idf[gram_E]
    classifier.intercept_, classifier.classes_ = bank.bias[lens : lens + 1], np.array([0, 1])
    return make_pipeline(vectoriser, classifier)


def _packs_bank(watch: Stopwatch, random: np.random.Generator) -> tuple[TextBank, list[str]]:
    """The text lenses of a pack, and texts of words that they know.

    Raises:
        PackError: the pack has none that share a vocabulary of words.
    """
    bank = load_pack(str(watch.config.pack)).text
    if not isinstance(bank, TextBank) or bank.idf is None or bank.chars is not None or not bank.ngrams:
        raise PackError(f"pack={watch.config.pack} has no text lenses over one vocabulary of words; leave pack out")
    words = [gram for gram in bank.vocabulary if " " not in gram]
    return bank, [" ".join(random.choice(words, TEXT_WORDS)) for _ in range(watch.size(100, 10))]


def _touched_bytes(bank: TextBank, text: str) -> int:
    """Bytes of the entries of a text's grams: a lens's number and a weight each, or a dense row of weights."""
    row_M = np.fromiter(bank.counts(text), np.int64)
    scattered_M = bank.numerator_rows.scattered(row_M)
    return int(8 * scattered_M.sum() + 4 * len(bank) * (scattered_M == 0).sum())
