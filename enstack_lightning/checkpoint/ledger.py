"""The sample ledger of a run: its files become a report on which rows the run's weights were trained with.

A start that resumes names the start that saved its checkpoint, and how many of that start's batches the checkpoint
contains. So the starts form a chain from the last one back to the first, and the batches on it are those that the
weights have seen, whatever Lightning's own counters say. All other batches were trained and rolled back: after the
checkpoint, by a process that was killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

from enstack_lightning.checkpoint.ledger_epoch import EpochReport, EpochTally
from enstack_lightning.checkpoint.ledger_file import (
    FOLDER,
    SUFFIX,
    Batch,
    EpochEnd,
    Header,
    LedgerDefectError,
    Loader,
    Tail,
    read_records,
)
from enstack_lightning.checkpoint.wording import many
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError


class Position(NamedTuple):
    """Where a batch stands in the run; `global_step` is that before it."""

    epoch: int
    batch: int
    global_step: int


@dataclass
class StartReport:
    """One start of the run.

    Attributes:
        header: what its first process says of it.
        processes: files that hold it, by rank.
        batches: batches trained, on the process that recorded most.
        kept: those of them that the run's weights contain.
        first: position of its first batch; None if it trained none.
        rolled_back: positions of the first and the last batch that the weights do not contain.
        trained_again: batches that were rolled back, and whose places in an epoch the run has passed again.
        notes: what else is to be said of its files.
        continued: whether its first batch added to gradients from before it.
        recorded: batches in the file of each rank.
        damage: what cannot be read of its files.
    """

    header: Header
    processes: dict[int, Path] = field(default_factory=dict)
    batches: int = 0
    kept: int = 0
    first: Position | None = None
    rolled_back: tuple[Position, Position] | None = None
    trained_again: int = 0
    notes: list[str] = field(default_factory=list)
    continued: bool = False
    recorded: dict[int, int] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    @property
    def num_rolled_back(self) -> int:
        """Batches that were trained and are not in the weights."""
        return self.batches - self.kept


@dataclass(frozen=True)
class LedgerReport:
    """What the ledger of a run shows.

    Attributes:
        folder: of the ledger's files.
        starts: every start, in order.
        epochs: every epoch that the weights were trained in.
        problems: why the ledger cannot vouch for all of it, in sentences.
        bytes: size of the files.
    """

    folder: Path
    starts: Sequence[StartReport]
    epochs: Sequence[EpochReport]
    problems: Sequence[str]
    bytes: int

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """Whether every complete epoch used every row exactly once, as far as its sampler meant to."""
        return "fail" if self.problems or any(epoch.faults for epoch in self.epochs) else "pass"


def read_ledger(folder: Path) -> LedgerReport:
    """Reads the ledger of a run.

    Args:
        folder: the run's folder, or the `ledger` folder in it.

    Returns:
        The report.

    Raises:
        CheckpointNotFoundError: there is no ledger.
        CheckpointError: a file of it cannot be read.
    """
    paths = _files(folder)
    problems: list[str] = []
    starts = _starts(paths, problems)
    epochs: list[EpochReport] = []
    if starts:
        chain = _chain(starts, problems)
        walk = _along(chain)
        epochs = walk.done
        _mark_rolled_back(starts, walk.now)
    return LedgerReport(paths[0].parent, starts, epochs, problems, sum(p.stat().st_size for p in paths))


def _files(folder: Path) -> list[Path]:
    for place in (folder / FOLDER, folder):
        if paths := sorted(p for p in place.glob(f"*{SUFFIX}") if p.is_file()):
            return paths
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} is no folder of a run")
    raise CheckpointNotFoundError(
        f"{folder} holds no sample ledger ({FOLDER}/*{SUFFIX}); `enstack fit` and the callback SampleLedger write one"
    )


def _starts(paths: Iterable[Path], problems: list[str]) -> list[StartReport]:
    """Every start, with what one pass over its files tells; in order."""
    starts: dict[str, StartReport] = {}
    for path in paths:
        try:
            _read_start(path, starts, problems)
        except LedgerDefectError as e:
            if str(e) != "is empty":  # a process that was killed while it made its file has trained nothing
                problems.append(f"{path.name} {e}")
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    ordered = sorted(starts.values(), key=lambda start: (start.header.start, start.header.created))
    for start in ordered:
        start.batches = start.kept = max(start.recorded.values())
    return ordered


def _read_start(path: Path, starts: dict[str, StartReport], problems: list[str]) -> None:
    records = read_records(path)
    header = next(records)
    assert isinstance(header, Header)
    start = starts.setdefault(header.id, StartReport(header))
    if header.rank in start.processes:
        raise LedgerDefectError(f"is of the same start and process as {start.processes[header.rank].name}")
    start.processes[header.rank] = path
    batches = 0
    for record in records:
        if isinstance(record, Batch):
            batches += 1
            if batches == 1:
                start.first = start.first or _position(record)
                start.continued = start.continued or record.continued
        elif isinstance(record, Tail) and record.damage:
            start.damage.append(f"{path.name} is damaged at byte {record.at:,}: {record.damage}")
        elif isinstance(record, Tail):
            start.notes.append(f"{path.name} ends inside the record at byte {record.at:,}, as a kill leaves it")
    start.recorded[header.rank] = batches


def _position(batch: Batch) -> Position:
    return Position(batch.epoch, batch.batch, batch.global_step - batch.stepped)


def _chain(starts: Sequence[StartReport], problems: list[str]) -> list[StartReport]:
    """The starts whose batches are in the weights, from the first to the last; `kept` says how many of each."""
    by_id = {start.header.id: start for start in starts}
    chain = [starts[-1]]
    while (header := chain[-1].header).parent is not None:
        parent = by_id.get(header.parent)
        if parent is None or parent in chain:
            problems.append(
                f"start {header.start} went on from {header.checkpoint or 'a checkpoint'}, saved by a start whose "
                "files are not here: which rows that was trained with is not known"
            )
            break
        parent.kept = header.parent_batches
        chain.append(parent)
    else:
        if header.global_step:
            problems.append(
                f"start {header.start} went on from {header.checkpoint or 'a checkpoint'} at step "
                f"{header.global_step:,}, which was saved without a ledger: which rows it was trained with is not known"
            )
    for start in starts:
        if start not in chain:
            start.kept = 0
    for start in starts:
        problems += _lacks(start, start is starts[-1])
    chain.reverse()
    return chain


def _lacks(start: StartReport, is_last: bool) -> list[str]:
    """What is missing of a start that the weights come from; what a rolled-back part lacks does no harm."""
    name, missing = f"start {start.header.start}", []
    absent = [rank for rank in range(min(start.header.world_size, 10_000)) if rank not in start.processes]
    if absent and start.kept:
        ranks = ", ".join(map(str, absent[:10]))
        missing.append(f"{name}: of its {start.header.world_size:,} processes the files of rank {ranks} are not here")
    for rank, recorded in sorted(start.recorded.items()):
        if not is_last and recorded < start.kept:
            lost = many(start.kept - recorded, "batch", "batches")
            missing.append(f"{name}, rank {rank}: {lost} that its checkpoint contains are not recorded")
    start.kept = min(start.kept, start.batches)
    if is_last or missing:
        return missing + start.damage
    start.notes += start.damage
    return missing


def _mark_rolled_back(starts: Iterable[StartReport], now: Position | None) -> None:
    for start in starts:
        if not start.num_rolled_back:
            continue
        path = max(start.processes.items(), key=lambda item: start.recorded[item[0]])[1]
        rolled_back = [_position(b) for b in islice(_batches(path), start.kept, None)]
        start.rolled_back = (rolled_back[0], rolled_back[-1])
        start.trained_again = sum(1 for place in rolled_back if now is not None and place[:2] <= now[:2])


def _batches(path: Path) -> Iterator[Batch]:
    return (record for record in read_records(path) if isinstance(record, Batch))


# What the weights have seen, epoch by epoch


@dataclass
class _Walk:
    """The epochs on the way along the chain, and the last position on it."""

    done: list[EpochReport] = field(default_factory=list)
    tally: EpochTally | None = None
    ids: set[int] = field(default_factory=set)
    now: Position | None = None

    def at(self, step: Sequence[_OfProcess], start: StartReport) -> EpochTally:
        """The tally of the epoch that a batch is of."""
        epoch = step[0].batch.epoch
        self.now = _position(step[0].batch)
        if self.tally is None or self.tally.epoch != epoch:
            self.close(followed=True)
            self.tally = EpochTally(epoch, again=any(report.epoch == epoch for report in self.done))
        self.tally.plan({part.rank: part.loader for part in step}, start.header.world_size)
        return self.tally

    def close(self, followed: bool) -> None:
        if self.tally is not None:
            self.done.append(self.tally.report(followed, self.ids))
            self.tally = None


def _along(chain: Sequence[StartReport]) -> _Walk:
    """Walks the chain. A batch counts once an optimizer step has used its gradients, which a restart may have lost."""
    walk = _Walk()
    window: list[tuple[list[_OfProcess], StartReport]] = []
    for start in chain:
        if start.first is not None and not start.continued:
            for step, owner in window:
                walk.at(step, owner).lose([part.batch for part in step])
            window.clear()
        for step_or_end in _steps(start):
            if isinstance(step_or_end, EpochEnd):
                if walk.tally is not None and walk.tally.epoch == step_or_end.epoch:
                    walk.tally.ended = True
                continue
            window.append((step_or_end, start))
            if step_or_end[0].batch.stepped:
                _use(walk, window)
    _use(walk, window)
    walk.close(followed=False)
    return walk


def _use(walk: _Walk, window: list[tuple[list[_OfProcess], StartReport]]) -> None:
    for step, owner in window:
        walk.at(step, owner).add([part.batch for part in step], owner.header.start)
    window.clear()


class _OfProcess(NamedTuple):
    """A batch of one process, and the loader it came from."""

    batch: Batch
    loader: Loader
    rank: int


def _steps(start: StartReport) -> Iterator[list[_OfProcess] | EpochEnd]:
    """The kept batches of a start, those of all its processes side by side, and the ends of its epochs."""
    streams = [_of_process(path, rank, start.kept) for rank, path in sorted(start.processes.items())]
    for records in zip_longest(*streams):
        parts = [record for record in records if isinstance(record, _OfProcess)]
        ends = [record for record in records if isinstance(record, EpochEnd)]
        if parts:
            yield parts
        elif ends:
            yield ends[0]


def _of_process(path: Path, rank: int, kept: int) -> Iterator[_OfProcess | EpochEnd]:
    loader, batches = Loader(), 0
    for record in read_records(path):
        if isinstance(record, Loader):
            loader = record
        elif isinstance(record, EpochEnd):
            yield record
        elif isinstance(record, Batch):
            batches += 1
            if batches > kept:
                return
            yield _OfProcess(record, loader, rank)
