"""Your own labelled texts: read from JSON lines, JSON, CSV or TSV, checked row by row, and turned into a sample table.

Every row says one thing: this text is (1) or is not (0) about this concept. Rows that cannot be used are counted by
reason and named by file and line; what would make a figure dishonest (a text or a group on both sides of the split, a
text with two labels) never reaches training. Duplicates are left out, and near-duplicates are one group.
"""

import difflib
import glob
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import track

from ftw.errors import ConfigError, DataError, LeakError
from ftw.map.division import Row, chosen_places, divide, join_near_duplicates
from ftw.map.rows import MAX_TEXT_CHARACTERS, read_rows, stem, supported
from ftw.map.samples import SPLITS, SampleTable, SampleTableBuilder

OVER_MAX = "over max_rows"
LEAKS = ("text in both splits (left out of train)", "group in both splits (left out of train)")
# Rows of a label below which the recipe chooses nothing (`ftw.map.training.combine.SMALL_ROWS`).
FEW_ROWS = 20
# Rows looked at for every row wanted: duplicates, leaks and groups of one label only take some of them away.
LOOK_AT = 3


@dataclass(kw_only=True)
class LabelledConfig:
    """Which files, and which of their columns say what.

    Attributes:
        path: a file, a folder of files, or a glob; .jsonl, .json, .csv, .tsv, each plain or with .gz or .zst.
        text_column, label_column: the two columns that every row needs.
        concept_column: the concept of a row; without such a column the name of the file, without its endings.
        split_column: "train", "test" or "background" (no label needed); without such a column rows are divided here.
        group_column: rows of one group stay on one side of the split; without such a column a text is its own group.
        positive: the label that counts as 1; all others count as 0.
        string_labels: two labels other than 0 and 1: "error", or "sorted" (the second in sorted order is 1, as in
            scikit-learn's LabelEncoder and so in sae-probes).
        skip_non_binary: leave out concepts whose rows have other than two different labels, instead of their bad rows.
        test_fraction: share of each label that becomes test where there is no split column.
        max_rows: by split, at most so many rows of each label and concept; drawn from the seed. Where rows are divided
            here, three times as many are looked at, which bounds the search for near-duplicates too.
        max_characters: what is over is cut off before anything else is done with a text; 0 cuts nothing.
        near_duplicates: Jaccard similarity of word runs from which on texts of a concept share a group; 0: do not look.
        leaks: a text or group that the files put into both splits of a concept: "error", or "drop" (out of train).
    """

    kind: str = "labelled"
    path: str
    text_column: str = "text"
    label_column: str = "label"
    concept_column: str = "concept"
    split_column: str = "split"
    group_column: str = "group"
    positive: str | None = None
    string_labels: str = "error"
    skip_non_binary: bool = False
    test_fraction: float = 0.3
    max_rows: dict[str, int] = field(default_factory=dict)
    max_characters: int = 0
    near_duplicates: float = 0.7
    leaks: str = "error"


@dataclass(kw_only=True)
class RowReport:
    """What became of every row: `num_rows` = `num_kept` + all the rejected.

    Attributes:
        num_near_duplicates: rows that share a group with a row of nearly the same words.
        rejected: reason -> the rows, as "file:line".
        counts: concept -> "train/0", "train/1", "test/0", "test/1" -> rows kept.
        notes: sentences about choices made for the reader.
    """

    num_rows: int = 0
    num_kept: int = 0
    num_near_duplicates: int = 0
    rejected: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self, places: int = 5) -> list[str]:
        """The report as printable lines, at most `places` rows named for each reason."""
        told = [f"{self.num_kept:,} of {self.num_rows:,} rows kept, {len(self.counts)} concepts"]
        for reason, where in sorted(self.rejected.items(), key=lambda item: -len(item[1])):
            more = f" and {len(where) - places:,} more" if len(where) > places else ""
            told.append(f"  {len(where):,} left out: {reason} ({', '.join(where[:places])}{more})")
        if self.num_near_duplicates:
            told.append(f"  {self.num_near_duplicates:,} rows nearly repeat another: each such group stays on one side")
        return told + [f"  {note}" for note in self.notes]


_ByConcept: TypeAlias = dict[str, list[Row]]


