"""Lightning's `.ckpt`: one torch zip archive whose pickle is the dict that `Trainer.save_checkpoint` dumps.

Layout: `lightning/pytorch/trainer/connectors/checkpoint_connector.py` (`dump_checkpoint`); the loop counters:
`lightning/pytorch/loops/progress.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Facts, Format, ProgressFacts, RunFacts
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.shapes import misshapen
from enstack_lightning.checkpoint.readers.states import (
    ScalarReader,
    at,
    field_types,
    number,
    optimizers_of,
    plain,
    schedulers_of,
    tensors_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import read_archive

VERSION_KEY = "pytorch-lightning_version"


def read_lightning(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of a Lightning checkpoint file; what cannot be read becomes a defect."""
    with read_archive(location, location.name) as archive:
        facts = lightning_facts(archive.value, str(location), archive.read_scalar)
        return archive.complete(facts)


def lightning_facts(checkpoint: object, path: str, read_scalar: ScalarReader) -> Facts:
    """Facts of the dict that a Lightning checkpoint holds, symbolic or loaded."""
    if not isinstance(checkpoint, Mapping):
        return Facts(path, Format.UNKNOWN)
    guard = _guard_state(checkpoint.get("callbacks"))
    optimizers = optimizers_of(checkpoint.get("optimizer_states"), read_scalar)
    return Facts(
        path,
        Format.LIGHTNING if VERSION_KEY in checkpoint else Format.UNKNOWN,
        defects=misshapen(checkpoint, "optimizer_states", "lr_schedulers"),
        fields=field_types(checkpoint),
        tensors=tensors_of(checkpoint.get("state_dict")),
        progress=progress_facts(checkpoint),
        optimizers=optimizers,
        schedulers=schedulers_of(checkpoint.get("lr_schedulers"), optimizers),
        run=run_facts(at(guard, ["run"])),
        metrics=_best_metrics(checkpoint.get("callbacks")),
        hyper_parameters=plain(checkpoint.get("hyper_parameters")) or {},
        versions=_versions(checkpoint, guard),
        loader_position=bool(at(checkpoint, ["loops", "fit_loop", "state_dict", "combined_loader"])),
    )


def run_facts(recorded: object) -> RunFacts:
    """The run as the guard recorded it in its callback state."""
    intervals, frequencies = at(recorded, ["scheduler_intervals"]), at(recorded, ["scheduler_frequencies"])
    precision = at(recorded, ["precision"])
    return RunFacts(
        batches_per_epoch=whole(at(recorded, ["batches_per_epoch"])),
        accumulate_grad_batches=whole(at(recorded, ["accumulate_grad_batches"])),
        max_epochs=whole(at(recorded, ["max_epochs"])),
        max_steps=whole(at(recorded, ["max_steps"])),
        world_size=whole(at(recorded, ["world_size"])),
        precision=precision if isinstance(precision, str) else None,
        scheduler_intervals=tuple(map(str, intervals)) if isinstance(intervals, list) else (),
        scheduler_frequencies=tuple(whole(n) or 1 for n in frequencies) if isinstance(frequencies, list) else (),
    )


def progress_facts(checkpoint: Mapping[str, Any]) -> ProgressFacts:
    """Progress by the counters under `loops`, and by the entries `epoch` and `global_step`."""
    loop = at(checkpoint, ["loops", "fit_loop"])
    batches = at(loop, ["epoch_loop.batch_progress"])
    step = at(loop, ["epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total"])
    manual = at(loop, ["epoch_loop.manual_optimization.optim_step_progress", "total"])
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
        batches_in_epoch=processed,
        batches_begun=begun,
        batches_trained=trained,
        is_last_batch=is_last_batch if isinstance(is_last_batch, bool) else None,
        batches_per_epoch=_batches_per_epoch(is_last_batch, processed, begun, trained, epochs_completed, epochs_begun),
    )


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
    return callbacks.get("CheckpointGuard") if isinstance(callbacks, Mapping) else None


def _best_metrics(callbacks: object) -> dict[str, float]:
    """The best score of every ModelCheckpoint that monitors one."""
    metrics = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        monitor, score = at(state, ["monitor"]), number(at(state, ["best_model_score"]))
        if isinstance(monitor, str) and score is not None:
            metrics[f"best {monitor}"] = score
    return metrics


def _versions(checkpoint: Mapping[str, Any], guard: object) -> dict[str, str]:
    recorded = at(guard, ["versions"])
    versions = {str(k): str(v) for k, v in recorded.items()} if isinstance(recorded, Mapping) else {}
    version = checkpoint.get(VERSION_KEY)
    return {**versions, "lightning": str(version)} if version is not None else versions
