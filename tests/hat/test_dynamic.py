"""Lenses behind an aperture read what the bank reads, and a lens that fails costs its reading, never the generation."""

import numpy as np
import pytest
import torch
from random_lenses import random_stack

from ftw.errors import ConfigError, SubstrateError
from ftw.hat.aperture import Aperture, ApertureConfig
from ftw.hat.bank import LensBank
from ftw.hat.dynamic import LiveLenses
from ftw.hat.holder import ResidentLenses
from ftw.hat.lineage import Lineage
from ftw.hat.text import TextBank, TextLens

LEVELS = {"concept0": 0, "concept1": 0, **{f"concept{n}": 1 for n in range(2, 6)}}
PARENTS = {"concept2": ["concept0"], "concept3": ["concept0"], "concept4": ["concept1"], "concept5": ["concept1"]}


class Tree(dict[str, list[str]]):
    def parents(self, name: str) -> list[str]:
        return self[name]


LINEAGE = Lineage(list(LEVELS), LEVELS, Tree({name: PARENTS.get(name, []) for name in LEVELS}))


def text_bank(names: list[str] | None = None) -> TextBank:
    words = ["cat", "dog", "war"]
    names = list(LEVELS) if names is None else names
    rng = np.random.default_rng(0)
    return TextBank.from_lenses(
        [
            TextLens(name=name, vocabulary=words, idf=np.ones(3), coefficients=rng.normal(size=3), bias=-1.0)
            for name in names
        ]
    )


def live(bank: LensBank | None = None, text: TextBank | None = None, **options: object) -> LiveLenses:
    known = {name: options.pop(name) for name in ("by", "window_tokens", "holder") if name in options}
    holder = known.pop("holder", None) or (None if bank is None else ResidentLenses(bank))
    aperture = Aperture(LINEAGE, ApertureConfig(max_loaded=0, **options))  # type: ignore[arg-type]
    return LiveLenses(aperture, activation=holder, text=text, **known)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bank() -> LensBank:
    return random_stack().bank()


def states(num: int = 1, *, layers: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, layers, 32, generator=torch.Generator().manual_seed(seed))


def test_wide_open_it_reads_what_the_bank_reads(bank: LensBank):
    lenses = live(bank, load_threshold=0, unload_threshold=0)
    for seed in range(4):
        tick = lenses.read(states(seed=seed))
        expected_N = bank(states(seed=seed))[0].numpy()
        np.testing.assert_allclose(tick.logits("activation"), expected_N, atol=1e-6)
        assert tick.shown("activation").tolist() == np.argsort(-expected_N, kind="stable").tolist()
        assert len(tick.shown("text")) == 0


def test_a_closed_family_is_not_read(bank: LensBank):
    tick = live(bank, load_threshold=1, unload_threshold=1).read(states())
    assert np.isnan(tick.logits("activation")).tolist() == [False, False, True, True, True, True]


def test_text_is_read_over_the_window_and_pieces_join_to_words():
    text = text_bank()
    lenses = live(text=text, load_threshold=0, unload_threshold=0)
    for piece in ("A", " c", "at", " and", " dog"):
        tick = lenses.read(token_text=piece)
    np.testing.assert_allclose(tick.logits("text"), text.score(["A cat and dog"])[0].numpy(), atol=1e-6)
    bare = live(text=text, load_threshold=0, unload_threshold=0, window_tokens=1)
    bare.read(token_text="cat")
    np.testing.assert_allclose(bare.read(token_text="dog").logits("text"), text.score(["dog"])[0].numpy(), atol=1e-6)
    lenses.reset()
    assert lenses.counts["texts_without_known_words"] == 2
    np.testing.assert_allclose(lenses.read(token_text="war").logits("text"), text.score(["war"])[0].numpy(), atol=1e-6)


def test_both_kinds_in_one_tick_and_a_concept_may_have_one_kind_only(bank: LensBank):
    lenses = live(bank, text_bank(["concept5", "concept0"]), load_threshold=0, unload_threshold=0)
    tick = lenses.read(states(), "cat")
    assert tick.kinds == ("activation", "text")
    assert np.flatnonzero(~np.isnan(tick.logits("text"))).tolist() == [0, 5]
    assert not np.isnan(tick.logits("activation")).any()


