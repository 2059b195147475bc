"""What entries of a training state must look like: whatever is not of that form is a defect, never passed over.

The forms are those of torch (`Optimizer.state_dict`, `LRScheduler.state_dict`) and of Lightning's loop counters
(`lightning/pytorch/loops/progress.py`). An entry that is absent is no matter of form; rules say whether it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind

_INT64_LIMIT = 2**63
_COUNTERS = ("ready", "started", "processed", "completed")


def misshapen(state: Mapping[str, Any], optimizers: str, schedulers: str) -> tuple[Defect, ...]:
    """The defects of form in a training state.

    Args:
        state: the whole state, symbolic or loaded.
        optimizers: the entry with one optimizer's state or a list of them.
        schedulers: likewise of schedulers.
    """
    found: list[str] = []
    for name in ("epoch", "global_step", "step", "total_batches"):
        if isinstance(state.get(name), int):
            found += _not_a_count(state[name], name, lowest=-_INT64_LIMIT)  # a rule judges negative ones
    for where, entry in _each(state, optimizers):
        found += _in_optimizer(entry, where)
    for where, entry in _each(state, schedulers):
        found += _in_scheduler(entry, where)
    found += _in_counters(state.get("loops"), "loops")
    return tuple(Defect(DefectKind.MISSHAPEN, message.partition(" ")[0], message) for message in found)


def _each(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, object]]:
    value = state.get(name)
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
    elif value is not None:
        yield name, value


def _in_optimizer(entry: object, where: str) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield must_be(where, entry, "a dict")
        return
    if not entry:
        return  # how Lightning writes `configure_optimizers` returning None
    groups, states = entry.get("param_groups"), entry.get("state")
    if not isinstance(groups, list):
        yield must_be(f"{where}.param_groups", groups, "a list")
    for i, group in enumerate(groups if isinstance(groups, list) else ()):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            yield f"{where}.param_groups[{i}] has no list of params"
            continue
        for name in ("lr", "initial_lr"):
            yield from not_a_number(group.get(name), f"{where}.param_groups[{i}].{name}")
    if not isinstance(states, Mapping):
        yield must_be(f"{where}.state", states, "a dict")
        return
    for key, state in states.items():
        if isinstance(state, Mapping) and "step" in state:
            yield from not_a_number(state["step"], f"{where}.state[{key!r:.20}].step", optional=False)


def _in_scheduler(entry: object, where: str) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield must_be(where, entry, "a dict")
        return
    yield from not_a_number(entry.get("last_epoch"), f"{where}.last_epoch")
    for name in ("_last_lr", "base_lrs"):
        value = entry.get(name)
        if isinstance(value, list | tuple):
            for i, rate in enumerate(value):
                yield from not_a_number(rate, f"{where}.{name}[{i}]", optional=False)
        elif value is not None:
            yield must_be(f"{where}.{name}", value, "a list")


def _in_counters(value: object, where: str) -> Iterator[str]:
    """Every counter under `loops`, however deep Lightning puts it."""
    waiting: list[tuple[object, str]] = [(value, where)]
    while waiting:
        entry, path = waiting.pop()
        if not isinstance(entry, Mapping):
            continue
        for key, inner in entry.items():
            if key in ("total", "current"):
                yield from _in_counter(inner, f"{path}.{key}")
            elif key != "state_dict":
                waiting.append((inner, f"{path}.{key}"))


def _in_counter(value: object, where: str) -> Iterable[str]:
    if not isinstance(value, Mapping):
        return [must_be(where, value, "a dict")]
    return [said for name in _COUNTERS if name in value for said in _not_a_count(value[name], f"{where}.{name}", 0)]


def _not_a_count(value: object, where: str, lowest: int) -> list[str]:
    if type(value) is int and lowest <= value < _INT64_LIMIT:
        return []
    return [f"{where} is {shown_value(value)}, and must be a whole number from 0 up"]


def not_a_number(value: object, where: str, optional: bool = True) -> list[str]:
    """What is wrong with a value that should be a finite number; nothing where it is one, or a tensor.

    Args:
        optional: whether it may be None.
    """
    if hasattr(value, "dtype") or (value is None and optional):
        return []  # a tensor's value is told, or not, by whoever reads it
    if isinstance(value, float) and math.isfinite(value):
        return []
    if type(value) is int and -_INT64_LIMIT <= value < _INT64_LIMIT:
        return []
    return [f"{where} is {shown_value(value)}, and must be a finite number"]


def must_be(where: str, value: object, kind: str) -> str:
    """The sentence on a value of the wrong type; `kind` is the right one, with its article."""
    return f"{where} is of type {type(value).__name__}, and must be {kind}"


def shown_value(value: object) -> str:
    """A value from a file as a message can hold it: a number or a short text as it is, of anything else the type."""
    if isinstance(value, int) and abs(value) >= _INT64_LIMIT:
        return f"an integer of {value.bit_length():,} bits"
    return f"{value!r:.40}" if isinstance(value, int | float | str | None) else f"of type {type(value).__name__}"
