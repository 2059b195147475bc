"""`CheckpointGuard`: the rules of the checkpoint core, called at the right moments of any Lightning Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enstack_lightning.guard.callback import CheckpointGuard
    from enstack_lightning.guard.ledger import SampleLedger
    from enstack_lightning.guard.recovery import RecoveryCheckpoint

__all__ = ["CheckpointGuard", "RecoveryCheckpoint", "SampleLedger"]

_HOMES = {
    "CheckpointGuard": "enstack_lightning.guard.callback",
    "RecoveryCheckpoint": "enstack_lightning.guard.recovery",
    "SampleLedger": "enstack_lightning.guard.ledger",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `everywhere` is imported at every Trainer of the environment, and is off by default.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
