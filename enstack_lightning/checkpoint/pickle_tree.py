"""Makes a finite tree of a pickle's value, whose parts may refer to each other, so that readers may recurse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from enstack_lightning.checkpoint.pickle_values import CONTAINERS, Call, Loop, PickleDefectError

MAX_VALUES = 2_000_000
"""How many values a pickle may hold when each is counted as often as it is referred to."""

MAX_DEPTH = 200

UNSEEN, _OPEN = -1, -2


class _Open:
    """A container whose inner values are being counted."""

    __slots__ = ("container", "depth", "inner", "replaced", "shared", "slot", "values")

    def __init__(self, container: Any, shared: bool) -> None:
        self.container = container
        self.shared = shared
        self.inner = _inner(container)
        self.slot: Any = None
        self.values = 1
        self.depth = 1
        self.replaced: list[Any] | None = None

    def put(self, value: Any) -> None:
        """Puts another value where the inner one stood that came last."""
        container = self.container
        if isinstance(container, Call):
            setattr(container, self.slot, value)
        elif isinstance(container, tuple):
            self.replaced = list(container) if self.replaced is None else self.replaced
            self.replaced[self.slot] = value
        elif isinstance(container, set | frozenset) or self.slot is _KEY:
            raise PickleDefectError("a value refers back to itself through a key")
        else:
            container[self.slot] = value


_KEY = object()


def _inner(container: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, dict):
        return _inner_of_dict(container)
    if isinstance(container, Call):
        return ((name, getattr(container, name)) for name in ("function", "args", "state", "entries", "items"))
    return iter(enumerate(container))


def _inner_of_dict(container: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in container.items():
        if key.__class__ in CONTAINERS:
            yield _KEY, key
        yield key, value


def _flat_length(container: Any) -> int:
    """How many values lie in a container in which no other container lies; 0 for any other."""
    if container.__class__ is Call or not CONTAINERS.isdisjoint(map(type, container)):
        return 0
    if container.__class__ is dict and not CONTAINERS.isdisjoint(map(type, container.values())):
        return 0
    return len(container)


def untangled(root: Any, shared: dict[int, int]) -> tuple[Any, int]:
    """The value with a `Loop` wherever it referred back into itself, and how many there are.

    Args:
        shared: the containers that more than one place may refer to, by id; the walk notes their sizes there.
    """
    if root.__class__ not in CONTAINERS:
        return root, 0
    loops = 0
    rebuilt: dict[int, tuple[Any, ...]] = {}
    path = [_Open(root, id(root) in shared)]
    if path[0].shared:
        shared[id(root)] = _OPEN
    while True:
        top = path[-1]
        for top.slot, value in top.inner:  # noqa: B020
            if value.__class__ not in CONTAINERS or not value:
                top.values += 1
                continue
            seen = shared.get(id(value))
            if seen is None and (flat := _flat_length(value)):
                _add_inner(top, 1 + flat, 1, len(path))
                continue
            if seen is None or seen == UNSEEN:
                break
            if seen == _OPEN:
                top.put(_LOOP)
                loops += 1
                continue
            _add_inner(top, seen >> 8, seen & 0xFF, len(path))
            if id(value) in rebuilt:
                top.put(rebuilt[id(value)])
        else:
            path.pop()
            if top.shared:
                shared[id(top.container)] = top.values << 8 | top.depth
            result = top.container
            if top.replaced is not None:
                result = rebuilt[id(top.container)] = tuple(top.replaced)
            if not path:
                return result, loops
            _add_inner(path[-1], top.values, top.depth, len(path))
            if top.replaced is not None:
                path[-1].put(result)
            continue
        if len(path) >= MAX_DEPTH:
            raise _too_deep()
        if seen is not None:
            shared[id(value)] = _OPEN
        path.append(_Open(value, seen is not None))


def _add_inner(outer: _Open, values: int, depth: int, level: int) -> None:
    outer.values += values
    outer.depth = max(outer.depth, depth + 1)
    if level + depth > MAX_DEPTH:
        raise _too_deep()
    if outer.values > MAX_VALUES:
        raise PickleDefectError(
            f"the pickle's values, each counted wherever it is referred to, are more than {MAX_VALUES:,}"
        )


def _too_deep() -> PickleDefectError:
    return PickleDefectError(f"the pickle's values lie more than {MAX_DEPTH} levels deep in each other")


_LOOP: Final = Loop()
