"""Reports as a SARIF 2.1.0 log, which code hosts and editors show beside the files.

What the clauses ask for is in the OASIS standard "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

from enstack_lightning.checkpoint.location import is_url
from enstack_lightning.checkpoint.rendering.plain import not_seen, shown
from enstack_lightning.checkpoint.report import Report
from enstack_lightning.checkpoint.rules import RULES, Finding, Rule, Severity

SCHEMA_URI = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"
"""The base that relative locations are relative to: the folder that `enstack verify` was called in."""

_LEVELS = {Severity.PASS: "none", Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "error"}


@dataclass(frozen=True)
class CheckpointResults:
    """What the log says of one checkpoint: its results, and notes on what was not looked at."""

    results: tuple[dict[str, Any], ...]
    notes: tuple[dict[str, Any], ...]


def to_sarif(reports: Iterable[Report], version: str = "") -> str:
    """The log on all the checkpoints; `version` is that of the tool."""
    return log([results_of(report) for report in reports], version)


def log(checkpoints: Sequence[CheckpointResults], version: str = "") -> str:
    """The log around what `results_of` gave of each checkpoint."""
    driver = {"name": "enstack verify", "rules": [_rule(RULES[code]) for code in sorted(RULES)]}
    driver |= {"version": version, "semanticVersion": version} if version else {}
    run = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {ROOT: {"description": {"text": "The folder that enstack verify was called in."}}},
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [note for checkpoint in checkpoints for note in checkpoint.notes],
            }
        ],
        "columnKind": "utf16CodeUnits",
        "results": [result for checkpoint in checkpoints for result in checkpoint.results],
    }
    return json.dumps({"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False)


def results_of(report: Report) -> CheckpointResults:
    """Warnings, errors and notes on one checkpoint; what passed is left out."""
    seen: Counter[tuple[str, str]] = Counter()
    results = []
    for finding in report.findings:
        if finding.severity is not Severity.PASS:
            seen[finding.code, finding.where] += 1
            results.append(_result(report, finding, seen[finding.code, finding.where]))
    where = [{"physicalLocation": {"artifactLocation": artifact(report.path)}}]
    notes = [
        {"level": "note", "message": {"text": _message(f"{label}: {said}")}, "locations": where}
        for label, said in not_seen(report)
    ]
    return CheckpointResults(tuple(results), tuple(notes))


def artifact(path: str) -> dict[str, str]:
    """The location of a file: relative to the working folder where it lies below it, else absolute."""
    if is_url(path):
        return {"uri": quote(path.encode("utf-8", "surrogateescape"), safe=":/%")}
    file = Path(path.removeprefix("file://").removeprefix("local://"))
    try:
        below = (Path.cwd() / file).relative_to(Path.cwd())
    except ValueError:
        return {"uri": file.as_uri()}
    if ".." in below.parts:
        return {"uri": Path(os.path.realpath(file)).as_uri()}
    return {"uri": quote_from_bytes(bytes(below)), "uriBaseId": ROOT}


def _result(report: Report, finding: Finding, ordinal: int) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": artifact(_file_of(report, finding))}}
    if finding.where and finding.where not in (report.path, Path(report.path).name):
        location["logicalLocations"] = [{"fullyQualifiedName": shown(finding.where)}]
    text = f"{finding.message.rstrip('.')}. {finding.hint}".strip()
    identity = "\0".join((finding.code, location["physicalLocation"]["artifactLocation"]["uri"], finding.where))
    result = {
        "ruleId": finding.code,
        "level": _LEVELS[finding.severity],
        "message": {"text": _message(text)},
        "locations": [location],
        "partialFingerprints": {"enstackFinding/v1": _digest(f"{identity}\0{ordinal}")},
    }
    return result | ({"ruleIndex": sorted(RULES).index(finding.code)} if finding.code in RULES else {})


def _file_of(report: Report, finding: Finding) -> str:
    """The file that a finding speaks of, where it names one of the files in a checkpoint's folder."""
    name = finding.where.partition(":")[0]
    folder = report.path.rstrip("/")
    inside = name in {f.name for f in report.facts.files} and name != folder.rpartition("/")[2]
    return f"{folder}/{name}" if inside else report.path


def _rule(rule: Rule) -> dict[str, Any]:
    told = [rule.explanation]
    told += [f"Compares: {rule.compares}."] if rule.compares else []
    told += [f"Source: {rule.source}."] if rule.source else []
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": " ".join(rule.explanation.split())},
        "help": {"text": "\n\n".join(told)},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"tags": ["checkpoint"]},
    }


def _message(text: str) -> str:
    """A message as clause 3.11 wants it: braces doubled and brackets escaped, for they mean placeholders and links."""
    text = shown(text).replace("{", "{{").replace("}", "}}")
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
