"""The core: a checkpoint is described by facts, facts are judged by rules, judgements are shown as a report.

Imports no torch, no lightning and no transformers.
"""

from __future__ import annotations

from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.rendering.json import to_json
from enstack_lightning.checkpoint.rendering.text import to_table, to_text
from enstack_lightning.checkpoint.report import Coverage, Report, Verdict, worst
from enstack_lightning.checkpoint.resume import ResumePlan, plan_resume
from enstack_lightning.checkpoint.rules import RULES, Finding, Options, Rule, Severity, judge
from enstack_lightning.checkpoint.search import checkpoints_at, find_checkpoints
from enstack_lightning.checkpoint.verify import (
    failure_of,
    find_last_good,
    newest_good,
    quick_verify_checkpoint,
    report_on,
    verify_checkpoint,
)

__all__ = [
    "RULES",
    "Coverage",
    "Facts",
    "Finding",
    "Format",
    "Options",
    "Report",
    "ResumePlan",
    "Rule",
    "Severity",
    "Verdict",
    "checkpoints_at",
    "failure_of",
    "find_checkpoints",
    "find_last_good",
    "judge",
    "newest_good",
    "plan_resume",
    "quick_verify_checkpoint",
    "report_on",
    "to_json",
    "to_table",
    "to_text",
    "verify_checkpoint",
    "worst",
]
