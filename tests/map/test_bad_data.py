"""Data that nothing honest can be computed on is named, each kind by its reason, before anything is computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftw.errors import DataError, LeakError
from ftw.map.collect import CollectConfig, collect
from ftw.map.labelled import FEW_ROWS, LabelledConfig, RowReport, read
from ftw.map.samples import SampleTable
from ftw.map.training.combine import SMALL_ROWS
from ftw.substrate.model import Substrate


def rows(num: int, **columns: Any) -> list[dict[str, Any]]:
    """Labels in turn, every text of other words."""
    return [{"text": f"w{n} x{n * 7} y{n * 13} z{n}", "label": n % 2, "concept": "c", **columns} for n in range(num)]


def read_lines(folder: Path, lines: list[dict[str, Any]], **options: Any) -> tuple[SampleTable, RowReport]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return read(LabelledConfig(path=str(path), **options), seed=0)


def test_a_set_with_one_class_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"both labels are needed.*'c', train: 0 rows of label 0"):
        read_lines(tmp_path, [dict(row, label=1) for row in rows(40)])


def test_ten_rows_are_read_and_named_as_few(tmp_path: Path):
    _, report = read_lines(tmp_path, rows(10))
    (note,) = report.notes
    assert note.startswith("fewer than 20 rows of a label to learn from: c ")
    assert note in "\n".join(report.lines())
    assert FEW_ROWS == SMALL_ROWS
    assert not read_lines(tmp_path, rows(100))[1].notes


def test_duplicates_of_ninety_nine_in_a_hundred_are_left_out_counted_and_what_is_left_is_named(tmp_path: Path):
    lines = rows(10) * 100
    table, report = read_lines(tmp_path, lines)
    assert len(table) == 10
    assert len(report.rejected["duplicate row"]) == 990
    assert "  990 left out: duplicate row" in "\n".join(report.lines())
    assert report.notes
    twins = [
        dict(rows(1)[0], label=n % 2, text=f"the very same words in every single row of these {n % 2}")
        for n in range(400)
    ]
    with pytest.raises(DataError, match=r"both labels are needed.*398 left out: duplicate row"):
        read_lines(tmp_path, twins)


def test_empty_texts_are_named_and_a_file_of_them_is_refused(tmp_path: Path):
    _, report = read_lines(tmp_path, [*rows(60), *rows(3, text="  \n")])
    assert report.rejected["empty text"] == ["rows.jsonl:61", "rows.jsonl:62", "rows.jsonl:63"]
    with pytest.raises(DataError, match=r"no usable row.*20 left out: empty text"):
        read_lines(tmp_path, rows(20, text=""))


def test_a_text_of_a_hundred_thousand_tokens_is_cut_and_counted(tmp_path: Path, tiny_substrate: Substrate):
    long = " ".join(f"{n:x}" for n in range(25_000))
    table, _ = read_lines(tmp_path, [*rows(60), *rows(1, text=long)])
    assert long in table.texts
    with collect(tiny_substrate, table, CollectConfig(layers=[1], max_tokens=32), progress=False) as store:
        assert store.num_tokens.max() == 31
        assert np.isfinite(store.pooled(1, "mean")).all()


def test_labels_that_are_words_are_refused_until_one_is_named_positive(tmp_path: Path):
    lines = [dict(row, label="yes" if row["label"] else "no") for row in rows(40)]
    with pytest.raises(DataError, match=r"'no' and 'yes'; say which one is 1: data\.positive="):
        read_lines(tmp_path, lines)
    assert read_lines(tmp_path, lines, positive="yes")[0].labels.sum() == 20


def test_a_group_in_both_splits_is_refused(tmp_path: Path):
    lines = [dict(row, split="train" if n < 40 else "test", group=f"g{n % 39}") for n, row in enumerate(rows(60))]
    with pytest.raises(LeakError, match=r"group in both splits.*rows\.jsonl:"):
        read_lines(tmp_path, lines)
