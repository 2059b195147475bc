"""Python's garbage collector, held off while a checkpoint becomes facts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Runs its body, or the function it decorates, without a search for garbage.

    Facts are tens of thousands of new objects, and none of them garbage. In a process full of objects, as one that has
    imported torch, looking through them all costs as much as the reading.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
