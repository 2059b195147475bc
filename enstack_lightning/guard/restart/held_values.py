"""What objects hold beside a state_dict: taken down at a save as numbers, lengths and checksums, compared at a resume.

No checkpoint keeps such values unless a hook of the user's does. Where they differ, the resume report says so.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections import ChainMap, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NOT_THE_USERS = sys.stdlib_module_names | {
    *("torch", "torchdata", "torchmetrics", "torchvision", "numpy", "transformers", "tokenizers", "datasets", "peft"),
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "enstack_lightning"),
}
_SIZED = (list, tuple, dict, deque, set)
_MOST_ENTRIES = (10, 30, 1_000)
"""Entries of a list and the like that are compared, evenly spaced from the last: of the innermost level first."""
_MOST_ELEMENTS = 2**16
"""Elements of a tensor or array that are compared, evenly spaced."""


def is_users(kind: type) -> bool:
    """Whether a class is of the user's own code, as far as the package's name tells."""
    return kind.__module__.partition(".")[0] not in _NOT_THE_USERS


def plain(number: Any) -> Any:
    """A number as one of Python's own: a checkpoint that is loaded safely holds no NumPy scalar and no enum."""
    kinds: tuple[type, ...] = (bool, int, float)
    return next(kind(number) for kind in kinds if isinstance(number, kind))


def tensors_of(module: torch.nn.Module) -> set[int]:
    """The ids of the tensors that are in a module's state_dict, or are compared as its buffers."""
    return {id(tensor) for tensors in (module.parameters(), module.buffers()) for tensor in tensors}


def taken_down(values: Mapping[str, Any], kept: Collection[int] = ()) -> dict[str, dict[str, Any]]:
    """Attributes by name as plain values that a checkpoint can hold.

    Args:
        values: the attributes.
        kept: the ids of tensors that are not compared, as `tensors_of` has them.

    Returns:
        `numbers`; `lengths` of lists and the like; `contents`, checksums of what is known of all others.
    """
    others = {name: value for name, value in values.items() if not isinstance(value, bool | int | float)}
    texts = {name: _text_if_any(value, kept) for name, value in others.items()}
    return {
        "numbers": {name: plain(value) for name, value in values.items() if name not in others},
        "lengths": {name: len(value) for name, value in others.items() if isinstance(value, _SIZED)},
        "contents": {name: zlib.crc32(text.encode()) for name, text in texts.items() if text is not None},
    }


def differences(
    then: Mapping[str, Any], values: Mapping[str, Any], owner: str, kept: Collection[int] = ()
) -> Iterator[tuple[str, str]]:
    """The attributes that are not what they were, and how, in words.

    Args:
        then: what `taken_down` returned at the save.
        values: the attributes of now.
        owner: what they are attributes of, as the report calls it.
        kept: as for `taken_down`.
    """
    known = {name for kind in ("numbers", "lengths", "contents") for name in then.get(kind, {})}
    values = {name: values[name] for name in known if name in values}
    now = taken_down(values, kept)
    for name, was in then.get("numbers", {}).items():
        if not _same(was, now["numbers"].get(name)):
            yield name, f"{owner}.{name} was {was} and is {_short(values, name)}"
    lengths = then.get("lengths", {})
    for name, was in lengths.items():
        had = f"{owner}.{name} had {was:,} {'entry' if was == 1 else 'entries'}"
        if name not in now["lengths"]:
            yield name, f"{had} and is {_short(values, name)}"
        elif now["lengths"][name] != was:
            yield name, f"{had} and has {now['lengths'][name]:,}"
    for name, was in then.get("contents", {}).items():
        if lengths.get(name) != now["lengths"].get(name):
            continue
        if name not in now["contents"]:
            yield name, f"{owner}.{name} held a value and is {_short(values, name)}"
        elif now["contents"][name] != was:
            yield name, f"{owner}.{name} held other values"


