"""Lightning by the name that the user imports: `lightning.pytorch` or `pytorch_lightning`, one code in two packages.

A class of one is no class of the other. One guard serves both: what it derives from is made here of every flavor that
is imported, and what it meets is told by its name (`is_a`). No other module of the guard imports Lightning at run time.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeGuard

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.plugins.io import CheckpointIO

__all__ = [
    "FITTING",
    "Callback",
    "CheckpointIO",
    "ModelCheckpoint",
    "checkpoint_dirpaths",
    "inherits",
    "is_a",
    "is_just",
    "is_model_checkpoint",
    "join_imported_flavors",
    "lightning_base",
    "lightning_version",
    "rank_zero_info",
    "rank_zero_warn",
]

FITTING = "fit"
"""`TrainerFn.FITTING`, as which both flavors' enums compare."""

_PYTORCH = ("lightning.pytorch", "pytorch_lightning")
_PACKAGES = ("lightning.", "pytorch_lightning.", "lightning_fabric.")
_HOMES = {"Callback": "callbacks", "CheckpointIO": "plugins.io"}


def imported_flavors() -> list[str]:
    """The flavors that this process has imported; the installed one where it has none yet."""
    found = [name for name in _PYTORCH if name in sys.modules]
    return found or [_PYTORCH[0] if importlib.util.find_spec("lightning") else _PYTORCH[1]]


def lightning_version() -> str:
    """The version of Lightning that is in use."""
    return str(import_module(imported_flavors()[0]).__version__)


def is_a(thing: object, name: str) -> bool:
    """Whether a thing is of Lightning's class of this name, or of one derived from it.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> is_a(EarlyStopping("loss"), "EarlyStopping"), is_a(EarlyStopping("loss"), "ModelCheckpoint")
        (True, False)
    """
    return lightning_base(thing, name) is not None


def is_just(thing: object, name: str) -> bool:
    """Whether a thing is of Lightning's class of this name itself."""
    return lightning_base(thing, name) is type(thing)


def inherits(thing: object, name: str, method: str) -> bool:
    """Whether a thing's class has a method as Lightning's class of this name has it, from which it derives.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> [inherits(EarlyStopping("loss"), "Callback", method) for method in ("setup", "teardown")]
        [False, True]
    """
    base = lightning_base(thing, name)
    return base is not None and getattr(type(thing), method, None) is getattr(base, method, None)


def is_model_checkpoint(callback: object) -> TypeGuard[ModelCheckpoint]:
    """Whether a callback is a `ModelCheckpoint`."""
    return is_a(callback, "ModelCheckpoint")


def checkpoint_dirpaths(trainer: Any) -> list[str]:
    """The folders, or URLs of folders, that a Trainer's `ModelCheckpoint` callbacks save to; each once."""
    callbacks = (callback for callback in trainer.checkpoint_callbacks if is_model_checkpoint(callback))
    return list(dict.fromkeys(str(callback.dirpath) for callback in callbacks if callback.dirpath))


def lightning_base(thing: object, name: str) -> Any:
    """The class of this name, of Lightning's own, that a thing's class is or derives from; None where there is none."""
    own = (c for c in thing.__class__.__mro__ if c.__name__ == name and c.__module__.startswith(_PACKAGES))
    return next(own, None)


def join_imported_flavors() -> None:
    """Lets `Callback` and `CheckpointIO` be those of every flavor imported by now."""
    for base in (Callback, CheckpointIO) if not TYPE_CHECKING else ():
        bases = _bases(base.__name__)
        if base.__bases__ != bases:
            base.__bases__ = bases


def _bases(name: str) -> tuple[Any, ...]:
    return tuple(getattr(import_module(f"{flavor}.{_HOMES[name]}"), name) for flavor in imported_flavors())


if not TYPE_CHECKING:

    class Callback(*_bases("Callback")):
        """A callback of every flavor."""

    class CheckpointIO(*_bases("CheckpointIO")):
        """A CheckpointIO of every flavor."""

    ModelCheckpoint = import_module(f"{imported_flavors()[0]}.callbacks").ModelCheckpoint
