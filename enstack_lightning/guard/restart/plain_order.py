"""The order of a plain `DataLoader`, so that a run goes on inside an epoch with the batches that are left of it.

Such a loader keeps no position: Lightning begins a new order there, and rows are trained twice or not at all. But which
rows a map-style data set gives is settled by its batch sampler alone, from the random state at the epoch's beginning.
So that state is saved, the order drawn anew from it, and the batches that are done passed over without loading a row. A
checksum of their indices shows whether it is the same order; where it is not, nothing is changed, and that is said.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from enstack_lightning.guard.restart.own_generators import generators_of, set_state, state_of
from enstack_lightning.guard.restart.rng import capture_random_state, restore_random_state
from enstack_lightning.guard.restart.rows import is_inside_a_step, loaders_of, may_draw

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_KNOWN_BATCHES = 64
"""The last batches drawn whose checksums are kept, beside those that wait in workers."""


class KnownOrder:
    """In place of a loader's batch sampler: the same batches of indices, with what it takes to draw them again.

    Args:
        loader: the loader.
        in_training: whether an iterator that is made now is that of training; the same loader may validate too.
    """

    __slots__ = ("_begun", "_checksums", "_generators", "_in_training", "_rest", "batch_sampler")

    def __init__(self, loader: Any, in_training: Callable[[], bool]) -> None:
        self.batch_sampler: Any = loader.batch_sampler
        self._generators = list({id(g): g for _, g in generators_of(loader)}.values())
        waiting = loader.num_workers * (loader.prefetch_factor or 0)
        self._checksums: deque[tuple[int, int]] = deque([(0, 0)], maxlen=_KNOWN_BATCHES + waiting)
        self.begin_anew(in_training)

    def begin_anew(self, in_training: Callable[[], bool]) -> None:
        """Forgets what a run before this one has left."""
        self._in_training = in_training
        self._begun: dict[str, Any] | None = None
        self._rest: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch_sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__slots__:
            object.__setattr__(self, name, value)
        else:  # a callback that changes the batch size, for example
            setattr(self.batch_sampler, name, value)

    def __reduce__(self) -> Any:
        return _itself, (self.batch_sampler,)  # a copy of the loader is nobody's but the user's

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        if not self._in_training():
            return iter(self.batch_sampler)
        if self._rest is not None:
            return self._what_is_left()
        before = self._state_now()
        order = iter(self.batch_sampler)
        has_drawn = not _equal(before, self._state_now())
        return self._from_the_start(order, before if has_drawn else None)

    def _from_the_start(self, order: Iterator[Any], begun: dict[str, Any] | None) -> Iterator[Any]:
        """As a rule a sampler draws when it is asked for its first batch, and not when its iterator is made."""
        self._begun = begun or self._state_now()
        self._checksums.clear()
        self._checksums.append((0, 0))
        yield from self._counted(order)

    def _what_is_left(self) -> Iterator[Any]:
        """Taken with the first batch: a loader with workers makes two iterators and uses the second."""
        order, self._rest = self._rest, None
        assert order is not None
        yield from self._counted(order)

    def _counted(self, order: Iterator[Any]) -> Iterator[Any]:
        for batch in order:
            drawn, checksum = self._checksums[-1]
            self._checksums.append((drawn + 1, _checksum(batch, checksum)))
            yield batch

    def position(self, batches: int) -> dict[str, Any] | None:
        """What `go_to` needs after so many batches of the epoch; None where that is not known any more."""
        checksum = dict(self._checksums).get(batches)
        return None if self._begun is None or checksum is None else {**self._begun, "drawn": [batches, checksum]}

    def go_to(self, position: dict[str, Any]) -> bool:
        """Lets the next iterator go on from a position; whether the order up to there is the same as it was.

        The process's random state is left as it is, that of generators as it is after the batches that are done.
        """
        now = self._state_now()
        if len(position["generators"]) != len(self._generators):
            return False
        batches, wanted = position["drawn"]
        try:
            self._set_state(position)
            order, drawn, checksum = iter(self.batch_sampler), 0, 0
            for batch in itertools.islice(order, batches):
                drawn, checksum = drawn + 1, _checksum(batch, checksum)
            same = (drawn, checksum) == (batches, wanted)
            if not same:
                self._set_state(now)
        finally:
            restore_random_state(now["random_state"])
        if same:
            self._begun = {name: position[name] for name in ("random_state", "generators")}
            self._checksums.append((batches, checksum))
            self._rest = order
        return same

    def _state_now(self) -> dict[str, Any]:
        return {"random_state": capture_random_state(), "generators": [state_of(g) for g in self._generators]}

    def _set_state(self, state: dict[str, Any]) -> None:
        restore_random_state(state["random_state"])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            set_state(generator, saved)


def _itself(batch_sampler: Any) -> Any:
    return batch_sampler


def _checksum(batch: Any, before: int) -> int:
    indices = batch.tolist() if hasattr(batch, "tolist") else batch  # the text of a long array leaves its middle out
    return zlib.crc32(repr(indices).encode(), before)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_equal(value, b[name]) for name, value in a.items())
    return all(map(_equal, a, b)) if isinstance(a, list) else bool(a == b)


def know_order(loader: Any, in_training: Callable[[], bool] = lambda: True) -> None:
    """Puts a `KnownOrder` in the place of a plain loader's batch sampler; other loaders stay as they are."""
    if isinstance(known := getattr(loader, "batch_sampler", None), KnownOrder):
        known.begin_anew(in_training)
    elif (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not callable(getattr(loader, "state_dict", None))
        and not isinstance(loader.dataset, IterableDataset)
        and getattr(loader, "in_order", True)
        and loader.batch_sampler is not None
        and getattr(loader, "_iterator", None) is None  # lasting workers that run already keep the sampler they have
    ):
        vars(loader)["batch_sampler"] = KnownOrder(loader, in_training)  # an attribute that DataLoader lets nobody set


