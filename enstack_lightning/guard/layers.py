"""A module's layers and parameters, gone through once for all who need them: a large module takes long."""

from __future__ import annotations

import torch

Layers = list[tuple[str, torch.nn.Module]]
"""A module and the layers in it, each once, by their paths."""


def layers_of(module: torch.nn.Module) -> Layers:
    """What `named_modules` gives."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    _add_layers("", module, found)
    return list(found.values())


def _add_layers(path: str, module: torch.nn.Module, found: dict[int, tuple[str, torch.nn.Module]]) -> None:
    found[id(module)] = path, module
    for name, layer in module._modules.items():
        if layer is not None and id(layer) not in found:
            _add_layers(f"{path}.{name}" if path else name, layer, found)


def parameters_of(layers: Layers) -> dict[str, torch.Tensor]:
    """What `named_parameters` gives: each by the first of its names."""
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for path, layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                named.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
    return dict(named.values())
