"""Convergence: the corrected distance of two samples of one thing is nothing, the plain one is not."""

import numpy as np
import pytest
from toy_growing import entries

from ftw.errors import ConfigError
from ftw.map.growing.convergence import TEMPLATES, ConvergenceConfig, between, contexts_needed, crossed_table, measure
from ftw.map.sentences import CONTEXTS

CONFIG = ConvergenceConfig(half=10, splits=10, draws=50)


def made_up(noise: float, seed: int = 0, width: int = 64) -> np.ndarray:
    """Sixty concepts in forty templates: a common part, the concept's own, and noise."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(60, 1, width)) + 3 * random.normal(size=width)
    return own + noise * random.normal(size=(60, 40, width))


def test_the_plain_distance_is_the_noise_and_the_corrected_one_is_nothing():
    noise = 0.8
    states = made_up(noise)
    last = measure(states, ["concrete"] * 60, 3, CONFIG)[-1]
    size = np.linalg.norm(states.mean(axis=1), axis=-1).mean()
    assert last.n == 10
    assert last.distance[0] == pytest.approx(noise * np.sqrt(64 * (1 / 10 + 1 / 10)) / size, rel=0.1)
    assert last.corrected[1] == 0
    assert last.corrected[0] < last.distance[0] / 4


def test_without_noise_all_is_settled_at_once():
    first = measure(made_up(0.0), ["concrete"] * 30 + ["abstract"] * 30, 3, CONFIG)[0]
    assert first.distance[0] == pytest.approx(0, abs=1e-9)
    assert first.cosine[0] == pytest.approx(1)
    assert first.reliability[0] == pytest.approx(1)
    assert first.passing[0] == 1


def test_reliability_rises_with_contexts_and_falls_with_noise():
    quiet, loud = (measure(made_up(noise), ["concrete"] * 60, 3, CONFIG) for noise in (0.5, 3.0))
    assert [point.reliability[0] for point in quiet] == sorted(point.reliability[0] for point in quiet)
    assert all(one.reliability[0] > other.reliability[0] for one, other in zip(quiet, loud, strict=True))
    assert all(point.reliability[1] <= point.reliability[0] <= point.reliability[2] for point in loud)


def test_what_every_template_adds_to_all_concepts_does_not_count_for_reliability():
    states, template = made_up(0.5), np.random.default_rng(1).normal(size=(1, 40, 64))
    plain, shifted = (measure(one, ["concrete"] * 60, 3, CONFIG)[4] for one in (states, states + 5 * template))
    assert shifted.reliability[0] == pytest.approx(plain.reliability[0], abs=0.02)
    assert shifted.distance[0] > plain.distance[0]


def test_two_sets_of_sentences_differ_by_what_the_second_adds_and_by_no_noise():
    random = np.random.default_rng(2)
    states = random.normal(size=(60, 1, 64)) + 0.5 * random.normal(size=(60, len(TEMPLATES), 64))
    (same,) = between(states, ["concrete"] * 60, 3, CONFIG)
    assert same["corrected"][0] < same["distance"][0] / 3
    states[:, len(CONTEXTS) :] += 0.3
    (apart,) = between(states, ["concrete"] * 60, 3, CONFIG)
    size = np.linalg.norm(states.mean(axis=1), axis=-1).mean()
    assert apart["corrected"][0] == pytest.approx(0.3 * 8 / size, rel=0.1)
    assert apart["own"][0] == pytest.approx(same["own"][0], rel=0.05)


def test_contexts_needed_are_those_at_which_noise_is_a_twentieth():
    noise = 2.0
    size = np.linalg.norm(made_up(0.0)[:, 0], axis=-1)
    assert np.median(contexts_needed(made_up(noise)) / (noise**2 * 64 / (0.05 * size) ** 2)) == pytest.approx(
        1, abs=0.1
    )


def test_every_concept_stands_in_every_template():
    table = crossed_table(entries())
    assert len(table) == len(entries()) * len(TEMPLATES)
    assert set(np.bincount(table.cols)) == {len(TEMPLATES)}


def test_more_templates_than_there_are_cannot_be_halved():
    with pytest.raises(ConfigError, match="templates"):
        ConvergenceConfig(half=500).check()
