"""`CheckpointGuard`: refuses a bad checkpoint before it is loaded, and says what resuming from a good one does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
from enstack_lightning.checkpoint.collector import collector_paused
from enstack_lightning.checkpoint.facts import RunFacts
from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard.flavor import FITTING, Callback, join_imported_flavors, rank_zero_info, rank_zero_warn
from enstack_lightning.guard.live import (
    Configured,
    configured,
    learning_rates,
    loaded_as_judged,
    run_entries,
    run_of,
    settings_before_restoring,
    trainer_facts,
    versions,
)
from enstack_lightning.guard.loading.choice import Fallback, choose, refusal, set_aside, what_it_costs
from enstack_lightning.guard.loading.decision import (
    Decision,
    check_form,
    guard_loading,
    is_loaded_as_it_stands,
    is_of_the_tuner,
    reads_formats_of_its_own,
    safe_globals,
    stop_guarding_loading,
)
from enstack_lightning.guard.loading.fresh_start import doubts, earlier_run
from enstack_lightning.guard.loading.passed_over import passed_over
from enstack_lightning.guard.loading.renamed import forget_renamed
from enstack_lightning.guard.loading.repair import (
    Repair,
    as_repaired,
    awaiting_repair,
    judged_after_repair,
    repair_checkpoint,
    repair_trainer,
)
from enstack_lightning.guard.loading.resume_report import log_scalars, resume_lines, resume_scalars
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.ranks import on_any_rank
from enstack_lightning.guard.restart.exactness import lost_guarantees
from enstack_lightning.guard.restart.fetched_ahead import remember_batch_in_hand
from enstack_lightning.guard.restart.layer_options import changed_options, options_of
from enstack_lightning.guard.restart.loader_position import (
    keep_random_state_of_workers,
    keeps_every_position,
    restore_loader_position,
    stop_keeping_random_state_of_workers,
)
from enstack_lightning.guard.restart.loops import ExactRestart, exact_restart
from enstack_lightning.guard.restart.module_state import convert_before_loading, sets_up_at_start
from enstack_lightning.guard.restart.part_gradients import watch_steps
from enstack_lightning.guard.restart.resume_state import capture_resume_state
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO, guard_checkpoint_io, remove_all_leftovers
from enstack_lightning.guard.training.health import Health
from enstack_lightning.guard.training.nonfinite import OnNonfinite
from enstack_lightning.guard.training.uncounted import uncounted_steps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer


class CheckpointGuard(Callback):
    """Guards a Trainer against bad checkpoints; works in any Trainer, with any LightningModule.

    Before a checkpoint is loaded, its file is verified: nothing of it is deserialised until it has passed. Once loops,
    optimizers and schedulers are restored, their steps and learning rates are compared with each other, and the log
    says what resuming does. An error stops the run with `CheckpointGuardError`; a warning is logged and the run goes
    on.

    A resumed run goes on at the very moment of the save: the validation or the end of the epoch that was due comes
    first. Random state of every process and of the loader's workers, metrics and logged values of a part-done epoch and
    gradients of a part-done accumulation window are in each checkpoint, beside the position of a training loader that
    has one (torchdata's `StatefulDataLoader`). Of a plain `DataLoader` over a map-style data set the order is drawn
    anew, and the batches that are done are passed over; where it is not the same order, the resume report says so.

    Args:
        strict: stop at warnings too.
        step_tolerance: optimizer steps by which actual and expected may differ. Default: none where the checkpoint
            has exact counters, else `max(20, batches_per_epoch // 10)`.
        lr_bounds: lowest and highest learning rate to go on with. Default: 1e-8 and twice the initial one.
        allow_globals: names (`module.Class`) of your own classes in the checkpoint that you vouch for. torch must be
            told too, with `weights_only=False`; what `torch.serialization.add_safe_globals` was told is vouched for.
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
        on_nonfinite: what a loss or a gradient norm that is not finite does. "warn": the first of a run of such steps
            is said, with the parameters. "raise": the run ends with `CheckpointGuardError`, on the CPU before an
            optimizer applies the gradients, on an accelerator within `log_every_n_steps` batches, so as not to wait for
            it at each. In both cases a checkpoint whose trained weights or moments are not finite is saved aside as
            `*.nonfinite`: it becomes neither the best nor the last one. "ignore": nothing of this.
        save_on_signal: at SIGTERM or SIGUSR1 save `recovery_checkpoint.ckpt` in the folder of the run's checkpoints at
            the end of the batch, on every rank after the same one, and only then let the process end as it would have
            ended. A second signal ends it at once. With SLURM's requeueing, Lightning's own checkpoint is made then.

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
        on_nonfinite: OnNonfinite = "warn",
        save_on_signal: bool = True,
    ) -> None:
        join_imported_flavors()
        super().__init__()
        flags = {"strict": strict, "verify_after_save": verify_after_save, "repair": repair}
        for name, value in {**flags, "save_on_signal": save_on_signal}.items():
            if not isinstance(value, bool):
                raise CheckpointGuardError(f"{name} is {value!r} and must be true or false")
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
        self._health = Health(on_nonfinite, save_on_signal, self.state_key)
        self.report: Report | None = None
        self.repairs: tuple[Repair, ...] = ()
        self._allow_globals = frozenset(allow_globals or ())
        self._options = Options(
            tolerance=step_tolerance,
            deep=deep is True,
            digests=deep == "manifest",
            allow_globals=self._allow_globals,
        )
        if lr_bounds is not None:
            self._options = dataclasses.replace(self._options, min_lr=lr_bounds[0], max_lr=lr_bounds[1])
        self._loaded: Facts | None = None
        self._decision = Decision(None)
        self._given = Configured()
        self._run: RunFacts | None = None
        self._options_at_start: dict[str, float] = {}
        self._trainer: Trainer | None = None
        self._restart: ExactRestart | None = None
        self._stops_watching: tuple[Callable[[], None], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one Trainer stays with it, and is made anew for the Trainer of a copy.
        of_one = dict.fromkeys(("_checkpoint_io", "_trainer", "_restart")) | {"_stops_watching": ()}
        return vars(self) | of_one | {"_health": self._health.anew()}

    # Before loading

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = self._run = None
        self._given = Configured()
        self.repairs = ()
        self._trainer = trainer
        # Anew for each run: what torch is told may hold for a while only.
        self._options = dataclasses.replace(self._options, allow_globals=self._allow_globals | safe_globals())
        self._forget_restart()  # of a run that failed, which has had no teardown
        keep_random_state_of_workers(trainer)
        self._checkpoint_io = guard_checkpoint_io(
            trainer.strategy, partial(self._verify_file, trainer), self._options, self.verify_after_save
        )
        self._decision = Decision(None)
        guard_loading(trainer, lambda path: self._judge(trainer, path), partial(self._accept, trainer))

    def _judge(self, trainer: Trainer, asked: str) -> Decision:
        """Which checkpoint is loaded; called on rank 0 only."""
        if is_of_the_tuner(asked):
            return Decision(asked)  # a moment old, and what its search has to go back to whatever a rule says
        fitting = trainer.state.fn == FITTING
        fallback: Fallback = self.fallback if fitting else "none"
        if reads_formats_of_its_own(trainer.strategy):
            report = self._verify(trainer, asked)
            if report.facts.format is Format.UNKNOWN:
                rank_zero_warn(f"CheckpointGuard cannot verify {asked}: its form is known only to what loads it")
                return Decision(asked)
        choice = choose(asked, lambda path: self._verify(trainer, path), fallback, self.strict)
        check_form(trainer.strategy, choice.report)
        if fitting and (said := passed_over(choice.report, lambda path: self._verify(trainer, path))):
            rank_zero_warn(f"CheckpointGuard: {said}")
        if not choice.refused:
            return Decision(choice.path, choice.report)
        moved = set_aside(choice.refused)
        rank_zero_warn(what_it_costs(choice, moved, self.strict))
        return Decision(choice.path, choice.report, moved)

    def _accept(self, trainer: Trainer, decision: Decision) -> None:
        self._decision = decision
        if decision.path is not None:
            convert_before_loading(trainer)
        self.report = decision.report or self.report
        if self._checkpoint_io is not None:
            self._checkpoint_io.resumed_from = decision.path

    def _verify(self, trainer: Trainer, path: str) -> Report:
        return self._before_repair(trainer, verify_checkpoint(path, self._options_for(trainer)))

    def _verify_file(self, trainer: Trainer, path: str) -> None:
        """For what is loaded past the Trainer's own way, by another callback or a plugin."""
        if path != self._decision.path:
            self.report = self._verify(trainer, path)
            self._stop_if_refused(self.report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_guarding_loading(trainer)
        self._health.stop()
        stop_keeping_random_state_of_workers(trainer)
        self._forget_restart()

    def _forget_restart(self) -> None:
        if self._restart is not None:
            self._restart.uninstall()
        for stop in self._stops_watching:
            stop()
        self._restart, self._stops_watching = None, ()

    # After loading

    @collector_paused()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        path = str(trainer.ckpt_path)
        if is_of_the_tuner(path):
            return
        judged = self._decision.report
        if judged is not None and judged.facts.format is Format.SHARDED:
            loaded = judged.facts  # weights and optimizers are in the shards, and not in the dict
        else:
            known = judged.facts if judged is not None else None
            as_it_stands = type(self) is CheckpointGuard and is_loaded_as_it_stands(trainer, self)
            loaded, is_as_judged = loaded_as_judged(checkpoint, path, known, as_it_stands)
            if self.repair and trainer.state.fn == FITTING:
                self.repairs = repair_checkpoint(checkpoint, trainer, loaded)
                if self.repairs:
                    loaded, is_as_judged = loaded_as_judged(checkpoint, path, known)
            if not is_as_judged:
                report = report_on(lambda: loaded, path, self._options_for(trainer))
                self._stop_if_refused(self._before_repair(trainer, report))
        forget_renamed(checkpoint, self._decision.set_aside)
        if trainer.state.fn == FITTING:
            self._stop_where_nothing_is_left(trainer, loaded)
            self._loaded = loaded
            self._restart = exact_restart(trainer, checkpoint, self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint_io is not None:
            remove_all_leftovers(trainer, self._checkpoint_io)
        self._given = configured(trainer)
        judged = self._decision.report
        if self._loaded is None and judged is not None:
            # A checkpoint without the entry `callbacks`: Lightning has not called on_load_checkpoint.
            self._stop_where_nothing_is_left(trainer, judged.facts)
            self._loaded = judged.facts
        if trainer.ckpt_path is None and trainer.is_global_zero:
            for doubt in doubts(trainer):
                rank_zero_warn(f"CheckpointGuard: {doubt}")
            if said := earlier_run(trainer):
                rank_zero_info(f"CheckpointGuard: {said}")

    @collector_paused()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            restore_loader_position(trainer)
        if self._restart is not None:
            self._restart.count_batches_of_another_size()
        if self._loaded is not None and self._is_position_lost(trainer):
            self._loaded = dataclasses.replace(self._loaded, loader_position=False)
        parts = Parts(pl_module)
        self._run = run_of(trainer, self._given, parts)
        self._options_at_start = options_of(parts)
        self._health.start(trainer, self._checkpoint_io)
        self._stops_watching = watch_steps(trainer), remember_batch_in_hand(trainer)
        if self._loaded is None:
            return
        path, loaded = self._loaded.path, self._loaded
        if self.repair:
            live = trainer_facts(trainer, path, loaded, self._run, parts)
            self.repairs += repair_trainer(trainer, loaded, live)
            loaded = as_repaired(loaded, live, self.repairs)
            for repair in self.repairs:
                rank_zero_info(str(repair))
        facts = trainer_facts(trainer, path, loaded, self._run, parts)
        report = report_on(lambda: facts, path, self._options)
        self.report = judged_after_repair(report, self.repairs)
        rates = self._given.learning_rates, learning_rates(trainer)
        by_all = trainer.strategy.reduce_boolean_decision(self.report.accepted(self.strict))
        if by_all and self._restart is not None and on_any_rank(trainer, sets_up_at_start(trainer)):
            # What hooks that come after this one set is compared with what was held at the save.
            self._restart.when_restored = partial(self._say_what_is_resumed, trainer, self.report, *rates)
        else:
            self._say_what_is_resumed(trainer, self.report, *rates, parts)
        self._stop_if_refused(self.report)
        if not by_all:  # what one rank alone refuses ends all: the others would wait for it
            raise CheckpointGuardError(f"another rank refused to resume from {path}; its own error says why")
        log_scalars(trainer, resume_scalars(self.report, *rates))
        for finding in self.report.of(Severity.WARNING):
            rank_zero_warn(f"CheckpointGuard: {finding.code} {finding.message}. {finding.hint}".rstrip())

    def _say_what_is_resumed(
        self,
        trainer: Trainer,
        report: Report,
        before: tuple[float, ...],
        after: tuple[float, ...],
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts(trainer.lightning_module)
        with self._restart.explained() if self._restart is not None else nullcontext():
            lost = lost_guarantees(report, self._restart, trainer, parts)
        for line in resume_lines(report, before, after, lost):
            rank_zero_info(line)

    # While training

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._health.before_backward(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._health.before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._health.batch_end(trainer, pl_module, outputs)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._health.validation_batch_end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._health.train_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._health.look(trainer, pl_module)
        if trainer.current_epoch == 0 and (uncounted := uncounted_steps(trainer)):
            rank_zero_warn(f"CheckpointGuard: {uncounted}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._health.look(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._health.exception()
        is_restoring = self._loaded is not None and bool(self._given.optimizers) and self._run is None
        if self._loaded is None or not is_restoring or isinstance(exception, CheckpointGuardError):
            return
        # What torch says when it cannot restore an optimizer names neither the optimizer nor the parameters.
        path, loaded = self._loaded.path, self._loaded
        options = dataclasses.replace(self._options, select=("CK911", "CK912", "CK913"))
        report = report_on(lambda: trainer_facts(trainer, path, loaded), path, options)
        for finding in (*report.of(Severity.ERROR), *report.of(Severity.WARNING)):
            rank_zero_warn(
                f"CheckpointGuard: {path} was not restored: {finding.code} {finding.message}. {finding.hint}"
            )

    # What is saved in every checkpoint

    def state_dict(self) -> dict[str, Any]:
        trainer, run, parts, options = self._trainer, {}, None, {}
        if trainer is not None and self._run is not None:
            parts = Parts(trainer.lightning_module)
            run = run_entries(trainer, self._run, self._loaded, parts)
            options = changed_options(parts, self._options_at_start)
        # The time of day tells which run is the newer one of two that share a folder, whatever their steps.
        known = {"saved_at": time.time(), "run": run, "versions": versions(), "options": options}
        return {**known, **capture_resume_state(trainer, parts)}

    def _stop_where_nothing_is_left(self, trainer: Trainer, loaded: Facts) -> None:
        """What shows of the run's changes before anything is restored: above all that it would train nothing."""
        options = dataclasses.replace(
            self._options, select=("CK904", "CK905", "CK906", "CK909"), run_config=settings_before_restoring(trainer)
        )
        self._stop_if_refused(report_on(lambda: loaded, loaded.path, options))

    def _is_position_lost(self, trainer: Trainer) -> bool:
        if self._restart is not None and self._restart.has_order:
            return on_any_rank(trainer, not self._restart.order_kept)
        return not keeps_every_position(trainer)

    def _options_for(self, trainer: Trainer) -> Options:
        fitting = trainer.state.fn == FITTING
        return self._options if fitting else dataclasses.replace(self._options, purpose="inference")

    def _before_repair(self, trainer: Trainer, report: Report) -> Report:
        return awaiting_repair(report) if self.repair and trainer.state.fn == FITTING else report

    def _stop_if_refused(self, report: Report) -> None:
        if not report.accepted(self.strict):
            raise refusal(report, self.strict)
