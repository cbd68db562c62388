"""The leak detector: what it finds is what a comparison of all pairs finds, and nothing that crosses concepts."""

import logging
import random
from itertools import product

import numpy as np
import pytest
from toy_run import ToyRun, inside, run_verb, toy_run

from ftw.errors import ConfigError, LeakError
from ftw.map.leaks import LeakConfig, check_leaks, find_leaks, similar_pairs
from ftw.map.near_duplicates import word_runs
from ftw.map.samples import SampleTable, SampleTableBuilder

__all__ = ["toy_run"]

SENTENCE = (
    "the old captain walked slowly down to the harbour to look at the ships before the storm came in from far across "
    "those cold grey northern waters where nobody had sailed since his father was a boy"
)


def table_of(*rows: tuple[str, str, str, str]) -> SampleTable:
    """(text, concept, split, group) each, labels in turn."""
    builder = SampleTableBuilder(list(dict.fromkeys(concept for _, concept, _, _ in rows)))
    for number, (text, concept, split, group) in enumerate(rows):
        builder.mark(builder.text(text, group=group, split=split, source="given"), concept, number % 2)
    return builder.build()


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8, 1.0])
def test_pairs_are_those_that_counting_all_of_them_gives(similarity: float):
    draw = random.Random(0)
    words = [f"w{n}" for n in range(12)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(160)] + ["", "!?", "\udcff", "W1 w2."]
    ones, others = texts[:80], texts[80:]
    runs = [word_runs(text) for text in texts]
    expected = {
        (one, other)
        for one, other in product(range(len(ones)), range(len(others)))
        if len(runs[one] & runs[80 + other]) >= similarity * len(runs[one] | runs[80 + other])
    }
    assert expected
    assert found(ones, others, similarity) == expected


def found(ones: list[str], others: list[str], similarity: float) -> set[tuple[int, int]]:
    parts = [zip(*(place.tolist() for place in part), strict=True) for part in similar_pairs(ones, others, similarity)]
    return {pair for part in parts for pair in part}


def test_no_texts_are_no_pairs():
    for ones, others in (([], []), (["a"], []), ([], ["a"])):
        for similarity in (0.0, 0.8):
            assert not found(ones, others, similarity)


def test_a_copy_a_near_copy_and_a_group_on_both_sides_end_the_run_by_name():
    other = "nothing of that kind stands in this one"
    for twin in (SENTENCE, SENTENCE.upper() + "!", SENTENCE.replace("storm", "night")):
        with pytest.raises(LeakError, match=r"1 pairs of texts.*the old captain.*map\.leaks\.allow=true"):
            check_leaks(table_of((SENTENCE, "x", "train", "a"), (twin, "x", "test", "b"), (other, "x", "test", "c")))
    with pytest.raises(LeakError, match=r"1 groups and 0 pairs.*'dialogue-17'"):
        check_leaks(table_of((SENTENCE, "x", "train", "dialogue-17"), (other, "x", "test", "dialogue-17")))


def test_what_one_concept_learns_and_another_is_judged_on_is_no_leak():
    assert not check_leaks(table_of((SENTENCE, "x", "train", "a"), (SENTENCE, "y", "test", "a")))
    assert not check_leaks(table_of((SENTENCE, "x", "train", "a"), (SENTENCE, "x", "background", "a")))


def test_a_leak_that_is_allowed_is_told_and_counted(caplog: pytest.LogCaptureFixture):
    table = table_of((SENTENCE, "x", "train", "a"), (SENTENCE, "x", "test", "a"))
    with caplog.at_level(logging.WARNING):
        report = check_leaks(table, LeakConfig(allow=True))
    assert report
    assert (report.groups, report.pairs) == (["a"], [(0, 1)])
    assert "1 groups and 1 pairs" in caplog.text


def test_similarity_zero_looks_for_equal_texts_alone():
    near = SENTENCE.replace("storm", "night")
    table = table_of((SENTENCE, "x", "train", "a"), (near, "x", "test", "b"))
    assert find_leaks(table, 0.8).pairs == [(0, 1)]
    assert not find_leaks(table, 0.0)
    with pytest.raises(ConfigError, match=r"map\.leaks\.similarity=2"):
        LeakConfig(similarity=2)


def test_a_text_of_a_hundred_thousand_words_is_compared_too():
    draw = np.random.default_rng(0)
    long = " ".join(f"word{number}" for number in draw.integers(0, 5000, 100_000))
    table = table_of((long, "x", "train", "a"), (SENTENCE, "x", "train", "b"), (long + " end", "x", "test", "c"))
    assert find_leaks(table, 0.8).pairs == [(0, 2)]


def test_a_split_full_of_copies_is_told_after_some_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ftw.map.leaks.MOST_CANDIDATES", 1000)
    rows = [(f"{SENTENCE} {number}", "x", "train" if number % 2 else "test", f"{number}") for number in range(120)]
    table = table_of(*rows)
    assert len(find_leaks(table, 0.8).pairs) == 60
    assert 10 <= len(find_leaks(table, 0.8, enough=10).pairs) < 60


def test_training_ends_before_any_state_is_collected(toy_run: ToyRun, capsys: pytest.CaptureFixture[str]):
    with inside(toy_run):
        lines = toy_run.texts.read_text("utf-8").splitlines()
        copied = next(line for line in lines if '"split": "train"' in line).replace('"train"', '"test"')
        (toy_run.folder / "leaky.jsonl").write_text("\n".join([*lines, copied]), encoding="utf-8")
        words = [*toy_run.training, "data.path=leaky.jsonl"]
        with pytest.raises(SystemExit) as ended:
            run_verb("train", *words)
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert "leaky.jsonl:" in told
        assert "data.leaks=drop" in told
        run_verb("train", *words, "data.leaks=drop")
        assert "1 left out: text in both splits" in capsys.readouterr().out
