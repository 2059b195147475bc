"""Which checkpoint is loaded: the one asked for, the newest good one beside it, or none.

Paths or URLs come in with a function that verifies one; what goes out is the checkpoint to load, with all that was
refused on the way. Only `set_aside` changes anything on disk, and it renames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enstack_lightning.checkpoint import Report, Severity, Verdict, failure_of, newest_good
from enstack_lightning.checkpoint.location import LocalLocation, Location, RemoteLocation, locate
from enstack_lightning.checkpoint.manifest import MANIFEST_SUFFIX
from enstack_lightning.checkpoint.search import CORRUPT_SUFFIX, SET_ASIDE_SUFFIXES, natural_order
from enstack_lightning.checkpoint.source import object_store
from enstack_lightning.errors import (
    CheckpointError,
    CheckpointGuardError,
    CheckpointNotFoundError,
    CheckpointToLoadNotFoundError,
)

Fallback = Literal["none", "previous"]
Verify = Callable[[str], Report]

_NOT_DAMAGE = ("CK100", "CK106", "CK205", "CK7")
"""Errors of a checkpoint that may be whole: unreadable just now, made for something else, or not vouched for."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load.

    Attributes:
        path: its path or URL.
        report: the report on it.
        asked: the path that was asked for.
        refused: the reports on the checkpoints that must not be used, that on the one asked for first.
    """

    path: str
    report: Report
    asked: str
    refused: tuple[Report, ...] = ()


def choose(path: str, verify: Verify, fallback: Fallback = "none", strict: bool = False) -> Choice:
    """The checkpoint at `path` if it may be used, else with `fallback="previous"` the newest good one of its folder.

    Raises:
        CheckpointGuardError: neither may be used; the message says why, for each that was tried.
    """
    asked = verify(path)
    if asked.accepted(strict):
        return Choice(path, asked, path)
    if fallback == "none":
        raise refusal(asked, strict)
    others = [verify(other) for other in checkpoints_beside(path)]
    refused = (asked, *(report for report in others if not report.accepted(strict)))
    good = newest_good(report for report in others if report.accepted(strict))
    if good is None:
        folder = locate(path).parent
        raise CheckpointGuardError(
            f"no checkpoint in {folder} can be resumed from:{_lines(_refusals(refused, strict))}"
        )
    return Choice(good.path, good, path, refused)


def choose_newest(folders: Iterable[str | os.PathLike[str]], verify: Verify, strict: bool = False) -> Report | None:
    """The report on the newest good checkpoint that stands directly in one of `folders`; None where there is none yet.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be resumed from.
    """
    places = [locate(folder) for folder in dict.fromkeys(os.fspath(folder) for folder in folders)]
    reports = [verify(path) for place in places for path in _checkpoints_in(place)]
    good = newest_good(report for report in reports if report.accepted(strict))
    aside = [str(place.child(name)) for place in places for name in _names(place) if _is_set_aside(name)]
    if good is None and (reports or aside):
        tried = [*_refusals(reports, strict), *(f"{path} was set aside" for path in aside)]
        raise CheckpointError(
            f"no checkpoint in {', '.join(map(str, places))} can be resumed from. Name another, or move these away to "
            f"start anew:{_lines(tried)}"
        )
    return good


def checkpoints_beside(path: str) -> list[str]:
    """The other checkpoints in the folder that `path` stands in: what is named `.ckpt`, and is not being written."""
    asked = str(locate(path)).rstrip("/")  # a URL keeps the slash after a folder's name
    return [other for other in _checkpoints_in(locate(path).parent) if other != asked]


def set_aside(reports: Iterable[Report]) -> dict[str, str]:
    """Renames what is damaged to `*.corrupt`, with its manifest; nothing is deleted.

    A link to a checkpoint that is renamed too leads to its new name. What cannot be renamed stays where it is, and so
    does a checkpoint that may be whole: one of weights only, one with classes nobody vouches for.

    Returns:
        The new path of each that was renamed, by the old one.
    """
    moved: dict[str, str] = {}
    damaged = [locate(r.path) for r in reports if _is_damaged(r)]
    for place in sorted(damaged, key=_is_link):
        try:
            if place.exists():
                moved[str(place)] = _renamed(place, moved)
        except OSError:
            continue  # a folder that cannot be written to must not keep the run from the good checkpoint
    return moved


def refusal(report: Report, strict: bool) -> CheckpointGuardError:
    """The error that says why a checkpoint must not be used; also a FileNotFoundError, as Lightning's is, if it is not
    there.
    """
    said = why_refused(report, strict)
    if isinstance(failure_of(report), CheckpointNotFoundError):
        return CheckpointToLoadNotFoundError(f"Checkpoint file not found: {report.path}. {said[:1].upper()}{said[1:]}")
    return CheckpointGuardError(said)


def why_refused(report: Report, strict: bool) -> str:
    """The sentence that says why a checkpoint must not be used."""
    if report.verdict is Verdict.FAIL:
        return str(failure_of(report))
    warnings = "; ".join(f"{f.code} {f.message}" for f in report.of(Severity.WARNING))
    return f"checkpoint {report.path} has warnings, and strict is set: {warnings}"


def what_it_costs(choice: Choice, moved: dict[str, str], strict: bool) -> str:
    """Which checkpoint is loaded instead of which, why, how many steps that costs, and what was renamed."""
    lost, kept = _steps(choice.refused[0]), _steps(choice.report)
    cost = f"It stands at step {kept:,}" if kept is not None else "It does not say at which step it stands"
    if lost is None or kept is None:
        cost += "; how many steps that costs cannot be told, because the other's counters cannot be read"
    elif lost >= kept:
        cost += f", which costs {lost - kept:,} of {lost:,} steps"
    else:
        cost += f", {kept - lost:,} steps after the other"
    renamed = "; ".join(f"{old} is now {new}" for old, new in moved.items()) or "nothing was renamed"
    return (
        f"CheckpointGuard: loading {choice.path} instead of {choice.asked}. {cost}. "
        f"Refused: {'; '.join(_refusals(choice.refused, strict)).rstrip('.')}. Set aside: {renamed}."
    )


def _checkpoints_in(folder: Location) -> list[str]:
    names = [n for n in _names(folder) if n.endswith(".ckpt") and not n.startswith(".")]
    return [str(folder.child(name)) for name in sorted(names, key=natural_order)]


def _names(folder: Location) -> tuple[str, ...]:
    try:
        return folder.names()
    except FileNotFoundError:
        return ()
    except OSError as e:
        raise CheckpointError(f"folder {folder} cannot be listed: {e.strerror or e}") from e


def _is_set_aside(name: str) -> bool:
    return name.endswith(SET_ASIDE_SUFFIXES)


def _refusals(reports: Sequence[Report], strict: bool) -> list[str]:
    return [f"({i}) {why_refused(report, strict)}" for i, report in enumerate(reports, start=1)]


def _lines(entries: Iterable[str]) -> str:
    """Each entry on a line of its own, whatever is in it, indented."""
    return "".join(f"\n  {entry.replace(chr(10), ' ')}" for entry in entries)


def _is_damaged(report: Report) -> bool:
    errors = report.of(Severity.ERROR)
    return bool(errors) and not any(f.code.startswith(_NOT_DAMAGE) for f in errors)


def _is_link(place: Location) -> bool:
    return isinstance(place, LocalLocation) and place.path.is_symlink()


def _renamed(place: Location, moved: dict[str, str]) -> str:
    target = _free_name(place)
    if isinstance(place, LocalLocation):
        new = place.parent.child(target).path
        leads_to = str(place.path.parent / place.path.readlink()) if place.path.is_symlink() else ""
        if leads_to in moved:
            new.symlink_to(os.path.relpath(moved[leads_to], new.parent))
            place.path.unlink()
        else:
            place.path.rename(new)
        manifest = place.path.with_name(place.name + MANIFEST_SUFFIX)
        if manifest.is_file():
            manifest.rename(new.with_name(target + MANIFEST_SUFFIX))
    elif isinstance(place, RemoteLocation):
        files, folder = place.filesystem, place.parent
        manifest_of = {name: folder.child(name + MANIFEST_SUFFIX).path for name in (place.name, target)}
        with object_store():
            files.mv(place.path, folder.child(target).path, recursive=place.is_folder())
            if files.isfile(manifest_of[place.name]):
                files.mv(manifest_of[place.name], manifest_of[target])
    return str(place.parent.child(target))


def _free_name(place: Location) -> str:
    """`NAME.corrupt`, or `NAME.2.corrupt` and so on where that is taken."""
    name, number = f"{place.name}{CORRUPT_SUFFIX}", 1
    while place.parent.child(name).exists():
        number += 1
        name = f"{place.name}.{number}{CORRUPT_SUFFIX}"
    return name


def _steps(report: Report) -> int | None:
    """Steps that a checkpoint stands for: by its counters, else by its manifest, else by its name."""
    facts = report.facts
    if facts.progress.global_step is not None:
        return facts.progress.global_step
    if facts.manifest is not None and facts.manifest.global_step is not None:
        return facts.manifest.global_step
    named = re.search(r"(?:^|\W)step=(\d{1,15})(?!\d)", Path(report.path).name)
    return int(named[1]) if named else None
