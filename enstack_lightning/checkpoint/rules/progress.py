"""CK3xx: the counters of epochs, batches and steps make sense and agree with each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

_ANOTHER = "Use another checkpoint of this run."


@rule(
    "CK301",
    "progress-out-of-range",
    compares="epoch, step and global_step with 0, with the batches of an epoch and with the run's length",
    source="the counters of each format",
)
def progress_out_of_range(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A counter is negative, or more batches of an epoch are done than it has, or more of the run than it had to do.

    EnStack counts epochs from 1; Lightning from 0; transformers counts fractions of epochs and ends its run at
    `max_steps`.
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
            yield error(f"{name} is {value:,} and must be {lowest} or more", name, _ANOTHER)
    for outcome in (*_beyond_the_epoch(facts), *_beyond_the_run(facts)):
        wrong = True
        yield outcome
    if known and not wrong:
        yield passed("counters valid: " + ", ".join(f"{name} {value:,}" for name, value in known.items()))


def _beyond_the_epoch(facts: Facts) -> Iterator[Outcome]:
    p = facts.progress
    done, batches = p.batches_in_epoch, facts.batches_per_epoch
    if facts.live and (p.epochs_begun or 0) <= (p.epochs_completed or 0):
        return  # the count is that of the epoch before, of data that may have changed since
    if batches and done is not None and done > batches > 0:
        yield error(
            f"{done:,} batches of the epoch are done, and an epoch has {batches:,}",
            "step",
            "The data or the batch size changed during the run; use a checkpoint saved at an epoch's end.",
        )


def _beyond_the_run(facts: Facts) -> Iterator[Outcome]:
    p, run = facts.progress, facts.run
    if facts.format is not Format.HUGGINGFACE:
        return
    if p.global_step is not None and run.max_steps is not None and p.global_step > run.max_steps:
        yield error(f"global_step is {p.global_step:,}, and the run ends at {run.max_steps:,}", "global_step", _ANOTHER)
    if p.epoch_fraction is not None and run.max_epochs is not None and p.epoch_fraction > run.max_epochs + 1e-6:
        yield error(f"epoch is {p.epoch_fraction:.4f}, and the run has {run.max_epochs:,}", "epoch", _ANOTHER)


@rule(
    "CK302",
    "counters-disagree",
    compares="the entries epoch and global_step with the loop counters, and these with each other",
    source="lightning/pytorch/loops/progress.py",
)
def counters_disagree(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Lightning's entries `global_step` and `epoch` differ from the loop counters that a resume restores.

    On a resume both come from `loops`, never from these entries; where they differ the checkpoint was edited or put
    together from two. At an epoch's end `epoch` still names the epoch that is just complete. Counters that no Trainer
    writes (more batches done than taken, epochs done that never began) are an error too; a resume at the last batch of
    an epoch can make Lightning count one that it did not train, a warning. Where the guard recorded the run, its
    optimizer steps are compared with its batches and accumulation; a difference there is worth knowing, since manual
    optimization and a change of settings during the run cause it as well.
    """
    yield from _impossible_counters(facts)
    p = facts.progress
    counted = p.global_step is not None and p.epoch is not None and p.epochs_completed is not None
    if facts.format is not Format.HUGGINGFACE and counted:
        completed = p.epochs_completed or 0
        if p.epoch not in (completed, completed - 1):
            yield warning(
                f"the entry epoch says {p.epoch:,} and the loop counters say {completed:,} complete epochs",
                "epoch",
                "Training would go on from the loop counters; prefer a checkpoint in which both agree.",
            )
    yield from _steps_of_the_run(facts)
    if p.global_step is None or p.recorded_global_step is None:
        return
    if facts.live and p.global_step != p.recorded_global_step:
        yield error(
            f"the run's global_step is {p.recorded_global_step:,}, and {p.global_step:,} optimizer steps are counted",
            "global_step",
            "Automatic and manual optimization count in two places: Lightning begins again at 0 where a run changes "
            "from one to the other. Go on as the run was saved, or begin a new run from the checkpoint's weights.",
        )
    elif p.global_step != p.recorded_global_step:
        yield error(
            f"the entry global_step says {p.recorded_global_step:,} and the loop counters say {p.global_step:,}",
            "global_step",
            "Training would go on from the loop counters; use a checkpoint in which both agree.",
        )
    else:
        yield passed(f"global_step {p.global_step:,} agrees with the loop counters")