def attributes(owner: object) -> Mapping[str, Any]:
    """An object's attributes with those that it has of its class."""
    return ChainMap(vars(owner), *(dict(vars(kind)) for kind in type(owner).__mro__))


def few(said: list[str]) -> str:
    """The first three of several things, and how many more there are."""
    return ", ".join(said[:3]) + (f", and {len(said) - 3:,} more" if len(said) > 3 else "")


def _same(was: Any, now: Any) -> bool:
    both = isinstance(was, float) and isinstance(now, float)
    return bool(was == now) or (both and math.isnan(was) and math.isnan(now))


def _short(held: Mapping[str, Any], name: str) -> str:
    if name not in held:
        return "not set"
    value = held[name]
    return f"{value}" if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _text_if_any(value: Any, kept: Collection[int]) -> str | None:
    try:
        return _text(value, kept, len(_MOST_ENTRIES))
    except Exception:  # a tensor whose memory is freed, a mapping of the user's that raises: no save may fail for it
        return None


def _text(value: Any, kept: Collection[int], levels: int) -> str | None:
    """What is compared of a value; None where nothing of it is, as of a path or of a tensor that a step has made."""
    if isinstance(value, bool | int | float):
        return repr(plain(value))
    if isinstance(value, str):
        return value if value.isidentifier() else None  # the name of a phase, and no path and no date
    if isinstance(value, np.ndarray | np.generic):
        return _text_of_array(value)
    if isinstance(value, Tensor):
        return _text_of_tensor(value, kept)
    if levels == 0:
        return None
    if isinstance(value, dict):
        return _joined(((_name(k), v) for k, v in _some(list(value.items()), levels)), kept, levels)
    if isinstance(value, set):
        return "".join(sorted(filter(None, (_text(entry, kept, 0) for entry in value)))) if len(value) < 1_000 else None
    if isinstance(value, _SIZED):
        return _joined((("", entry) for entry in _some(list(value), levels)), kept, levels)
    if isinstance(value, torch.nn.Module):
        return _joined(_tensors_of(value), kept, levels)
    if is_users(type(value)) and hasattr(value, "__dict__") and not isinstance(value, type):
        return _joined(_some(list(vars(value).items()), levels), kept, levels)
    return None


def _joined(entries: Iterable[tuple[str, Any]], kept: Collection[int], levels: int) -> str:
    return "".join(f"{name}:{_text(value, kept, levels - 1)}," for name, value in entries)


def _name(key: Any) -> str:
    return repr(key) if isinstance(key, str | int | float) else ""  # of others it may tell an address


def _some(entries: list[Any], levels: int) -> list[Any]:
    return entries[:: -max(1, math.ceil(len(entries) / _MOST_ENTRIES[levels - 1]))]


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Of a module that is no layer of another; a metric's states are attributes."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, part in module.named_modules():
        for name in getattr(part, "_defaults", ()):
            yield f"{path}.{name}", getattr(part, name)


def _text_of_tensor(tensor: Tensor, kept: Collection[int]) -> str | None:
    """A tensor with a graph is what a step has made, and no step after it could go on with it."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if id(tensor) in kept or not is_plain or tensor.grad_fn is not None:
        return None
    flat = tensor.detach().reshape(-1)
    some = flat[:: _step(len(flat))].cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}{zlib.crc32(some.view(torch.uint8).numpy().data)}"


def _text_of_array(array: np.ndarray[Any, Any] | np.generic) -> str | None:
    """Of numbers in memory: those of a file that is mapped are data, and would be read from the disk at every save."""
    if isinstance(array, np.memmap) or array.dtype.kind not in "biufc":
        return None
    some = np.asarray(array).flat[:: _step(array.size)]
    return f"{array.dtype}{array.shape}{zlib.crc32(some.tobytes())}"


def _step(elements: int) -> int:
    return max(1, math.ceil(elements / _MOST_ELEMENTS))
