"""Data files to raw rows, one reader a format: JSON Lines, JSON arrays, CSV and Parquet.

A raw row is the values as the file has them, with the place they came from. Nothing is inferred or cast here: types
that a loader guessed for a whole column would hide the one row that is wrong.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from enstack_lightning.errors import DataError

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth")

_CSV_FIELD_LIMIT_BYTES = 2**31 - 1


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in a file.

    Attributes:
        where: File and line or row, for messages.
        values: Column to value.
        columns: All columns of the file, or of this row where rows have their own.
        is_text: Whether the format has no types, so that numbers arrive as text.
    """

    where: str
    values: dict[str, object]
    columns: tuple[str, ...]
    is_text: bool = False


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    """Reads a data file row by row.

    Args:
        file: The file; its suffix says the format.
        columns: Columns that are wanted; a format that can leaves out others.

    Yields:
        The rows, in order.

    Raises:
        DataError: If the file is not there, is of another format or is malformed; a pickle is never opened.
    """
    suffix = file.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise DataError(pickle_refusal(file))
    if suffix not in _READERS:
        raise DataError(f"{file} is of an unknown format; files end with one of: {', '.join(sorted(_READERS))}.")
    if not file.is_file():
        raise DataError(f"{file} does not exist or is not a file.")
    try:
        yield from _READERS[suffix](file, columns)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}).") from error


def pickle_refusal(file: Path) -> str:
    """Why a pickle is not read, and how to convert it."""
    return (
        f"{file} is a pickle, which can run any code when it is opened, so it is not read; if you trust it, convert it "
        f'once, for instance with pandas: pandas.read_pickle("{file.name}").to_json("{file.stem}.jsonl", '
        'orient="records", lines=True).'
    )


def _read_json_lines(file: Path, _columns: Sequence[str]) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number:,}"
            if text := _decode(line, where, first=number == 1).strip():
                yield _object_row(_parse_json(text, where), where)


def _read_json(file: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    with file.open("rb") as opened:
        is_array = opened.read(4_096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_json_lines(file, columns)
        return
    records = _parse_json(_decode(file.read_bytes(), str(file), first=True), str(file))
    assert isinstance(records, list)
    for number, record in enumerate(records, start=1):
        where = f"{file}, row {number:,}"
        yield _object_row(record, where)


def _read_csv(file: Path, _columns: Sequence[str]) -> Iterator[RawRow]:
    text = _decode(file.read_bytes(), str(file), first=True)
    usual_limit = csv.field_size_limit(_CSV_FIELD_LIMIT_BYTES)
    number = 0
    try:
        records = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(records, None)
        if header is None:
            raise DataError(f"{file} is empty; the first line of a CSV file names the columns.")
        for record in records:
            if not record:
                continue
            number += 1
            where = f"{file}, row {number:,}"
            if len(record) != len(header):
                raise DataError(f"{where}: {len(record)} fields, but the header names {len(header)} columns.")
            yield RawRow(where, dict(zip(header, record, strict=True)), tuple(header), is_text=True)
    except csv.Error as error:
        raise DataError(f"{file}, row {number + 1:,}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(usual_limit)


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = tuple(parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=1_000, columns=[name for name in columns if name in names]):
                for record in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    number += 1
                    yield RawRow(f"{file}, row {number:,}", record, names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{file} is not a readable Parquet file ({reason}).") from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RawRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)


def _decode(data: bytes, where: str, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start:,}).") from error


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno:,}, column {error.colno:,}" if "\n" in text else f"column {error.colno:,}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at}).") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: JSON that cannot be read ({error}).") from error


def _object_row(record: object, where: str) -> RawRow:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, where an object with a value for each column is needed.")
    return RawRow(where, record, tuple(record))
