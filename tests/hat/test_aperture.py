"""The aperture opens what is strong, whole families at a time, and decides alike over resident and loaded lenses."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw.errors import ConceptError, ConfigError
from ftw.hat.aperture import Aperture, ApertureConfig, Decision, strongest
from ftw.hat.lineage import Lineage

# a0 ── a1 ── a2, b2     c0 ── c1 (leaf), d1 ── d2 ── d3
PARENTS = {
    "a0": [],
    "c0": [],
    "a1": ["a0"],
    "b1": ["a0"],
    "c1": ["c0"],
    "d1": ["c0"],
    "a2": ["a1"],
    "b2": ["a1"],
    "d2": ["d1", "b1"],
    "d3": ["d2"],
}


class Tree(dict[str, list[str]]):
    def parents(self, name: str) -> list[str]:
        return self[name]


def lineage(parents: dict[str, list[str]] = PARENTS) -> Lineage:
    return Lineage(list(parents), {name: int(name[-1]) for name in parents}, Tree(parents))


def aperture(**options: object) -> Aperture:
    further = {name: options.pop(name) for name in ("admitted", "required", "static") if name in options}
    return Aperture(lineage(), ApertureConfig(**options), **further)  # type: ignore[arg-type]


def full(scores: dict[str, float], rest: float = 0.0) -> np.ndarray:
    return np.array([[scores.get(name, rest) for name in PARENTS]])


def look(full_KN: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: full_KN[:, rows]


def names(of: Aperture, rows: np.ndarray | list[int]) -> set[str]:
    return {of.lineage.names[row] for row in rows}


def read(of: Aperture) -> set[str]:
    return names(of, np.flatnonzero(of.scored_N))


def test_base_levels_are_read_and_a_strong_parent_opens_its_children_down_the_line():
    one = aperture()
    assert read(one) == {"a0", "c0"}
    first = one.step(look(full({"c0": 0.9, "d1": 0.8, "d2": 0.1, "c1": 0.2})))
    assert names(one, first.to_load) == {"c1", "d1", "d2"}
    assert names(one, first.opened) == {"c0", "d1"}
    assert [one.lineage.names[row] for row in first.visible[0]][:3] == ["c0", "d1", "c1"]


def test_an_opened_parent_stays_visible_even_when_its_children_outrank_it():
    one = aperture(keep_top_k=2)
    decision = one.step(look(full({"c0": 0.5, "c1": 0.9, "d1": 0.8})))
    assert names(one, decision.visible[0]) == {"c0", "c1", "d1"}


@pytest.mark.parametrize(("score", "opens"), [(0.29, False), (0.3, True)])
def test_a_parent_opens_at_the_threshold(score: float, opens: bool):
    decision = aperture(load_threshold=0.3).step(look(full({"c0": score})))
    assert bool(decision.opened) == opens


def test_a_parent_outside_the_strongest_stays_closed_however_strong():
    one = aperture(keep_top_k=1)
    decision = one.step(look(full({"a0": 0.95, "c0": 0.9})))
    assert names(one, decision.opened) == {"a0"}


def test_the_beam_takes_the_strongest_first_and_depth_bounds_one_tick():
    one = aperture(beam=1, max_depth=1)
    scores = full({"a0": 0.8, "c0": 0.9, "a1": 0.7, "d1": 0.7})
    assert names(one, one.step(look(scores)).opened) == {"c0"}
    assert names(one, one.step(look(scores)).opened) == {"a0"}
    closed = aperture(max_depth=0)
    assert closed.step(look(scores)).opened == []


def test_a_family_cools_down_before_it_closes_and_what_stood_below_goes_with_it():
    one = aperture(cooldown_ticks=2)
    one.step(look(full({"c0": 0.9, "d1": 0.9, "d2": 0.9})))
    assert read(one) == {"a0", "c0", "c1", "d1", "d2", "d3"}
    cold = full({"d1": 0.9, "d2": 0.9}, rest=0.01)
    assert len(one.step(look(cold)).to_unload) == len(one.step(look(cold)).to_unload) == 0
    last = one.step(look(cold))
    assert names(one, last.to_unload) == {"c1", "d1", "d2", "d3"}
    assert names(one, last.closed) == {"c0", "d1", "d2"}
    assert read(one) == {"a0", "c0"}


def test_between_the_thresholds_nothing_changes():
    one = aperture(cooldown_ticks=0)
    one.step(look(full({"c0": 0.9})))
    for _ in range(3):
        decision = one.step(look(full({"c0": 0.2})))
        assert (decision.opened, decision.closed) == ([], [])
    assert names(one, one.step(look(full({"c0": 0.05}))).closed) == {"c0"}


def test_a_child_of_two_parents_is_read_until_both_are_closed():
    one = aperture(cooldown_ticks=0)
    one.step(look(full({"a0": 0.9, "b1": 0.9, "c0": 0.9, "d1": 0.9})))
    decision = one.step(look(full({"a0": 0.9, "b1": 0.9, "c0": 0.9, "d1": 0.0})))
    assert names(one, decision.closed) == {"d1"}
    assert "d2" in read(one)


def test_a_missing_reading_closes_nothing():
    one = aperture(cooldown_ticks=0)
    one.step(look(full({"c0": 0.9})))
    before = read(one)
    decision = one.step(look(full({}, rest=np.nan)))
    assert (decision.closed, read(one)) == ([], before)
    assert len(decision.visible[0]) == 0


def test_watched_concepts_their_descendants_and_their_siblings_are_always_read():
    one = aperture(watch=["d1"], keep_top_k=1)
    assert read(one) == {"a0", "c0", "c1", "d1", "d2", "d3"}
    decision = one.step(look(full({"a0": 0.2})))
    assert names(one, decision.visible[0]) == {"a0", "d1", "d2", "d3"}
    with pytest.raises(ConceptError, match="nearest: d1"):
        aperture(watch=["D1"])


def test_a_deployment_keeps_others_out_and_the_watch_list_is_stronger():
    one = aperture(admitted={"a0", "c0", "d1"}, required=["d1"])
    assert read(one) == {"a0", "c0", "d1"}
    decision = one.step(look(full({"c0": 0.9, "d1": 0.9, "a0": 0.9})))
    assert len(decision.to_load) == 0
    assert "d3" in read(aperture(admitted={"a0", "c0"}, watch=["d3"]))
    assert read(aperture(admitted={"a0", "a1", "d3"}, static=True)) == {"a0", "a1", "d3"}


def test_a_full_aperture_makes_room_from_what_has_cooled_and_refuses_what_does_not_fit():
    one = aperture(max_loaded=4, max_depth=1)
    one.step(look(full({"c0": 0.9})))
    hot = one.step(look(full({"c0": 0.9, "a0": 0.8})))
    assert (names(one, hot.opened), hot.num_refused) == (set(), 1)
    one.step(look(full({"a0": 0.2, "c0": 0.01})))
    cooled = one.step(look(full({"a0": 0.9, "c0": 0.01})))
    assert (names(one, cooled.closed), names(one, cooled.opened)) == ({"c0"}, {"a0"})
    assert names(one, cooled.to_unload) == {"c1", "d1"}
    with pytest.raises(ConfigError, match="smallest workable value is 2"):
        aperture(max_loaded=1)


def test_what_is_opened_on_request_stays_and_what_is_closed_on_request_stays_closed():
    one = aperture(cooldown_ticks=1)
    fresh = one.open(one.lineage.row("d2"))
    assert names(one, fresh) == {"c1", "d1", "d2", "d3"}
    for _ in range(4):
        one.step(look(full({})))
    assert "d3" in read(one)
    assert names(one, one.close(one.lineage.row("c0"))) == {"c1", "d1", "d2", "d3"}
    assert one.step(look(full({"c0": 0.9}))).opened == []
    assert names(one, one.step(look(full({"c0": 0.9}))).opened) == {"c0"}
    with pytest.raises(ConfigError, match="max_loaded=2"):
        aperture(max_loaded=2).open(0)


def test_either_kind_opens_a_branch_and_each_kind_shows_its_own():
    one = aperture(keep_top_k=1)
    both_KN = np.concatenate([full({"a0": 0.9, "a1": 0.95}), full({"c0": 0.8, "d1": 0.9})])
    decision = one.step(look(both_KN))
    assert {"a0", "c0"} <= names(one, decision.opened)
    thinks, writes = ([one.lineage.names[row] for row in rows] for rows in decision.visible)
    assert (thinks[0], writes[0]) == ("a1", "d1")


def test_likely_children_stand_below_parents_that_nearly_open():
    one = aperture()
    decision = one.step(look(full({"a0": 0.2, "c0": 0.05})))
    assert names(one, decision.likely) == {"a1", "b1"}


def test_a_concept_without_a_lens_cuts_nobody_off():
    gap = Lineage(["a0", "a2", "b2", "x1"], {"a2": 2, "b2": 2, "x1": 1}, Tree(PARENTS))
    assert gap.names_of(gap.children_of[0]) == ["a2", "b2"]
    assert gap.is_root_N.tolist() == [True, False, False, True]
    orphan = Aperture(gap, ApertureConfig(), admitted={"a2", "x1"})
    assert names(orphan, np.flatnonzero(orphan.scored_N)) == {"a2", "x1"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_top_k": 0}, "keep_top_k=0"),
        ({"load_threshold": 0.1, "unload_threshold": 0.2}, "unload_threshold=0.2"),
        ({"base_levels": [7]}, "no lens is on level 7"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        aperture(**options)


class Loader:
    """Scores only what it has been asked to bring, as a shelf does."""

    def __init__(self, full_KN: np.ndarray) -> None:
        self.full_KN, self.there = full_KN, set[int]()

    def score(self, rows: np.ndarray) -> np.ndarray:
        self.there |= set(rows.tolist())
        values_KN = np.full_like(self.full_KN, np.nan)
        held = sorted(self.there)
        values_KN[:, held] = self.full_KN[:, held]
        return values_KN[:, rows]

    def drop(self, rows: np.ndarray) -> None:
        assert set(rows.tolist()) <= self.there
        self.there -= set(rows.tolist())


@st.composite
def forests(draw: st.DrawFn) -> Lineage:
    num = draw(st.integers(2, 24))
    parents: dict[str, list[str]] = {}
    level: dict[str, int] = {}
    for n in range(num):
        above = draw(st.lists(st.sampled_from(sorted(parents)), max_size=2, unique=True)) if parents else []
        parents[f"n{n}"] = above
        level[f"n{n}"] = max((level[up] + 1 for up in above), default=0)
    return Lineage(list(parents), level, Tree(parents))


CONFIGS = st.builds(
    ApertureConfig,
    keep_top_k=st.integers(1, 8),
    load_threshold=st.sampled_from([0.3, 0.6]),
    unload_threshold=st.sampled_from([0.0, 0.2]),
    cooldown_ticks=st.integers(0, 2),
    max_depth=st.integers(0, 3),
    beam=st.integers(1, 3),
    max_loaded=st.sampled_from([0, 24, 40]),
)


def stream(seed: int, num: int, ticks: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.where(rng.random((2, num)) < 0.05, np.nan, rng.random((2, num))) for _ in range(ticks)]


@settings(max_examples=60, deadline=None)
@given(forest=forests(), config=CONFIGS, seed=st.integers(0, 2**16))
def test_resident_and_loaded_lenses_lead_to_the_same_decisions(forest: Lineage, config: ApertureConfig, seed: int):
    resident, loaded, loader = Aperture(forest, config), Aperture(forest, config), Loader(np.empty((2, 0)))
    for full_KN in stream(seed, len(forest)):
        loader.full_KN = full_KN
        one, other = resident.step(look(full_KN)), loaded.step(loader.score, loader.drop)
        assert loader.there == set(np.flatnonzero(loaded.scored_N).tolist())
        for part in ("to_load", "to_unload", "likely", "values_KN"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
        assert [rows.tolist() for rows in one.visible] == [rows.tolist() for rows in other.visible]


@settings(max_examples=60, deadline=None)
@given(forest=forests(), config=CONFIGS, seed=st.integers(0, 2**16))
def test_at_any_time_families_are_whole_and_bounds_hold(forest: Lineage, config: ApertureConfig, seed: int):
    one = Aperture(forest, config)
    read_before = one.scored_N
    for full_KN in stream(seed, len(forest)):
        decision: Decision = one.step(look(full_KN))
        scored = set(np.flatnonzero(one.scored_N).tolist())
        expected = set(np.flatnonzero(one.base_N).tolist())
        for parent in one.open_parents:
            assert parent in scored  # an open parent stays visible
            expected |= set(forest.children_of[parent].tolist())
        assert scored == expected  # a family is read whole or not at all
        assert not config.max_loaded or len(scored) <= config.max_loaded
        changed = set(np.flatnonzero(read_before ^ one.scored_N).tolist())
        assert changed == {*decision.to_load.tolist(), *decision.to_unload.tolist()}
        for values_N, rows in zip(decision.values_KN, decision.visible, strict=True):
            assert set(rows.tolist()) <= scored
            assert (np.diff(values_N[rows]) <= 0).all()
        read_before = one.scored_N


@settings(max_examples=30, deadline=None)
@given(forest=forests(), seed=st.integers(0, 2**16))
def test_wide_open_the_view_is_the_full_ranking(forest: Lineage, seed: int):
    wide = ApertureConfig(load_threshold=0, unload_threshold=0, keep_top_k=99, beam=99, max_depth=99, max_loaded=0)
    values_KN = np.random.default_rng(seed).random((1, len(forest)))
    decision = Aperture(forest, wide).step(look(values_KN))
    assert decision.visible[0].tolist() == np.argsort(-values_KN[0], kind="stable").tolist()


def test_a_strong_child_below_a_weak_parent_is_what_the_aperture_does_not_see():
    one = aperture()
    scores = full({"d3": 0.99, "c0": 0.1})
    assert "d3" not in names(one, one.step(look(scores)).visible[0])
    ranked = [list(PARENTS)[row] for row in strongest(scores[0], 1)]
    assert ranked == ["d3"]  # what a full ranking of resident lenses would show first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(float("nan")), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), max_size=30),
       st.integers(1, 9))  # fmt: skip
def test_strongest_are_those_of_a_stable_sort(values: list[float], k: int):
    values_N = np.array(values, dtype=float)
    there = [row for row in range(len(values)) if not np.isnan(values_N[row])]
    expected = sorted(sorted(there, key=lambda row: (-values_N[row], row))[:k])
    assert sorted(strongest(values_N, k).tolist()) == expected
