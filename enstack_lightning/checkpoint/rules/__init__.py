"""The rules, one module a family: CK1xx files, CK2xx state, CK3xx progress, CK4xx optimizer, CK5xx scheduler,
CK6xx weights, CK7xx safety, CK8xx manifest, CK9xx drift."""

from __future__ import annotations

import dataclasses

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules import (
    drift,
    drift_of_run,
    drift_of_states,
    files,
    manifest,
    optimizer,
    optimizer_steps,
    progress,
    safety,
    scheduler,
    state,
    weights,
)
from enstack_lightning.checkpoint.rules.rule import RULES, Finding, Options, Rule, Severity

__all__ = ["RULES", "Finding", "Options", "Rule", "Severity", "judge"]

_FAMILIES = (
    *(files, state, progress, optimizer_steps, optimizer, scheduler, weights, safety, manifest),
    *(drift, drift_of_run, drift_of_states),
)
MAX_FINDINGS = 500
"""Of one rule on one checkpoint: what is listed one by one must not grow without end with a hostile file."""

MAX_LENGTH = 4_000
"""Of a finding's message: ten names of a real model take less than half of it."""

_RESUME_ONLY = ("CK3", "CK4", "CK5", "CK9")


def judge(facts: Facts, options: Options | None = None) -> tuple[Finding, ...]:
    """The findings of every rule that the options leave, in the order of the rules' codes."""
    options = options or Options()
    rules = [rule for code, rule in sorted(RULES.items()) if _applies(code, options)]
    return tuple(_shortened(finding) for rule in rules for finding in _limited(rule.findings(facts, options)))


def _shortened(finding: Finding) -> Finding:
    """The finding with a message that can be read, whatever names a hostile file has put into it."""
    if max(len(finding.message), len(finding.where), len(finding.hint)) <= MAX_LENGTH:
        return finding
    message, where, hint = map(_middle_left_out, (finding.message, finding.where, finding.hint))
    return dataclasses.replace(finding, message=message, where=where, hint=hint)


def _middle_left_out(text: str) -> str:
    half = MAX_LENGTH // 2
    return text if len(text) <= MAX_LENGTH else f"{text[:half]} ... {text[-half:]}"


def _limited(findings: list[Finding]) -> list[Finding]:
    """At most `MAX_FINDINGS` of a rule, and one as severe as the worst of the others that says how many they are."""
    if len(findings) <= MAX_FINDINGS:
        return findings
    rest = findings[MAX_FINDINGS:]
    worst = max(rest, key=lambda finding: [*Severity].index(finding.severity))
    message = f"{len(rest):,} further findings of this rule are not listed"
    return [*findings[:MAX_FINDINGS], dataclasses.replace(worst, message=message, where="", hint="")]


def _applies(code: str, options: Options) -> bool:
    if code == "CK100":
        return True
    if options.purpose == "inference" and code.startswith(_RESUME_ONLY):
        return False
    return code.startswith(options.select or "CK") and not code.startswith(options.ignore)
