"""Which learning rates a scheduler's own saved state gives, without torch: its class told from its entries, the rates
to come, and the curve of its whole schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enstack_lightning.checkpoint.facts import ParamGroupFacts


@dataclass(frozen=True)
class ScheduleFacts:
    """What the state of a scheduler says of its schedule; the fields of `SchedulerFacts` of the same names.

    Attributes:
        kind: torch's class; None where the entries fit no class or several.
        next_lrs: the learning rates of the first param group at the coming steps, the next one first.
        curve: points (scheduler step, learning rate of the first param group) from 0 to the schedule's end.
    """

    kind: str | None = None
    next_lrs: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()


def describe(state: Mapping[str, Any], groups: Sequence[ParamGroupFacts]) -> ScheduleFacts:
    """The schedule that a scheduler's `state_dict()` holds.

    Args:
        state: the state, symbolic or loaded.
        groups: the param groups of its optimizer; empty where they are not known.
    """
    return ScheduleFacts()
