"""Optimizer, scheduler and weight entries of a training state, read into facts.

The same functions serve a file's symbolic content and a dict that was really loaded: tensors are told by having a
`dtype` and a `shape`, and the caller says how a scalar one is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from enstack_lightning.checkpoint.facts import (
    OptimizerFacts,
    ParamGroupFacts,
    SchedulerFacts,
    TensorFacts,
)
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.shapes import MAX_GROUPS, MAX_STATES
from enstack_lightning.checkpoint.schedule import ScheduleFacts, counts_its_steps, describe

MAX_DESCRIBED = 50
"""Schedulers of one checkpoint whose schedules are reckoned, each for all its param groups."""

ScalarReader = Callable[[Any], float | None]
"""The value of a scalar tensor, or None when it cannot be told."""

_OF_OPTIMIZERS_WITH_STATE = frozenset(
    ("betas", "alpha", "rho", "etas", "lambd", "beta2_decay", "clip_threshold", "initial_accumulator_value")
)
"""Options of a param group that only optimizers have which keep state after their first step, from the first on:
Adam and its kin, RMSprop, Adadelta, Rprop, ASGD, Adafactor (torch's and transformers'), Adagrad."""
_OWN_FIELDS = frozenset(("params", "lr", "initial_lr", "max_lr"))
_KEYS = (int, str)
"""How an optimizer names its parameters."""


def optimizers_of(
    entries: object, read_scalar: ScalarReader, known: Sequence[OptimizerFacts] | None = None
) -> tuple[OptimizerFacts, ...] | None:
    """Facts of a list of `Optimizer.state_dict()`; None when the value is no such list.

    Args:
        known: facts of the same optimizers: what they say of the parameters' states is not read again.
    """
    if not isinstance(entries, list) or not all(is_mapping(e) for e in entries):
        return None
    optimizers: list[OptimizerFacts] = []
    left = MAX_GROUPS
    for i, entry in enumerate(entries[:MAX_STATES]):
        if known is not None and i < len(known):
            groups = _groups_of(_list_of_groups(entry, left), read_scalar)
            optimizers.append(dataclasses.replace(known[i], groups=groups))
        else:
            optimizers.append(optimizer_of(entry, read_scalar, left))
        left -= len(optimizers[-1].groups)
    return tuple(optimizers)


def optimizer_of(entry: Mapping[str, Any], read_scalar: ScalarReader, max_groups: int = MAX_GROUPS) -> OptimizerFacts:
    """Facts of one `Optimizer.state_dict()`: `{"state": {id: {...}}, "param_groups": [...]}`."""
    states = entry.get("state")
    states = states if is_mapping(states) else {}
    steps, moments, unusable = {}, {}, []
    for key, state in states.items():
        if not is_mapping(state):
            continue
        if shapes := _moment_shapes(state):
            moments[key] = shapes
        if "step" in state:
            held = state["step"]
            step = number(held)
            step = read_scalar(held) if step is None else step
            if step is not None and math.isfinite(step):
                steps[key] = step
            if step is not None and not 0 <= step < math.inf:
                unusable.append((key, step))
    return OptimizerFacts(
        groups=_groups_of(_list_of_groups(entry, max_groups), read_scalar),
        steps=steps,
        unusable_steps=tuple(unusable),
        parameters_with_state=sum(1 for s in states.values() if s),
        moments=moments,
    )


def named_weights(state_dict: object) -> dict[str, TensorDescriptor]:
    """The tensors of a state dict from a file, by name; empty when the value is no such dict."""
    if not is_mapping(state_dict):
        return {}
    return by_name((str(name), value) for name, value in state_dict.items() if isinstance(value, TensorDescriptor))


def by_name(tensors: Iterable[tuple[str, TensorDescriptor]]) -> dict[str, TensorDescriptor]:
    """The tensors by name; of two that are called the same, as by the keys `0` and `"0"`, each is kept."""
    named: dict[str, TensorDescriptor] = {}
    for name, tensor in tensors:
        if name in named:
            name = f"{name} (again, as number {len(named):,})"
        named[name] = tensor
    return named


def named_moments(optimizer_states: object) -> dict[str, TensorDescriptor]:
    """The tensors that optimizers keep for their parameters, from a file.

    Args:
        optimizer_states: one `Optimizer.state_dict()` or a list of them.

    Returns:
        The tensors under names such as `optimizer 0, parameter 3, exp_avg`.
    """
    entries = optimizer_states if isinstance(optimizer_states, list) else [optimizer_states]
    return by_name(_moments_of(entries))


def _moments_of(entries: list[Any]) -> Iterator[tuple[str, TensorDescriptor]]:
    for i, entry in enumerate(entries):
        states = at(entry, ["state"])
        for key, state in states.items() if is_mapping(states) else ():
            place = f"optimizer {i}, parameter {key}, "
            for name, value in state.items() if is_mapping(state) else ():
                if isinstance(value, TensorDescriptor):
                    yield f"{place}{name}", value


def _moment_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's tensors, scalars left out."""
    return {
        str(name): tuple(shape)
        for name, value in state.items()
        if (shape := getattr(value, "shape", None)) and hasattr(value, "dtype")
    }