def _impossible_counters(facts: Facts) -> Iterator[Outcome]:
    p = facts.progress
    pairs = (
        ("batches of the epoch are done", p.batches_in_epoch, "were taken from the loader", p.batches_begun),
        ("batches of the epoch are done", p.batches_in_epoch, "in the whole run", p.batches_trained),
        ("epochs are complete", p.epochs_completed, "had begun", p.epochs_begun),
    )
    for done, fewer, whole, more in pairs:
        if fewer is None or more is None or fewer <= more:
            continue
        if more and done.startswith("epochs"):
            yield warning(
                f"{fewer:,} epochs count as complete and {more:,} had begun: {fewer - more:,} of them "
                f"{'was' if fewer - more == 1 else 'were'} not trained",
                "loops",
                "A resume at the last batch of an epoch, with a stateful loader that stood at its end, counts an epoch "
                "without a batch. Raise max_epochs by as many.",
            )
        else:
            yield error(f"{fewer:,} {done} and {more:,} {whole}", "loops", _ANOTHER)


def _steps_of_the_run(facts: Facts) -> Iterator[Outcome]:
    """Optimizer steps by the loop's counter against batches and accumulation, as the run was set."""
    p, accumulation, batches = facts.progress, facts.run.accumulate_grad_batches, facts.run.batches_per_epoch
    single = len(facts.optimizers or ()) == 1
    if facts.format is not Format.LIGHTNING or not single or not accumulation or not batches:
        return
    if p.optimizer_steps is None or p.epochs_completed is None or p.batches_in_epoch is None:
        return
    if (p.epochs_begun or 0) > p.epochs_completed:
        whole, rest = p.epochs_completed, p.batches_in_epoch
    else:
        whole, rest = p.epochs_completed, 0
    last = math.ceil(batches / accumulation) if rest >= batches else rest // accumulation
    expected = whole * math.ceil(batches / accumulation) + last
    if expected != p.optimizer_steps:
        yield info(
            f"{p.optimizer_steps:,} optimizer steps, where {many(whole, 'epoch')} of {batches:,} batches and {rest:,} "
            f"more, {accumulation:,} a step, give {expected:,}",
            "loops",
            "Expected under manual optimization, after max_steps or early stopping inside an epoch, or if batches or "
            "accumulation changed during the run.",
        )


