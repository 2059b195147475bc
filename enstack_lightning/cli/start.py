"""Which checkpoint `enstack fit|validate|test|predict` starts from: judged before anything is built, as the guard will.

The guard's options come from the command line and the config; a report comes out, or the reason why there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, failure_of, verify_checkpoint
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules import judge
from enstack_lightning.guard.loading.choice import Fallback, choose, choose_newest, refusal
from enstack_lightning.guard.loading.repair import awaiting_repair


def usable(path: str, subcommand: str, guard: Any) -> Report:
    """The report on a checkpoint that has passed verification: the one asked for, or with `fallback` another.

    Raises:
        CheckpointError: The checkpoint has errors.
    """
    fallback: Fallback = guard.fallback if subcommand == "fit" else "none"
    if fallback != "none":  # the guard will come to the same choice, and set aside what is damaged
        return choose(path, lambda p: _verified(p, subcommand, guard), fallback, guard.strict).report
    report = _verified(path, subcommand, guard, reads_all=False)  # the guard does, before it lets this one be loaded
    if report.verdict is Verdict.FAIL:
        raise failure_of(report)
    if not report.accepted(guard.strict):
        raise refusal(report, guard.strict)
    return report


def newest_in(folders: Sequence[str], subcommand: str, guard: Any) -> Report | None:
    """The report on the newest checkpoint that the guard will accept; None where there is none yet.

    What the guard reads every byte of is so read here too, the newest first: the older ones need not be.

    Raises:
        CheckpointError: there are checkpoints and none is good.
    """
    known: dict[str, Report] = {}

    def judged(path: str) -> Report:
        if path not in known:
            known[path] = _verified(path, subcommand, guard, reads_all=False)
        return known[path]

    while (newest := choose_newest(folders, judged, guard.strict)) is not None:
        known[newest.path] = _verified(newest.path, subcommand, guard)
        if known[newest.path].accepted(guard.strict):
            return known[newest.path]
    return None


def _verified(path: str, subcommand: str, guard: Any, reads_all: bool = True) -> Report:
    """The report on a checkpoint as the guard will judge it before it is loaded.

    Args:
        reads_all: whether to read as many bytes as the guard is told to; else headers are enough.
    """
    report = verify_checkpoint(path, _options_of(subcommand, guard, reads_all))
    return awaiting_repair(report) if guard.repair and subcommand == "fit" else report


def _options_of(subcommand: str, guard: Any, reads_all: bool) -> Options:
    lowest, highest = guard.lr_bounds or (Options.min_lr, Options.max_lr)
    return Options(
        purpose="resume" if subcommand == "fit" else "inference",
        tolerance=guard.step_tolerance,
        min_lr=lowest,
        max_lr=highest,
        deep=reads_all and guard.deep is True,
        digests=reads_all and guard.deep == "manifest",
        allow_globals=frozenset(guard.allow_globals or ()),
    )


def whats_done(report: Report, trainer: Any) -> str | None:
    """The sentence on a checkpoint at which a Trainer with these options would end at once; None where it goes on."""
    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    if max_epochs is None and max_steps == -1:
        max_epochs = 1_000  # Lightning's own default
    wanted = {"trainer": {"max_epochs": max_epochs, "max_steps": max_steps}}
    findings = judge(report.facts, Options(select=("CK906",), run_config=wanted))
    if not any(f.severity is Severity.ERROR for f in findings):
        return None
    run = dataclasses.replace(report.facts.run, max_epochs=max_epochs, max_steps=max_steps)
    plan = plan_resume(dataclasses.replace(report.facts, run=run))
    return plan.sentence if plan is not None else None
