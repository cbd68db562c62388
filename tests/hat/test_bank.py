"""A bank says what its lenses say one by one, and its percentiles are those of the calibration."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_lenses import random_stack
from torch.nn.functional import layer_norm

from ftw.errors import ConceptError, SubstrateError
from ftw.hat.bank import LensBank, build_bank
from ftw.hat.lens import HeadConfig
from ftw.hat.percentile import FEW_VALUES, MANY_VALUES, VALUES_AT_ONCE, interpolate
from ftw.hat.store import LensStack
from ftw.map.calibrate import percentile

SHAPES = [
    {"layers": layers, "hidden": hidden, "rank": rank, "calibrated": calibrated}
    for layers in ((2,), (0, 3, 1))
    for hidden in (0, 6)
    for rank in (0, 5)
    for calibrated in (True, False)
]


def one_by_one(stack: LensStack, states_BLD: torch.Tensor) -> torch.Tensor:
    """Logits written down from the definition: mean over layers of scale x head(LN(state)) + offset."""
    columns = []
    for n in range(len(stack.names)):
        total_B = torch.zeros(len(states_BLD))
        for layer in range(len(stack.layers)):
            x_BD = layer_norm(states_BLD[:, layer], (states_BLD.shape[-1],))
            if stack.basis is not None:
                x_BD = (x_BD - stack.basis.mean[layer]) @ stack.basis.components[layer]
            logit_B = stack.heads[layer].rows(torch.tensor([n]))(x_BD)[:, 0]
            total_B += stack.scale_NL[n, layer] * logit_B + stack.offset_NL[n, layer]
        columns.append(total_B / len(stack.layers))
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bank_equals_its_lenses_one_by_one(shape: dict):
    stack = random_stack(**shape)
    states_BLD = 10 * torch.randn(9, len(stack.layers), 32)
    torch.testing.assert_close(stack.bank()(states_BLD), one_by_one(stack, states_BLD), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_single_lens_is_a_bank_of_one(shape: dict):
    stack, states_BLD = random_stack(**shape), torch.randn(4, len(shape["layers"]), 32)
    whole_BN = stack.bank()(states_BLD)
    for n, name in enumerate(stack.names):
        alone_B1 = stack.rows([name]).bank()(states_BLD)
        torch.testing.assert_close(alone_B1, whole_BN[:, n : n + 1], rtol=1e-5, atol=1e-5)


def test_logits_do_not_depend_on_what_else_is_in_the_batch():
    bank, states_BLD = random_stack(hidden=6).bank(), torch.randn(6, 2, 32)
    order = torch.randperm(6)
    torch.testing.assert_close(bank(states_BLD)[order], bank(states_BLD[order]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bank(states_BLD)[:1], bank(states_BLD[:1]), rtol=1e-5, atol=1e-5)


def test_linear_lenses_of_all_layers_are_one_matrix_product():
    bank = random_stack(layers=(0, 1, 2)).bank()
    assert [head.weight.shape for head in bank.heads] == [(6, 3 * 32)]


def test_dropout_never_acts_in_a_bank():
    heads = [HeadConfig(hidden=16, dropout=0.5).build(3, 32).train()]
    bank = build_bank(
        names=["a", "b", "c"], layers=[0], heads=heads, scale_LN=torch.ones(1, 3), offset_N=torch.zeros(3)
    )
    states_BLD = torch.randn(5, 1, 32)
    assert torch.equal(bank(states_BLD), bank(states_BLD))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(2, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, FEW_VALUES // 15 + 1, MANY_VALUES // 15 + 1]),
)
def test_percentile_equals_that_of_the_calibration(seed: int, num_quantiles: int, steps: bool, meet: bool, copies: int):
    rng = np.random.default_rng(seed)
    quantiles_NQ = np.sort(rng.normal(size=(3, num_quantiles)).astype(np.float32), axis=1)
    if steps:
        quantiles_NQ = np.round(quantiles_NQ)
    logits_BN = rng.normal(scale=2, size=(5, 3)).astype(np.float32)
    if meet:
        logits_BN[:3] = quantiles_NQ[:, rng.integers(num_quantiles, size=3)].T
    logits_BN[4, 1] = np.nan
    logits_BN = np.tile(logits_BN, (copies, 1))  # many values are searched in another way than few
    levels_Q = np.linspace(0, 1, num_quantiles)
    tensors = torch.from_numpy(quantiles_NQ), torch.from_numpy(levels_Q.astype(np.float32))
    ours_BN = interpolate(torch.from_numpy(logits_BN).T.contiguous(), *tensors).T.numpy()
    np.testing.assert_allclose(ours_BN, percentile(logits_BN, quantiles_NQ, levels_Q), atol=2e-4)


def test_percentiles_of_chosen_lenses_are_those_of_all():
    bank = random_stack().bank()
    logits_BN, lenses_BK = torch.randn(7, 6), torch.randint(6, (7, 3))
    chosen_BK = bank.percentile(logits_BN.gather(1, lenses_BK), lenses_BK)
    torch.testing.assert_close(chosen_BK, bank.percentile(logits_BN).gather(1, lenses_BK))


def test_percentiles_of_many_lenses_are_those_of_each():
    bank = random_stack(num=VALUES_AT_ONCE // 4).bank()
    logits_BN = torch.randn(9, len(bank))
    whole_BN = bank.percentile(logits_BN)
    for lenses in torch.randint(len(bank), (20, 9, 1)):
        torch.testing.assert_close(bank.percentile(logits_BN.gather(1, lenses), lenses), whole_BN.gather(1, lenses))


def test_percentile_rises_with_the_logit_from_zero_to_one():
    bank = random_stack(num=1).bank()
    percentile_B1 = bank.percentile(torch.linspace(-20, 20, 400).unsqueeze(1))
    assert (percentile_B1.diff(dim=0) >= 0).all()
    assert (percentile_B1[0], percentile_B1[-1]) == (0, 1)


def test_an_uncalibrated_bank_gives_no_percentiles_and_ranks_by_logit():
    bank = random_stack(calibrated=False).bank()
    logits_BN = torch.randn(3, 6)
    assert bank.percentile(logits_BN).isnan().all()
    assert torch.equal(bank.rank(logits_BN), logits_BN)


def test_rank_is_distance_from_the_background_median_in_its_upper_spread():
    stack = random_stack()
    stack.quantiles_NQ[2] = 1.5  # a lens that never moved on background text divides by no zero
    bank, logits_BN = stack.bank(), torch.randn(3, 6)
    middle, upper = (int((stack.levels_Q - level).abs().argmin()) for level in (0.5, 0.99))
    for n in range(6):
        low, high = stack.quantiles_NQ[n, middle], stack.quantiles_NQ[n, upper]
        expected_B = (logits_BN[:, n] - low) / max(high - low, torch.tensor(1e-6))
        torch.testing.assert_close(bank.rank(logits_BN)[:, n], expected_B)


def test_reading_holds_the_strongest_by_rank_and_the_watched_in_order():
    bank, states_BLD = random_stack().bank(), torch.randn(5, 2, 32)
    logits_BN = bank(states_BLD)
    watch = bank.rows_of(["concept4", "concept0"])
    reading = bank.read(states_BLD, k=3, watch=watch)
    order_BN = bank.rank(logits_BN).argsort(dim=1, descending=True)
    assert torch.equal(reading.index_BK, order_BN[:, :3])
    torch.testing.assert_close(reading.logit_BK, logits_BN.gather(1, reading.index_BK))
    torch.testing.assert_close(reading.percentile_BK, bank.percentile(logits_BN).gather(1, reading.index_BK))
    torch.testing.assert_close(reading.watch_logit_BV, logits_BN[:, [4, 0]])
    torch.testing.assert_close(reading.watch_percentile_BV, bank.percentile(logits_BN)[:, [4, 0]])
    assert bank.read(states_BLD, k=99).index_BK.shape == (5, 6)


@pytest.mark.parametrize("shape", [(3, 2, 31), (3, 1, 32), (3, 3, 32), (3, 32)])
def test_states_of_another_width_or_number_of_layers_are_refused(shape: tuple[int, ...]):
    with pytest.raises(SubstrateError, match=r"layers \[1, 2\] of width 32"):
        random_stack(rank=4).bank()(torch.zeros(shape))


def test_an_unknown_concept_is_refused_with_the_nearest_names():
    bank = random_stack().bank()
    with pytest.raises(ConceptError, match=r"'concpet3'.*concept3"):
        bank.rows_of(["concept0", "concpet3"])
    assert bank.rows_of(["concept5", "concept1"]).tolist() == [5, 1]
    assert isinstance(bank, LensBank)
    assert len(bank) == 6
