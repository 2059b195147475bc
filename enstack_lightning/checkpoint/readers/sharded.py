"""The folder of `torch.distributed.checkpoint`, and Lightning's form of it with `meta.pt` beside the shards."""

from __future__ import annotations

from collections.abc import Collection

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.location import Location


def is_sharded_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it holds a sharded checkpoint, or what is left of one."""
    return any(n in (".metadata", ".metadata.tmp") or n.endswith((".distcp", ".metadata")) for n in names)


def read_sharded(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of a sharded folder; what cannot be read becomes a defect."""
    raise NotImplementedError
