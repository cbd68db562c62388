"""Claims about the fitted text lenses: what scikit-learn's own pipelines say, calibrated on what they have not seen."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ftw.errors import ConfigError, DataError
from ftw.map import text_control
from ftw.map.calibrate import fit_platt
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.text_control import TextConfig, fit_text_bank, window_texts
from ftw.map.training.data import group_folds

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


@pytest.mark.parametrize(
    "config",
    [TextConfig(folds=0), TextConfig(ngrams=1, sublinear_tf=False, c=1.0, folds=0)],
    ids=["pairs", "words"],
)
def test_the_bank_equals_scikit_learn_lens_by_lens(config):
    table = pool()
    logits = fit_text_bank(table, config, progress=False).score(table.texts + UNSEEN)
    assert logits.dtype == torch.float32
    for lens, (vectoriser, model) in enumerate(pipelines(table, config)):
        expected = model.decision_function(vectoriser.transform(table.texts + UNSEEN))
        # Two solvers of one convex problem; the table itself is exact, as the next test shows.
        np.testing.assert_allclose(logits[:, lens], expected, atol=5e-3)


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


def test_the_calibration_is_platts_on_logits_of_pipelines_without_the_fold():
    table, config = pool(240), TextConfig(folds=3, seed=1)
    train = table.where("train")
    folds = group_folds([table.groups[row] for row in train], 3, 1)
    labels, weights = table.matrices(train)
    texts = [table.texts[row] for row in train]
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    held_out = np.zeros(labels.shape)
    for lens, fold in itertools.product(range(3), range(3)):
        used, out = (folds != fold) & (weights[:, lens] > 0), folds == fold
        model = LogisticRegression(C=config.c, class_weight="balanced", solver="liblinear", tol=1e-9, max_iter=10_000)
        model.fit(features[used], labels[used, lens], sample_weight=weights[used, lens])
        held_out[out, lens] = model.decision_function(features[out])
    platt = fit_platt(held_out, labels, weights, prior=0.5)
    bank, raw = (fit_text_bank(table, TextConfig(folds=folds, seed=1), progress=False) for folds in (3, 0))
    expected = raw.score(UNSEEN).numpy() * platt.scale_N + platt.offset_N
    np.testing.assert_allclose(bank.score(UNSEEN), expected, atol=2e-2)
    assert bank.is_calibrated
    assert not raw.is_calibrated


def test_probabilities_are_calibrated_on_new_texts():
    table = pool(900)
    test = table.where("test")
    labels, weights = table.matrices(test)
    logits = fit_text_bank(table, progress=False).score([table.texts[row] for row in test]).numpy()
    # At even odds: the base rate that the probabilities are for.
    used = weights > 0
    balance = np.where(labels > 0, 1 / (labels * used).sum(axis=0), 1 / ((1 - labels) * used).sum(axis=0)) * used
    probabilities = 1 / (1 + np.exp(-logits))
    stated, found = (probabilities * balance).sum(axis=0), (labels * balance).sum(axis=0)
    np.testing.assert_allclose(stated, found, atol=0.15)


def test_a_lens_that_learned_nothing_says_one_half():
    table = pool(200)
    labels = np.random.default_rng(5).permutation(table.labels)
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    bank = fit_text_bank(SampleTable(**{**fields, "labels": labels}), progress=False)
    probabilities = 1 / (1 + np.exp(-bank.score(table.texts).numpy()))
    raw = fit_text_bank(SampleTable(**{**fields, "labels": labels}), TextConfig(folds=0), progress=False)
    assert np.abs(probabilities - 0.5).max() < 0.4
    # … but a calibrated lens never turns its order around.
    order = [np.argsort(some.score(table.texts).numpy(), axis=0)[::20] for some in (bank, raw)]
    np.testing.assert_array_equal(*order)


def test_lenses_whose_groups_cannot_be_split_stay_raw_and_are_named(caplog):
    table = pool()
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    one_group = SampleTable(**{**fields, "groups": ["same"] * len(table)})
    with caplog.at_level(logging.WARNING):
        bank = fit_text_bank(one_group, progress=False)
    assert "3 are not calibrated" in caplog.text
    assert not bank.is_calibrated
    raw = fit_text_bank(table, TextConfig(folds=0), progress=False)
    assert torch.equal(bank.score(UNSEEN), raw.score(UNSEEN))


def test_percentiles_come_from_windows_of_background_text():
    table = pool(200)
    splits = ["background" if number % 3 == 0 else split for number, split in enumerate(table.splits)]
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    table = SampleTable(**{**fields, "splits": splits})
    bank = fit_text_bank(table, TextConfig(window_words=4), progress=False)
    background = [table.texts[row] for row in table.where("background")]
    every = [
        " ".join(text.split()[max(0, end - 4) : end]) for text in background for end in range(1, len(text.split()) + 1)
    ]
    assert window_texts(background, words=4, limit=10**6) == every
    logits = bank.score(every)
    share = (logits.unsqueeze(0) < logits.unsqueeze(1)).float().mean(dim=1)
    same = (logits.unsqueeze(0) == logits.unsqueeze(1)).float().mean(dim=1)
    torch.testing.assert_close(bank.percentile(logits), share + same / 2, rtol=0, atol=0.02)
    assert fit_text_bank(table, TextConfig(window_words=0), progress=False).quantiles_NQ is None


def test_windows_are_evenly_spaced_and_never_more_than_asked_for():
    texts = [" ".join(f"{text}w{word}" for word in range(50)) for text in range(4)]
    few = window_texts(texts, words=3, limit=7)
    assert len(few) == 7
    assert few[0] == "0w0"
    assert few[-1] == "3w47 3w48 3w49"
    assert window_texts(["", " "], words=3, limit=5) == []


def test_characters_know_pieces_of_words():
    table = pool(300)
    words, pieces = (fit_text_bank(table, TextConfig(chars=chars), progress=False) for chars in ([], [3, 5]))
    probe = ["tellin", "zzz"]
    logits = words.score(probe)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(*pieces.score(probe))


def test_a_slim_bank_keeps_what_moves_logits_and_their_mean():
    table = pool(300)
    train = [table.texts[row] for row in table.where("train")]
    whole = fit_text_bank(table, TextConfig(folds=0), progress=False)
    slim = fit_text_bank(table, TextConfig(folds=0, kept=0.1), progress=False)
    assert len(slim.lenses) == pytest.approx(0.1 * len(whole.lenses), abs=5)
    assert slim.vocabulary == whole.vocabulary
    # What is left out says nothing on average, and little of any text.
    before, after = (bank.score(train).numpy() for bank in (whole, slim))
    np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), atol=1e-4)
    assert (after - before).std() < 0.3 * before.std()
    # Every kept weight moves its lens more than every dropped one moves its own.
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(train)
    features = vectoriser.transform(train)
    size = np.sqrt(np.asarray(features.power(2).mean(axis=0)).ravel()) / vectoriser.idf_
    moved = np.zeros((2, len(whole.vocabulary), len(whole)))
    for place, bank in enumerate((whole, slim)):
        rows = np.repeat(np.arange(len(bank.vocabulary)), np.diff(bank.row_starts))
        moved[place, rows, bank.lenses] = np.abs(bank.numerators) * size[rows]
    kept = moved[1] > 0
    np.testing.assert_allclose(moved[1][kept], moved[0][kept])
    assert moved[0][kept].min() >= moved[0][~kept].max() * (1 - 1e-5)
    again = slim.from_tensors(slim.tensors(), slim.description())
    assert torch.equal(again.score(UNSEEN), slim.score(UNSEEN))


def test_the_same_table_gives_the_same_bank(monkeypatch):
    table = pool(150, 40)
    first = fit_text_bank(table, progress=False)
    for wide in (20_000, 100, 0):  # all lenses in threads, some, none
        monkeypatch.setattr(text_control, "WIDE", wide)
        again = fit_text_bank(table, progress=False)
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in first.tensors().items())


def test_a_concept_of_one_class_has_no_opinion_and_is_named(caplog):
    table = pool()
    labels = np.where(table.cols == 1, 0, table.labels)
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    with caplog.at_level(logging.WARNING):
        logits = fit_text_bank(SampleTable(**{**fields, "labels": labels}), progress=False).score(table.texts)
    assert "concept 1" in caplog.text
    assert (logits[:, 1] == 0).all()
    both = fit_text_bank(table, progress=False).score(table.texts)[:, [0, 2]]
    torch.testing.assert_close(logits[:, [0, 2]], both, rtol=1e-4, atol=1e-4)
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
    with pytest.raises(ConfigError, match="shortest and the longest"):
        TextConfig(chars=[5, 3])
    with pytest.raises(ConfigError, match="folds=1"):
        TextConfig(folds=1)
    with pytest.raises(ConfigError, match="kept=0"):
        TextConfig(kept=0)
