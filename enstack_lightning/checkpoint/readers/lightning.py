"""Lightning's `.ckpt`: one torch file whose pickle is the dict that `Trainer.save_checkpoint` dumps.

Layout: `lightning/pytorch/trainer/connectors/checkpoint_connector.py` (`dump_checkpoint`); the loop counters:
`lightning/pytorch/loops/progress.py`; what newer versions make of older files:
`lightning/pytorch/utilities/migration/migration.py`. Files of Lightning 1.0 to 1.5 hold `epoch` and `global_step` and
no loops; 1.6 to 1.9 hold the loops under other names than 2.x.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts, Format, ProgressFacts, RunFacts
from enstack_lightning.checkpoint.inert_pickle import Call, TensorDescriptor
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.shapes import MAX_GROUPS, misshapen, must_be, shown_value
from enstack_lightning.checkpoint.readers.states import (
    ScalarReader,
    at,
    field_types,
    named_moments,
    named_weights,
    number,
    optimizers_of,
    plain,
    schedulers_of,
    tensors_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import TorchArchive

VERSION_KEY = "pytorch-lightning_version"
LOOPS_SINCE = (1, 6)
"""The first version that saves loops; before it a resume reckons with `epoch` and `global_step` alone."""

_AUTOMATIC = ("epoch_loop.automatic_optimization", "epoch_loop.optimizer_loop", "epoch_loop.batch_loop.optimizer_loop")
_MANUAL = ("epoch_loop.manual_optimization", "epoch_loop.manual_loop", "epoch_loop.batch_loop.manual_loop")
_SCALERS = ("MixedPrecision", "MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "native_amp_scaling_state")
"""Under which entry the gradient scaler's state lies, by version: the precision plugin's class, or a fixed name."""
_LOOP = ("loops", "fit_loop")
_LOADERS = (*_LOOP, "state_dict", "combined_loader")
_OF_TORCHDATA = {"yielded", "generator"}
"""The state of torchdata's `RandomSampler`; its `BatchSampler` of another sampler without a state has none."""
_VERSION = re.compile(r"v?\d{1,9}(\.\d{1,9}){0,5}[-_.+a-z0-9]{0,100}", re.ASCII | re.IGNORECASE)
"""A version as packaging reads it, roughly: PEP 440."""
_TRAINING_ENTRIES = ("optimizer_states", "lr_schedulers")
MAX_STATE_KEYS = 1_000
OF_DATA_MODULE = "data module"
"""The kind of a fingerprint that a LightningDataModule made itself: its attribute `fingerprints`."""


def is_lightning(value: object) -> bool:
    """Whether the content of a torch file is a checkpoint of Lightning; without its version Lightning loads none."""
    return is_mapping(value) and VERSION_KEY in value


def read_lightning(archive: TorchArchive, path: str) -> Facts:
    """Facts of a Lightning checkpoint that is open in `archive`; what cannot be believed becomes a defect."""
    checkpoint = archive.value
    facts = lightning_facts(checkpoint, path, archive.read_scalar)
    archive.scan(lambda: _named_weights(checkpoint), lambda: named_moments(checkpoint.get("optimizer_states")))
    return facts


def lightning_facts(checkpoint: object, path: str, read_scalar: ScalarReader) -> Facts:
    """Facts of the dict that a Lightning checkpoint holds, symbolic or loaded."""
    return with_defects(lightning_content(checkpoint, path, read_scalar), checkpoint)


def lightning_content(checkpoint: object, path: str, read_scalar: ScalarReader, known: Facts | None = None) -> Facts:
    """The same without its defects, for a comparison with facts that were judged; what differs needs `with_defects`.

    Args:
        known: facts whose weights and states of optimizers are those of the checkpoint, and are not read from it.
    """
    if not is_mapping(checkpoint):
        return Facts(path, Format.UNKNOWN)
    guard = _guard_state(checkpoint.get("callbacks"))
    moment = at(guard, ["resume", "point"])
    states = known.optimizers if known is not None else None
    optimizers = optimizers_of(checkpoint.get("optimizer_states"), read_scalar, states)
    return Facts(
        path,
        Format.LIGHTNING if VERSION_KEY in checkpoint else Format.UNKNOWN,
        fields=field_types(checkpoint),
        tensors=known.tensors if known is not None else tensors_of(checkpoint.get("state_dict")),
        progress=progress_facts(checkpoint),
        optimizers=optimizers,
        schedulers=schedulers_of(checkpoint.get("lr_schedulers"), optimizers),
        run=_with_data_module(_with_precision(run_facts(at(guard, ["run"])), checkpoint), checkpoint),
        metrics=_best_metrics(checkpoint.get("callbacks"), read_scalar),
        hyper_parameters=_hyper_parameters(checkpoint.get("hyper_parameters")),
        data_hyper_parameters=_hyper_parameters(checkpoint.get("datamodule_hyper_parameters")),
        versions=_versions(checkpoint, guard),
        callbacks=_state_keys(checkpoint.get("callbacks")),
        saved_at=number(at(guard, ["saved_at"])),
        model_only="state_dict" in checkpoint and not any(name in checkpoint for name in _TRAINING_ENTRIES),
        loader_position=bool(at(checkpoint, _LOADERS)) or _of_all_ranks(guard, "order"),
        loader_spent=_is_spent(checkpoint) and moment is None,
        moment=moment if isinstance(moment, str) else None,
        part_gradients=_of_all_ranks(guard, "gradients"),
    )


