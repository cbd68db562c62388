"""Near-duplicates: who is joined with whom, and what a split then never does."""

import json
import random

import pytest

from ftw.errors import DataError
from ftw.map.labelled import LabelledConfig, read
from ftw.map.leaks import find_leaks
from ftw.map.near_duplicates import near_duplicate_groups, word_runs

SENTENCE = "the old captain walked slowly down to the harbour to look at the ships before the storm came in"


def test_texts_that_differ_in_one_word_of_twenty_are_one_group():
    groups = near_duplicate_groups([SENTENCE, "a sentence about bread", SENTENCE.replace("storm", "night")])
    assert groups == [0, 1, 0]


def test_chains_are_one_group_whatever_the_order():
    words = SENTENCE.split()
    chain = [" ".join([*words[:place], f"word{place}", *words[place + 1 :]]) for place in range(4)]
    for seed in range(5):
        shuffled = random.Random(seed).sample(chain, k=len(chain))
        assert set(near_duplicate_groups([*shuffled, "nothing alike here at all"])) == {0, 4}


def test_the_similarity_is_the_jaccard_similarity_of_word_runs():
    one, other = SENTENCE, SENTENCE.replace("old captain", "young sailor")
    exact = len(word_runs(one) & word_runs(other)) / len(word_runs(one) | word_runs(other))
    assert near_duplicate_groups([one, other], similarity=exact - 0.001) == [0, 0]
    assert near_duplicate_groups([one, other], similarity=exact + 0.001) == [0, 1]


@pytest.mark.parametrize("texts", [[], ["", ""], ["!!!", "???"], ["\udcff", "\udcff x"], ["one"]])
def test_texts_without_words_are_no_reason_to_fail(texts):
    assert len(near_duplicate_groups(texts)) == len(texts)


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.5])
def test_a_similarity_outside_its_range_is_refused(similarity):
    with pytest.raises(DataError, match="similarity"):
        near_duplicate_groups(["a"], similarity=similarity)


def test_near_duplicates_never_stand_on_both_sides_of_a_split(tmp_path):
    draw = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    lines = []
    for family in range(60):
        body = draw.sample(words, k=20)
        for twin in range(3):
            lines.append({"text": " ".join([*body, f"twin{twin}"]), "label": family % 2})
    file = tmp_path / "twins.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    table, report = read(LabelledConfig(path=str(file)), seed=0)
    assert not find_leaks(table, 0.7)
    assert report.num_near_duplicates == 180 == report.num_kept
    loose, _ = read(LabelledConfig(path=str(file), near_duplicates=0), seed=0)
    assert find_leaks(loose, 0.7).pairs
