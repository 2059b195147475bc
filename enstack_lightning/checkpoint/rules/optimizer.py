"""CK4xx but for CK401: the optimizer has its state, for every parameter alike, and fits the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.facts import Facts, OptimizerFacts, ParamGroupFacts, SchedulerFacts
from enstack_lightning.checkpoint.rules.optimizer_steps import expected_steps, scales_losses
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

SCALED_DOWN = 20
"""So many steps a gradient scaler may skip one after the other, halving its scale each time, before it finds one."""

MAX_LISTED = 10

_OTHER_CHECKPOINT = "Use another checkpoint of this run."


@rule(
    "CK402",
    "optimizer-state-missing",
    compares="each optimizer's state with the steps done",
    source="torch.optim: which optimizers keep state is told from their param groups",
)
def optimizer_state_missing(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An optimizer that keeps moments has none although steps were done, or the optimizers are missing altogether.

    SGD without momentum keeps no state, and that is healthy; Adam's `betas` or a `momentum` above 0 in the param groups
    tell an optimizer that does. Of several optimizers one may not have stepped yet: where the others have all the steps
    that the loop counted, it has not; where another one counts no steps, as SGD, it may have made them all: a warning.
    So is a gradient scaler, which may have skipped all of a few steps so far.
    """
    if facts.optimizers is None or not (facts.fields or facts.optimizers):
        return
    expected = expected_steps(facts, options)
    done = expected.steps if expected else 0
    others = sum(o.most_steps or 0 for o in facts.optimizers)
    by_others = facts.progress.optimizer_steps is not None and done <= others
    scaled = scales_losses(facts) and done <= SCALED_DOWN
    untold = any(_steps_uncounted(o) for o in facts.optimizers)
    if not facts.optimizers and done:
        yield error(
            f"no optimizer state after {done:,} steps: training would go on with a fresh optimizer",
            "optimizer",
            "Use another checkpoint of this run; CheckpointGuard(repair=True) trains on with fresh moments.",
        )
    for number, optimizer in enumerate(facts.optimizers):
        if not optimizer.groups and not optimizer.parameters_with_state:
            yield passed(f"optimizer {number}: none, the run trains without one")
        elif not optimizer.groups:
            yield error(f"optimizer {number} has no param_groups", "optimizer", _OTHER_CHECKPOINT)
        elif not optimizer.keeps_moments or optimizer.parameters_with_state or not optimizer.parameter_count:
            yield _state_there(number, optimizer)
        elif done and by_others:
            yield passed(f"optimizer {number}: has not stepped, the others have all {done:,} steps")
        elif done:
            yield (warning if scaled or untold else error)(
                f"optimizer {number} has no state for any of its {optimizer.parameter_count:,} parameters after "
                f"{done:,} steps: training would go on with a fresh optimizer",
                "optimizer",
                "Expected if the gradient scaler has skipped every step so far; else use another checkpoint."
                if scaled
                else "Expected if it has not stepped yet, as another one counts no steps; else use another checkpoint."
                if untold
                else _OTHER_CHECKPOINT,
            )
        else:
            yield _state_there(number, optimizer)


def _steps_uncounted(optimizer: OptimizerFacts) -> bool:
    """Whether an optimizer may have stepped without a count of it in the checkpoint."""
    may_have = optimizer.parameters_with_state or not optimizer.keeps_moments
    return bool(optimizer.groups and optimizer.most_steps is None and may_have)


def _state_there(number: int, optimizer: OptimizerFacts) -> Outcome:
    return passed(
        f"optimizer {number}: {many(len(optimizer.groups), 'group')}, {many(optimizer.parameter_count, 'parameter')}, "
        f"{optimizer.parameters_with_state:,} with state"
    )


