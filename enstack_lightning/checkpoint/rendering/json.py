"""Reports as one JSON object; its form is part of the command line's contract and stands in `schema/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint.rendering.plain import finite, sentence_of, whole
from enstack_lightning.checkpoint.report import Coverage, Report, Verdict
from enstack_lightning.checkpoint.resume import ResumePlan
from enstack_lightning.checkpoint.rules import Finding, Severity

JSON_VERSION = 1
SCHEMA = Path(__file__).parent / "schema" / "report.schema.json"
"""The JSON Schema (draft 2020-12) of the object."""

_ORDER = list(Verdict)


def to_json(reports: Iterable[Report], newest_good: str | None = None) -> str:
    """One JSON object on all the checkpoints, ASCII throughout, without NaN and without halves of characters."""
    return document([checkpoint_object(r) for r in reports], newest_good)


def document(checkpoints: Sequence[dict[str, Any]], newest_good: str | None) -> str:
    """The object around what `checkpoint_object` gave of each checkpoint."""
    whole = {
        "version": JSON_VERSION,
        "verdict": max((Verdict(c["verdict"]) for c in checkpoints), key=_ORDER.index, default=Verdict.FAIL),
        "checkpoints": checkpoints,
        "newest_good": None if newest_good is None else _text(newest_good),
    }
    return json.dumps(whole, indent=2, allow_nan=False)


def checkpoint_object(report: Report) -> dict[str, Any]:
    """One checkpoint as it stands in the object."""
    return {
        "path": _text(report.path),
        "format": report.facts.format,
        "verdict": report.verdict,
        "summary": {
            "passed": report.count(Severity.PASS),
            "warnings": report.count(Severity.WARNING),
            "errors": report.count(Severity.ERROR),
        },
        "elapsed_seconds": round(report.elapsed_seconds, 4),
        "findings": [_finding(f) for f in report.findings],
        "resume": None if report.resume is None else _resume(report.resume),
        "coverage": _coverage(report.coverage),
    }


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "message": _text(finding.message),
        "where": _text(finding.where),
        "hint": _text(finding.hint),
    }


def _resume(plan: ResumePlan) -> dict[str, Any]:
    return {
        "kind": plan.kind,
        "epoch": whole(plan.epoch),
        "step": whole(plan.step),
        "global_step": whole(plan.global_step),
        "next_epoch": whole(plan.next_epoch),
        "next_batch": whole(plan.next_batch),
        "batches_per_epoch": whole(plan.batches_per_epoch),
        "optimizer_steps": whole(plan.optimizer_steps),
        "learning_rate": finite(plan.learning_rate),
        "max_epochs": whole(plan.max_epochs),
        "batches_repeated": whole(plan.batches_repeated),
        "sentence": _text(sentence_of(plan)),
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    m = coverage.manifest
    return {
        "deep": coverage.deep,
        "files": coverage.files,
        "total_bytes": coverage.total_bytes,
        "bytes_not_read": coverage.bytes_not_read,
        "bytes_not_checkable": coverage.bytes_not_checkable,
        "not_checkable": [_text(name) for name, _ in coverage.not_checkable],
        "manifest": None
        if m is None
        else {
            "path": _text(m.path),
            "compared": m.compared,
            "files": m.files,
            "agrees": not m.defect and not m.differences,
        },
    }


def _text(text: str) -> str:
    """Text that any JSON parser takes: a byte of a name that is no UTF-8 is written out as `\\udcNN`."""
    return text.encode("utf-8", "backslashreplace").decode()
