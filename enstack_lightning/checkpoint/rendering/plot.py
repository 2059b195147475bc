"""A scheduler's learning rates over its steps as an SVG picture, with the point that training resumes at."""

from __future__ import annotations

import math
from html import escape

from enstack_lightning.checkpoint.facts import SchedulerFacts
from enstack_lightning.checkpoint.rendering.plain import number

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 28, 36


def draw(scheduler: SchedulerFacts, title: str) -> str:
    """The picture; empty where the scheduler's state does not tell its curve."""
    points = [(step, rate) for step, rate in scheduler.curve if math.isfinite(rate)]
    if len(points) < 2:
        return ""
    here = _resume_point(scheduler, points)
    last = max([step for step, _ in points] + ([here[0]] if here else [])) or 1
    highest = max([rate for _, rate in points] + ([here[1]] if here else []))
    if highest <= 0:
        return ""

    def x(step: int) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, step / last))

    def y(rate: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * min(1.0, max(0.0, rate / highest))

    line = " ".join(f"{x(step):.1f},{y(rate):.1f}" for step, rate in points)
    name = escape(title)
    said = f"{name}: learning rate over {last:,} steps" + (f", resumed at step {here[0]:,}" if here else "")
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}"><title>{said}</title>',
        f'<text x="{_LEFT}" y="16">{name}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        rate, step = highest * share, round(last * share)
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        parts += [
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(rate):.1f}" y2="{y(rate):.1f}" stroke="currentColor" '
            f'stroke-opacity="{0.6 if share == 0 else 0.15}"/>',
            f'<text x="{_LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{number(rate) if rate else 0}</text>',
            f'<text x="{x(step):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}">{step:,}</text>',
        ]
    parts.append(f'<polyline points="{line}" fill="none" stroke="#3b82f6" stroke-width="2" stroke-linejoin="round"/>')
    if here:
        parts.append(_marker(x(here[0]), y(here[1]), f"step {here[0]:,}, LR {number(here[1])}"))
    return "".join([*parts, "</svg>"])


def _resume_point(scheduler: SchedulerFacts, points: list[tuple[int, float]]) -> tuple[int, float] | None:
    step = scheduler.last_epoch
    if step is None or not 0 <= step < 2**53:
        return None
    rate = scheduler.last_lr[0] if scheduler.last_lr else next((r for s, r in points if s == step), None)
    return None if rate is None or not math.isfinite(rate) or rate < 0 else (step, rate)


def _marker(x: float, y: float, label: str) -> str:
    right = x > WIDTH * 0.6
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" stroke="#f97316" stroke-dasharray="4 3"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#f97316"/>'
        f'<text x="{x + (-10 if right else 10):.1f}" y="{_TOP + 12}" text-anchor="{"end" if right else "start"}">'
        f"resume: {label}</text>"
    )
