"""What a module is made of, against what torch's own functions say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from enstack_lightning.guard.parts import Parts


def shared_layer() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.ModuleDict({"first": layer, "again": layer, "inner": nn.Sequential(nn.Flatten(), layer)})


def tied_weights() -> nn.Module:
    module = nn.Sequential(nn.Sequential(nn.Embedding(3, 2)), nn.Linear(2, 3))
    module[1].weight = module[0][0].weight
    return module


def without_some() -> nn.Module:
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False))
    module.register_module("none", None)
    module.register_parameter("missing", None)
    module.register_parameter("own", nn.Parameter(torch.ones(1)))
    return module


def within_itself() -> nn.Module:
    module = nn.Sequential(nn.Linear(1, 1))
    module.add_module("again", module)
    return module


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), nn.ReLU())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [shared_layer, tied_weights, without_some, within_itself, scripted])
def test_layers_and_parameters_are_those_of_torch_in_its_order(made: Callable[[], nn.Module]) -> None:
    module = made()
    parts = Parts(module)
    assert [(path, id(layer)) for path, layer in parts.layers] == [(n, id(m)) for n, m in module.named_modules()]
    assert [(n, p.shape) for n, p in parts.parameters.items()] == [(n, p.shape) for n, p in module.named_parameters()]
