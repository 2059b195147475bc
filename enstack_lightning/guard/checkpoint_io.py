"""The CheckpointIO that the guard puts around a strategy's own: every path is verified before it is deserialised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO


class GuardedCheckpointIO(CheckpointIO):
    """Hands everything on to `checkpoint_io`, after `verify(path)` has let a load pass.

    Args:
        checkpoint_io: the CheckpointIO that reads and writes.
        verify: called with each path that is about to be loaded; raises to refuse it.
    """

    def __init__(self, checkpoint_io: CheckpointIO, verify: Callable[[str], None]) -> None:
        self.checkpoint_io = checkpoint_io
        self.verify = verify

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.verify(str(path))
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        self.checkpoint_io.teardown()
