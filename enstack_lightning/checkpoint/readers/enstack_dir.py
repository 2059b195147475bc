"""The EnStack folder: `training_state.pth`, `config.json`, and `model.safetensors` or `pytorch_model.bin`.

In `training_state.pth`, `epoch` counts from 1, and `step` is the number of batches done in it, 0 when it is complete.
A folder without `training_state.pth` cannot be told from a model of transformers, and is read as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts, Format, ProgressFacts
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.content import is_unfinished
from enstack_lightning.checkpoint.readers.shapes import misshapen, must_be, not_a_number, shown_value
from enstack_lightning.checkpoint.readers.states import (
    ScalarReader,
    at,
    field_types,
    named_moments,
    number,
    optimizer_of,
    scheduler_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import read_archive
from enstack_lightning.checkpoint.readers.weights import add_config, add_weights

STATE_FILE = "training_state.pth"
METRICS = ("best_val_f1", "best_val_acc")


def is_enstack_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it is an EnStack checkpoint, or what an interrupted save left of one."""
    return any(name == STATE_FILE or (STATE_FILE in name and is_unfinished(name)) for name in names)


def read_enstack_folder(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of an EnStack folder; what cannot be read becomes a defect."""
    facts = Facts(str(location), Format.ENSTACK, leftovers=tuple(filter(is_unfinished, location.names())))
    facts = add_weights(add_config(facts, location), location, deep)
    with read_archive(location.child(STATE_FILE), STATE_FILE, location, deep) as archive:
        state = archive.value
        if is_mapping(state):
            facts = _add_state(facts, state, archive.read_scalar)
            archive.scan(moments=lambda: named_moments(state.get("optimizer_state_dict")))
        elif state is not None or not archive.defects:
            message = f"it holds a {type(state).__name__} where a dict is needed"
            archive.defects.append(Defect(DefectKind.UNRECOGNISED, STATE_FILE, message))
        return archive.complete(facts)


def _add_state(facts: Facts, state: Mapping[str, Any], read_scalar: ScalarReader) -> Facts:
    optimizer, scheduler = state.get("optimizer_state_dict"), state.get("scheduler_state_dict")
    optimizers = (optimizer_of(optimizer, read_scalar),) if is_mapping(optimizer) else None
    groups = optimizers[0].groups if optimizers else ()
    scaled = at(state, ["scaler_state_dict", "scale"]) is not None
    return dataclasses.replace(
        facts,
        defects=(*facts.defects, *misshapen(state, "optimizer_state_dict", "scheduler_state_dict"), *_misshapen(state)),
        fields=field_types(state),
        progress=_progress(state),
        optimizers=optimizers,
        schedulers=(scheduler_of(scheduler, groups),) if is_mapping(scheduler) else None,
        run=dataclasses.replace(facts.run, precision="16-mixed" if scaled else None),
        metrics={key: value for key in METRICS if (value := number(state.get(key))) is not None},
    )


def _misshapen(state: Mapping[str, Any]) -> list[Defect]:
    """The defects of form in the entries that only EnStack writes."""
    found = [(key, message) for key in METRICS for message in not_a_number(state.get(key), key)]
    batches = state.get("total_batches")
    if batches is not None and (whole(batches) is None or batches < 1):
        message = f"total_batches is {shown_value(batches)}, and must be a whole number from 1 up"
        found.append(("total_batches", message))
    scaler = state.get("scaler_state_dict")
    if scaler is not None and not is_mapping(scaler):
        found.append(("scaler_state_dict", must_be("scaler_state_dict", scaler, "a dict")))
    return [Defect(DefectKind.MISSHAPEN, key, message) for key, message in found]


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
