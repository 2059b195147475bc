"""What objects hold beside a state_dict: taken down at a save as numbers, lengths and checksums, compared at a resume.

No checkpoint keeps such values unless a hook of the user's does. Where they differ, the resume report says so.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
import zlib
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enstack_lightning.guard.parts import Parts

_NOT_THE_USERS = sys.stdlib_module_names | {
    *("torch", "torchdata", "torchmetrics", "torchvision", "numpy", "transformers", "tokenizers", "datasets", "peft"),
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "enstack_lightning"),
    *("tqdm", "rich", "loguru", "matplotlib", "tensorboard", "tensorboardX", "wandb", "mlflow"),  # which only show
}
_SIZED = (list, tuple, dict, deque, set, frozenset)
_LEVELS = 3
"""How deep lists, dicts and objects are looked into."""
_MOST_ENTRIES = 2**11
"""Entries of an attribute that are compared with those of its entries, evenly spaced from the last."""
_OF_EACH = 8
"""Of these, those that each entry has at least that is made of others: one alone might be the one that stays."""
_ELEMENTS = 32
"""Elements of a tensor or array that are compared for each entry that might be, evenly spaced."""
_MOST_PASSED = 2**17
"""Entries of a dict or deque, which only can be gone through: of more than these the last."""
_WORD = re.compile(r"[\w -]+")
_LONGEST_WORD, _DIGITS_OF_A_RUN = 100, 4
_LARGEST_INTEGER = 2**64
Kept = Callable[[], Collection[int]]
"""Gives the ids of tensors that are not compared."""
_LONG_AGO = time.time() - 86_400
"""A day before the process: a narrow span, in which hardly a number falls that is no time."""


def is_users(kind: type) -> bool:
    """Whether a class is of the user's own code, as far as the package's name tells."""
    return str(kind.__module__).partition(".")[0] not in _NOT_THE_USERS


def of_kind(value: Any, *kinds: type) -> bool:
    """What `isinstance` says, which asks an object that stands for another one, and so has that one loaded."""
    return issubclass(type(value), kinds)


def plain(number: Any) -> Any:
    """A number as one of Python's own: a checkpoint that is loaded safely holds no NumPy scalar and no enum."""
    if isinstance(number, bool):
        return number
    return int.__int__(number) if isinstance(number, int) else float.__float__(number)


@cache
def names_of_layers() -> frozenset[str]:
    """The attributes that torch gives every layer."""
    return frozenset(vars(torch.nn.Module()))


def tensors_of(parts: Parts) -> Kept:
    """The ids of the tensors that are in a module's state_dict, or are compared as its buffers.

    Most modules hold no other tensor: they are gone through when the first one is met.
    """
    return cache(
        lambda: {
            id(tensor)
            for _, layer in parts.layers
            for tensors in (layer._parameters, layer._buffers)
            for tensor in tensors.values()
        }
    )


def taken_down(values: Mapping[str, Any], kept: Kept = frozenset) -> dict[str, dict[str, Any]]:
    """Attributes by name as plain values that a checkpoint can hold.

    Args:
        values: the attributes.
        kept: as `tensors_of` gives it.

    Returns:
        `numbers`; `lengths` of lists and the like; `contents`, checksums of what is known of all others.
    """
    numbers, lengths, contents = {}, {}, {}
    for name, value in _by_name(values).items():
        if _is_number(value):
            numbers[name] = plain(value)
        elif (found := checksum(value, kept)) is not None:
            contents[name] = found
        if of_kind(value, *_SIZED):
            lengths[name] = _length(value)
    return {"numbers": numbers, "lengths": lengths, "contents": contents}


def checksum(value: Any, kept: Kept = frozenset) -> int | None:
    """Of what is compared of a value; None where nothing is. For `kept` see `taken_down`."""
    try:
        text = _text(value, kept, _LEVELS, _MOST_ENTRIES)
    except Exception:  # a tensor whose memory is freed, an object of the user's that raises: no save may fail for it
        return None
    return None if text is None else zlib.crc32(text.encode())


def differences(
    then: Mapping[str, Any], values: Mapping[str, Any], owner: str, kept: Kept = frozenset
) -> Iterator[tuple[str, str]]:
    """The attributes that are not what they were, and how, in words.

    Args:
        then: what `taken_down` returned at the save.
        values: the attributes of now.
        owner: what they are attributes of, as the report calls it.
        kept: as for `taken_down`.
    """
    known = {name for kind in ("numbers", "lengths", "contents") for name in then.get(kind, {})}
    values = {name: value for name, value in _by_name(values).items() if name in known}
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


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """By names that are Python's own: set by one of NumPy's, an attribute has that one, which is not loaded safely."""
    return {f"{name}": value for name, value in values.items()}


def _same(was: Any, now: Any) -> bool:
    both = isinstance(was, float) and isinstance(now, float)
    return bool(was == now) or (both and math.isnan(was) and math.isnan(now))


def _short(held: Mapping[str, Any], name: str) -> str:
    if name not in held:
        return "not set"
    value = held[name]
    return f"{value}" if value is None or _is_number(value) else f"a {type(value).__name__}"


