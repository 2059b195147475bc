"""Which checkpoints of a run verified, and whether one may go: the last that verified stays, whoever asks.

What is asked to go too early is kept, and goes once another checkpoint that verified stands.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from enstack_lightning.checkpoint import Options, Report, Verdict, find_checkpoints, verify_checkpoint
from enstack_lightning.checkpoint.location import is_url, stands_at
from enstack_lightning.checkpoint.search import NONFINITE_SUFFIX, SET_ASIDE_SUFFIXES
from enstack_lightning.guard.saving.atomic import same_file

RESUMABLE, USABLE, BAD = 2, 1, 0
"""A checkpoint that training can resume from, one for inference only, one that does not verify."""


class Level(NamedTuple):
    """How good a checkpoint is, and how far the training was."""

    quality: int
    steps: int = -1


class Retention:
    """Remembers what verified; safe to ask from several threads.

    Args:
        options: how checkpoints are judged, quickly.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._levels: dict[str, tuple[object, Level]] = {}
        self._kept: dict[str, None] = {}
        self._announced: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        self._going: set[str] = set()
        self._saved: dict[str, int] = {}
        self._count = 0
        self._lock = threading.RLock()
        self.judge_by(options)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning's callbacks hold their Trainer, and users copy callbacks: all that a Trainer holds can be copied.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def judge_by(self, options: Options) -> None:
        """Judges by these options from now on; what was judged by others is judged anew."""
        with self._lock:
            quick = dataclasses.replace(options, deep=False, purpose="resume")
            if quick != self._options:
                self._options = quick
                self._levels = dict.fromkeys(self._levels, (None, Level(BAD)))

    def announce(self, path: str) -> None:
        """Remembers that a save to `path` is queued: what is asked to go before it stands, goes after."""
        with self._lock:
            self._announced[path] += 1
            self._unwanted.discard(path)

    def settle(self, path: str, is_saved: bool) -> None:
        """Remembers that a save is over, well or not."""
        with self._lock:
            if is_saved and path in self._unwanted and path in self._levels:
                self._kept[path] = None  # asked to go between `saved` and now
            self._unwanted.discard(path)
            if self._announced[path] > 0:
                self._announced[path] -= 1

    def level(self, path: str) -> tuple[Level, Report]:
        """How good the checkpoint at `path` is, and the report that says why."""
        report = verify_checkpoint(path, self._options)
        steps = report.facts.progress.global_step
        steps = -1 if steps is None else steps
        if path.endswith(NONFINITE_SUFFIX):
            return Level(BAD, steps), report
        if report.verdict is not Verdict.FAIL and report.resume is not None and report.resume.kind != "not-resumable":
            return Level(RESUMABLE, steps), report
        # Read anew, not judged anew: what the system would not open a moment ago may be a good checkpoint.
        for_inference = verify_checkpoint(path, dataclasses.replace(self._options, purpose="inference"))
        return Level(BAD if for_inference.verdict is Verdict.FAIL else USABLE, steps), report

    def deep_report(self, path: str) -> Report:
        """What reading every byte of the checkpoint at `path` finds."""
        return verify_checkpoint(path, dataclasses.replace(self._options, deep=True))

    def saved(self, path: str, level: Level) -> list[str]:
        """Remembers that a checkpoint of this level was just saved at `path`.

        Returns:
            The checkpoints that were kept for want of another one, and may go now.
        """
        with self._lock:
            self._kept.pop(path, None)
            if path in self._unwanted:
                self._kept[path] = None
            self._levels[path] = _signature(path), level
            self._going.discard(path)
            self._count += 1
            self._saved[path] = self._count
            return [kept for kept in self._kept if self._may_go(kept)]

    def may_remove(self, path: str) -> bool:
        """Whether a checkpoint may go: it is a link, it does not verify, or another one as good and as far on stands.

        One that may not is remembered, for `saved` to name it later.
        """
        with self._lock:
            if self._announced[path] > 0:
                self._unwanted.add(path)
                return False
            if self._may_go(path):
                return True
            self._kept[path] = None
            return False

    def removed(self, path: str) -> None:
        """Forgets a checkpoint that is gone."""
        with self._lock:
            self._kept.pop(path, None)
            self._levels.pop(path, None)
            self._saved.pop(path, None)
            self._going.discard(path)

    def level_now(self, path: str) -> Level:
        """How good the checkpoint is that stands at `path`; judged anew only if it has changed."""
        with self._lock:
            signature = _signature(path)
            if signature is None:
                self._levels.pop(path, None)
                return Level(BAD)
            if path not in self._levels or self._levels[path][0] != signature:
                self._levels[path] = signature, self.level(path)[0]
            return self._levels[path][1]

    def is_last_good(self, path: str) -> bool:
        """Whether the one at `path` verifies, and no other checkpoint as good and as far on is known."""
        with self._lock:
            return not self._is_spare(path)

    def newest_good(self, besides: str = "") -> str:
        """The checkpoint saved last, of those that verified; empty where there is none."""
        with self._lock:
            return next((p for p in [*reversed(self._levels)] if p != besides and self.level_now(p).quality > BAD), "")

    def _may_go(self, path: str) -> bool:
        """Whether a checkpoint is spare; from now on it is none for whose sake another may go."""
        if not self._is_spare(path):
            return False
        self._going.add(path)
        return True

    def _is_spare(self, path: str) -> bool:
        if not is_url(path) and (os.path.islink(path) or not os.path.lexists(path)):  # noqa: PTH114
            return True
        level = self.level_now(path)
        return (
            level.quality == BAD
            or not _is_searched_for(path)
            or any(self._replaces(other, path, level) for other in self._others(path))
        )

    def _replaces(self, other: str, path: str, level: Level) -> bool:
        """Whether `other` is as good as the checkpoint at `path`, and as far on or saved after it by this run."""
        quality, steps = self.level_now(other)
        after = self._saved.get(other, 0) > self._saved.get(path, 0)
        return quality >= level.quality and (after or steps >= level.steps)

    def _others(self, path: str) -> Iterator[str]:
        """Checkpoints that are no other name of `path`: those saved by this run, newest first, and those beside it.

        What is about to go, or could not be removed, is not among them.
        """
        seen = {_real(path), *map(_real, self._going)}
        beside = () if is_url(path) else map(str, find_checkpoints(Path(path).parent))
        for other in (*reversed(self._levels), *beside):
            if _real(other) not in seen and _is_searched_for(other):
                seen.add(_real(other))
                yield other


def _is_searched_for(path: str) -> bool:
    """Whether a search for the last good checkpoint looks at such a name."""
    name = path.rstrip("/").rpartition("/")[2]
    return not name.startswith(".") and not name.endswith(SET_ASIDE_SUFFIXES)


def _real(path: str) -> str:
    return path if is_url(path) else os.path.realpath(path)


def _signature(path: str) -> object:
    """What changes when the checkpoint does; None where none stands."""
    if is_url(path):
        return stands_at(path) or None
    try:
        return same_file(Path(path))
    except OSError:
        return None