def _list_of_groups(entry: Mapping[str, Any], most: int) -> list[Any]:
    groups = entry.get("param_groups")
    return groups[:most] if isinstance(groups, list) else []


def _groups_of(groups: list[Any], read_scalar: ScalarReader) -> tuple[ParamGroupFacts, ...]:
    return tuple(_group_of(g, read_scalar) for g in groups if is_mapping(g))


def _scalar(value: object, read_scalar: ScalarReader) -> float | None:
    """A number, or that of a tensor of one element, which an optimizer on a GPU may keep it in."""
    return read_scalar(value) if hasattr(value, "dtype") else number(value)


def _group_of(group: Mapping[str, Any], read_scalar: ScalarReader) -> ParamGroupFacts:
    params = group.get("params")
    momentum = number(group.get("momentum"))
    return ParamGroupFacts(
        params=tuple(p for p in params if isinstance(p, _KEYS)) if isinstance(params, list) else (),
        lr=_scalar(group.get("lr"), read_scalar),
        initial_lr=number(group.get("initial_lr")),
        max_lr=number(group.get("max_lr")),
        keeps_moments=bool(momentum) or not _OF_OPTIMIZERS_WITH_STATE.isdisjoint(map(str, group)),
        options={str(name): _option(name, value) for name, value in group.items() if name not in _OWN_FIELDS},
    )


def _option(name: str, value: object) -> Any:
    whole_list = name == "param_names" and isinstance(value, list)  # one a parameter, so of no fixed length
    return [str(v) for v in value] if whole_list and isinstance(value, list) else plain(value)


def schedulers_of(
    entries: object, optimizers: Sequence[OptimizerFacts] | None = None
) -> tuple[SchedulerFacts, ...] | None:
    """Facts of a list of `LRScheduler.state_dict()`, or None for what has none; None when the value is no such list."""
    if not isinstance(entries, list) or not all(e is None or is_mapping(e) for e in entries):
        return None
    groups = [_groups_under(i, len(entries), optimizers or ()) for i in range(min(len(entries), MAX_STATES))]
    pairs = enumerate(zip(entries, groups, strict=False))
    return tuple(scheduler_of(e or {}, g, i < MAX_DESCRIBED) for i, (e, g) in pairs)


