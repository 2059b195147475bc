"""CK5xx: the scheduler stands where the counters say, and the learning rate is what its schedule gives."""

from __future__ import annotations

import math
from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts, Format, SchedulerFacts
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules.optimizer import expected_steps
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, passed, rule, warning


@rule("CK501", "scheduler-position")
def scheduler_position(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A scheduler has stepped more or less often than training says.

    Lightning counts the steps of all schedulers together, so their `last_epoch`s add up to that counter; one that is
    known to step with every optimizer step stands at `global_step`. In an EnStack folder the scheduler steps with the
    optimizer, and the optimizer's tolerance applies.
    """
    schedulers = facts.schedulers or ()
    if not schedulers or any(s.last_epoch is None for s in schedulers):
        return
    actual = sum(s.last_epoch or 0 for s in schedulers)
    counted = facts.progress.scheduler_steps
    tolerance = 0
    if facts.format is Format.ENSTACK:
        expected = expected_steps(facts, options)
        counted, tolerance = (expected.steps, expected.tolerance) if expected else (None, 0)
    if not counted:
        return  # manual optimization steps its schedulers itself and counts nothing
    if abs(actual - counted) > tolerance:
        yield warning(
            f"scheduler steps {actual:,}, expected {counted:,}: the learning rate is that of another step",
            "scheduler",
            "Use another checkpoint of this run, or set the scheduler forward before training.",
        )
    else:
        yield passed(f"scheduler steps {actual:,}, expected {counted:,}")


@rule("CK502", "learning-rate-out-of-bounds")
def learning_rate_out_of_bounds(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The learning rate that training continues with is below 1e-8, or above twice the initial one and twice
    the peak that its schedule names (`OneCycleLR`, `CyclicLR`).

    A rate of 0 at the start of a warm-up and at the end of a finished run is what the schedule gives.
    """
    plan = plan_resume(facts)
    finished = plan is not None and plan.kind == "finished"
    at_start = any(s.last_epoch == 0 for s in facts.schedulers or ())
    peaks = [rate for s in facts.schedulers or () for rate in s.max_lrs]
    for number, optimizer in enumerate(facts.optimizers or ()):
        for group in optimizer.groups:
            if group.lr is None:
                continue
            peak = max(group.initial_lr or 0.0, group.max_lr or 0.0, *peaks)
            highest = options.max_lr if options.max_lr is not None else 2 * peak if peak else math.inf
            if group.lr < options.min_lr and not finished and not at_start:
                yield warning(
                    f"learning rate {group.lr:.2e} of optimizer {number} is below {options.min_lr:.0e}: training would "
                    "change almost nothing",
                    "learning rate",
                    "The schedule has run out: train with a longer one, or stop here.",
                )
            elif group.lr > highest:
                yield warning(
                    f"learning rate {group.lr:.2e} of optimizer {number} is above {highest:.2e}",
                    "learning rate",
                    "Check the schedule: this is more than it should ever give.",
                )
            else:
                yield passed(f"learning rate {group.lr:.2e} within bounds")
            break  # the other groups share the schedule


@rule("CK503", "learning-rate-disagrees")
def learning_rate_disagrees(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The optimizer's learning rate is another than the one its scheduler set last."""
    if len(facts.schedulers or ()) != 1 or len(facts.optimizers or ()) != 1:
        return  # which scheduler drives which optimizer is not in the file
    assert facts.schedulers is not None
    assert facts.optimizers is not None
    scheduler = facts.schedulers[0]
    rates = [g.lr for g in facts.optimizers[0].groups]
    if len(rates) != len(scheduler.last_lr) or None in rates:
        return
    for actual, expected in zip(rates, scheduler.last_lr, strict=True):
        if actual is not None and not _same(actual, expected):
            yield warning(
                f"the optimizer's learning rate is {actual:.6e} and its scheduler set {expected:.6e}",
                "learning rate",
                "The scheduler will overwrite it at its next step; use a checkpoint in which both agree.",
            )
            return


@rule("CK504", "learning-rate-off-schedule")
def learning_rate_off_schedule(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The restored learning rate differs from what the run's own schedule gives at this step.

    Told by a live Trainer for schedules with a closed form: the run that resumes has another schedule (length, warm-up,
    base rate) than the one that saved.
    """
    for scheduler in facts.schedulers or ():
        if not scheduler.scheduled_lr or len(scheduler.scheduled_lr) != len(scheduler.last_lr):
            continue
        for actual, expected in zip(scheduler.last_lr, scheduler.scheduled_lr, strict=True):
            if not _same(actual, expected):
                yield warning(
                    f"learning rate {actual:.6e} at scheduler step {scheduler.last_epoch}, where this run's schedule "
                    f"gives {expected:.6e}",
                    "scheduler",
                    "The schedule's length or base rate changed since the save: the rate will jump at the next step.",
                )
                break
        else:
            yield passed(_on_schedule(scheduler))


def _on_schedule(scheduler: SchedulerFacts) -> str:
    return f"learning rate {scheduler.last_lr[0]:.2e} is what the schedule gives at step {scheduler.last_epoch:,}"


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
