"""What a checkpoint says about itself, as frozen plain data.

Readers make facts from a path, the guard makes them from a loaded dict or a live Trainer, rules judge them. A field
that the source does not state is None (or empty), never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal


class Format(StrEnum):
    """The form of a checkpoint."""

    LIGHTNING = "lightning"
    ENSTACK = "enstack"
    HUGGINGFACE = "huggingface"
    SHARDED = "sharded"
    TORCH = "torch"
    SAFETENSORS = "safetensors"
    UNKNOWN = "unknown"


class DefectKind(StrEnum):
    """Why a part of a checkpoint could not be read or believed. `replaced`: a record is not the one that was saved."""

    MISSING = "missing"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    UNRECOGNISED = "unrecognised"
    UNREADABLE = "unreadable"
    MISSHAPEN = "misshapen"
    REPLACED = "replaced"


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

    @classmethod
    def unreadable(cls, where: str, error: OSError) -> Defect:
        """The operating system, or the client of an object store, does not give the bytes."""
        return cls(DefectKind.UNREADABLE, where, f"it cannot be read: {error.strerror or error}")

    @classmethod
    def changed(cls, where: str) -> Defect:
        """The file was written to while it was read, so that what was read is of no moment in particular."""
        return cls(DefectKind.DAMAGED, where, "it changed while it was read; verify it again")


class OddityKind(StrEnum):
    """Something unusual that stops no reader: whether it matters is for a rule to say."""

    REPACKED = "repacked"
    UNREFERENCED_RECORD = "unreferenced-record"
    WRONG_SUFFIX = "wrong-suffix"
    LOGICAL_SIZE = "logical-size"
    SPARSE_TENSOR = "sparse-tensor"
    CYCLE = "cycle"
    STRAY_FILE = "stray-file"
    OTHER_CHECKPOINT = "other-checkpoint"
    REFUSED_OPCODE = "refused-opcode"
    TOTAL_SIZE = "total-size"


@dataclass(frozen=True)
class Oddity:
    """Something a reader met that is valid and unusual; `where` and `message` as in a `Defect`."""

    kind: OddityKind
    where: str
    message: str


@dataclass(frozen=True)
class FileFacts:
    """One file of the checkpoint, by its name within the checkpoint.

    Attributes:
        size: bytes.
        without_checksum: bytes that no checksum in the checkpoint covers (safetensors, JSON, legacy torch files,
            records saved with `compute_crc32 = False`): damage there need not show in the file itself.
        not_read: bytes of tensor data that have a checksum and were not compared with it (without `--deep`).
        read_whole: every byte was read, whether or not a checksum covers it (JSON, the directory of shards).
    """

    name: str
    size: int
    without_checksum: int = 0
    not_read: int = 0
    read_whole: bool = False


Loader = Literal["weights_only", "transformers", "torch", "pickle", "never"]
"""How the framework reads a pickle; see `GlobalFacts.loader`."""


@dataclass(frozen=True)
class GlobalFacts:
    """A name that one of the checkpoint's pickles would import.

    Attributes:
        where: the file, or file and record, whose pickle names it.
        loader: how the framework reads that pickle. `weights_only`: `torch.load(weights_only=True)`; `transformers`:
            the same with the NumPy names that transformers adds for `rng_state*.pth`; `torch`:
            `torch.load(weights_only=False)`, as `torch.distributed.checkpoint` reads entries that are no tensors;
            `pickle`: bare `pickle.load`, as it reads `.metadata`; `never`: no resume reads it (`training_args.bin`).
    """

    module: str
    name: str
    where: str = ""
    loader: Loader = "weights_only"

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class TensorFacts:
    """One weight by its header; its values are not read.

    Attributes:
        dtype: torch's name without `torch.`: `float32`, `bfloat16`, …
        where: the file, or file and record, that holds its values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    where: str = ""


@dataclass(frozen=True)
class ValueFacts:
    """What is noteworthy in the values of one tensor, found by reading every byte of it.

    Attributes:
        name: the weight's name, or `optimizer 0, parameter 3, exp_avg`.
        role: `weight` or `optimizer`.
        nonfinite: how many of its values are NaN or infinite.
        first_nonfinite: index of the first of them, one number a dimension; None when all are finite.
        first_value: that value as text: `nan`, `inf` or `-inf`.
        all_zero: every value is 0 (and there is at least one).
    """

    name: str
    role: Literal["weight", "optimizer"]
    where: str
    nonfinite: int = 0
    first_nonfinite: tuple[int, ...] | None = None
    first_value: str = ""
    all_zero: bool = False


