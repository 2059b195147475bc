"""The package's exceptions: one small family, imported by every room.

Each message is one or more sentences that say what is wrong, where, with the numbers, and what to do next.
The command line prints the message of an `EnStackError` without a traceback and ends with status 1.
"""

from __future__ import annotations


class EnStackError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(EnStackError, ValueError):
    """A checkpoint cannot be used for what was asked of it."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint stands at the path that was named."""


class CheckpointGuardError(EnStackError):
    """`CheckpointGuard` stopped a run before it could do harm."""


class CheckpointToLoadNotFoundError(CheckpointGuardError, CheckpointNotFoundError):
    """No checkpoint stands at the path that a guarded Trainer was to load."""


class CheckpointSaveError(CheckpointGuardError, OSError):
    """A checkpoint was not saved; the one that stood there before is untouched.

    Args:
        message: what was not saved, why, and what still stands.
        errno: the system's number for it, where the system refused.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class DataError(EnStackError, ValueError):
    """A data file, a column or a row is not what training needs."""


class ModelError(EnStackError):
    """A model cannot be built or loaded as configured."""
