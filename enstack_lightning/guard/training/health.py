"""What the guard does while a model trains, beside saving: one call for each hook of the callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard.training.nonfinite import NonfiniteWatch, OnNonfinite
from enstack_lightning.guard.training.preemption import Preemption
from enstack_lightning.guard.training.sound_saves import SoundSaves

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO


class Health:
    """Losses, gradients and weights that are not finite; signals that end the process.

    Args:
        on_nonfinite: see `CheckpointGuard`.
        save_on_signal: see `CheckpointGuard`.
        key: the guard's key among the callbacks of a checkpoint.

    Raises:
        CheckpointGuardError: `on_nonfinite` is not one of the three.
    """

    def __init__(self, on_nonfinite: OnNonfinite, save_on_signal: bool, key: str) -> None:
        if on_nonfinite not in get_args(OnNonfinite):
            wanted = ", ".join(get_args(OnNonfinite))
            raise CheckpointGuardError(f"on_nonfinite is {on_nonfinite!r} and must be one of {wanted}")
        self.watch = NonfiniteWatch(on_nonfinite)
        self.saves = SoundSaves()
        self.preemption = Preemption(save_on_signal, key)

    def anew(self) -> Health:
        """The same settings, before any Trainer."""
        return Health(self.watch.action, self.preemption.enabled, self.preemption.key)

    def start(self, trainer: Trainer, checkpoint_io: GuardedCheckpointIO | None) -> None:
        """`on_train_start`, with everything restored."""
        self.watch.start()
        if self.watch.action != "ignore":
            self.saves.start(trainer)
            if checkpoint_io is not None:
                checkpoint_io.place_for = self.saves.place_for
        self.preemption.start(trainer)

    def before_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """`on_before_backward`."""
        self.watch.loss(trainer, loss)

    def before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """`on_before_optimizer_step`."""
        self.saves.before_step()
        self.watch.gradients(trainer, module, optimizer)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """`on_train_batch_end`."""
        self.watch.batch_end(trainer, module, outputs)
        self.preemption.batch_end(trainer)

    def validation_batch_end(self, trainer: Trainer) -> None:
        """`on_validation_batch_end`."""
        self.preemption.validation_batch_end(trainer)

    def train_end(self, trainer: Trainer) -> None:
        """`on_train_end`."""
        self.preemption.train_end(trainer)

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """`on_train_epoch_end`, and before a checkpoint is saved."""
        self.watch.look(trainer, module)

    def exception(self) -> None:
        """`on_exception`, after which other callbacks may still save."""
        self.preemption.stop()

    def stop(self) -> None:
        """`teardown`."""
        self.preemption.stop()
        self.saves.stop()