def read(config: LabelledConfig, seed: int) -> tuple[SampleTable, RowReport]:
    """Read, check and divide labelled texts.

    Rows are checked one at a time, then per concept: contradictions, duplicates, leaks between the splits, the cap.
    Labels keep the balance they have. A text shared by concepts is stored once per split and marked for each.

    Args:
        seed: decides the division into train and test (where the files do not) and the rows kept under a cap; both go
            by the hash of a group or text, so further rows or concepts hardly move the others.

    Raises:
        DataError: no such file, no usable row, two string labels without `positive`, one class in a concept's split.
        LeakError: a text or group in both splits, unless `leaks` is "drop".
        ConfigError: an option out of its range.
    """
    _check_options(config)
    report = RowReport()
    by_concept = _usable_rows(config, report)
    background = {name: [row for row in rows if row.split == "background"] for name, rows in by_concept.items()}
    marked = {name: [row for row in rows if row.split != "background"] for name, rows in by_concept.items()}
    marked = {name: rows for name, rows in marked.items() if rows}
    _encode_labels(marked, config, report)
    for name, rows in track(marked.items(), "checking rows", disable=len(marked) < 10, transient=True):
        rows = _without_contradictions(rows, report)
        rows = _without_duplicates(rows, report)
        whole = all(row.split is None for row in rows)
        if whole and config.max_rows:
            rows = _capped(rows, {"": LOOK_AT * sum(config.max_rows.values())}, seed, report)
        if config.near_duplicates:
            report.num_near_duplicates += join_near_duplicates(rows, config.near_duplicates)
        if whole:
            divide(rows, config.test_fraction, seed)
        rows = _without_leaks(rows, report)
        marked[name] = _capped(rows, config.max_rows, seed, report)
    _check_leaks(config, report)
    for name, rows in marked.items():
        report.counts[name] = _count(rows)
    _check_classes(report)
    _note_few(report)
    return _table(marked, background, report), report


def _check_options(config: LabelledConfig) -> None:
    """Values that no file could make sense of."""
    if config.string_labels not in ("error", "sorted"):
        raise ConfigError(f"data.string_labels={config.string_labels!r}: the choices are error, sorted")
    if not 0 < config.test_fraction < 1:
        raise ConfigError(f"data.test_fraction={config.test_fraction}: must lie between 0 and 1, without both ends")
    if config.leaks not in ("error", "drop"):
        raise ConfigError(f"data.leaks={config.leaks!r}: the choices are error, drop")
    for split, limit in config.max_rows.items():
        if split not in ("train", "test") or limit < 1:
            raise ConfigError(
                f"data.max_rows.{split}={limit}: give train and test a number of at least 1, or leave it out"
            )
    if not 0 <= config.near_duplicates <= 1:
        raise ConfigError(f"data.near_duplicates={config.near_duplicates}: must lie between 0 (off) and 1")


def find_files(path: str) -> list[Path]:
    """The files that a path, folder or glob names, in sorted order.

    Raises:
        DataError: none; names the nearest ones that exist.
    """
    target = Path(path).expanduser()
    if target.is_file():
        return [target]
    if target.is_dir():
        files = sorted(file for file in target.iterdir() if file.is_file() and supported(file))
        if not files:
            raise DataError(f"folder {path} holds no .jsonl, .json, .csv or .tsv file (plain, .gz or .zst)")
        return files
    found = glob.glob(str(target), recursive=True)  # noqa: PTH207 (Path.glob refuses an absolute pattern)
    if files := sorted(Path(name) for name in found if supported(Path(name))):
        return files
    near = target.parent if target.parent.is_dir() else Path()
    names = difflib.get_close_matches(target.name, [entry.name for entry in near.iterdir()], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(str(near / name) for name in names)}?" if names else f"looked in {near.absolute()}"
    raise DataError(f"no file at data.path={path}; {hint}")


def _usable_rows(config: LabelledConfig, report: RowReport) -> _ByConcept:
    """Rows that hold a text, a concept, a split and a label, by concept in order of appearance."""
    by_concept: _ByConcept = {}
    seen_columns: Counter[str] = Counter()
    has_splits = False
    files = find_files(config.path)
    for file in track(files, "reading rows", disable=len(files) == 1, transient=True):
        for line, record in read_rows(file, needed=(config.text_column, config.label_column)):
            report.num_rows += 1
            row = record
            if isinstance(record, dict):
                seen_columns.update(record.keys())
                has_splits = has_splits or config.split_column in record
                row = _row(record, f"{file.name}:{line}", stem(file), config)
            if isinstance(row, Row):
                by_concept.setdefault(row.concept, []).append(row)
            else:
                report.rejected[str(row)].append(f"{file.name}:{line}")
    if has_splits:
        by_concept = _with_known_split(by_concept, config, report)
    if not by_concept:
        reasons = "; ".join(report.lines()[1:]).strip() or "the file is empty"
        raise DataError(
            f"no usable row in {config.path}: {reasons}. Columns seen: {', '.join(seen_columns) or 'none'}; "
            "name yours with data.text_column=… data.label_column=…"
        )
    return by_concept


