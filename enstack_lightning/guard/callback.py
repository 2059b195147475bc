"""`CheckpointGuard`: refuses a bad checkpoint before it is loaded, and says what resuming from a good one does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

from enstack_lightning.checkpoint import (
    Facts,
    Format,
    Options,
    Report,
    Severity,
    report_on,
    verify_checkpoint,
)
from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard.checkpoint_io import GuardedCheckpointIO, guard_checkpoint_io, remove_all_leftovers
from enstack_lightning.guard.choice import Fallback, choose, set_aside, what_it_costs, why_refused
from enstack_lightning.guard.flavor import FITTING, Callback, join_imported_flavors, rank_zero_info, rank_zero_warn
from enstack_lightning.guard.live import learning_rates, loaded_facts, run_of, trainer_facts, versions
from enstack_lightning.guard.loader_position import restore_loader_position
from enstack_lightning.guard.loading import (
    Decision,
    check_form,
    guard_loading,
    reads_formats_of_its_own,
    stop_guarding_loading,
)
from enstack_lightning.guard.renamed import forget_renamed
from enstack_lightning.guard.repair import (
    Repair,
    awaiting_repair,
    judged_after_repair,
    repair_checkpoint,
    repair_trainer,
)
from enstack_lightning.guard.resume_report import resume_lines
from enstack_lightning.guard.rng import capture_random_state, restore_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

STATE_VERSION = 1


class CheckpointGuard(Callback):
    """Guards a Trainer against bad checkpoints; works in any Trainer, with any LightningModule.

    Before a checkpoint is loaded, its file is verified: nothing of it is deserialised until it has passed. Once loops,
    optimizers and schedulers are restored, their steps and learning rates are compared with each other, and the log
    says what resuming does. An error stops the run with `CheckpointGuardError`; a warning is logged and the run goes
    on.

    Random state is saved in every checkpoint and restored before the first batch after a resume, and so is the position
    of a training loader that has one (torchdata's `StatefulDataLoader`).

    Args:
        strict: stop at warnings too.
        step_tolerance: optimizer steps by which actual and expected may differ. Default: none where the checkpoint
            has exact counters, else `max(20, batches_per_epoch // 10)`.
        lr_bounds: lowest and highest learning rate to go on with. Default: 1e-8 and twice the initial one.
        allow_globals: names (`module.Class`) of your own classes in the checkpoint that you vouch for. torch must be
            told too, with `torch.serialization.add_safe_globals` or `weights_only=False`.
        deep: how a checkpoint is verified before it is loaded. "manifest": quickly, and every byte's digest where a
            manifest stands beside it, as it does beside what the guard saved; true: every byte in any case; false:
            quickly, and the sizes of the manifest.
        verify_after_save: read every checkpoint back from the disk before it takes its place, and compare it with what
            was written.
        fallback: what happens when the checkpoint to resume from must not be used. "none": the run ends. "previous":
            the newest good checkpoint of the same folder is loaded, and what is damaged is renamed to `*.corrupt`;
            a warning says which, why, and how many steps that costs. Evaluation never falls back: its figures would be
            those of other weights.
        repair: set right after loading what follows from the rest of the checkpoint, and log each change with the
            numbers before and after: a scheduler without state is fast-forwarded, a learning rate that was not restored
            is set to the schedule's, counters that are missing altogether are put back at an epoch's end. An optimizer
            without its moments trains on with fresh ones, which is a warning. What cannot be proven is left and said.

    Attributes:
        report: the report on the last checkpoint judged; None before the first.
        repairs: what `repair` changed or left at the last resume.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CheckpointGuard()], logger=False, barebones=False)
    """

    def __init__(
        self,
        strict: bool = False,
        step_tolerance: int | None = None,
        lr_bounds: tuple[float, float] | None = None,
        allow_globals: list[str] | None = None,
        deep: bool | Literal["manifest"] = "manifest",
        verify_after_save: bool = False,
        fallback: Fallback = "none",
        repair: bool = False,
    ) -> None:
        join_imported_flavors()
        super().__init__()
        if step_tolerance is not None and step_tolerance < 0:
            raise CheckpointGuardError(f"step_tolerance is {step_tolerance} and must be 0 or more")
        if lr_bounds is not None and not 0 <= lr_bounds[0] <= lr_bounds[1]:
            raise CheckpointGuardError(f"lr_bounds are {lr_bounds} and must be two numbers, the lower one first")
        if fallback not in get_args(Fallback):
            raise CheckpointGuardError(f"fallback is {fallback!r} and must be one of {', '.join(get_args(Fallback))}")
        if deep not in (True, False, "manifest"):
            raise CheckpointGuardError(f"deep is {deep!r} and must be 'manifest', true or false")
        self.strict = strict
        self.verify_after_save = verify_after_save
        self._checkpoint_io: GuardedCheckpointIO | None = None
        self.fallback: Fallback = fallback
        self.repair = repair
        self.report: Report | None = None
        self.repairs: tuple[Repair, ...] = ()
        self._options = Options(
            tolerance=step_tolerance,
            deep=deep is True,
            digests=deep == "manifest",
            allow_globals=frozenset(allow_globals or ()),
        )
        if lr_bounds is not None:
            self._options = dataclasses.replace(self._options, min_lr=lr_bounds[0], max_lr=lr_bounds[1])
        self._loaded: Facts | None = None
        self._decision = Decision(None)
        self._configured_lrs: tuple[float, ...] = ()
        self._run: dict[str, Any] = {}
        self._random_state: dict[str, Any] | None = None

    # Before loading

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        self._random_state = None
        self.repairs = ()
        self._checkpoint_io = guard_checkpoint_io(
            trainer.strategy, lambda path: self._verify_file(trainer, path), self._options, self.verify_after_save
        )
        self._decision = Decision(None)
        guard_loading(trainer, lambda path: self._judge(trainer, path), self._accept)

    def _judge(self, trainer: Trainer, asked: str) -> Decision:
        """Which checkpoint is loaded; called on rank 0 only."""
        fallback: Fallback = self.fallback if trainer.state.fn == FITTING else "none"
        if reads_formats_of_its_own(trainer.strategy):
            report = self._verify(trainer, asked)
            if report.facts.format is Format.UNKNOWN:
                rank_zero_warn(f"CheckpointGuard cannot verify {asked}: its form is known only to what loads it")
                return Decision(asked)
        choice = choose(asked, lambda path: self._verify(trainer, path), fallback, self.strict)
        check_form(trainer.strategy, choice.report)
        if not choice.refused:
            return Decision(choice.path, choice.report)
        moved = set_aside(choice.refused)
        rank_zero_warn(what_it_costs(choice, moved, self.strict))
        return Decision(choice.path, choice.report, moved)

    def _accept(self, decision: Decision) -> None:
        self._decision = decision
        self.report = decision.report or self.report

    def _verify(self, trainer: Trainer, path: str) -> Report:
        return self._before_repair(trainer, verify_checkpoint(path, self._options_for(trainer)))

    def _verify_file(self, trainer: Trainer, path: str) -> None:
        """For what is loaded past the Trainer's own way, by another callback or a plugin."""
        if path != self._decision.path:
            self.report = self._verify(trainer, path)
            self._stop_if_refused(self.report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_guarding_loading(trainer)

    # After loading

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        path = str(trainer.ckpt_path)
        judged = self._decision.report
        if judged is not None and judged.facts.format is Format.SHARDED:
            loaded = judged.facts  # weights and optimizers are in the shards, and not in the dict
        else:
            loaded = loaded_facts(checkpoint, path)
            if self.repair and trainer.state.fn == FITTING:
                self.repairs = repair_checkpoint(checkpoint, trainer, loaded)
                loaded = loaded_facts(checkpoint, path) if self.repairs else loaded
            report = report_on(lambda: loaded, path, self._options_for(trainer))
            self._stop_if_refused(self._before_repair(trainer, report))
        forget_renamed(checkpoint, self._decision.set_aside)
        if trainer.state.fn == FITTING:
            self._loaded = loaded

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint_io is not None:
            remove_all_leftovers(trainer, self._checkpoint_io)
        self._configured_lrs = learning_rates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            restore_loader_position(trainer)
        self._run = dataclasses.asdict(run_of(trainer))
        if self._loaded is None:
            return
        path, loaded = str(trainer.ckpt_path), self._loaded
        if self.repair:
            self.repairs += repair_trainer(trainer, loaded, trainer_facts(trainer, path, loaded))
            for repair in self.repairs:
                rank_zero_info(str(repair))
        report = report_on(lambda: trainer_facts(trainer, path, loaded), path, self._options)
        self.report = judged_after_repair(report, self.repairs)
        for line in resume_lines(self.report, self._configured_lrs, learning_rates(trainer)):
            rank_zero_info(line)
        self._stop_if_refused(self.report)
        for finding in self.report.of(Severity.WARNING):
            rank_zero_warn(f"CheckpointGuard: {finding.code} {finding.message}. {finding.hint}".rstrip())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Creating the loader's iterator draws from the generators, so they are set right only now.
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None and not self._run:
            done = self._loaded.progress
            rank_zero_warn(
                f"CheckpointGuard: resuming from {trainer.ckpt_path} trained nothing: {done.epochs_completed} epochs "
                f"and {done.global_step} steps are done, and the Trainer has max_epochs={trainer.max_epochs}, "
                f"max_steps={trainer.max_steps}. Raise one of them to train on."
            )

    # What is saved in every checkpoint

    def state_dict(self) -> dict[str, Any]:
        run = {name: list(v) if isinstance(v, tuple) else v for name, v in self._run.items()}
        return {"version": STATE_VERSION, "run": run, "versions": versions(), "random_state": capture_random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict.get("random_state")

    def _options_for(self, trainer: Trainer) -> Options:
        fitting = trainer.state.fn == FITTING
        return self._options if fitting else dataclasses.replace(self._options, purpose="inference")

    def _before_repair(self, trainer: Trainer, report: Report) -> Report:
        return awaiting_repair(report) if self.repair and trainer.state.fn == FITTING else report

    def _stop_if_refused(self, report: Report) -> None:
        if not report.accepted(self.strict):
            raise CheckpointGuardError(why_refused(report, self.strict))
