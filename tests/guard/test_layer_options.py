"""Which options of layers are kept, and where they are set again; `test_exact_modules` has the runs that need them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torchmetrics.classification import BinaryAccuracy

from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.layer_options import changed_options, options_of, restore_options


class Own(nn.Dropout):
    """Of the user's code, whose attributes are looked at elsewhere."""


def layers(rate: float = 0.3) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate), nn.Sequential(nn.LeakyReLU(0.1)), Own(0.3))
    module.add_module("metric", BinaryAccuracy(threshold=0.4))
    return module


def test_options_are_the_floats_of_layers_that_are_neither_the_users_nor_metrics() -> None:
    assert options_of(Parts(layers())) == {"1.p": 0.3, "2.0.negative_slope": 0.1}
    assert options_of(Parts(nn.Sequential(nn.Dropout(0), nn.Dropout(0.3)))) == {"1.p": 0.3}


def test_only_what_differs_and_is_there_still_is_saved() -> None:
    module = layers()
    at_start = options_of(Parts(module))
    assert changed_options(Parts(module), at_start) == {}
    module[1].p = 0.2
    module[2] = nn.Identity()
    assert changed_options(Parts(module), at_start) == {"1.p": [0.3, 0.2]}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"1.p": [0.3, 0.2]}, 0.2),
        ({"1.p": [0.5, 0.2]}, 0.3),
        ({"1.p": [0.3, "0.2"]}, 0.3),
        ({"9.p": [0.3, 0.2], "1.other": [0.3, 0.2], "1.p": [0.3, 0.2]}, 0.2),
    ],
    ids=["as it began", "set anew", "no number", "not there"],
)
def test_an_option_is_set_where_it_began_as_it_did_then(changed: dict[str, Any], expected: float) -> None:
    module = layers()
    restore_options(Parts(module), changed)
    assert module[1].p == expected
    assert not hasattr(module[1], "other")
