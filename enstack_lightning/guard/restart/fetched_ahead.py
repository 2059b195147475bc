"""Batches that were fetched and not yet trained when a checkpoint was saved.

Lightning fetches one batch ahead from loaders without a length, to know the last batch when it comes
(`_PrefetchDataFetcher`). The position that a loader with a state saves is then behind a batch that no one has trained,
and a resume would leave it out. So these batches are saved too, and come first again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.guard.restart.rows import has_ended, has_state, loaders_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MOST_BYTES = 64 * 2**20
"""Of the batches of one process; larger ones are not kept in its checkpoints."""


def capture_fetched(trainer: Trainer) -> list[Any] | None:
    """The batches fetched ahead from a loader with a state; None where they cannot be kept in a checkpoint."""
    loop = trainer.fit_loop
    batches = [batch for batch, *_ in getattr(loop._data_fetcher, "batches", ())]
    loaders = loaders_of(loop)
    if not batches or not any(map(has_state, loaders)):
        return []
    fits = sum(map(_bytes, batches)) <= MOST_BYTES
    return batches if len(loaders) == 1 and fits and all(map(_is_plain, batches)) else None


def give_first(trainer: Trainer, batches: list[Any]) -> None:
    """Lets the training loader give these batches before its own; to be called before its iterator is made."""
    (loader,) = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    kind = type(loader)

    def iter_once(self: Any) -> Iterator[Any]:
        self.__class__ = kind
        is_all = has_ended(self)
        rest = iter(self)
        return itertools.chain(batches, () if is_all else rest)

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": iter_once, "__module__": kind.__module__})


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
