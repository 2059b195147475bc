"""CK3xx: the counters of epochs, batches and steps make sense and agree with each other."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, passed, rule, warning


@rule("CK301", "progress-out-of-range")
def progress_out_of_range(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A counter is negative, or more batches of an epoch are done than it has.

    EnStack counts epochs from 1; Lightning from 0.
    """
    p = facts.progress
    counters = {
        "epoch": p.epoch,
        "step": p.step,
        "global_step": p.global_step if p.global_step is not None else p.recorded_global_step,
        "total_batches": p.batches_per_epoch,
    }
    known = {name: value for name, value in counters.items() if value is not None}
    wrong = False
    for name, value in known.items():
        lowest = 1 if name == "total_batches" or (name == "epoch" and facts.format is Format.ENSTACK) else 0
        if value < lowest:
            wrong = True
            yield error(
                f"{name} is {value:,} and must be {lowest} or more", name, "Use another checkpoint of this run."
            )
    batches = facts.batches_per_epoch
    if batches and p.batches_in_epoch is not None and p.batches_in_epoch > batches:
        wrong = True
        yield error(
            f"{p.batches_in_epoch:,} batches of the epoch are done, and an epoch has {batches:,}",
            "step",
            "The data or the batch size changed during the run; use a checkpoint saved at an epoch's end.",
        )
    if known and not wrong:
        yield passed("counters valid: " + ", ".join(f"{name} {value:,}" for name, value in known.items()))


@rule("CK302", "counters-disagree")
def counters_disagree(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Lightning's entries `global_step` and `epoch` differ from the loop counters that a resume restores.

    On a resume both come from `loops`, never from these entries; where they differ the checkpoint was edited or put
    together from two. At an epoch's end `epoch` still names the epoch that is just complete.
    """
    p = facts.progress
    completed = p.epochs_completed
    counted = p.global_step is not None and p.epoch is not None and completed is not None
    if counted and p.epoch not in (completed, (completed or 0) - 1):
        yield warning(
            f"the entry epoch says {p.epoch:,} and the loop counters say {completed:,} complete epochs",
            "epoch",
            "Training would go on from the loop counters; prefer a checkpoint in which both agree.",
        )
    if p.global_step is None or p.recorded_global_step is None:
        return
    if p.global_step != p.recorded_global_step:
        yield error(
            f"the entry global_step says {p.recorded_global_step:,} and the loop counters say {p.global_step:,}",
            "global_step",
            "Training would go on from the loop counters; use a checkpoint in which both agree.",
        )
    else:
        yield passed(f"global_step {p.global_step:,} agrees with the loop counters")


@rule("CK303", "interrupted-step")
def interrupted_step(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An optimizer step had begun and was not counted: the save happened inside a step, after an exception or a signal.

    Weights and optimizer may be one step ahead of the counters.
    """
    p = facts.progress
    if p.optimizer_steps is not None and p.optimizer_steps_begun is not None:
        ahead = p.optimizer_steps_begun - p.optimizer_steps
        if ahead:
            yield warning(
                f"{p.optimizer_steps_begun:,} optimizer steps had begun and {p.optimizer_steps:,} were counted: "
                "the checkpoint was saved inside a step",
                "loops",
                "Prefer a checkpoint that was saved between two steps.",
            )


@rule("CK304", "metric-out-of-range")
def metric_out_of_range(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A best validation F1 or accuracy is not between 0 and 1."""
    if facts.format is Format.ENSTACK:
        for name, value in facts.metrics.items():
            if 0 <= value <= 1:
                yield passed(f"{name} {value:.4f}")
            else:
                yield error(f"{name} is {value} and must lie between 0 and 1", name, "Use another checkpoint.")


@rule("CK305", "kind-of-checkpoint")
def kind_of_checkpoint(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Says whether the checkpoint was saved at an epoch's end or inside an epoch, and what a resume will do.

    A mid-epoch checkpoint of a loader whose position was not saved repeats or leaves out batches: Lightning starts the
    loader anew and counts on.
    """
    plan = plan_resume(facts)
    if plan is None:
        return
    if plan.kind == "mid-epoch" and facts.format is Format.LIGHTNING and not facts.loader_position:
        yield warning(
            f"saved after batch {plan.step:,} of the epoch, without the training loader's position: a resume trains "
            "other batches than the ones left",
            hint="Use a StatefulDataLoader (torchdata) for training, or resume from a checkpoint of an epoch's end.",
        )
    else:
        yield passed(plan.sentence)
