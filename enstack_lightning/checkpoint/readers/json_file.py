"""A JSON object in a checkpoint's folder: size, syntax and names checked before anything of it is believed."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from enstack_lightning.checkpoint.facts import Defect, DefectKind
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.source import ContainerDefectError


def read_json_object(
    folder: Location, name: str, limit: int, finite: bool = False
) -> tuple[dict[str, Any] | None, int, Defect | None]:
    """The object in the file `name` of `folder`, the file's size, and why there is none.

    Args:
        limit: bytes that the file may have at most.
        finite: whether NaN and Infinity, which JSON does not know and Python writes, are refused.
    """
    location = folder.child(name)
    defect, size = location.check_file(name, folder)
    if defect is None and size > limit:
        defect = Defect(DefectKind.DAMAGED, name, f"it has {size:,} bytes; the limit is {limit:,}")
    if defect is not None:
        return None, size, defect
    try:
        with location.open() as source:
            text = source.read_at(0, source.size).decode("utf-8")
        value = parse_json(text, finite)
    except (ContainerDefectError, UnicodeDecodeError, RecursionError, ValueError) as e:
        return None, size, Defect(DefectKind.DAMAGED, name, f"it is no valid JSON: {e}")
    except OSError as e:
        return None, size, Defect.unreadable(name, e)
    if not isinstance(value, dict):
        message = f"it holds a JSON {type(value).__name__} where an object is needed"
        return None, size, Defect(DefectKind.DAMAGED, name, message)
    return value, size, None


def parse_json(text: str, finite: bool) -> Any:
    """The value of a JSON text in which no object has a name twice.

    Args:
        finite: whether NaN and Infinity, which JSON does not know and Python writes, are refused.

    Raises:
        ValueError: it is no such text.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse if finite else None)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r:.60} stands twice in one object")
    return unique


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
