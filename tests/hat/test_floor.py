"""A colour means something however many lenses read: chance gives it to as few tokens as the legend says."""

import numpy as np
import pytest
import torch
from random_lenses import random_stack

from ftw.hat.bank import LensBank
from ftw.hat.floor import CHANCE, LOWEST, chance_floor, logits_at, resolution
from ftw.hat.monitor import Monitor
from ftw.hat.readout import Readout
from ftw.hat.timeline import Timeline, TokenReading
from ftw.map.calibrate import background_quantiles
from ftw.substrate.model import Substrate

NUM_TOKENS = 4000


def noise(num_lenses: int, seed: int, *, alike: bool = False) -> torch.Tensor:
    """Logits of lenses with tails, spreads and middles of all kinds; `alike`: all say the same at heart."""
    kinds, rng = np.random.default_rng(0), np.random.default_rng(seed)
    spread_N, middle_N = kinds.lognormal(size=num_lenses), kinds.normal(0, 5, num_lenses)
    draw_TN = rng.standard_normal((NUM_TOKENS, 1 if alike else num_lenses)).repeat(num_lenses if alike else 1, axis=1)
    is_skewed_N = kinds.random(num_lenses) < 0.5
    draw_TN = np.where(is_skewed_N, np.exp(0.7 * draw_TN), draw_TN)
    return torch.from_numpy((middle_N + spread_N * draw_TN).astype(np.float32))


def bank_on(logits_TN: torch.Tensor) -> LensBank:
    """Lenses whose background these logits are."""
    quantiles_NQ, levels_Q = background_quantiles(logits_TN.numpy())
    stack = random_stack(num=logits_TN.shape[1], layers=(0,), width=2)
    stack.quantiles_NQ, stack.levels_Q = torch.from_numpy(quantiles_NQ), torch.from_numpy(levels_Q).float()
    return stack.bank()


def share_that_stands_out(bank: LensBank, logits_TN: torch.Tensor) -> float:
    return float((bank.rank(logits_TN) >= chance_floor(bank)).any(dim=1).float().mean())


@pytest.mark.parametrize("num_lenses", [1, 30, 1000])
def test_noise_is_coloured_no_more_often_than_the_legend_says(num_lenses: int):
    bank = bank_on(noise(num_lenses, 1))
    shares = [share_that_stands_out(bank, noise(num_lenses, seed)) for seed in (1, 2)]
    assert max(shares) <= CHANCE + 3 * (CHANCE / NUM_TOKENS) ** 0.5
    # Independent lenses come near the bound: it is hardly more careful than it must be.
    assert num_lenses == 1 or min(shares) > 0.4 * CHANCE
    by_percentile = (bank.percentile(noise(num_lenses, 2)) >= 0.99).any(dim=1).float().mean()
    assert num_lenses < 1000 or by_percentile > 0.99


@pytest.mark.parametrize("num_tokens", [50, 300, 4000, 9000, 30_000])
def test_a_table_of_quantiles_shows_how_many_tokens_it_is_made_of(num_tokens: int):
    quantiles_NQ, levels_Q = background_quantiles(np.random.default_rng(0).normal(size=(num_tokens, 20)))
    shown = 1 / resolution(torch.from_numpy(quantiles_NQ), torch.from_numpy(levels_Q).float())
    assert 0.8 * min(num_tokens, 9000) <= shown <= num_tokens


@pytest.mark.parametrize("num_tokens", [100, 1000])
def test_a_short_background_promises_no_more_than_it_can(num_tokens: int):
    bank = bank_on(noise(300, 1)[:num_tokens])
    assert share_that_stands_out(bank, noise(300, 1)[:num_tokens]) <= CHANCE + 1e-6
    # On other tokens as well, once there are enough to tell the 99th percentile of a lens by.
    assert num_tokens < 1000 or share_that_stands_out(bank, noise(300, 2)) <= CHANCE + 0.02


def test_lenses_that_say_the_same_stand_out_less_often():
    assert share_that_stands_out(bank_on(noise(200, 1, alike=True)), noise(200, 2, alike=True)) <= CHANCE


def test_few_lenses_must_still_pass_the_99th_percentile():
    bank = bank_on(noise(3, 1))
    assert chance_floor(bank) == LOWEST
    np.testing.assert_allclose(bank.percentile(logits_at(bank, LOWEST)[None]), 0.99, atol=1e-4)


def test_a_lens_that_always_says_the_same_raises_no_floor():
    logits_TN = noise(30, 1)
    expected = chance_floor(bank_on(logits_TN))
    constant_TN = torch.full((NUM_TOKENS, 1), 100.0)
    assert chance_floor(bank_on(torch.cat([logits_TN, constant_TN], dim=1))) == pytest.approx(expected, rel=1e-3)


def test_without_background_nothing_stands_out():
    bank = random_stack(calibrated=False).bank()
    assert chance_floor(bank) == float("inf")
    assert Readout(bank, top_k=1)(100 * torch.ones(1, 6))[0].lead is None


def test_what_stands_out_live_stands_out_in_the_timeline(tiny_substrate: Substrate):
    bank, readings = random_stack().bank(), list[TokenReading]()
    timeline = Monitor(tiny_substrate, bank, top_k=2).generate(
        "Hello", on_token=lambda _, reading: readings.append(reading), max_new_tokens=40, do_sample=True, seed=0
    )
    assert isinstance(timeline, Timeline)
    leads = [None if n < 0 else timeline.concepts[n] for n in timeline.strongest()]
    assert [reading.lead for reading in readings] == leads == [one.lead for one in timeline.readings(1)]
    assert len(set(leads)) > 1
