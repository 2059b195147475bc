"""`CheckpointGuard`: the rules of the checkpoint core, called at the right moments of any Lightning Trainer."""

from __future__ import annotations

from enstack_lightning.guard.callback import CheckpointGuard
from enstack_lightning.guard.recovery import RecoveryCheckpoint

__all__ = ["CheckpointGuard", "RecoveryCheckpoint"]
