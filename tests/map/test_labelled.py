"""Labelled rows from files of every kind: what is kept, what is left out by which reason, and what is refused."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftw.errors import ConfigError, DataError, LeakError
from ftw.map import rows as row_reader
from ftw.map.labelled import LabelledConfig, RowReport, read
from ftw.map.samples import SampleTable


def record(number: int, label: object, split: str = "train", concept: str = "spam", **more: object) -> dict:
    return {"text": f"text number {number}", "concept": concept, "label": label, "split": split, **more}


GOOD = [record(n, n % 2, "train" if n < 8 else "test") for n in range(16)]


def write_lines(path: Path, lines: list[dict | str]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def separated(records: list[dict], delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def read_path(path: Path | str, seed: int = 0, **options: object) -> tuple[SampleTable, RowReport]:
    return read(LabelledConfig(path=str(path), **options), seed)  # pyright: ignore[reportArgumentType]


def test_rows_become_texts_with_marks_and_further_columns(tmp_path: Path) -> None:
    lines = [dict(line, language="de", length=3) for line in GOOD]
    table, report = read_path(write_lines(tmp_path / "texts.jsonl", lines))
    assert table.texts == [line["text"] for line in lines]
    assert table.splits == [line["split"] for line in lines]
    assert table.concepts == ["spam"]
    assert table.labels.tolist() == [line["label"] for line in lines]
    assert table.columns == {"language": ["de"] * 16, "length": ["3"] * 16}
    assert report.counts == {"spam": {"train/0": 4, "train/1": 4, "test/0": 4, "test/1": 4}}
    first, few = report.lines()
    assert first == "16 of 16 rows kept, 1 concepts"
    assert few.startswith("  fewer than 20 rows of a label to learn from: spam 4 + 4; ")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_format_and_compression_gives_the_same_table(tmp_path: Path, ending: str, compression: str) -> None:
    lines = [dict(line, note='a "quoted", ünïcode\nline') for line in GOOD]
    content = {
        ".jsonl": "\n".join(json.dumps(line) for line in lines),
        ".json": json.dumps(lines),
        ".csv": separated(lines),
        ".tsv": separated(lines, "\t"),
    }[ending].encode()
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[compression](content)
    (tmp_path / f"texts{ending}{compression}").write_bytes(packed)
    expected, _ = read_path(write_lines(tmp_path / "expected.jsonl", lines))
    table, _ = read_path(tmp_path / f"texts{ending}{compression}")
    assert table.content_hash() == expected.content_hash()


BAD = [
    ("{not json", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ({"label": 1, "split": "train"}, "missing column 'text'"),
    ({"text": "without a label", "split": "train"}, "missing column 'label'"),
    (record(90, 1) | {"text": "  "}, "empty text"),
    (record(90, 1) | {"text": 5}, "text is not a string"),
    (record(91, 2), "label is not 0 or 1"),
    (record(92, "maybe"), "label is not 0 or 1"),
    (record(93, 1, "valid"), "unknown split 'valid' (train, test or background)"),
    (record(94, 1, ""), "empty split"),
    (record(95, 1, concept=" "), "empty concept"),
    (record(96, 1) | {"text": "a\0b"}, "text holds a NUL character"),
    (record(97, 1) | {"text": "half of \ud800"}, "text is not UTF-8"),
    (record(98, 1) | {"text": "x" * 1_000_001}, "text over 1,000,000 characters"),
    (GOOD[3], "duplicate row"),
    (dict(GOOD[9], split="train"), "text in both splits (left out of train)"),
]


def test_each_bad_row_is_left_out_by_its_reason_and_named_by_its_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mixed.jsonl", [*GOOD, "", *(line for line, _ in BAD)])
    table, report = read_path(path, leaks="drop")
    assert len(table) == report.num_kept == 16
    expected: dict[str, list[str]] = {}
    for number, (_, reason) in enumerate(BAD, start=18):  # a blank line is no row, but it is a line
        expected.setdefault(reason, []).append(f"mixed.jsonl:{number}")
    assert dict(report.rejected) == expected
    assert report.num_rows == report.num_kept + sum(map(len, report.rejected.values()))
    assert "  1 left out: not JSON (mixed.jsonl:18)" in report.lines()


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "texts.csv", [separated(GOOD)])
    path.write_bytes(path.read_bytes().rstrip() + "\ncaf\xe9,spam,1,train\n".encode("latin-1"))
    _, report = read_path(path)
    assert dict(report.rejected) == {"text is not UTF-8": ["texts.csv:18"]}


def test_csv_lines_are_those_where_a_row_starts(tmp_path: Path) -> None:
    text = (
        separated(GOOD[:1])
        + '"two\nlines",spam,1,train\nx,spam,7,train\ntoo,few\n'
        + separated(GOOD[1:]).split("\n", 1)[1]
    )
    (tmp_path / "texts.csv").write_text(text)
    table, report = read_path(tmp_path / "texts.csv")
    assert "two\nlines" in table.texts
    assert report.rejected["label is not 0 or 1"] == ["texts.csv:5"]
    assert report.rejected["number of fields is not 4, as in the header"] == ["texts.csv:6"]


def test_a_text_with_two_labels_is_left_out_wholly(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*GOOD, record(0, 1)])
    table, report = read_path(path)
    assert "text number 0" not in table.texts
    assert report.rejected["contradictory labels for the same text"] == ["a.jsonl:1", "a.jsonl:17"]


def test_a_group_in_both_splits_ends_the_run_or_stays_in_test_only(tmp_path: Path) -> None:
    lines = [dict(line, group=f"g{n % 7}" if n in (1, 8) else f"own {n}") for n, line in enumerate(GOOD)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(LeakError, match=r"group in both splits.*a\.jsonl:2.*data\.leaks=drop"):
        read_path(path)
    table, report = read_path(path, leaks="drop")
    assert report.rejected["group in both splits (left out of train)"] == ["a.jsonl:2"]
    sides = {group: {table.splits[n] for n, g in enumerate(table.groups) if g == group} for group in table.groups}
    assert all(len(side) == 1 for side in sides.values())


def test_many_concepts_in_one_file_have_their_own_rows(tmp_path: Path) -> None:
    other = [dict(line, concept="ham", label=1 - line["label"]) for line in GOOD[::3] + GOOD[1::3]]
    table, report = read_path(write_lines(tmp_path / "a.jsonl", [*GOOD, *other]))
    assert table.concepts == ["spam", "ham"]
    assert len(table) == 16  # a text under two concepts is stored once
    assert len(table.rows) == 16 + len(other) == report.num_kept


def test_the_name_of_a_file_is_the_concept_of_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": line["text"], "target": line["label"]} for line in GOOD]
    for name in ("5_is.spam.csv", "7_ham.csv.gz"):
        content = separated(rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for path in (tmp_path, tmp_path / "*.csv*"):
        table, _ = read_path(path, text_column="prompt", label_column="target")
        assert table.concepts == ["5_is.spam", "7_ham"]


def test_rows_without_a_split_are_divided_by_group_and_label(tmp_path: Path) -> None:
    lines = [{"text": f"t{n}", "label": int(n % 5 == 0), "group": f"g{n // 2}"} for n in range(200)]
    table, report = read_path(write_lines(tmp_path / "a.jsonl", lines), test_fraction=0.3)
    counts = report.counts["a"]
    assert abs(counts["test/1"] - 12) <= 1
    assert abs(counts["test/0"] - 48) <= 1
    assert not {table.groups[n] for n in table.where("train")} & {table.groups[n] for n in table.where("test")}
    again, _ = read_path(tmp_path / "a.jsonl", test_fraction=0.3)
    other, _ = read_path(tmp_path / "a.jsonl", seed=1, test_fraction=0.3)
    assert table.content_hash() == again.content_hash() != other.content_hash()


def test_rows_in_another_order_are_divided_alike(tmp_path: Path) -> None:
    lines = [{"text": f"t{n}", "label": n % 2} for n in range(100)]
    first, _ = read_path(write_lines(tmp_path / "a.jsonl", lines))
    second, _ = read_path(write_lines(tmp_path / "a.jsonl", lines[::-1]))
    assert dict(zip(first.texts, first.splits, strict=True)) == dict(zip(second.texts, second.splits, strict=True))


def test_two_large_groups_can_still_be_divided(tmp_path: Path) -> None:
    lines = [{"text": f"t{n}", "label": n % 2, "group": f"g{n % 4}"} for n in range(40)]
    _, report = read_path(write_lines(tmp_path / "a.jsonl", lines), test_fraction=0.1)
    assert all(count == 10 for count in report.counts["a"].values())


def test_a_cap_keeps_so_many_of_each_label_and_split(tmp_path: Path) -> None:
    lines = [record(n, int(n % 3 == 0), "train" if n < 60 else "test") for n in range(100)]
    table, report = read_path(write_lines(tmp_path / "a.jsonl", lines), max_rows={"train": 7, "test": 7})
    assert set(report.counts["spam"].values()) == {7}
    assert len(table) == 28
    assert len(report.rejected["over max_rows"]) == 72


@pytest.mark.parametrize(
    ("zero", "one"), [(0, 1), ("0", "1"), (False, True), (0.0, 1.0), ("False", "true"), ("0.0", "1.0")]
)
def test_labels_that_plainly_mean_0_and_1_are_taken(tmp_path: Path, zero: object, one: object) -> None:
    lines = [dict(line, label=one if line["label"] else zero) for line in GOOD]
    table, _ = read_path(write_lines(tmp_path / "a.jsonl", lines))
    assert table.labels.tolist() == [line["label"] for line in GOOD]


def test_two_words_as_labels_need_to_be_told_apart(tmp_path: Path) -> None:
    lines = [dict(line, label="yes" if line["label"] else "no") for line in GOOD]
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(
        DataError, match=r"'no' and 'yes'; say which one is 1: data.positive='no' or data.positive='yes'"
    ):
        read_path(path)
    assert read_path(path, positive="yes")[0].labels.tolist() == [line["label"] for line in GOOD]
    assert read_path(path, positive="no")[0].labels.tolist() == [1 - line["label"] for line in GOOD]
    assert read_path(path, string_labels="sorted")[0].labels.tolist() == [line["label"] for line in GOOD]
    with pytest.raises(DataError, match=r"data\.positive='maybe' is no label"):
        read_path(path, positive="maybe")


def test_concepts_of_other_than_two_labels_can_be_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "three.jsonl", [{"text": f"t{n}", "label": n % 3} for n in range(30)])
    write_lines(tmp_path / "two.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(30)])
    table, report = read_path(tmp_path, skip_non_binary=True)
    assert table.concepts == ["two"]
    assert len(report.rejected["concept without exactly two labels"]) == 30


def test_background_rows_need_no_label_and_get_no_mark(tmp_path: Path) -> None:
    lines = [*GOOD, {"text": "only to be looked at", "split": "background"}]
    table, report = read_path(write_lines(tmp_path / "a.jsonl", lines))
    (row,) = table.where("background")
    assert table.texts[row] == "only to be looked at"
    assert row not in table.rows
    assert report.num_kept == 17


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line for line in GOOD if line["split"] == "train"], "'spam', test: 0 rows of label 0 and 0 of label 1"),
        ([line for line in GOOD if line["label"] or line["split"] == "test"], "'spam', train: 0 rows of label 0 and 4"),
        ([{"text": "alone", "label": 1}], "'a', train: 0 rows of label 0"),
        ([], "no usable row in .*the file is empty"),
        (["{", "{"], r"no usable row in .*2 left out: not JSON \(a.jsonl:1, a.jsonl:2\)"),
        ([{"content": "x", "label": 1}], "missing column 'text'.*Columns seen: content, label"),
    ],
)
def test_data_that_nothing_can_be_computed_on_is_refused(tmp_path: Path, lines: list, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_path(write_lines(tmp_path / "a.jsonl", lines))


def test_a_missing_file_is_met_with_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no file at data.path=.*did you mean .*texts\.jsonl"):
        read_path(tmp_path / "text.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        read_path(tmp_path / "empty")
    with pytest.raises(DataError, match="the formats are"):
        read_path(Path(__file__))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt,label\nx,1\n", r"has no column 'text' \(it has: prompt, label\)"),
        ("a.csv", b"text,label,text\nx,1,y\n", "names a column twice"),
        ("a.json", b'{"text": 1}', "holds a dict, not a list"),
        ("a.json", b'{"text": 1}\n{"text": 2}', r"is not JSON .*name it \.jsonl"),
        ("a.jsonl.gz", gzip.compress(b"x" * 5000, mtime=0)[:-20], "is the file whole"),
        ("a.jsonl.gz", b"plain text", "is the file whole"),
        ("a.jsonl.zst", b"plain text", "is the file whole"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_path(tmp_path / name)


def test_an_open_quotation_mark_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "MAX_LINE_CHARACTERS", 1000)
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text('text,label\nfine,1\n"never closed,1\n' + "word,0\n" * 400)
    with pytest.raises(DataError, match=r"line [0-9]+: field larger.*quotation mark left open"):
        read_path(tmp_path / "a.csv")
    assert csv.field_size_limit() == limit


def test_a_line_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "MAX_LINE_CHARACTERS", 1000)
    _, report = read_path(write_lines(tmp_path / "a.jsonl", [*GOOD[:3], "x" * 5500, *GOOD[3:]]))
    assert dict(report.rejected) == {"line over 1,000 characters": ["a.jsonl:4"]}
    assert report.num_kept == 16


@pytest.mark.parametrize("change", [{"string_labels": "any"}, {"test_fraction": 1.0}, {"max_rows": {"train": 0}}])
def test_options_that_cannot_be_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        read_path(write_lines(tmp_path / "a.jsonl", GOOD), **change)


ROWS = st.fixed_dictionaries(
    {
        "text": st.sampled_from(["", "a", "b", "c", "d", "e", "f"]) | st.none() | st.text(max_size=3),
        "label": st.sampled_from([0, 1, "0", "1", 2, None, "x"]),
        "concept": st.sampled_from(["p", "q"]),
        "split": st.sampled_from(["train", "test", "background", "", "other"]),
        "group": st.sampled_from(["g", "h", "", "i"]),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROWS, max_size=30))
def test_every_row_is_kept_or_named_and_nothing_leaks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict]
) -> None:
    sure = [record(n, n % 2, "train" if n < 4 else "test", c, group=f"{c}{n}") for n in range(8) for c in "pq"]
    path = write_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", [*sure, *rows])
    table, report = read_path(path, leaks="drop")
    places = [place for where in report.rejected.values() for place in where]
    assert len(places) == len(set(places))
    assert report.num_rows == len(sure) + len(rows) == report.num_kept + len(places)
    labels_SN, weights_SN = table.matrices(range(len(table)))  # pyright: ignore[reportArgumentType]
    for column in range(len(table.concepts)):
        used = [n for n in range(len(table)) if weights_SN[n, column]]
        train = {table.texts[n] for n in used if table.splits[n] == "train"}
        test = {table.texts[n] for n in used if table.splits[n] == "test"}
        assert not train & test
        for split in ("train", "test"):
            assert {labels_SN[n, column] for n in used if table.splits[n] == split} == {0, 1}
