"""A report as text: sections in calm columns, one finding a line, made for a terminal and for grep.

Without a terminal every character is ASCII; colour is for terminals only.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from enstack_lightning.checkpoint.rendering.plain import (
    SECTIONS,
    Section,
    counts,
    elapsed,
    not_seen,
    printable,
    resume_sentence,
    section_of,
    shown,
    silence_of,
    verdict_sentence,
    whole,
)
from enstack_lightning.checkpoint.report import Report, Verdict
from enstack_lightning.checkpoint.rules import Finding, Severity
from enstack_lightning.checkpoint.wording import size

LINE = 100
"""Columns that the short form of a section's passed rules keeps to."""

_TITLE = max(len(s.title) for s in SECTIONS)
_LABEL = len("checkpoint")
_WIDE = len("checkpoints")
_NARROWEST = 24
_ESCAPE = re.compile(r"\x1b\[[\d;]*m")
_COLOURS = {"pass": "32", "warn": "33", "warning": "33", "fail": "1;31", "error": "1;31", "info": "36", "-": "2"}


@dataclass(frozen=True)
class Style:
    """How text may look: with colour, with characters beyond ASCII, and in lines of how many columns.

    Attributes:
        columns: longer lines go on below, indented; 0 where a line is a line, as in files and pipes.
    """

    colour: bool = False
    unicode: bool = False
    columns: int = 0

    def line(self, text: str) -> str:
        """A line that the place it goes to can show."""
        text = printable(text)
        return text if self.unicode else text.replace("\u2026", "...").encode("ascii", "backslashreplace").decode()

    def paint(self, word: str, width: int = 0, kind: str = "") -> str:
        """A word in the colour of what it says, padded."""
        padding = " " * max(0, width - len(word))
        code = _COLOURS.get(kind or word.lower())
        return f"\x1b[{code}m{word}\x1b[0m{padding}" if self.colour and code else word + padding

    def hang(self, prefix: str, text: str) -> str:
        """A prefix, and after it the text, which stays to the right of it on a terminal that is too narrow."""
        indent = len(_ESCAPE.sub("", prefix))
        width = self.columns - indent
        if not self.columns or len(text) <= width or width < _NARROWEST:
            return prefix + text
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
        return prefix + f"\n{'':{indent}}".join(lines)


PLAIN = Style()


def to_text(report: Report, style: Style = PLAIN, *, verbose: bool = False, strict: bool = False) -> str:
    """The whole report on one checkpoint.

    Args:
        verbose: list every rule that passed, instead of naming them in short.
        strict: whether warnings count as errors; only the verdict's sentence says so.
    """
    lines = [f"{'checkpoint':{_LABEL}}  {style.line(report.path)}", f"{'format':{_LABEL}}  {report.facts.format}", ""]
    for index, section in enumerate(SECTIONS, start=1):
        lines += _section(index, section, report, style, verbose)
    lines.append("")
    lines += [style.hang(f"{label:{_LABEL}}  ", style.line(shown(said))) for label, said in not_seen(report)]
    lines.append(f"{'summary':{_LABEL}}  {counts(report)}, {elapsed(report.elapsed_seconds)}")
    sentence = verdict_sentence(report, strict)
    lines.append(style.hang(f"{'verdict':{_LABEL}}  {style.paint(report.verdict.upper())}  ", sentence))
    resume = resume_sentence(report)
    if resume is not None:
        lines.append(style.hang(f"{'resume':{_LABEL}}  ", style.line(shown(resume))))
    return "\n".join(lines)


def _section(index: int, section: Section, report: Report, style: Style, verbose: bool) -> Iterator[str]:
    findings = [f for f in report.findings if section_of(f) is section]
    listed = [f for f in findings if verbose or _speaks(f)]
    word, said = _state(findings, section, report, verbose)
    yield style.hang(f"{index:2} {section.title:{_TITLE}}  {style.paint(word, 7)}  ", style.line(shown(said))).rstrip()
    for finding in listed:
        name = "" if finding.severity is Severity.PASS else f"{finding.name}: "
        severity = style.paint(finding.severity.upper(), 7)
        yield style.hang(f"   {severity}  {finding.code}  ", name + style.line(shown(finding.message)))
        if finding.hint and (verbose or finding.severity in (Severity.WARNING, Severity.ERROR)):
            yield style.hang(f"   {'':7}  {'':5}  -> ", style.line(shown(finding.hint)))


def _speaks(finding: Finding) -> bool:
    """Whether a finding is listed without being asked for; what CK108 says stands below, under `unchecked`."""
    return finding.severity is not Severity.PASS and finding.code != "CK108"


