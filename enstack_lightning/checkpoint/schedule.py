"""Which learning rates a scheduler's own saved state gives, without torch: its class told from its entries, the rates
to come, and the curve of its whole schedule.

Formulas: `torch/optim/lr_scheduler.py`, the `_get_closed_form_lr` and `get_lr` of each class. `LambdaLR` and
`MultiplicativeLR` keep their functions out of the state and share their entries, so neither can be told or reckoned;
`ReduceLROnPlateau` depends on metrics to come, `SWALR` on the rates it started from.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from enstack_lightning.checkpoint.facts import ParamGroupFacts
from enstack_lightning.checkpoint.mappings import is_mapping

NEXT_RATES = 5
CURVE_POINTS = 200
MAX_GROUPS = 1_000
MAX_PARTS = 20
MAX_MILESTONES = 10_000
SAME_RATE = 1e-6
"""Relative difference up to which two learning rates are the same: torch reckons most schedules step by step."""

Curve = Callable[[int], float]
"""Learning rate at a scheduler step."""


@dataclass(frozen=True)
class ScheduleFacts:
    """What the state of a scheduler says of its schedule; the fields of `SchedulerFacts` of the same names.

    Attributes:
        kind: torch's class; None where the entries fit no class or several.
        next_lrs: the learning rates of the first param group at the coming steps, the next one first.
        curve: points (scheduler step, learning rate of the first param group) from 0 to the schedule's end.
        own_lr: what the schedule gives at the scheduler's position, one rate a param group; of one that was put to a
            fraction of an epoch no more than this is told.
    """

    kind: str | None = None
    next_lrs: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    own_lr: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Schedule:
    """The curves of all param groups, and the last step of the schedule; None where it has no end of its own."""

    curves: tuple[Curve, ...]
    end: int | None


class _Unknown(Exception):
    """The state lacks what the formula needs, or holds something else there."""


def describe(state: Mapping[str, Any], groups: Sequence[ParamGroupFacts]) -> ScheduleFacts:
    """The schedule that a scheduler's `state_dict()` holds.

    Where `_last_lr` is not what the schedule gives at its position (a rate set by hand, several schedulers on one
    optimizer, a scale function of the user's own), the rates to come are not foretold.

    Args:
        state: the state, symbolic or loaded.
        groups: the param groups of its optimizer; empty where they are not known.

    Example:
        >>> state = {"step_size": 2, "gamma": 0.1, "base_lrs": [1.0], "last_epoch": 1, "_last_lr": [1.0]}
        >>> describe(state, []).kind, describe(state, []).next_lrs[0]
        ('StepLR', 0.1)
    """
    kind = kind_of(state)
    if not counts_its_steps(state):
        return ScheduleFacts(kind, own_lr=_own_at_a_fraction(state))
    try:
        position = _count(_position_of(state, kind), lowest=0)
        schedule = _schedule_of(state, kind, groups)
        own = tuple(_rate(curve, position) for curve in schedule.curves)
        points = _points(position, schedule.end)
        curve = tuple((step, _rate(schedule.curves[0], step)) for step in points)
    except (_Unknown, ArithmeticError, LookupError, ValueError, TypeError):
        return ScheduleFacts(kind)
    last = _rates_or_none(state.get("_last_lr"))
    on_schedule = last is not None and len(last) == len(own) and all(map(same_rate, own, last))
    if kind == "CyclicLR" and not on_schedule:
        return ScheduleFacts(kind)  # a scale function of the user's own leaves no trace in the state
    following = _following(schedule, position) if on_schedule else ()
    return ScheduleFacts(kind, following, curve, own)


def counts_its_steps(state: Mapping[str, Any]) -> bool:
    """Whether `last_epoch` counts the scheduler's steps.

    `CosineAnnealingWarmRestarts.step(epoch + i / batches)` puts it to a fraction of an epoch and keeps the whole part
    there. Steps that are counted leave a whole number in `T_cur`, and a fraction a float, also where it is whole.
    """
    return kind_of(state) != "CosineAnnealingWarmRestarts" or isinstance(state["T_cur"], int)


def same_rate(a: float, b: float) -> bool:
    """Whether two learning rates are the same but for rounding."""
    return math.isclose(a, b, rel_tol=SAME_RATE, abs_tol=1e-12)


# Which class wrote the state

_ENTRIES_OF_ALL = frozenset(
    ("base_lrs", "last_epoch", "_step_count", "_get_lr_called_within_step", "_is_initial", "_last_lr", "verbose")
)
_ENTRIES = {
    "StepLR": {"step_size", "gamma"},
    "MultiStepLR": {"milestones", "gamma"},
    "ConstantLR": {"factor", "total_iters"},
    "LinearLR": {"start_factor", "end_factor", "total_iters"},
    "ExponentialLR": {"gamma"},
    "PolynomialLR": {"total_iters", "power"},
    "CosineAnnealingLR": {"T_max", "eta_min"},
    "CosineAnnealingWarmRestarts": {"T_0", "T_i", "T_mult", "eta_min", "T_cur"},
    "SequentialLR": {"_milestones", "_schedulers"},
    "ChainedScheduler": {"_schedulers"},
    "SWALR": {"_anneal_strategy", "anneal_epochs"},
}
_KIND_BY_ENTRIES = {frozenset(entries): kind for kind, entries in _ENTRIES.items()}
_TELLING_ENTRIES = {
    "OneCycleLR": {"total_steps", "_schedule_phases", "cycle_momentum"},
    "CyclicLR": {"max_lrs", "total_size", "step_ratio", "scale_mode"},
    "ReduceLROnPlateau": {"patience", "cooldown_counter", "num_bad_epochs", "best"},
}
"""Entries by which classes are told whose others vary with their options and with torch's version."""


def kind_of(state: Mapping[str, Any]) -> str | None:
    """torch's class whose `state_dict()` has these entries; None where it is none of them, or not one alone."""
    entries = frozenset(state) - _ENTRIES_OF_ALL
    for kind, telling in _TELLING_ENTRIES.items():
        if telling <= entries:
            return kind
    return _KIND_BY_ENTRIES.get(entries)


# The formulas: a state and one group's base rate in, a curve out


def _step_lr(state: Mapping[str, Any], base: float) -> Curve:
    size, gamma = _count(state["step_size"]), _real(state["gamma"])
    return lambda t: base * gamma ** (t // size)


def _multi_step_lr(state: Mapping[str, Any], base: float) -> Curve:
    gamma, milestones = _real(state["gamma"]), _milestone_counts(state["milestones"])
    steps = sorted(milestones)
    passed = [0, *accumulate(milestones[step] for step in steps)]
    return lambda t: base * gamma ** passed[bisect_right(steps, t)]


def _constant_lr(state: Mapping[str, Any], base: float) -> Curve:
    factor, total = _real(state["factor"]), _count(state["total_iters"])
    return lambda t: base * (factor if t < total else 1.0)


def _linear_lr(state: Mapping[str, Any], base: float) -> Curve:
    start, end, total = _real(state["start_factor"]), _real(state["end_factor"]), _count(state["total_iters"])
    return lambda t: base * (start + (end - start) * min(total, t) / total)


def _exponential_lr(state: Mapping[str, Any], base: float) -> Curve:
    gamma = _real(state["gamma"])
    return lambda t: base * gamma**t


def _polynomial_lr(state: Mapping[str, Any], base: float) -> Curve:
    total, power = _count(state["total_iters"]), _real(state["power"])
    return lambda t: base * (1.0 - min(total, t) / total) ** power


def _cosine_lr(state: Mapping[str, Any], base: float) -> Curve:
    half_wave, lowest = _count(state["T_max"]), _real(state["eta_min"])
    return lambda t: lowest + (base - lowest) * (1 + math.cos(math.pi * t / half_wave)) / 2


def _warm_restarts_lr(state: Mapping[str, Any], base: float) -> Curve:
    first, growth, lowest = _count(state["T_0"]), _count(state["T_mult"]), _real(state["eta_min"])

    def rate(t: int) -> float:
        length, begun = first, 0
        if growth == 1:
            begun = t - t % first
        while t >= begun + length:  # with growth 2 or more, at most 63 times
            begun, length = begun + length, length * growth
        return lowest + (base - lowest) * (1 + math.cos(math.pi * (t - begun) / length)) / 2

    return rate


def _own_at_a_fraction(state: Mapping[str, Any]) -> tuple[float, ...]:
    """What warm restarts give at the fraction of an epoch that they were put to; how far they go next is not known."""
    try:
        share, lowest = _real(state["T_cur"]) / _count(state["T_i"]), _real(state["eta_min"])
        wave = (1 + math.cos(math.pi * share)) / 2
        return tuple(lowest + (base - lowest) * wave for base in _rates(state.get("base_lrs")))
    except (_Unknown, ArithmeticError, ValueError):
        return ()


_Formula = Callable[[Mapping[str, Any], float], Curve]
_FORMULAS: dict[str | None, _Formula] = {
    "StepLR": _step_lr,
    "MultiStepLR": _multi_step_lr,
    "ConstantLR": _constant_lr,
    "LinearLR": _linear_lr,
    "ExponentialLR": _exponential_lr,
    "PolynomialLR": _polynomial_lr,
    "CosineAnnealingLR": _cosine_lr,
    "CosineAnnealingWarmRestarts": _warm_restarts_lr,
}
_FACTORS = frozenset(("StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR"))
"""Schedules that multiply the rate and nothing else, so that their chain is the product of their factors."""


def _one_cycle_lr(state: Mapping[str, Any], group: ParamGroupFacts) -> Curve:
    phases = state["_schedule_phases"]
    if not isinstance(phases, list) or not 1 <= len(phases) <= 3:
        raise _Unknown
    rates = {"initial_lr": group.initial_lr, "max_lr": group.max_lr, "min_lr": group.options.get("min_lr")}
    ends = [_real(phase["end_step"]) for phase in phases]
    bounds = [(_real(rates[p["start_lr"]]), _real(rates[p["end_lr"]])) for p in phases]
    total, cosine = _count(state["total_steps"]), {"cos": True, "linear": False}.get(state["_anneal_func_type"])
    if cosine is None:
        raise _Unknown

    def rate(t: int) -> float:
        if t > total:
            raise _Unknown  # torch raises ValueError there
        i = next((i for i, end in enumerate(ends) if t <= end), len(ends) - 1)
        begun = ends[i - 1] if i else 0.0
        share = (t - begun) / (ends[i] - begun)
        start, end = bounds[i]
        return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1) if cosine else (end - start) * share + start

    return rate


def _cyclic_lr(state: Mapping[str, Any], base: float, peak: float) -> Curve:
    size, up, gamma = _real(state["total_size"]), _real(state["step_ratio"]), _real(state["gamma"])
    scales: dict[str, Callable[[int, int], float]] = {
        "triangular": lambda cycle, t: 1.0,
        "triangular2": lambda cycle, t: 0.5 ** (cycle - 1),
        "exp_range": lambda cycle, t: gamma**t,
    }
    scale = scales.get(state["mode"])
    if scale is None or state.get("_scale_fn_custom") is not None:
        raise _Unknown

    def rate(t: int) -> float:
        cycle = math.floor(1 + t / size)
        x = 1.0 + t / size - cycle
        return base + (peak - base) * (x / up if x <= up else (x - 1) / (up - 1)) * scale(cycle, t)

    return rate


# From a state to its schedule


def _schedule_of(state: Mapping[str, Any], kind: str | None, groups: Sequence[ParamGroupFacts]) -> _Schedule:
    if kind == "SequentialLR":
        return _sequence(state)
    if kind == "ChainedScheduler":
        return _chain(state)
    bases = _rates(state.get("base_lrs"))
    if kind == "OneCycleLR":
        if not groups:
            raise _Unknown
        return _Schedule(tuple(_one_cycle_lr(state, g) for g in groups[:MAX_GROUPS]), _count(state["total_steps"]))
    if kind == "CyclicLR":
        peaks = _rates(state["max_lrs"])
        cyclic = tuple(_cyclic_lr(state, base, peak) for base, peak in zip(bases, peaks, strict=True))
        return _Schedule(cyclic, _count(math.ceil(_real(state["total_size"]))))
    formula = _FORMULAS.get(kind)
    if formula is None:
        raise _Unknown
    if kind in _FACTORS:
        factor = [formula(state, 1.0)]  # once, and not for each group: milestones may be many
        return _Schedule(tuple(_product(base, factor) for base in bases), _end_of(state, kind))
    return _Schedule(tuple(formula(state, base) for base in bases), _end_of(state, kind))


def _end_of(state: Mapping[str, Any], kind: str | None) -> int | None:
    if kind == "MultiStepLR":
        return max(_milestone_counts(state["milestones"]), default=0) + 1
    entry = {"CosineAnnealingLR": "T_max", "CosineAnnealingWarmRestarts": "T_0"}.get(kind or "", "total_iters")
    return _count(state[entry]) if entry in state else None


def _sequence(state: Mapping[str, Any]) -> _Schedule:
    """Each part begins anew, from its own base rates, at its milestone."""
    parts, milestones = _parts(state), state["_milestones"]
    if not isinstance(milestones, list) or len(milestones) != len(parts) - 1:
        raise _Unknown
    begins = [_count(m, lowest=0) for m in milestones]
    if begins != sorted(begins):
        raise _Unknown
    schedules = [_schedule_of(part, _kind_with_formula(part), ()) for part in parts]
    if len({len(s.curves) for s in schedules}) != 1:
        raise _Unknown

    def curve(group: int) -> Curve:
        def rate(t: int) -> float:
            i = bisect_right(begins, t)
            return schedules[i].curves[group](t - (begins[i - 1] if i else 0))

        return rate

    last = schedules[-1].end
    end = None if last is None else last + (begins[-1] if begins else 0)
    return _Schedule(tuple(curve(group) for group in range(len(schedules[0].curves))), end)


def _chain(state: Mapping[str, Any]) -> _Schedule:
    """All parts multiply the one rate, at every step."""
    parts = _parts(state)
    kinds = [_kind_with_formula(part) for part in parts]
    if not _FACTORS.issuperset(kinds) or len({repr(part.get("base_lrs")) for part in parts}) != 1:
        raise _Unknown
    factors = [_FORMULAS[kind](part, 1.0) for part, kind in zip(parts, kinds, strict=True)]
    curves = tuple(_product(base, factors) for base in _rates(parts[0].get("base_lrs")))
    ends = [_end_of(part, kind) for part, kind in zip(parts, kinds, strict=True)]
    return _Schedule(curves, None if None in ends else max(end for end in ends if end is not None))


def _product(base: float, factors: Sequence[Curve]) -> Curve:
    return lambda t: base * math.prod(factor(t) for factor in factors)


def _parts(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = state["_schedulers"]
    if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_PARTS:
        raise _Unknown
    if not all(is_mapping(part) for part in parts):
        raise _Unknown
    return parts


def _kind_with_formula(part: Mapping[str, Any]) -> str:
    kind = kind_of(part)
    if kind is None or kind not in _FORMULAS:
        raise _Unknown
    return kind


def _position_of(state: Mapping[str, Any], kind: str | None) -> Any:
    """A chain keeps no position; its parts stand at the same one."""
    if kind != "ChainedScheduler":
        return state.get("last_epoch")
    positions = {repr(part.get("last_epoch")): part.get("last_epoch") for part in _parts(state)}
    return next(iter(positions.values())) if len(positions) == 1 else None


def _points(position: int, end: int | None) -> list[int]:
    """Steps to show a curve at, evenly spread, with its beginning, its end and the position itself."""
    last = max(position, end if end is not None else max(2 * position, 10))
    spread = {last * i // CURVE_POINTS for i in range(CURVE_POINTS + 1)}
    return sorted(spread | {position, min(position + 1, last)})


def _following(schedule: _Schedule, position: int) -> tuple[float, ...]:
    """The rates after `position`, as far as the schedule gives any."""
    rates = []
    for step in range(position + 1, position + 1 + NEXT_RATES):
        try:
            rates.append(_rate(schedule.curves[0], step))
        except (_Unknown, ArithmeticError, ValueError):
            break
    return tuple(rates)


# Values of a state that nobody has vouched for


def _rate(curve: Curve, step: int) -> float:
    rate = curve(step)
    if not isinstance(rate, float) or not math.isfinite(rate):
        raise _Unknown
    return rate


def _real(value: object) -> float:
    """A finite number as a float, so that no power of it takes more than a float's time."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unknown
    if isinstance(value, int) and value.bit_length() > 63:
        raise _Unknown
    if not math.isfinite(value):
        raise _Unknown
    return float(value)


def _count(value: object, lowest: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**63:
        raise _Unknown
    return value


def _rates(value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_GROUPS:
        raise _Unknown
    return tuple(map(_real, value))


def _rates_or_none(value: object) -> tuple[float, ...] | None:
    try:
        return _rates(value)
    except _Unknown:
        return None


def _milestone_counts(value: object) -> dict[int, int]:
    """The milestones and how often each counts: a `Counter`, loaded or as what the pickle would call."""
    function, args = getattr(value, "function", None), getattr(value, "args", None)
    if str(function) == "collections.Counter" and isinstance(args, tuple) and len(args) == 1:
        value = args[0]
    if not is_mapping(value) or len(value) > MAX_MILESTONES:
        raise _Unknown
    counts = {_count(step, lowest=-(2**63)): _count(times) for step, times in value.items()}
    return {step: times for step, times in counts.items() if step >= 0}
