"""A fresh scheduler brought to the position that so many steps would have brought it to, in bounded time.

The steps are made by a twin of the scheduler on copies of the param groups, so that neither scheduler nor optimizer is
touched. The result is bit for bit that of stepping, but where `Forwarded.exact` says otherwise: schedules that reckon
each rate from the step alone are asked for the last one; those that multiply the rate they find are stepped, or asked
where it changes; only beyond `MAX_REPLAYED` such changes torch's own closed form is taken.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

MAX_REPLAYED = 200_000
"""Changes of a rate (steps x param groups x parts of a chain) that are replayed; about half a second of them."""

_DIRECT = (LambdaLR, OneCycleLR, CyclicLR, CosineAnnealingWarmRestarts)
"""Classes whose rate follows from the step alone, and not from the rate before."""

_CLOSED = (StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR, CosineAnnealingLR)
"""Classes that multiply the rate they find, and have a closed form besides."""

_OTHERS = (MultiplicativeLR, SequentialLR, ChainedScheduler)
_DRIVEN = ("lr", "momentum", "betas")
"""What a scheduler sets in a param group."""


class CannotForwardError(Exception):
    """The scheduler's rate at a position cannot be known, or not in bounded time; the message says why."""


@dataclass(frozen=True)
class Forwarded:
    """A scheduler at its new position.

    Attributes:
        state: its `state_dict()`.
        groups: what it makes of `lr`, `momentum` and `betas` of each param group.
        exact: whether the rates are bit for bit those of a scheduler that was stepped; else they are those of a closed
            form, which stepping misses by its rounding (below 1e-10 of the base rate in a million steps).
    """

    state: dict[str, Any]
    groups: tuple[dict[str, Any], ...]
    exact: bool = True

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self.groups)


def fast_forward(scheduler: LRScheduler, steps: int) -> Forwarded:
    """Where a scheduler that has not stepped yet stands after `steps` steps; it is not touched itself.

    Raises:
        CannotForwardError: its class is none of torch's, it waits for metrics, its schedule is shorter, `steps` are too
            many to be made and it has no closed form, or a function of the user's own raises or keeps a state.
    """
    _check_known(scheduler)
    kept = [(function, dict(_state_of(function))) for function in _functions_of(scheduler)]
    optimizer = _Groups(scheduler)
    twin = _twin(scheduler, optimizer)
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = copied(rate)  # that of step 0; a restored optimizer has another
    try:
        exact = _advance(twin, steps)
    except CannotForwardError:
        raise
    except Exception as e:  # torch's own (OneCycleLR beyond its end), or that of a function of the user's
        raise CannotForwardError(f"it cannot make {steps:,} steps: {e}") from e
    changed = [(function, state) for function, state in kept if _differ(state, _state_of(function))]
    for function, state in changed:
        _state_of(function).clear()
        _state_of(function).update(state)
    if changed:
        raise CannotForwardError("its function keeps a state of its own, which is lost")
    return Forwarded(twin.state_dict(), optimizer.driven(), exact)


def at_its_position(scheduler: LRScheduler) -> Forwarded | None:
    """What the schedule gives where the scheduler stands; None where that depends on the rates before.

    Raises:
        CannotForwardError: its class is none of torch's, it waits for metrics, or a function of the user's own raises.
    """
    _check_known(scheduler)
    optimizer = _Groups(scheduler)
    twin = _twin(scheduler, optimizer)
    while isinstance(twin, SequentialLR):
        twin = twin._schedulers[bisect_right(twin._milestones, twin.last_epoch)]
    if isinstance(twin, MultiplicativeLR | ChainedScheduler):
        return None
    try:
        if type(twin) in _CLOSED:
            rates = twin._get_closed_form_lr()
        else:
            twin._get_lr_called_within_step = True
            rates = twin.get_lr()
    except Exception as e:
        raise CannotForwardError(f"it gives no rate at step {position_of(scheduler)}: {e}") from e
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return Forwarded(twin.state_dict(), optimizer.driven(), exact=type(twin) not in _CLOSED)


def position_of(scheduler: Any) -> int | None:
    """How often a scheduler has stepped; None where it does not say."""
    if isinstance(scheduler, ChainedScheduler):
        positions = {position_of(part) for part in scheduler._schedulers}
        return positions.pop() if len(positions) == 1 else None
    position = getattr(scheduler, "last_epoch", None)
    return position if isinstance(position, int) else None


# What is known


def _check_known(scheduler: Any) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise CannotForwardError("its rate depends on the metrics of the run, which are not in the checkpoint")
    if type(scheduler) not in (*_DIRECT, *_CLOSED, *_OTHERS) or "step" in vars(scheduler):
        raise CannotForwardError(f"{type(scheduler).__qualname__} is none of torch's schedulers whose rate is known")
    for part in _parts(scheduler):
        _check_known(part)


def _parts(scheduler: Any) -> list[Any]:
    return list(getattr(scheduler, "_schedulers", ()))


