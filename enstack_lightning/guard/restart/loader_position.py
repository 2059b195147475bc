"""Where the training data stands: the loaders' positions, their generators, and the random state of their workers.

torchdata's `StatefulDataLoader` saves its position. It does not save the generator that shuffles the epochs after this
one, nor what random augmentation in a worker draws from; and Lightning hands a position over only to a loader that is
made after the loops were restored (`FitLoop.setup_data`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.guard.restart.plain_order import forget_order, generators_of, know_order
from enstack_lightning.guard.restart.rng import capture_cpu_random_state, restore_cpu_random_state

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
    loop = trainer.fit_loop
    states = getattr(loop, "_combined_loader_states_to_load", None)
    if loop.is_resuming and not loop.restarting:  # at an epoch's end that is not restarted exactly: all is spent there
        return False
    if not states or loop._combined_loader is None or loop._data_fetcher is None:
        return False
    loop._combined_loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    iter(loop._data_fetcher)
    return True


def loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """The positions of this process's stateful training loaders; other processes' may differ."""
    combined = trainer.fit_loop._combined_loader
    return combined._state_dicts() if combined is not None else []


def keeps_every_position(trainer: Trainer) -> bool:
    """Whether all training loaders have states: Lightning restores those that have, and the others begin anew."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    return all(callable(getattr(loader, "load_state_dict", None)) for loader in loaders)


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


# Generators of their own


def capture_generators(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The states of the generators that training and validation loaders and their samplers own, by place."""
    return {place: generator.get_state() for place, generator in _generators(trainer)}


def restore_generators(trainer: Trainer, states: dict[str, torch.Tensor]) -> None:
    """Sets the generators to what `capture_generators` returned; to be called once the iterators are made."""
    for place, generator in _generators(trainer):
        if place in states:
            generator.set_state(states[place].cpu())


def _generators(trainer: Trainer) -> Iterator[tuple[str, torch.Generator]]:
    fit, validation = trainer.fit_loop._combined_loader, trainer.fit_loop.epoch_loop.val_loop._combined_loader
    for stage, combined in (("train", fit), ("validation", validation)):
        for number, loader in enumerate(combined.flattened if combined is not None else ()):
            yield from ((f"{stage}.{number}.{owner}", generator) for owner, generator in generators_of(loader))


# Workers


def keep_random_state_of_workers(trainer: Trainer) -> None:
    """Lets stateful loaders with workers save each worker's random state with their positions, from now on.

    And lets plain loaders know their order (`plain_order`).

    torchdata asks a data set in a worker for its state after every batch. One that has none answers with the worker's
    generators, so that random augmentation goes on where it stood.
    """
    loop = trainer.fit_loop

    def before_the_iterator_is_made() -> None:
        for loader in loop._combined_loader.flattened if loop._combined_loader is not None else ():
            _give_state(loader)
            know_order(loader, lambda: trainer.training)
        type(loop)._load_combined_loader_states(loop)

    if hasattr(type(loop), "_load_combined_loader_states"):
        loop._load_combined_loader_states = before_the_iterator_is_made  # type: ignore[method-assign]


def stop_keeping_random_state_of_workers(trainer: Trainer) -> None:
    """Gives the fit loop its own method back, and plain loaders their own batch samplers."""
    vars(trainer.fit_loop).pop("_load_combined_loader_states", None)
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        forget_order(loader)


def _give_state(loader: Any) -> None:
    dataset: Any = getattr(loader, "dataset", None)
    resumable = callable(getattr(loader, "load_state_dict", None)) and getattr(loader, "num_workers", 0) > 0
    if not resumable or not hasattr(dataset, "__getitem__") or hasattr(dataset, "state_dict"):
        return
    try:
        dataset.state_dict, dataset.load_state_dict = _worker_random_state, _set_worker_random_state
    except AttributeError:  # a data set with slots, or a list, goes without
        return


def _worker_random_state() -> dict[str, Any]:
    return {} if torch.utils.data.get_worker_info() is None else capture_cpu_random_state()


def _set_worker_random_state(state: dict[str, Any]) -> None:
    if state and torch.utils.data.get_worker_info() is not None:
        restore_cpu_random_state(state)
