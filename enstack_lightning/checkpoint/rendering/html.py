"""Reports as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

`plot` draws the schedules; all text that comes from a checkpoint is made printable and escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from enstack_lightning.checkpoint.rendering.plain import (
    SECTIONS,
    counts,
    elapsed,
    not_seen,
    number,
    printable,
    resume_sentence,
    section_of,
    shown,
    silence_of,
    verdict_sentence,
    whole,
)
from enstack_lightning.checkpoint.rendering.plot import draw
from enstack_lightning.checkpoint.report import Report, Verdict
from enstack_lightning.checkpoint.resume import ResumePlan
from enstack_lightning.checkpoint.rules import Finding, Severity
from enstack_lightning.checkpoint.wording import many, size

# Colours of its own only on the badges, so that a notebook's light and dark themes both suit the rest.
_STYLE = """
.enstack { font: 14px/1.5 system-ui, sans-serif; color: inherit; max-width: 72rem; text-align: left; }
.enstack h2 { font-size: 1.1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.enstack h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
.enstack code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
.enstack p { margin: .3rem 0; }
.enstack .scroll { overflow-x: auto; }
.enstack table { border-collapse: collapse; width: 100%; margin: 0; font-size: inherit; color: inherit; }
.enstack th, .enstack td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid rgb(128 128 128 / .3); background: none; }
.enstack th { font-weight: 600; }
.enstack tbody th { white-space: nowrap; width: 1%; }
.enstack td.name { white-space: nowrap; }
.enstack td.message { overflow-wrap: anywhere; min-width: 16rem; }
.enstack .hint, .enstack .faint { opacity: .75; }
.enstack .badge { display: inline-block; padding: 0 .5em; border-radius: .3em; color: #fff; font-size: .82em;
  font-weight: 600; line-height: 1.6; background: #59636e; white-space: nowrap; }
.enstack .pass { background: #1a7f37; }
.enstack .warn, .enstack .warning { background: #9a6700; }
.enstack .fail, .enstack .error { background: #cf222e; }
.enstack .info { background: #0969da; }
.enstack summary { cursor: pointer; }
@media (max-width: 40rem) {
  .enstack table.wide, .enstack .wide tbody, .enstack .wide td.message, .enstack .wide td.path { display: block; }
  .enstack .wide thead { display: none; }
  .enstack .wide tr { display: flex; flex-wrap: wrap; align-items: baseline; padding: .4rem 0;
    border-bottom: 1px solid rgb(128 128 128 / .3); }
  .enstack .wide th, .enstack .wide td { border: 0; padding: .1rem .6rem .1rem 0; width: auto; }
  .enstack .wide td.message { flex-basis: 100%; min-width: 0; }
  .enstack .wide td.path { flex: 1; min-width: 0; }
}
.enstack svg { width: 100%; max-width: 46rem; height: auto; display: block; }
.enstack svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
""".strip()

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 72rem; color: #1f2328; background: #fff; }
body > header { font: 14px/1.5 system-ui, sans-serif; margin-bottom: 2rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
article { margin: 2.5rem 0; }
a { color: inherit; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
@media print { body { margin: 0; } article { break-inside: avoid-page; } }
""".strip()


@dataclass(frozen=True)
class CheckpointPart:
    """What a page says of one checkpoint: its line in the list, and its part of the page."""

    path: str
    verdict: Verdict
    line: str
    body: str


def to_html(reports: Iterable[Report], newest_good: str | None = None, version: str = "") -> str:
    """A whole page on all the checkpoints; `version` is that of the tool."""
    return page([part_of(report) for report in reports], newest_good, version)


def to_fragment(report: Report) -> str:
    """The report as a piece of a page, for notebooks."""
    return f'<div class="enstack"><style>{_STYLE}</style>{_body(report)}</div>'


def part_of(report: Report) -> CheckpointPart:
    """What a page is made of, without the facts behind it."""
    first = next(iter(report.of(Severity.ERROR) or report.of(Severity.WARNING)), None)
    said = f"{first.code} {first.message}" if first else resume_sentence(report) or verdict_sentence(report)
    return CheckpointPart(report.path, report.verdict, _text(said), _body(report))


def page(parts: Sequence[CheckpointPart], newest_good: str | None, version: str = "") -> str:
    """The page around what `part_of` gave of each checkpoint."""
    order = list(Verdict)
    verdict = max((p.verdict for p in parts), key=order.index, default=Verdict.FAIL)
    articles = "\n".join(f'<article id="checkpoint-{i}">{p.body}</article>' for i, p in enumerate(parts, 1))
    count = many(len(parts), "checkpoint")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{verdict.upper()}: {count}</title>
<style>
{_PAGE_STYLE}
{_STYLE}
</style>
</head>
<body>
<header>
<h1>Checkpoint verification</h1>
<p class="enstack">{_badge(verdict)} {count} <span class="faint">enstack {_text(version)}</span></p>
</header>
<main class="enstack">
{_list(parts, newest_good) if len(parts) > 1 else ""}
{articles}
</main>
</body>
</html>"""


def _list(parts: Sequence[CheckpointPart], newest_good: str | None) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{_badge(p.verdict)}</th><td class="path"><a href="#checkpoint-{i}"><code>{_path(p.path)}'
        f'</code></a></td><td class="message">{p.line}</td></tr>'
        for i, p in enumerate(parts, 1)
    )
    best = "none of them can be resumed from" if newest_good is None else f"<code>{_path(newest_good)}</code>"
    table = f'<div class="scroll"><table class="wide"><tbody>{rows}</tbody></table></div>'
    return f"{table}<p><b>Newest good one</b> {best}</p>"


def _body(report: Report) -> str:
    resume = resume_sentence(report)
    parts = [
        f"<h2>{_badge(report.verdict)} <code>{_path(report.path)}</code></h2>",
        f"<p>{_text(verdict_sentence(report))}</p>",
        f"<p><b>Resume</b> {_text(resume)}</p>" if resume else "",
        f'<p class="faint">{report.facts.format}, {size(report.coverage.total_bytes)}; {counts(report)}, '
        f"{elapsed(report.elapsed_seconds)}</p>",
        _findings(report),
        _plan(report.resume) if report.resume and resume else "",
        _schedules(report),
        _coverage(report),
        _passed(report),
    ]
    return "\n".join(part for part in parts if part)


def _findings(report: Report) -> str:
    findings = [f for f in report.findings if f.severity is not Severity.PASS]
    findings.sort(key=lambda f: -[*Severity].index(f.severity))
    if not findings:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{_badge(f.severity)}</th><td>{_text(f.code)}</td><td class="name">{_text(f.name)}</td>'
        f'<td class="message">{_message(f)}</td></tr>'
        for f in findings
    )
    return (
        '<h3>Findings</h3><div class="scroll"><table class="wide"><thead><tr><th scope="col">severity</th>'
        '<th scope="col">code</th>'
        f'<th scope="col">rule</th><th scope="col">what was found</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _message(finding: Finding) -> str:
    hint = f'<br><span class="hint">{_text(finding.hint)}</span>' if finding.hint else ""
    return _text(finding.message) + hint


def _plan(plan: ResumePlan) -> str:
    rate = None if plan.learning_rate is None else number(plan.learning_rate)
    rows = {
        "kind": plan.kind,
        "global step": whole(plan.global_step),
        "continues with epoch": whole(plan.next_epoch),
        "continues with batch": whole(plan.next_batch),
        "batches per epoch": whole(plan.batches_per_epoch),
        "batches trained twice, at most": whole(plan.batches_repeated),
        "epochs of the whole run": whole(plan.max_epochs),
        "optimizer steps": whole(plan.optimizer_steps),
        "next learning rate": rate,
    }
    return "<h3>Resume plan</h3>" + _table(
        {name: f"{value:,}" if isinstance(value, int) else value for name, value in rows.items() if value is not None}
    )


def _schedules(report: Report) -> str:
    schedulers = report.facts.schedulers or ()
    if not schedulers:
        return ""
    drawn = []
    for index, scheduler in enumerate(schedulers):
        name = f"scheduler {index}" + (f", {scheduler.kind}" if scheduler.kind else "")
        drawn.append(draw(scheduler, name) or f"<p>{_text(name)}: its state does not tell the rates to come.</p>")
        if scheduler.next_lrs:
            coming = ", ".join(number(rate) for rate in scheduler.next_lrs[:10])
            drawn.append(f"<p>next learning rates: {coming}</p>")
    return "<h3>Learning rate</h3>" + "\n".join(drawn)


def _coverage(report: Report) -> str:
    coverage, manifest = report.coverage, report.coverage.manifest
    rows = {"files": f"{many(coverage.files, 'file')}, {size(coverage.total_bytes)}"}
    rows |= {"read": "every byte (--deep)" if coverage.deep else "headers, pickles and counters"}
    for label, said in not_seen(report):
        rows[label] = f"{rows[label]}; {said}" if label in rows else said
    if manifest is None:
        rows["manifest"] = "none stands beside the checkpoint"
    else:
        agrees = "differs from it" if manifest.differences else "agrees with it"
        rows["manifest"] = manifest.defect or f"{many(manifest.files, 'file')}, {manifest.compared} compared: {agrees}"
    return "<h3>What was looked at</h3>" + _table(rows)


def _passed(report: Report) -> str:
    passed = report.of(Severity.PASS)
    groups = {s.title: [f for f in passed if section_of(f) is s] for s in SECTIONS}
    rows = {
        title: "<br>".join(f"{_text(f.code)} {_text(f.message)}" for f in found)
        for title, found in groups.items()
        if found
    }
    silent = {
        s.title: _text(silence_of(s, report)) for s in SECTIONS if not any(section_of(f) is s for f in report.findings)
    }
    table = _table(rows | silent, escaped=True)
    return f"<details><summary>{many(len(passed), 'check')} passed</summary>{table}</details>"


def _table(rows: dict[str, str], escaped: bool = False) -> str:
    cells = "\n".join(
        f'<tr><th scope="row">{_text(name)}</th><td class="message">{value if escaped else _text(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _badge(word: str) -> str:
    return f'<span class="badge {word}">{word.upper()}</span>'


def _text(text: str) -> str:
    return escape(shown(text))


def _path(path: str) -> str:
    return escape(printable(path))
