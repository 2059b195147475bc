"""What a resuming run says: where it continues, with which steps and which learning rate, and what changed since.

For people as lines of text, for the run's loggers as scalars; programs read `guard.report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from enstack_lightning.checkpoint import Facts, Report, Severity
from enstack_lightning.checkpoint.rules.optimizer_steps import expected_steps
from enstack_lightning.checkpoint.rules.scheduler import highest_rate
from enstack_lightning.checkpoint.wording import many

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def resume_lines(
    report: Report, lrs_before: tuple[float, ...], lrs_after: tuple[float, ...], lost: Sequence[str]
) -> list[str]:
    """The resume report as lines of text.

    Args:
        report: on the facts of the live Trainer.
        lrs_before: the configured learning rates, one a param group, before the checkpoint was restored.
        lrs_after: the restored ones.
        lost: why the run need not equal one that never stopped (`lost_guarantees`).
    """
    plan = report.resume
    lines = [("resume from", report.path)]
    if plan is not None:
        lines.append(("epoch", plan.sentence))
    lines += _steps(report)
    if lrs_before and lrs_after:
        lines.append(("learning rate", f"{lrs_before[0]:.2e} before restoring, {lrs_after[0]:.2e} after"))
        lines += _range(report, lrs_after[0])
    for finding in report.findings:
        if finding.severity is Severity.PASS:
            continue
        is_info = finding.severity is Severity.INFO
        name = ("changed" if finding.code.startswith("CK9") else "note") if is_info else str(finding.severity)
        lines.append((name, f"{finding.code} {finding.message}"))
        if finding.hint and not is_info:
            causes = finding.code in ("CK401", "CK403")
            lines.append(("possible causes" if causes else "what to do", finding.hint))
    lines.append(("exact", f"not promised: {'; '.join(lost)}" if lost else "bit for bit"))
    lines.append(("verdict", report.verdict.upper()))
    return [f"{name:<16} {said}" for name, said in lines]


def _steps(report: Report) -> list[tuple[str, str]]:
    facts, plan = report.facts, report.resume
    p, several = facts.progress, len(facts.optimizers or ()) > 1
    # Several optimizers step when the module says so: no number of epochs tells how often.
    total = facts.run.max_steps if several else facts.run.total_steps
    lines = []
    if p.global_step is not None:
        of = "" if total is None or total < 0 else f" of {total:,}"
        lines.append(("global step", f"{p.global_step:,}{of}{'' if several else _calculation(facts)}"))
    expected = expected_steps(facts, report.options)
    actual = None if plan is None else plan.optimizer_steps
    if plan is not None:
        shown = "no step count kept" if actual is None else f"{actual:,}"
        lines.append(("optimizer steps", shown + (f", expected {expected.steps:,}" if expected else "")))
    if expected and actual is not None:
        difference = abs(actual - expected.steps)
        within = "consistent" if difference <= expected.tolerance else "beyond it"
        lines.append(
            ("difference", f"{difference:,}, tolerance {expected.tolerance:,} ({expected.reckoning}): {within}")
        )
    positions = [s.last_epoch for s in facts.schedulers or () if s.last_epoch is not None]
    if positions:
        taken, counted = sum(positions), p.scheduler_steps or 0
        # Manual optimization steps its schedulers itself, and the loop counts none.
        lines.append(("scheduler steps", f"{taken:,}, expected {counted:,}" if counted or not taken else f"{taken:,}"))
    return lines


def _calculation(facts: Facts) -> str:
    """Epochs times steps plus the rest, where they give the counter."""
    p, batches = facts.progress, facts.batches_per_epoch
    if not batches or p.epochs_completed is None or p.global_step is None:
        return ""
    steps = math.ceil(batches / (facts.run.accumulate_grad_batches or 1))
    rest = p.global_step - p.epochs_completed * steps
    if not 0 <= rest <= steps:
        return ""
    return f" = ({many(p.epochs_completed, 'epoch')} x {many(steps, 'step')}) + {many(rest, 'mid-epoch step')}"


def _range(report: Report, rate: float) -> list[tuple[str, str]]:
    facts, lowest = report.facts, report.options.min_lr
    groups = [group for optimizer in facts.optimizers or () for group in optimizer.groups]
    highest = highest_rate(facts, groups[0], report.options) if groups else math.inf
    if not math.isfinite(highest):
        return []
    if any(f.code == "CK502" and f.severity is Severity.WARNING for f in report.findings):
        judged = "out of range"
    else:
        judged = "in range" if lowest <= rate <= highest else "next to 0, as at a schedule's start or end"
    return [("expected range", f"{lowest:.2e} to {highest:.2e}: {judged}")]


def resume_scalars(report: Report, lrs_before: tuple[float, ...], lrs_after: tuple[float, ...]) -> dict[str, float]:
    """The figures of the resume report for the run's loggers, under names that begin with `guard/`."""
    expected = expected_steps(report.facts, report.options)
    figures: dict[str, float | None] = {
        "optimizer_steps": None if report.resume is None else report.resume.optimizer_steps,
        "expected_optimizer_steps": None if expected is None else expected.steps,
        "global_step": report.facts.progress.global_step,
        "lr_before": lrs_before[0] if lrs_before else None,
        "lr_after": lrs_after[0] if lrs_after else None,
        "warnings": report.count(Severity.WARNING),
        "errors": report.count(Severity.ERROR),
    }
    return {f"guard/{name}": float(value) for name, value in figures.items() if value is not None}


def log_scalars(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Gives scalars to the run's loggers at the step that training resumes from, past Lightning's own logging."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
