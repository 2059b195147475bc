"""What a checkpoint must hold beside Lightning's own entries, for a run to go on from it as if it had never stopped.

Every process adds its part, since random state, values gathered for an epoch's end and gradients differ from one to
the next, and only rank 0 writes the file. The exchange happens inside `state_dict()`, which Lightning calls on all
ranks together; after an exception, which may be one rank's alone, each keeps to itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from enstack_lightning.guard.flavor import FITTING, is_a
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.ranks import after_exception, gathered
from enstack_lightning.guard.restart.epoch_state import capture_epoch_state
from enstack_lightning.guard.restart.fetched_ahead import capture_fetched
from enstack_lightning.guard.restart.loader_position import capture_generators, capture_reloads, loader_states
from enstack_lightning.guard.restart.lost_by_loaders import capture_counts
from enstack_lightning.guard.restart.lost_by_others import capture_others, capture_settings
from enstack_lightning.guard.restart.module_state import capture_module_state
from enstack_lightning.guard.restart.part_gradients import capture_gradients, gradients_wait
from enstack_lightning.guard.restart.plain_order import capture_order
from enstack_lightning.guard.restart.rng import capture_random_state
from enstack_lightning.guard.restart.rows import is_inside_a_step, loaders_of
from enstack_lightning.guard.restart.stock_callbacks import capture_frozen

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Point = Literal[
    "in_step",
    "batch_end",
    "batch_end_failed",
    "validation_end",
    "after_batch",
    "epoch_end",
    "between_epochs",
    "epoch_start",
    "elsewhere",
]
"""The moment of a save.

in_step: in the middle of a step, as on an exception of it. batch_end: in `on_train_batch_end`, before the validation
that may follow. batch_end_failed: on an exception of that hook. validation_end: in `on_validation_end`. after_batch:
between two batches, all that follows a batch done. epoch_end: in `on_train_epoch_end` of a whole epoch. between_epochs:
after it. epoch_start: in `on_train_epoch_start`. elsewhere: anything else, such as inside a validation.
"""


STATE_VERSION = 2
"""Of the form of what `capture_resume_state` returns; another form is not restored."""


def capture_resume_state(trainer: Any, parts: Parts | None = None) -> dict[str, Any]:
    """The entries `version`, `random_state`, of this process, and `resume`, of all; plain values and tensors.

    Args:
        trainer: the `Trainer` whose checkpoint is made; None for a guard outside any.
        parts: of its module, where they are known already.
    """
    state: dict[str, Any] = {"version": STATE_VERSION, "random_state": capture_random_state()}
    if trainer is None or trainer.state.fn != FITTING or not hasattr(trainer.fit_loop, "update_restart_stage"):
        return state
    point, parts = point_of(trainer), parts or Parts(trainer.lightning_module)
    mine = {
        "random_state": state["random_state"],
        "epoch": capture_epoch_state(trainer, parts),
        "generators": capture_generators(trainer),
        "gradients": {},
        "order": capture_order(trainer),
        "fetched": capture_fetched(trainer),
        "counts": capture_counts(trainer),
    }
    if gradients_wait(trainer, point):
        mine["gradients"] = capture_gradients(trainer)
    if trainer.world_size > 1:
        mine["loaders"] = loader_states(trainer)
        mine["statistics"] = running_statistics(parts)
        # DDP sends rank 0's statistics to all before a forward pass, and not after one inside an accumulation window.
        mine["sync_before_forward"] = getattr(trainer.model, "require_forward_param_sync", None)
    stops_early = bool(trainer.should_stop) and any(map(stopped_early, trainer.callbacks))
    state["resume"] = {
        "point": point,
        "early_stop": stops_early,
        "told_to_stop": not stops_early and _told_to_stop(trainer),
        "validation_workers": list(map(_has_lasting_workers, loaders_of(trainer.fit_loop.epoch_loop.val_loop))),
        "frozen": capture_frozen(trainer),
        "reloads": capture_reloads(trainer),
        "module": capture_module_state(trainer, parts, point),
        "others": capture_others(trainer, parts),
        "settings": capture_settings(trainer),
        "ranks": _of_all_ranks(trainer, mine),
    }
    return state


def running_statistics(parts: Parts) -> dict[str, torch.Tensor]:
    """The statistics of normalization layers by name; each process has its own, and Lightning saves rank 0's."""
    return {
        f"{name}.{buffer}": tensor
        for name, module in parts.layers
        if getattr(module, "track_running_stats", False)
        for buffer, tensor in module.named_buffers(recurse=False)
    }


def point_of(trainer: Trainer) -> Point:
    """The moment that the training loops stand at, while a checkpoint is made."""
    hook = trainer.lightning_module._current_fx_name
    loop: Any = trainer.fit_loop
    if trainer.state.status == "interrupted" and not after_exception(trainer):
        return "elsewhere"  # after a fit that failed, whose loaders Lightning has reset
    batch, epoch = loop.epoch_loop.batch_progress.current, loop.epoch_progress.current
    in_epoch = epoch.ready == epoch.started == epoch.processed + 1
    batch_whole = batch.ready == batch.processed > 0  # a batch of None is never started
    if in_epoch and is_inside_a_step(trainer):
        return "in_step"
    if in_epoch and batch_whole:
        if hook == "on_train_batch_end":
            return "batch_end"
        if batch.completed == batch.processed:
            if hook == "on_validation_end" and not trainer.sanity_checking:
                return "validation_end"
            # A signal's exception is raised in a validation, or when all that follows a batch is done.
            if is_a(sys.exception(), "SIGTERMException") and trainer.training:
                return "after_batch"
        elif after_exception(trainer):
            return "batch_end_failed"
    elif epoch.ready == epoch.started == epoch.processed and loop.epoch_loop._num_ready_batches_reached():
        if hook == "on_train_epoch_end":
            return "epoch_end"
        if epoch.completed == epoch.processed:
            return "between_epochs"
    elif epoch.ready - 1 == epoch.started == epoch.processed == epoch.completed:
        return "epoch_start"
    return "elsewhere"


def stopped_early(callback: Any) -> bool:
    """Whether an EarlyStopping has ended the run; a time limit or a signal ends it for other reasons."""
    if not is_a(callback, "EarlyStopping"):
        return False
    reason = getattr(callback, "stopping_reason", None)
    return bool(callback.wait_count >= callback.patience or (reason is not None and reason.value != 0))


def _told_to_stop(trainer: Trainer) -> bool:
    """Whether something has set `trainer.should_stop` that does not end the run for a time only."""
    for_now = getattr(trainer, "received_sigterm", False) or any(is_a(c, "Timer") for c in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(trainer.should_stop) and not for_now


def _has_lasting_workers(loader: Any) -> bool:
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None


def _of_all_ranks(trainer: Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1 or not torch.distributed.is_initialized() or after_exception(trainer):
        return [mine]
    return [_unpacked(state) for state in gathered(_packed(mine))]


@dataclass(frozen=True)
class _Bytes:
    """A tensor to send: torch's own way saves each with `torch.save`, which takes longer than sending them all."""

    content: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def _packed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        return _Bytes(plain.reshape(-1).view(torch.uint8).numpy(), plain.dtype, tuple(plain.shape))
    if isinstance(value, dict):
        return {k: _packed(v) for k, v in value.items()}
    return [_packed(v) for v in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Bytes):
        return torch.from_numpy(value.content.copy()).view(value.dtype).reshape(value.shape)
    if isinstance(value, dict):
        return {k: _unpacked(v) for k, v in value.items()}
    return [_unpacked(v) for v in value] if isinstance(value, list) else value
