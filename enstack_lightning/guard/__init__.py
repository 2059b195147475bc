"""`CheckpointGuard`: the rules of the checkpoint core, called at the right moments of any Lightning Trainer."""

from __future__ import annotations

from enstack_lightning.guard.callback import CheckpointGuard

__all__ = ["CheckpointGuard"]