def with_defects(facts: Facts, checkpoint: object) -> Facts:
    """The facts of a Lightning checkpoint's dict with its defects: entries of the wrong form, and what ends a load."""
    if not is_mapping(checkpoint):
        return facts
    defects = (*misshapen(checkpoint, "optimizer_states", "lr_schedulers"), *_unloadable(checkpoint))
    return dataclasses.replace(facts, defects=defects)


def _of_all_ranks(guard: object, name: str) -> bool:
    """Whether the guard has saved something of this name for every process."""
    ranks = at(guard, ["resume", "ranks"])
    return isinstance(ranks, list) and bool(ranks) and all(bool(at(rank, [name])) for rank in ranks)


def _is_spent(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a `StatefulDataLoader` stands behind the last batch of an epoch, saved while that batch was completed.

    `FitLoop.reset` counts such an epoch as done and begins the next one at the loader's position, where torchdata's own
    samplers give no batch; a sampler with a state of its own may begin anew. Saved in validation or later, the epoch
    itself goes on to its end.
    """
    positions, progress = at(checkpoint, _LOADERS), progress_facts(checkpoint)
    completed = whole(at(checkpoint, [*_LOOP, "epoch_loop.batch_progress", "current", "completed"]))
    in_batch = completed is not None and completed + 1 == progress.batches_in_epoch == progress.batches_begun
    if not isinstance(positions, list) or progress.is_last_batch is not True or not in_batch:
        return False
    in_epoch = (progress.epochs_begun or 0) > (progress.epochs_completed or 0)
    return in_epoch and any(map(_stops_at_once, positions))


def _stops_at_once(position: object) -> bool:
    if at(position, ["_iterator_finished"]) is not False:
        return False
    sampler = sampler_state(position)
    own = at(sampler, ["sampler_iter_state"])
    return is_mapping(sampler) and (own is None or (is_mapping(own) and set(own) <= _OF_TORCHDATA))


def sampler_state(position: object) -> Any:
    """The sampler's part of the state of a `StatefulDataLoader`; None where there is none."""
    of_workers = at(position, ["_snapshot", "_main_snapshot"])
    return at(position if of_workers is None else of_workers, ["_sampler_iter_state"])


def _unloadable(checkpoint: Mapping[str, Any]) -> Iterator[Defect]:
    """What ends every load by Lightning in an exception, for whatever purpose."""
    version, callbacks, weights = (checkpoint.get(name) for name in (VERSION_KEY, "callbacks", "state_dict"))
    if VERSION_KEY in checkpoint and not (isinstance(version, str) and _VERSION.fullmatch(version)):
        message = f"it is {shown_value(version)}, and must be a version: Lightning would end there"
        yield Defect(DefectKind.DAMAGED, VERSION_KEY, message)
    if callbacks is not None and not is_mapping(callbacks):
        yield Defect(DefectKind.DAMAGED, "callbacks", must_be("it", callbacks, "a dict"))
    odd = [key for key in weights if not isinstance(key, str)] if is_mapping(weights) else []
    if odd:
        message = f"{len(odd):,} of its names are no text, the first {shown_value(odd[0])}: a module would not load it"
        yield Defect(DefectKind.DAMAGED, "state_dict", message)


def _named_weights(checkpoint: Mapping[str, Any]) -> dict[str, TensorDescriptor]:
    """The weights, and those of the model in training where `state_dict` holds averaged ones (`WeightAveraging`)."""
    current = named_weights(checkpoint.get("current_model_state"))
    return {
        **named_weights(checkpoint.get("state_dict")),
        **{f"current_model_state.{name}": tensor for name, tensor in current.items()},
    }


def run_facts(recorded: object) -> RunFacts:
    """The run as the guard recorded it in its callback state."""
    intervals, frequencies = at(recorded, ["scheduler_intervals"]), at(recorded, ["scheduler_frequencies"])
    precision, fingerprint = at(recorded, ["precision"]), at(recorded, ["dataset_fingerprint"])
    return RunFacts(
        batches_per_epoch=whole(at(recorded, ["batches_per_epoch"])),
        accumulate_grad_batches=whole(at(recorded, ["accumulate_grad_batches"])),
        max_epochs=whole(at(recorded, ["max_epochs"])),
        max_steps=whole(at(recorded, ["max_steps"])),
        world_size=whole(at(recorded, ["world_size"])),
        precision=precision if isinstance(precision, str) else None,
        scheduler_intervals=tuple(map(str, intervals)) if isinstance(intervals, list) else (),
        scheduler_frequencies=tuple(whole(n) or 1 for n in frequencies) if isinstance(frequencies, list) else (),
        scheduler_kinds=_texts(at(recorded, ["scheduler_kinds"])),
        scheduler_options=_options(at(recorded, ["scheduler_options"])),
        optimizer_kinds=_texts(at(recorded, ["optimizer_kinds"])),
        optimizer_options=tuple(map(_options, _list(at(recorded, ["optimizer_options"])))),
        parameter_digests=tuple(map(_texts, _list(at(recorded, ["parameter_digests"])))),
        trainable_parameters=whole(at(recorded, ["trainable_parameters"])),
        batch_size=whole(at(recorded, ["batch_size"])),
        dataset_rows=whole(at(recorded, ["dataset_rows"])),
        dataset_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        seed=whole(at(recorded, ["seed"])),
    )


def _list(value: object) -> list[Any]:
    return value[:MAX_GROUPS] if isinstance(value, list) else []


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, _list(value)))


