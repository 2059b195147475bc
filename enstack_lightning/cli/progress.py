"""One line on a terminal's standard error that says how far a long command is; nothing anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time

_BEGINS_AFTER = 0.3
_REDRAWN_EVERY = 0.1
_BAR = 24


def wants_progress() -> bool:
    """Whether somebody sees what is drawn: standard error is a terminal that can go back in a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class ProgressLine:
    """Draws `[#####-----] 12 of 1,000  1,446 of 9,000 MB` and takes it away again; safe to call from any thread.

    It begins after a moment, so that what is done at once draws nothing.

    Args:
        total: how many things there are to do.
        total_bytes: how many bytes there are to read; 0 when nobody knows or cares.
    """

    def __init__(self, total: int, total_bytes: int = 0) -> None:
        self._total, self._total_bytes = total, total_bytes
        self._done = self._bytes = 0
        self._began = time.monotonic()
        self._drawn_at = self._began + _BEGINS_AFTER - _REDRAWN_EVERY
        self._drawn = False
        self._lock = threading.Lock()

    def read(self, count: int) -> None:
        """So many bytes more were read."""
        with self._lock:
            self._bytes += count
            self._draw()

    def advance(self) -> None:
        """One thing more is done."""
        with self._lock:
            self._done += 1
            self._draw()

    def clear(self) -> None:
        """Takes the line away, for other text to be printed or for good."""
        with self._lock:
            if self._drawn:
                self._write("\r\x1b[K")
                self._drawn = False

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= _REDRAWN_EVERY:
            self._drawn_at, self._drawn = now, True
            columns = shutil.get_terminal_size().columns
            self._write("\r\x1b[K" + self._text(now)[: columns - 1])

    def _text(self, now: float) -> str:
        share = self._bytes / self._total_bytes if self._total_bytes else self._done / max(1, self._total)
        filled = round(min(1.0, share) * _BAR)
        said = f"[{'#' * filled}{'-' * (_BAR - filled)}] {self._done:,} of {self._total:,}"
        if self._bytes:
            of = f" of {self._total_bytes / 1e6:,.0f}" if self._total_bytes else ""
            speed = self._bytes / 1e6 / max(1e-3, now - self._began)
            said += f"  {self._bytes / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s"
        return said

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal is gone: nobody looks
            pass
