"""A sample table is what was marked, whatever is selected from it, and its hash says whether two are equal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw.errors import DataError
from ftw.map.samples import SampleTable, SampleTableBuilder

CONCEPTS = ["cat", "dog", "oak"]


def random_table(seed: int, num: int = 12) -> tuple[SampleTable, dict[tuple[str, str], tuple[int, float]]]:
    """A table and its marks as a plain dictionary (text, concept) -> (label, weight)."""
    rng, builder, marks = np.random.default_rng(seed), SampleTableBuilder(CONCEPTS), {}
    for number in range(num):
        split = ["train", "test", "background"][int(rng.integers(3))]
        row = builder.text(
            f"text {number}", group=f"g{number // 3}", split=split, source="given", columns={"n": str(number)}
        )
        for concept in CONCEPTS:
            if rng.random() < 0.6:
                marks[f"text {number}", concept] = (int(rng.integers(2)), float(rng.integers(1, 4)))
                builder.mark(row, concept, *marks[f"text {number}", concept])
    return builder.build(), marks


def marks_of(table: SampleTable) -> dict[tuple[str, str], tuple[int, float]]:
    return {
        (table.texts[row], table.concepts[col]): (int(label), float(weight))
        for row, col, label, weight in zip(table.rows, table.cols, table.labels, table.weights, strict=True)
    }


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_table_holds_exactly_the_marks_that_were_made(seed: int):
    table, marks = random_table(seed)
    assert marks_of(table) == marks


@given(st.integers(0, 10_000), st.permutations(range(12)), st.integers(1, 12), st.permutations(CONCEPTS))
@settings(max_examples=30, deadline=None)
def test_matrices_and_selections_follow_the_order_that_is_asked_for(seed, order, num, concepts):
    table, marks = random_table(seed)
    texts, concepts = np.array(order[:num]), concepts[:2]
    labels_TN, weights_TN = table.matrices(texts)
    for t, text in enumerate(texts):
        for n, concept in enumerate(CONCEPTS):
            assert (labels_TN[t, n], weights_TN[t, n]) == marks.get((f"text {text}", concept), (0, 0))
    some = table.select(texts, concepts)
    assert some.texts == [f"text {text}" for text in texts]
    assert some.columns["n"] == [str(text) for text in texts]
    expected = {key: mark for key, mark in marks.items() if key[0] in some.texts and key[1] in concepts}
    assert marks_of(some) == expected
    assert some.concepts == concepts


def test_texts_of_a_split_are_found():
    table, _ = random_table(0)
    for split in ("train", "test", "background"):
        assert {table.splits[row] for row in table.where(split)} <= {split}
    assert sum(len(table.where(split)) for split in ("train", "test", "background")) == 12


def test_a_text_met_again_is_the_same_text_but_not_in_another_split():
    builder = SampleTableBuilder(["cat"])
    options = {"group": "g", "source": "s"}
    first = builder.text("same", split="train", **options)
    assert builder.text("same", split="train", **options) == first
    assert builder.text("same", split="test", **options) != first
    builder.mark(first, "cat", 1)
    builder.mark(first, "cat", 1)
    with pytest.raises(DataError, match=r"'same' is marked both 0 and 1 for 'cat'"):
        builder.mark(first, "cat", 0)
    with pytest.raises(DataError, match="no concept 'cow'"):
        builder.mark(first, "cow", 0)
    assert len(builder.build().rows) == 1


def test_equal_tables_have_equal_hashes_and_any_change_another():
    table, _ = random_table(1)
    assert table.content_hash() == random_table(1)[0].content_hash()
    changes = {
        "texts": ["other", *table.texts[1:]],
        "groups": ["other", *table.groups[1:]],
        "sources": ["other", *table.sources[1:]],
        "concepts": ["other", *table.concepts[1:]],
        "labels": 1 - table.labels,
        "weights": table.weights + 1,
        "columns": {"m": table.columns["n"]},
    }
    fields = {name: getattr(table, name) for name in SampleTable.__dataclass_fields__}
    hashes = {SampleTable(**{**fields, name: value}).content_hash() for name, value in changes.items()}
    assert len(hashes | {table.content_hash()}) == 8
    # Words that run together must not be taken for one another.
    glued = [SampleTable(**{**fields, "texts": [*pair, *table.texts[2:]]}) for pair in (("ab", "c"), ("a", "bc"))]
    assert glued[0].content_hash() != glued[1].content_hash()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": []}, "0 groups for 12 texts"),
        ({"cols": np.zeros(1)}, "1 cols"),
        ({"splits": ["valid"] * 12}, r"unknown split \['valid'\]"),
        ({"concepts": ["cat", "cat", "oak"]}, "listed twice"),
        ({"columns": {"n": ["1"]}}, "column 'n' has 1 values"),
        ({"rows": lambda rows: rows + 12}, "rows of marks must lie in 0-11"),
        ({"cols": lambda cols: cols - 3}, "cols of marks must lie in 0-2"),
        ({"labels": lambda labels: labels + 2}, "neither 0 nor 1"),
        ({"weights": lambda weights: -weights}, "negative or not finite"),
        ({"weights": lambda weights: weights * np.nan}, "negative or not finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_table_that_contradicts_itself_is_refused(change, words: str):
    table, _ = random_table(0)
    fields = {name: getattr(table, name) for name in SampleTable.__dataclass_fields__}
    changed = {name: value(fields[name]) if callable(value) else value for name, value in change.items()}
    with pytest.raises(DataError, match=words):
        SampleTable(**{**fields, **changed})


def test_nothing_left_is_an_error():
    table, _ = random_table(0)
    with pytest.raises(DataError, match="no texts are left"):
        table.select(np.array([], dtype=np.int64), ["cat"])
