"""What entries of a training state must look like: whatever is not of that form is a defect, never passed over.

The forms are those of torch (`Optimizer.state_dict`, `LRScheduler.state_dict`) and of Lightning's loop counters
(`lightning/pytorch/loops/progress.py`). An entry that is absent is no matter of form; rules say whether it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind
from enstack_lightning.checkpoint.mappings import is_mapping

_INT64_LIMIT = 2**63
_KEYS = (int, str)
_COUNTERS = ("ready", "started", "processed", "completed")
_EPOCHS, _BATCHES = "epoch_progress", "epoch_loop.batch_progress"
_OF_TORCH = ("amsgrad", "dampening", "differentiable", "foreach", "history_size", "maximize", "ns_steps")
"""Options that tell torch's own optimizers, which need a rate; others may reckon theirs, with None in `lr`."""

MAX_STATES = 1_000
"""Optimizers, and schedulers, of one checkpoint that are read."""

MAX_GROUPS = 20_000
"""Param groups of all of them, which take about half a second."""


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
    groups = 0
    for where, entry in _each(state, optimizers):
        found += _in_optimizer(entry, where)
        inner = entry.get("param_groups") if is_mapping(entry) else None
        groups += len(inner) if isinstance(inner, list) else 0
    if groups > MAX_GROUPS:
        found.append(f"{optimizers} has {groups:,} param groups, of which {MAX_GROUPS:,} are read")
    for name in (optimizers, schedulers):
        if isinstance(state.get(name), list) and len(state[name]) > MAX_STATES:
            found.append(f"{name} has {len(state[name]):,} entries, of which {MAX_STATES:,} are read")
    for where, entry in _each(state, schedulers):
        found += _in_scheduler(entry, where)
    if "loops" in state:
        found += _in_loops(state["loops"])
    return tuple(Defect(DefectKind.MISSHAPEN, message.partition(" ")[0], message) for message in found)


def _each(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, object]]:
    value = state.get(name)
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value[:MAX_STATES]))
    elif value is not None:
        yield name, value


def _in_optimizer(entry: object, where: str) -> Iterator[str]:
    if not is_mapping(entry):
        yield must_be(where, entry, "a dict")
        return
    if not entry:
        return  # how Lightning writes `configure_optimizers` returning None
    groups, states = entry.get("param_groups"), entry.get("state")
    if not isinstance(groups, list):
        yield must_be(f"{where}.param_groups", groups, "a list")
    for i, group in enumerate(groups[:MAX_GROUPS] if isinstance(groups, list) else ()):
        if not is_mapping(group) or not isinstance(group.get("params"), list):
            yield f"{where}.param_groups[{i}] has no list of params"
            continue
        yield from _in_group(group, f"{where}.param_groups[{i}]")
    if not is_mapping(states):
        yield must_be(f"{where}.state", states, "a dict")
        return
    for key, state in states.items():
        if is_mapping(state):
            if "step" in state and _not_a_step(state["step"], ""):  # many, so that their places are named only then
                yield from _not_a_step(state["step"], f"{where}.state[{shown_value(key):.20}].step")
        elif isinstance(key, int):
            yield must_be(f"{where}.state[{shown_value(key)}]", state, "a dict")


def _in_group(group: Mapping[Any, Any], where: str) -> Iterator[str]:
    odd = [p for p in group["params"] if not isinstance(p, _KEYS)]
    if odd:
        yield must_be(f"{where}.params", odd[0], "a list of numbers or names")
    for name in ("lr", "initial_lr", "max_lr", "weight_decay"):
        yield from not_a_number(group.get(name), f"{where}.{name}")
    if "lr" in group and group["lr"] is None and any(name in group for name in _OF_TORCH):
        yield must_be(f"{where}.lr", None, "a number")
    betas = group.get("betas", (0.0,))
    if not isinstance(betas, list | tuple) or not betas:
        yield must_be(f"{where}.betas", betas, "a pair of numbers")
        return
    for beta in betas:
        yield from not_a_number(beta, f"{where}.betas")


def _not_a_step(step: object, where: str) -> Iterable[str]:
    shape = getattr(step, "shape", ())
    if math.prod(shape) != 1:
        return [f"{where} is a tensor of shape {tuple(shape)!s:.40}, and must be one number"]
    return not_a_number(step, where, optional=False)


def _in_scheduler(entry: object, where: str) -> Iterator[str]:
    if entry is None:
        return  # what a scheduler of the user's own may have for a state
    if not is_mapping(entry):
        yield must_be(where, entry, "a dict")
        return
    if "last_epoch" in entry:
        yield from not_a_number(entry["last_epoch"], f"{where}.last_epoch", optional=False)
    for name in ("_last_lr", "base_lrs"):
        value = entry.get(name)
        if isinstance(value, list | tuple):
            if not value:
                yield f"{where}.{name} is empty, and must have a rate for each param group"
            for i, rate in enumerate(value):
                yield from not_a_number(rate, f"{where}.{name}[{i}]", optional=False)
        elif value is not None:
            yield must_be(f"{where}.{name}", value, "a list")


def _in_loops(loops: object) -> Iterator[str]:
    """The counters that a resume goes on from: those that are missing, and those that are no counters.

    Lightning restores the counters that it finds, and begins without a word at 0 where it finds none.
    """
    if not is_mapping(loops):
        return  # for a rule to say
    loop = loops.get("fit_loop")
    if not is_mapping(loop):
        yield must_be("loops.fit_loop", loop, "a dict")
        return
    for name in (_EPOCHS, _BATCHES):
        counter = loop.get(name)
        if not is_mapping(counter) or not {"total", "current"} <= counter.keys():
            yield f"loops.fit_loop.{name} lacks its counters, total and current: a resume would count from 0"
    for name in ("optim_progress", "optim_step_progress"):  # of automatic and of manual optimization
        if not any(str(entry).endswith(f".{name}") for entry in loop):
            yield f"loops.fit_loop lacks {name}, which counts optimizer steps: a resume would count from 0"
    yield from _in_counters(loops, "loops")


def _in_counters(value: object, where: str) -> Iterator[str]:
    """Every counter under `loops`, however deep Lightning puts it."""
    waiting: list[tuple[object, str]] = [(value, where)]
    while waiting:
        entry, path = waiting.pop()
        if not is_mapping(entry):
            continue
        for key, inner in entry.items():
            if key in ("total", "current"):
                yield from _in_counter(inner, f"{path}.{key}")
            elif key == "is_last_batch":
                if not isinstance(inner, bool):
                    yield must_be(f"{path}.{key}", inner, "a bool")
            elif key != "state_dict":
                waiting.append((inner, f"{path}.{key}"))


def _in_counter(value: object, where: str) -> Iterable[str]:
    if not is_mapping(value):
        return [must_be(where, value, "a dict")]
    lacking = [f"{where} lacks its entry {name}" for name in ("ready", "completed") if name not in value]
    present = (name for name in _COUNTERS if name in value)
    return [*lacking, *(said for name in present for said in _not_a_count(value[name], f"{where}.{name}", 0))]


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
