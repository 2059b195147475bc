"""The EnStack folder: `training_state.pth`, `config.json`, and `model.safetensors` or `pytorch_model.bin`.

In `training_state.pth`, `epoch` counts from 1, and `step` is the number of batches done in it, 0 when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    Format,
    OptimizerFacts,
    ProgressFacts,
    TensorFacts,
)
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.shapes import misshapen
from enstack_lightning.checkpoint.readers.states import (
    ScalarReader,
    at,
    field_types,
    number,
    optimizer_of,
    plain,
    scheduler_of,
    tensors_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import defect_of, read_archive
from enstack_lightning.checkpoint.safetensors_file import read_safetensors_header
from enstack_lightning.checkpoint.source import ContainerDefectError

STATE_FILE = "training_state.pth"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_CONFIG_BYTES = 4 * 2**20


def is_enstack_folder(location: Location) -> bool:
    """Whether any file that an EnStack checkpoint is made of stands in the folder."""
    return any(location.child(name).exists() for name in (STATE_FILE, CONFIG_FILE, *WEIGHT_FILES))


def read_enstack_folder(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of an EnStack folder; what cannot be read becomes a defect."""
    facts = Facts(str(location), Format.ENSTACK)
    facts = _add_config(facts, location)
    facts = _add_weights(facts, location)
    with read_archive(location.child(STATE_FILE), STATE_FILE, location) as archive:
        if isinstance(archive.value, Mapping):
            facts = _add_state(facts, archive.value, archive.read_scalar)
        elif archive.value is not None or not archive.defects:
            message = f"it holds a {type(archive.value).__name__} where a dict is needed"
            archive.defects.append(Defect(DefectKind.UNRECOGNISED, STATE_FILE, message))
        return archive.complete(facts)


def _add_state(facts: Facts, state: Mapping[str, Any], read_scalar: ScalarReader) -> Facts:
    optimizer, scheduler = state.get("optimizer_state_dict"), state.get("scheduler_state_dict")
    optimizers: tuple[OptimizerFacts, ...] | None = None
    if isinstance(optimizer, Mapping):
        optimizers = (optimizer_of(optimizer, read_scalar),)
    return dataclasses.replace(
        facts,
        defects=(*facts.defects, *misshapen(state, "optimizer_state_dict", "scheduler_state_dict")),
        fields=field_types(state),
        progress=_progress(state),
        optimizers=optimizers,
        schedulers=(scheduler_of(scheduler),) if isinstance(scheduler, Mapping) else None,
        metrics={
            key: value for key in ("best_val_f1", "best_val_acc") if (value := number(state.get(key))) is not None
        },
    )


def _progress(state: Mapping[str, Any]) -> ProgressFacts:
    epoch, step, batches = (whole(state.get(key)) for key in ("epoch", "step", "total_batches"))
    completed = None if epoch is None or step is None else (epoch if step == 0 else epoch - 1)
    return ProgressFacts(
        epoch=epoch,
        step=step,
        epochs_completed=completed,
        epochs_begun=epoch,
        batches_in_epoch=step,
        batches_begun=step,
        batches_per_epoch=batches,
    )


def _add_config(facts: Facts, folder: Location) -> Facts:
    location = folder.child(CONFIG_FILE)
    defect, size = location.check_file(CONFIG_FILE, folder)
    if defect is None and size > MAX_CONFIG_BYTES:
        defect = Defect(DefectKind.DAMAGED, CONFIG_FILE, f"it has {size:,} bytes; a configuration has a few thousand")
    if defect is not None:
        return dataclasses.replace(facts, defects=(*facts.defects, defect))
    facts = dataclasses.replace(facts, files=(*facts.files, FileFacts(CONFIG_FILE, size)))
    try:
        with location.open() as source:
            config = json.loads(source.read_at(0, source.size).decode("utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        defect = Defect(DefectKind.DAMAGED, CONFIG_FILE, f"it is no valid JSON: {e}")
        return dataclasses.replace(facts, defects=(*facts.defects, defect))
    if not isinstance(config, dict):
        message = f"it holds a JSON {type(config).__name__} where an object is needed"
        return dataclasses.replace(facts, defects=(*facts.defects, Defect(DefectKind.DAMAGED, CONFIG_FILE, message)))
    version = at(config, ["transformers_version"])
    return dataclasses.replace(
        facts,
        model_config=plain(config),
        versions={"transformers": str(version)} if version is not None else {},
    )


def _add_weights(facts: Facts, folder: Location) -> Facts:
    present = [name for name in WEIGHT_FILES if folder.child(name).exists()]
    if not present:
        defect = Defect(
            DefectKind.MISSING, WEIGHT_FILES[0], f"neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]} is there"
        )
        return dataclasses.replace(facts, defects=(*facts.defects, defect))
    for name in present:
        add = _add_safetensors if name.endswith(".safetensors") else _add_torch_weights
        facts = add(facts, folder.child(name), folder)
    return facts


def _add_safetensors(facts: Facts, location: Location, folder: Location) -> Facts:
    name = location.name
    defect, size = location.check_file(name, folder)
    tensors = facts.tensors
    if defect is None:
        try:
            with location.open() as source:
                header = read_safetensors_header(source)
            tensors = tuple(TensorFacts(t.name, t.dtype, t.shape, name) for t in header.tensors)
        except ContainerDefectError as e:
            defect = defect_of(e, name)
        except OSError as e:
            defect = Defect(DefectKind.UNREADABLE, name, f"it cannot be read: {e.strerror}")
    files = (*facts.files, FileFacts(name, size)) if size else facts.files
    defects = facts.defects if defect is None else (*facts.defects, defect)
    return dataclasses.replace(facts, files=files, defects=defects, tensors=tensors)


def _add_torch_weights(facts: Facts, location: Location, folder: Location) -> Facts:
    with read_archive(location, location.name, folder) as archive:
        return archive.complete(dataclasses.replace(facts, tensors=facts.tensors or tensors_of(archive.value)))