def _state(findings: Sequence[Finding], section: Section, report: Report, verbose: bool) -> tuple[str, str]:
    """A section's own line: its worst severity, and what there is to say of the rest."""
    if not findings:
        silence = silence_of(section, report)
        word = "-" if silence.startswith(("no ", "not ", "none", "nothing ", "the checkpoint has none")) else "pass"
        return word, silence
    worst = max((f.severity for f in findings), key=[*Severity].index)
    passed = [f for f in findings if f.severity is Severity.PASS]
    word = "pass" if worst is Severity.INFO and passed else str(worst)
    said = f"{len(passed):,} passed" if verbose and passed else _in_short(passed)
    if not passed and word in ("pass", "info"):
        said = silence_of(section, report)
    return word, said


def _in_short(passed: Sequence[Finding]) -> str:
    """As many of the messages as fit into a line, and how many more there are."""
    said: list[str] = []
    length = 0
    for finding in passed:
        if said and length + len(finding.message) > LINE:
            break
        said.append(finding.message)
        length += len(finding.message) + 2
    rest = len(passed) - len(said)
    return "; ".join(said) + (f"; and {rest:,} more" if rest else "")


def to_line(report: Report, style: Style = PLAIN, width: int = 0) -> str:
    """A checkpoint in one line: verdict, path, and what is first to say of it.

    Args:
        width: columns that the path is given. Where the terminal has no room beside it, the rest stands below.
    """
    said = [f for severity in (Severity.ERROR, Severity.WARNING) for f in report.of(severity)]
    if said:
        more = f" (and {len(said) - 1:,} more)" if len(said) > 1 else ""
        code, message = said[0].code, shown(said[0].message) + more
    else:
        code, message = "", (resume_sentence(report) if report.resume else None) or verdict_sentence(report)
    verdict, path, said_of_it = style.paint(report.verdict.upper(), 4), style.line(report.path), style.line(message)
    if style.columns and 15 + max(width, len(path)) + len(said_of_it) > style.columns:
        return f"{verdict}  {path}\n" + style.hang(f"{'':6}{code}  " if code else f"{'':6}", said_of_it)
    return f"{verdict}  {path:{width}}  {code:5}  {said_of_it}".rstrip()


def to_brief(report: Report, style: Style = PLAIN) -> str:
    """Verdict and path, and no more."""
    return f"{style.paint(report.verdict.upper(), 4)}  {style.line(report.path)}"


@dataclass
class Tally:
    """What is kept of many reports while their lines stream by: how many of each verdict, and what was not read."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    bytes_not_read: int = 0
    bytes_not_checkable: int = 0

    def add(self, report: Report) -> None:
        self.verdicts[report.verdict] += 1
        coverage = report.coverage
        self.bytes_not_read += coverage.bytes_not_read
        self.bytes_not_checkable += coverage.bytes_not_checkable

    def closing(self, newest_good: Report | None, purpose: str = "resume", style: Style = PLAIN) -> str:
        """The lines below a table: how many there are, what was not read, and the newest good one."""
        said = ", ".join(f"{self.verdicts[v]:,} {v}" for v in Verdict if self.verdicts[v])
        lines = ["", f"{'checkpoints':{_WIDE}}  {self.verdicts.total():,}: {said}"]
        if self.bytes_not_read:
            lines.append(f"{'not read':{_WIDE}}  {size(self.bytes_not_read)} of tensor data; --deep reads it")
        if self.bytes_not_checkable:
            bare = f"{size(self.bytes_not_checkable)} without a checksum"
            lines.append(f"{'unchecked':{_WIDE}}  {bare}, not compared with a manifest's digests")
        if newest_good is not None:
            step = whole(newest_good.resume.global_step) if newest_good.resume else None
            after = "" if step is None else f" (global step {step:,})"
            lines.append(f"{'newest good':{_WIDE}}  {style.line(newest_good.path)}{after}")
        elif purpose == "resume":
            lines.append(f"{'newest good':{_WIDE}}  none: no checkpoint among them can be resumed from")
        return "\n".join(lines)


def to_table(reports: Iterable[Report], newest_good: Report | None, style: Style = PLAIN) -> str:
    """Several checkpoints: one line each, and the newest good one named."""
    reports = list(reports)
    width = max((len(style.line(r.path)) for r in reports), default=0)
    tally = Tally()
    for report in reports:
        tally.add(report)
    lines = [to_line(report, style, width) for report in reports]
    return "\n".join([*lines, tally.closing(newest_good, style=style)])
