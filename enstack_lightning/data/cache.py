"""The cache on disk: content-addressed folders that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for what can be made again: `cache_dir`, else `$ENSTACK_CACHE`, else `~/.cache/enstack_lightning`."""
    return Path(cache_dir or os.environ.get("ENSTACK_CACHE") or "~/.cache/enstack_lightning").expanduser()


def cache_key(*parts: object) -> str:
    """A name for what the parts decide: equal parts give equal names, on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` in one step when the block ends well, and vanishes otherwise.

    Two processes may fill the same folder at the same time: the first to finish wins, and the other's copy, which
    holds the same content because folders are named after their content, is dropped.

    Args:
        folder: Where the finished folder shall stand.

    Yields:
        The temporary folder, beside `folder`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def progress_bars_only_on_terminals() -> Iterator[None]:
    """Turns the progress bars of `datasets` off inside the block when standard error is not a terminal."""
    import datasets

    silence = not sys.stderr.isatty() and datasets.is_progress_bar_enabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()