def scheduler_of(
    entry: Mapping[str, Any], groups: Sequence[ParamGroupFacts] = (), described: bool = True
) -> SchedulerFacts:
    """Facts of one `LRScheduler.state_dict()`.

    Args:
        groups: the param groups of its optimizer, where it is known which that is.
        described: whether to reckon its schedule.
    """
    # A ChainedScheduler has a position of its own that never moves; those of its parts count.
    chained = "_schedulers" in entry and "_milestones" not in entry
    counted = not chained and counts_its_steps(entry)
    schedule = describe(entry, groups) if described else ScheduleFacts()
    return SchedulerFacts(
        last_epoch=whole(entry.get("last_epoch")) if counted else None,
        last_lr=_numbers(entry.get("_last_lr")),
        base_lrs=_numbers(entry.get("base_lrs")),
        max_lrs=_numbers(entry.get("max_lrs")),
        total_steps=whole(entry.get("total_steps")),
        kind=schedule.kind,
        next_lrs=schedule.next_lrs,
        curve=schedule.curve,
        own_lr=schedule.own_lr,
        options=schedule_options(entry) if described else {},
    )


_MOVING = frozenset(
    ("last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "mode_worse", "lr_lambdas", "verbose")
)
"""Entries of a scheduler's state that its steps change, or that hold nothing."""


def schedule_options(state: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """The entries of `LRScheduler.state_dict()` that no step changes; those of a scheduler's parts under their number.

    Example:
        >>> schedule_options({"T_max": 5, "base_lrs": [0.1], "last_epoch": 3, "_step_count": 4})
        {'T_max': 5, 'base_lrs': [0.1]}
    """
    options = {
        str(name): plain(value)
        for name, value in state.items()
        if not str(name).startswith("_") and name not in _MOVING and value is not None
    }
    if isinstance(state.get("_milestones"), list | tuple):
        options["milestones"] = plain(state["_milestones"])
    parts = state.get("_schedulers")
    for number, part in enumerate(parts[:MAX_DESCRIBED] if isinstance(parts, list | tuple) and depth else ()):
        if is_mapping(part):
            options |= {f"schedulers[{number}].{k}": v for k, v in schedule_options(part, depth - 1).items()}
    return options


def _groups_under(i: int, count: int, optimizers: Sequence[OptimizerFacts]) -> Sequence[ParamGroupFacts]:
    """The groups that scheduler `i` of `count` sets; none where the checkpoint does not tell whose it is."""
    if len(optimizers) == 1:
        return optimizers[0].groups
    return optimizers[i].groups if len(optimizers) == count else ()


def tensors_of(state_dict: object) -> tuple[TensorFacts, ...]:
    """The tensors of a module's state dict by name, dtype and shape."""
    if not is_mapping(state_dict):
        return ()
    return tuple(
        TensorFacts(str(key), str(value.dtype).removeprefix("torch."), tuple(shape))
        for key, value in state_dict.items()
        if (shape := getattr(value, "shape", None)) is not None and hasattr(value, "dtype")
    )


def field_types(state: Mapping[Any, Any]) -> dict[str, str]:
    """The top-level entries of a training state and the type of each value."""
    return {str(key): type(value).__name__ for key, value in state.items()}


def number(value: object) -> float | None:
    """A finite int or float as it is; None for everything else, booleans and ints beyond 64 bits included."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return whole(value)  # arithmetic of floats with an int of a thousand bits raises


def whole(value: object) -> int | None:
    """An int of at most 64 bits as it is; None for everything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def at(value: object, path: Iterable[str]) -> Any:
    """The value under nested keys; None as soon as one is missing."""
    for key in path:
        value = value.get(key) if is_mapping(value) else None
    return value


def plain(value: object, depth: int = 6) -> Any:
    """A JSON-able copy: what is no plain value is shown as text, what is nested too deeply as an ellipsis."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == 0:
        return "…"
    if is_mapping(value):
        return {str(k): plain(v, depth - 1) for k, v in list(value.items())[:1_000]}
    if isinstance(value, list | tuple):
        return [plain(v, depth - 1) for v in value[:1_000]]
    return f"<{type(value).__name__}>"


def _numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        return ()
    return tuple(n for n in map(number, value) if n is not None)
