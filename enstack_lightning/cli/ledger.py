"""`enstack ledger`: shows that every row was used exactly once an epoch, across all restarts, or names those that were
not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint.ledger import LedgerReport, Position, StartReport, read_ledger
from enstack_lightning.checkpoint.ledger_epoch import MAX_NAMED, EpochReport
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.checkpoint.wording import many, size
from enstack_lightning.cli.output import output_to
from enstack_lightning.errors import CheckpointNotFoundError

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2


def main(argv: Sequence[str]) -> int:
    """Runs `enstack ledger`: 0 when every complete epoch had each row once, 1 when not, 2 for a wrong call."""
    arguments = _parser().parse_args(argv[1:])
    try:
        report = read_ledger(Path(arguments.run))
    except CheckpointNotFoundError as e:
        print(f"enstack ledger: {printable(str(e))}", file=sys.stderr)
        return EXIT_WRONG_CALL
    with output_to(None) as output:
        text = json.dumps(_as_json(report), indent=2) if arguments.format == "json" else "\n".join(_lines(report))
        output.write(text)
    return 0 if report.verdict == "pass" else EXIT_FAILED


# Text


def _lines(report: LedgerReport) -> Iterator[str]:
    batches = many(sum(start.batches for start in report.starts), "batch", "batches")
    yield f"ledger       {printable(str(report.folder))}  {size(report.bytes)} for {batches}"
    yield ""
    for start in report.starts:
        yield _start_line(start)
        yield from (f"             {printable(note)}" for note in start.notes)
    yield ""
    for told, group in groupby(report.epochs, key=lambda epoch: (_told(epoch), epoch.faults, epoch.starts)):
        epochs = list(group)
        name = f"{epochs[0].epoch}" if len(epochs) == 1 else f"{epochs[0].epoch}-{epochs[-1].epoch}"
        yield f"epoch {name:<6} {told[0]}"
        for epoch in epochs:
            yield from _named(epoch)
    yield ""
    yield f"rolled back  {_rolled_back(report.starts)}"
    yield from (f"problem      {printable(problem)}" for problem in report.problems)
    yield f"verdict      {report.verdict.upper()}  {_sentence(report)}"


def _start_line(start: StartReport) -> str:
    header = start.header
    if start.first is None:
        did = "trained nothing"
    else:
        where = _place(start.first) if header.parent or header.global_step else "the beginning"
        did = f"from {where}: {many(start.batches, 'batch', 'batches')}"
    if start.num_rolled_back:
        did += f", {start.num_rolled_back:,} of them rolled back"
    processes = f" on {header.world_size:,} processes" if header.world_size > 1 else ""
    return f"start {header.start:<6} {printable(header.created)}  {did}{processes}"


def _place(position: Position) -> str:
    return f"epoch {position.epoch}, batch {position.batch:,}, step {position.global_step:,}"


def _told(epoch: EpochReport) -> str:
    of = f" of {epoch.planned_batches:,}" if epoch.planned_batches not in (None, epoch.batches) else ""
    batches = f"{epoch.batches:,}{of} batch{'es' if epoch.batches != 1 or of else ''}"
    came = f"{'start' if len(epoch.starts) == 1 else 'starts'} {', '.join(map(str, epoch.starts[-5:]))}"
    if epoch.faults:
        fact = "; ".join(epoch.faults)
    elif epoch.num_repeated or epoch.state == "complete":
        fact = "each exactly once" if epoch.uses == epoch.rows else "as often as planned"
    else:
        fact = "none twice"
    notes = "".join(f"; {note}" for note in epoch.notes)
    return f"{epoch.state:<11}  {batches}, {many(epoch.rows, 'row')}: {fact}{notes} ({came})"


def _named(epoch: EpochReport) -> Iterator[str]:
    if not epoch.faults:
        return
    if epoch.missing:
        yield f"             missing: {_list([str(row) for row in epoch.missing], epoch.num_missing)}"
    if epoch.repeated:
        times = [f"{row} ({'255 times or more' if n == 255 else f'{n} times'})" for row, n in epoch.repeated]
        yield f"             repeated: {_list(times, epoch.num_repeated)}"


def _list(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names):,} more" if count > len(names) else ""
    return f"rows {', '.join(names)}{more}"


def _rolled_back(starts: Sequence[StartReport]) -> str:
    rolled_back = sum(start.num_rolled_back for start in starts)
    if not rolled_back:
        return "no batch"
    again = sum(start.trained_again for start in starts)
    where = "; ".join(
        f"start {start.header.start}, {_span(*start.rolled_back)}" for start in starts[-20:] if start.rolled_back
    )
    return f"{many(rolled_back, 'batch', 'batches')}, {again:,} of them trained again since: {where}"


def _span(first: Position, last: Position) -> str:
    if first.epoch != last.epoch:
        return f"epoch {first.epoch}, batch {first.batch:,} to epoch {last.epoch}, batch {last.batch:,}"
    batches = f"batch {first.batch:,}" if first.batch == last.batch else f"batches {first.batch:,} to {last.batch:,}"
    return f"epoch {first.epoch}, {batches}"


def _sentence(report: LedgerReport) -> str:
    if report.problems:
        return "The ledger is not complete, and cannot show that every row was used exactly once."
    bad = [epoch.epoch for epoch in report.epochs if epoch.faults]
    if bad:
        return f"Not every row was used as planned in {many(len(bad), 'epoch')}: {', '.join(map(str, bad[:20]))}."
    complete = [epoch for epoch in report.epochs if epoch.state == "complete"]
    if not complete:
        return "No epoch is complete yet; no row was used twice."
    if any(epoch.notes for epoch in complete):
        return f"Every row was used as planned in {many(len(complete), 'complete epoch')}."
    return f"Every row was used exactly once in each of {many(len(complete), 'complete epoch')}."


# JSON


def _as_json(report: LedgerReport) -> dict[str, Any]:
    return {
        "version": 1,
        "verdict": report.verdict,
        "folder": str(report.folder),
        "bytes": report.bytes,
        "problems": list(report.problems),
        "starts": [_start_as_json(start) for start in report.starts],
        "epochs": [_epoch_as_json(epoch) for epoch in report.epochs],
    }


def _start_as_json(start: StartReport) -> dict[str, Any]:
    header = start.header
    span = start.rolled_back
    return {
        "start": header.start,
        "id": header.id,
        "created": header.created,
        "processes": header.world_size,
        "checkpoint": header.checkpoint,
        "parent": header.parent,
        "first": start.first._asdict() if start.first else None,
        "batches": start.batches,
        "rolled_back": start.num_rolled_back,
        "rolled_back_span": [position._asdict() for position in span] if span else None,
        "trained_again": start.trained_again,
        "notes": start.notes,
    }


def _epoch_as_json(epoch: EpochReport) -> dict[str, Any]:
    return {
        "epoch": epoch.epoch,
        "state": epoch.state,
        "batches": epoch.batches,
        "planned_batches": epoch.planned_batches,
        "starts": list(epoch.starts),
        "rows": epoch.rows,
        "uses": epoch.uses,
        "num_missing": epoch.num_missing,
        "missing": list(epoch.missing),
        "num_repeated": epoch.num_repeated,
        "repeated": [row._asdict() for row in epoch.repeated],
        "notes": list(epoch.notes),
        "faults": list(epoch.faults),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack ledger",
        description="Reads the sample ledger of a run: which rows were trained, in which epoch, by which start. Shows "
        "that every row was used exactly once an epoch, whatever restarts there were, or names up to "
        f"{MAX_NAMED} rows an epoch that were not. What was trained after the last checkpoint of a killed process "
        "is rolled back and does not count.",
        epilog="Exit status: 0 every complete epoch had each row once, as far as its sampler means to; 1 rows are "
        "missing or repeated, or the ledger is not complete; 2 wrong call, or no ledger there.",
    )
    parser.add_argument("run", metavar="RUN_DIR", help="folder of the run, which holds `ledger`")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    return parser