@dataclass(frozen=True)
class ManifestFacts:
    """The manifest beside a checkpoint, and how the checkpoint compares with it.

    Attributes:
        path: the manifest's own path.
        defect: why it cannot be used; empty when it can.
        compared: `sizes` in a quick verification, `digests` in a deep one.
        differences: a sentence for each file that is not what the manifest says.
        files: how many files it lists.
    """

    path: str
    defect: str = ""
    compared: Literal["sizes", "digests"] = "sizes"
    differences: tuple[tuple[str, str], ...] = ()
    files: int = 0
    global_step: int | None = None

    @property
    def digests_compared(self) -> bool:
        """Whether every byte was held against a digest, which no checksum of the checkpoint's own can replace."""
        return self.compared == "digests" and not self.defect


@dataclass(frozen=True)
class ParamGroupFacts:
    """One of an optimizer's `param_groups`.

    Attributes:
        params: the ids of its parameters in the optimizer's state.
        max_lr: the peak of its schedule, where the schedule has written it there (`OneCycleLR`).
        keeps_moments: whether its options are those of an optimizer that has state after its first step
            (Adam's `betas`, a `momentum` above 0).
        options: the group's other entries as plain values (`betas`, `eps`, `weight_decay`, …).
    """

    params: tuple[int | str, ...]
    lr: float | None
    initial_lr: float | None
    max_lr: float | None
    keeps_moments: bool
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer. Parameters are named as its state does: by number, or by name in a sharded checkpoint.

    Attributes:
        steps: the `step` of every parameter that has one (parameter -> steps).
        unusable_steps: parameter and `step` of those whose step is NaN, infinite or negative.
        moments: the shape of every tensor in a parameter's state (parameter -> entry -> shape), scalars left out.
        names: parameter -> its name in the module; of a live run only.
        shapes: parameter -> its own shape; of a live run only.
    """

    groups: tuple[ParamGroupFacts, ...]
    steps: Mapping[int | str, float]
    parameters_with_state: int
    moments: Mapping[int | str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    unusable_steps: tuple[tuple[int | str, float], ...] = ()
    names: Mapping[int | str, str] = field(default_factory=dict)
    shapes: Mapping[int | str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def parameter_count(self) -> int:
        return sum(len(g.params) for g in self.groups)

    @property
    def keeps_moments(self) -> bool:
        return any(g.keeps_moments for g in self.groups)

    @cached_property
    def most_steps(self) -> int | None:
        """The steps of the parameter that has most; asked for by many rules, of thousands of parameters."""
        return int(max(self.steps.values())) if self.steps else None


@dataclass(frozen=True)
class SchedulerFacts:
    """One learning rate scheduler.

    Attributes:
        last_epoch: how often it has stepped, in whatever unit it steps; None where it keeps no count of its steps.
        last_lr: the learning rates it set last, one a param group.
        max_lrs: the peaks of its schedule, where it keeps them itself (`CyclicLR`).
        total_steps: the length of its schedule, where it has one (`OneCycleLR`).
        scheduled_lr: what the live run's own schedule gives at `last_epoch`, where it has a closed form.
        kind: torch's class, told from the entries of the state; None where they fit no class or several.
        next_lrs: the learning rates of the first param group at the coming steps of the scheduler, the next one first,
            where its schedule has a closed form.
        curve: points (scheduler step, learning rate of the first param group) from 0 to the schedule's end.
        own_lr: what the schedule that the state itself holds gives at `last_epoch`, one rate a param group, where it
            has a closed form.
        options: the entries of its state that no step changes (`T_max`, `gamma`, `base_lrs`, …), as plain values.
    """

    last_epoch: int | None
    last_lr: tuple[float, ...]
    base_lrs: tuple[float, ...]
    max_lrs: tuple[float, ...]
    total_steps: int | None
    scheduled_lr: tuple[float, ...] = ()
    kind: str | None = None
    next_lrs: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    own_lr: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


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
        epochs_ready: the same with the one whose start-of-epoch hooks were running.
        batches_in_epoch: batches trained in the epoch in progress.
        batches_begun: batches taken from the loader in the epoch in progress.
        batches_trained: batches trained in the whole run.
        is_last_batch: the last batch taken was the epoch's last.
        batches_per_epoch: length of an epoch in batches.
        epoch_fraction: epochs done as a fraction, as the Hugging Face Trainer counts them.
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
    epochs_ready: int | None = None
    batches_in_epoch: int | None = None
    batches_begun: int | None = None
    batches_trained: int | None = None
    is_last_batch: bool | None = None
    batches_per_epoch: int | None = None
    epoch_fraction: float | None = None


@dataclass(frozen=True)
class RunFacts:
    """The run that wrote the checkpoint, as `CheckpointGuard` recorded it or as the live Trainer says.

    Attributes:
        scheduler_intervals: `step` or `epoch`, one a scheduler.
        scheduler_frequencies: every how many intervals it steps, one a scheduler.
        scheduler_kinds: its class, one a scheduler.
        scheduler_options: what it was made with (`SchedulerFacts.options` before any step), one a scheduler.
        optimizer_kinds: its class, one an optimizer.
        optimizer_options: what its param groups were made with, one list of groups an optimizer.
        parameter_digests: of each optimizer's groups, eight hexadecimal digits a parameter (its name and shape).
        trainable_parameters: tensors of the module that get a gradient.
        batch_size: rows in a batch of the training loader of one process.
        dataset_rows: rows of the training data.
        dataset_fingerprint: what it was told from and a digest, `KIND:DIGEST`.
        seed: the global seed.
    """

    batches_per_epoch: int | None = None
    accumulate_grad_batches: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    world_size: int | None = None
    precision: str | None = None
    scheduler_intervals: tuple[str, ...] = ()
    scheduler_frequencies: tuple[int, ...] = ()
    scheduler_kinds: tuple[str, ...] = ()
    scheduler_options: tuple[Mapping[str, Any], ...] = ()
    optimizer_kinds: tuple[str, ...] = ()
    optimizer_options: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    parameter_digests: tuple[tuple[str, ...], ...] = ()
    trainable_parameters: int | None = None
    batch_size: int | None = None
    dataset_rows: int | None = None
    dataset_fingerprint: str | None = None
    seed: int | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, as `Trainer.estimated_stepping_batches` reckons; None without an end."""
        lengths = [self.max_steps] if self.max_steps is not None and self.max_steps >= 0 else []
        if self.batches_per_epoch and self.max_epochs is not None and self.max_epochs >= 0:
            lengths.append(math.ceil(self.batches_per_epoch / (self.accumulate_grad_batches or 1)) * self.max_epochs)
        return min(lengths) if lengths else None


