"""One epoch of a sample ledger: how often each row was used, and whether that is what the sampler meant to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from enstack_lightning.checkpoint.ledger_file import Batch, Loader
from enstack_lightning.checkpoint.wording import many

State = Literal["complete", "cut short", "in progress"]

MAX_NAMED = 20
"""So many rows that are missing or repeated are named; all of them are counted."""

_MAX_ROWS_IN_ARRAY = 2**26
_MOST = 255


class Repeated(NamedTuple):
    """A row and how often the epoch used it; 255 stands for as many and more."""

    row: int
    times: int


@dataclass(frozen=True)
class EpochReport:
    """What one epoch used.

    Attributes:
        epoch: its number, from 0.
        state: "complete"; "cut short" where a later epoch began before its last batch; "in progress".
        batches: batches trained on each process.
        planned_batches: batches it was to have; None where that is not known.
        rows: different rows used.
        uses: rows used, each as often as it was.
        starts: numbers of the starts that trained it.
        num_missing: rows of the data set that a complete epoch did not use.
        missing: the first of them.
        num_repeated: rows used more than once.
        repeated: the first of them.
        notes: what the sampler left out or repeated on purpose, and what a restart cost, in sentences.
        faults: what is not as it was meant, in sentences.
    """

    epoch: int
    state: State
    batches: int
    planned_batches: int | None
    rows: int
    uses: int
    starts: tuple[int, ...]
    num_missing: int
    missing: tuple[int, ...]
    num_repeated: int
    repeated: tuple[Repeated, ...]
    notes: tuple[str, ...]
    faults: tuple[str, ...]


class EpochTally:
    """Counts how often an epoch uses each row.

    Args:
        epoch: its number.
        again: whether it was already complete once.
    """

    def __init__(self, epoch: int, again: bool = False) -> None:
        self.epoch = epoch
        self.ended = False
        self._again = again
        self._batches = self._drawn = 0
        self._uses = 0
        self._starts: dict[int, None] = {}
        self._counts = bytearray()
        self._others: Counter[int] = Counter()
        self._nameless = 0
        self._without_loss = 0
        self._lost: list[Batch] = []
        self._loaders: dict[int, Loader] = {}
        self._plans: list[_Plan] = []

    def plan(self, loaders: Mapping[int, Loader], world_size: int) -> None:
        """What the following batches come from, by rank."""
        if loaders == self._loaders:
            return
        self._loaders = dict(loaders)
        plan = _plan(list(loaders.values()), world_size)
        self._plans.append(plan)
        if plan.rows is not None and plan.rows <= _MAX_ROWS_IN_ARRAY:
            self._counts.extend(bytes(max(0, plan.rows - len(self._counts))))

    def add(self, batches: Sequence[Batch], start: int) -> None:
        """A batch that the weights were trained with, of every process."""
        self._batches += 1
        self._drawn += 1
        self._starts[start] = None
        for batch in batches:
            if not batch.has_loss:
                self._without_loss += batch.num_rows
                continue
            rows = batch.rows()
            if rows is None:
                self._nameless += 1
                continue
            self._uses += len(rows)
            counts, size = self._counts, len(self._counts)
            for row in rows:
                if row >= size:
                    self._others[row] += 1
                elif counts[row] < _MOST:
                    counts[row] += 1

    def lose(self, batches: Sequence[Batch]) -> None:
        """A batch whose gradients no optimizer step used, since a resume did not bring them back."""
        self._lost += batches
        self._drawn += 1

    def report(self, followed: bool, ids: set[int]) -> EpochReport:
        """The report on the epoch.

        Args:
            followed: whether a later epoch has begun.
            ids: row ids of earlier epochs, where ids are no positions in the data set; those of this one are added.
        """
        plan = _all_in_one(self._plans)
        done = self.ended if plan.batches is None else self._drawn >= plan.batches
        state: State = "complete" if done else "cut short" if followed else "in progress"
        distinct = len(self._counts) - self._counts.count(0) + len(self._others)
        missing = max(0, (plan.rows or 0) - distinct) if state != "in progress" else 0
        repeated = sum(1 for _ in self._repeated())
        notes, faults = self._judged(plan, state, missing, self._uses - distinct)
        report = EpochReport(
            self.epoch,
            state,
            self._batches,
            plan.batches,
            distinct,
            self._uses,
            tuple(self._starts),
            missing,
            self._missing(missing, ids),
            repeated,
            tuple(row for row, _ in zip(self._repeated(), range(MAX_NAMED), strict=False)),
            tuple(notes),
            tuple(faults),
        )
        if self._others:
            ids.update(self._others)
            ids.update(row for row, count in enumerate(self._counts) if count)
        return report

    def _judged(self, plan: _Plan, state: State, missing: int, extra: int) -> tuple[list[str], list[str]]:
        notes, faults = [], []
        if self._again:
            faults.append("it was complete before, and was trained again")
        if self._nameless:
            faults.append(f"the rows of {many(self._nameless, 'batch', 'batches')} were not recorded")
            missing = 0
        if plan.replacement:
            notes.append(f"{plan.sampler} draws with replacement: rows may repeat and be missing")
            return notes, faults
        if extra > plan.repeats:
            faults.append(f"{many(extra, 'use')} of rows that were used already{_besides(plan.repeats)}")
        elif extra:
            notes.append(f"{many(extra, 'row')} twice, so that all processes have as many")
        if self._lost:
            rows = sum(batch.num_rows for batch in self._lost)
            first, last = self._lost[0].batch, self._lost[-1].batch
            where = f"batch {first}" if first == last else f"batches {first} to {last}"
            lost = f"gradients of {many(rows, 'row')} ({where}) were lost in a restart between two optimizer steps"
            (faults if missing > plan.left_out else notes).append(lost)
        if self._without_loss:
            faults.append(f"training_step gave no loss for {many(self._without_loss, 'row')}")
        if missing > plan.left_out:
            why = ": its end was never trained" if state == "cut short" else ""
            faults.append(f"{many(missing, 'row')} not used{_besides(plan.left_out)}{why}")
        elif missing:
            notes.append(f"{many(missing, 'row')} left out by {plan.why}")
        return notes, faults

    def _missing(self, count: int, ids: set[int]) -> tuple[int, ...]:
        if not count or self._nameless:
            return ()
        if self._others:  # ids, and not positions: those can be named that other epochs had
            used = {row for row, times in enumerate(self._counts) if times}
            return tuple(sorted(ids - used - self._others.keys())[:MAX_NAMED])
        found: list[int] = []
        at = self._counts.find(0)
        while at >= 0 and len(found) < MAX_NAMED:
            found.append(at)
            at = self._counts.find(0, at + 1)
        return tuple(found)

    def _repeated(self) -> list[Repeated]:
        within = [Repeated(m.start(), m[0][0]) for m in re.finditer(rb"[\x02-\xff]", self._counts)]
        return within + sorted(Repeated(row, times) for row, times in self._others.items() if times > 1)


class _Plan(NamedTuple):
    """What the sampler means to do with an epoch, over all processes."""

    rows: int | None = None
    batches: int | None = None
    left_out: int = 0
    repeats: int = 0
    replacement: bool = False
    sampler: str = ""
    why: str = ""


def _plan(loaders: Sequence[Loader], world_size: int) -> _Plan:
    one = loaders[0]
    left_out = repeats = 0
    if one.rows is not None and all(loader.planned_rows is not None for loader in loaders):
        planned = sum(loader.planned_rows or 0 for loader in loaders)
        if len(loaders) < world_size:  # files are missing, which is said elsewhere
            planned = max(planned, (one.planned_rows or 0) * world_size)
        left_out, repeats = max(0, one.rows - planned), max(0, planned - one.rows)
    why = "limit_train_batches" if one.limited else "drop_last" if one.drop_last else one.sampler
    return _Plan(one.rows, one.batches, left_out, repeats, one.replacement, one.sampler, why)


def _all_in_one(plans: Sequence[_Plan]) -> _Plan:
    """For an epoch of several starts with loaders set otherwise: the last, which allows what any of them does."""
    if not plans:
        return _Plan()
    return plans[-1]._replace(
        batches=plans[-1].batches if len({plan.batches for plan in plans}) == 1 else None,
        left_out=max(plan.left_out for plan in plans),
        repeats=max(plan.repeats for plan in plans),
    )


def _besides(count: int) -> str:
    return f", of which {count:,} are by design" if count else ""
