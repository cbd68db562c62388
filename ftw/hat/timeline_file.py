"""How a timeline lies on disk: JSON for people and small things, Parquet for tables and long generations.

Both hold a header (texts, tokens, flags, meta data) and matrices of one number per token and concept. JSON has the
matrices as lists of rows, null where nothing was read. Parquet has one row per token and concept, the header in its
schema.

Axes: T tokens, N concepts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftw.errors import DataError, FTWError
from ftw.paths import replace_file

SCHEMA, VERSION = "ftw.timeline", 1
MATRICES = ("logit", "percentile", "rank")
Matrices = dict[str, np.ndarray | None]


def write(path: Path, header: dict[str, Any], matrices: Matrices, *, derived: Mapping[str, np.ndarray]) -> Path:
    """Write a timeline, whole or not at all; `derived` matrices are for readers of the Parquet table, not read back.

    Raises:
        DataError: a suffix that is neither .json nor .parquet. FTWError: Parquet without pyarrow.
    """
    header = {"schema": SCHEMA, "version": VERSION, **header}
    suffix = _suffix(path)
    with replace_file(path) as temporary:
        if suffix == ".json":
            rows = {name: None if values is None else _rows(values) for name, values in matrices.items()}
            temporary.write_text(_dumps({**header, **rows}) + "\n", encoding="ascii")
        else:
            _write_parquet(temporary, header, {**matrices, **derived})
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and matrices (None for one that was not kept) of a timeline file.

    Raises:
        DataError: no such file, cut off, not a timeline, or of a version that this FTW does not read.
    """
    suffix = _suffix(path)
    if not path.is_file():
        raise DataError(f"there is no timeline {path}; `ftw monitor` and `ftw demo` write one into their run folder")
    header, table = _read_json(path) if suffix == ".json" else _read_parquet(path)
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path} is no timeline (schema {schema!r}, expected {SCHEMA!r})")
    if header.get("version") != VERSION:
        raise DataError(f"{path} is a timeline of version {header.get('version')!r}; this FTW reads {VERSION}")
    if table is None:
        return header, {name: header.get(name) for name in MATRICES}
    return header, _matrices(table, header, path)


def rounded(value: float) -> float | None:
    """A number for JSON: 4 decimals, None for NaN."""
    return None if np.isnan(value) else round(float(value), 4)


def _suffix(path: Path) -> str:
    if path.suffix not in (".json", ".parquet"):
        raise DataError(f"cannot tell the format of {path}; name it .json or .parquet")
    return path.suffix


def _rows(values_TN: np.ndarray) -> list[list[float | None]]:
    return [[rounded(value) for value in row] for row in values_TN.tolist()]


def _dumps(payload: dict[str, Any]) -> str:
    # ASCII escapes keep any token writable, lone surrogates too.
    try:
        return json.dumps(payload, allow_nan=False, separators=(",", ":"), default=_plain_data)
    except ValueError as error:
        raise DataError(f"the timeline's meta data holds a number that JSON has no word for: {error}") from error


def _plain_data(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def _read_json(path: Path) -> tuple[Any, None]:
    try:
        return json.loads(path.read_text(encoding="utf-8")), None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not whole JSON ({error}); it was cut off or is another file") from error


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FTWError("Parquet needs pyarrow; install it with: pip install 'ftw-lenses[train]'") from error
    return pyarrow, pyarrow.parquet


def _write_parquet(path: Path, header: dict[str, Any], matrices: Matrices) -> None:
    pyarrow, parquet = _parquet()
    num_tokens, num_concepts = len(header["tokens"]), len(header["concepts"])
    positions = np.repeat(np.arange(num_tokens, dtype=np.int32), num_concepts)
    concepts = np.tile(np.arange(num_concepts, dtype=np.int32), num_tokens)
    # Arrow strings are UTF-8; the exact pieces, lone surrogates and all, are in the header.
    words = {
        name: pyarrow.array([word.encode("utf-8", "replace").decode("utf-8") for word in header[name]])
        for name in ("tokens", "concepts")
    }
    columns = {
        "position": pyarrow.array(positions),
        "token": pyarrow.DictionaryArray.from_arrays(pyarrow.array(positions), words["tokens"]),
        "is_prompt": pyarrow.array(np.asarray(header["is_prompt"])[positions]),
        "is_special": pyarrow.array(np.asarray(header["is_special"])[positions]),
        "concept": pyarrow.DictionaryArray.from_arrays(pyarrow.array(concepts), words["concepts"]),
    }
    for name, values_TN in matrices.items():
        if values_TN is not None:
            columns[name] = pyarrow.array(values_TN.ravel(), from_pandas=True)  # NaN becomes null
    table = pyarrow.table(columns).replace_schema_metadata({SCHEMA: _dumps(header)})
    parquet.write_table(table, path, compression="zstd")


def _read_parquet(path: Path) -> tuple[Any, Any]:
    pyarrow, parquet = _parquet()
    try:
        table = parquet.read_table(path)
        return json.loads((table.schema.metadata or {}).get(SCHEMA.encode(), b"null")), table
    except (pyarrow.ArrowException, ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not whole Parquet ({error}); it was cut off or is another file") from error


def _matrices(table: Any, header: dict[str, Any], path: Path) -> dict[str, Any]:
    """The columns of numbers, each [T, N] again."""
    shape = len(header.get("tokens") or ()), len(header.get("concepts") or ())
    if shape[0] * shape[1] != table.num_rows:
        raise DataError(f"{path} has {table.num_rows} rows, expected {shape[0]} tokens × {shape[1]} concepts")
    there = set(table.column_names)
    return {name: table[name].to_numpy().reshape(shape) if name in there else None for name in MATRICES}
