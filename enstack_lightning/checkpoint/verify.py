"""The front door: a path in, a report out. Imports no torch and executes nothing of what it reads."""

from __future__ import annotations

import dataclasses
import glob
import os
import time
from collections.abc import Callable, Iterable

from enstack_lightning.checkpoint.collector import collector_paused
from enstack_lightning.checkpoint.deep import DeepRead, Progress
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts
from enstack_lightning.checkpoint.location import locate, stands_at
from enstack_lightning.checkpoint.manifest import compare_manifest
from enstack_lightning.checkpoint.readers import read_facts
from enstack_lightning.checkpoint.report import Report, Verdict
from enstack_lightning.checkpoint.resume import ResumePlan, plan_resume
from enstack_lightning.checkpoint.rules import Finding, Options, Severity, judge
from enstack_lightning.checkpoint.rules.settings import settings_of_config
from enstack_lightning.checkpoint.search import find_checkpoints
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError


def verify_checkpoint(
    path: str | os.PathLike[str], options: Options | None = None, progress: Progress | None = None
) -> Report:
    """Verifies one checkpoint of any known format, on disk or behind a URL that fsspec knows.

    Headers, pickles and the optimizer's step counts are read, so the time does not grow with the tensors; with
    `Options(deep=True)` every byte is read once, compared with its checksum and with the manifest's digest, and values
    that are not finite are found.

    Args:
        path: file, folder or URL.
        options: what it is wanted for, how deep to look, tolerances.
        progress: called with the number of bytes just read of a deep verification, from any thread.

    Returns:
        The report, which `print` shows as text and a notebook as a page. A checkpoint that cannot be read or understood
        fails; this function does not raise for it.

    Example:
        >>> verify_checkpoint("does-not-exist.ckpt").verdict
        <Verdict.FAIL: 'fail'>
    """
    began = time.perf_counter()
    place = os.fspath(path)
    if not isinstance(place, str):
        raise TypeError(f"path must be a str or a Path, not {type(place).__name__}")
    deep = DeepRead(progress) if options is not None and options.deep else None
    digests = options is not None and (options.deep or options.digests)
    return report_on(lambda: _facts_at(place, deep, digests), place, options, began)


def _facts_at(path: str, deep: DeepRead | None, digests: bool) -> Facts:
    if not path:
        empty = "it is empty; is a variable of the script unset?"
        return Facts(path, defects=(Defect(DefectKind.MISSING, "path", empty),))
    if glob.has_magic(path) and not stands_at(path):
        return Facts(path, defects=(Defect(DefectKind.MISSING, path, "nothing matches this pattern"),))
    try:
        location = locate(path)
    except CheckpointError as e:
        return Facts(path, defects=(Defect(DefectKind.UNREADABLE, path, str(e)),))
    facts = read_facts(location, deep)
    manifest = compare_manifest(location, digests, deep.progress if deep else None)
    return facts if manifest is None else dataclasses.replace(facts, manifest=manifest)


def quick_verify_checkpoint(path: str | os.PathLike[str]) -> Report:
    """Verifies a checkpoint before it is loaded, and raises when it must not be.

    Args:
        path: file, folder or URL.

    Returns:
        The report; it may hold warnings.

    Raises:
        CheckpointNotFoundError: nothing stands at `path` (also a `FileNotFoundError`).
        CheckpointError: the checkpoint has errors (also a `ValueError`); the message lists them.
    """
    report = verify_checkpoint(path)
    if report.verdict is Verdict.FAIL:
        raise failure_of(report)
    return report


def find_last_good(folder: str | os.PathLike[str], options: Options | None = None) -> Report | None:
    """The report on the newest checkpoint below `folder` that training can resume from.

    Args:
        folder: where to look, with the folders in it.
        options: how deep to look, tolerances.

    Returns:
        The report, whose `path` is the checkpoint's. None when there is none, also where there is no folder yet, as
        before a run's first save.

    Example:
        >>> find_last_good("does-not-exist") is None
        True
    """
    return newest_good(verify_checkpoint(p, options) for p in find_checkpoints(folder))


def newest_good(reports: Iterable[Report]) -> Report | None:
    """Of the checkpoints that training can resume from, the one that was saved last.

    Where one of them does not say when it was saved, as what was saved without the guard, it is the one with the most
    steps. Of equals it is one without warnings, and then the youngest file.
    """
    latest = furthest = None
    latest_key: tuple[float, ...] = ()
    furthest_key: tuple[float, ...] = ()
    all_timed = True
    for report in reports:
        if report.verdict is Verdict.FAIL or not _can_resume(report):
            continue
        saved_at, age = report.facts.saved_at, _age(report)
        all_timed = all_timed and saved_at is not None
        if (key := (saved_at or 0.0, *age)) > latest_key:
            latest, latest_key = report, key
        if age > furthest_key:
            furthest, furthest_key = report, age
    return latest if all_timed else furthest


def failure_of(report: Report) -> CheckpointError:
    """The exception that says why a checkpoint must not be used."""
    errors = report.of(Severity.ERROR)
    said = "; ".join(f"{f.code} {f.message}" for f in errors) or "nothing in it could be verified"
    hint = next((f.hint for f in errors if f.hint), "")
    kind = CheckpointError if stands_at(report.path) else CheckpointNotFoundError
    of_the_run = bool(errors) and all(f.code.startswith("CK9") for f in errors)
    why = "does not suit this run" if of_the_run else "must not be used"
    return kind(f"checkpoint {report.path} {why}: {said}. {hint}".strip())


@collector_paused()
def report_on(
    read: Callable[[], Facts], path: str, options: Options | None = None, began: float | None = None
) -> Report:
    """Reads facts, judges them and reports; whatever goes wrong on the way fails the verification."""
    began = time.perf_counter() if began is None else began
    try:
        facts = read()
        findings, plan = judge(facts, options), _plan(facts, options)
    except Exception as e:  # fail closed: a checkpoint that breaks the verifier is not verified
        facts, plan = Facts(path), None
        message = f"it could not be verified: {type(e).__name__}: {e}"
        findings = (Finding("CK100", "not-verified", Severity.ERROR, message, path, "Report this with the file."),)
    return Report(path, facts, findings, plan, time.perf_counter() - began, options or Options())


def _plan(facts: Facts, options: Options | None) -> ResumePlan | None:
    """The plan of the run that saved, or of as long a run as the configuration to compare with says."""
    if options is not None and options.run_config is not None:
        to_come = settings_of_config(options.run_config)
        if to_come.max_epochs is not None or to_come.max_steps is not None:
            run = dataclasses.replace(facts.run, max_epochs=to_come.max_epochs, max_steps=to_come.max_steps)
            facts = dataclasses.replace(facts, run=run, saved=facts)
    return plan_resume(facts)


def _can_resume(report: Report) -> bool:
    return report.resume is not None and report.resume.kind != "not-resumable"


def _age(report: Report) -> tuple[int, int, bool, float]:
    p = report.facts.progress
    done = (p.epochs_completed or 0, p.batches_in_epoch or 0)
    steps = p.global_step if p.global_step is not None else done[0] * (p.batches_per_epoch or 1) + done[1]
    return steps, done[0], report.verdict is Verdict.PASS, locate(report.path).modified()