def _row(record: dict[str, Any], place: str, default_concept: str, config: LabelledConfig) -> Row | str:
    """A row, or the reason why it cannot be one."""
    text, label = record.get(config.text_column), record.get(config.label_column)
    if config.max_characters and isinstance(text, str):
        text = text[: config.max_characters]
    split = str(record.get(config.split_column) or "").strip().lower() or None
    if text is None:
        return f"missing column {config.text_column!r}"
    if not isinstance(text, str):
        return "text is not a string"
    if reason := _bad_text(text):
        return reason
    if split != "background" and label is None:
        return f"missing column {config.label_column!r}"
    concept = str(record.get(config.concept_column, default_concept) or "").strip()
    if not concept:
        return "empty concept"
    used = {config.text_column, config.label_column, config.concept_column, config.split_column, config.group_column}
    columns = {str(name): _cell(value) for name, value in record.items() if name not in used}
    group = _cell(record.get(config.group_column)) or text
    return Row(place, concept, text, label, split, group, columns)


def _bad_text(text: str) -> str | None:
    """Why a text cannot be given to a tokenizer."""
    if not text.strip():
        return "empty text"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"text over {MAX_TEXT_CHARACTERS:,} characters"
    if "\0" in text:
        return "text holds a NUL character"
    try:
        # Bytes that are not UTF-8 were read as lone surrogates, which JSON can also spell out.
        text.encode()
    except UnicodeEncodeError:
        return "text is not UTF-8"
    return None


