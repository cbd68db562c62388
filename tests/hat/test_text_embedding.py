"""Text lenses over an encoder are one product, live as for whole texts, and know their encoder again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lenses import random_stack
from toy_encoder import toy_encoder

from ftw.cat.divergence import dissonance
from ftw.errors import ConfigError, PackError
from ftw.hat.aperture import Aperture, ApertureConfig
from ftw.hat.dynamic import LiveLenses
from ftw.hat.lineage import Lineage
from ftw.hat.monitor import Monitor
from ftw.hat.text_embedding import EmbeddingBank, EmbeddingWindow
from ftw.hat.timeline import Timeline, TokenReading
from ftw.substrate.encoder import SentenceEncoder
from ftw.substrate.model import Substrate

NAMES = [f"concept{n}" for n in range(6)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    return SentenceEncoder.load(str(toy_encoder(tmp_path_factory.mktemp("encoder"))))


@pytest.fixture(scope="module")
def bank(encoder: SentenceEncoder) -> EmbeddingBank:
    rng = np.random.default_rng(0)
    levels_Q = np.array([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1], dtype=np.float32)
    return EmbeddingBank(
        names=NAMES,
        weights_ND=rng.normal(size=(6, 16)).astype(np.float32),
        bias=rng.normal(size=6).astype(np.float32),
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        is_calibrated=True,
        quantiles_NQ=np.sort(2 * rng.normal(size=(6, 7)), axis=1).astype(np.float32),
        levels_Q=levels_Q,
        given=encoder,
    )


def test_a_logit_is_a_cosine_times_a_length_plus_a_bias(bank: EmbeddingBank, encoder: SentenceEncoder):
    texts = ["the whale", "a car", ""]
    for lens in range(len(bank)):
        direction_D = torch.from_numpy(bank.weights_ND[lens])
        cosine_B = torch.nn.functional.cosine_similarity(encoder.encode(texts), direction_D[None])
        expected_B = cosine_B * direction_D.norm() + bank.bias[lens]
        torch.testing.assert_close(bank.score(texts)[:, lens], expected_B, atol=1e-5, rtol=0)
    some = bank.subset(["concept4", "concept0"])
    torch.testing.assert_close(some.score(texts), bank.score(texts)[:, [4, 0]])
    torch.testing.assert_close(some.percentile(some.score(texts)), bank.percentile(bank.score(texts))[:, [4, 0]])


def test_a_window_says_what_its_text_says(bank: EmbeddingBank):
    window, pieces = EmbeddingWindow(bank, tokens=3), ["The", " wh", "ale", " in", " the", " se", "a", "."]
    texts = ["The", "The wh", "The whale", " whale in", " in the", " in the se", " the sea", " sea."]
    for piece, text in zip(pieces, texts, strict=True):
        window.push(piece)
        assert window.text == text
        torch.testing.assert_close(window.logits(), bank.score([text])[0], atol=1e-5, rtol=0)
    window.clear()
    assert not window.has_words
    torch.testing.assert_close(window.logits(), torch.from_numpy(bank.bias))
    with pytest.raises(ConfigError, match="window of 0"):
        EmbeddingWindow(bank, tokens=0)


def test_what_is_stored_comes_back_and_wants_its_own_encoder(
    bank: EmbeddingBank, encoder: SentenceEncoder, tmp_path: Path
):
    again = EmbeddingBank.from_tensors(bank.tensors(), bank.description())
    with pytest.raises(ConfigError, match="text_encoder=FOLDER"):
        again.score(["whale"])
    torch.testing.assert_close(again.using(encoder).score(["whale"]), bank.score(["whale"]))
    assert again.subset(["concept1"]).is_calibrated
    other = SentenceEncoder.load(str(toy_encoder(tmp_path / "other", seed=1)))
    with pytest.raises(PackError, match="fitted with the encoder"):
        again.using(other)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_ND": None},
        {"bias": torch.zeros(5)},
        {"weights_ND": torch.zeros(6)},
        {"levels_Q": torch.zeros(3)},
        {"quantiles_NQ": None},
        {"format": 9},
        {"family": "tfidf"},
        {"names": ["one"]},
    ],
)
def test_parts_that_disagree_are_refused(bank: EmbeddingBank, change: dict[str, Any]):
    tensors = {**bank.tensors(), **{name: part for name, part in change.items() if name in bank.tensors()}}
    words = {**bank.description(), **{name: part for name, part in change.items() if name not in bank.tensors()}}
    with pytest.raises(PackError, match="text lenses"):
        EmbeddingBank.from_tensors({name: part for name, part in tensors.items() if part is not None}, words)


def test_they_are_the_text_side_of_a_monitor_and_of_dissonance(tiny_substrate: Substrate, bank: EmbeddingBank):
    readings = list[TokenReading]()
    monitor = Monitor(tiny_substrate, random_stack().bank(), text=bank, top_k=3, text_window=8)
    timeline = monitor.generate(
        "whale", on_token=lambda _, reading: readings.append(reading), max_new_tokens=6, do_sample=True, seed=0
    )
    assert isinstance(timeline, Timeline)
    written = monitor.written(timeline)
    for t, reading in enumerate(readings):
        for one in reading.text or ():
            assert one.logit == pytest.approx(written.logits_TN[t, NAMES.index(one.concept)], abs=1e-5)
    assert dissonance(timeline, written).by == "percentile"
    assert timeline.meta["num_text_missing"] == 0


def test_an_aperture_reads_them_as_it_reads_words(bank: EmbeddingBank):
    lineage = Lineage(NAMES, dict.fromkeys(NAMES, 0))
    lenses = LiveLenses(Aperture(lineage, ApertureConfig()), activation=None, text=bank, window_tokens=4)
    tick = lenses.read(token_text="the whale")
    np.testing.assert_allclose(tick.logits("text"), bank.score(["the whale"])[0], atol=1e-5)
    lenses.read(token_text="")
    assert lenses.counts["texts_without_known_words"] == 0
    lenses.reset()
    lenses.read(token_text=" ")
    assert lenses.counts["texts_without_known_words"] == 1


def test_no_family_but_those_that_are_known(bank: EmbeddingBank):
    with pytest.raises(PackError, match="family 'neural'"):
        replace(bank, family="neural")
