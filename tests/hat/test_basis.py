"""The basis is what scikit-learn's PCA finds, with a sign that does not depend on the machine."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ftw.errors import ConfigError
from ftw.hat.basis import Basis, fit_basis


def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(200, 2, 10) * torch.linspace(1, 4, 10)


def test_basis_spans_the_principal_components_of_each_layer():
    tokens_TLD = tokens()
    basis = fit_basis(tokens_TLD, 3)
    for layer in range(2):
        oracle_RD = PCA(3).fit(tokens_TLD[:, layer].numpy()).components_
        ours_DR = basis.components[layer].numpy()
        np.testing.assert_allclose(np.abs(oracle_RD @ ours_DR), np.eye(3), atol=1e-4)


def test_full_rank_loses_nothing():
    tokens_TLD = tokens()
    basis = fit_basis(tokens_TLD, 10)
    back_TLD = torch.einsum("blr,ldr->bld", basis(tokens_TLD), basis.components) + basis.mean
    torch.testing.assert_close(back_TLD, tokens_TLD, rtol=1e-4, atol=1e-4)


def test_sign_of_a_component_does_not_depend_on_that_of_the_data():
    tokens_TLD = tokens()
    torch.testing.assert_close(fit_basis(tokens_TLD, 3).components, fit_basis(-tokens_TLD, 3).components)


@pytest.mark.parametrize("rank", [0, 11, -1])
def test_a_rank_that_cannot_be_is_refused(rank: int):
    with pytest.raises(ConfigError, match="choose 1 to 10"):
        fit_basis(tokens(), rank)


def test_rank_is_the_width_of_the_coordinates():
    basis = Basis(torch.zeros(2, 8), torch.zeros(2, 8, 3))
    assert basis.rank == 3
    assert basis(torch.randn(5, 2, 8)).shape == (5, 2, 3)