def _cell(value: object) -> str:
    """A further column's value as words."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _with_known_split(by_concept: _ByConcept, config: LabelledConfig, report: RowReport) -> _ByConcept:
    """Only rows that say on which side they are; applies as soon as one row of the files does."""
    kept: _ByConcept = {}
    for name, rows in by_concept.items():
        for row in rows:
            if row.split in SPLITS:
                kept.setdefault(name, []).append(row)
            else:
                reason = f"unknown split {row.split!r} (train, test or background)" if row.split else "empty split"
                report.rejected[reason].append(row.place)
    return kept


def _binary(value: object) -> int | None:
    """0 or 1 for everything that plainly means it, else None."""
    if isinstance(value, str):
        return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}.get(value.strip().lower())
    return int(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _encode_labels(by_concept: _ByConcept, config: LabelledConfig, report: RowReport) -> None:
    """Replace the labels as read by 0 and 1, in place; rows whose label says neither are rejected."""
    words = Counter(str(row.label) for rows in by_concept.values() for row in rows)
    if config.positive is not None and config.positive not in words:
        common = ", ".join(repr(word) for word, _ in words.most_common(8))
        raise DataError(f"data.positive={config.positive!r} is no label in {config.path}; the labels are {common}")
    for name in list(by_concept):
        rows = by_concept[name]
        values = {_binary(row.label) if _binary(row.label) is not None else str(row.label).strip() for row in rows}
        values.discard("")
        if config.positive is None and config.skip_non_binary and len(values) != 2:
            report.rejected["concept without exactly two labels"] += [row.place for row in rows]
            del by_concept[name]
            continue
        code = _string_code(name, values, config)
        kept = []
        for row in rows:
            label = code.get(str(row.label).strip()) if code else _binary(row.label)
            if config.positive is not None:
                label = int(str(row.label) == config.positive)
            if label is None:
                report.rejected["label is not 0 or 1"].append(row.place)
                continue
            row.label = label
            kept.append(row)
        by_concept[name] = kept


def _string_code(name: str, values: set[Any], config: LabelledConfig) -> dict[str, int]:
    """Two string labels -> 0 and 1 in sorted order, where the configuration allows it; {} for labels of 0 and 1."""
    if config.positive is not None or len(values) != 2 or not all(isinstance(value, str) for value in values):
        return {}
    first, second = sorted(values)
    if config.string_labels == "sorted":
        return {first: 0, second: 1}
    raise DataError(
        f"concept {name!r} has the labels {first!r} and {second!r}; say which one is 1: data.positive={first!r} or "
        f"data.positive={second!r} (or data.string_labels=sorted, which takes {second!r})"
    )


def _without_contradictions(rows: list[Row], report: RowReport) -> list[Row]:
    """Rows of texts that have one label only."""
    labels: defaultdict[str, set[int]] = defaultdict(set)
    for row in rows:
        labels[row.text].add(row.label)
    return _keep(rows, [len(labels[row.text]) == 1 for row in rows], "contradictory labels for the same text", report)


def _without_duplicates(rows: list[Row], report: RowReport) -> list[Row]:
    """The first row of each text within a split."""
    seen: set[tuple[str, str | None]] = set()
    fresh = []
    for row in rows:
        fresh.append((row.text, row.split) not in seen)
        seen.add((row.text, row.split))
    return _keep(rows, fresh, "duplicate row", report)


def _without_leaks(rows: list[Row], report: RowReport) -> list[Row]:
    """Test rows, and those training rows whose text and group are not among them."""
    texts = {row.text for row in rows if row.split == "test"}
    groups = {row.group for row in rows if row.split == "test"}
    rows = _keep(rows, [row.split == "test" or row.text not in texts for row in rows], LEAKS[0], report)
    return _keep(rows, [row.split == "test" or row.group not in groups for row in rows], LEAKS[1], report)


def _check_leaks(config: LabelledConfig, report: RowReport) -> None:
    """What the files put on both sides of a split ends the run, unless it is said to be left out."""
    found = {reason: report.rejected[reason] for reason in LEAKS if reason in report.rejected}
    if config.leaks == "error" and found:
        told = "; ".join(f"{len(rows):,} rows: {reason}, {', '.join(rows[:5])}" for reason, rows in found.items())
        raise LeakError(
            f"training rows that the test rows of {config.path} repeat: {told}. (Texts of nearly the same words are "
            "one group: data.near_duplicates.) Take them out of one split, or leave them out of train: data.leaks=drop"
        )


def _keep(rows: list[Row], wanted: Sequence[bool], reason: str, report: RowReport) -> list[Row]:
    """The wanted rows; the others go to the report."""
    if rejected := [row.place for row, want in zip(rows, wanted, strict=True) if not want]:
        report.rejected[reason] += rejected
    return [row for row, want in zip(rows, wanted, strict=True) if want]


def _capped(rows: list[Row], limits: Mapping[str, int], seed: int, report: RowReport) -> list[Row]:
    """At most so many rows of each label and split."""
    chosen = chosen_places(rows, limits, seed)
    return _keep(rows, [row.place in chosen for row in rows], OVER_MAX, report)


def _count(rows: list[Row]) -> dict[str, int]:
    """Rows of each split and label."""
    counts = Counter(f"{row.split}/{row.label}" for row in rows)
    return {key: counts[key] for key in ("train/0", "train/1", "test/0", "test/1")}


def _check_classes(report: RowReport) -> None:
    """Both labels in both splits of every concept, or nothing honest can be computed."""
    lacking = []
    for name, counts in report.counts.items():
        for split in ("train", "test"):
            zeros, ones = counts[f"{split}/0"], counts[f"{split}/1"]
            if not zeros or not ones:
                lacking.append(f"concept {name!r}, {split}: {zeros} rows of label 0 and {ones} of label 1")
    if not report.counts:
        raise DataError("no concept is left; " + "; ".join(report.lines()))
    if lacking:
        more = f"; and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        words = "; ".join(lacking[:5]) + more
        raise DataError(f"both labels are needed in train and in test: {words}. {' '.join(report.lines())}")


def _note_few(report: RowReport) -> None:
    """Name the concepts of so few rows that their lenses and figures are rough."""
    few = {
        name: f"{counts['train/1']} + {counts['train/0']}"
        for name, counts in report.counts.items()
        if min(counts["train/0"], counts["train/1"]) < FEW_ROWS
    }
    if few:
        shown = ", ".join(f"{name} {rows}" for name, rows in list(few.items())[:5])
        more = f" and {len(few) - 5:,} more" if len(few) > 5 else ""
        report.notes.append(
            f"fewer than {FEW_ROWS} rows of a label to learn from: {shown}{more}; nothing is chosen on so few, and "
            "their figures are rough"
        )


def _table(marked: _ByConcept, background: _ByConcept, report: RowReport) -> SampleTable:
    """The sample table of the rows that are left."""
    builder = SampleTableBuilder(list(marked))
    known: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}
    num_differing = 0
    for name, rows in [*marked.items(), *background.items()]:
        for row in rows:
            split = str(row.split)
            index = builder.text(row.text, group=row.group, split=split, source="labelled", columns=row.columns)
            num_differing += known.setdefault((row.text, split), (row.group, row.columns)) != (row.group, row.columns)
            if split != "background":
                builder.mark(index, name, row.label)
            report.num_kept += 1
    if num_differing:
        report.notes.append(
            f"{num_differing:,} rows repeat a text of another row with another group or other further columns: "
            "the text is stored once, with those of its first row"
        )
    return builder.build()
