"""A module's layers and parameters, gone through once for all who need them: a large module takes long."""

from __future__ import annotations

from functools import cached_property

import torch


class Parts:
    """What a module is made of, as it is when it is first asked for."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    @cached_property
    def layers(self) -> list[tuple[str, torch.nn.Module]]:
        """The module and the layers in it by their paths, as `named_modules` gives them."""
        found: dict[int, tuple[str, torch.nn.Module]] = {}
        _add_layers("", self._module, found)
        return list(found.values())

    @cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """By name, as `named_parameters` gives them: each by the first of its names."""
        named: dict[int, tuple[str, torch.Tensor]] = {}
        for path, layer in self.layers:
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    named.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
        return dict(named.values())


def _add_layers(path: str, module: torch.nn.Module, found: dict[int, tuple[str, torch.nn.Module]]) -> None:
    found[id(module)] = path, module
    for name, layer in module._modules.items():
        if layer is not None and id(layer) not in found:
            _add_layers(f"{path}.{name}" if path else name, layer, found)
