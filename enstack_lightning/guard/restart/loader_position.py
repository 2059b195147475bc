"""Where the training data stands: the loaders' positions, their generators, and the random state of their workers.

torchdata's `StatefulDataLoader` saves its position. It does not save the generator that shuffles the epochs after this
one, nor what random augmentation in a worker draws from; and Lightning hands a position over only to a loader that is
made after the loops were restored (`FitLoop.setup_data`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from enstack_lightning.guard.restart.lost_by_others import users_callbacks
from enstack_lightning.guard.restart.own_generators import generators_in, generators_of, set_state, state_of
from enstack_lightning.guard.restart.plain_order import forget_order, know_order
from enstack_lightning.guard.restart.rng import (
    as_text,
    capture_cpu_random_state,
    from_text,
    restore_cpu_random_state,
)
from enstack_lightning.guard.restart.rows import OwnPositions, go_on_once, loaders_of, set_epoch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def restore_loader_position(trainer: Trainer) -> bool:
    """Puts the training loader at the checkpoint's position, if Lightning did not.

    `configure_optimizers` that asks for `trainer.estimated_stepping_batches` makes the training loader before the
    loops are restored, and Lightning hands a loader its saved state only while making it: such a run would go on with
    the first batches of a fresh epoch, and say nothing (`FitLoop.setup_data`, Lightning 2.6).

    Args:
        trainer: a Trainer at `on_train_start`, with its loops restored and no batch taken.

    Returns:
        Whether there was a position left to restore.
    """
    loop: Any = trainer.fit_loop
    states = getattr(loop, "_combined_loader_states_to_load", None)
    if loop.is_resuming and not loop.restarting:  # at an epoch's end that is not restarted exactly: all is spent there
        return False
    if not states or loop._combined_loader is None or loop._data_fetcher is None:
        return False
    for loader in loop._combined_loader.flattened:
        set_epoch(loader, loop.epoch_progress.current.processed)
    loop._combined_loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    for loader in loop._combined_loader.flattened:
        go_on_once(loader)
    positions = OwnPositions(trainer)
    iter(loop._data_fetcher)
    if not loop.restarting or loop.epoch_loop.batch_progress.is_last_batch:  # the epoch is over
        positions.take_back_fetched()
    return True


def loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """The positions of this process's stateful training loaders; other processes' may differ."""
    combined = trainer.fit_loop._combined_loader
    return combined._state_dicts() if combined is not None else []


def keeps_every_position(trainer: Trainer) -> bool:
    """Whether all training loaders have states: Lightning restores those that have, and the others begin anew."""
    return all(callable(getattr(loader, "load_state_dict", None)) for loader in loaders_of(trainer.fit_loop))


def begin_epoch_anew(trainer: Trainer) -> None:
    """Makes the training loaders begin the epoch that the loops have come to."""
    loop: Any = trainer.fit_loop
    if loop._combined_loader is None or loop._data_fetcher is None:
        return
    for loader in loop._combined_loader.flattened:
        for name in ("sampler", "batch_sampler"):
            sampler: Any = getattr(loader, name, None)
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(loop.epoch_progress.current.processed)
    iter(loop._data_fetcher)


def capture_reloads(trainer: Trainer) -> list[float]:
    """The epochs that the training and the validation loaders of now were made in; -inf for none."""
    loop: Any = trainer.fit_loop
    return [loop._last_train_dl_reload_epoch, loop.epoch_loop.val_loop._last_val_dl_reload_epoch]


@contextmanager
def as_if_in(trainer: Trainer, epoch: float) -> Iterator[None]:
    """Lets loaders be made as in the epoch that the saved run had made them in, if it would have them still.

    `reload_dataloaders_every_n_epochs` makes them anew only when so many epochs are over.
    """
    current = trainer.fit_loop.epoch_progress.current
    lasting: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    completed = current.completed
    if epoch >= 0 and trainer.current_epoch - epoch < lasting:
        current.completed = int(epoch)
    try:
        yield
    finally:
        current.completed = completed


# Generators of their own


def capture_generators(trainer: Trainer) -> dict[str, Any]:
    """The states of the generators that loaders, the module and callbacks own, by place."""
    return {place: state_of(generator) for place, generator in _generators(trainer)}


def restore_generators(trainer: Trainer, states: dict[str, Any]) -> None:
    """Sets the generators to what `capture_generators` returned; to be called once the iterators are made."""
    for place, generator in _generators(trainer):
        if place in states:
            set_state(generator, states[place])


def _generators(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Workers have copies of a data set, and it is their state that goes on: `_worker_random_state`."""
    for stage, loop in (("train", trainer.fit_loop), ("validation", trainer.fit_loop.epoch_loop.val_loop)):
        for number, loader in enumerate(loaders_of(loop)):
            place = f"{stage}.{number}"
            yield from ((f"{place}.{owner}", generator) for owner, generator in generators_of(loader))
            if not getattr(loader, "num_workers", 0):
                dataset = getattr(loader, "dataset", None)
                yield from ((f"{place}.dataset.{name}", generator) for name, generator in generators_in(dataset))
    owners = {"module": trainer.lightning_module, "data module": getattr(trainer, "datamodule", None)}
    owners |= {f"callback.{n}": callback for n, callback in enumerate(users_callbacks(trainer))}
    for place, owner in owners.items():
        yield from ((f"{place}.{name}", generator) for name, generator in generators_in(owner, deepest=0))


