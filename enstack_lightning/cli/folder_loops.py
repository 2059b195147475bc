"""The loop counters of a Lightning checkpoint that stands between two epochs, for a folder that counts epochs alone."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Trainer

from enstack_lightning.guard.loading.lost_loops import Counters, loops_with


def loops_at_epoch_end(
    epochs: int, batches: int, steps: int, steps_in_epoch: int, scheduler_steps: int
) -> dict[str, Any]:
    """The entry `loops` after so many whole epochs.

    Args:
        epochs: complete epochs.
        batches: in an epoch.
        steps: of the optimizer, in the whole run.
        steps_in_epoch: of the optimizer, in the last epoch.
        scheduler_steps: of the scheduler, in the whole run.
    """
    counters = Counters(epochs, batches, steps, steps_in_epoch, scheduler_steps)
    loops = loops_with(counters, _idle_trainer())
    for progress in loops["fit_loop"]["epoch_progress"].values():
        progress["completed"] = epochs
    return loops


def _idle_trainer() -> Trainer:
    """A Trainer that knows the form of its counters and does nothing else."""
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        said.setLevel(level)
