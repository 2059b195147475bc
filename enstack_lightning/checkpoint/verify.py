"""The front door: a path in, a report out. Imports no torch and executes nothing of what it reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.checkpoint.readers import read_facts
from enstack_lightning.checkpoint.report import Report, Verdict
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules import Finding, Options, Severity, judge
from enstack_lightning.checkpoint.search import find_checkpoints
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError


def verify_checkpoint(path: str | os.PathLike[str], options: Options | None = None) -> Report:
    """Verifies one checkpoint: a Lightning `.ckpt` file or an EnStack folder.

    Only headers, the pickle and the optimizer's step counts are read, so the time does not grow with the tensors.

    Args:
        path: file or folder.
        options: tolerance and learning rate bounds.

    Returns:
        The report. A checkpoint that cannot be read or understood fails; this function does not raise for it.

    Example:
        >>> verify_checkpoint("does-not-exist.ckpt").verdict
        <Verdict.FAIL: 'fail'>
    """
    began = time.perf_counter()
    return report_on(lambda: read_facts(locate(path)), str(path), options, began)


def quick_verify_checkpoint(path: str | os.PathLike[str]) -> Report:
    """Verifies a checkpoint before it is loaded, and raises when it must not be.

    Raises:
        CheckpointNotFoundError: nothing stands at `path` (also a `FileNotFoundError`).
        CheckpointError: the checkpoint has errors (also a `ValueError`); the message lists them.
    """
    report = verify_checkpoint(path)
    if report.verdict is Verdict.FAIL:
        raise failure_of(report)
    return report


def find_last_good(folder: str | os.PathLike[str], options: Options | None = None) -> Report | None:
    """The report on the newest checkpoint below `folder` that training can resume from; None when there is none."""
    return newest_good([verify_checkpoint(p, options) for p in find_checkpoints(folder)])


def newest_good(reports: list[Report]) -> Report | None:
    """Of the checkpoints that training can resume from, the one with the most steps.

    Of equals it is one without warnings, and then the youngest file.
    """
    good = [r for r in reports if r.verdict is not Verdict.FAIL and r.resume is not None]
    return max(good, key=_age, default=None)


def failure_of(report: Report) -> CheckpointError:
    """The exception that says why a checkpoint must not be used."""
    errors = report.of(Severity.ERROR)
    said = "; ".join(f"{f.code} {f.message}" for f in errors) or "nothing in it could be verified"
    hint = next((f.hint for f in errors if f.hint), "")
    kind = CheckpointNotFoundError if not os.path.lexists(report.path) else CheckpointError
    return kind(f"checkpoint {report.path} must not be used: {said}. {hint}".strip())


def report_on(
    read: Callable[[], Facts], path: str, options: Options | None = None, began: float | None = None
) -> Report:
    """Reads facts, judges them and reports; whatever goes wrong on the way fails the verification."""
    began = time.perf_counter() if began is None else began
    try:
        facts = read()
        findings, plan = judge(facts, options), plan_resume(facts)
    except Exception as e:  # fail closed: a checkpoint that breaks the verifier is not verified
        facts, plan = Facts(path), None
        message = f"it could not be verified: {type(e).__name__}: {e}"
        findings = (Finding("CK100", "not-verified", Severity.ERROR, message, path, "Report this with the file."),)
    return Report(path, facts, findings, plan, time.perf_counter() - began)


def _age(report: Report) -> tuple[int, int, bool, float]:
    p = report.facts.progress
    done = (p.epochs_completed or 0, p.batches_in_epoch or 0)
    steps = p.global_step if p.global_step is not None else done[0] * (p.batches_per_epoch or 1) + done[1]
    return steps, done[0], report.verdict is Verdict.PASS, Path(report.path).stat().st_mtime