def _functions_of(scheduler: Any) -> list[Any]:
    """The functions of the user's own that a schedule calls."""
    own = [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "_scale_fn_custom", None)]
    return [f for f in own if f is not None] + [f for part in _parts(scheduler) for f in _functions_of(part)]


def _state_of(function: Any) -> dict[str, Any]:
    """Its own attributes, and those of the object that it is a method of."""
    return getattr(getattr(function, "__self__", function), "__dict__", {})


def _differ(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether an attribute was set; what one refers to may be a whole model, and is not looked into."""
    return before.keys() != after.keys() or any(value is not after[name] for name, value in before.items())


# The twin


class _Groups:
    """In place of an optimizer: copies of its param groups, without the parameters."""

    def __init__(self, scheduler: Any) -> None:
        groups = scheduler.optimizer.param_groups
        self.param_groups = [{k: copied(v) for k, v in group.items() if k != "params"} for group in groups]
        self._opt_called = True

    def step(self) -> None:
        """Never called; a scheduler looks whether it may be."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def driven(self) -> tuple[dict[str, Any], ...]:
        return tuple({name: group[name] for name in _DRIVEN if name in group} for group in self.param_groups)


def copied(value: Any) -> Any:
    """A rate of a param group, which is a number or a tensor, that does not change with the group's."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _twin(scheduler: Any, optimizer: _Groups) -> Any:
    twin = copy.copy(scheduler)
    twin.optimizer = optimizer
    if _parts(scheduler):
        twin._schedulers = [_twin(part, optimizer) for part in scheduler._schedulers]
    return twin


# Forward


def _advance(scheduler: Any, steps: int) -> bool:
    """Brings a twin `steps` further; whether the rates are exact."""
    if steps <= 0:
        return True
    if isinstance(scheduler, SequentialLR):
        return _advance_sequence(scheduler, steps)
    if isinstance(scheduler, _DIRECT):
        _jump(scheduler, steps - 1)
        scheduler.step()
        return True
    groups = len(scheduler.optimizer.param_groups)
    if steps * groups * _leaves(scheduler) <= MAX_REPLAYED:
        for _ in range(steps):
            scheduler.step()
        return True
    if not isinstance(scheduler, _CLOSED):
        raise CannotForwardError(f"{type(scheduler).__name__} has no closed form, and {steps:,} steps take too long")
    begun, end = scheduler.last_epoch, scheduler.last_epoch + steps
    changes = _changes(scheduler, begun, end)
    if changes is None or len(changes) * groups > MAX_REPLAYED:
        _jump(scheduler, steps)
        _set_rates(scheduler, scheduler._get_closed_form_lr())
        return False
    for change in changes:
        _jump(scheduler, change - 1 - scheduler.last_epoch)
        scheduler.step()
    _jump(scheduler, end - scheduler.last_epoch)
    return True


def _advance_sequence(scheduler: Any, steps: int) -> bool:
    """Each part as far as it was in charge; at a milestone torch begins the next one."""
    end, milestones, exact = scheduler.last_epoch + steps, scheduler._milestones, True
    while scheduler.last_epoch < end:
        following = scheduler.last_epoch + 1
        index = bisect_right(milestones, following)
        if index and milestones[index - 1] == following:
            scheduler.step()
            continue
        until = min(end, milestones[index] - 1) if index < len(milestones) else end
        exact &= _advance(scheduler._schedulers[index], until - scheduler.last_epoch)
        scheduler.last_epoch = until
        scheduler._last_lr = scheduler._schedulers[index].get_last_lr()
    return exact


def _changes(scheduler: Any, begun: int, end: int) -> range | list[int] | None:
    """The steps after `begun` and up to `end` at which the rate changes; None where it does at each."""
    if isinstance(scheduler, StepLR):
        size = scheduler.step_size
        return range(begun - begun % size + size, end + 1, size)
    if isinstance(scheduler, MultiStepLR):
        return sorted(m for m in scheduler.milestones if begun < m <= end)
    if isinstance(scheduler, ConstantLR):
        return [t for t in (scheduler.total_iters,) if begun < t <= end]
    if isinstance(scheduler, LinearLR | PolynomialLR):
        return range(begun + 1, min(scheduler.total_iters, end) + 1)
    return None


def _jump(scheduler: Any, steps: int) -> None:
    """Moves the position alone."""
    scheduler.last_epoch += steps
    if not isinstance(scheduler, CosineAnnealingWarmRestarts):
        scheduler._step_count += steps
        return
    done, length = scheduler.T_cur + steps, scheduler.T_i
    if scheduler.T_mult == 1:
        done %= length
    while done >= length:
        done, length = done - length, length * scheduler.T_mult
    scheduler.T_cur, scheduler.T_i = done, length


def _set_rates(scheduler: Any, rates: Iterable[Any]) -> None:
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = [copied(group["lr"]) for group in scheduler.optimizer.param_groups]


def _leaves(scheduler: Any) -> int:
    return sum(map(_leaves, _parts(scheduler))) or 1
