"""A live Trainer or a loaded checkpoint dict becomes facts, so that the same rules judge it as a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from enstack_lightning.checkpoint.facts import Facts, Format, RunFacts, SchedulerFacts
from enstack_lightning.checkpoint.readers.lightning import lightning_facts, progress_facts
from enstack_lightning.checkpoint.readers.states import optimizer_of, scheduler_of
from enstack_lightning.guard.flavor import lightning_version

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def loaded_facts(checkpoint: Mapping[str, Any], path: str) -> Facts:
    """Facts of the dict that a Trainer has just loaded from `path`."""
    return lightning_facts(checkpoint, path, _scalar)


def trainer_facts(trainer: Trainer, path: str, loaded: Facts) -> Facts:
    """Facts of a Trainer whose loops, optimizers and schedulers are restored (from `on_train_start` on).

    Args:
        loaded: the facts of the checkpoint it was restored from, for what a Trainer does not show.
    """
    run = run_of(trainer)
    progress = progress_facts(
        {"epoch": trainer.current_epoch, "global_step": trainer.global_step, "loops": {"fit_loop": _counters(trainer)}}
    )
    return Facts(
        path,
        Format.LIGHTNING,
        fields=loaded.fields,
        progress=dataclasses.replace(progress, batches_per_epoch=run.batches_per_epoch),
        optimizers=tuple(optimizer_of(o.state_dict(), _scalar) for o in trainer.optimizers),
        schedulers=tuple(_scheduler(trainer, c.scheduler) for c in trainer.lr_scheduler_configs),
        run=run,
        loader_position=loaded.loader_position,
        live=True,
    )


def run_of(trainer: Trainer) -> RunFacts:
    """What the run is set to do; known in full once the training loader exists."""
    batches = trainer.num_training_batches
    return RunFacts(
        batches_per_epoch=int(batches) if math.isfinite(batches) and batches > 0 else None,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        scheduler_intervals=tuple(c.interval for c in trainer.lr_scheduler_configs),
        scheduler_frequencies=tuple(c.frequency for c in trainer.lr_scheduler_configs),
    )


def versions() -> dict[str, str]:
    """The versions that a resume should find again."""
    return {"torch": str(torch.__version__), "lightning": lightning_version()}


def learning_rates(trainer: Trainer) -> tuple[float, ...]:
    """The learning rate of every param group of every optimizer, as they stand now."""
    return tuple(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)


def _counters(trainer: Trainer) -> dict[str, Any]:
    """The loop counters under the keys of a checkpoint; `FitLoop.state_dict()` would also ask the data loader."""
    loop = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    return {
        "epoch_progress": loop.epoch_progress.state_dict(),
        "epoch_loop.batch_progress": epoch_loop.batch_progress.state_dict(),
        "epoch_loop.scheduler_progress": epoch_loop.scheduler_progress.state_dict(),
        "epoch_loop.automatic_optimization.optim_progress": (
            epoch_loop.automatic_optimization.optim_progress.state_dict()
        ),
        "epoch_loop.manual_optimization.optim_step_progress": (
            epoch_loop.manual_optimization.optim_step_progress.state_dict()
        ),
    }


def _scheduler(trainer: Trainer, scheduler: Any) -> SchedulerFacts:
    facts = scheduler_of(scheduler.state_dict())
    alone = sum(1 for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is scheduler.optimizer) == 1
    return dataclasses.replace(facts, scheduled_lr=_scheduled_lr(scheduler)) if alone else facts


def _scheduled_lr(scheduler: Any) -> tuple[float, ...]:
    """What the schedule gives at its position, where torch can say so without stepping; else empty."""
    if isinstance(scheduler, LambdaLR):
        position = scheduler.last_epoch
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return tuple(float(base * factor(position)) for base, factor in pairs)
    closed_form = getattr(scheduler, "_get_closed_form_lr", None)
    return tuple(map(float, closed_form())) if closed_form is not None else ()


def _scalar(value: object) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value)
    return None
