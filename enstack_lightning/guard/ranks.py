"""What several processes agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


T = TypeVar("T")


def after_exception(trainer: Trainer) -> bool:
    """Whether an exception is ending the run, which may be one rank's alone: then nobody must be waited for."""
    return trainer.lightning_module._current_fx_name == "on_exception"


def gathered(mine: T) -> list[T]:
    """What every rank gives, in the order of ranks; to be called by all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    of_all: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, mine)
    return of_all  # type: ignore[return-value]


def on_any_rank(trainer: Trainer, holds: bool) -> bool:
    """Whether something holds on any rank; to be asked by all of them. After an exception each goes by itself."""
    if trainer.world_size == 1 or after_exception(trainer):
        return holds
    return bool(trainer.strategy.reduce_boolean_decision(holds, all=False))
