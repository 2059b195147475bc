"""What `CheckpointGuard(repair=True)` sets right after loading, and what it leaves.

Nothing is guessed: a change follows from what the checkpoint itself says in at least one other place, and where two
places contradict each other, nothing is changed. Every change becomes a `Repair` with the numbers before and after;
what cannot be proven becomes one too, with the reason. On a healthy checkpoint there is none.

Set right are a single scheduler without state on a single optimizer, a learning rate that was not restored or is
another than its scheduler's, and the counters of a checkpoint of an epoch's end without `loops`. An optimizer without
moments is let through, with a warning, and not touched. Refused as ever are an optimizer that is ahead of the counter
(either of them may be right) and a checkpoint without the entry `optimizer_states` (it was saved to hold a model).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.checkpoint import Facts, Finding, Format, Report, Severity
from enstack_lightning.checkpoint.schedule import same_rate
from enstack_lightning.checkpoint.wording import many
from enstack_lightning.guard.loading.fast_forward import (
    CannotForwardError,
    Forwarded,
    at_its_position,
    copied,
    fast_forward,
    position_of,
)
from enstack_lightning.guard.loading.lost_loops import Counters, loops_with, lost_counters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LET_THROUGH = ("CK501", "CK503")
"""Warnings about what may be set right; they are said again, after loading, of what was not."""


@dataclass(frozen=True)
class Repair:
    """Something that was set right, or that was not and why.

    Attributes:
        what: `scheduler 0 (LambdaLR)`, `optimizer 0 (AdamW)`, `loops`.
        said: a sentence with the numbers before and after.
        changed: whether anything was changed.
        lost: the state of this optimizer is lost, and training may go on without it.
        forwarded: this scheduler had no state and was set forward.
    """

    what: str
    said: str
    changed: bool = False
    lost: bool = False
    forwarded: bool = False

    def __str__(self) -> str:
        return f"{'repaired' if self.changed else 'left as it is':<16} {self.what}: {self.said}"


# Before loading


def awaiting_repair(report: Report) -> Report:
    """The report on a file, for a run that repairs: what may be set right does not stop it before it is loaded."""
    return dataclasses.replace(report, findings=tuple(_awaited(f, report.facts) for f in report.findings))


def _awaited(finding: Finding, facts: Facts) -> Finding:
    if finding.severity is Severity.WARNING and finding.code in _LET_THROUGH:
        return dataclasses.replace(finding, severity=Severity.INFO)
    if finding.severity is not Severity.ERROR or facts.format is not Format.LIGHTNING:
        return finding
    if finding.code == "CK402" and all(o.groups for o in facts.optimizers or ()):
        return _without_its_state(finding)
    if finding.code == "CK201" and finding.where == "loops":
        counters = lost_counters(facts)
        if isinstance(counters, Counters):
            return dataclasses.replace(finding, severity=Severity.INFO)
        return dataclasses.replace(finding, hint=f"They cannot be told from the rest: {counters}. {finding.hint}")
    return finding


def _without_its_state(finding: Finding) -> Finding:
    return dataclasses.replace(
        finding,
        severity=Severity.WARNING,
        hint="Let through by repair=True: the moments are lost. Use another checkpoint where that matters.",
    )


# While loading


def repair_checkpoint(checkpoint: dict[str, Any], trainer: Trainer, facts: Facts) -> tuple[Repair, ...]:
    """Gives a checkpoint that was just loaded its entry `loops` back, from which the Trainer restores its counters.

    Args:
        checkpoint: the loaded dict; the entry is put into it.
        facts: those of the dict.
    """
    if facts.format is not Format.LIGHTNING or "loops" in facts.fields:
        return ()
    counters = lost_counters(facts)
    module = trainer.lightning_module
    if isinstance(counters, str) or not module.automatic_optimization:
        why = counters if isinstance(counters, str) else "under manual optimization the steps are the module's own"
        return (Repair("loops", f"the entry is missing, and the rest does not tell its counters: {why}"),)
    checkpoint["loops"] = loops_with(counters, trainer)
    said = (
        f"global_step 0 before, {counters.steps:,} after, complete epochs 0 before, {counters.epochs:,} after "
        f"({counters.epochs:,} epochs x {counters.batches:,} batches; the optimizer did {counters.steps:,} steps for "
        f"every parameter, and the entry global_step says so too)"
    )
    return (Repair("loops", said, changed=True),)


# After loading


def repair_trainer(trainer: Trainer, loaded: Facts, live: Facts) -> tuple[Repair, ...]:
    """Sets right the learning rate and the scheduler of a Trainer whose state has just been restored.

    Args:
        loaded: facts of the checkpoint that it was restored from.
        live: facts of the Trainer itself.
    """
    return (*_lost_optimizers(trainer, loaded, live), *_schedule(trainer, loaded, live))


def judged_after_repair(report: Report, repairs: Sequence[Repair]) -> Report:
    """The report on the live run: an optimizer whose state the checkpoint lacks is a warning, as was promised."""
    stateless = [o for o in report.facts.optimizers or () if o.keeps_moments and not o.parameters_with_state]
    if sum(r.lost for r in repairs) < max(1, len(stateless)):
        return report
    return dataclasses.replace(
        report,
        findings=tuple(
            _without_its_state(f) if f.code == "CK402" and f.severity is Severity.ERROR else f for f in report.findings
        ),
    )


def as_repaired(loaded: Facts, live: Facts, repairs: Sequence[Repair]) -> Facts:
    """The facts of a checkpoint as if it had held the schedulers that were set forward, to compare the run with."""
    if any(r.forwarded for r in repairs):
        return dataclasses.replace(loaded, schedulers=live.schedulers)
    return loaded


def _lost_optimizers(trainer: Trainer, loaded: Facts, live: Facts) -> tuple[Repair, ...]:
    """Optimizers without moments under an old counter. Nothing in them is wrong: zero moments and a step count of 0
    belong together, and bias correction begins anew with them."""
    steps = live.progress.optimizer_steps or 0
    saved = loaded.optimizers or ()
    if steps <= sum(o.most_steps or 0 for o in live.optimizers or ()):
        return ()  # of several, one that has not stepped yet has lost nothing
    repairs = []
    for i, (optimizer, facts) in enumerate(zip(trainer.optimizers, live.optimizers or (), strict=False)):
        in_file = saved[i].most_steps if i < len(saved) else None
        what = f"optimizer {i} ({type(optimizer).__name__})"
        if not steps or not facts.keeps_moments:
            continue
        if not facts.parameters_with_state and not (i < len(saved) and saved[i].parameters_with_state):
            said = (
                f"the checkpoint lacks its moments after {steps:,} steps, which nothing can bring back; it goes on "
                "with zero moments and its own step count 0, which agree with each other, and nothing in it is "
                f"changed; the counter stays at {steps:,}"
            )
            repairs.append(Repair(what, said, lost=True))
        elif in_file is not None and 2 * in_file <= steps and len(trainer.optimizers) == 1:
            said = (
                f"it did {in_file:,} of {steps:,} steps, as if it was made anew since; its moments and its own count "
                "agree with each other, and neither can be brought to the counter"
            )
            repairs.append(Repair(what, said))
    return tuple(repairs)


def _schedule(trainer: Trainer, loaded: Facts, live: Facts) -> tuple[Repair, ...]:
    configs, restored = trainer.lr_scheduler_configs, len(loaded.schedulers or ())
    if not configs or not live.progress.optimizer_steps:
        return ()
    lacking = restored < len(configs)
    if len(configs) > 1 or not trainer.lightning_module.automatic_optimization:  # which has one optimizer only
        what = f"scheduler {restored}" if lacking else ""
        why = (
            f"the checkpoint has {restored:,} of {many(len(configs), 'scheduler')}; only a single one on a single "
            "optimizer under automatic optimization has a rate that is its own work, and steps that were counted"
        )
        return (Repair(what, why),) if lacking else ()
    scheduler: Any = configs[0].scheduler
    set_right = _forwarded if lacking else _rate_set
    try:
        said = set_right(trainer, scheduler, loaded, live)
    except CannotForwardError as e:
        return (Repair(_name(scheduler), f"left at step {position_of(scheduler) or 0:,}: {e}"),)
    return (Repair(_name(scheduler), said, changed=True, forwarded=lacking),) if said else ()


def _forwarded(trainer: Trainer, scheduler: Any, loaded: Facts, live: Facts) -> str | None:
    """Brings a scheduler that the checkpoint has no state for to the position that its counters give."""
    optimizer, before = trainer.optimizers[0], _floats(getattr(scheduler, "_last_lr", ()))
    if not live.progress.scheduler_steps:
        raise CannotForwardError("the run that saved had counted no step of a scheduler, so that this one is new to it")
    steps, reckoning = _proven_position(live)
    if position_of(scheduler) == steps:
        return None  # the module has done so itself
    if position_of(scheduler) != 0:
        raise CannotForwardError(f"the run has set it forward itself, and not to {steps:,} = {reckoning}")
    restored = _has_rates(trainer, loaded)
    _check_is_the_saved_one(loaded, live)
    _check_base_rates(scheduler, optimizer)
    forwarded = fast_forward(scheduler, steps)
    own = _floats(group["lr"] for group in optimizer.param_groups)
    if restored and not _same(own, forwarded.rates):
        raise CannotForwardError(
            f"this run's schedule gives {_shown(forwarded.rates)} at step {steps:,}, and the optimizer's rate in the "
            f"checkpoint is {_shown(own)}: it was trained with another schedule, or its rate was set by hand"
        )
    scheduler.load_state_dict(forwarded.state)
    if restored:
        scheduler._last_lr = [copied(group["lr"]) for group in optimizer.param_groups]
        rest = "the optimizer has that rate already and is left as it is"
    else:
        _set(optimizer, forwarded)
        rest = "the optimizer's rate is set to it" + (
            "" if forwarded.exact else ", by the schedule's closed form, which rounds otherwise than its steps do"
        )
    after = _floats(scheduler._last_lr)
    return (
        f"fast-forwarded {many(steps, 'step')} = {reckoning}; learning rate {_shown(before)} before, {_shown(after)} "
        f"after; {rest}"
    )


def _rate_set(trainer: Trainer, scheduler: Any, loaded: Facts, live: Facts) -> str | None:
    """Sets the optimizer's rate to that of its restored scheduler, where these differ and the scheduler is right."""
    optimizer, last = trainer.optimizers[0], _floats(getattr(scheduler, "_last_lr", ()))
    own = _floats(group["lr"] for group in optimizer.param_groups)
    if len(own) != len(last) or _same(own, last):
        return None
    steps, reckoning = _proven_position(live)
    if position_of(scheduler) != steps:
        raise CannotForwardError(
            f"the optimizer's rate is {_shown(own)} and its scheduler set {_shown(last)}, and the scheduler is not "
            f"where it should be: {steps:,} = {reckoning}"
        )
    _check_base_rates(scheduler, optimizer)
    restored = _has_rates(trainer, loaded)
    scheduled = _at_its_position(scheduler, restored)
    if scheduled is None and restored:
        raise CannotForwardError(
            f"the optimizer's rate is {_shown(own)} and its scheduler set {_shown(last)}; the schedule reckons each "
            "rate from the one before, so that nothing tells which of them is right"
        )
    if scheduled is not None and not _same(scheduled.rates, last):
        raise CannotForwardError(
            f"the optimizer's rate is {_shown(own)}, its scheduler set {_shown(last)}, and this run's schedule gives "
            f"{_shown(scheduled.rates)}"
        )
    if scheduled is not None and not restored:
        _set(optimizer, scheduled)  # momentum too, where the schedule drives it
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        _set_entry(group, "lr", rate)
    return (
        f"the optimizer's learning rate {_shown(own)} before, {_shown(last)} after, as the scheduler set it last, at "
        f"step {steps:,} = {reckoning}"
    )