# Workers


def keep_random_state_of_workers(trainer: Trainer) -> None:
    """Lets stateful loaders with workers save each worker's random state with their positions, from now on.

    And lets plain loaders know their order (`plain_order`).

    torchdata asks a data set in a worker for its state after every batch. One that has none answers with the worker's
    generators, so that random augmentation goes on where it stood.
    """
    loop: Any = trainer.fit_loop

    def before_the_iterator_is_made() -> None:
        loaders = loaders_of(loop)
        is_restored = bool(loop.restarting and loop._combined_loader_states_to_load)
        for loader in loaders:
            _give_state(loader)
            know_order(loader, lambda: trainer.training)
            if is_restored:
                set_epoch(loader, loop.epoch_progress.current.processed)
        type(loop)._load_combined_loader_states(loop)
        for loader in loaders if is_restored else ():
            go_on_once(loader)

    if hasattr(type(loop), "_load_combined_loader_states"):
        loop._load_combined_loader_states = before_the_iterator_is_made


def stop_keeping_random_state_of_workers(trainer: Trainer) -> None:
    """Gives the fit loop its own method back, and plain loaders their own batch samplers."""
    vars(trainer.fit_loop).pop("_load_combined_loader_states", None)
    for loader in loaders_of(trainer.fit_loop):
        forget_order(loader)


def _give_state(loader: Any) -> None:
    dataset: Any = getattr(loader, "dataset", None)
    resumable = callable(getattr(loader, "load_state_dict", None)) and getattr(loader, "num_workers", 0) > 0
    is_a_stream = isinstance(dataset, IterableDataset)  # which torchdata passes over only if it has no state
    if not resumable or is_a_stream or not hasattr(dataset, "__getitem__") or hasattr(dataset, "state_dict"):
        return
    try:
        dataset.state_dict, dataset.load_state_dict = _worker_random_state, _set_worker_random_state
    except AttributeError:  # a data set with slots, or a list, goes without
        return


def _worker_random_state() -> dict[str, Any]:
    worker = torch.utils.data.get_worker_info()
    if worker is None:
        return {}
    own = {place: state_of(generator) for place, generator in generators_in(worker.dataset)}
    return {**capture_cpu_random_state(), "own": {place: _without_tensors(state) for place, state in own.items()}}


def _set_worker_random_state(state: dict[str, Any]) -> None:
    worker = torch.utils.data.get_worker_info()
    if not state or worker is None:
        return
    restore_cpu_random_state(state)
    states = state.get("own", {})
    for place, generator in generators_in(worker.dataset):
        if place in states:
            set_state(generator, _with_tensors(states[place]))


def _without_tensors(state: Any) -> Any:
    """A tensor takes a file descriptor on its way out of a worker."""
    return {"torch": as_text(state.numpy())} if isinstance(state, torch.Tensor) else state


def _with_tensors(state: Any) -> Any:
    is_torchs = isinstance(state, dict) and set(state) == {"torch"}
    return torch.from_numpy(from_text(state["torch"])) if is_torchs else state
