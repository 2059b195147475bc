"""What several processes agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def on_any_rank(trainer: Trainer, holds: bool) -> bool:
    """Whether something holds on any rank; to be asked by all of them.

    After an exception, which may be one rank's alone, nobody is waited for: each goes by itself.
    """
    if trainer.world_size == 1 or trainer.lightning_module._current_fx_name == "on_exception":
        return holds
    return bool(trainer.strategy.reduce_boolean_decision(holds, all=False))
