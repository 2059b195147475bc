"""The lines that a resuming run logs: where it continues, with which steps and which learning rate."""

from __future__ import annotations

from enstack_lightning.checkpoint import Report
from enstack_lightning.checkpoint.rules.optimizer import expected_steps
from enstack_lightning.checkpoint.rules.rule import Options


def resume_lines(report: Report, lrs_before: tuple[float, ...], lrs_after: tuple[float, ...]) -> list[str]:
    """The resume report as lines of text.

    Args:
        report: on the facts of the live Trainer.
        lrs_before: the configured learning rates, one a param group, before the checkpoint was restored.
        lrs_after: the restored ones.
    """
    plan, facts = report.resume, report.facts
    expected = expected_steps(facts, Options())
    lines = [f"resume from      {report.path}"]
    if plan is not None:
        lines.append(f"epoch            {plan.sentence}")
        steps = "no step count kept" if plan.optimizer_steps is None else f"{plan.optimizer_steps:,}"
        lines.append(
            f"optimizer steps  {steps}, expected {expected.steps:,}" if expected else f"optimizer steps  {steps}"
        )
    positions = [s.last_epoch for s in facts.schedulers or () if s.last_epoch is not None]
    if positions:
        lines.append(f"scheduler steps  {sum(positions):,}, expected {facts.progress.scheduler_steps or 0:,}")
    if lrs_before and lrs_after:
        lines.append(f"learning rate    {lrs_before[0]:.2e} before restoring, {lrs_after[0]:.2e} after")
    lines.append(f"verdict          {report.verdict.upper()}")
    return lines
