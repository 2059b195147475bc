"""A data file becomes rows: validated, stored once as Arrow in the cache, and opened memory-mapped.

The folder in the cache is named after the file's bytes and everything that decides how they are read, so a file is
read and checked once, and a changed file is read again. The fingerprint of the rows depends on their content only:
not on the file's format or place, nor on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.data.cache import atomic_folder, cache_key
from enstack_lightning.data.readers import read_rows
from enstack_lightning.data.validation import Columns, Row, validate_rows
from enstack_lightning.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_FORMAT = 1
_ROWS_PER_RECORD_BATCH = 1_000


@dataclass(frozen=True)
class Rows:
    """The rows of one split, on disk.

    Attributes:
        dataset: Memory-mapped data set with `func`, `idx` and, if labelled, `label`.
        key: Name of the rows in the cache.
        fingerprint: SHA-256 of the rows' code and labels, in order, hexadecimal.
        num_rows: How many there are.
        label_counts: Rows of each label; None if the rows are not labelled.
    """

    dataset: Dataset
    key: str
    fingerprint: str
    num_rows: int
    label_counts: list[int] | None


def open_rows(file: Path, columns: Columns, needs_label: bool, cache_dir: Path) -> Rows:
    """Opens the rows of a data file, reading and checking the file if the cache does not have it.

    Args:
        file: `.jsonl`, `.json`, `.csv` or `.parquet`.
        columns: The columns and the labels allowed in them.
        needs_label: Whether a file without the label column is refused.
        cache_dir: Folder of the package's cache.

    Returns:
        The rows.

    Raises:
        DataError: If the file cannot be read, has no rows, or has a row that cannot be trained on.
    """
    from datasets import Dataset

    raw_rows = read_rows(file, (columns.func, columns.target, columns.idx))
    key = cache_key("rows", _ROWS_FORMAT, file.suffix.lower(), _file_digest(file), asdict(columns))
    folder = cache_dir / "rows" / key
    if not folder.is_dir():
        rows = validate_rows(raw_rows, columns, needs_label)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{file} has no rows.")
        with atomic_folder(folder) as unfinished:
            _store(chain([first], rows), first.label is not None, columns.num_labels, unfinished)
    facts = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    if needs_label and facts["label_counts"] is None:
        next(validate_rows(raw_rows, columns, needs_label=True))  # raises: the file was once read to be predicted
    dataset = Dataset.from_file(str(folder / "rows.arrow"))
    return Rows(dataset, key, facts["fingerprint"], facts["num_rows"], facts["label_counts"])


def _store(rows: Iterator[Row], is_labelled: bool, num_labels: int, folder: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    fields = [("func", pa.large_string()), ("idx", pa.int64())] + [("label", pa.int64())] * is_labelled
    schema = pa.schema(fields)
    fingerprint = hashlib.sha256()
    num_rows = 0
    counts = [0] * num_labels
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _ROWS_PER_RECORD_BATCH)):
            columns = {name: [getattr(row, name) for row in batch] for name in schema.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            num_rows += len(batch)
            for row in batch:
                code = row.func.encode()
                fingerprint.update(f"{len(code)} {row.label} ".encode() + code)
                if row.label is not None:
                    counts[row.label] += 1
    facts = {
        "fingerprint": fingerprint.hexdigest(),
        "num_rows": num_rows,
        "label_counts": counts if is_labelled else None,
    }
    (folder / "rows.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _file_digest(file: Path) -> str | None:
    """SHA-256 of the file's bytes; None if it cannot be opened, which reading it then explains."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