@dataclass(frozen=True)
class Facts:
    """Everything that rules judge.

    Attributes:
        path: the checkpoint as the user named it.
        fields: the top-level entries of the training state and the type of each value (`int`, `dict`, `list`, …).
        optimizers: None when the checkpoint has no such entry, empty when it has one without optimizers.
        schedulers: likewise.
        metrics: recorded metrics such as `best_val_f1`.
        hyper_parameters: those of the LightningModule, or transformers' training arguments.
        data_hyper_parameters: those of the LightningDataModule.
        model_config: the entries of a `config.json` beside the weights.
        callbacks: the state keys of the callbacks that have a state in the checkpoint; of a live run, of all its own.
        data_module: of a live run: the name of its data module's class, where that keeps a state.
        globals: the names that the checkpoint's pickles would import.
        model_only: the checkpoint holds a model and nothing of a training run.
        leftovers: files that an interrupted save left behind.
        values: noteworthy values of tensors; None when their bytes were not read.
        manifest: None when none stands beside the checkpoint.
        loader_position: whether the training data loader's position is in the checkpoint.
        loader_spent: whether that position is behind the last batch of an epoch that is not complete yet, in a loader
            that gives no batch when it is put there.
        saved_at: when CheckpointGuard saved it, in seconds since 1970; None without it.
        moment: the moment of the save that CheckpointGuard recorded, at which its run goes on; None without it.
        part_gradients: whether the gradients of a part-done accumulation window are in the checkpoint.
        live: whether a running Trainer said all this, rather than a file.
        saved: of a live run: the facts of the checkpoint that it was restored from.
    """

    path: str
    format: Format = Format.UNKNOWN
    files: tuple[FileFacts, ...] = ()
    defects: tuple[Defect, ...] = ()
    oddities: tuple[Oddity, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[TensorFacts, ...] = ()
    progress: ProgressFacts = field(default_factory=ProgressFacts)
    optimizers: tuple[OptimizerFacts, ...] | None = None
    schedulers: tuple[SchedulerFacts, ...] | None = None
    run: RunFacts = field(default_factory=RunFacts)
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    data_hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    callbacks: tuple[str, ...] = ()
    data_module: str | None = None
    globals: tuple[GlobalFacts, ...] = ()
    model_only: bool = False
    leftovers: tuple[str, ...] = ()
    values: tuple[ValueFacts, ...] | None = None
    manifest: ManifestFacts | None = None
    loader_position: bool = False
    loader_spent: bool = False
    saved_at: float | None = None
    moment: str | None = None
    part_gradients: bool = False
    live: bool = False
    saved: Facts | None = None

    @property
    def batches_per_epoch(self) -> int | None:
        """Length of an epoch in batches, as the run recorded it or else as the checkpoint's counters imply it."""
        return self.run.batches_per_epoch or self.progress.batches_per_epoch
