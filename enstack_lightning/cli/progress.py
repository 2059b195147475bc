"""How far a long command is, on a terminal's standard error; nothing anywhere else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


_BEGINS_AFTER = 0.3
_REDRAWN_EVERY = 0.1


def wants_progress() -> bool:
    """Whether somebody sees what is drawn: standard error is a terminal that can go back in a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bytes_to_read(path: str) -> int:
    """Bytes of a file, or of all files below a folder; 0 for a URL and for what cannot be looked at."""
    try:
        place = Path(path)
        files = [f for f in place.rglob("*") if f.is_file()] if place.is_dir() else [place]
        return sum(f.stat().st_size for f in files)
    except (OSError, ValueError):
        return 0


class ProgressBar:
    """A bar that is gone when it is done; use it as a context manager. `read` may be called from any thread.

    It begins after a moment, so that what is done at once draws nothing.

    Args:
        total: how many things there are to do.
        total_bytes: how many bytes there are to read; 0 when nobody knows or cares.
    """

    def __init__(self, total: int, total_bytes: int = 0) -> None:
        self._counts_bytes = total_bytes > 0
        self._bar = _bar(self._counts_bytes)
        self._task = self._bar.add_task("", total=total_bytes or total, things=total, done=0)
        self._done = 0
        self._drawn_at = time.monotonic() + _BEGINS_AFTER - _REDRAWN_EVERY

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def read(self, count: int) -> None:
        """So many bytes more were read."""
        if self._counts_bytes:
            self._bar.advance(self._task, count)
            self._draw()

    def advance(self) -> None:
        """One thing more is done."""
        self._done += 1
        self._bar.update(self._task, advance=0 if self._counts_bytes else 1, done=self._done)
        self._draw()

    def clear(self) -> None:
        """Takes the bar away, for other text to be printed or for good."""
        self._bar.stop()

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= _REDRAWN_EVERY:
            self._drawn_at = now
            self._bar.start()
            self._bar.refresh()


def _bar(counts_bytes: bool) -> Progress:
    # Imported only where it is drawn: rich takes longer to import than a checkpoint to verify.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [BarColumn(), TextColumn("{task.fields[done]:,} of {task.fields[things]:,}")]
    columns += [DownloadColumn(), TransferSpeedColumn()] if counts_bytes else []
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, auto_refresh=False)