def _at_its_position(scheduler: Any, has_rival: bool) -> Forwarded | None:
    """What the schedule gives; for one of an unknown class its own record has to do, unless the optimizer has one."""
    try:
        return at_its_position(scheduler)
    except CannotForwardError:
        if has_rival:
            raise
        return None


def _proven_position(live: Facts) -> tuple[int, str]:
    """How often the only scheduler has stepped, by the loop's counter and by its own interval, and how that comes.

    Raises:
        CannotForwardError: they contradict each other.
    """
    p, run = live.progress, live.run
    counted, epochs = p.scheduler_steps or 0, p.epochs_completed or 0
    interval, frequency = run.scheduler_intervals[0], run.scheduler_frequencies[0]
    if frequency != 1:
        return counted, f"the loop's counter of scheduler steps, one every {frequency:,} {interval}s"
    if interval == "epoch":
        if abs(counted - epochs) > 1:  # it steps at an epoch's last batch, and a save may come before or after
            raise CannotForwardError(f"the loop counted {counted:,} scheduler steps and {epochs:,} complete epochs")
        return counted, f"{many(counted, 'epoch')} x 1 step"
    if counted != p.optimizer_steps:
        raise CannotForwardError(
            f"the loop counted {counted:,} scheduler steps and {p.optimizer_steps or 0:,} optimizer steps"
        )
    return counted, _reckoning(live, counted)


