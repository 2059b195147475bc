"""The folders of transformers: a model, or a checkpoint of its Trainer."""

from __future__ import annotations

from collections.abc import Collection

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.location import Location


def is_huggingface_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it holds a model or a checkpoint of transformers."""
    raise NotImplementedError


def read_huggingface(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of a folder of transformers; what cannot be read becomes a defect."""
    raise NotImplementedError
