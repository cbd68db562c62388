"""Rows of tables on disk, one at a time: JSON lines, JSON, CSV or TSV, each plain or compressed with gzip or zstd.

Files come from outside: nothing is unpacked to disk, lines and fields are bounded before they are held, and a broken
row is handed on as the reason why it is broken, with its line, so that the reader of the table can count it.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ftw.errors import DataError

MAX_TEXT_CHARACTERS = 1_000_000
# A line may carry further columns beside its text; beyond this it is an accident (or an attack), not a row.
MAX_LINE_CHARACTERS = 16 * MAX_TEXT_CHARACTERS
MAX_JSON_BYTES = 2_000_000_000
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
_COMPRESSIONS = (".gz", ".zst")


def supported(file: Path) -> bool:
    """Whether the endings of a name are ones that `read_rows` knows."""
    return _format(file) is not None


def stem(file: Path) -> str:
    """Name of a file without the endings for format and compression; other dots stay."""
    return Path(_uncompressed(file)).stem if supported(file) else file.name


def _uncompressed(file: Path) -> str:
    return file.name[: -len(file.suffix)] if file.suffix.lower() in _COMPRESSIONS else file.name


def _format(file: Path) -> str | None:
    return _FORMATS.get(Path(_uncompressed(file)).suffix.lower())


def read_rows(file: Path, *, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and record of every row, or in its place the reason why there is none.

    Args:
        file: .jsonl, .json (a list of objects; its "line" is the place in the list, from 1), .csv or .tsv with header;
            optionally .gz or .zst. UTF-8; bytes that are not arrive as lone surrogates.
        needed: columns that a CSV or TSV header must have.

    Raises:
        DataError: an unknown format, a damaged archive, a header without the needed columns.
    """
    readers = {"jsonl": _json_lines, "json": _json_list, "csv": _separated, "tsv": _separated}
    form = _format(file)
    if form is None:
        endings = ", ".join(_FORMATS)
        raise DataError(f"cannot read {file}: the formats are {endings}, each also with .gz or .zst")
    try:
        with _open(file) as stream:
            yield from readers[form](file, stream, needed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}; is the file whole?") from error


@contextmanager
def _open(file: Path) -> Iterator[IO[str]]:
    """The text of a file, decompressed as it is read."""
    style: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if file.suffix.lower() == ".gz":
        with gzip.open(file, "rt", **style) as stream:
            yield stream
    elif file.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{file.name} needs zstandard; install it with: pip install 'ftw-lenses[train]'") from error
        try:
            with (
                file.open("rb") as raw,
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as bytes_,
            ):
                yield io.TextIOWrapper(bytes_, **style)
        except zstandard.ZstdError as error:
            raise DataError(f"cannot read {file}: {error}; is the file whole?") from error
    else:
        with file.open("rt", **style) as stream:
            yield stream


def _json_lines(file: Path, stream: IO[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """One object a line; blank lines are no rows."""
    number = 0
    while line := stream.readline(MAX_LINE_CHARACTERS):
        number += 1
        if len(line) == MAX_LINE_CHARACTERS and not line.endswith("\n"):
            while (rest := stream.readline(MAX_LINE_CHARACTERS)) and not rest.endswith("\n"):
                pass
            yield number, f"line over {MAX_LINE_CHARACTERS:,} characters"
        elif line.strip():
            yield number, _json_object(line)


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    return record if isinstance(record, dict) else "not a JSON object"


def _json_list(file: Path, stream: IO[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """A whole file that is one list of objects."""
    content = stream.read(MAX_JSON_BYTES)
    if len(content) == MAX_JSON_BYTES:
        raise DataError(f"{file} is over {MAX_JSON_BYTES:,} characters; store one object a line and name it .jsonl")
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); for one object a line, name it .jsonl") from error
    if not isinstance(records, list):
        raise DataError(
            f"{file} holds a {type(records).__name__}, not a list of objects; for one object a line use .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield number, record if isinstance(record, dict) else "not a JSON object"


def _separated(file: Path, stream: IO[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """CSV or TSV with a header; the line of a row is the one on which it starts."""
    limit = csv.field_size_limit(MAX_LINE_CHARACTERS)
    reader = csv.reader(stream, delimiter="\t" if _format(file) == "tsv" else ",")
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{file} names a column twice: {', '.join(header)}")
        if missing := [name for name in needed if name not in header]:
            raise DataError(
                f"{file} has no column {missing[0]!r} (it has: {', '.join(header) or 'none'}); "
                "name yours with data.text_column=… data.label_column=…"
            )
        start = reader.line_num + 1
        for fields in reader:
            line, start = start, reader.line_num + 1
            if fields:
                wrong = f"number of fields is not {len(header)}, as in the header"
                yield line, dict(zip(header, fields, strict=True)) if len(fields) == len(header) else wrong
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}; is a quotation mark left open?") from error
    finally:
        csv.field_size_limit(limit)
