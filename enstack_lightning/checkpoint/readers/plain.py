"""Files of weights and training states that follow no framework: what `torch.save` was given, and bare safetensors.

A plain torch file may hold a state dict, a dict with one in it, a list of tensors, or the training state of somebody's
own loop. Optimizers and schedulers are told by the form of their `state_dict()`, wherever in the dict they lie; every
other tensor counts as a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    Format,
    ProgressFacts,
)
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.safetensors import read_safetensors
from enstack_lightning.checkpoint.readers.shapes import misshapen
from enstack_lightning.checkpoint.readers.states import (
    ScalarReader,
    by_name,
    field_types,
    named_moments,
    optimizer_of,
    schedulers_of,
    tensors_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import TorchArchive

_LIGHTNING_ENTRIES = ("loops", "optimizer_states", "lr_schedulers", "callbacks")


def read_plain_torch(archive: TorchArchive, path: str) -> Facts:
    """Facts of a torch file that is open in `archive` and holds no Lightning checkpoint."""
    value = archive.value
    if value is None and archive.defects:
        return Facts(path)
    facts = plain_facts(value, path, archive.read_scalar)
    optimizers = _optimizers_in(value)
    archive.scan(lambda: weights_in(value), lambda: named_moments([state for _, state in optimizers]))
    if facts.tensors or facts.optimizers or facts.format is Format.UNKNOWN:
        return facts
    held = getattr(value, "function", None)
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    what = f"a pickled object of {held}" if held is not None else f"{article} {kind} without a tensor in it"
    advice = "; save model.state_dict() instead of the model" if held is not None else ""
    defect = Defect(DefectKind.UNRECOGNISED, archive.name, f"it holds {what}{advice}")
    return dataclasses.replace(facts, defects=(*facts.defects, defect))


def plain_facts(value: object, path: str, read_scalar: ScalarReader) -> Facts:
    """Facts of what a plain torch file holds, symbolic."""
    fields = field_types(value) if is_mapping(value) and not _is_state_dict(value) else {}
    optimizers = tuple(optimizer_of(state, read_scalar) for _, state in _optimizers_in(value))
    schedulers = schedulers_of([state for _, state in _schedulers_in(value)], optimizers)
    weights = tensors_of(weights_in(value))
    like_lightning = "state_dict" in fields and any(name in fields for name in _LIGHTNING_ENTRIES)
    return Facts(
        path,
        Format.UNKNOWN if like_lightning else Format.TORCH,
        defects=_misshapen_in(value),
        fields=fields,
        tensors=weights,
        progress=_progress(value),
        optimizers=optimizers or None,
        schedulers=schedulers or None,
        model_only=bool(weights) and not optimizers and not like_lightning,
    )


def weights_in(value: object) -> dict[str, TensorDescriptor]:
    """Every tensor outside optimizers and schedulers, by the keys that lead to it.

    The key that all of them share (`state_dict`, `model`) is left out.
    """
    found = by_name(_tensors_below(value))
    first = {name.partition(".")[0] for name in found}
    if is_mapping(value) and len(first) == 1 and is_mapping(value.get(key := first.pop())):
        return {name.removeprefix(f"{key}."): tensor for name, tensor in found.items()}
    return found


def _tensors_below(value: object) -> Iterator[tuple[str, TensorDescriptor]]:
    if isinstance(value, TensorDescriptor):
        yield "tensor", value
    waiting: list[tuple[str, object]] = [("", value)]
    seen: set[int] = set()
    while waiting:
        path, holder = waiting.pop()
        if id(holder) in seen or _is_optimizer(holder) or _is_scheduler(holder):
            continue
        seen.add(id(holder))
        below = []
        for key, inner in _entries(holder):
            name = f"{path}.{key}" if path else key
            if isinstance(inner, TensorDescriptor):
                yield name, inner
            elif is_mapping(inner) or isinstance(inner, list | tuple):
                below.append((name, inner))
        waiting += reversed(below)


def _entries(holder: object) -> Iterator[tuple[str, object]]:
    if is_mapping(holder):
        return ((str(key), inner) for key, inner in holder.items())
    return ((str(i), inner) for i, inner in enumerate(holder)) if isinstance(holder, list | tuple) else iter(())


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether a dict holds tensors by name and little else (`_extra_state` may be anything)."""
    tensors = sum(isinstance(inner, TensorDescriptor) for inner in value.values())
    return tensors > 0 and tensors * 2 > len(value)


def _is_optimizer(value: object) -> bool:
    return is_mapping(value) and isinstance(value.get("param_groups"), list) and "state" in value


def _is_scheduler(value: object) -> bool:
    return is_mapping(value) and "last_epoch" in value and ("base_lrs" in value or "_last_lr" in value)


def _optimizers_in(value: object) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, state) for name, state in _near(value) if is_mapping(state) and _is_optimizer(state)]


def _schedulers_in(value: object) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, state) for name, state in _near(value) if is_mapping(state) and _is_scheduler(state)]


def _near(value: object) -> Iterator[tuple[str, object]]:
    """The value itself, its entries, and the entries of those that are lists or dicts, once each."""
    yield "", value
    if _is_optimizer(value) or (is_mapping(value) and _is_state_dict(value)):
        return
    seen: set[int] = set()
    for key, inner in _entries(value):
        yield key, inner
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if not _is_optimizer(inner) and not (is_mapping(inner) and _is_state_dict(inner)):
            yield from ((f"{key}.{name}", innermost) for name, innermost in _entries(inner))


def _misshapen_in(value: object) -> tuple[Defect, ...]:
    states = {name or "optimizer": state for name, state in (*_optimizers_in(value), *_schedulers_in(value))}
    optimizers = [name for name, state in states.items() if _is_optimizer(state)]
    schedulers = [name for name, state in states.items() if not _is_optimizer(state)]
    return (
        *(defect for name in optimizers for defect in misshapen(states, name, "")),
        *(defect for name in schedulers for defect in misshapen(states, "", name)),
    )


def _progress(value: object) -> ProgressFacts:
    """The counters that loops of one's own usually keep under these names."""
    if not is_mapping(value):
        return ProgressFacts()
    step = next((n for key in ("global_step", "step", "iteration") if (n := whole(value.get(key))) is not None), None)
    return ProgressFacts(epoch=whole(value.get("epoch")), recorded_global_step=step)


# safetensors


def read_safetensors_file(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of a bare safetensors file: a model and no training state."""
    read = read_safetensors(location, location.name, deep)
    return Facts(
        str(location),
        Format.SAFETENSORS,
        files=() if read.file is None else (read.file,),
        defects=tuple(read.defects),
        tensors=read.tensors,
        model_only=True,
        values=None if deep is None else read.values,
        versions=_versions(read.metadata),
    )


def _versions(metadata: Mapping[str, str]) -> dict[str, str]:
    """What wrote the file, where it says so (`{"format": "pt"}` does not)."""
    return {name.removesuffix("_version"): v for name, v in metadata.items() if name.endswith("_version")}
