"""`RecoveryCheckpoint`: a checkpoint inside the epoch, for the time between two checkpoints of an epoch's end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.guard.flavor import ModelCheckpoint, is_model_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


RECOVERY_NAME = "recovery_checkpoint"


class RecoveryCheckpoint(ModelCheckpoint):
    """Saves every N optimizer steps under one name, and removes the file once a younger checkpoint stands.

    Put it after the other checkpoint callbacks: at an epoch's end they save first, and only then is the recovery
    checkpoint removed.

    Args:
        dirpath: folder to save in; None for the run's own.
        filename: name of the file, without its suffix.
        every_n_train_steps: optimizer steps between two saves.

    Example:
        >>> RecoveryCheckpoint(every_n_train_steps=100).filename
        'recovery_checkpoint'
    """

    def __init__(
        self, dirpath: str | None = None, filename: str = RECOVERY_NAME, every_n_train_steps: int = 500
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,  # one name, also over the file of a run before
        )

    def about_to_save(self, trainer: Trainer) -> str:
        """Takes note of a save outside its turn, before it is made; returns the path to save to."""
        self.best_model_path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        self._last_global_step_saved = trainer.global_step
        return self.best_model_path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        path = self.best_model_path
        if path and trainer.is_global_zero and self._superseded(trainer, Path(path)):
            trainer.strategy.remove_checkpoint(path)

    def _superseded(self, trainer: Trainer, path: Path) -> bool:
        """Whether another callback has saved since; a checkpoint is never removed before its successor stands."""
        others = [c for c in trainer.checkpoint_callbacks if is_model_checkpoint(c) and c is not self]
        saved = [Path(p) for c in others for p in (c.best_model_path, c.last_model_path) if p]
        return path.is_file() and any(p.is_file() and p.stat().st_mtime >= path.stat().st_mtime for p in saved)
