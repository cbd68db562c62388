"""Pipelines that others stored as joblib files give the same probabilities as text lenses, and no file is ever run."""

import random
import zlib
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

from ftw.errors import ConfigError, PackError
from ftw.hat.text_window import TextWindow
from ftw.map import joblib_text
from ftw.map.joblib_text import import_text_lenses

DRAW = random.Random(0)
WORDS = ["whale", "sea", "car", "road", "Öl", "naïve", "the", "a1", "x", "don't", *(f"w{n}" for n in range(60))]
TEXTS = [" ".join(DRAW.choices(WORDS, k=12)) for _ in range(120)]
UNSEEN = ["", "nothing known here", "The WHALE, the sea!", "car car car road", *TEXTS[:20]]


def pipeline(word: str, **options: Any) -> Pipeline:
    words = TfidfVectorizer(**{"ngram_range": (1, 2), "min_df": 2, "max_df": 0.95, **options})
    model = make_pipeline(words, LogisticRegression(class_weight="balanced"))
    return model.fit(TEXTS, [int(word in text) for text in TEXTS])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "layer2" / "text_lenses"
    place.mkdir(parents=True)
    return place


FORMS = [
    {},
    {"compress": 3},
    {"compress": ("gzip", 3)},
    {"compress": ("bz2", 3)},
    {"compress": ("xz", 1)},
    {"compress": ("lzma", 1)},
    {"protocol": 2},
    {"protocol": 3},
    {"protocol": 5},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_probabilities_are_those_of_the_pipeline(folder: Path, form: dict[str, Any]):
    models = {"Whale": pipeline("whale"), "Car": pipeline("car", ngram_range=(1, 1)), "Öl": pipeline("Öl")}
    for name, model in models.items():
        joblib.dump(model, folder / f"{name}_text_lens.joblib", **form)
    bank = import_text_lenses(folder.parent.parent, trust_pickle=True)
    assert bank.names == sorted(models)
    expected_BN = np.stack([models[name].predict_proba(UNSEEN)[:, 1] for name in bank.names], axis=1)
    np.testing.assert_allclose(torch.sigmoid(bank.score(UNSEEN)).numpy(), expected_BN, atol=1e-6)
    window = TextWindow(bank)
    for piece in ("The", " wh", "ale"):
        window.push(piece)
    np.testing.assert_allclose(window.logits(), bank.score(["The whale"])[0], atol=1e-5)


@pytest.mark.parametrize("options", [{"sublinear_tf": True}, {"smooth_idf": False}, {"ngram_range": (2, 3)}], ids=str)
def test_options_that_change_numbers_only_are_kept(folder: Path, options: dict[str, Any]):
    joblib.dump(model := pipeline("whale", **options), folder / "Whale_text_lens.joblib")
    logits = import_text_lenses(folder, trust_pickle=True).score(UNSEEN)[:, 0]
    np.testing.assert_allclose(torch.sigmoid(logits), model.predict_proba(UNSEEN)[:, 1], atol=1e-6)


def test_two_classes_of_an_old_multinomial_model_count_twice(folder: Path):
    model = pipeline("whale")
    model[-1].multi_class = "multinomial"  # what releases before 1.5 stored: a softmax of (-d, d)
    joblib.dump(model, folder / "Whale_text_lens.joblib")
    logits = import_text_lenses(folder, trust_pickle=True).score(UNSEEN)[:, 0]
    np.testing.assert_allclose(logits, 2 * model.decision_function(UNSEEN), atol=1e-5)


def test_the_same_concept_on_two_levels_is_read_once_the_upper_one(folder: Path):
    upper = folder.parent.parent / "layer1" / "text_lenses"
    upper.mkdir(parents=True)
    joblib.dump(model := pipeline("whale"), upper / "Whale_text_lens.joblib")
    joblib.dump(pipeline("car"), folder / "Whale_text_lens.joblib")
    bank = import_text_lenses(folder.parent.parent, trust_pickle=True)
    np.testing.assert_allclose(bank.score(UNSEEN)[:, 0], model.decision_function(UNSEEN), atol=1e-5)


def test_without_trust_the_next_step_is_named(folder: Path):
    with pytest.raises(PackError, match=r"no .joblib files"):
        import_text_lenses(folder)
    joblib.dump(pipeline("whale"), folder / "Whale_text_lens.joblib")
    with pytest.raises(ConfigError, match=r"trust_pickle=True .*--trust-pickle"):
        import_text_lenses(folder)


class Runs:
    """What would run when it is loaded."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def hostile() -> dict[str, Any]:
    inside = pipeline("whale")
    inside[0].token_pattern = Runs(exec, "open('ran', 'w')")
    deep: tuple[Any, ...] = ()
    for _ in range(200):
        deep = (deep,)
    return {
        "a call": Runs(Path.touch, Path("ran")),
        "eval": Runs(eval, "open('ran', 'w')"),
        "a call inside a pipeline": inside,
        "a hidden class": Runs(getattr, "text", "upper"),
        "an array of objects": {"a": np.array([object], dtype=object)},
        "a key of tuples": {deep: 1},
        "no pipeline": {"a": 1},
    }


@pytest.mark.parametrize("what", hostile())
def test_what_would_run_is_refused_and_does_not(folder: Path, what: str):
    joblib.dump(hostile()[what], folder / "Whale_text_lens.joblib")
    with pytest.raises(PackError, match=r"Whale_text_lens.joblib"):
        import_text_lenses(folder, trust_pickle=True)
    assert not Path("ran").exists()


def test_other_models_and_ways_to_cut_words_are_refused_by_name(folder: Path):
    labels = [n % 3 for n in range(len(TEXTS))]
    others = {
        "names 'sklearn.svm._classes.LinearSVC'": make_pipeline(TfidfVectorizer(), LinearSVC()).fit(
            TEXTS, [n % 2 for n in labels]
        ),
        "no pipeline of": make_pipeline(TfidfVectorizer(), "passthrough", LogisticRegression()).fit(TEXTS, labels),
        "tells 3 classes apart": make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, labels),
        "analyzer='char'": pipeline("whale", analyzer="char"),
        "lowercase=False": pipeline("whale", lowercase=False),
        "no idf or l2 norm": pipeline("whale", norm=None),
        "stop words": pipeline("whale", stop_words="english"),
        "ever fitted": make_pipeline(TfidfVectorizer(), LogisticRegression()),
    }
    for words, model in others.items():
        joblib.dump(model, folder / "Whale_text_lens.joblib")
        with pytest.raises(PackError, match=words):
            import_text_lenses(folder, trust_pickle=True)


def test_a_damaged_file_is_an_error_and_nothing_else(folder: Path):
    path = folder / "Whale_text_lens.joblib"
    joblib.dump(pipeline("whale"), path)
    whole = path.read_bytes()
    expected = import_text_lenses(folder, trust_pickle=True).score(UNSEEN)
    rng = np.random.default_rng(0)
    cuts = [whole[: int(size)] for size in rng.integers(0, len(whole), 25)]
    for _ in range(75):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] = int(rng.integers(256))
        cuts.append(bytes(changed))
    for data in cuts:
        path.write_bytes(data)
        try:  # a changed number may still be a sound lens
            bank = import_text_lenses(folder, trust_pickle=True)
        except PackError:
            continue
        assert bank.score(UNSEEN).shape == expected.shape


def test_a_file_that_unpacks_to_too_much_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "Whale_text_lens.joblib").write_bytes(zlib.compress(bytes(2**21)))
    monkeypatch.setattr(joblib_text, "MAX_BYTES", 2**20)
    with pytest.raises(PackError, match="unpacks to more than 1048576 bytes"):
        import_text_lenses(folder, trust_pickle=True)
