"""The growing encyclopedia: what it says of its samples and concepts, and that rounds count whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from toy_growing import LAYERS, WORDS, entries, started

from ftw.errors import ConceptError, EncyclopediaError
from ftw.map.growing import GrowingEncyclopedia
from ftw.map.growing.entries import check_entries, read_entries, write_entries
from ftw.map.growing.rounds import add_tests, refine
from ftw.substrate.model import Substrate


@pytest.fixture
def refined(tmp_path: Path, tiny_substrate: Substrate) -> GrowingEncyclopedia:
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [0, 2, 3], 1, contexts=3, progress=False)
    refine(growing, tiny_substrate, [2, 5], 1, contexts=2, progress=False)
    add_tests(growing, tiny_substrate, contexts=2, progress=False)
    return growing


def test_merged_moments_equal_those_of_all_samples_at_once(refined: GrowingEncyclopedia) -> None:
    rows = refined.rows()
    for place, layer in enumerate(LAYERS):
        found = refined.statistics(layer)
        states_SD = refined.states(rows)[:, place].astype(np.float64)
        for concept in range(len(WORDS)):
            own_SD = states_SD[rows.concept == concept]
            assert found.num_samples[concept] == len(own_SD)
            np.testing.assert_allclose(found.mean_ND[concept], own_SD.mean(axis=0), rtol=1e-5, atol=1e-6)
            if len(own_SD) > 1:
                np.testing.assert_allclose(found.variance_ND[concept], own_SD.var(axis=0, ddof=1), rtol=1e-4, atol=1e-6)
            else:
                assert np.isnan(found.variance_ND[concept]).all()


def test_rows_say_concept_stage_and_group_of_every_sample(refined: GrowingEncyclopedia) -> None:
    rows = refined.rows()
    assert np.bincount(rows.concept).tolist() == [4, 1, 6, 4, 1, 3]
    assert refined.stage.tolist() == [1, 0, 1, 1, 0, 1]
    assert len(refined.rows([0])) == len(WORDS)
    assert len(refined.rows([1], concepts=[2])) == 5
    assert all(
        refined.entries[concept].names_itself(text) for concept, text in zip(rows.concept, rows.texts, strict=True)
    )
    assert rows.named.all()
    dogs = refined.rows([1], concepts=[2]).groups
    assert len(set(dogs)) == len(dogs)  # no template twice


def test_states_are_those_of_the_rounds_in_the_order_of_the_rows(refined: GrowingEncyclopedia) -> None:
    rows = refined.rows()
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = rows.take(order)
    assert shuffled.texts == [rows.texts[place] for place in order]
    np.testing.assert_array_equal(refined.states(shuffled), refined.states(rows)[order])
    np.testing.assert_array_equal(refined.states(rows, [3])[:, 0], refined.states(rows)[:, 1])


def test_tests_share_no_text_and_no_group_with_training_and_count_nowhere(refined: GrowingEncyclopedia) -> None:
    train, test = refined.rows(), refined.rows(split="test")
    assert set(test.concept) == set(range(len(WORDS)))
    assert not set(train.texts) & set(test.texts)
    assert not set(train.groups) & set(test.groups)
    assert refined.num_samples.sum() == len(train)
    unnamed = test.take(~test.named)
    assert set(unnamed.sources) == {"definition"}
    assert len(unnamed) == len(WORDS)


def test_a_round_counts_only_when_it_is_closed(refined: GrowingEncyclopedia) -> None:
    before = refined.num_samples
    (refined.round_folder(2) / "moments.h5").unlink()
    with GrowingEncyclopedia.open(refined.folder) as opened:
        assert opened.num_rounds == 2
        assert opened.pending is not None
        assert opened.num_samples.sum() < before.sum()


def test_another_encyclopedia_or_substrate_is_refused(refined: GrowingEncyclopedia, tiny_substrate: Substrate) -> None:
    with pytest.raises(EncyclopediaError, match="other concepts"):
        GrowingEncyclopedia.create(refined.folder, entries(("heron",)), refined.spec)
    with pytest.raises(EncyclopediaError, match="no layer 2"):
        refined.states(refined.rows(), [2])
    with pytest.raises(EncyclopediaError, match="bootstrap"):
        GrowingEncyclopedia.open(refined.folder / "nowhere")


def test_confidence_is_kept_and_refused_outside_its_range(refined: GrowingEncyclopedia) -> None:
    assert np.isnan(refined.confidence).all()
    values = np.array([0.1, 0.2, np.nan, 0.4, 1.0, 0.0])
    doubt = np.array([2.5, 0.0, np.nan, 0.1, 0.0, 9.0])
    refined.set_confidence(values, doubt, [[1], [0], [], [], [], []], by="a test")
    with GrowingEncyclopedia.open(refined.folder) as opened:
        np.testing.assert_allclose(opened.confidence, values, atol=1e-6)
        np.testing.assert_allclose(opened.doubt, doubt, atol=1e-6)
        assert opened.judged == {"round": opened.num_rounds, "by": "a test"}
        assert opened.confused_with[0] == [1]
    (refined.folder / "confidence.json").write_text('{"judged": {"round": 1}, "confidence": [], "confused_with": []}')
    assert np.isnan(refined.confidence).all()  # of a time when doubt was not kept: to be judged again
    assert refined.judged == {}


def test_entries_survive_the_disk_and_duplicates_are_named(tmp_path: Path) -> None:
    path = tmp_path / "entries.jsonl.gz"
    write_entries(path, entries())
    assert read_entries(path) == entries()
    with pytest.raises(ConceptError, match="'wolf' is given twice"):
        check_entries([*entries(), *entries(("wolf",))])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EncyclopediaError, match="no list of concepts"):
        read_entries(path)


def test_masking_leaves_no_word_for_the_concept() -> None:
    city, heron = entries(("city", "heron"))
    assert city.masked("The cities grew; a city sleeps. Velocity stays.") == "this grew; this sleeps. Velocity stays."
    assert heron.masked("Two HERONS stood.") == "Two this stood."
    assert not heron.names_itself(heron.masked("heron, herons, Heron's nest"))
