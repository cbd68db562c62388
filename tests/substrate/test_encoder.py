"""A text's direction is the mean of its tokens' states, whatever stands beside it in a batch."""

from pathlib import Path

import pytest
import torch
from toy_encoder import toy_encoder

from ftw.errors import SubstrateError
from ftw.substrate.encoder import SentenceEncoder

TEXTS = ["the whale", "a", "sea " * 60, "Krill, krill!", "", "  \n", "unknown words only"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    return SentenceEncoder.load(str(toy_encoder(tmp_path_factory.mktemp("encoder"))))


def test_a_batch_gives_what_each_text_gives_alone(encoder: SentenceEncoder):
    alone_BD = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone_BD, atol=1e-5, rtol=0)
    length_B = alone_BD.norm(dim=1)
    torch.testing.assert_close(length_B, torch.tensor([1.0, 1, 1, 1, 0, 0, 1]), atol=1e-5, rtol=0)
    assert encoder.encode([]).shape == (0, 16)


def test_a_direction_is_the_mean_of_the_last_states(encoder: SentenceEncoder):
    ids = encoder.tokenizer("the whale", return_tensors="pt")["input_ids"]
    states_TD = encoder.model(input_ids=ids).last_hidden_state[0]
    expected_D = states_TD.mean(dim=0) / states_TD.mean(dim=0).norm()
    torch.testing.assert_close(encoder.encode(["the whale"])[0], expected_D, atol=1e-5, rtol=0)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_folder(encoder: SentenceEncoder, tmp_path: Path):
    assert SentenceEncoder.load(str(toy_encoder(tmp_path / "same"))).fingerprint == encoder.fingerprint
    assert SentenceEncoder.load(str(toy_encoder(tmp_path / "other", seed=1))).fingerprint != encoder.fingerprint


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path):
    folder = toy_encoder(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SubstrateError, match="cannot load the encoder"):
        SentenceEncoder.load(str(folder))


@pytest.mark.slow
def test_the_real_encoder_puts_like_beside_like():
    encoder = SentenceEncoder.load()
    whale_D, orca_D, bond_D = encoder.encode(
        ["A whale swims in the sea.", "Orcas live in the ocean.", "The bond yields five percent."]
    )
    assert whale_D @ orca_D > 0.4 > 0.2 > whale_D @ bond_D
