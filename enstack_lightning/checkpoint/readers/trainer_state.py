"""What `trainer_state.json` says: counters of transformers' Trainer in, progress and run out.

`global_step` counts optimizer updates, an update takes `gradient_accumulation_steps` batches, the last one of an epoch
the batches that are left, and `epoch` is a fraction of an epoch's batches. A resume goes on in epoch
`global_step // updates an epoch` and skips `global_step % updates an epoch` updates' batches.
(`transformers/trainer.py`: `set_initial_training_values`, `_init_training_state`, `_run_epoch`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind, ProgressFacts, RunFacts
from enstack_lightning.checkpoint.readers.shapes import shown_value
from enstack_lightning.checkpoint.readers.states import number, whole

_ENDLESS = 10**9
"""`num_train_epochs` of a run over data without a length is the largest integer there is."""

_COUNTERS = ("global_step", "max_steps", "num_train_epochs")


@dataclass(frozen=True)
class UpdateSteps:
    """The length of an epoch, as far as the counters tell it.

    Attributes:
        per_epoch: optimizer updates in an epoch.
        accumulation: batches an update takes; None where the training arguments are not there.
        batches: batches in an epoch; None where the counters leave it open.
    """

    per_epoch: int | None
    accumulation: int | None
    batches: int | None


def update_steps(state: Mapping[str, Any], arguments: Mapping[str, Any]) -> UpdateSteps:
    """The length of an epoch by a state's counters.

    >>> update_steps({"global_step": 4, "epoch": 8 / 11, "max_steps": 18, "num_train_epochs": 3},
    ...              {"gradient_accumulation_steps": 2})
    UpdateSteps(per_epoch=6, accumulation=2, batches=11)
    """
    accumulation = whole(arguments.get("gradient_accumulation_steps"))
    accumulation = accumulation if accumulation and accumulation > 0 else None
    if is_stream(state):
        steps = whole(state.get("max_steps"))
        per_epoch = steps if steps and steps > 0 else None
        batches = None if per_epoch is None or accumulation is None else per_epoch * accumulation
        return UpdateSteps(per_epoch, accumulation, batches)
    in_run = _updates_by_length_of_run(state)
    counted = _updates_by_epoch(whole(state.get("global_step")), number(state.get("epoch")))
    agree = counted is not None and (in_run is None or in_run[0] <= counted <= in_run[1])
    per_epoch = counted if agree else (in_run[0] if in_run else None)
    return UpdateSteps(per_epoch, accumulation, _batches(state, per_epoch, accumulation))


def is_stream(state: Mapping[str, Any]) -> bool:
    """Whether the run was one over data without a length, whose one epoch is as long as the run."""
    epochs = whole(state.get("num_train_epochs"))
    return epochs is not None and epochs >= _ENDLESS


def streams_ended(state: Mapping[str, Any]) -> int:
    """How often data without a length came to its end, which `epoch` counts beside the share of the run."""
    epoch = number(state.get("epoch"))
    if not is_stream(state) or epoch is None or not 0 <= epoch < _ENDLESS:
        return 0
    done, steps = whole(state.get("global_step")), whole(state.get("max_steps"))
    return 0 if done is None or steps is None or epoch <= done / max(steps, 1) + 1e-6 else math.floor(epoch)


def _updates_by_epoch(global_step: int | None, epoch: float | None) -> int | None:
    """After u updates in epoch e of N updates, `epoch` lies between u / N and u / (N - 1) beyond e: so N is the one
    whole number from `global_step / epoch` up."""
    if not global_step or not epoch or not 0 < global_step < 2**63 or epoch < 0 or global_step / epoch > _ENDLESS:
        return None
    return max(1, math.ceil(global_step / epoch * (1 - 1e-9)))


def _updates_by_length_of_run(state: Mapping[str, Any]) -> tuple[int, int] | None:
    """The fewest and the most updates an epoch that give `num_train_epochs`, which is rounded up, in `max_steps`."""
    steps, epochs = whole(state.get("max_steps")), whole(state.get("num_train_epochs"))
    if not steps or not epochs or steps < 0 or not 0 < epochs < _ENDLESS:
        return None
    fewest = -(-steps // epochs)
    return fewest, _ENDLESS if epochs == 1 else max(fewest, (steps - 1) // (epochs - 1))


def _batches(state: Mapping[str, Any], per_epoch: int | None, accumulation: int | None) -> int | None:
    """Batches an epoch: `accumulation` a update but for the last, whose rest shows in any fraction of an epoch."""
    if per_epoch is None or accumulation is None:
        return None
    if accumulation == 1:
        return per_epoch
    for global_step, epoch in _moments(state):
        done = global_step % per_epoch * accumulation
        fraction = epoch - math.floor(epoch)
        if done and fraction:
            batches = done / fraction
            nearest = round(batches)
            fits = (per_epoch - 1) * accumulation < nearest <= per_epoch * accumulation
            if fits and abs(batches - nearest) < 1e-6 * nearest:
                return nearest
    return None


def _moments(state: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """`global_step` and `epoch` now and at every log of the run."""
    logs = state.get("log_history")
    rows = [(state.get("global_step"), state.get("epoch"))]
    rows += (
        [(row.get("step"), row.get("epoch")) for row in logs if isinstance(row, dict)] if isinstance(logs, list) else []
    )
    for row_step, row_epoch in rows:
        step, epoch = whole(row_step), number(row_epoch)
        if step is not None and epoch is not None and step > 0 and 0 < epoch < _ENDLESS:
            yield step, epoch


def trainer_progress(state: Mapping[str, Any], steps: UpdateSteps) -> ProgressFacts:
    """Progress as a resume reckons it."""
    done, epoch = whole(state.get("global_step")), number(state.get("epoch"))
    if done is not None and epoch is not None and streams_ended(state):
        return _progress_in_stream(done, epoch, steps)
    completed = in_epoch = begun = None
    if done is not None and done >= 0 and steps.per_epoch:
        completed, updates = divmod(done, steps.per_epoch)
        begun = completed + bool(updates)
        in_epoch = updates * steps.accumulation if steps.accumulation else (None if updates else 0)
    trained = None
    if completed is not None and in_epoch is not None and (steps.batches or not completed):
        trained = completed * (steps.batches or 0) + in_epoch
    return ProgressFacts(
        epoch=None if epoch is None else math.floor(epoch),
        global_step=done,
        optimizer_steps=done,
        optimizer_steps_begun=done,
        epochs_completed=completed,
        epochs_begun=begun,
        batches_in_epoch=in_epoch,
        batches_begun=in_epoch,
        batches_trained=trained,
        batches_per_epoch=steps.batches,
        epoch_fraction=None if epoch is None else float(epoch),
    )


def _progress_in_stream(done: int, epoch: float, steps: UpdateSteps) -> ProgressFacts:
    """Data without a length that has ended before: a resume skips all of it once, and begins it again in epoch 2."""
    batches = None if steps.batches is None else round((epoch - math.floor(epoch)) * steps.batches)
    return ProgressFacts(
        epoch=math.floor(epoch),
        global_step=done,
        optimizer_steps=done,
        optimizer_steps_begun=done,
        epochs_completed=1,
        epochs_begun=2,
        batches_in_epoch=batches,
        batches_begun=batches,
    )


def trainer_run(state: Mapping[str, Any], arguments: Mapping[str, Any], steps: UpdateSteps) -> RunFacts:
    """The run by its state and its training arguments."""
    epochs, max_steps = whole(state.get("num_train_epochs")), whole(state.get("max_steps"))
    precision = arguments.get("mixed_precision")
    return RunFacts(
        batches_per_epoch=None if streams_ended(state) else steps.batches,
        accumulate_grad_batches=steps.accumulation,
        max_epochs=epochs if epochs and 0 < epochs < _ENDLESS else None,
        max_steps=max_steps if max_steps and max_steps > 0 else None,
        world_size=whole(arguments.get("num_processes")),
        precision=precision if isinstance(precision, str) and precision != "no" else None,
    )


def best_metric(state: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, float]:
    """The best value of the metric that the run watches."""
    value, name = number(state.get("best_metric")), arguments.get("metric_for_best_model")
    if value is None:
        return {}
    return {f"best {name}" if isinstance(name, str) else "best_metric": value}


def misshapen_counters(state: Mapping[str, Any], where: str) -> Iterator[Defect]:
    """The defects of form in the counters."""
    for name in _COUNTERS:
        value = state.get(name)
        if name in state and whole(value) is None:
            message = f"{name} of {where} is {shown_value(value)}, and must be a whole number"
            yield Defect(DefectKind.MISSHAPEN, name, message)
    if "epoch" in state and state["epoch"] is not None and number(state["epoch"]) is None:
        message = f"epoch of {where} is {shown_value(state['epoch'])}, and must be a finite number"
        yield Defect(DefectKind.MISSHAPEN, "epoch", message)
