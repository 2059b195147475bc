"""What continuing from a checkpoint will do: facts in, a plan out, with the sentence that a person wants.

How Lightning continues: `lightning/pytorch/loops/fit_loop.py` (`FitLoop.reset`) and `training_epoch_loop.py`;
transformers: `Trainer._inner_training_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.wording import many

ResumeKind = Literal["initial", "end-of-epoch", "mid-epoch", "finished", "not-resumable"]

COUNTS_FROM_ONE = frozenset((Format.ENSTACK, Format.HUGGINGFACE))
"""Formats whose logs call the first epoch 1; Lightning's call it 0."""


@dataclass(frozen=True)
class ResumePlan:
    """Where training continues. Epochs are numbered as the checkpoint and its Trainer's log number them.

    Attributes:
        epoch: the epoch that the checkpoint belongs to.
        step: batches of that epoch that are done; 0 when it is complete.
        next_epoch: the epoch that training continues in.
        next_batch: the batch of that epoch that is trained next, from 0.
        optimizer_steps: steps that the optimizer itself has counted.
        learning_rate: the learning rate of the next step, of the first param group.
        max_epochs: the epochs that the run was set to train; None where it is not known or without limit.
        batches_repeated: batches that are trained a second time, at most; 0 where the loader's position is saved.
        rate_jumps: whether the scheduler's next step goes over to the schedule of a run of another length, so that
            `learning_rate` holds until then only.
        first_epoch: the number of the first epoch: 1 in EnStack's and transformers' checkpoints, 0 in Lightning's.
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
    first_epoch: int = 0
    rate_jumps: bool = False

    @property
    def epochs_done(self) -> int:
        """Complete epochs."""
        return self.next_epoch - self.first_epoch

    @property
    def sentence(self) -> str:
        """The plan in one line.

        An epoch that counts from 0 is followed by how many epochs are done, so that nobody takes "epoch 1" for the
        first.
        """
        if self.kind == "not-resumable":
            return "not resumable: the checkpoint holds a model and no state of its training"
        if self.kind == "finished":
            steps = "" if self.global_step is None else f", {many(self.global_step, 'step')} taken"
            return f"finished: {self._done}{steps}; raise max_epochs or max_steps to train on"
        return f"{self._stands}; {self._continues}; {self._repeats}{self._rate}"

    @property
    def _stands(self) -> str:
        if self.kind == "initial":
            return "nothing trained yet"
        if self.kind == "end-of-epoch":
            return f"end of {self._numbered(self.next_epoch - 1)}"
        of = "" if self.batches_per_epoch is None else f" of {self.batches_per_epoch:,}"
        return f"{self.step:,}{of} batches into {self._numbered(self.next_epoch)}"

    @property
    def _continues(self) -> str:
        verb = "starts" if self.kind == "initial" else "continues"
        of = "" if self.batches_per_epoch is None else f" of {self.batches_per_epoch:,}"
        return f"{verb} with epoch {self.next_epoch:,}, batch {self.next_batch:,}{of}"

    @property
    def _repeats(self) -> str:
        most = "up to " if self.batches_repeated else ""
        return f"{most}{many(self.batches_repeated, 'batch', 'batches')} trained twice"

    @property
    def _rate(self) -> str:
        if self.learning_rate is None:
            return ""
        then = ", then that of the run's new length" if self.rate_jumps else ""
        return f"; next LR {self.learning_rate:.2e}{then}"

    def _numbered(self, epoch: int) -> str:
        if self.first_epoch == 0:
            return f"epoch {epoch:,} ({self._done})"
        return f"epoch {epoch:,}" + ("" if self.max_epochs is None else f" of {self.max_epochs:,}")

    @property
    def _done(self) -> str:
        if self.max_epochs is None:
            return f"{many(self.epochs_done, 'epoch')} done"
        return f"{self.epochs_done:,} of {self.max_epochs:,} epochs done"


def plan_resume(facts: Facts) -> ResumePlan | None:
    """The plan for these facts; None where they do not say how far training had come.

    Where no counter says whether an epoch had begun (Lightning before 1.5), a resume begins that epoch from its start.
    """
    p = facts.progress
    if facts.model_only:
        return _plan(facts, "not-resumable", 0, 0)
    if p.epochs_completed is None:
        return None
    in_epoch = (p.epochs_begun or 0) > p.epochs_completed
    if in_epoch and p.batches_in_epoch is None:
        return None
    batches = p.batches_in_epoch or 0
    whole_epoch = in_epoch and (p.is_last_batch or batches == facts.batches_per_epoch)
    completed = p.epochs_completed + (1 if whole_epoch and batches else 0)
    done_in_epoch = batches if in_epoch and not whole_epoch else 0
    return _plan(facts, _kind(facts, completed, done_in_epoch), completed, done_in_epoch)


def _plan(facts: Facts, kind: ResumeKind, completed: int, done_in_epoch: int) -> ResumePlan:
    first = 1 if facts.format in COUNTS_FROM_ONE else 0
    limit = facts.run.max_epochs
    learning_rates = [g.lr for o in facts.optimizers or () for g in o.groups if g.lr is not None]
    steps = [o.most_steps for o in facts.optimizers or () if o.most_steps is not None]
    return ResumePlan(
        kind=kind,
        epoch=_epoch(facts, completed, done_in_epoch),
        step=done_in_epoch,
        global_step=facts.progress.global_step,
        next_epoch=completed + first,
        next_batch=0 if _begins_epoch_again(facts) else done_in_epoch,
        batches_per_epoch=facts.batches_per_epoch,
        optimizer_steps=sum(steps) if steps else None,
        learning_rate=learning_rates[0] if learning_rates else None,
        max_epochs=limit if limit is not None and limit >= 0 else None,
        batches_repeated=_repeated(facts, done_in_epoch),
        first_epoch=first,
        rate_jumps=_rate_jumps(facts),
    )


def _rate_jumps(facts: Facts) -> bool:
    """Whether the run has another length than when it saved, and a schedule whose function is not in the checkpoint."""
    if facts.saved is None or not any(s.kind is None for s in facts.schedulers or ()):
        return False
    then, now = facts.saved.run, facts.run
    lengths = ((then.max_epochs, now.max_epochs), (then.max_steps, now.max_steps))
    return any((old or 0) > 0 and (new or 0) > 0 and old != new for old, new in lengths)


def _epoch(facts: Facts, completed: int, done_in_epoch: int) -> int | None:
    """transformers writes a fraction of epochs, which is turned into the number of an epoch here."""
    if facts.format is Format.HUGGINGFACE and not facts.model_only:
        return completed + (1 if done_in_epoch else 0)
    return facts.progress.epoch


def _repeated(facts: Facts, done_in_epoch: int) -> int:
    """Of the batches that a loader without a saved position gives in place of those left, at most so many were done.

    It gives as many as were left, but data without a length is gone through from its beginning to its end.
    """
    if facts.loader_position or not done_in_epoch:
        return 0
    of_no_length = facts.run.accumulate_grad_batches is not None and facts.run.batches_per_epoch is None
    if of_no_length or _begins_epoch_again(facts):
        return done_in_epoch
    left = done_in_epoch if not facts.batches_per_epoch else facts.batches_per_epoch - done_in_epoch
    return max(0, min(done_in_epoch, left))


def _begins_epoch_again(facts: Facts) -> bool:
    """A Trainer that is told to skip no data begins the epoch anew, where Lightning trains its remaining number."""
    return facts.format is Format.HUGGINGFACE and not facts.loader_position


def _kind(facts: Facts, completed: int, done_in_epoch: int) -> ResumeKind:
    if facts.optimizers is None:
        return "not-resumable"
    run, global_step = facts.run, facts.progress.global_step
    if run.max_epochs is not None and 0 <= run.max_epochs <= completed:
        return "finished"
    if run.max_steps is not None and run.max_steps >= 0 and global_step is not None and global_step >= run.max_steps:
        return "finished"
    if done_in_epoch:
        return "mid-epoch"
    return "end-of-epoch" if completed or global_step else "initial"
