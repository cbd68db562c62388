"""A bank whose lenses come and go is, after every change, the bank that one would build anew."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_lenses import random_stack
from torch.nn.functional import layer_norm, linear

from ftw.errors import ConceptError, ConfigError, PackError
from ftw.hat.bank import LensBank
from ftw.hat.linear import LinearHead
from ftw.hat.mlp import MLPHead
from ftw.hat.product import BLOCK, PRECISIONS, product, stored
from ftw.hat.slots import Slots, copy_rows
from ftw.hat.store import LensStack, head_of, stack_from_tensors

KINDS = [
    {"layers": layers, "hidden": hidden, "rank": rank, "calibrated": calibrated}
    for layers, hidden, rank, calibrated in (
        ((2,), 0, 0, True),
        ((0, 3, 1), 0, 5, True),
        ((1, 2), 6, 0, True),
        ((1,), 6, 5, False),
    )
]
MOVES = st.lists(
    st.tuples(st.sets(st.integers(0, 11), max_size=5), st.sets(st.integers(0, 11), max_size=5)), max_size=8
)


def assert_same_bank(bank: LensBank, fresh: LensBank) -> None:
    """Every reading agrees, lens by lens."""
    states_BLD = torch.randn(3, len(bank.layers), 32)
    order = [bank.index[name] for name in fresh.names]
    assert sorted(bank.names) == sorted(fresh.names)
    assert [bank.names[row] for row in order] == fresh.names
    ours_BN, theirs_BN = bank(states_BLD)[:, order], fresh(states_BLD)
    torch.testing.assert_close(ours_BN, theirs_BN, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(bank.rank(bank(states_BLD))[:, order], fresh.rank(theirs_BN), rtol=1e-5, atol=1e-5)
    percentiles_BN = bank.percentile(bank(states_BLD))[:, order]
    torch.testing.assert_close(percentiles_BN, fresh.percentile(theirs_BN), equal_nan=True, rtol=1e-4, atol=1e-5)
    top = bank.read(states_BLD, k=2).index_BK
    expected = fresh.read(states_BLD, k=2).index_BK
    assert [[bank.names[n] for n in row] for row in top] == [[fresh.names[n] for n in row] for row in expected]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(moves=MOVES)
def test_after_any_sequence_of_changes_the_bank_is_the_one_built_anew(kind: dict, moves: list):
    stack = random_stack(num=12, **kind)
    bank = stack.rows(["concept0"]).bank().hot(8)
    present = ["concept0"]
    for leave, come in moves:
        leaving = [name for name in present if int(name[7:]) in leave]
        kept = [name for name in present if name not in leaving]
        coming = [f"concept{n}" for n in sorted(come) if f"concept{n}" not in kept][: 8 - len(kept)]
        if coming:
            bank.put(stack.rows(coming).bank(), drop=leaving)
        else:
            bank.drop(leaving)
        present = [*kept, *coming]
        assert len(bank) == len(present)
        assert bank(torch.randn(2, len(bank.layers), 32)).shape == (2, len(present))
        if present:
            assert_same_bank(bank, stack.rows(present).bank())


def test_what_has_not_changed_stays_where_it_is():
    stack = random_stack(num=12, hidden=6)
    bank = stack.rows([f"concept{n}" for n in range(8)]).bank().hot(10)
    before = bank.names
    bank.put(stack.rows(["concept9", "concept8"]).bank(), drop=["concept2", "concept5"])
    assert bank.names == [f"concept{n}" for n in (0, 1, 9, 3, 4, 8, 6, 7)]
    bank.drop(["concept1"])
    assert bank.names == [f"concept{n}" for n in (0, 7, 9, 3, 4, 8, 6)]
    assert before == [f"concept{n}" for n in range(8)]  # whoever read with the old names may keep them


def test_a_refused_change_changes_nothing():
    stack = random_stack(num=12)
    bank = stack.rows([f"concept{n}" for n in range(4)]).bank().hot(5)
    expected = copy.deepcopy(bank)
    with pytest.raises(ConfigError, match=r"2 lenses for 1 free rows of 5"):
        bank.put(stack.rows(["concept8", "concept9"]).bank())
    with pytest.raises(ConceptError, match="'concept1' is loaded already"):
        bank.put(stack.rows(["concept1"]).bank())
    with pytest.raises(ConceptError, match="nearest"):
        bank.put(stack.rows(["concept9"]).bank(), drop=["concept7"])
    with pytest.raises(PackError, match="another kind"):
        bank.put(random_stack(layers=(1,)).bank())
    with pytest.raises(ConfigError, match="4 lenses for 3 rows"):
        bank.hot(3)
    with pytest.raises(ConfigError, match=r"int4.*float32"):
        bank.hot(5, precision="int4")
    assert_same_bank(bank, expected)


def test_a_bank_moved_or_copied_still_changes():
    stack = random_stack(num=6)
    bank = copy.deepcopy(stack.rows(["concept0", "concept1"]).bank().hot(4)).to(torch.float64).to(torch.float32)
    bank.put(stack.rows(["concept3"]).bank(), drop=["concept0"])
    assert_same_bank(bank, stack.rows(["concept3", "concept1"]).bank())


def test_wide_and_narrow_rows_are_copied_alike():
    for width in (3, 5000):
        source, target = torch.randn(6, width), torch.zeros(5, width)
        copy_rows(target, [3, 0], source, [1, 5])
        assert torch.equal(target[[3, 0, 1]], torch.stack([source[1], source[5], torch.zeros(width)]))


def test_populating_changes_no_number():
    slots = Slots({"a": torch.randn(40, 300), "b": torch.randn(40)}, ["x"])
    before = {name: tensor.clone() for name, tensor in slots.tensors.items()}
    slots.populate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in slots.tensors.items())


@pytest.mark.parametrize("num_states", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("num_rows", [1, BLOCK, 2 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_product_is_that_of_the_weights_as_stored(num_states: int, num_rows: int, precision: str):
    weight_MW, x_BW, bias_M = torch.randn(num_rows, 24), torch.randn(num_states, 24), torch.randn(num_rows)
    kept_MW, step_M = stored(weight_MW, precision)
    exact_MW = kept_MW.double() if step_M is None else kept_MW.double() * step_M.double().unsqueeze(1)
    expected_BM = linear(x_BW.double(), exact_MW, bias_M.double()).float()
    close = {"float32": 1e-5, "int8": 2e-3, "float16": 1e-2, "bfloat16": 0.2}[precision]
    torch.testing.assert_close(product(x_BW, kept_MW, step_M, bias_M), expected_BM, rtol=0, atol=close)


def test_int8_holds_features_of_very_different_size():
    # Some features of a language model's state are a hundred times the others, and are not what lenses read.
    x_BW = torch.randn(6, 64)
    x_BW[:, 7] *= 300
    weight_MW = torch.randn(200, 64)
    weight_MW[:, 7] = 0
    kept_MW, step_M = stored(weight_MW, "int8")
    exact_BM = linear(x_BW, kept_MW.float() * step_M.unsqueeze(1))
    torch.testing.assert_close(product(x_BW, kept_MW, step_M, torch.zeros(200)), exact_BM, rtol=0, atol=0.2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_state_that_is_not_a_number_reads_as_none(precision: str):
    bank = random_stack(num=3).bank().hot(3, precision=precision)
    states_BLD = torch.randn(2, 2, 32)
    states_BLD[1, 0, 5] = torch.nan
    logits_BN = bank(states_BLD)
    assert logits_BN[0].isfinite().all()
    assert logits_BN[1].isnan().all()


@pytest.mark.parametrize("hidden", [0, 64])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
def test_reduced_precision_reads_nearly_the_same_from_less_memory(hidden: int, precision: str):
    stack = random_stack(num=50, hidden=hidden, width=96, calibrated=False)
    bank, less = stack.bank(), stack.bank().hot(50, precision=precision)
    states_BLD = torch.randn(20, 2, 96)
    exact_BN, near_BN = bank(states_BLD), less(states_BLD)
    assert (near_BN - exact_BN).std() < 0.02 * exact_BN.std()
    assert less.num_bytes < (0.35 if precision == "int8" else 0.6) * bank.num_bytes


def test_weights_too_large_for_float16_are_refused():
    with pytest.raises(ConfigError, match="bfloat16"):
        stored(torch.tensor([[1e6]]), "float16")


@pytest.mark.parametrize("head", [LinearHead(4, 32), MLPHead(4, 32, hidden=6)], ids=["linear", "mlp"])
def test_a_lens_with_its_own_layer_norm_is_one_without_after_folding(head: LinearHead | MLPHead):
    torch.nn.init.normal_(head.weights()[0])
    gain_NW, shift_NW, x_BW = torch.randn(4, 32), torch.randn(4, 32), layer_norm(torch.randn(7, 32), (32,))
    folded_BN = head.fold_norm(gain_NW, shift_NW)(x_BW)
    for n in range(4):
        alone_B = head.rows(torch.tensor([n]))(layer_norm(x_BW, (32,), gain_NW[n], shift_NW[n]))[:, 0]
        torch.testing.assert_close(folded_BN[:, n], alone_B, rtol=1e-4, atol=1e-4)


def test_a_stack_folds_the_layer_norms_that_its_file_holds():
    stack = random_stack(hidden=6)
    norms = {"norm_weight": torch.rand(6, 2, 32), "norm_bias": torch.randn(6, 2, 32)}
    form = {
        "names": stack.names,
        "layers": stack.layers,
        "width": 32,
        "basis": None,
        "basis_rank": 0,
        "where": "here",
    }

    def again(lens: dict) -> LensStack:
        return stack_from_tensors(head=head_of(stack), lens=lens, calibration=stack.calibration_tensors(), **form)

    folded = again(stack.lens_tensors() | norms)
    for layer, head in enumerate(folded.heads):
        expected = stack.heads[layer].fold_norm(norms["norm_weight"][:, layer], norms["norm_bias"][:, layer])
        x_BW = torch.randn(3, 32)
        torch.testing.assert_close(head(x_BW), expected(x_BW))
    with pytest.raises(PackError, match="norm_bias"):
        again(stack.lens_tensors() | {"norm_weight": norms["norm_weight"]})


def test_the_precision_of_a_live_reading_is_float16_unless_a_weight_is_beyond_it():
    stack = random_stack(num=50, calibrated=False)
    assert stack.bank().stored().heads[0].weight.dtype == torch.float16
    assert stack.bank().stored("float32").heads[0].weight.dtype == torch.float32
    stack.heads[0].weight.data[3, 7] = 1e7
    assert stack.bank().stored().heads[0].weight.dtype == torch.float32
