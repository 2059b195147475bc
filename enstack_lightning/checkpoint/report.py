"""Findings become a report, and a report becomes text or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.resume import ResumePlan
from enstack_lightning.checkpoint.rules import Finding, Severity

JSON_VERSION = 1


class Verdict(StrEnum):
    """What a verification came to."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Report:
    """The findings on one checkpoint and what resuming from it will do."""

    path: str
    facts: Facts
    findings: tuple[Finding, ...]
    resume: ResumePlan | None
    elapsed_seconds: float

    @property
    def verdict(self) -> Verdict:
        severities = {f.severity for f in self.findings}
        if Severity.ERROR in severities or Severity.PASS not in severities:
            return Verdict.FAIL
        return Verdict.WARN if Severity.WARNING in severities else Verdict.PASS

    def count(self, severity: Severity) -> int:
        return sum(1 for f in self.findings if f.severity is severity)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity is severity)

    def accepted(self, strict: bool) -> bool:
        """Whether the checkpoint may be used: no error, and with `strict` no warning."""
        return self.verdict is Verdict.PASS or (self.verdict is Verdict.WARN and not strict)


def worst(reports: Sequence[Report]) -> Verdict:
    """The verdict on several checkpoints together."""
    order = list(Verdict)
    return max((r.verdict for r in reports), key=order.index)


def to_json(reports: Sequence[Report], newest_good: str | None = None) -> str:
    """One JSON object; its form is part of the command line's contract."""
    document: dict[str, Any] = {
        "version": JSON_VERSION,
        "verdict": worst(reports),
        "checkpoints": [_as_object(r) for r in reports],
    }
    if len(reports) > 1:
        document["newest_good"] = newest_good
    return json.dumps(document, indent=2, allow_nan=False)


def _as_object(report: Report) -> dict[str, Any]:
    return {
        "path": report.path,
        "format": report.facts.format,
        "verdict": report.verdict,
        "summary": {
            "passed": report.count(Severity.PASS),
            "warnings": report.count(Severity.WARNING),
            "errors": report.count(Severity.ERROR),
        },
        "elapsed_seconds": round(report.elapsed_seconds, 4),
        "findings": [dataclasses.asdict(f) for f in report.findings],
        "resume": None if report.resume is None else dataclasses.asdict(report.resume),
    }


def to_text(report: Report) -> str:
    """The whole report as lines of plain text, one a finding, aligned for the eye and for grep."""
    lines = [f"checkpoint  {report.path}", f"format      {report.facts.format}", ""]
    for finding in report.findings:
        name = "" if finding.severity is Severity.PASS else f"{finding.name}: "
        lines.append(f"{finding.severity.upper():7}  {finding.code}  {name}{finding.message}")
        if finding.hint:
            lines.append(f"{'':7}  {'':5}  -> {finding.hint}")
    lines += ["", f"verdict     {_verdict_line(report)}"]
    if report.resume is not None and report.verdict is not Verdict.FAIL:
        lines.append(f"resume      {report.resume.sentence}")
    return "\n".join(map(_printable, lines))


def _verdict_line(report: Report) -> str:
    counts = (
        f"{report.count(Severity.PASS)} passed, {report.count(Severity.WARNING)} warning(s), "
        f"{report.count(Severity.ERROR)} error(s)"
    )
    return f"{report.verdict.upper()}  {counts}, {report.elapsed_seconds * 1000:,.0f} ms"


def to_table(reports: Sequence[Report], newest_good: Report | None) -> str:
    """A folder of checkpoints: one line each, and the newest good one named."""
    paths = max(len(r.path) for r in reports)
    lines = []
    for report in reports:
        first = next(iter(report.of(Severity.ERROR) or report.of(Severity.WARNING)), None)
        said = first.message if first else report.resume.sentence if report.resume else "intact"
        code = first.code if first else ""
        lines.append(f"{report.verdict.upper():4}  {report.path:{paths}}  {code:5}  {said}")
    verdicts = Counter(r.verdict for r in reports)
    counts = ", ".join(f"{verdicts[v]} {v}" for v in Verdict if verdicts[v])
    lines += ["", f"checkpoints  {len(reports)}: {counts}"]
    if newest_good is None:
        lines.append("newest good  none: no checkpoint of this folder can be resumed from")
    else:
        step = newest_good.resume.global_step if newest_good.resume else None
        lines.append(f"newest good  {newest_good.path}" + ("" if step is None else f" (global step {step:,})"))
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """The line without characters that would move a terminal's cursor or break a log: names come from the file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
