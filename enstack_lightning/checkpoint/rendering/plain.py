"""What the forms of a report share: names made safe to show, sizes, sections, and sentences on what was seen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from enstack_lightning.checkpoint.report import Report, Verdict
from enstack_lightning.checkpoint.resume import ResumePlan
from enstack_lightning.checkpoint.rules import Finding, Severity
from enstack_lightning.checkpoint.wording import many, size

MAX_WORD = 160
MAX_MESSAGE = 1_000
MAX_FILES_NAMED = 5
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


@dataclass(frozen=True)
class Section:
    """A part of the report: the rules of which it holds, by their codes or the beginnings of them."""

    title: str
    codes: tuple[str, ...]


SECTIONS = (
    Section("files", ("CK100", "CK102", "CK104", "CK105", "CK106", "CK108", "CK109", "CK110", "CK111", "CK112")),
    Section("required files", ("CK101", "CK103", "CK107")),
    Section("training state", ("CK2",)),
    Section("metadata", ("CK3",)),
    Section("optimizer", ("CK4",)),
    Section("scheduler", ("CK5",)),
    Section("weights", ("CK203", "CK6")),
    Section("safety", ("CK7",)),
    Section("manifest", ("CK8",)),
    Section("drift", ("CK9",)),
)
"""The five checks of EnStack's own verification tool, in its order, and those that were added to them."""


def section_of(finding: Finding) -> Section:
    """The section that a finding stands in: the one that names most of its code."""
    fits = ((len(code), s) for s in SECTIONS for code in s.codes if finding.code.startswith(code))
    return max(fits, key=lambda fit: fit[0], default=(0, SECTIONS[0]))[1]


def printable(text: str) -> str:
    """The text without characters that would move a cursor, turn the direction of writing or break a log line.

    Names come from files: what does not print is shown as Python would write it.

    Example:
        >>> printable("caf\\u00e9 \\x1b[31m")
        'caf\u00e9 \\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """The text with its middle left out where a name in it, or the whole of it, is longer than anybody reads."""
    text = _LONG_WORD.sub(lambda word: _without_middle(word[0], MAX_WORD), text)
    return _without_middle(text, MAX_MESSAGE)


def shown(text: str) -> str:
    """A message, hint or name from a file, safe and short enough to print."""
    return shortened(printable(text))


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = (limit - 20) // 2
    return f"{text[:kept]}[...{len(text) - 2 * kept:,} more...]{text[-kept:]}"


def elapsed(seconds: float) -> str:
    """The time that a verification took."""
    if seconds < 0.001:
        return "less than 1 ms"
    return f"{seconds * 1000:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def number(value: float) -> str:
    """A learning rate, as briefly as it can be told."""
    return f"{value:.2e}"


def finite(value: float | None) -> float | None:
    """The value, or None where it is none that JSON or a plot could hold."""
    return value if value is not None and math.isfinite(value) else None


def whole(value: int | None) -> int | None:
    """The count, or None where it has more than 64 bits: a checkpoint may claim any, and Python would not print it."""
    return value if value is not None and -(2**63) <= value < 2**63 else None


def sentence_of(plan: ResumePlan) -> str:
    """The plan's sentence, whatever numbers the checkpoint gave it."""
    try:
        return plan.sentence
    except ValueError:  # a number of more than 4,300 digits
        return "the checkpoint's counters are larger than any run's"


def counts(report: Report) -> str:
    """Passed, warnings and errors, with the figures."""
    return (
        f"{report.count(Severity.PASS):,} passed, {many(report.count(Severity.WARNING), 'warning')}, "
        f"{many(report.count(Severity.ERROR), 'error')}"
    )