def test_percentiles_are_the_banks_own(bank: LensBank):
    lenses = live(bank, by="percentile", load_threshold=0, unload_threshold=0)
    tick = lenses.read(states())
    expected_N = bank.percentile(bank(states()))[0].numpy()
    found_N = lenses.percentiles("activation", tick.logits("activation"), np.arange(6))
    np.testing.assert_allclose(found_N, expected_N, atol=1e-6)
    np.testing.assert_allclose(tick.decision.values_KN[0], expected_N, atol=1e-6)
    with pytest.raises(ConfigError, match="text lenses of this pack have no background"):
        live(text=text_bank(), by="percentile")
    with pytest.raises(ConfigError, match="by='logit'"):
        live(bank, by="logit")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_missing_and_counted(bank: LensBank, bad: float):
    lenses = live(bank, text_bank(), load_threshold=0, unload_threshold=0, cooldown_ticks=0)
    lenses.read(states(), "cat")
    read_before = lenses.aperture.scored_N
    spoilt = states()
    spoilt[0, 1, 3] = bad
    tick = lenses.read(spoilt, "dog")
    assert tick.missing == ("activation",)
    assert len(tick.shown("activation")) == 0
    assert len(tick.shown("text")) > 0
    assert (lenses.counts["missing"], lenses.counts["ticks"]) == (1, 2)
    np.testing.assert_array_equal(lenses.aperture.scored_N, read_before)


class BrokenDisk(ResidentLenses):
    """Reads the base; what must be loaded fails, at first for some lenses, then as a whole."""

    whole = False

    def logits(self, rows: np.ndarray) -> np.ndarray:
        if self.whole and 2 in rows:
            raise OSError(5, "Input/output error")
        logits_BM = super().logits(rows).copy()
        logits_BM[:, rows == 2] = np.nan
        return logits_BM

    def drop(self, rows: np.ndarray) -> None:
        raise OSError(5, "Input/output error")


def test_a_lens_that_cannot_be_loaded_is_missing_and_the_rest_is_read(bank: LensBank):
    disk = BrokenDisk(bank)
    lenses = live(holder=disk, load_threshold=0, unload_threshold=0)
    tick = lenses.read(states())
    assert np.isnan(tick.logits("activation")).tolist() == [n == 2 for n in range(6)]
    assert lenses.counts["missing_lenses"] == 1
    disk.whole = True
    tick = lenses.read(states())
    assert tick.missing == ("activation",)
    lenses.reset()
    assert lenses.counts["errors"] == 2
    assert "Input/output error" in lenses.last_error


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.zeros(1, 32), r"shape \(1, 32\); these lenses read \[1, 2, 32\]"),
        (torch.zeros(1, 2, 31), r"\(1, 2, 31\)"),
        (torch.zeros(2, 2, 32), "one token at a time"),
        (torch.zeros(1, 2, 32, dtype=torch.long), r"torch\.int64"),
        ([0.0] * 32, "list"),
    ],
    ids=str,
)
def test_states_of_another_kind_are_refused(bank: LensBank, state: torch.Tensor, words: str):
    with pytest.raises(SubstrateError, match=words):
        live(bank).read(state)


def test_the_axis_of_one_layer_may_be_left_out():
    one = random_stack(layers=(1,)).bank()
    lenses, state = live(one, load_threshold=0, unload_threshold=0), states(layers=1)
    for shaped in (state, state[0], state[0, 0], state.to(torch.bfloat16).float()):
        expected_N = one(shaped.reshape(1, 1, 32))[0].numpy()
        np.testing.assert_allclose(lenses.read(shaped).logits("activation"), expected_N, atol=1e-6)


def test_a_kind_without_lenses_is_refused(bank: LensBank):
    with pytest.raises(ConfigError, match="activation lenses only"):
        live(bank).read(states(), "cat")
    with pytest.raises(ConfigError, match="text lenses only"):
        live(text=text_bank()).read(states())
    with pytest.raises(ConfigError, match="nothing to read"):
        live(bank).read()
    with pytest.raises(ConfigError, match="no lenses"):
        live()


def test_many_states_open_what_any_of_them_calls_for(bank: LensBank):
    many = states(12, seed=5)
    lenses = live(bank, load_threshold=0.9)
    tick = lenses.read_all(many)
    highest_N = bank(many).max(0).values.numpy()
    there_N = lenses.aperture.scored_N
    np.testing.assert_allclose(tick.logits("activation")[there_N], highest_N[there_N], atol=1e-6)


def test_memory_that_is_taken_cannot_be_budgeted_away(bank: LensBank):
    holder = ResidentLenses(bank)
    assert holder.preload(2**30) == len(bank)
    with pytest.raises(ConfigError, match="fewer than"):
        holder.preload(10)
