"""Options of torch's own layers that a run changes as it trains, such as a dropout that is lowered.

No state_dict has them, and a resumed run makes its layers as they were at the start.
"""

from __future__ import annotations

from typing import Any

from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.held_values import is_users, names_of_layers


def options_of(parts: Parts) -> dict[str, float]:
    """The options that are floats, by the path of the layer and their name; not those of metrics."""
    names: dict[type, list[str]] = {}
    found = {}
    for path, layer in parts.layers[1:]:
        kind, held = type(layer), vars(layer)
        if kind not in names:  # as the first of its kind has them: all of each layer take three times as long
            passed_over = is_users(kind) or "_defaults" in held
            names[kind] = [] if passed_over else [name for name in held if name not in names_of_layers()]
        for name in names[kind]:
            if type(value := held.get(name)) is float:
                found[f"{path}.{name}"] = value
    return found


def changed_options(parts: Parts, at_start: dict[str, float]) -> dict[str, list[float]]:
    """What options were at the start of the run and are now, of those that differ."""
    now = options_of(parts)
    return {name: [was, now[name]] for name, was in at_start.items() if now.get(name, was) != was}


def restore_options(parts: Parts, changed: dict[str, Any]) -> None:
    """Sets options to what they were at the save, where they began as they did then and not as a new setting has it."""
    layers = dict(parts.layers) if changed else {}
    for place, (was, then) in changed.items():
        path, _, name = place.rpartition(".")
        if path in layers and vars(layers[path]).get(name) == was and isinstance(then, float):
            setattr(layers[path], name, then)
