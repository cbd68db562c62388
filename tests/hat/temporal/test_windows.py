"""Sequence banks and sliding windows: live as recorded, truncated at the start, a gap where there is nothing."""

import pytest
import torch
from random_lenses import random_stack
from temporal_lenses import stack_of

from ftw.errors import ConfigError, PackError, SubstrateError
from ftw.hat.pooling import POOLS, STATE_POOLS, Pooling
from ftw.hat.temporal.bank import PooledTokens
from ftw.hat.temporal.pooled_windows import PooledWindows
from ftw.hat.temporal.windows import WindowReader

FAMILIES = ("lstm", "gru", "attention", "trunk_lstm", "token_max", "token_mean")
WIDTH, LAYERS = 8, (1, 2)


def states(num_tokens: int, batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, num_tokens, len(LAYERS), WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_read_live_are_those_of_the_recorded_text_read_one_by_one(family: str, rank: int):
    bank = stack_of(family, rank=rank).sequence_bank()
    reader, whole_BTLD = WindowReader(bank, window=6, stride=4), states(19)
    live = torch.cat([reader.push(whole_BTLD[:, t : t + 1]) for t in range(19)], dim=1)
    reader.begin()
    recorded = reader.push(whole_BTLD)
    assert torch.allclose(live, recorded, atol=1e-5, equal_nan=True)
    for end in range(1, 20):
        if end % 4:
            assert live[:, end - 1].isnan().all()
        else:
            alone_BN = bank(whole_BTLD[:, max(0, end - 6) : end])
            assert (live[:, end - 1] - alone_BN).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["lstm", "gru", "trunk_lstm"])
@pytest.mark.parametrize("pushed", [[1] * 24, [9, 1, 1, 1, 7, 2, 1, 2], [3, 3, 2, 4, 12]])
def test_a_forward_direction_that_is_carried_on_gives_what_each_window_gives_alone(family: str, pushed: list[int]):
    bank, whole_BTLD = stack_of(family).sequence_bank(), states(24)
    reader = WindowReader(bank, window=9, stride=3)
    for _ in range(2):  # the second time nothing is left of the first
        reader.begin()
        live_BTN = torch.cat([reader.push(part) for part in whole_BTLD.split(pushed, dim=1)], dim=1)
        for end in range(3, 25, 3):
            alone_BN = bank(whole_BTLD[:, max(0, end - 9) : end])
            assert (live_BTN[:, end - 1] - alone_BN).abs().max() < 1e-4


def test_a_long_text_is_read_in_parts_as_in_one():
    bank = stack_of("lstm").sequence_bank()
    reader, whole_BTLD = WindowReader(bank, window=20, stride=7), states(150, batch=1)
    logits_TN = reader.push(whole_BTLD)[0]
    for end in (7, 63, 70, 147):
        assert (logits_TN[end - 1] - bank(whole_BTLD[:, max(0, end - 20) : end])[0]).abs().max() < 1e-4


def test_the_end_of_each_sequence_is_read_whatever_the_stride():
    bank = stack_of("gru").sequence_bank()
    reader, whole_BTLD = WindowReader(bank, window=6, stride=4), states(11, batch=3)
    reader.push(whole_BTLD)
    tails = reader.tails([11, 8, 2])
    assert set(tails) == {0, 2}
    assert (tails[0] - bank(whole_BTLD[:1, 5:11])[0]).abs().max() < 1e-4
    assert (tails[2] - bank(whole_BTLD[2:, :2])[0]).abs().max() < 1e-4


@pytest.mark.parametrize("pool", ["mean", "last", "max"])
def test_lenses_of_single_states_read_windows_by_their_pool(pool: str):
    bank = random_stack(layers=LAYERS, width=WIDTH).bank()
    reader, whole_BTLD = WindowReader(PooledTokens(bank, pool), window=4, stride=2), states(8, batch=1)
    last_N = reader.push(whole_BTLD)[0, -1]
    window_TLD = torch.nn.functional.layer_norm(whole_BTLD[0, 4:], (WIDTH,), eps=1e-5)
    expected = {
        "mean": lambda: bank.logits(window_TLD.mean(0, keepdim=True))[0],
        "last": lambda: bank.logits(window_TLD[-1:])[0],
        "max": lambda: bank.logits(window_TLD).amax(0),
    }[pool]()
    assert (last_N - expected).abs().max() < 1e-4


