"""CK5xx: the scheduler stands where the counters say, and the learning rate is what its schedule gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from enstack_lightning.checkpoint.facts import Facts, Format, OptimizerFacts, ParamGroupFacts, SchedulerFacts
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules.optimizer_steps import averages_weights, expected_steps
from enstack_lightning.checkpoint.rules.overrides import trains_longer
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.rules.settings import same
from enstack_lightning.checkpoint.schedule import same_rate
from enstack_lightning.checkpoint.wording import many

WARM_UP_STEPS = 50
"""So many steps of a schedule without a closed form may be the beginning of its warm-up, with rates next to 0."""

_RECKONED_FROM_THE_START = frozenset(("OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts"))
"""Classes that reckon every rate from the base rate; all others multiply the rate they find, whoever set it."""

_COMES_BACK = {
    "CosineAnnealingLR": "the rate rises again after it",
    "PolynomialLR": "the rate stays at 0 after it",
}
_LENGTH = {"CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters"}
_SAVED_FIRST = "the next rate is the saved one, and the rate jumps after it."
_DISAGREES = (
    "Expected if a callback or optimizer_step sets the rate by hand; else use a checkpoint in which both agree: the "
    "scheduler goes on from one of them at its next step. CheckpointGuard(repair=True) sets the rate to the schedule's."
)


@rule(
    "CK501",
    "scheduler-position",
    Severity.WARNING,
    compares="last_epoch of the schedulers with the steps and epochs done",
    source="lightning/pytorch/loops/training_epoch_loop.py, update_lr_schedulers",
)
def scheduler_position(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A scheduler has stepped more or less often than training says.

    Lightning counts the steps of all schedulers together, so their `last_epoch`s add up to that counter. Where the
    guard recorded the run, each is compared alone: one that steps with every optimizer step stands at `global_step`,
    one that steps with every epoch at the number of epochs. transformers steps its scheduler with the optimizer, and
    not where the gradient scaler skipped a step. In an EnStack folder the scheduler steps with the optimizer as well,
    and the optimizer's tolerance applies. Steps of schedulers that are not in a checkpoint of Lightning are a warning
    too: it begins the schedule anew on a resume, and says nothing. Warm restarts that are put to a fraction of an epoch
    keep no count of their steps, and are not compared.
    """
    schedulers = facts.schedulers or ()
    stepped = facts.progress.scheduler_steps
    if facts.schedulers == () and stepped and not facts.live:
        yield warning(
            f"the loop counted {many(stepped, 'step')} of schedulers, and the checkpoint has none: a resume would "
            "begin the schedule anew",
            "scheduler",
            "Expected if the run went on without the schedule that it began with; else use another checkpoint, or set "
            "the scheduler forward with CheckpointGuard(repair=True).",
        )
    if not schedulers or any(s.last_epoch is None or s.kind == "SWALR" for s in schedulers):
        return  # the schedule of stochastic weight averaging takes over late, with a position of its own
    if facts.format in (Format.ENSTACK, Format.HUGGINGFACE):
        yield from _with_the_optimizer(schedulers[0], facts, options)
        return
    actual, counted = sum(s.last_epoch or 0 for s in schedulers), facts.progress.scheduler_steps
    if not counted:
        return  # manual optimization steps its schedulers itself and counts nothing
    if actual != counted:
        yield _off_position(f"scheduler steps {actual:,}, expected {counted:,}")
    elif wrong := [said for i, s in enumerate(schedulers) if (said := _off_its_interval(i, s, facts))]:
        yield _off_position(wrong[0])
    else:
        yield passed(f"scheduler steps {actual:,}, expected {counted:,}")


def _with_the_optimizer(scheduler: SchedulerFacts, facts: Facts, options: Options) -> Iterator[Outcome]:
    expected = expected_steps(facts, options)
    if expected is None or scheduler.kind == "ReduceLROnPlateau":
        return
    actual = scheduler.last_epoch or 0
    steps = [o.most_steps for o in facts.optimizers or () if o.most_steps is not None]
    near_counters = abs(actual - expected.steps) <= expected.tolerance
    # A mismatch that the optimizer shares is its own finding, said once, by CK401.
    near_optimizer = any(abs(actual - s) <= expected.tolerance for s in steps)
    if near_counters or near_optimizer:
        beside = "" if near_counters else f", the optimizer's own {steps[0]:,}"
        yield passed(f"scheduler steps {actual:,}, expected {expected.steps:,}{beside}")
    else:
        yield _off_position(f"scheduler steps {actual:,}, expected {expected.steps:,} ({expected.reckoning})")


