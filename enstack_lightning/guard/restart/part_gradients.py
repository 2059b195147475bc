"""Gradients that wait for a later step when a checkpoint is saved: of an accumulation window that it was saved inside.

Lightning saves no gradients, so that after a resume the window would be stepped with those of its last batches only.
Under manual optimization the module alone knows its windows; there, gradients wait that no step has used yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies that keep every parameter whole in each process."""

BATCH_DONE = ("batch_end", "batch_end_failed", "validation_end", "after_batch")
"""The moments of a save inside an epoch at which the step of its last batch is done."""


def watch_steps(trainer: Trainer) -> Callable[[], None]:
    """Under manual optimization lets each step mark the gradients that it has used.

    What a step leaves is cleared by the module before it gathers anew, and need not be saved, being as large as the
    model.

    Args:
        trainer: a Trainer that is about to train.

    Returns:
        Ends the watch.
    """
    watched = [] if trainer.lightning_module.automatic_optimization else trainer.optimizers
    handles = [o.register_step_post_hook(_mark_used) for o in watched if hasattr(o, "register_step_post_hook")]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def _mark_used(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                gradient._used_at = gradient._version


def gradients_wait(trainer: Trainer, point: str) -> bool:
    """Whether gradients are waiting for a later step, at the moment of a save."""
    if trainer.lightning_module.automatic_optimization:
        return point in BATCH_DONE and trainer.fit_loop._should_accumulate()
    return point not in ("in_step", "elsewhere") and bool(_waiting(trainer))


def capture_gradients(trainer: Trainer) -> dict[str, Tensor] | None:
    """This process's waiting gradients by parameter name; None where the strategy shards them."""
    if type(trainer.strategy).__name__ not in _WHOLE:
        return None
    return {name: gradient.detach() for name, gradient in _waiting(trainer).items()}


def _waiting(trainer: Trainer) -> dict[str, Tensor]:
    """Gradients that no step has used as they are: an unused one has no mark, one that grew since has an older one."""
    module = trainer.lightning_module
    gradients = ((name, p, p.grad) for name, p in module.named_parameters() if p.grad is not None)
    if module.automatic_optimization:
        return {name: gradient for name, _, gradient in gradients}
    stepped = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return {n: g for n, p, g in gradients if id(p) in stepped and getattr(g, "_used_at", None) != g._version}


def restore_gradients(trainer: Trainer, gradients: dict[str, Tensor]) -> None:
    """Sets the gradients of the parameters that are named."""
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype, copy=True)
