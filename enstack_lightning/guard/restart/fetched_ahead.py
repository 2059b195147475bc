"""Batches that were fetched and not yet trained when a checkpoint was saved.

Lightning fetches one batch ahead from loaders without a length, to know the last batch when it comes
(`_PrefetchDataFetcher`). The position that a loader with a state saves is then behind a batch that no one has trained,
and a resume would leave it out. So it is behind the batch in hand where a save comes inside a step, as that of an
exception does: the epoch would end one batch early, and without its validation. So these batches are saved too, and
come first again, in pieces where a run goes on with smaller ones.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from enstack_lightning.guard.restart.rows import has_ended, has_state, is_inside_a_step, loaders_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MOST_BYTES = 64 * 2**20
"""Of the batches of one process; larger ones are not kept in its checkpoints."""

_WAITING = "_waiting_batches"
"""The attribute of a loader with the batches that it is to give first, and the epoch they belong to."""


class _BatchInHand:
    """Stands in for `convert_input` of a precision plugin, which Lightning gives each batch as the loader gave it."""

    def __init__(self, convert_input: Callable[[Any], Any]) -> None:
        self._convert_input = convert_input
        self.batch: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"batch": None}

    def __call__(self, data: Any) -> Any:
        if torch.is_grad_enabled():  # and so no batch of a validation
            self.batch = copy.copy(data) if type(data) in (dict, list) else data  # a hook may take entries out of it
        return self._convert_input(data)


def remember_batch_in_hand(trainer: Trainer) -> Callable[[], None]:
    """Keeps the batch that is being trained, where the training loader has a state.

    Args:
        trainer: a Trainer that is about to train.

    Returns:
        Ends it.
    """
    if not any(map(has_state, loaders_of(trainer.fit_loop))):
        return lambda: None
    plugin: Any = trainer.precision_plugin
    own = vars(plugin).get("convert_input")
    plugin.convert_input = _BatchInHand(plugin.convert_input)

    def stop() -> None:
        del plugin.convert_input
        if own is not None:
            plugin.convert_input = own

    return stop


def _batch_in_hand(trainer: Trainer) -> list[Any]:
    """The batch whose step is not over; empty between two steps, and where it is not known."""
    holder = vars(trainer.precision_plugin).get("convert_input")
    is_known = isinstance(holder, _BatchInHand) and holder.batch is not None  # a step may take its batches itself
    return [holder.batch] if is_known and is_inside_a_step(trainer) else []  # type: ignore[union-attr]


def capture_fetched(trainer: Trainer) -> list[Any] | None:
    """The batches taken from a loader with a state and not trained; None where they cannot be kept in a checkpoint."""
    loop = trainer.fit_loop
    loaders = loaders_of(loop)
    batches = _batch_in_hand(trainer) + [batch for batch, *_ in getattr(loop._data_fetcher, "batches", ())]
    batches += [batch for loader in loaders for batch in _waiting(trainer, loader)]
    if not batches or not any(map(has_state, loaders)):
        return []
    alone = loop._combined_loader is not None and loop._combined_loader.iterables is loaders[0]  # in no dict of loaders
    fits = sum(map(_bytes, batches)) <= MOST_BYTES
    return batches if alone and fits and all(map(_is_plain, batches)) else None


def give_first(trainer: Trainer, batches: list[Any]) -> None:
    """Lets the training loader give these batches before its own; to be called before its iterator is made."""
    (loader,) = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    kind, waiting = type(loader), deque(batches)

    def iter_once(self: Any) -> Iterator[Any]:
        self.__class__ = kind
        is_all = has_ended(self)
        rest = iter(self)
        setattr(self, _WAITING, (trainer.current_epoch, waiting))
        return itertools.chain(_taken(waiting), () if is_all else rest)

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": iter_once, "__module__": kind.__module__})


def _taken(waiting: deque[Any]) -> Iterator[Any]:
    while waiting:
        yield waiting.popleft()


def _waiting(trainer: Trainer, loader: Any) -> list[Any]:
    """The batches that a loader is still to give before its own."""
    epoch, waiting = getattr(loader, _WAITING, (None, ()))
    return list(waiting) if epoch == trainer.current_epoch else []


def in_pieces(batches: list[Any], rows: int | None, size: int | None) -> list[Any]:
    """Batches of so many rows as batches of fewer: of the size that a run goes on with, mostly for want of memory.

    A batch that holds something else than tensors with as many rows stays whole.
    """
    if not rows or not size or size >= rows:
        return batches
    return [piece for batch in batches for piece in _pieces(batch, rows, size)]


def _pieces(batch: Any, rows: int, size: int) -> list[Any]:
    values, form = tree_flatten(batch)
    if not values or not all(isinstance(v, torch.Tensor) and v.shape[:1] == (rows,) for v in values):
        return [batch]
    count = -(-rows // size)  # as long as each other: one row alone may be too few for a layer
    return [tree_unflatten(piece, form) for piece in zip(*(v.tensor_split(count) for v in values), strict=True)]


def _is_plain(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` gives back the same."""
    if type(value) is dict:
        return all(isinstance(key, str | int) and _is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (torch.Tensor, str, int, float, bool)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inner))
