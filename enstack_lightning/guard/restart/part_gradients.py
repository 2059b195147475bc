"""Gradients of an accumulation window that a checkpoint was saved inside.

Lightning saves no gradients, so that after a resume the window would be stepped with those of its last batches only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies that keep every parameter whole in each process."""


def inside_a_window(trainer: Trainer) -> bool:
    """Whether gradients are waiting for the rest of their accumulation window, at a batch's end."""
    return bool(trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())


def capture_gradients(trainer: Trainer) -> dict[str, Tensor] | None:
    """This process's gradients by parameter name; None where the strategy shards them."""
    if type(trainer.strategy).__name__ not in _WHOLE:
        return None
    return {n: p.grad.detach() for n, p in trainer.lightning_module.named_parameters() if p.grad is not None}


def restore_gradients(trainer: Trainer, gradients: dict[str, Tensor]) -> None:
    """Sets the gradients of the parameters that are named."""
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype, copy=True)