@pytest.mark.parametrize("pools", [("mean",), ("max", "last"), ("mean", "max", "last", "tail", "spread")])
def test_lenses_with_a_pooling_of_their_own_read_a_window_as_they_read_a_text(pools: tuple[str, ...]):
    stack = random_stack(layers=LAYERS, width=WIDTH)
    more = {
        pool: random_stack(layers=LAYERS, width=WIDTH, seed=seed).heads
        for seed, pool in enumerate(STATE_POOLS[1:])
        if pool in pools
    }
    scale_NLP = torch.rand(6, 2, len(POOLS)) * torch.tensor([float(pool in pools) for pool in POOLS])
    pooling = Pooling(heads=more, scale_NLP=scale_NLP, offset_N=torch.randn(6))
    lenses = PooledWindows(stack.bank(), stack.heads, pooling)
    reader, whole_BTLD = WindowReader(lenses, window=12, stride=3), states(17, batch=2)
    logits_BTN = reader.push(whole_BTLD)
    tails = reader.tails([17, 4])
    normed_BLTD = torch.nn.functional.layer_norm(whole_BTLD, (WIDTH,), eps=1e-5).transpose(1, 2)
    for end in (3, 12, 15):  # the first is truncated, shorter than a tail
        for row in (0, 1):
            expected_N = pooling.read(stack.heads, normed_BLTD[row, :, max(0, end - 12) : end])
            assert (logits_BTN[row, end - 1] - expected_N).abs().max() < 1e-4
    assert (tails[0] - pooling.read(stack.heads, normed_BLTD[0, :, 5:17])).abs().max() < 1e-4
    assert (tails[1] - pooling.read(stack.heads, normed_BLTD[1, :, :4])).abs().max() < 1e-4
    assert lenses.pooled(lenses.tokens(whole_BTLD), torch.tensor([0, 17])).isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_without_tokens_is_a_gap_and_moves_no_other(family: str):
    bank, x_BTLD = stack_of(family).sequence_bank(), states(5)
    logits_BN = bank(x_BTLD, torch.tensor([0, 4]))
    assert logits_BN[0].isnan().all()
    assert (logits_BN[1] - bank(x_BTLD[1:, :4])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_that_is_not_a_number_never_becomes_one(family: str):
    bank, x_BTLD = stack_of(family).sequence_bank(), states(5)
    x_BTLD[0, 2, 0, 1] = torch.nan
    logits_BN = bank(x_BTLD)
    assert logits_BN[0].isnan().all()
    assert logits_BN[1].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_states_and_single_tokens_give_finite_logits(family: str):
    bank = stack_of(family).sequence_bank()
    assert bank(torch.ones(2, 9, len(LAYERS), WIDTH)).isfinite().all()
    assert bank(states(1)).isfinite().all()


def test_lenses_in_parts_read_as_all_at_once(monkeypatch: pytest.MonkeyPatch):
    bank, x_BTLD = stack_of("lstm", num=7).sequence_bank(), states(6)
    whole = bank(x_BTLD)
    monkeypatch.setattr("ftw.hat.temporal.bank.READ_BYTES", 1)
    assert len(bank.parts(2, 6)) == 7
    assert (bank(x_BTLD) - whole).abs().max() < 1e-5


def test_windows_that_would_leave_tokens_unread_are_refused():
    bank = stack_of("attention").sequence_bank()
    for window, stride in ((0, 1), (5, 0), (5, 6)):
        with pytest.raises(ConfigError, match="window="):
            WindowReader(bank, window=window, stride=stride)


def test_states_of_another_width_and_the_wrong_kind_of_bank_are_refused():
    stack = stack_of("lstm")
    with pytest.raises(SubstrateError, match="width 8"):
        stack.sequence_bank()(torch.zeros(1, 3, 2, WIDTH + 1))
    with pytest.raises(PackError, match="mode=timeline"):
        stack.bank()
    with pytest.raises(PackError, match=r"stack\.bank"):
        random_stack().sequence_bank()


@pytest.mark.parametrize("family", FAMILIES)
def test_lenses_stored_for_reading_decide_alike_live_and_on_the_whole_text(family: str):
    exact = stack_of(family).sequence_bank()
    bank = exact.stored("bfloat16")
    states_BTLD = states(24)
    spread = exact(states_BTLD).std()
    assert (bank(states_BTLD) - exact(states_BTLD)).abs().max() < 0.05 * spread
    reader = WindowReader(bank, window=6, stride=2)
    live_BTN = torch.cat([reader.push(states_BTLD[:, at : at + 1]) for at in range(24)], dim=1)
    for end in (2, 8, 24):
        alone_BN = bank(states_BTLD[:, max(0, end - 6) : end])
        assert (live_BTN[:, end - 1] - alone_BN).abs().max() < 0.05 * spread
    assert len(exact.stored()) == len(exact)


@pytest.mark.parametrize("family", ["lstm", "trunk_lstm"])
def test_precisions_that_sequences_are_not_read_in_are_refused(family: str):
    with pytest.raises(ConfigError, match="choose float32 or bfloat16"):
        stack_of(family).sequence_bank().stored("int8")