def _options(value: object) -> tuple[Mapping[str, Any], ...]:
    return tuple(plain(entry) if is_mapping(entry) else {} for entry in _list(value))


def _with_data_module(run: RunFacts, checkpoint: Mapping[str, Any]) -> RunFacts:
    """The run, with the fingerprint of the training data that a data module has put into its own state."""
    for state in checkpoint.values() if run.dataset_fingerprint is None else ():
        digest = at(state, ["fingerprints", "train"])
        if isinstance(digest, str):
            rows = whole(at(state, ["num_rows", "train"]))
            return dataclasses.replace(
                run, dataset_fingerprint=f"{OF_DATA_MODULE}:{digest}", dataset_rows=run.dataset_rows or rows
            )
    return run


def progress_facts(checkpoint: Mapping[str, Any]) -> ProgressFacts:
    """Progress by the counters under `loops`, and by the entries `epoch` and `global_step`."""
    loop = at(checkpoint, ["loops", "fit_loop"])
    if loop is None and _version(checkpoint) < LOOPS_SINCE:
        return _progress_without_loops(checkpoint)
    batches = at(loop, ["epoch_loop.batch_progress"])
    step = at(_first(loop, _AUTOMATIC, "optim_progress"), ["optimizer", "step", "total"])
    manual = at(_first(loop, _MANUAL, "optim_step_progress"), ["total"])
    # Only one of the two counts: automatic optimization leaves the manual counter at 0, and the other way round.
    counter = manual if whole(at(manual, ["completed"])) else step
    done = whole(at(counter, ["completed"]))
    epochs_completed = whole(at(loop, ["epoch_progress", "current", "processed"]))
    epochs_begun = whole(at(loop, ["epoch_progress", "current", "started"]))
    is_last_batch = at(batches, ["is_last_batch"])
    processed = whole(at(batches, ["current", "processed"]))
    begun = whole(at(batches, ["current", "ready"]))
    trained = whole(at(batches, ["total", "processed"]))
    return ProgressFacts(
        epoch=whole(checkpoint.get("epoch")),
        global_step=done,
        recorded_global_step=whole(checkpoint.get("global_step")),
        optimizer_steps=done,
        optimizer_steps_begun=whole(at(counter, ["ready"])),
        scheduler_steps=whole(at(loop, ["epoch_loop.scheduler_progress", "total", "completed"])),
        epochs_completed=epochs_completed,
        epochs_begun=epochs_begun,
        epochs_ready=whole(at(loop, ["epoch_progress", "current", "ready"])),
        batches_in_epoch=processed,
        batches_begun=begun,
        batches_trained=trained,
        is_last_batch=is_last_batch if isinstance(is_last_batch, bool) else None,
        batches_per_epoch=_batches_per_epoch(is_last_batch, processed, begun, trained, epochs_completed, epochs_begun),
    )


