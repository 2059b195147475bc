"""Tells mappings from other values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

_NO_MAPPINGS = frozenset({type(None), bool, int, float, str, bytes, list, tuple})


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a value is a `Mapping`.

    The abstract class asks every class below it of a type that it has not met: with torch imported that takes as long
    as reading 100 tensors.

    Example:
        >>> is_mapping({}), is_mapping([])
        (True, False)
    """
    return isinstance(value, dict) or (type(value) not in _NO_MAPPINGS and isinstance(value, Mapping))
