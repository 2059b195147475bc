"""Findings become a report: the verdict, the resume plan, and how much of the checkpoint nobody looked at.

`rendering` shows a report as text, JSON, SARIF or HTML.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from enstack_lightning.checkpoint.facts import Facts, FileFacts, ManifestFacts
from enstack_lightning.checkpoint.resume import ResumePlan
from enstack_lightning.checkpoint.rules import Finding, Options, Severity


class Verdict(StrEnum):
    """What a verification came to."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Coverage:
    """How much of a checkpoint a verification looked at.

    Attributes:
        deep: every byte was read.
        files: how many files the checkpoint has.
        total_bytes: their size together.
        bytes_not_read: bytes of tensor data that were not read.
        bytes_not_checkable: bytes that have no checksum and were not compared with a manifest's digest.
        not_checkable: the files that these lie in, each with its bytes, the largest first.
        manifest: the manifest beside the checkpoint; None when there is none.
    """

    deep: bool
    files: int
    total_bytes: int
    bytes_not_read: int
    bytes_not_checkable: int
    not_checkable: tuple[tuple[str, int], ...]
    manifest: ManifestFacts | None


@dataclass(frozen=True, repr=False)
class Report:
    """The findings on one checkpoint and what resuming from it will do.

    Attributes:
        path: the checkpoint as the user named it.
        resume: None where the checkpoint does not say how far training had come.
        options: what the verification was asked for.
    """

    path: str
    facts: Facts
    findings: tuple[Finding, ...]
    resume: ResumePlan | None
    elapsed_seconds: float
    options: Options = field(default_factory=Options)

    @property
    def verdict(self) -> Verdict:
        severities = {f.severity for f in self.findings}
        if Severity.ERROR in severities or not (Severity.PASS in severities or self._read_without_a_defect):
            return Verdict.FAIL
        return Verdict.WARN if Severity.WARNING in severities else Verdict.PASS

    @property
    def _read_without_a_defect(self) -> bool:
        """Whether the silence of the selected rules means that all is well: most of them speak of faults only."""
        narrowed = bool(self.options.select or self.options.ignore)
        return narrowed and bool(self.facts.files or self.facts.fields) and not self.facts.defects

    @property
    def coverage(self) -> Coverage:
        """How much was looked at, and how much was not."""
        facts = self.facts
        manifest = facts.manifest
        compared = manifest is not None and manifest.digests_compared
        bare = () if compared else [(f.name, f.without_checksum) for f in facts.files if f.without_checksum]
        return Coverage(
            deep=self.options.deep,
            files=len(facts.files),
            total_bytes=sum(f.size for f in facts.files),
            bytes_not_read=0 if self.options.deep else sum(map(_not_read, facts.files)),
            bytes_not_checkable=sum(size for _, size in bare),
            not_checkable=tuple(sorted(bare, key=lambda file: -file[1])),
            manifest=manifest,
        )

    def count(self, severity: Severity) -> int:
        return sum(1 for f in self.findings if f.severity is severity)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity is severity)

    def accepted(self, strict: bool) -> bool:
        """Whether the checkpoint may be used: no error, and with `strict` no warning."""
        return self.verdict is Verdict.PASS or (self.verdict is Verdict.WARN and not strict)

    def __repr__(self) -> str:
        return f"<Report on {self.path!r}: {self.verdict}>"

    def __str__(self) -> str:
        """The report as `enstack verify` prints it."""
        from enstack_lightning.checkpoint.rendering.text import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from enstack_lightning.checkpoint.rendering.html import to_fragment

        return to_fragment(self)


def _not_read(file: FileFacts) -> int:
    """Bytes of a file that a quick verification leaves unread."""
    return file.not_read + (0 if file.read_whole else file.without_checksum)


def worst(reports: Iterable[Report]) -> Verdict:
    """The verdict on several checkpoints together; that of none is `fail`."""
    order = list(Verdict)
    return max((r.verdict for r in reports), key=order.index, default=Verdict.FAIL)
