"""The directions of an interpreter's direct path: those of an independent implementation, blind to what texts share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import eigh, subspace_angles
from toy_rows import toy_fit, toy_rows

from ftw.errors import ConfigError
from ftw.map.training import interpreter_directions
from ftw.map.training.interpreter import read_logits, train_interpreter
from ftw.map.training.interpreter_data import InterpreterRows
from ftw.map.training.interpreter_directions import Directions, find_directions


def directions_of(rows: InterpreterRows, num: int, shrinkage: float = 0.1) -> Directions:
    shape = rows.states_STD.shape[1:]
    return find_directions(rows, torch.zeros(shape), torch.ones(shape), num=num, shrinkage=shrinkage)


@pytest.mark.parametrize("num_concepts", [6, 40])
def test_directions_span_what_the_generalised_eigenvectors_span(num_concepts: int) -> None:
    rows = toy_rows(num_concepts=num_concepts, seed=1)
    found = directions_of(rows, 4).directions_JDR.flatten(0, 1).numpy()
    train = rows.where("train")
    x_SF, labels = rows.states_STD[train].flatten(1).double().numpy(), rows.labels_S.numpy()[train]
    means = np.stack([x_SF[labels == one].mean(0) for one in range(num_concepts)])
    rest = x_SF - means[labels]
    within = rest.T @ rest / (len(rest) - num_concepts)
    within += 0.1 * np.diag(within).mean() * np.eye(len(within))
    between = (means - means.mean(0)).T @ (means - means.mean(0))
    expected = eigh(between, within)[1][:, ::-1][:, :4]
    assert subspace_angles(found, expected).max() < 1e-3
    # In units of the variation within concepts.
    assert np.allclose(found.T @ within @ found, np.eye(4), atol=1e-3)


def test_what_differs_between_texts_of_one_concept_is_not_read() -> None:
    rows = toy_rows(each=24, noise=0.1)
    frame = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)) * 8
    sign = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], len(rows)))
    framed = replace(rows, states_STD=(rows.states_STD + sign[:, None, None] * frame).half())
    found = directions_of(framed, 5)
    along_R = torch.einsum("jd,jdr->r", frame / frame.norm(), found.directions_JDR)
    across = found.directions_JDR.flatten(0, 1).norm(dim=0)
    assert (along_R.abs() < 0.02 * across).all()


def test_rows_about_further_concepts_change_no_direction() -> None:
    rows = toy_rows(num_concepts=9)
    own = rows.labels_S.numpy() < 6
    parts = [part if mine else "further" for part, mine in zip(rows.parts, own, strict=True)]
    rows = replace(rows, parts=parts, names=rows.names[:6])
    alone, among = directions_of(rows.select(np.flatnonzero(own)), 3), directions_of(rows, 3)
    assert torch.equal(alone.directions_JDR, among.directions_JDR)


def test_one_row_a_concept_still_gives_each_its_own_place() -> None:
    rows = replace(toy_rows(each=1), parts=["train"] * 6)
    places_CR = directions_of(rows, 5).places_CR
    assert torch.allclose(places_CR.norm(dim=1), torch.ones(6), atol=1e-4)
    assert ((places_CR @ places_CR.T).argmax(1) == torch.arange(6)).all()


def test_the_direct_path_counts_for_as_much_as_validation_says() -> None:
    rows = toy_rows(noise=0.5)
    interpreter = train_interpreter(rows, toy_fit(epochs=1, learning_rate=1e-6, direct=8))  # the encoder knows nothing
    assert interpreter.trust > 0
    test = rows.select(rows.where("test"))
    assert float((read_logits(interpreter, test).argmax(1) == test.labels_S).float().mean()) >= 0.9


def test_more_features_than_a_covariance_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter_directions, "MOST_FEATURES", 16)
    with pytest.raises(ConfigError, match=r"direct=0"):
        train_interpreter(toy_rows(), toy_fit(epochs=1, direct=4))