def _off_position(message: str) -> Outcome:
    return warning(
        f"{message}: the learning rate is that of another step",
        "scheduler",
        "Use another checkpoint of this run, or set the scheduler forward before training, as "
        "CheckpointGuard(repair=True) does where the checkpoint has no state of it.",
    )


def _off_its_interval(index: int, scheduler: SchedulerFacts, facts: Facts) -> str | None:
    """What is wrong with one scheduler's position by its own interval, where the run's settings are known."""
    run, p = facts.run, facts.progress
    settings = list(zip(run.scheduler_intervals, run.scheduler_frequencies, strict=False))
    known = len(settings) == len(facts.schedulers or ()) and len(facts.optimizers or ()) == 1
    if not known or settings[index][1] != 1 or scheduler.kind == "ReduceLROnPlateau":
        return None
    position = scheduler.last_epoch or 0
    if settings[index][0] == "step" and p.optimizer_steps is not None and position != p.optimizer_steps:
        return f"scheduler {index} steps with the optimizer and stands at {position:,}, expected {p.optimizer_steps:,}"
    if settings[index][0] != "epoch" or p.epochs_completed is None:
        return None
    # It steps at an epoch's last batch, before or after the checkpoint of that moment is saved.
    if abs(position - p.epochs_completed) <= 1:
        return None
    return f"scheduler {index} steps every epoch and stands at {position:,}, expected {p.epochs_completed:,}"


