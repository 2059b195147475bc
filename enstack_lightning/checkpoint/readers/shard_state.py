"""The state dict of a sharded checkpoint, told into weights and optimizers.

Its layout is up to whoever saved it: Lightning has `state_dict` and `optimizer_0`, …, accelerate `model` and
`optimizer`, torchtitan weights at the top, torch's tutorial `app.model` and `app.optim`. An optimizer is known by its
`param_groups` and `state`; whatever tensors lie outside of one are weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.states import plain

_MODELS = ("state_dict", "model")
_SCHEDULERS = ("lr_scheduler", "lr_schedulers", "scheduler", "schedulers")
_STATE, _GROUPS = "state", "param_groups"


@dataclass
class ShardState:
    """What a sharded state dict holds.

    Attributes:
        weights: by name, without the name of the model's entry before it.
        optimizers: in the form of `Optimizer.state_dict()`, in the order of their entries' names.
        schedulers: in the form of `LRScheduler.state_dict()`.
    """

    weights: dict[str, TensorDescriptor] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[Mapping[str, Any]] = field(default_factory=list)


def shard_state(state: Mapping[str, Any]) -> ShardState:
    """The weights and optimizers of a state dict as it was before it was sharded."""
    found = ShardState()
    for path, value in _walk(state, ()):
        optimizer = _optimizer(value)
        if optimizer is not None:
            found.optimizers.append(optimizer)
        elif isinstance(value, TensorDescriptor):
            found.weights[_weight_name(path)] = value
        elif is_mapping(value) and path and path[-1] in _SCHEDULERS and "last_epoch" in value:
            found.schedulers.append(value)
    return found


def _walk(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value with its path, containers before what they hold; nothing within an optimizer."""
    waiting: list[tuple[tuple[str, ...], object]] = [(path, value)]
    while waiting:
        at, value = waiting.pop()
        yield at, value
        if _optimizer_form(value):
            continue
        if is_mapping(value):
            waiting += [((*at, str(key)), inner) for key, inner in reversed(_in_order(value))]
        elif isinstance(value, list):
            waiting += [((*at, str(i)), inner) for i, inner in reversed(list(enumerate(value)))]


def _in_order(value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Entries as they were saved, but `optimizer_2` before `optimizer_10`, wherever their shards lie."""
    numbered = [k for k in value if isinstance(k, str) and k.rpartition("_")[2].isdigit()]
    places = iter(sorted(numbered, key=lambda k: (k.rpartition("_")[0], int(k.rpartition("_")[2][:9]))))
    return [(key, value[key]) for key in (next(places) if k in set(numbered) else k for k in value)]


def _weight_name(path: tuple[str, ...]) -> str:
    for i, key in enumerate(path[:-1]):
        if key in _MODELS:
            return ".".join(path[i + 1 :])
    return ".".join(path)


def _optimizer_form(value: object) -> str:
    """`nested` for `Optimizer.state_dict()`, `flat` for the same with names such as `state.layer.weight.step`."""
    if not is_mapping(value):
        return ""
    if _GROUPS in value:
        return "nested"
    flat = any(isinstance(key, str) and key.startswith(f"{_GROUPS}.") for key in value)
    return "flat" if flat else ""


def _optimizer(value: object) -> dict[str, Any] | None:
    form = _optimizer_form(value)
    if not form or not is_mapping(value):
        return None
    entry = _unflattened(value) if form == "flat" else {**value}
    entry.setdefault(_STATE, {})  # an optimizer that keeps none, such as SGD, leaves nothing to store
    ids = [p for group in entry[_GROUPS] if is_mapping(group) for p in _params(group)] \
        if isinstance(entry[_GROUPS], list) else []  # fmt: skip
    states = entry[_STATE]
    if isinstance(states, list):
        entry[_STATE] = dict(enumerate(states))
    elif is_mapping(states) and ids and all(type(p) is int for p in ids):
        # Numbers of parameters have become text as parts of names.
        entry[_STATE] = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in states.items()}
    return entry


def _params(group: Mapping[str, Any]) -> list[Any]:
    params = group.get("params")
    return params if isinstance(params, list) else []


def _unflattened(value: Mapping[Any, Any]) -> dict[str, Any]:
    """`state.NAME.ENTRY` and `param_groups.NAME.OPTION`, each parameter's options of its own, as groups again."""
    states: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, inner in value.items():
        kind, _, rest = str(key).partition(".")
        name, _, entry = rest.rpartition(".")
        if kind == _STATE and name:
            states.setdefault(name, {})[entry] = inner
        elif kind == _GROUPS and name:
            options.setdefault(name, {})[entry] = inner
    groups: dict[str, dict[str, Any]] = {}
    for name, kept in options.items():
        group = groups.setdefault(repr(plain(kept)), {**kept, "params": []})
        group["params"].append(name)
    return {_STATE: states, _GROUPS: list(groups.values())}