def _reckoning(live: Facts, steps: int) -> str:
    p, batches = live.progress, live.batches_per_epoch
    in_epoch = math.ceil(batches / (live.run.accumulate_grad_batches or 1)) if batches else 0
    if in_epoch and 0 <= steps - (p.epochs_completed or 0) * in_epoch <= in_epoch:
        rest = steps - (p.epochs_completed or 0) * in_epoch
        return f"({many(p.epochs_completed or 0, 'epoch')} x {in_epoch:,} steps) + {rest:,} mid-epoch steps"
    return "the loop's counter of optimizer steps"


def _check_is_the_saved_one(loaded: Facts, live: Facts) -> None:
    """The schedule must be the one that the run was saved with, where the guard recorded that."""
    before, now = loaded.run, live.run
    if before.scheduler_kinds and before.scheduler_kinds != now.scheduler_kinds:
        raise CannotForwardError(f"the run that saved had {', '.join(before.scheduler_kinds)}")
    for saved, given in zip(before.scheduler_options, now.scheduler_options, strict=False):
        for name in sorted(saved.keys() & given.keys()):
            if _listed(saved[name]) != _listed(given[name]):
                raise CannotForwardError(f"the run that saved had {name} {saved[name]}, and this one has {given[name]}")


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, list | tuple) else value


