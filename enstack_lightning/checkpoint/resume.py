"""What continuing from a checkpoint will do: facts in, a plan out, with the sentence that a person wants.

How Lightning continues: `lightning/pytorch/loops/fit_loop.py` (`FitLoop.reset`) and `training_epoch_loop.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from enstack_lightning.checkpoint.facts import Facts, Format

ResumeKind = Literal["initial", "end-of-epoch", "mid-epoch", "finished", "not-resumable"]


@dataclass(frozen=True)
class ResumePlan:
    """Where training continues. Epochs are numbered as the checkpoint numbers them: EnStack from 1, Lightning from 0.

    Attributes:
        epoch: the epoch that the checkpoint belongs to.
        step: batches of that epoch that are done; 0 when it is complete.
        next_epoch: the epoch that training continues in.
        next_batch: the batch of that epoch that is trained next, from 0.
        optimizer_steps: steps that the optimizer itself has counted.
        learning_rate: the learning rate of the next step, of the first param group.
        max_epochs: the epochs that the run was set to train; None where it is not known or without limit.
        batches_repeated: batches that are trained a second time, at most; 0 where the loader's position is saved.
    """

    kind: ResumeKind
    epoch: int | None
    step: int
    global_step: int | None
    next_epoch: int
    next_batch: int
    batches_per_epoch: int | None
    optimizer_steps: int | None
    learning_rate: float | None
    max_epochs: int | None = None
    batches_repeated: int = 0

    @property
    def batches_left(self) -> int | None:
        """Batches of the next epoch still to train; None where the epoch's length is not known."""
        return None if self.batches_per_epoch is None else self.batches_per_epoch - self.next_batch

    @property
    def sentence(self) -> str:
        if self.kind == "not-resumable":
            return "training cannot resume from this checkpoint"
        if self.kind == "finished":
            return f"training is finished: {self.next_epoch:,} epochs are done; raise max_epochs or max_steps to go on"
        if self.kind == "end-of-epoch":
            return f"end-of-epoch checkpoint: training continues at the start of epoch {self.next_epoch:,}"
        left = "" if self.batches_left is None else f", {self.batches_left:,} left to train"
        of = "" if self.batches_per_epoch is None else f" of {self.batches_per_epoch:,}"
        return (
            f"mid-epoch checkpoint: training continues in epoch {self.next_epoch:,} at batch {self.next_batch:,}{of}; "
            f"{self.next_batch:,} batches are done and skipped{left}"
        )


def plan_resume(facts: Facts) -> ResumePlan | None:
    """The plan for these facts; None where they do not say how far training had come."""
    p = facts.progress
    if p.epochs_completed is None or p.batches_in_epoch is None:
        return None
    in_epoch = (p.epochs_begun or 0) > p.epochs_completed
    whole_epoch = in_epoch and (p.is_last_batch or p.batches_in_epoch == facts.batches_per_epoch)
    completed = p.epochs_completed + (1 if whole_epoch and p.batches_in_epoch else 0)
    done_in_epoch = p.batches_in_epoch if in_epoch and not whole_epoch else 0
    first = 1 if facts.format is Format.ENSTACK else 0
    learning_rates = [g.lr for o in facts.optimizers or () for g in o.groups if g.lr is not None]
    steps = [o.most_steps for o in facts.optimizers or () if o.most_steps is not None]
    return ResumePlan(
        kind=_kind(facts, completed, done_in_epoch),
        epoch=p.epoch,
        step=done_in_epoch,
        global_step=p.global_step,
        next_epoch=completed + first,
        next_batch=done_in_epoch,
        batches_per_epoch=facts.batches_per_epoch,
        optimizer_steps=sum(steps) if steps else None,
        learning_rate=learning_rates[0] if learning_rates else None,
    )


def _kind(facts: Facts, completed: int, done_in_epoch: int) -> ResumeKind:
    if facts.optimizers is None:
        return "not-resumable"
    run, global_step = facts.run, facts.progress.global_step
    if run.max_epochs is not None and 0 <= run.max_epochs <= completed:
        return "finished"
    if run.max_steps is not None and run.max_steps >= 0 and global_step is not None and global_step >= run.max_steps:
        return "finished"
    return "mid-epoch" if done_in_epoch else "end-of-epoch"
