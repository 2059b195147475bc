"""Optimizer steps that no counter of Lightning sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from enstack_lightning.guard.live import most_steps

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def uncounted_steps(trainer: Trainer) -> str | None:
    """The sentence that says so, where optimizers have stepped and `global_step` is still 0; else None.

    Manual optimization counts the steps of the optimizers that `self.optimizers()` returns. Past these nothing counts,
    and `ModelCheckpoint` saves nothing, since it saves once a step
    (https://github.com/Lightning-AI/pytorch-lightning/issues/17281).
    """
    steps = most_steps(trainer) if trainer.global_step == 0 else 0
    if not steps:
        return None
    return (
        f"{steps:,} optimizer steps are done and global_step is 0: ModelCheckpoint will save nothing, and a resume "
        "would not know where it is. Step what self.optimizers() returns, without use_pl_optimizer=False."
    )
