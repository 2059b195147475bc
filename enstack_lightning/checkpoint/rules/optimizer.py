"""CK4xx: the optimizer has done as many steps as the counters say, for every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, passed, rule, warning


@dataclass(frozen=True)
class ExpectedSteps:
    """How many optimizer steps the counters imply, how far off is accepted, and how it was reckoned."""

    steps: int
    tolerance: int
    reckoning: str


def expected_steps(facts: Facts, options: Options) -> ExpectedSteps | None:
    """The optimizer steps that the checkpoint's counters imply; None where they imply none.

    A loop that counts optimizer steps is exact. Without one (EnStack), one step a batch is assumed: `epoch x batches`
    for a complete epoch, `(epoch - 1) x batches + step` inside one.
    """
    p = facts.progress
    if p.optimizer_steps is not None:
        return ExpectedSteps(p.optimizer_steps, options.tolerance or 0, "the loop's counter")
    batches = facts.batches_per_epoch
    if not batches or p.epochs_completed is None:
        return None
    in_epoch = p.batches_in_epoch or 0
    tolerance = max(20, batches // 10) if options.tolerance is None else options.tolerance
    reckoning = f"{p.epochs_completed:,} epochs x {batches:,} batches" + (f" + {in_epoch:,}" if in_epoch else "")
    return ExpectedSteps(p.epochs_completed * batches + in_epoch, tolerance, reckoning)


@rule("CK401", "optimizer-step-mismatch")
def optimizer_step_mismatch(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The steps that the optimizer itself counted differ from what the checkpoint's counters say.

    Compared: the largest `step` in each optimizer's state, added up over the optimizers (Lightning's `global_step`
    counts them all), with the loop's counter of optimizer steps, which is exact; with `epoch`, `step` and
    `total_batches` where there is no such counter, within a tolerance of `max(20, batches // 10)` or `--tolerance`.

    An optimizer that is ahead of Lightning's counter is an error: it was trained further than the run knows. One that
    is behind is a warning, because steps are honestly skipped (GradScaler on overflow, `training_step` returning None).
    """
    expected = expected_steps(facts, options)
    steps = [o.most_steps for o in facts.optimizers or () if o.most_steps is not None]
    if expected is None or not steps or len(steps) != len(facts.optimizers or ()):
        return
    actual = sum(steps)
    difference = actual - expected.steps
    if abs(difference) <= expected.tolerance:
        yield passed(
            f"optimizer steps {actual:,}, expected {expected.steps:,} ({expected.reckoning}): difference "
            f"{abs(difference):,}, tolerance {expected.tolerance:,}"
        )
        return
    message = (
        f"optimizer steps {actual:,}, expected {expected.steps:,} ({expected.reckoning}): {abs(difference):,} "
        f"{'more' if difference > 0 else 'fewer'} than expected, tolerance {expected.tolerance:,}"
    )
    exact = facts.progress.optimizer_steps is not None
    judged = error if exact and difference > 0 else warning
    yield judged(message, "optimizer", _diagnosis(actual, expected.steps, facts))


def _diagnosis(actual: int, expected: int, facts: Facts) -> str:
    """The likeliest cause, told from the numbers."""
    if actual > expected:
        return "The optimizer was trained further than the counters say: the checkpoint is put together from two saves."
    if facts.format is Format.ENSTACK:
        for k in range(2, 129):
            if actual and abs(actual * k - expected) <= k + expected // 100:
                return f"Gradient accumulation over {k} batches would explain it ({actual:,} x {k} = {actual * k:,})."
    if actual == 0 or actual <= expected // 2:
        return "The optimizer looks fresh under an old counter: its state was reset or lost; use an earlier checkpoint."
    return "Steps skipped on overflow (GradScaler) or batches without a loss would explain it; else use an earlier one."


@rule("CK402", "optimizer-state-missing")
def optimizer_state_missing(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An optimizer that keeps moments has none although steps were done, or the optimizers are missing altogether.

    SGD without momentum keeps no state, and that is healthy; Adam's `betas` or a `momentum` above 0 in the param groups
    tell an optimizer that does.
    """
    if facts.optimizers is None or not facts.fields:
        return
    expected = expected_steps(facts, options)
    done = expected.steps if expected else 0
    if not facts.optimizers and done:
        yield error(
            f"no optimizer state after {done:,} steps: training would go on with a fresh optimizer", "optimizer"
        )
    for number, optimizer in enumerate(facts.optimizers):
        if not optimizer.groups and not optimizer.parameters_with_state:
            yield passed(f"optimizer {number}: none, the run trains without one")
        elif not optimizer.groups:
            yield error(f"optimizer {number} has no param_groups", "optimizer", "Use another checkpoint of this run.")
        elif optimizer.keeps_moments and not optimizer.parameters_with_state and done:
            yield error(
                f"optimizer {number} has no state for any of its {optimizer.parameter_count:,} parameters after "
                f"{done:,} steps: training would go on with a fresh optimizer",
                "optimizer",
                "Use another checkpoint of this run.",
            )
        else:
            yield passed(
                f"optimizer {number}: {len(optimizer.groups)} group(s), {optimizer.parameter_count:,} parameters, "
                f"{optimizer.parameters_with_state:,} with state"
            )


@rule("CK403", "parameters-disagree")
def parameters_disagree(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The parameters of one optimizer have done different numbers of steps.

    Honest where parameters were frozen for a while or get no gradient in some steps; else the sign of a state that was
    put together from two saves.
    """
    for number, optimizer in enumerate(facts.optimizers or ()):
        counts = sorted(set(optimizer.steps.values()))
        if len(counts) > 1:
            fewest, most = int(counts[0]), int(counts[-1])
            behind = sum(1 for s in optimizer.steps.values() if s < counts[-1])
            yield warning(
                f"optimizer {number}: {behind:,} of {len(optimizer.steps):,} parameters have fewer steps than the "
                f"others ({fewest:,} to {most:,})",
                "optimizer",
                "Expected if layers were unfrozen during training; otherwise use another checkpoint.",
            )


@rule("CK404", "unknown-parameter-state")
def unknown_parameter_state(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The optimizer's state names parameters that are in none of its groups."""
    for number, optimizer in enumerate(facts.optimizers or ()):
        known = {p for g in optimizer.groups for p in g.params}
        stray = [p for p in optimizer.steps if p not in known]
        if stray and known:
            yield error(
                f"optimizer {number} has state for {len(stray):,} parameters that are in none of its groups",
                "optimizer",
                "Use another checkpoint of this run.",
            )