@rule(
    "CK502",
    "learning-rate-out-of-bounds",
    Severity.WARNING,
    compares="each param group's lr with 1e-8 and with twice its initial one",
    source="EnStack's trainer",
)
def learning_rate_out_of_bounds(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The learning rate that training continues with is below 1e-8, or above twice the initial one and twice
    the peak that its schedule names (`OneCycleLR`, `CyclicLR`).

    Too low is an optimizer of which no group trains on: one group at 0 is how a part of a model is held still. A rate
    next to 0 is what the schedule gives at the start of a warm-up, before a warm restart, and at the end of a finished
    run. Averaging of weights (`SWALR`, `StochasticWeightAveraging`) goes from the rate that it finds to one of its own,
    and the larger of the two is the peak.
    """
    plan = plan_resume(facts)
    excused = (plan is not None and plan.kind == "finished") or any(
        _warms_up(s, options) or _is_complete(s) for s in facts.schedulers or ()
    )
    for number, optimizer in enumerate(facts.optimizers or ()):
        groups = [(index, group, group.lr) for index, group in enumerate(optimizer.groups) if group.lr is not None]
        too_high = [g for g in groups if g[2] > highest_rate(facts, g[1], options)]
        if not groups:
            continue
        if too_high:
            index, group, rate = too_high[0]
            whose = f"optimizer {number}" + (f", group {index}" if index else "")
            yield warning(
                f"learning rate {rate:.2e} of {whose} is above {highest_rate(facts, group, options):.2e}",
                "learning rate",
                "Check the schedule: this is more than it should ever give.",
            )
        elif not excused and all(rate < options.min_lr for _, _, rate in groups):
            yield warning(
                f"learning rate {_rates_of(optimizer)} of optimizer {number} is below {options.min_lr:.0e}: training "
                "would change almost nothing",
                "learning rate",
                "The schedule has run out: train with a longer one, or stop here."
                if facts.schedulers
                else "No schedule set it: it is what the optimizer was made with, or what was set by hand.",
            )
        else:
            yield passed(f"learning rate {_rates_of(optimizer)} of optimizer {number} within bounds")


def highest_rate(facts: Facts, group: ParamGroupFacts, options: Options) -> float:
    """The learning rate above which one of a param group is suspicious; infinite where nothing names a peak."""
    if options.max_lr is not None:
        return options.max_lr
    peaks = [rate for s in facts.schedulers or () for rate in s.max_lrs]
    averaged = _as_rate(group.options.get("swa_lr"))
    if averaged is not None or averages_weights(facts):
        peaks += _rates_before_averaging(facts)
        if not peaks and (averaged is None or same(averaged, group.initial_lr)):
            return math.inf  # Lightning writes the rate of averaging over the initial one
    peaks += [rate for rate in (group.initial_lr, group.max_lr, averaged) if rate is not None]
    peak = max(peaks, default=0.0)
    return 2 * peak if peak else math.inf


def _rates_before_averaging(facts: Facts) -> list[float]:
    """The rates that the optimizers and schedules of the run were made with, as far as they were recorded."""
    runs = (facts.run, (facts.saved or facts).run)
    groups = [group for run in runs for groups in run.optimizer_options for group in groups]
    rates = [group.get(name) for group in groups for name in ("lr", "initial_lr", "max_lr")]
    for schedule in (schedule for run in runs for schedule in run.scheduler_options):
        peaks = schedule.get("max_lrs")
        rates += peaks if isinstance(peaks, list | tuple) else []
    return [rate for value in rates if (rate := _as_rate(value)) is not None]


def _as_rate(value: object) -> float | None:
    """An option as a learning rate; None for what is none, since nobody has vouched for it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 2**63 else None


def _warms_up(scheduler: SchedulerFacts, options: Options) -> bool:
    """Whether the scheduler itself set a rate next to 0, and is about to raise it or may be."""
    position = scheduler.last_epoch
    if position == 0:
        return True
    if position is None and scheduler.kind == "CosineAnnealingWarmRestarts":
        return max(scheduler.base_lrs, default=0.0) >= options.min_lr  # it comes to 0 and begins again
    if position is None or not scheduler.last_lr or scheduler.last_lr[0] >= options.min_lr:
        return False
    if scheduler.next_lrs:
        return scheduler.next_lrs[0] > scheduler.last_lr[0]
    return scheduler.kind is None and position <= WARM_UP_STEPS


def _is_complete(scheduler: SchedulerFacts) -> bool:
    """Whether a schedule of fixed length has come to its end, which CK505 says."""
    return bool(scheduler.total_steps) and (scheduler.last_epoch or 0) >= (scheduler.total_steps or 0) - 1


def _rates_of(optimizer: OptimizerFacts) -> str:
    rates = list(dict.fromkeys(f"{g.lr:.2e}" for g in optimizer.groups if g.lr is not None))
    return ", ".join(rates[:4]) + (" ..." if len(rates) > 4 else "")


@rule(
    "CK503",
    "learning-rate-disagrees",
    Severity.WARNING,
    compares="each param group's lr with the scheduler's _last_lr",
    source="torch/optim/lr_scheduler.py, LRScheduler._update_lr",
)
def learning_rate_disagrees(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The optimizer's learning rate is another than the one its scheduler set last.

    With one scheduler for each optimizer every group is compared. Which scheduler drives which optimizer is not in the
    file, so of several each has to agree with one optimizer. With several schedulers on one optimizer only the last to
    step agrees.
    """
    schedulers = [s for s in facts.schedulers or () if s.last_lr]
    optimizers = [o for o in facts.optimizers or () if o.groups and all(g.lr is not None for g in o.groups)]
    if not schedulers or not optimizers or len(optimizers) != len(facts.optimizers or ()):
        return
    if len(schedulers) < len(facts.schedulers or ()):
        return
    wrong = [s for s in schedulers if not any(_agrees(s, o) for o in optimizers)]
    if len(optimizers) == 1 < len(schedulers):
        wrong = [] if len(wrong) < len(schedulers) else wrong
    if not wrong:
        yield passed(f"learning rates agree with {many(len(schedulers), 'scheduler')}")
        return
    scheduler, optimizer = wrong[0], optimizers[0] if len(optimizers) == 1 else None
    if optimizer is None:
        yield warning(
            f"no optimizer has the learning rate {scheduler.last_lr[0]:.6e} that a scheduler set",
            "learning rate",
            _DISAGREES,
        )
        return
    actual, expected = next((a, b) for a, b in _rates_set(scheduler, optimizer) if not same_rate(a, b))
    yield warning(
        f"the optimizer's learning rate is {actual:.6e} and its scheduler set {expected:.6e}",
        "learning rate",
        _DISAGREES,
    )


def _agrees(scheduler: SchedulerFacts, optimizer: OptimizerFacts) -> bool:
    """Whether the rates are the same; those of groups that joined after the scheduler was made are not its own."""
    return all(same_rate(actual, expected) for actual, expected in _rates_set(scheduler, optimizer))


def _rates_set(scheduler: SchedulerFacts, optimizer: OptimizerFacts) -> Iterator[tuple[float, float]]:
    """Each rate and what the scheduler made of it, for the groups that it was made for."""
    pairs = zip((g.lr or 0.0 for g in optimizer.groups), scheduler.last_lr, strict=False)
    return islice(pairs, len(scheduler.base_lrs) or None)


@rule(
    "CK504",
    "learning-rate-off-schedule",
    Severity.WARNING,
    compares="_last_lr with what the schedule gives at last_epoch: the state's own, and the live run's",
    source="torch/optim/lr_scheduler.py, the closed form of each class",
)
def learning_rate_off_schedule(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The restored learning rate differs from what the schedule gives at this step.

    By the live Trainer's schedule: the run that resumes has another schedule (length, warm-up, base rate) than the one
    that saved; where max_epochs or max_steps were changed, that is worth knowing and no warning. By the state's own
    entries, where torch's class has a closed form: `_last_lr` is not of this state. Most classes multiply the rate that
    they find, so that a rate set by hand stays; there it is worth knowing and no warning.
    """
    alone = len(facts.schedulers or ()) <= max(1, len(facts.optimizers or ()))
    for scheduler in facts.schedulers or ():
        if scheduler.scheduled_lr and len(scheduler.scheduled_lr) == len(scheduler.last_lr):
            off = _first_difference(scheduler.last_lr, scheduler.scheduled_lr)
            if off is not None and trains_longer(facts):
                yield info(
                    f"learning rate {off[0]:.6e}{_at_its_step(scheduler)}, where a schedule of this run's length gives "
                    f"{off[1]:.6e}",
                    "scheduler",
                    f"Expected where the run's length was changed on purpose: {_SAVED_FIRST}",
                )
                continue
            if off is not None:
                yield warning(
                    f"learning rate {off[0]:.6e}{_at_its_step(scheduler)}, where this run's schedule gives "
                    f"{off[1]:.6e}",
                    "scheduler",
                    f"The schedule's length or base rate changed since the save: {_SAVED_FIRST}",
                )
                continue
            yield passed(_on_schedule(scheduler))
        elif alone and scheduler.own_lr and len(scheduler.own_lr) == len(scheduler.last_lr):
            off = _first_difference(scheduler.last_lr, scheduler.own_lr)
            if off is None:
                yield passed(_on_schedule(scheduler))
                continue
            message = (
                f"learning rate {off[0]:.6e}{_at_its_step(scheduler)}, where its own {scheduler.kind} gives "
                f"{off[1]:.6e}"
            )
            if scheduler.kind in _RECKONED_FROM_THE_START:
                yield warning(message, "scheduler", "The state is put together from two; use another checkpoint.")
            else:
                yield info(message, "scheduler", "Expected if the rate was set by hand, or by another schedule, once.")


def _first_difference(actual: Sequence[float], expected: Sequence[float]) -> tuple[float, float] | None:
    return next(((a, b) for a, b in zip(actual, expected, strict=True) if not same_rate(a, b)), None)


def _at_its_step(scheduler: SchedulerFacts) -> str:
    return "" if scheduler.last_epoch is None else f" at scheduler step {scheduler.last_epoch}"


def _on_schedule(scheduler: SchedulerFacts) -> str:
    step = "" if scheduler.last_epoch is None else f" at step {scheduler.last_epoch:,}"
    return f"learning rate {scheduler.last_lr[0]:.2e} is what the schedule gives{step}"


@rule(
    "CK505",
    "schedule-exhausted",
    compares="the steps left in a schedule with those left in the run",
    source="torch/optim/lr_scheduler.py, OneCycleLR.get_lr",
)
def schedule_exhausted(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A schedule of fixed length ends before the run does.

    `OneCycleLR` raises ValueError at the step after its last: an error where the length of the run is known and more
    than that is left of it, else worth knowing. Its length comes from the checkpoint, so a longer run does not help.
    `CosineAnnealingLR` rises again after `T_max` and `PolynomialLR` stays at 0: worth knowing. Of a live run it is said
    as well where the run has become shorter than its schedule, a warning unless its length was changed on purpose.
    """
    schedulers = facts.schedulers or ()
    for index, scheduler in enumerate(schedulers):
        left = _scheduler_steps_left(facts, index) if len(facts.optimizers or ()) == 1 else None
        yield from _ends_before_its_schedule(scheduler, left, facts)
        if scheduler.total_steps:
            yield from _one_cycle_left(scheduler, left)
        elif left and scheduler.kind in _LENGTH and scheduler.last_epoch is not None:
            end = _last_step(scheduler)
            if end is not None and scheduler.last_epoch + left > end + 1:
                reaches = "reached" if scheduler.last_epoch > end else "reaches"
                yield info(
                    f"{scheduler.kind} {reaches} its end at step {end:,}, and the run goes on to "
                    f"{scheduler.last_epoch + left:,}: {_COMES_BACK[scheduler.kind]}",
                    "scheduler",
                )


def _last_step(scheduler: SchedulerFacts) -> int | None:
    """The last step of a schedule that comes down once, however far beyond it the scheduler stands."""
    length = scheduler.options.get(_LENGTH.get(scheduler.kind or "", ""))
    return length if isinstance(length, int) else None


def _ends_before_its_schedule(scheduler: SchedulerFacts, left: int | None, facts: Facts) -> Iterator[Outcome]:
    """What a run leaves of its schedule that has fewer steps than the one that saved."""
    before = facts.saved.run.total_steps if facts.saved is not None else None
    end = scheduler.total_steps or _last_step(scheduler)
    if left is None or end is None or scheduler.last_epoch is None or before in (None, facts.run.total_steps):
        return
    ahead = end - scheduler.last_epoch
    if left < ahead - 1:
        say = info if trains_longer(facts) else warning
        yield say(
            f"the schedule has {ahead:,} of {end:,} steps left and the run {left:,}: training ends before its learning "
            "rate has come down",
            "scheduler",
            f"The run had {before:,} steps when it was saved, and has {facts.run.total_steps or 0:,} now: data, batch "
            "size, accumulation or max_epochs changed.",
        )


def _one_cycle_left(scheduler: SchedulerFacts, left: int | None) -> Iterator[Outcome]:
    total, done = scheduler.total_steps or 0, scheduler.last_epoch or 0
    rest = max(0, total - done)
    if left is not None and left > rest:
        yield error(
            f"the schedule has {rest:,} of {total:,} steps left and the run {left:,}: its next step after that raises "
            "ValueError (Tried to step more often than total_steps)",
            "scheduler",
            "Lower max_epochs or max_steps, or train on with a fresh optimizer and a schedule of the whole length.",
        )
    elif done > total:
        yield error(f"the schedule has {total:,} steps and stands at {done:,}", "scheduler", "Use another checkpoint.")
    elif not rest and left is None:
        yield info(
            f"the schedule is complete: {done:,} of {total:,} steps", "scheduler", "Training on would raise ValueError."
        )
    else:
        yield passed(f"the schedule has {rest:,} of {total:,} steps left")


def _scheduler_steps_left(facts: Facts, index: int) -> int | None:
    """How often a scheduler will step in the rest of the run; None where the length of the run is not known."""
    run, p, plan = facts.run, facts.progress, plan_resume(facts)
    settings = list(zip(run.scheduler_intervals, run.scheduler_frequencies, strict=False))
    if plan is None or len(settings) != len(facts.schedulers or ()) or settings[index][1] != 1:
        return None
    if plan.kind == "finished":
        return 0
    lengths = []
    by_step = settings[index][0] == "step"
    if by_step and run.max_steps is not None and run.max_steps >= 0 and p.global_step is not None:
        lengths.append(run.max_steps - p.global_step)
    if plan.max_epochs is not None:
        epochs = plan.max_epochs - plan.epochs_done
        batches, accumulation = facts.batches_per_epoch, run.accumulate_grad_batches or 1
        if not by_step:
            lengths.append(epochs)
        elif batches:
            whole = math.ceil(batches / accumulation)
            lengths.append(epochs * whole - plan.next_batch // accumulation)
    return max(0, min(lengths)) if lengths else None


@rule(
    "CK506",
    "next-learning-rates",
    Severity.PASS,
    compares="nothing: it lists what the schedule gives next",
    source="torch/optim/lr_scheduler.py, the closed form of each class",
)
def next_learning_rates(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Lists the learning rates that the scheduler will set next, where its state holds its whole schedule.

    `LambdaLR` keeps its function out of the checkpoint and `ReduceLROnPlateau` waits for metrics: these say nothing.
    """
    for scheduler in facts.schedulers or ():
        if scheduler.next_lrs:
            rates = ", ".join(f"{rate:.2e}" for rate in scheduler.next_lrs)
            yield passed(f"next learning rates of {scheduler.kind}: {rates}", "scheduler")
