"""What loaders, samplers and data sets do not give again after a resume."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from enstack_lightning.guard.ranks import on_any_rank
from enstack_lightning.guard.restart.held_values import attributes, differences, is_users, of_kind, taken_down
from enstack_lightning.guard.restart.own_generators import generators_of, set_state, state_of
from enstack_lightning.guard.restart.rng import capture_random_state, restore_random_state
from enstack_lightning.guard.restart.rows import (
    drew_while_passing_over,
    has_state,
    keeps_its_position,
    loaders_of,
    may_draw,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from enstack_lightning.guard.restart.loops import ExactRestart

_INDICES_COMPARED = 10_000


def lost_by_loaders(trainer: Trainer, restart: ExactRestart | None) -> list[str]:
    """Why training or validation data may be other than that of the run that never stopped, in short sentences.

    To be called by all processes, as each has loaders of its own and the first one speaks for all.

    Args:
        trainer: at `on_train_start`, with its loops restored.
        restart: how its loops are started again; None where nothing is known of the moment that was saved.
    """
    lost = _lost_here(trainer, restart) if restart is not None and restart.mine.get("random_state") else []
    is_lost = on_any_rank(trainer, bool(lost))
    return lost or (["another process has lost something of its loaders"] if is_lost else [])


def _lost_here(trainer: Trainer, restart: ExactRestart) -> list[str]:
    loop: Any = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    epoch, batches = loop.epoch_progress.current.processed, progress.current.processed
    is_inside = not restart.is_epoch_done and batches > 0 and not progress.is_last_batch
    next_epoch = epoch if restart.is_epoch_done else epoch + 1
    goes_on = is_inside or loop.max_epochs in (None, -1) or next_epoch < loop.max_epochs
    lost: list[str] = []
    for loader in loaders_of(loop) if goes_on else ():
        if is_inside:
            lost += _lost_inside(loader, epoch, batches)
        elif progress.total.ready:
            lost += _lost_at_an_end(trainer, loader)
    had_workers = restart.resume.get("validation_workers", [])
    for had, loader in zip(had_workers, loaders_of(loop.epoch_loop.val_loop), strict=False):
        if had and getattr(loader, "persistent_workers", False) and may_draw(loader):
            lost.append(_in_lasting_workers(loader, " of validation"))
    return lost + (list(_other_counts(restart.mine.get("counts", {}), trainer)) if goes_on else [])


def _lost_inside(loader: Any, epoch: int, batches: int) -> Iterator[str]:
    if not hasattr(loader, "next_iter_state"):  # no StatefulDataLoader: its order is known, or its position lost
        return
    if drew_while_passing_over(loader):
        yield (
            f"{_name(loader.dataset)} has no state, and drew random numbers while the batches that are done were "
            "passed over; if its order depends on them it is another"
        )
    elif not isinstance(loader.dataset, IterableDataset) and not order_comes_back(loader, epoch, batches):
        yield (
            f"the order of {_name(_asked(loader))} is drawn anew, as a StatefulDataLoader restores only samplers with "
            "a state, torchdata's RandomSampler and those that always give the same; a plain DataLoader keeps it"
        )


def _lost_at_an_end(trainer: Trainer, loader: Any) -> Iterator[str]:
    if getattr(loader, "persistent_workers", False) and keeps_its_position(loader):
        yield f"lasting workers give rows of {_name(loader.dataset)} ahead, and it may not begin the epoch anew"
    elif getattr(loader, "persistent_workers", False) and not has_state(loader) and may_draw(loader):
        yield _in_lasting_workers(loader, "")
    elif keeps_its_position(loader) and trainer.fit_loop.max_batches != float("inf"):
        yield f"whether {_name(loader.dataset)} goes on after the batches that an epoch is limited to is not known"


def _in_lasting_workers(loader: Any, of: str) -> str:
    return (
        f"what {_name(loader.dataset)} draws at random in lasting workers{of} is drawn anew, and else all is the same"
    )


def order_comes_back(loader: Any, epoch: int, batches: int) -> bool:
    """Whether a StatefulDataLoader that is made anew gives the rest of the order that its sampler had begun.

    It does where torchdata saves a state of the sampler or of its iterator. Else it draws again what is done of the
    order, under another random state; and that must not show in the rest. So the sampler is asked for it twice.

    Args:
        loader: a `StatefulDataLoader` over a map-style data set.
        epoch: the epoch that is gone on with, from 0.
        batches: those of it that are done.
    """
    asked = _asked(loader)
    if has_state(asked):
        return True
    if asked is loader.batch_sampler and epoch and callable(getattr(asked, "set_epoch", None)):
        return False  # Lightning does not tell it, and the user may
    generators = [(generator, state_of(generator)) for _, generator in generators_of(loader)]
    before = capture_random_state()
    try:
        again, done = _copied(asked), batches * (1 if asked is loader.batch_sampler else loader.batch_size or 1)
        after = (1, 2) if loader.num_workers else (0, 0)  # for workers it is drawn ahead of what is put back
        return has_state(iter(again)) or _rest(again, done, 1, after[0]) == _rest(again, done, 2, after[1])
    except Exception:  # a sampler of the user's, which is not made to be copied or asked twice
        return False
    finally:
        restore_random_state(before)
        for generator, state in generators:
            set_state(generator, state)


def _asked(loader: Any) -> Any:
    """What gives the order: a user's batch sampler, or the sampler that torchdata's makes batches of.

    Where Lightning has made that one anew for several processes, the loader's own sampler is not asked.
    """
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        return loader.sampler
    return batch_sampler.sampler if type(batch_sampler).__module__.startswith("torchdata.") else batch_sampler


def _copied(sampler: Any) -> Any:
    """A sampler that counts its iterators must not count those made to see what it gives."""
    again = copy.copy(sampler)
    if hasattr(again, "sampler"):
        again.sampler = copy.copy(again.sampler)
    return again


def _rest(sampler: Any, done: int, before: int, after: int) -> list[Any]:
    """What a sampler gives after what is done of its order, each of them drawn by a seed."""
    _seed(before)
    order = iter(sampler)
    for _ in itertools.islice(order, done):
        pass
    _seed(after)
    rest = itertools.islice(order, _INDICES_COMPARED)
    return [index.tolist() if hasattr(index, "tolist") else index for index in rest]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def capture_counts(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The numbers and tensors that samplers and data sets of the user's own classes keep in this process, by place.

    Lightning's epoch is not one of them, nor what has a state that a loader saves.
    """
    return {place: taken_down(_counts(owner)) for place, owner in _counting(trainer)}


def _counts(owner: Any) -> dict[str, Any]:
    """Not what is gathered of rows in lists and dicts, which most often is the same whenever it is read."""
    kinds = (int, float, torch.Tensor, np.ndarray)
    return {name: value for name, value in vars(owner).items() if of_kind(value, *kinds) and name != "epoch"}


def _counting(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for number, loader in enumerate(loaders_of(trainer.fit_loop)):
        for place in ("sampler", "batch_sampler", "dataset"):
            if _may_count(loader, owner := getattr(loader, place, None)):
                yield f"{number}.{place}", owner


def _may_count(loader: Any, owner: Any) -> bool:
    of_users = is_users(type(owner)) and hasattr(owner, "__dict__")
    return of_users and not keeps_its_position(loader) and not (has_state(loader) and has_state(owner))


def _other_counts(then: dict[str, dict[str, Any]], trainer: Trainer) -> Iterator[str]:
    for place, owner in _counting(trainer):
        for _, said in differences(then.get(place, {}), attributes(owner), _name(owner)):
            yield f"{said}; if rows or their order depend on it they differ"


def _name(value: Any) -> str:
    return type(value).__name__
