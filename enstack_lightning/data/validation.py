"""Raw rows to rows that can be trained on: pure functions, each raising one sentence with the place and the value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from enstack_lightning.data.readers import RawRow
from enstack_lightning.errors import DataError

_SHOWN_CHARACTERS = 40
_INT64_LIMIT = 2**63


@dataclass(frozen=True)
class Columns:
    """Where code, label and number of a row stand, and which labels are allowed.

    Attributes:
        func: Column of the code.
        target: Column of the label.
        idx: Column of the row's number.
        label_names: Label by name, where labels are given as names.
        num_labels: Labels are 0 to `num_labels - 1`.
    """

    func: str
    target: str
    idx: str
    label_names: Mapping[str, int] | None
    num_labels: int


@dataclass(frozen=True)
class Row:
    """One function: its code, its number, and its label unless the file has none."""

    func: str
    idx: int
    label: int | None


def check_label_names(label_names: Mapping[str, int] | None, num_labels: int) -> None:
    """Checks that every named label is one of 0 to `num_labels - 1`.

    Raises:
        DataError: If one is not.
    """
    for name, label in (label_names or {}).items():
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
            raise DataError(f"label_names gives {name!r} the label {label!r}, outside 0 to {num_labels - 1}.")


def validate_rows(raw_rows: Iterable[RawRow], columns: Columns, needs_label: bool) -> Iterator[Row]:
    """Checks rows one by one.

    The first row decides whether rows have a number of their own and, unless `needs_label`, whether they are labelled.

    Args:
        raw_rows: Rows of one file.
        columns: Columns and allowed labels.
        needs_label: Whether rows without the label column are refused.

    Yields:
        The rows, in order.

    Raises:
        DataError: If a row has no code or a label or number that cannot be used.
    """
    has_label, has_idx = needs_label, False
    for number, raw in enumerate(raw_rows):
        if number == 0:
            has_label = needs_label or columns.target in raw.columns
            has_idx = columns.idx in raw.columns
        yield Row(
            func=_code(raw, columns.func),
            idx=_row_number(raw, columns.idx) if has_idx else number,
            label=_label(raw, columns) if has_label else None,
        )


def _code(raw: RawRow, column: str) -> str:
    code = _value(raw, column)
    if not isinstance(code, str):
        raise DataError(f"{raw.where}: the code in column {column!r} is {_shown(code)}, not text.")
    if not code.strip():
        raise DataError(f"{raw.where}: the code in column {column!r} is empty.")
    try:
        code.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{raw.where}: the code in column {column!r} is not valid Unicode ({error.reason}).") from error
    return code


def _label(raw: RawRow, columns: Columns) -> int:
    label = _value(raw, columns.target)
    place = f"{raw.where}: the label in column {columns.target!r} is {_shown(label)}"
    if columns.label_names and isinstance(label, str) and label in columns.label_names:
        return columns.label_names[label]
    number = _integer(label, raw.is_text)
    if number is None:
        if isinstance(label, str) and columns.label_names:
            raise DataError(f"{place}, which is not in label_names ({', '.join(columns.label_names)}).")
        hint = "; give label_names to use names" if isinstance(label, str) and label else ""
        raise DataError(f"{place}, not an integer from 0 to {columns.num_labels - 1}{hint}.")
    if not 0 <= number < columns.num_labels:
        raise DataError(f"{place}, outside 0 to {columns.num_labels - 1} (num_labels={columns.num_labels}).")
    return number


def _row_number(raw: RawRow, column: str) -> int:
    value = _value(raw, column)
    number = _integer(value, raw.is_text)
    if number is None or not -_INT64_LIMIT <= number < _INT64_LIMIT:
        raise DataError(
            f"{raw.where}: the row's number in column {column!r} is {_shown(value)}, not a 64-bit integer; name "
            "another idx_column, or one that is absent to number the rows."
        )
    return number


def _value(raw: RawRow, column: str) -> object:
    if column not in raw.values:
        raise DataError(f"{raw.where}: no column {column!r}; its columns are: {', '.join(raw.columns) or '(none)'}.")
    return raw.values[column]


def _integer(value: object, is_text: bool) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    digits = value.strip().removeprefix("-") if is_text and isinstance(value, str) else ""
    return int(str(value)) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _shown(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value)
    short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return short if isinstance(value, str) else f"{short} ({type(value).__name__})"
