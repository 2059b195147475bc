"""What a Trainer is set to, and what callbacks, data modules and optimizers of the user's own hold and save nowhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from enstack_lightning.guard.flavor import lightning_base
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.held_values import (
    attributes,
    differences,
    entries_of,
    few,
    is_users,
    of_kind,
    taken_down,
    tensors_of,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_Counts = Callable[[str, Any], bool]
_SETTINGS = (
    *("gradient_clip_val", "gradient_clip_algorithm", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"),
    *("limit_train_batches", "limit_val_batches", "val_check_interval", "overfit_batches"),
)
"""Of a Trainer, beside those that rules compare."""
_SOME = 100
"""Entries that tell whether a list is one of weights."""


def capture_settings(trainer: Trainer) -> dict[str, str]:
    """Those that change what is trained, as text: 1 batch is another limit than 1.0 of all."""
    return {name: str(getattr(trainer, name, None)) for name in _SETTINGS}


def other_settings(trainer: Trainer, saved: dict[str, str] | None) -> list[str]:
    """How the settings are others than those that `capture_settings` returned, in short sentences."""
    now = capture_settings(trainer)
    return [f"{name} was {was} and is {now[name]}" for name, was in (saved or {}).items() if now.get(name, was) != was]


def capture_others(trainer: Trainer, parts: Parts) -> dict[str, Any]:
    """What each holds, as `taken_down` has it, by its class's name."""
    others = ((name, vars(owner).items(), counts) for name, owner, counts in _others(trainer))
    kept = tensors_of(parts)
    return {name: taken_down({n: v for n, v in held if counts(n, v)}, kept) for name, held, counts in others}


def lost_by_others(trainer: Trainer, parts: Parts, saved: dict[str, Any] | None) -> list[str]:
    """Why a resumed run need not equal the other one, in short sentences.

    Args:
        trainer: the Trainer, with everything restored.
        parts: of its module.
        saved: what `capture_others` returned; None where nothing is known.
    """
    lost, kept = [], tensors_of(parts)
    for name, owner, _ in _others(trainer):
        then = (saved or {}).get(name)
        if then and (said := [phrase for _, phrase in differences(then, attributes(owner), name, kept)]):
            lost.append(f"{few(said)}, which no state_dict of {name} keeps")
    return lost


def users_callbacks(trainer: Trainer) -> list[Any]:
    """The callbacks that derive from none of Lightning's, which save themselves what they need, and have no state."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if _is_users_alone(type(callback)) and not _saves(callback)]


def _others(trainer: Trainer) -> Iterator[tuple[str, Any, _Counts]]:
    """The classes' names, numbered where there are several of one, the objects, and which attributes count."""
    seen: Counter[str] = Counter()
    for owner, counts in _holders(trainer):
        kind = type(owner).__name__
        seen[kind] += 1
        yield kind if seen[kind] == 1 else f"{kind} {seen[kind]}", owner, counts


def _holders(trainer: Trainer) -> Iterator[tuple[Any, _Counts]]:
    for callback in users_callbacks(trainer):
        yield callback, _may_steer
    module = getattr(trainer, "datamodule", None)
    if module is not None and is_users(type(module)) and not _saves(module):
        theirs = names_of_lightning(lightning_base(module, "LightningDataModule"))
        yield module, lambda name, value: name not in theirs and not _is_data(name, value)
    for optimizer in trainer.optimizers:
        if is_users(type(optimizer)):
            yield optimizer, lambda name, _: name not in _names_of_optimizers()


def _may_steer(name: str, value: Any) -> bool:
    """Whether a callback may go by it, as by a count or averaged weights; times and lists of figures are records."""
    if of_kind(value, list, tuple, dict):
        return any(_is_of_weights(entry) for _, entry in entries_of(value, _SOME) or ())
    return of_kind(value, int, Tensor, torch.nn.Module) or is_users(type(value))


def _is_of_weights(value: Any) -> bool:
    """Classes that a validation has found are whole numbers."""
    return of_kind(value, torch.nn.Module) or (
        type(value) in (Tensor, torch.nn.Parameter) and value.ndim > 0 and value.is_floating_point()
    )


def _is_data(name: str, value: Any) -> bool:
    """Of loaders' data sets `lost_by_loaders` tells."""
    return f"{name}".startswith("_hparams") or (hasattr(type(value), "__getitem__") and is_users(type(value)))


def _is_users_alone(kind: type) -> bool:
    return is_users(kind) and all(is_users(k) or k.__name__ in ("Callback", "ABC", "object") for k in kind.__mro__)


def _saves(thing: Any) -> bool:
    names = ("state_dict", "on_save_checkpoint")
    return any(is_users(kind) and name in vars(kind) for kind in type(thing).__mro__ for name in names)


@cache
def names_of_lightning(base: Any) -> frozenset[str]:
    """The attributes that Lightning gives a module or data module."""
    return frozenset((*vars(base()), "trainer"))


@cache
def _names_of_optimizers() -> frozenset[str]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which marks an optimizer that has stepped
    optimizer.step()
    return frozenset(vars(optimizer))