def _is_number(value: Any) -> bool:
    """Whether it is one that can be written; a time is not told."""
    if of_kind(value, int):
        return bool(abs(plain(value)) < _LARGEST_INTEGER)  # others take long to write, or cannot be
    return of_kind(value, float) and not _is_time(value)


def _is_time(value: Any) -> bool:
    """Whether it is what `time.time()` has given lately: no run has the times of another, and no step goes by them."""
    return of_kind(value, float) and _LONG_AGO < plain(value) <= time.time()


def _is_word(text: str) -> bool:
    """Whether it may name a phase: no path, no date, and no run, whose name has its number or its time."""
    plain = len(text) <= _LONGEST_WORD and _WORD.fullmatch(text) is not None
    return plain and sum(map(str.isdigit, text)) < _DIGITS_OF_A_RUN


def _length(value: Any) -> int:
    """Of a list and the like, without what a class of the user's does for it."""
    kind: Any = next(kind for kind in _SIZED if of_kind(value, kind))
    return int(kind.__len__(value))


def _text(value: Any, kept: Kept, levels: int, most: int) -> str | None:
    """What is compared of a value; None where nothing of it is, as of a path or of a tensor that a step has made."""
    if of_kind(value, bool, int, float):
        return None if _is_time(value) else repr(plain(value))
    if of_kind(value, str):
        return value if _is_word(value) else None
    if of_kind(value, np.ndarray, np.generic):
        return _text_of_array(value, most)
    if of_kind(value, Tensor):
        return _text_of_tensor(value, kept, most)
    if levels == 0:
        return None
    if of_kind(value, set, frozenset):
        words = (_text(entry, kept, 0, most) for entry in value) if len(value) < 1_000 else ()
        return "".join(sorted(filter(None, words))) or None
    if (entries := entries_of(value, most)) is None:
        return None
    if levels == _LEVELS and not all(of_kind(entry, int, float, str) for _, entry in entries):
        entries = entries[:: _step(len(entries), most // _OF_EACH)]
    each = most // (len(entries) or 1)
    return "".join(f"{name}:{_text(entry, kept, levels - 1, each)}," for name, entry in entries)


def entries_of(value: Any, most: int) -> list[tuple[str, Any]] | None:
    """At most so many things that a value is made of, by name; None where that is not known."""
    if of_kind(value, dict):
        return [(_name(key), entry) for key, entry in _spaced(dict.items(value), most)]
    if of_kind(value, list, tuple):
        kind: Any = list if of_kind(value, list) else tuple
        return [("", entry) for entry in kind.__getitem__(value, slice(None, None, -_step(_length(value), most)))]
    if of_kind(value, deque):
        return [("", entry) for entry in _spaced(value, most)]
    if of_kind(value, torch.nn.Module):
        return list(itertools.islice(_tensors_of(value), most))
    if is_users(type(value)) and not of_kind(value, type) and hasattr(value, "__dict__"):
        return list(_spaced(vars(value).items(), most))
    return None


def _spaced(entries: Any, most: int) -> Iterator[Any]:
    passed = min(len(entries), _MOST_PASSED)
    return itertools.islice(reversed(entries), 0, passed, _step(passed, most))


def _step(entries: int, most: int) -> int:
    """One that has no divisor in common with their number: it leaves out no column of a table."""
    step = max(1, math.ceil(entries / most))
    while math.gcd(step, entries) > 1:
        step += 1
    return step


def _name(key: Any) -> str:
    if of_kind(key, str):
        return repr(key[:_LONGEST_WORD])
    return repr(key) if of_kind(key, int, float) else ""  # of others it may tell an address


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Of a module that is no layer of another; a metric's states are attributes."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, part in module.named_modules():
        for name in vars(part).get("_defaults", ()):
            yield f"{path}.{name}", getattr(part, name)


def _text_of_tensor(tensor: Tensor, kept: Kept, most: int) -> str | None:
    """A tensor with a graph is what a step has made, and no step after it could go on with it."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not is_plain or tensor.grad_fn is not None or id(tensor) in kept():
        return None
    tensor, step = tensor.detach(), _step(tensor.numel(), most * _ELEMENTS)
    if tensor.is_contiguous():
        some = tensor.view(-1)[::step]
    else:  # which no view makes flat, and a copy may be larger than memory
        places = torch.arange(0, tensor.numel(), step, device=tensor.device)
        some = tensor[torch.unravel_index(places, tensor.shape)]
    content = some.cpu().contiguous().view(torch.uint8).numpy().data
    return f"{tensor.dtype}{tuple(tensor.shape)}{zlib.crc32(content)}"


def _text_of_array(array: np.ndarray[Any, Any] | np.generic, most: int) -> str | None:
    """Of numbers in memory: those of a file that is mapped are data, and would be read from the disk at every save."""
    if _is_mapped(array) or array.dtype.kind not in "biufc":
        return None
    some = np.asarray(array).flat[:: _step(array.size, most * _ELEMENTS)]
    return f"{array.dtype}{array.shape}{zlib.crc32(some.tobytes())}"


def _is_mapped(array: Any) -> bool:
    while array is not None and not of_kind(array, np.memmap):
        array = array.base if of_kind(array, np.ndarray) else None
    return array is not None
