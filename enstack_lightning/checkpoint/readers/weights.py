"""The weights of a folder: one file or shards with an index, in safetensors or in torch's own format."""

from __future__ import annotations

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.location import Location


def add_weights(facts: Facts, folder: Location, deep: DeepRead | None = None) -> Facts:
    """The facts with the folder's weights added; what cannot be read or believed becomes a defect."""
    raise NotImplementedError
