"""CK401: the steps that the optimizers counted, against the counters, and what a mismatch is likeliest to come from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

SMALL_MISMATCH = 100
"""A mismatch of up to this many steps is small: skipped steps and other harmless causes are of this size."""

MAX_ACCUMULATION = 128

_OTHER_CHECKPOINT = "Use another checkpoint of this run."


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
        counter = "global_step" if facts.format is Format.HUGGINGFACE else "the loop's counter"
        return ExpectedSteps(p.optimizer_steps, options.tolerance or 0, counter)
    batches = facts.batches_per_epoch
    if not batches or batches < 0 or p.epochs_completed is None or p.epochs_completed < 0:
        return None  # CK301 says so
    in_epoch = p.batches_in_epoch or 0
    tolerance = max(20, batches // 10) if options.tolerance is None else options.tolerance
    reckoning = f"{p.epochs_completed:,} epochs x {batches:,} batches" + (f" + {in_epoch:,}" if in_epoch else "")
    return ExpectedSteps(p.epochs_completed * batches + in_epoch, tolerance, reckoning)


def averages_weights(facts: Facts) -> bool:
    """Whether weights were being averaged under a schedule of their own, when the checkpoint was saved or by now.

    Lightning makes that schedule anew in a live run, once an epoch of averaging begins.
    """
    return any(s.kind == "SWALR" for f in (facts, facts.saved or facts) for s in f.schedulers or ())


def scales_losses(facts: Facts) -> bool:
    """Whether a gradient scaler's state is in the checkpoint: float16 training, which skips steps on overflow."""
    return (
        facts.fields.get("MixedPrecision") in ("dict", "OrderedDict")
        or facts.fields.get("scaler_state_dict") in ("dict", "OrderedDict")
        or any(file.name == "scaler.pt" for file in facts.files)
    )


@rule(
    "CK401",
    "optimizer-step-mismatch",
    compares="the steps in the optimizers' states with the loop's counter, or with epochs x batches",
    source="torch.optim; lightning/pytorch/loops; EnStack's trainer",
)
def optimizer_step_mismatch(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The steps that the optimizer itself counted differ from what the checkpoint's counters say.

    Compared: the largest `step` in each optimizer's state, added up over the optimizers (Lightning's `global_step`
    counts them all), with the loop's counter of optimizer steps, which is exact; with `epoch`, `step` and
    `total_batches` where there is no such counter, within a tolerance of `max(20, batches // 10)` or `--tolerance`.

    An optimizer that is ahead of an exact counter is an error: it was trained further than the run knows. One that is
    behind is a warning, because steps are honestly skipped (`training_step` returning None). With a gradient scaler
    in the checkpoint a few steps fewer, up to the usual tolerance, are what float16 training does, and no warning.
    """
    optimizers = facts.optimizers or ()
    expected = expected_steps(facts, options)
    steps = [o.most_steps for o in optimizers if o.most_steps is not None]
    if expected is None or not steps:
        return
    actual = sum(steps)
    difference = actual - expected.steps
    size = abs(difference)
    if len(steps) != len(optimizers) and difference <= 0:
        return  # what the others did is not counted anywhere
    if size <= expected.tolerance:
        yield passed(
            f"optimizer steps {actual:,}, expected {expected.steps:,} ({expected.reckoning}): difference {size:,}, "
            f"tolerance {expected.tolerance:,}"
        )
        return
    message = (
        f"optimizer steps {actual:,}, expected {expected.steps:,} ({expected.reckoning}): {size:,} "
        f"{'more' if difference > 0 else 'fewer'} than expected, tolerance {expected.tolerance:,}"
    )
    exact = facts.progress.optimizer_steps is not None
    if exact and difference < 0 and actual and scales_losses(facts) and size <= max(20, expected.steps // 50):
        yield info(message, "optimizer", "The gradient scaler skips a step on overflow: expected in float16 training.")
        return
    if difference == -1 and averages_weights(facts):
        yield info(message, "optimizer", "Weight averaging ends with an epoch that only updates batch norm: one step.")
        return
    lost = _lost_optimizer(actual, expected.steps, facts)
    cause = lost or _diagnosis(actual, expected.steps, facts)
    hint = f"{cause} {_OTHER_CHECKPOINT if lost else _size_of(size, exact and difference > 0)}"
    yield (error if exact and difference > 0 else warning)(message, "optimizer", hint)


def _size_of(mismatch: int, is_certain: bool) -> str:
    if is_certain:
        return _OTHER_CHECKPOINT
    if mismatch <= SMALL_MISMATCH:
        return f"Small mismatch ({many(mismatch, 'step')}): usually harmless if that is the cause."
    return f"Large mismatch ({mismatch:,} steps): the checkpoint may be inconsistent, consider an earlier one."


def _diagnosis(actual: int, expected: int, facts: Facts) -> str:
    """The likeliest cause, told from the numbers."""
    exact = facts.progress.optimizer_steps is not None
    if actual > expected:
        if not exact:
            return (
                "The optimizer was trained further than the counters say: they are of two saves, or an epoch had more "
                "batches than total_batches when it was trained."
            )
        if _steps_past_the_count(expected, facts):
            return (
                "Manual optimization that steps past Lightning's count (use_pl_optimizer=False) would explain it, and "
                "leaves global_step too low: step what self.optimizers() returns."
            )
        return "The optimizer was trained further than the counters say: the checkpoint is put together from two saves."
    anew = ""
    if epochs := _whole_epochs(actual, facts):
        anew = (
            f"The optimizer has the steps of the last {epochs} and no more, as if it was made anew when the run was "
            "resumed; use an earlier checkpoint."
        )
    if not exact and (k := _accumulation(actual, expected, facts)):
        said = f"Gradient accumulation over {k} batches would explain it ({actual:,} x {k} = {actual * k:,})."
        return f"{said} Or else: {anew}" if anew else said
    if anew:
        return anew
    if actual <= expected // 2:
        missing = _optimizers_missing(actual, expected, facts)
        return missing or (
            "The optimizer looks fresh under an old counter: its state was reset or lost; use an earlier checkpoint."
        )
    if scales_losses(facts):
        return "Steps that the gradient scaler skipped on overflow would explain it."
    return "Steps skipped on overflow (GradScaler) or batches without a loss would explain it; else use an earlier one."


def _accumulation(actual: int, expected: int, facts: Facts) -> int | None:
    """The number of batches a step that gives `actual` of `expected`, whatever becomes of an epoch's last batches."""
    if actual <= 0:
        return None
    batches, epochs = facts.batches_per_epoch or 0, facts.progress.epochs_completed or 0
    rest = facts.progress.batches_in_epoch or 0
    for k in range(2, MAX_ACCUMULATION + 1):
        whole = epochs * math.ceil(batches / k) + rest // k
        if actual == whole or abs(actual * k - expected) <= k + expected // 100:
            return k
    return None


