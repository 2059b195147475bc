"""The loop counters of a checkpoint that has lost its entry `loops`, where all the rest of it agrees on them.

A Trainer restores its counters from `loops` alone: without it a trained optimizer goes on under `global_step` 0. What
the counters were follows from the optimizer's steps, the entries `epoch` and `global_step`, and the length of an epoch
that the guard recorded, if the checkpoint was saved at an epoch's end. Inside an epoch the position of the loader is
lost as well, and nothing is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from enstack_lightning.checkpoint import Facts, Format

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Counters:
    """What the loops had counted at an epoch's end.

    Attributes:
        epochs: complete epochs, the one that just ended included.
        batches: in an epoch.
        steps: of the optimizer, in the whole run.
        steps_in_epoch: of the optimizer, in the last epoch.
        scheduler_steps: of all schedulers, in the whole run.
    """

    epochs: int
    batches: int
    steps: int
    steps_in_epoch: int
    scheduler_steps: int


def lost_counters(facts: Facts) -> Counters | str:
    """The counters that follow from the rest of a checkpoint without `loops`, or why none do."""
    p, run = facts.progress, facts.run
    steps = p.recorded_global_step
    if facts.format is not Format.LIGHTNING or "loops" in facts.fields or steps is None or p.epoch is None:
        return "it is no checkpoint of Lightning with epoch and global_step, and without loops"
    if len(facts.optimizers or ()) != 1:
        return f"it has {len(facts.optimizers or ())} optimizers, and only the steps of a single one are global_step"
    (optimizer,) = facts.optimizers or ()
    if not optimizer.steps or len(optimizer.steps) < optimizer.parameter_count:
        return "not every parameter of its optimizer counts its steps"
    if set(optimizer.steps.values()) != {steps}:
        return f"global_step is {steps:,}, and its optimizer did {min(optimizer.steps.values()):g} steps"
    if not run.batches_per_epoch or not run.accumulate_grad_batches:
        return "it was saved without a guard, which records how many batches an epoch has"
    in_epoch = math.ceil(run.batches_per_epoch / run.accumulate_grad_batches)
    epochs, rest = divmod(steps, in_epoch)
    if rest or epochs not in (p.epoch, p.epoch + 1) or not epochs:
        return f"global_step {steps:,} in epoch {p.epoch:,} is no end of an epoch of {in_epoch:,} steps"
    positions = [s.last_epoch for s in facts.schedulers or ()]
    expected = [{"step": steps, "epoch": epochs}.get(interval) for interval in run.scheduler_intervals]
    if any(n != 1 for n in run.scheduler_frequencies) or positions != expected:
        return f"its schedulers stand at {positions}, expected {expected}"
    return Counters(epochs, run.batches_per_epoch, steps, in_epoch, sum(n for n in positions if n is not None))


def loops_with(counters: Counters, trainer: Trainer) -> dict[str, Any]:
    """The entry `loops` as this Trainer would save it at the end of that epoch."""
    fit: dict[str, Any] = trainer.fit_loop.state_dict()
    done = counters.epochs * counters.batches
    _count(fit["epoch_progress"]["total"], counters.epochs)
    _count(fit["epoch_progress"]["current"], counters.epochs)
    for progress in fit["epoch_progress"].values():
        progress["completed"] -= 1  # its hooks are still running when a checkpoint of an epoch's end is saved
    _count(fit["epoch_loop.batch_progress"]["total"], done)
    _count(fit["epoch_loop.batch_progress"]["current"], counters.batches)
    fit["epoch_loop.batch_progress"]["is_last_batch"] = True
    for progress in fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        _count(progress["total"], counters.steps)
        _count(progress["current"], counters.steps_in_epoch)
    _count(fit["epoch_loop.scheduler_progress"]["total"], counters.scheduler_steps)
    _count(fit["epoch_loop.scheduler_progress"]["current"], counters.scheduler_steps // counters.epochs)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = counters.steps
    return {
        "fit_loop": fit,
        "validate_loop": trainer.validate_loop.state_dict(),
        "test_loop": trainer.test_loop.state_dict(),
        "predict_loop": trainer.predict_loop.state_dict(),
    }


def _count(progress: dict[str, int], done: int) -> None:
    for name in progress:
        progress[name] = done
