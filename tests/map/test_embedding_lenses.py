"""Lenses over embeddings are fitted as scikit-learn fits them, calibrated out of fold, and travel in packs."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from random_lenses import random_stack
from sklearn.linear_model import LogisticRegression
from toy_encoder import toy_encoder

from ftw.errors import ConfigError, PackError
from ftw.hat.text_embedding import EmbeddingBank
from ftw.map.metrics import auroc
from ftw.map.pack import LensPack, Recipe, load_pack
from ftw.map.pack_index import PackIndex
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.text_control import TextConfig, fit_text_lenses
from ftw.substrate.encoder import SentenceEncoder

TOPICS = {"whale": ["whale", "sea", "fin", "krill"], "car": ["car", "road", "wheel", "engine"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def table() -> SampleTable:
    draw, builder = random.Random(0), SampleTableBuilder(list(TOPICS))
    for number in range(120):
        topic = list(TOPICS)[number % 2]
        text = f"the {' '.join(draw.choices(TOPICS[topic], k=4))} {number}"
        row = builder.text(text, group=str(number // 4), split="train" if number < 80 else "test", source="toy")
        for concept in TOPICS:
            builder.mark(row, concept, int(concept == topic))
    return builder.build()


def test_an_embedding_lens_is_the_logistic_regression_of_its_texts(table: SampleTable, folder: str):
    config = TextConfig(family="embedding", encoder=folder, folds=0, window_words=0, c=1.0)
    bank, rows = fit_text_lenses(table, config, progress=False).bank, table.where("train")
    assert isinstance(bank, EmbeddingBank)
    encoded_SD = SentenceEncoder.load(folder).encode([table.texts[row] for row in rows]).numpy()
    labels_S = np.array([number % 2 == 0 for number in range(80)])
    model = LogisticRegression(C=1.0, class_weight="balanced", solver="liblinear", tol=1e-6, max_iter=1000)
    model.fit(encoded_SD, labels_S)
    expected_S = model.decision_function(encoded_SD)
    np.testing.assert_allclose(bank.score([table.texts[row] for row in rows])[:, 0], expected_S, atol=2e-3)


def test_a_centroid_lens_is_a_difference_of_cosines_calibrated(table: SampleTable, folder: str):
    fitted = fit_text_lenses(table, TextConfig(family="centroid", encoder=folder, num_windows=64), progress=False)
    bank, rows = fitted.bank, table.where("train")
    texts_SD = SentenceEncoder.load(folder).encode(table.texts)
    train_MD, is_whale_M = texts_SD[torch.from_numpy(rows)], torch.arange(80) % 2 == 0
    cosines = [
        torch.nn.functional.cosine_similarity(texts_SD, train_MD[chosen].mean(dim=0)[None])
        for chosen in (is_whale_M, ~is_whale_M)
    ]
    difference_S, logits_S = (cosines[0] - cosines[1]).numpy(), bank.score(table.texts)[:, 0].numpy()
    # Calibration is one scale and one offset for the lens.
    scale, offset = np.polyfit(difference_S, logits_S, 1)
    np.testing.assert_allclose(logits_S, scale * difference_S + offset, atol=1e-4)
    assert scale > 0
    assert bank.is_calibrated
    assert bank.quantiles_NQ is not None
    assert np.isfinite(fitted.held_out[0]).all()


@pytest.mark.parametrize("family", ["embedding", "centroid"])
def test_they_learn_and_the_same_table_gives_the_same_bank(table: SampleTable, folder: str, family: str):
    config = TextConfig(family=family, encoder=folder, num_windows=64)
    one, two = (fit_text_lenses(table, config, progress=False).bank for _ in range(2))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])
    rows = table.where("test")
    logits_S = one.score([table.texts[row] for row in rows])[:, 0].numpy()
    labels_S = (rows % 2 == 0).astype(float)
    assert float(auroc(logits_S[:, None], labels_S[:, None], np.ones((len(rows), 1)))[0]) > 0.85


def test_a_pack_keeps_them_and_gives_them_back(table: SampleTable, folder: str, tmp_path: Path):
    bank = fit_text_lenses(table, TextConfig(family="centroid", encoder=folder), progress=False).bank
    stack = random_stack(num=2)
    stack.names = ["car", "whale"]
    recipe = Recipe(substrate="s", fingerprint="f", width=32, dtype="float32", precision="float32", layers=[1, 2])
    levels = {"car": 0, "whale": 0}
    pack = LensPack(pack_id="toy", version="1.0.0", stack=stack, recipe=recipe, levels=levels, text=bank)
    place, encoder = pack.save(tmp_path / "pack"), SentenceEncoder.load(folder)
    for text in (load_pack(place).text, PackIndex.open(place).text):
        assert isinstance(text, EmbeddingBank)
        assert text.names == ["car", "whale"]
        expected = bank.subset(["car", "whale"]).score(["the whale"])
        torch.testing.assert_close(text.using(encoder).score(["the whale"]), expected)
    (place / "text.json").write_text((place / "text.json").read_text().replace('"centroid"', '"other"'))
    with pytest.raises(PackError):
        load_pack(place)


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="choose tfidf, embedding, centroid"):
        TextConfig(family="bert")