@rule(
    "CK403",
    "parameters-disagree",
    Severity.WARNING,
    compares="the step counts of all parameters of an optimizer with each other",
    source="torch.optim: each parameter counts its own steps",
)
def parameters_disagree(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The parameters of one optimizer have done different numbers of steps.

    Honest where parameters were frozen for a while or get no gradient in some steps; else the sign of a state that was
    put together from two saves. Whole groups that are behind, each in step with itself, are worth knowing only: so are
    layers that were unfrozen later.
    """
    for number, optimizer in enumerate(facts.optimizers or ()):
        counts = sorted(set(optimizer.steps.values()))
        if len(counts) < 2:
            continue
        fewest, most = int(counts[0]), int(counts[-1])
        behind = [parameter for parameter, steps in optimizer.steps.items() if steps < counts[-1]]
        by_group = [{optimizer.steps[p] for p in group.params if p in optimizer.steps} for group in optimizer.groups]
        each_in_step = all(len(steps) <= 1 for steps in by_group)  # as fine-tuning callbacks unfreeze: a group a time
        yield (info if each_in_step else warning)(
            f"optimizer {number}: {len(behind):,} of {len(optimizer.steps):,} parameters have fewer steps than the "
            f"others ({fewest:,} to {most:,})",
            "optimizer",
            f"{_unfreezing(optimizer, counts)}otherwise use another checkpoint. Behind: {_listed(optimizer, behind)}.",
        )


def _unfreezing(optimizer: OptimizerFacts, counts: list[float]) -> str:
    """What the numbers say for layers that joined later: whole groups of parameters, each in step."""
    if len(counts) <= max(4, len(optimizer.groups)):
        lag = " and ".join(f"{int(counts[-1] - c):,}" for c in reversed(counts[:-1]))
        return f"Expected if layers were unfrozen {lag} steps after the start, or get no gradient in some steps; "
    return "Expected if parts of the model get a gradient in some steps only; "


@rule(
    "CK404",
    "unknown-parameter-state",
    compares="the parameters in an optimizer's state with those of its groups",
    source="torch/optim/optimizer.py, Optimizer.state_dict",
)
def unknown_parameter_state(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The optimizer's state names parameters that are in none of its groups, or a parameter is in two of them."""
    for number, optimizer in enumerate(facts.optimizers or ()):
        params = [p for g in optimizer.groups for p in g.params]
        known = set(params)
        stray = [p for p in {**optimizer.steps, **optimizer.moments} if p not in known]
        if stray and optimizer.groups:
            yield error(
                f"optimizer {number} has state for {len(stray):,} parameters that are in none of its groups",
                "optimizer",
                _OTHER_CHECKPOINT,
            )
        if len(known) < len(params):
            twice = [p for p, count in Counter(params).items() if count > 1]
            yield error(
                f"optimizer {number} has {len(twice):,} parameters in more than one of its groups: "
                f"{_listed(optimizer, twice)}",
                "optimizer",
                _OTHER_CHECKPOINT,
            )


_ADAM_AND_SGD = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_diff", "momentum_buffer")
_OTHERS = ("square_avg", "grad_avg", "acc_delta", "sum", "prev", "ax")
_OF_WEIGHT_SHAPE = frozenset((*_ADAM_AND_SGD, *_OTHERS))
"""Entries that torch's optimizers and their kin keep in the shape of the weight; what else there is may be reduced."""


@rule(
    "CK405",
    "moment-shape",
    compares="the shapes of an optimizer's moments with those of the weights",
    source="torch.optim: moments have the shape of their parameter",
)
def moment_shape(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A moment of the optimizer has a shape that no weight has: optimizer and weights are of two models.

    Where the optimizer knows its parameters' names, each is compared with the weight of its name; else its shape must
    occur among the weights', since the order of parameters is not in the file. Entries in other shapes by design are
    left alone (the rows and columns of Adafactor, the blocks of 8-bit optimizers), and so is an optimizer whose moments
    are all flat, as sharded training keeps them. torch notices a wrong shape at the first step, or never. In a live run
    each moment is compared with the parameter that it belongs to.
    """
    if facts.live:
        yield from _moments_of_a_live_run(facts)
        return
    if not facts.tensors or facts.defects:
        return
    by_name = {t.name: t.shape for t in facts.tensors}
    shapes = set(by_name.values())
    for number, optimizer in enumerate(facts.optimizers or ()):
        held = {shape for entries in optimizer.moments.values() for shape in entries.values()}
        if not held or _is_flat(held, shapes):
            continue
        names = _names_of(optimizer, by_name)
        of_one_element = {shape for shape in held if math.prod(shape) == 1}
        wrong = []
        compared = 0
        for parameter, entries in optimizer.moments.items():
            weight = names.get(parameter)
            for entry, shape in entries.items():
                if entry not in _OF_WEIGHT_SHAPE or shape in of_one_element:
                    continue
                compared += 1
                if (shape not in shapes) if weight is None else (shape != by_name[weight]):
                    wrong.append((parameter, entry, shape, weight))
        if wrong:
            parameter, entry, shape, weight = wrong[0]
            of = f"weight {weight} has {_shape(by_name[weight])}" if weight is not None else "no weight has that shape"
            yield error(
                f"optimizer {number}: {entry} of {_listed(optimizer, [parameter])} has shape {_shape(shape)}, and {of}"
                + (f" ({len(wrong):,} of {compared:,} moments do not fit)" if len(wrong) > 1 else ""),
                "optimizer",
                "Optimizer and weights are of two models or two saves; use another checkpoint of this run.",
            )
        elif compared:
            yield passed(f"optimizer {number}: {many(compared, 'moment')} in the shapes of weights")


def _moments_of_a_live_run(facts: Facts) -> Iterator[Outcome]:
    for number, optimizer in enumerate(facts.optimizers or ()):
        wrong = []
        compared = 0
        for parameter, entries in optimizer.moments.items():
            own = optimizer.shapes.get(parameter)
            for entry, shape in entries.items() if own is not None else ():
                if entry in _OF_WEIGHT_SHAPE:
                    compared += 1
                    if shape != own:
                        wrong.append((parameter, entry, shape))
        if wrong:
            parameter, entry, shape = wrong[0]
            yield error(
                f"optimizer {number}: {entry} of {_listed(optimizer, [parameter])} has shape {_shape(shape)}, and the "
                f"parameter {_shape(optimizer.shapes[parameter])} ({len(wrong):,} of {compared:,} moments do not "
                "fit): the first step would raise RuntimeError",
                "optimizer",
                "The optimizer's parameters are in another order than when the run was saved, or of another model.",
            )
        elif compared:
            yield passed(f"optimizer {number}: {many(compared, 'moment')} in the shapes of their parameters")


def _is_flat(moments: set[tuple[int, ...]], weights: set[tuple[int, ...]]) -> bool:
    return all(len(shape) == 1 for shape in moments) and any(len(shape) > 1 for shape in weights)


def _names_of(optimizer: OptimizerFacts, weights: Mapping[str, Any]) -> dict[int | str, str]:
    """The weight of each parameter whose name is known: `param_names` of named parameters, or its key in the state.

    An optimizer of a part of a module knows its parameters without that part's prefix. Two parameters of one name are
    of two parts, one a group; which is which is not in the file, and no name is known.
    """
    known: dict[int | str, str] = {p: p for p in optimizer.moments if isinstance(p, str)}
    for group in optimizer.groups:
        names = group.options.get("param_names")
        if isinstance(names, list) and len(names) == len(group.params):
            known.update(zip(group.params, map(str, names), strict=True))
    if len(set(known.values())) < len(known):
        return {}
    if all(name in weights for name in known.values()):
        return known
    for name in known.values():
        prefixes = [weight.removesuffix(name) for weight in weights if weight.endswith(f".{name}")]
        for prefix in prefixes:
            if all(prefix + other in weights for other in known.values()):
                return {parameter: prefix + other for parameter, other in known.items()}
        break
    return {}


@rule(
    "CK406",
    "parameter-count",
    compares="the number of an optimizer's parameters with the number of weights",
    source="torch.optim; torch.nn.Module.state_dict",
)
def parameter_count(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An optimizer trains more parameters than the checkpoint has weights: some of what was trained is not in it.

    Fewer are legal: buffers are weights without a gradient, and frozen layers need not be in the optimizer. More
    parameters than weights of which none further has state are frozen ones whose weights were left out on purpose.
    """
    weights = len(facts.tensors)
    if not weights or facts.defects:
        return
    for number, optimizer in enumerate(facts.optimizers or ()):
        count = optimizer.parameter_count
        if count <= weights:
            if count:
                yield passed(f"optimizer {number}: {many(count, 'parameter')}, {many(weights, 'weight')}")
            continue
        message = f"optimizer {number} has {count:,} parameters, and the checkpoint has {weights:,} weights"
        if optimizer.parameters_with_state > weights or not optimizer.parameters_with_state:
            yield error(
                message,
                "optimizer",
                "Parameters that were trained are not in the checkpoint, or optimizer and weights are of two models.",
            )
        else:
            yield info(message, "optimizer", "Expected if frozen weights are left out of the checkpoint on purpose.")


@rule(
    "CK407",
    "param-group-values",
    compares="lr, betas, momentum, eps and weight_decay with what torch's optimizers accept",
    source="torch.optim: the checks in each optimizer's __init__, which load_state_dict does not repeat",
)
def param_group_values(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A param group holds a value that no optimizer accepts, and that a resume would take over unseen.

    torch refuses a negative learning rate, weight decay, momentum or eps and betas outside [0, 1) when an optimizer is
    made; `load_state_dict` overwrites them without a check, so in a checkpoint they are an error. A momentum of 1 or
    more is accepted and lets training diverge, an eps of 0 divides by zero for a weight without a gradient: warnings.
    `OneCycleLR` with linear annealing sets a rate below 0 itself, at the last of its steps: worth knowing.
    """
    overshot = {rate for s in facts.schedulers or () if _is_at_its_end(s) for rate in s.last_lr if rate < 0}
    for number, optimizer in enumerate(facts.optimizers or ()):
        odd = [
            judged(
                f"optimizer {number}, group {index}: {what}", "optimizer", "" if judged is info else _OTHER_CHECKPOINT
            )
            for index, group in enumerate(optimizer.groups)
            for judged, what in _odd_values(group, overshot)
        ]
        yield from odd[:MAX_LISTED]
        if len(odd) > MAX_LISTED:
            yield error(f"optimizer {number}: {len(odd) - MAX_LISTED:,} further values that make no sense", "optimizer")
        if not odd and optimizer.groups:
            yield passed(f"optimizer {number}: sane values in {many(len(optimizer.groups), 'param group')}")


def _is_at_its_end(scheduler: SchedulerFacts) -> bool:
    return bool(scheduler.total_steps) and scheduler.last_epoch == scheduler.total_steps


def _odd_values(group: ParamGroupFacts, overshot: Container[float]) -> Iterator[tuple[Callable[..., Outcome], str]]:
    values: dict[str, Any] = {"lr": group.lr, "initial_lr": group.initial_lr, **group.options}
    for name in ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps", "momentum", "lr_decay", "alpha", "rho"):
        for value in _numbers_in(values.get(name)):
            if name == "lr" and value in overshot:
                yield info, f"lr is {value:g}, where OneCycleLR goes below 0 with the last of its steps"
            elif not math.isfinite(value) or value < 0:
                yield error, f"{name} is {value:g} and must be a number from 0 up"
            elif name == "momentum" and value >= 1:
                yield warning, f"momentum is {value:g} and should be below 1: training would diverge"
            elif name == "eps" and value == 0:
                yield warning, "eps is 0: a weight without a gradient would become NaN"
    for value in _numbers_in(values.get("betas")):
        if not 0 <= value < 1:
            yield error, f"one of betas is {value:g} and must lie in [0, 1)"


def _numbers_in(value: object) -> list[float]:
    """The numbers of an option that is one, or several; a tensor's value is not known."""
    entries = value if isinstance(value, list | tuple) else [value]
    return [float(e) for e in entries if isinstance(e, float) or (type(e) is int and abs(e) < 2**63)]


@rule(
    "CK408",
    "partial-state",
    compares="the parameters with state with all of an optimizer's, and their entries with each other",
    source="torch.optim: a parameter gets its state at its first gradient",
)
def partial_state(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Some of an optimizer's parameters have state and others have none, or lack an entry that the others have.

    A parameter without any state got no gradient so far: it is frozen or not used. That is common in healthy runs
    (every frozen layer that was handed to the optimizer), so it is worth knowing and no warning. A parameter that has
    one of Adam's moments without the other cannot be trained on: torch raises KeyError at the next step.
    """
    for number, optimizer in enumerate(facts.optimizers or ()):
        broken = [p for p, entries in optimizer.moments.items() if _half_of_adam(entries, optimizer)]
        if broken:
            yield error(
                f"optimizer {number}: {len(broken):,} parameters have one of exp_avg and exp_avg_sq without the other: "
                f"{_listed(optimizer, broken)}",
                "optimizer",
                _OTHER_CHECKPOINT,
            )
        per_parameter = optimizer.keeps_moments and not any("history_size" in g.options for g in optimizer.groups)
        with_state = {*optimizer.steps, *optimizer.moments}
        without = [p for g in optimizer.groups for p in g.params if p not in with_state]
        if per_parameter and with_state and without and len(without) < optimizer.parameter_count:
            yield info(
                f"optimizer {number}: {len(without):,} of {optimizer.parameter_count:,} parameters have no state: "
                f"{_listed(optimizer, without)}",
                "optimizer",
                "Expected if they are frozen or not used; a resume gives them a fresh state at their first gradient.",
            )


def _half_of_adam(entries: Mapping[str, Any], optimizer: OptimizerFacts) -> bool:
    """Whether one of Adam's moments is missing, in an optimizer that has both elsewhere."""
    has_both_or_none = ("exp_avg" in entries) == ("exp_avg_sq" in entries)
    if has_both_or_none or not any("betas" in g.options for g in optimizer.groups):
        return False
    return any("exp_avg" in others and "exp_avg_sq" in others for others in optimizer.moments.values())


def _listed(optimizer: OptimizerFacts, parameters: list[int | str]) -> str:
    """The first few parameters, by name where the optimizer knows their names."""
    names: dict[int | str, str] = dict(optimizer.names)
    for group in optimizer.groups:
        given = group.options.get("param_names")
        if isinstance(given, list) and len(given) == len(group.params):
            names.update(zip(group.params, map(str, given), strict=True))
    shown = [names.get(p, str(p) if isinstance(p, str) else f"parameter {p}") for p in parameters[:3]]
    more = f" and {len(parameters) - 3:,} more" if len(parameters) > 3 else ""
    return ", ".join(shown) + more


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
