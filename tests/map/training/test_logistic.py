"""The logistic solver equals scikit-learn's for every penalty, fold and weighting, and says what it cannot solve."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ftw.errors import DataError
from ftw.map.training import logistic
from ftw.map.training.logistic import logistic_columns, logistic_paths, rotate

PENALTIES = [1e-3, 1e-1, 1.0]


def rows(num: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(num, width, generator=generator) @ mixing
    x = (x - x.mean(0)) / x.std(0)
    logits = x @ torch.randn(width, generator=generator) / width**0.5 + torch.randn(num, generator=generator)
    weights = torch.rand(num, generator=generator) + 0.2
    return x, (logits > 0).float(), weights, torch.arange(num) // 2 % 3


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch):
    """Descend further than anybody needs, to be compared with another solver."""
    monkeypatch.setattr(logistic, "TOLERANCE", 1e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("num", "width"), [(40, 90), (200, 30)])
def test_every_copy_and_penalty_equals_scikit_learn(num: int, width: int):
    x, labels, weights, folds = rows(num, width)
    paths = logistic_paths(x, labels, weights, folds, num_folds=3, penalties=PENALTIES)
    ours = paths.logits(x).numpy()
    for copy in range(4):
        used = (folds != copy - 1).numpy()
        for place, penalty in enumerate(PENALTIES):
            oracle = LogisticRegression(C=penalty, tol=1e-9, max_iter=20_000)
            oracle.fit(x.numpy()[used], labels.numpy()[used], sample_weight=weights.numpy()[used])
            theirs = oracle.decision_function(x.numpy())
            assert np.abs(ours[:, copy, place] - theirs).max() < 0.01 * np.abs(theirs).max()


def test_lenses_may_share_one_eigenbasis():
    x, labels, weights, folds = rows(120, 30)
    some = torch.arange(10, 110)
    of_all = rotate(x).take(some)
    shared, alone = (
        logistic_paths(each, labels[some], weights[some], folds[some], num_folds=3, penalties=[0.01, 0.1])
        for each in (of_all, x[some])
    )
    torch.testing.assert_close(shared.logits(x), alone.logits(x), rtol=0, atol=0.03)


def test_held_out_logits_are_those_of_the_copy_without_the_fold():
    x, labels, weights, folds = rows(60, 20)
    paths = logistic_paths(x, labels, weights, folds, num_folds=3, penalties=PENALTIES)
    held_out = paths.held_out(x, folds)
    for row in (0, 17, 59):
        torch.testing.assert_close(held_out[row], paths.logits(x[row : row + 1])[0, folds[row] + 1])


def test_rows_of_a_fold_do_not_change_their_own_copy():
    x, labels, weights, folds = rows(60, 20)
    other = x.clone()
    other[folds == 1] = other[folds == 1].flip(0)
    one, two = (
        logistic_paths(each, labels, weights, folds, num_folds=3, penalties=PENALTIES).logits(x)[:, 2]
        for each in (x, other)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0.02 * float(one.abs().max()))


def test_weight_zero_is_the_same_as_absent():
    x, labels, weights, _ = rows(80, 10)
    none = torch.zeros(80, dtype=torch.long)
    weights[:30] = 0
    whole = logistic_paths(x, labels, weights, none, num_folds=0, penalties=[0.1])
    part = logistic_paths(x[30:], labels[30:], weights[30:], none[30:], num_folds=0, penalties=[0.1])
    torch.testing.assert_close(whole.logits(x), part.logits(x), rtol=0, atol=1e-2)


def test_columns_of_labels_equal_one_fit_each():
    x, labels, weights, _ = rows(80, 10)
    both = torch.stack([labels, labels.flip(0)], dim=1)
    weight_WK, bias_K = logistic_columns(x, both, weights, penalty=0.1)
    for column in range(2):
        alone = logistic_paths(
            x, both[:, column], weights, torch.zeros(80, dtype=torch.long), num_folds=0, penalties=[0.1]
        )
        ours = x @ weight_WK[:, column] + bias_K[column]
        torch.testing.assert_close(ours, alone.logits(x)[:, 0, 0], rtol=0, atol=1e-2)


def test_constant_features_and_separable_rows_stay_finite():
    x = torch.cat([torch.linspace(-1, 1, 40)[:, None], torch.zeros(40, 5)], dim=1)
    paths = logistic_paths(x, (x[:, 0] > 0).float(), torch.ones(40), torch.arange(40) % 2, num_folds=2, penalties=[1e3])
    assert torch.isfinite(paths.weight_WFC).all()
    assert ((paths.logits(x)[:, 0, 0] > 0) == (x[:, 0] > 0)).all()


def test_a_fold_without_a_class_is_named():
    x, labels, weights, folds = rows(20, 5)
    labels[:] = 0
    labels[folds == 1] = 1
    with pytest.raises(DataError, match="fold"):
        logistic_paths(x, labels, weights, folds, num_folds=3, penalties=[1.0])


def test_states_that_are_not_finite_are_refused():
    x, labels, weights, folds = rows(20, 5)
    x[3, 2] = float("nan")
    with pytest.raises((DataError, RuntimeError)):
        logistic_paths(x, labels, weights, folds, num_folds=3, penalties=[1.0])
