"""The rules, one module a family: CK1xx files, CK2xx state, CK3xx progress, CK4xx optimizer, CK5xx scheduler,
CK7xx safety."""

from __future__ import annotations

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules import files, optimizer, progress, safety, scheduler, state
from enstack_lightning.checkpoint.rules.rule import RULES, Finding, Options, Rule, Severity

__all__ = ["RULES", "Finding", "Options", "Rule", "Severity", "judge"]

_FAMILIES = (files, state, progress, optimizer, scheduler, safety)
_RESUME_ONLY = {"CK3", "CK4", "CK5"}


def judge(facts: Facts, options: Options | None = None) -> tuple[Finding, ...]:
    """The findings of every rule on these facts, in the order of the rules' codes."""
    options = options or Options()
    rules = [
        rule for code, rule in sorted(RULES.items()) if options.purpose == "resume" or code[:3] not in _RESUME_ONLY
    ]
    return tuple(finding for rule in rules for finding in rule.findings(facts, options))
