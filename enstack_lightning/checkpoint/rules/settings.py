"""What decides how a run trains, read from what tells it: a configuration, a checkpoint or a live Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.mappings import is_mapping

BATCH_SIZES = ("train_batch_size", "batch_size", "per_device_train_batch_size")

_PRECISIONS = {
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "32": "32-true",
    "64": "64-true",
    "fp16": "16-mixed",
    "no": "32-true",
}


@dataclass(frozen=True)
class Settings:
    """What decides how a run trains, of the run that saved or of the one to resume; None where it is not stated."""

    batch_size: int | None
    accumulation: int | None
    world_size: int | None
    max_epochs: int | None
    max_steps: int | None
    precision: str | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]


def settings_of_config(config: Mapping[str, Any]) -> Settings:
    """The settings of a run by its configuration."""
    fit = config.get("fit")
    config = fit if is_mapping(fit) else config
    trainer, model, data = (_section(config, name) for name in ("trainer", "model", "data"))
    if not (trainer or model or data):
        return _settings_of_arguments(config)
    accumulation = _whole(trainer.get("accumulate_grad_batches"))
    return Settings(
        batch_size=_first_whole(data, model),
        accumulation=1 if trainer and trainer.get("accumulate_grad_batches") is None else accumulation,
        world_size=_world_size(trainer.get("devices"), trainer.get("num_nodes")),
        max_epochs=_whole(trainer.get("max_epochs")),
        max_steps=_whole(trainer.get("max_steps")),
        precision=_precision(trainer.get("precision")),
        model=model,
        data=data,
    )


def settings_of_facts(facts: Facts, by_loader: bool = False) -> Settings:
    """The settings of the run that saved, as far as the checkpoint states them, or of a live run.

    Args:
        by_loader: the batch size is that of the training loader, rather than that of the hyper-parameters.
    """
    model: Mapping[str, Any] = facts.hyper_parameters
    if facts.format is not Format.LIGHTNING:
        model = {**facts.model_config, **facts.hyper_parameters}
    names = facts.model_config.get("id2label")
    if is_mapping(names) and "num_labels" not in model:
        model = {**model, "num_labels": len(names)}
    return Settings(
        batch_size=facts.run.batch_size
        if by_loader
        else _first_whole(facts.data_hyper_parameters, facts.hyper_parameters),
        accumulation=facts.run.accumulate_grad_batches,
        world_size=facts.run.world_size,
        max_epochs=facts.run.max_epochs,
        max_steps=facts.run.max_steps,
        precision=_precision(facts.run.precision),
        model=model,
        data=facts.data_hyper_parameters,
    )


def _settings_of_arguments(config: Mapping[str, Any]) -> Settings:
    """transformers' training arguments, whose `num_train_epochs` is ignored where `max_steps` is given."""
    mixed = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
    steps, epochs = _whole(config.get("max_steps")), _number(config.get("num_train_epochs"))
    return Settings(
        batch_size=_first_whole(config),
        accumulation=_whole(config.get("gradient_accumulation_steps")),
        world_size=None,
        max_epochs=None if epochs is None or (steps or 0) > 0 else math.ceil(epochs),
        max_steps=steps if steps and steps > 0 else None,
        precision=next((mixed[name] for name in mixed if config.get(name) is True), None),
        model=config,
        data={},
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section's options, of a class that is named there or of the one that is built in."""
    section = config.get(name)
    if not is_mapping(section):
        return {}
    if "class_path" not in section:
        return section
    options = section.get("init_args")
    return {**options, "_class_path": section["class_path"]} if is_mapping(options) else section


# Values of a configuration


def same(old: object, new: object) -> bool:
    """Whether two values mean the same: YAML reads 2e-5 as text, and a tuple comes back as a list.

    What is no plain value is known by its type alone (`<PosixPath>`), and is taken to be the same.
    """
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(same, old, new))
    if is_mapping(old) and is_mapping(new):
        return old.keys() == new.keys() and all(same(old[name], new[name]) for name in old)
    if any(isinstance(value, str) and value.startswith("<") and value.endswith(">") for value in (old, new)):
        return True
    a, b = _number(old), _number(new)
    if a is not None and b is not None:
        return math.isclose(a, b, rel_tol=1e-9)
    return old == new or all(isinstance(value, float) and math.isnan(value) for value in (old, new))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _first_whole(*sections: Mapping[str, Any]) -> int | None:
    stated = (section[name] for section in sections for name in BATCH_SIZES if name in section)
    return next((size for value in stated if (size := _whole(value)) is not None), None)


def _world_size(devices: object, nodes: object) -> int | None:
    """The number of processes, in every form that Lightning takes `devices` in; None for `auto` and `-1`."""
    count: int | None
    if isinstance(devices, list | tuple):
        count = len(devices)
    elif isinstance(devices, str) and "," in devices:
        count = len([part for part in devices.split(",") if part.strip()])
    else:
        count = _whole(devices)
    if count is None or count < 1:
        return None
    return count * (_whole(nodes) or 1)


def _precision(value: object) -> str | None:
    return None if value is None else _PRECISIONS.get(str(value), str(value))


def shown(value: object) -> str:
    """A value as messages show it."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r:.100}"
