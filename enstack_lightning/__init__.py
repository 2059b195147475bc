"""Checkpoint verification and safe resume for PyTorch Lightning.

The public names are imported on first use, so `import enstack_lightning` costs milliseconds and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CheckpointGuard": "enstack_lightning.guard",
    "RecoveryCheckpoint": "enstack_lightning.guard",
    "SampleLedger": "enstack_lightning.guard",
    "VulnerabilityClassifier": "enstack_lightning.model",
    "VulnerabilityDataModule": "enstack_lightning.data",
    "verify_checkpoint": "enstack_lightning.checkpoint",
    "quick_verify_checkpoint": "enstack_lightning.checkpoint",
    "find_last_good": "enstack_lightning.checkpoint",
    "EnStackError": "enstack_lightning.errors",
    "CheckpointError": "enstack_lightning.errors",
    "CheckpointGuardError": "enstack_lightning.errors",
    "CheckpointNotFoundError": "enstack_lightning.errors",
    "DataError": "enstack_lightning.errors",
    "ModelError": "enstack_lightning.errors",
}

__all__ = [
    "CheckpointError",
    "CheckpointGuard",
    "CheckpointGuardError",
    "CheckpointNotFoundError",
    "DataError",
    "EnStackError",
    "ModelError",
    "RecoveryCheckpoint",
    "SampleLedger",
    "VulnerabilityClassifier",
    "VulnerabilityDataModule",
    "__version__",
    "find_last_good",
    "quick_verify_checkpoint",
    "verify_checkpoint",
]

if TYPE_CHECKING:
    from enstack_lightning.checkpoint import find_last_good, quick_verify_checkpoint, verify_checkpoint
    from enstack_lightning.data import VulnerabilityDataModule
    from enstack_lightning.errors import (
        CheckpointError,
        CheckpointGuardError,
        CheckpointNotFoundError,
        DataError,
        EnStackError,
        ModelError,
    )
    from enstack_lightning.guard import CheckpointGuard, RecoveryCheckpoint, SampleLedger
    from enstack_lightning.model import VulnerabilityClassifier


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
