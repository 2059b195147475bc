"""`RecoveryCheckpoint`: a checkpoint inside the epoch, for the time between two checkpoints of an epoch's end."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.checkpoint.location import LocalLocation, Location, locate
from enstack_lightning.guard.flavor import ModelCheckpoint, is_model_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


RECOVERY_NAME = "recovery_checkpoint"


def recovery_path(trainer: Trainer, plain: str, known: str = "") -> str:
    """Where a run saves its recovery checkpoint: over its own, and beside what an earlier run left.

    A run that starts anew takes the next free name, as Lightning does for other checkpoints. One that was resumed from
    a checkpoint of the folder goes on with its own file: the one that its state names, the one that it was resumed
    from, or else the first that is younger than that.

    Args:
        plain: the path without a version.
        known: the path that the state of the run names; empty where it names none.
    """
    place = locate(plain)
    names = recovery_names(place)
    name = _own(trainer, place, names, known)
    stem, suffix = _parts(place)
    version = 0
    while not name:
        free = f"{stem}-v{version}{suffix}" if version else place.name
        name = "" if free in names or place.parent.child(free).exists() else free
        version += 1
    return plain.removesuffix(place.name) + name


def recovery_names(place: Location) -> list[str]:
    """The recovery checkpoints in the folder of `place`, which is named without a version; those without come first."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # where there is no folder yet
        names = [name for name in place.parent.names() if name.startswith(_parts(place)[0])]
    if not names:
        return []  # as in most folders, and without a pattern, which takes longer to make than to use
    versions = _versions(place)
    found = [(int(m[1] or 0), name) for name in names if (m := versions.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _versions(place: Location) -> re.Pattern[str]:
    stem, suffix = _parts(place)
    return re.compile(rf"{re.escape(stem)}(?:-v([1-9]\d{{0,8}}))?{re.escape(suffix)}")


def _parts(place: Location) -> tuple[str, str]:
    return Path(place.name).stem, Path(place.name).suffix


def _own(trainer: Trainer, place: Location, names: list[str], known: str) -> str:
    """The name of the recovery checkpoint that the run itself has saved before; empty where there is none."""
    loaded = locate(trainer.ckpt_path) if trainer.ckpt_path else None
    is_resumed = loaded is not None and _same_folder(loaded, place)
    if known and (is_resumed or _same_folder(locate(known), place)) and _versions(place).fullmatch(locate(known).name):
        return locate(known).name
    if loaded is None or not is_resumed or _versions(place).fullmatch(loaded.name):
        return loaded.name if loaded is not None and is_resumed else ""
    with contextlib.suppress(OSError):
        began = loaded.modified()
        return next((name for name in names if 0 < began <= place.parent.child(name).modified()), "")
    return ""


def _same_folder(one: Location, other: Location) -> bool:
    if isinstance(one, LocalLocation) and isinstance(other, LocalLocation):
        return os.path.realpath(one.path.parent) == os.path.realpath(other.path.parent)
    return str(one.parent).rstrip("/") == str(other.parent).rstrip("/")


class RecoveryCheckpoint(ModelCheckpoint):
    """Saves every N optimizer steps under one name, and removes the file once a younger checkpoint stands.

    What an earlier run left under this name stays: a run that starts anew takes the next free one, `NAME-v1.ckpt`, and
    a run that is resumed goes on with its own.

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
        )
        self._path = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._path, known = "", self.best_model_path
        if self.filename and "{" not in self.filename:  # else each save has a name of its own
            plain = self.format_checkpoint_name({})
            path = recovery_path(trainer, plain, known) if trainer.is_global_zero else ""
            self._path = trainer.strategy.broadcast(path)
        if Path(known).parent != Path(str(self.dirpath)):  # the folder has moved, or is another run's, which keeps it
            self.best_model_path = self._path if Path(known).name == Path(self._path).name else ""

    def about_to_save(self, trainer: Trainer) -> str:
        """Takes note of a save outside its turn, before it is made; returns the path to save to."""
        candidates = self._monitor_candidates(trainer)
        self.best_model_path = self._get_metric_interpolated_filepath_name(candidates, trainer, self.best_model_path)
        self._last_global_step_saved = trainer.global_step
        return self.best_model_path

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Trainer, del_filepath: str | None = None
    ) -> str:
        return self._path or super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer, del_filepath)

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
