"""What torchdata's `StatefulDataLoader` needs beside its own state, to go on where it stood.

It passes over the batches that are done of an iterable data set without a state, and counts them twice, so that the
state it saves next leaves out as many. Samplers must know their epoch before they are asked for its order again. And a
data set that keeps its position itself is moved on by the batch that Lightning fetches ahead, which nobody trains where
the epoch begins with an iterator of its own.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset, default_collate

from enstack_lightning.checkpoint.readers.lightning import sampler_state
from enstack_lightning.checkpoint.readers.states import at

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_DREW = "_drew_while_passing_over"
"""The attribute of a loader that says so."""


def loaders_of(loop: Any) -> list[Any]:
    """The loaders of a training or validation loop; none before they are made."""
    combined = loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def is_inside_a_step(trainer: Trainer) -> bool:
    """Whether a batch has been taken whose step is not over."""
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batch.ready > batch.processed)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells the samplers of a loader their epoch, as Lightning does only once the loader stands at its position."""
    for told in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if callable(getattr(told, "set_epoch", None)):
            told.set_epoch(epoch)  # type: ignore[union-attr]


def has_state(value: Any) -> bool:
    """Whether torchdata saves and restores its state."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def rows_given(loader: Any, size: int) -> int | None:
    """The rows of a map-style data set that lie before a loader's position; None where it does not tell.

    Args:
        loader: a `StatefulDataLoader` whose state has been loaded.
        size: of its batches, of which it may pass over some.
    """
    state = getattr(loader, "next_iter_state", None)
    if state is None and getattr(loader, "_iterator", None) is not None and has_state(loader):
        state = loader.state_dict()
    if not isinstance(state, dict):
        return None
    given = at(sampler_state(state), ["samples_yielded"])
    return None if given is None else int(given) + int(state.get("_steps_since_snapshot") or 0) * size


def may_draw(loader: Any) -> bool:
    """Whether rows may come with random numbers; not those of tensors that are only put together."""
    return getattr(loader, "collate_fn", None) is not default_collate or not _is_of_tensors(loader.dataset)


def _is_of_tensors(dataset: Any) -> bool:
    if type(dataset) is ConcatDataset:
        return all(map(_is_of_tensors, dataset.datasets))
    return type(dataset) is TensorDataset or (type(dataset) is Subset and _is_of_tensors(dataset.dataset))


def drew_while_passing_over(loader: Any) -> bool:
    """Whether the data set drew random numbers of this process while its batches that are done were passed over."""
    return bool(getattr(loader, _DREW, False))


def go_on_once(loader: Any) -> None:
    """Sets the count of the next iterator right, of a loader whose state is just loaded and that passes over batches.

    To be called before that iterator is made.
    """
    dataset, state = getattr(loader, "dataset", None), getattr(loader, "next_iter_state", None)
    if not isinstance(dataset, IterableDataset) or has_state(dataset) or not isinstance(state, dict):
        return
    for worker in ((state.get("_snapshot") or {}).get("_worker_snapshots") or {}).values():
        worker["dataset_state"] = None  # a random state that the guard once gave it, and that keeps torchdata from it
    kind = type(loader)

    def iter_once(self: Any) -> Any:
        self.__class__ = kind
        before = _after_a_seed(self)
        iterator = iter(self)
        if iterator is getattr(self, "_iterator", None) and _count_once(iterator, state):
            drew = self.num_workers == 0 and before != _random_state()
            setattr(self, _DREW, drew)
        return iterator

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": iter_once, "__module__": kind.__module__})


def _count_once(iterator: Any, state: dict[str, Any]) -> bool:
    """Whether the iterator passed over batches; what it counted twice of them is taken off."""
    snapshot = state.get("_snapshot")
    passed = state.get("_num_yielded", 0) if snapshot is None else snapshot.get("_snapshot_step", 0)
    since = 0 if snapshot is None else state.get("_steps_since_snapshot", 0)
    if not passed or iterator._num_yielded != 2 * passed + since:
        return False
    iterator._num_yielded -= passed
    if snapshot is None:
        iterator._sampler_iter_yielded -= passed
    else:
        iterator._snapshot["_snapshot_step"] -= passed
    return True


def _after_a_seed(loader: Any) -> Any:
    """The random state that making an iterator leaves, which draws a seed for workers."""
    before = torch.get_rng_state()
    owned = getattr(loader, "generator", None)
    if owned is None:
        torch.empty((), dtype=torch.int64).random_()
    expected = _random_state()
    torch.set_rng_state(before)
    return expected


def _random_state() -> Any:
    numpy = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), random.getstate(), repr(numpy), numpy["state"]["key"].tolist()


# A position that the data set keeps


class OwnPositions:
    """The states of iterable data sets that keep their position, from before a batch is fetched ahead of it.

    Args:
        trainer: a Trainer whose training loader is made, and its iterator not.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loop = trainer.fit_loop
        self._states: list[tuple[Any, Any]] = [
            (loader.dataset, _saved_state(loader) or loader.dataset.state_dict())
            for loader in loaders_of(self._loop)
            if keeps_its_position(loader) and not getattr(loader, "num_workers", 0)
        ]

    def take_back_fetched(self) -> None:
        """Where the epoch is over: the next one has an iterator of its own, which would leave out that batch.

        One more iterator is made, as torchdata makes one of a loaded state.
        """
        if not getattr(self._loop._data_fetcher, "batches", None):
            return
        for dataset, state in self._states:
            if state is not None:
                dataset.load_state_dict(state)
                iter(dataset)


def keeps_its_position(loader: Any) -> bool:
    """Whether the loader's data set is an iterable one with a state."""
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, IterableDataset) and has_state(dataset)


def has_ended(loader: Any) -> bool:
    """Whether the data set's end had come, for all workers where there are some, where the next iterator goes on.

    torchdata asks for one batch more all the same, or begins anew, and a data set that is at its beginning again would
    give its rows once more.
    """
    state = getattr(loader, "next_iter_state", None) or {}
    if state.get("_iterator_finished"):
        return True
    snapshot = state.get("_snapshot") or {}
    fetchers = [worker.get("fetcher_state") or {} for worker in snapshot.get("_worker_snapshots", {}).values()]
    return bool(fetchers) and all(fetcher.get("fetcher_ended") for fetcher in fetchers)


def _saved_state(loader: Any) -> Any:
    """The data set's part of the state that the loader's next iterator is made from."""
    state = getattr(loader, "next_iter_state", None) or {}
    fetcher = state.get("fetcher_state") or {}
    return state.get("dataset_state") or fetcher.get("dataset_iter_state")