@rule(
    "CK303",
    "interrupted-step",
    Severity.WARNING,
    compares="optimizer steps begun with those counted, and batches with the accumulation window",
    source="lightning/pytorch/loops/optimization/automatic.py",
)
def interrupted_step(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An optimizer step had begun and was not counted: the save happened inside a step, after an exception or a signal.

    Weights and optimizer may be one step ahead of the counters. Worth knowing is a save between two batches of one
    accumulated step: Lightning saves no gradients, so these batches are trained for nothing. CheckpointGuard saves
    them.
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
    plan, accumulation = plan_resume(facts), (facts.saved or facts).run.accumulate_grad_batches
    inside = plan is not None and plan.kind == "mid-epoch" and accumulation and plan.step % accumulation
    if plan is not None and accumulation and inside and not facts.part_gradients:
        lost = plan.step % accumulation
        yield info(
            f"saved inside an accumulated step: the gradients of the last {lost:,} of {accumulation:,} batches are not "
            "in the checkpoint",
            "loops",
            f"Save every {accumulation:,} batches to lose none.",
        )


@rule("CK304", "metric-out-of-range", compares="best_val_f1 and best_val_acc with 0 and 1", source="EnStack's trainer")
def metric_out_of_range(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A best validation F1 or accuracy of an EnStack checkpoint is not a number between 0 and 1."""
    if facts.format is not Format.ENSTACK:
        return
    for name, value in facts.metrics.items():
        if 0 <= value <= 1:
            yield passed(f"{name} {value:.4f}")
        else:
            yield error(f"{name} is {value} and must lie between 0 and 1", name, "Use another checkpoint.")
    for name in ("best_val_f1", "best_val_acc"):
        if name not in facts.metrics and facts.fields.get(name) in ("float", "int", "str", "bool"):
            yield error(f"{name} is no finite number, and must lie between 0 and 1", name, "Use another checkpoint.")


@rule(
    "CK305",
    "kind-of-checkpoint",
    Severity.WARNING,
    compares="the counters with what a resume makes of them",
    source="lightning/pytorch/loops/fit_loop.py; transformers/trainer.py",
)
def kind_of_checkpoint(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Says whether the checkpoint was saved at an epoch's end or inside an epoch, and what a resume will do.

    A mid-epoch checkpoint of a loader whose position was not saved repeats or leaves out batches: Lightning starts the
    loader anew and counts on. transformers puts its loader where it was; EnStack skips as many batches of an epoch that
    is shuffled anew.

    A `StatefulDataLoader` saved after the last batch of an epoch and before its end stands at its end when it is
    restored: Lightning then counts the next epoch as done without training it. How many batches the loader has is not
    in its state, so a warning is given as well where `limit_train_batches` ended the epoch, and nothing is lost. Where
    CheckpointGuard recorded the moment of the save, its run goes on with the end of that epoch, and none is given.

    Saved in `on_train_epoch_start` of any epoch but the first, as when that hook raises an exception, Lightning takes
    the epoch that begins for done. CheckpointGuard begins it.
    """
    plan = plan_resume(facts)
    if plan is None or plan.kind == "not-resumable":
        return
    by_lightning = facts.format in (Format.LIGHTNING, Format.SHARDED)
    if plan.kind == "mid-epoch" and by_lightning and not facts.loader_position:
        yield warning(
            f"saved after batch {plan.step:,} of the epoch, without the training loader's position: a resume trains "
            f"other batches than the ones left, up to {plan.batches_repeated:,} of them for the second time",
            hint=_to_keep_the_position(guarded=facts.moment is not None),
        )
    elif plan.kind != "finished" and facts.loader_spent:
        yield warning(
            "saved after the last batch of an epoch, before its end, with the loader's position there: the loader "
            f"gives no batch after a resume, and epoch {plan.next_epoch:,} counts as done without being trained",
            hint="Use the checkpoint of the same epoch's end, or raise max_epochs by one; every_n_train_steps saves at "
            "this moment where it divides the batches of an epoch. No epoch is lost where limit_train_batches ended it "
            "before the loader did.",
        )
    elif plan.kind != "finished" and _in_hooks_of_epoch_start(facts):
        yield warning(
            f"saved in on_train_epoch_start, while epoch {plan.next_epoch:,} began: a resume takes that epoch for done "
            "and trains at most one batch of it",
            hint="Resume with CheckpointGuard, which begins it; or use the checkpoint of the end of the epoch before.",
        )
    else:
        yield passed(plan.sentence)


def _to_keep_the_position(guarded: bool) -> str:
    hint = (
        "Train with torchdata's StatefulDataLoader over rows in order, with shuffle=True or with a sampler that has a "
        "state; or resume from a checkpoint of an epoch's end"
    )
    return f"{hint}." if guarded else f"{hint}; or train with CheckpointGuard, which keeps that of a plain DataLoader."


def _in_hooks_of_epoch_start(facts: Facts) -> bool:
    """Whether an epoch, but the first, was prepared and not started; a guard that saved there knows."""
    p = facts.progress
    if facts.moment is not None or not p.epochs_completed or p.epochs_ready is None:
        return False
    return p.epochs_ready == p.epochs_completed + 1 == (p.epochs_begun or 0) + 1


@rule(
    "CK306",
    "epoch-fraction",
    Severity.WARNING,
    compares="epoch of trainer_state.json with global_step and the updates in an epoch",
    source="transformers/trainer.py, Trainer._inner_training_loop",
)
def epoch_fraction(facts: Facts, options: Options) -> Iterator[Outcome]:
    """transformers' `epoch` is not where `global_step` stands.

    The Trainer writes `epoch` as complete epochs plus the share of batches done, and goes on by `global_step`. They
    part when the batch size or the data changed during the run, or when the file was edited.
    """
    p = facts.progress
    if p.epoch_fraction is None or p.epochs_completed is None:
        return
    lowest = highest = float(p.epochs_completed)
    if (p.epochs_begun or 0) > p.epochs_completed:
        highest += 1
        if p.batches_in_epoch is not None and p.batches_per_epoch:
            lowest += (p.batches_in_epoch - 1) / p.batches_per_epoch
            highest = min(highest, p.epochs_completed + (p.batches_in_epoch + 1) / p.batches_per_epoch)
    if lowest - 1e-6 <= p.epoch_fraction <= highest + 1e-6:
        yield passed(f"epoch {p.epoch_fraction:.4f} agrees with global_step")
    else:
        between = f"{lowest:.4f}" if lowest == highest else f"{lowest:.4f} to {highest:.4f}"
        yield warning(
            f"epoch says {p.epoch_fraction:.4f}, and global_step {p.global_step or 0:,} lies at {between}",
            "trainer_state.json",
            "A resume goes on by global_step; make sure that batch size and data are those of the whole run.",
        )