def _whole_epochs(actual: int, facts: Facts) -> str | None:
    """The last epochs whose steps these are, where the optimizer's steps are exactly those."""
    p, batches = facts.progress, facts.batches_per_epoch
    if not batches or actual <= 0 or not p.epochs_completed or p.batches_in_epoch is None:
        return None
    accumulation = facts.run.accumulate_grad_batches or 1
    in_epoch = p.batches_in_epoch if (p.epochs_begun or 0) > p.epochs_completed else 0
    inside, per_epoch = in_epoch // accumulation, math.ceil(batches / accumulation)
    if not inside and (slower := _steps_an_epoch(facts)):
        per_epoch = min(per_epoch, slower)
    whole, odd = divmod(actual - inside, per_epoch)
    if odd or not 0 <= whole < p.epochs_completed:
        return None
    epochs = many(whole, "epoch")
    return epochs if not in_epoch else f"{in_epoch:,} batches" if not whole else f"{epochs} and {in_epoch:,} batches"


def _steps_an_epoch(facts: Facts) -> int:
    """Steps of an epoch by the loop's counter, where all epochs had as many: manual optimization may skip batches."""
    steps, epochs = divmod(facts.progress.optimizer_steps or 0, facts.progress.epochs_completed or 1)
    return 0 if epochs else steps


def _batches_for_steps(facts: Facts) -> int | None:
    """The steps that one optimizer has done at most, at one a batch or a window of accumulation."""
    batches = facts.progress.batches_trained
    return None if not batches else math.ceil(batches / (facts.run.accumulate_grad_batches or 1))


def _steps_past_the_count(counted: int, facts: Facts) -> bool:
    """Whether the loop counted the steps of some of the optimizers, or of none, in batches that were trained."""
    steps = [o.most_steps or 0 for o in facts.optimizers or ()]
    few = len(steps) <= 4 and bool(facts.progress.batches_trained)
    return few and any(sum(some) == counted for n in range(len(steps)) for some in combinations(steps, n))


def _lost_optimizer(actual: int, expected: int, facts: Facts) -> str | None:
    """What more steps than batches mean, where one optimizer is held: there were others."""
    batches = _batches_for_steps(facts)
    if facts.format is not Format.LIGHTNING or len(facts.optimizers or ()) != 1 or batches is None or actual <= 0:
        return None
    if facts.progress.optimizer_steps is None or expected <= batches or actual > batches or expected % actual == 0:
        return None  # whole fractions are those of optimizers that step alike
    return (
        f"The loop counted {expected:,} steps of all optimizers in {batches:,} batches, and one optimizer with "
        f"{actual:,} is held: the state of another optimizer is missing here."
    )


def _optimizers_missing(actual: int, expected: int, facts: Facts) -> str | None:
    """Lightning counts the steps of all optimizers: a file that holds one of several has a whole fraction of them."""
    held, batches = len(facts.optimizers or ()), _batches_for_steps(facts)
    if facts.format is not Format.LIGHTNING or actual <= 0 or expected % actual or expected // actual > 4:
        return None
    if batches is not None and expected <= batches:
        return None  # one optimizer, at a step a batch or fewer, explains them all
    lost = expected // actual * held - held
    return (
        f"The loop counted {expected // actual} x {actual:,} steps: with {expected // actual * held} optimizers the "
        f"counter is right and {lost} of them {'is' if lost == 1 else 'are'} missing here; else the state was reset."
    )
