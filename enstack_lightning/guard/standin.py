"""What stands in for the guard until it is known whether the Trainer has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enstack_lightning.guard.callback import CheckpointGuard
from enstack_lightning.guard.flavor import Callback, join_imported_flavors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class EnvironmentGuard(Callback):
    """Becomes a `CheckpointGuard` in a Trainer that has none; else does nothing.

    The guards of the user are known only when the run begins: those of the model come last (`configure_callbacks`), and
    two of them at once are an error of the Trainer.

    Args:
        settings: the arguments of the guard.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        join_imported_flavors()
        super().__init__()
        self._settings_of_guard = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, CheckpointGuard) for callback in callbacks):
            settings = self._settings_of_guard
            guard: Any = self  # the same object: the Trainer is going through its list of callbacks
            guard.__class__ = CheckpointGuard
            guard.__init__(**settings)
            guard.setup(trainer, pl_module, stage)