def forget_order(loader: Any) -> None:
    """Gives a loader its own batch sampler back."""
    order = vars(loader).get("batch_sampler") if isinstance(loader, DataLoader) else None
    if isinstance(order, KnownOrder):
        vars(loader)["batch_sampler"] = order.batch_sampler


def capture_order(trainer: Trainer) -> dict[str, Any] | None:
    """Where this process's only plain training loader stands inside its epoch; None where that is not known.

    A batch whose step is not done is trained again; one of which only the last hooks are left is not.
    """
    order, loop = _only_order(trainer), trainer.fit_loop
    progress: Any = loop.epoch_loop.batch_progress
    done = progress.current.processed
    if order is None or not 0 < done < loop.max_batches or (progress.is_last_batch and not is_inside_a_step(trainer)):
        return None
    position = order.position(done)
    epoch: Any = loop.epoch_progress.current
    return position and {**position, "epoch": epoch.processed}


def restore_order(trainer: Trainer, position: dict[str, Any]) -> bool:
    """Lets the next iterator of the training loader go on from what `capture_order` returned, if it gives that order.

    To be called before that iterator is made.
    """
    order = _only_order(trainer)
    if order is None:
        return False
    sampler = getattr(order, "sampler", None)
    if callable(getattr(sampler, "set_epoch", None)):
        sampler.set_epoch(position["epoch"])  # type: ignore[union-attr]
    if order.go_to(position):
        return True
    if not callable(getattr(order.batch_sampler, "set_epoch", None)):
        return False
    order.batch_sampler.set_epoch(position["epoch"])  # Lightning does not, and a user's hook may have
    return order.go_to(position)


def drawn_anew(trainer: Trainer) -> str | None:
    """What of a data set's random numbers a kept order does not give again, in a sentence; None where all come."""
    combined, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if _only_order(trainer) is None or combined is None:
        return None
    if not may_draw(combined.flattened[0]):
        return None
    if combined.flattened[0].num_workers > 0:
        return (
            "what a data set draws at random in workers of a plain DataLoader is drawn anew, and else all is the same; "
            "a StatefulDataLoader keeps it"
        )
    if getattr(fetcher, "length", 0) is None:
        return (
            "what a data set draws at random for the batch that Lightning fetches ahead is drawn anew, and else all is "
            "the same; of a loader with a length it fetches none ahead"
        )
    return None


def _only_order(trainer: Trainer) -> KnownOrder | None:
    loaders = loaders_of(trainer.fit_loop)
    order = getattr(loaders[0], "batch_sampler", None) if len(loaders) == 1 else None
    return order if isinstance(order, KnownOrder) else None
