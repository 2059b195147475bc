"""What a checkpoint says about itself, as frozen plain data.

Readers make facts from a path, the guard makes them from a loaded dict or a live Trainer, rules judge them. A field
that the source does not state is None (or empty), never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """The form of a checkpoint."""

    LIGHTNING = "lightning"
    ENSTACK = "enstack"
    UNKNOWN = "unknown"


class DefectKind(StrEnum):
    """Why a part of a checkpoint could not be read or believed."""

    MISSING = "missing"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    UNRECOGNISED = "unrecognised"
    UNREADABLE = "unreadable"
    MISSHAPEN = "misshapen"


@dataclass(frozen=True)
class Defect:
    """Something a reader met that makes a part of the checkpoint unusable.

    Attributes:
        where: file, or file and record.
        message: a sentence with the numbers.
    """

    kind: DefectKind
    where: str
    message: str


@dataclass(frozen=True)
class FileFacts:
    """One file of the checkpoint: its name within the checkpoint and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class TensorFacts:
    """One weight by its header; its values are not read."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParamGroupFacts:
    """One of an optimizer's `param_groups`.

    Attributes:
        params: the ids of its parameters in the optimizer's state.
        max_lr: the peak of its schedule, where the schedule has written it there (`OneCycleLR`).
        keeps_moments: whether its options are those of an optimizer that has state after its first step
            (Adam's `betas`, a `momentum` above 0).
    """

    params: tuple[int, ...]
    lr: float | None
    initial_lr: float | None
    max_lr: float | None
    keeps_moments: bool


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer: its groups, and the `step` of every parameter that has one (parameter id -> steps)."""

    groups: tuple[ParamGroupFacts, ...]
    steps: Mapping[int, float]
    parameters_with_state: int

    @property
    def parameter_count(self) -> int:
        return sum(len(g.params) for g in self.groups)

    @property
    def keeps_moments(self) -> bool:
        return any(g.keeps_moments for g in self.groups)

    @property
    def most_steps(self) -> int | None:
        return int(max(self.steps.values())) if self.steps else None


@dataclass(frozen=True)
class SchedulerFacts:
    """One learning rate scheduler.

    Attributes:
        last_epoch: how often it has stepped, in whatever unit it steps.
        last_lr: the learning rates it set last, one a param group.
        max_lrs: the peaks of its schedule, where it keeps them itself (`CyclicLR`).
        total_steps: the length of its schedule, where it has one (`OneCycleLR`).
        scheduled_lr: what the live run's own schedule gives at `last_epoch`, where it has a closed form.
    """

    last_epoch: int | None
    last_lr: tuple[float, ...]
    base_lrs: tuple[float, ...]
    max_lrs: tuple[float, ...]
    total_steps: int | None
    scheduled_lr: tuple[float, ...] = ()


@dataclass(frozen=True)
class ProgressFacts:
    """How far training had come.

    Lightning counts epochs from 0 and says exactly what was done; EnStack counts epochs from 1, and `step` 0 means that
    the epoch is complete.

    Attributes:
        epoch: the epoch as the checkpoint numbers it.
        step: EnStack's batches done in the epoch; 0 when it is complete.
        global_step: optimizer steps over all optimizers, as a loop restores it.
        recorded_global_step: what the checkpoint's own `global_step` entry says, which no loop restores.
        optimizer_steps: optimizer steps by the loop's counter.
        optimizer_steps_begun: optimizer steps that had been started; one more than `optimizer_steps` after an
            interruption inside a step.
        scheduler_steps: scheduler steps by the loop's counter.
        epochs_completed: whole epochs done, counting one whose end-of-epoch hooks were running.
        epochs_begun: epochs that had been started.
        batches_in_epoch: batches trained in the epoch in progress.
        batches_begun: batches taken from the loader in the epoch in progress.
        batches_trained: batches trained in the whole run.
        is_last_batch: the last batch taken was the epoch's last.
        batches_per_epoch: length of an epoch in batches.
    """

    epoch: int | None = None
    step: int | None = None
    global_step: int | None = None
    recorded_global_step: int | None = None
    optimizer_steps: int | None = None
    optimizer_steps_begun: int | None = None
    scheduler_steps: int | None = None
    epochs_completed: int | None = None
    epochs_begun: int | None = None
    batches_in_epoch: int | None = None
    batches_begun: int | None = None
    batches_trained: int | None = None
    is_last_batch: bool | None = None
    batches_per_epoch: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """The run that wrote the checkpoint, as `CheckpointGuard` recorded it or as the live Trainer says.

    Attributes:
        scheduler_intervals: `step` or `epoch`, one a scheduler.
        scheduler_frequencies: every how many intervals it steps, one a scheduler.
    """

    batches_per_epoch: int | None = None
    accumulate_grad_batches: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    scheduler_intervals: tuple[str, ...] = ()
    scheduler_frequencies: tuple[int, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that rules judge.

    Attributes:
        path: the checkpoint as the user named it.
        fields: the top-level entries of the training state and the type of each value (`int`, `dict`, `list`, …).
        optimizers: None when the checkpoint has no such entry, empty when it has one without optimizers.
        schedulers: likewise.
        metrics: recorded metrics such as `best_val_f1`.
        globals: the names that the checkpoint's pickles would import.
        loader_position: whether the training data loader's position is in the checkpoint.
        live: whether a running Trainer said all this, rather than a file.
    """

    path: str
    format: Format = Format.UNKNOWN
    files: tuple[FileFacts, ...] = ()
    defects: tuple[Defect, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[TensorFacts, ...] = ()
    progress: ProgressFacts = field(default_factory=ProgressFacts)
    optimizers: tuple[OptimizerFacts, ...] | None = None
    schedulers: tuple[SchedulerFacts, ...] | None = None
    run: RunFacts = field(default_factory=RunFacts)
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    globals: tuple[str, ...] = ()
    loader_position: bool = False
    live: bool = False

    @property
    def batches_per_epoch(self) -> int | None:
        """Length of an epoch in batches, as the run recorded it or else as the checkpoint's counters imply it."""
        return self.run.batches_per_epoch or self.progress.batches_per_epoch