def verdict_sentence(report: Report, strict: bool = False) -> str:
    """What may be done with the checkpoint."""
    use = "resume training" if report.options.purpose == "resume" else "load its weights for inference"
    errors, warnings = report.count(Severity.ERROR), report.count(Severity.WARNING)
    if report.verdict is Verdict.FAIL:
        why = many(errors, "error") if errors else "nothing in it could be verified"
        return f"Checkpoint must not be used to {use}: {why}."
    if report.verdict is Verdict.WARN:
        if strict:
            return f"Checkpoint is refused under --strict: {many(warnings, 'warning')}."
        first = "warning" if warnings == 1 else f"{warnings:,} warnings"
        return f"Checkpoint can be used to {use}; look at the {first} first."
    if report.options.select or report.options.ignore:
        return "Nothing that was checked is wrong; --select and --ignore left rules out."
    if report.options.purpose == "inference":
        return "Checkpoint is valid and its weights are safe to load for inference."
    if report.resume is not None and report.resume.kind == "finished":
        return "Checkpoint is valid; its training is finished."
    return "Checkpoint is valid and safe to resume training from."


def resume_sentence(report: Report) -> str | None:
    """What resuming will do; None where it is not wanted or must not be done."""
    if report.verdict is Verdict.FAIL or report.options.purpose == "inference":
        return None
    if report.resume is None:
        return "the checkpoint does not say how far training had come"
    return sentence_of(report.resume)


def not_seen(report: Report) -> Iterator[tuple[str, str]]:
    """What was not looked at, each with a label: bytes not read, bytes that nothing can be compared with, rules."""
    coverage, options = report.coverage, report.options
    if coverage.bytes_not_read:
        yield "not read", f"{size(coverage.bytes_not_read)} of tensor data; --deep reads it"
    if coverage.not_checkable:
        named = [
            f"{name}, {size(count)} without a checksum" for name, count in coverage.not_checkable[:MAX_FILES_NAMED]
        ]
        rest = len(coverage.not_checkable) - len(named)
        files = "; ".join([*named, f"and {many(rest, 'more file')}"] if rest else named)
        if coverage.manifest is None or coverage.manifest.defect:
            yield "unchecked", f"not checkable without a manifest: {files}"
        else:
            yield "unchecked", f"not compared with the manifest's digests, which --deep does: {files}"
    if options.select:
        yield "not judged", f"what --select {','.join(options.select)} leaves out"
    if options.ignore:
        yield "not judged", f"what --ignore {','.join(options.ignore)} leaves out"


def silence_of(section: Section, report: Report) -> str:
    """Why a section holds no finding."""
    facts, options, codes = report.facts, report.options, section.codes
    if options.purpose == "inference" and codes[0].startswith(("CK3", "CK4", "CK5", "CK9")):
        return "not judged: the checkpoint is wanted for inference"
    if options.select and not any(a.startswith(b) or b.startswith(a) for a in codes for b in options.select):
        return "not judged: left out by --select"
    if options.ignore and all(code.startswith(options.ignore) for code in codes):
        return "not judged: left out by --ignore"
    match section.title:
        case "manifest":
            return "none stands beside the checkpoint" if facts.manifest is None else "nothing to say"
        case "drift":
            if options.run_config is not None:
                return "not compared: --config sets nothing that the checkpoint tells of"
            return "not compared: --config RUN.yaml names the run to resume"
        case "files" if facts.files and not facts.defects:
            return f"{many(len(facts.files), 'file')}, {size(report.coverage.total_bytes)}: no damage in what was read"
        case "weights" if facts.tensors:
            return f"{many(len(facts.tensors), 'tensor')}, by name, type and shape"
        case "safety" if facts.files and not facts.globals and not facts.defects:
            return "safe to load: no pickle in it names anything to import"
        case "optimizer" if facts.optimizers == ():
            return "the checkpoint has none"
        case "scheduler" if facts.schedulers == ():
            return "the checkpoint has none"
    if facts.model_only and codes[0].startswith(("CK3", "CK4", "CK5")):
        return "none: the checkpoint is a model alone"
    return "not judged: nothing was read of it" if facts.defects else "nothing to say"
