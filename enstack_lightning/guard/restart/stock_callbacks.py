"""What Lightning's own callbacks need of a restart, where what they save of themselves is not enough.

Inside an epoch Lightning calls no `on_train_epoch_start`, in which some of them set what holds for the whole epoch. A
search for a learning rate or a batch size runs again at each start, and leaves a resumed run with its counters at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from enstack_lightning.guard.flavor import inherits, is_a, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_SEARCHES = ("LearningRateFinder", "BatchSizeFinder")


def begin_epoch_in_callbacks(trainer: Trainer, inside: bool) -> None:
    """Lets callbacks set what they set when an epoch begins.

    Args:
        trainer: a Trainer at its start, whose loops are restored.
        inside: whether the restart is inside an epoch.
    """
    for callback in _callbacks(trainer):
        if is_a(callback, "StochasticWeightAveraging"):
            if is_in_last_pass(trainer, callback):
                _begin_last_pass(trainer, callback, inside)
            elif callback._scheduler_state is not None and trainer.current_epoch <= callback.swa_end:
                _begin_averaging(trainer, callback)
        elif inside and begins_epoch_anew(trainer, callback):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


def begins_epoch_anew(trainer: Trainer, callback: Any) -> bool:
    """Whether a callback's `on_train_epoch_start` is called at a restart inside an epoch, as at the epoch's start."""
    stock = ("GradientAccumulationScheduler", "StochasticWeightAveraging")
    return callback is trainer.progress_bar_callback or any(is_a(callback, name) for name in stock)


def _begin_averaging(trainer: Trainer, callback: Any) -> None:
    """Making SWA's scheduler sets learning rates, which the optimizer has from the checkpoint already."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    callback.on_train_epoch_start(trainer, trainer.lightning_module)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


# The pass after SWA's last epoch, in which statistics of BatchNorm are renewed and no step is made


def is_in_last_pass(trainer: Trainer, callback: Any) -> bool:
    """Whether the Trainer's epoch is the one that SWA adds; to be asked when training has started."""
    return bool(callback._max_epochs != -1 and trainer.current_epoch == callback.swa_end + 1)


def epochs_to_train(trainer: Trainer) -> int | None:
    """`max_epochs` with the pass that SWA is going to add to it at `on_fit_start`."""
    adds = any(
        is_a(callback, "StochasticWeightAveraging")
        and callback._model_contains_batch_norm is None
        and callback.pl_module_contains_batch_norm(trainer.lightning_module)
        for callback in _callbacks(trainer)
    )
    epochs = trainer.max_epochs
    return epochs + 1 if adds and epochs is not None and epochs >= 0 else epochs


def _begin_last_pass(trainer: Trainer, callback: Any, inside: bool) -> None:
    """What SWA has by then, and inside the pass what it sets for it; statistics stay as far as they were renewed."""
    if callback._scheduler_state is not None:  # its scheduler is made in the epochs of averaging only
        end, updated = callback._max_epochs, callback._latest_update_epoch
        callback._max_epochs, callback._latest_update_epoch = end + 1, trainer.current_epoch
        _begin_averaging(trainer, callback)
        callback._max_epochs, callback._latest_update_epoch = end, updated
    if inside:
        kept = {name: tensor.clone() for name, tensor in _statistics(trainer.lightning_module)}
        callback.on_train_epoch_start(trainer, trainer.lightning_module)
        for name, tensor in _statistics(trainer.lightning_module):
            tensor.copy_(kept[name])


def _statistics(module: LightningModule) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield from ((f"{name}.{buffer}", tensor) for buffer, tensor in layer.named_buffers(recurse=False))


# What BaseFinetuning has unfrozen


def capture_frozen(trainer: Trainer) -> dict[str, list[str]] | None:
    """The names of frozen parameters and of layers that keep no statistics; None where no callback unfreezes any."""
    if not any(is_a(callback, "BaseFinetuning") for callback in _callbacks(trainer)):
        return None
    module = trainer.lightning_module
    layers = (
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not layer.track_running_stats
    )
    return {"parameters": [n for n, p in module.named_parameters() if not p.requires_grad], "layers": list(layers)}


def restore_frozen(trainer: Trainer, frozen: dict[str, list[str]] | None) -> None:
    """Freezes and unfreezes as it was saved; Lightning's callback has frozen what it begins with, and leaves it so."""
    if frozen is None or not any(is_a(callback, "BaseFinetuning") for callback in _callbacks(trainer)):
        return
    module = trainer.lightning_module
    for name, parameter in module.named_parameters():
        parameter.requires_grad = name not in frozen["parameters"]
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = name not in frozen["layers"]


# Searches


def skip_searches(trainer: Trainer, batch_size: object) -> Callable[[], None]:
    """Lets no search run at the start of a resumed fit, for what it found is in the checkpoint.

    Args:
        trainer: a Trainer that has loaded a checkpoint, before `on_fit_start`.
        batch_size: of the run that saved; what BatchSizeFinder would have set is set to it.

    Returns:
        Gives the callbacks their own method back.
    """
    skipped = []
    for callback in _callbacks(trainer):
        for name in _SEARCHES:
            if inherits(callback, name, "on_fit_start"):
                callback.on_fit_start = _Skipped(name, getattr(callback, "_batch_arg_name", None), batch_size)
                skipped.append(callback)

    def give_back() -> None:
        for callback in skipped:
            vars(callback).pop("on_fit_start", None)

    return give_back


def found_by_searches(trainer: Trainer) -> set[str]:
    """Attributes of the module that a search for a learning rate sets: the optimizers have it from the checkpoint."""
    found: set[str] = set()
    for callback in _callbacks(trainer):
        if is_a(callback, "LearningRateFinder"):
            found |= {"lr", "learning_rate", str(getattr(callback, "_attr_name", ""))}
    return found


class _Skipped:
    """In place of a search."""

    def __init__(self, name: str, attribute: str | None, batch_size: object) -> None:
        self.name, self.attribute, self.batch_size = name, attribute, batch_size

    def __call__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        what = "learning rate"
        if self.attribute is not None:
            what = "batch size"
            self._set_batch_size(trainer, pl_module, self.attribute)
        rank_zero_warn(
            f"CheckpointGuard: {self.name} does not search again in a resumed run, which would begin at step 0 after "
            f"it: the {what} is that of the checkpoint. Take the callback out to be rid of this line"
        )

    def _set_batch_size(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        if not isinstance(self.batch_size, int):
            return
        for owner in (module, getattr(module, "hparams", None), getattr(trainer, "datamodule", None)):
            if isinstance(owner, dict) and name in owner:
                owner[name] = self.batch_size
            elif owner is not None and hasattr(owner, name):
                setattr(owner, name, self.batch_size)


# What is lost all the same


def lost_by_callbacks(trainer: Trainer) -> list[str]:
    """What Lightning's callbacks do not save of themselves, so that a resumed run need not equal the other one."""
    lost = []
    for callback in _callbacks(trainer):
        if is_a(callback, "ModelPruning"):
            lost.append("ModelPruning saves no masks: until it prunes again, pruned weights are trained")
        elif is_a(callback, "Timer") and getattr(callback, "_duration", None) is not None:
            lost.append("Timer ends the run by the clock, and not after a certain step")
    return lost


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]
