"""Means go out in the layout of the original design and come back; files from elsewhere are checked first."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from toy_growing import LAYERS, WORDS, started

from ftw.errors import DataError, EncyclopediaError
from ftw.map.growing.dense import export_pooled, import_pooled, read_pooled
from ftw.map.growing.rounds import refine
from ftw.substrate.model import Substrate


def test_an_encyclopedia_comes_back_with_means_counts_and_stages(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [1, 2], 1, contexts=3, progress=False)
    dense = read_pooled(export_pooled(growing, tmp_path / "out.h5"), num_layers=4)
    back = import_pooled(tmp_path / "back", dense, fingerprint=tiny_substrate.fingerprint)
    assert back.concepts == list(WORDS)
    assert back.num_samples.tolist() == growing.num_samples.tolist()
    assert back.stage.tolist() == growing.stage.tolist()
    for layer in LAYERS:
        there, here = growing.statistics(layer), back.statistics(layer)
        np.testing.assert_allclose(here.mean_ND, there.mean_ND, atol=2e-3)
        np.testing.assert_allclose(here.variance_ND, there.variance_ND, rtol=2e-3, atol=1e-4)
    refine(back, tiny_substrate, [0], 1, contexts=2, progress=False)  # and it can grow on
    assert back.num_samples.tolist() == [3, 4, 4, 1, 1, 1]
    with pytest.raises(EncyclopediaError, match="exists"):
        import_pooled(tmp_path / "back", dense, fingerprint="")


def foreign(path: Path, **changed: object) -> Path:
    """A file as the original wrote it: raw states, the last layer called -1, a number and a stage for all."""
    values = {"activations": np.random.default_rng(0).normal(3, 9, size=(2, 8)).astype(np.float16), **changed}
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {"n_concepts": 2, "activation_dim": 8, "model": "gemma", "stage": 0, "samples_per_concept": 1}
        )
        file.create_dataset("concepts", data=["democracy", "dog"], dtype=h5py.string_dtype())
        if values["activations"] is not None:
            file.create_dataset("layer_-1/activations", data=values["activations"], compression="gzip")
        file.create_dataset("layer_-1/variance", data=np.full((2, 8), np.nan, dtype=np.float16))
    return path


def test_raw_states_of_a_file_from_elsewhere_are_layer_normed(tmp_path: Path):
    dense = read_pooled(foreign(tmp_path / "there.h5"), num_layers=18)
    assert list(dense.mean) == [17]
    np.testing.assert_allclose(dense.mean[17].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(dense.mean[17].std(axis=1), 1, atol=1e-3)
    back = import_pooled(tmp_path / "back", dense, fingerprint="f" * 64)
    assert (back.concepts, back.layers, back.num_samples.tolist()) == (["democracy", "dog"], (17,), [1, 1])


@pytest.mark.parametrize(
    "activations",
    [
        None,
        np.ones((3, 8), np.float16),
        np.ones(2, np.float16),
        np.full((2, 8), np.inf, np.float16),
        np.ones((2, 8), int),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, activations: np.ndarray | None):
    with pytest.raises(DataError, match=r"there\.h5"):
        read_pooled(foreign(tmp_path / "there.h5", activations=activations), num_layers=18)
    (tmp_path / "there.h5").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"there\.h5"):
        read_pooled(tmp_path / "there.h5", num_layers=18)