def _progress_without_loops(checkpoint: Mapping[str, Any]) -> ProgressFacts:
    """Progress in a file of Lightning before 1.6, as Lightning 2 goes on from it.

    It restores `global_step` and begins again with epoch 0: it puts `epoch` into the counter of completed epochs, which
    it overwrites with that of processed ones when the run begins (`FitLoop.on_run_start`). `global_step` counted
    batches that stepped, not the steps of each optimizer, and one too many in a file saved after the end of
    `Trainer.fit`: it says nothing exact about the optimizer.
    """
    global_step = whole(checkpoint.get("global_step"))
    if not any(name in checkpoint for name in _TRAINING_ENTRIES):
        return ProgressFacts(whole(checkpoint.get("epoch")), recorded_global_step=global_step)
    return ProgressFacts(
        epoch=whole(checkpoint.get("epoch")),
        global_step=global_step,
        recorded_global_step=global_step,
        epochs_completed=0,
        epochs_begun=0,
        batches_in_epoch=0,
        batches_begun=0,
    )


def _first(loop: object, places: tuple[str, ...], entry: str) -> Any:
    """The entry in the first of the places that Lightning's versions have put it in."""
    return next((found for place in places if (found := at(loop, [f"{place}.{entry}"])) is not None), None)


def _version(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of the Lightning that saved the file; that of today where it does not tell."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(checkpoint.get(VERSION_KEY)))
    return (int(match[1]), int(match[2])) if match else (2, 0)


def _batches_per_epoch(
    is_last_batch: object,
    processed: int | None,
    begun: int | None,
    trained: int | None,
    epochs_completed: int | None,
    epochs_begun: int | None,
) -> int | None:
    """The epoch's length where the counters prove it: its last batch is done, or whole epochs lie before it."""
    if is_last_batch is True and processed and processed == begun:
        return processed
    if processed is None or trained is None or epochs_begun is None or not epochs_completed:
        return None
    if epochs_begun <= epochs_completed:
        return None  # stopped inside an epoch, by max_steps or early stopping: epochs of different length
    earlier = trained - processed
    return earlier // epochs_completed if earlier > 0 and earlier % epochs_completed == 0 else None


def _guard_state(callbacks: object) -> Any:
    return callbacks.get("CheckpointGuard") if is_mapping(callbacks) else None


def _state_keys(callbacks: object) -> tuple[str, ...]:
    if not is_mapping(callbacks):
        return ()
    return tuple(key for key in callbacks if isinstance(key, str))[:MAX_STATE_KEYS]


def _best_metrics(callbacks: object, read_scalar: ScalarReader) -> dict[str, float]:
    """The best score of every ModelCheckpoint that monitors one."""
    metrics = {}
    for state in callbacks.values() if is_mapping(callbacks) else ():
        monitor, score = at(state, ["monitor"]), at(state, ["best_model_score"])
        value = number(score)
        value = read_scalar(score) if value is None and hasattr(score, "dtype") else value
        if isinstance(monitor, str) and value is not None and math.isfinite(value):
            metrics[f"best {monitor}"] = value
    return metrics


def _hyper_parameters(value: object) -> Mapping[str, Any]:
    """The hyper-parameters as plain values, also where they were saved as an `AttributeDict` or a `Namespace`."""
    if isinstance(value, Call):
        value = value.entries or value.state
    return plain(value) if is_mapping(value) else {}


def _with_precision(run: RunFacts, checkpoint: Mapping[str, Any]) -> RunFacts:
    """The run, with the precision that a saved gradient scaler proves where the guard has recorded none."""
    scales = any(at(checkpoint, [name, "scale"]) is not None for name in _SCALERS)
    return dataclasses.replace(run, precision="16-mixed") if scales and run.precision is None else run


def _versions(checkpoint: Mapping[str, Any], guard: object) -> dict[str, str]:
    recorded = at(guard, ["versions"])
    versions = {str(k): str(v) for k, v in recorded.items()} if is_mapping(recorded) else {}
    version = checkpoint.get(VERSION_KEY)
    return {**versions, "lightning": str(version)} if version is not None else versions