def _check_base_rates(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """The configured schedule and the optimizer have to begin at the same rates, or the one is not of the other."""
    base = _floats(getattr(scheduler, "base_lrs", ()))
    initial = _floats(group.get("initial_lr", math.nan) for group in optimizer.param_groups)
    if base and not _same(base, initial):
        raise CannotForwardError(f"its base rate is {_shown(base)}, and that of the optimizer {_shown(initial)}")


def _has_rates(trainer: Trainer, loaded: Facts) -> bool:
    """Whether the optimizer's param groups, and with them its rates, are from the checkpoint."""
    by_strategy = not trainer.strategy.lightning_restore_optimizer  # which restores it from files of its own
    return by_strategy or any(o.groups for o in loaded.optimizers or ())


def _set(optimizer: torch.optim.Optimizer, forwarded: Forwarded) -> None:
    for group, driven in zip(optimizer.param_groups, forwarded.groups, strict=True):
        for name, value in driven.items():
            _set_entry(group, name, value)


def _set_entry(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(float(value))
    else:
        group[name] = copied(value)


def _floats(rates: Any) -> tuple[float, ...]:
    return tuple(float(rate) for rate in rates)


def _same(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(map(same_rate, a, b))


def _shown(rates: tuple[float, ...]) -> str:
    return ", ".join(dict.fromkeys(f"{rate:.6e}" for rate in rates[:4])) + (" ..." if len(rates) > 4 else "")


def _name(scheduler: Any) -> str:
    return f"scheduler 0 ({type(scheduler).__name__})"
