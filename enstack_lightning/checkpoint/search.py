"""From what a user names - a file, a folder of checkpoints, a pattern - to the checkpoints themselves, one by one.

Nothing is opened: names decide what may be a checkpoint, and verifying it says whether it is one.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from enstack_lightning.checkpoint.location import LocalLocation, Location, locate
from enstack_lightning.checkpoint.readers import is_checkpoint_folder

SEARCH_DEPTH = 5
"""How many folders deep checkpoints are looked for."""


def find_checkpoints(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Every checkpoint below `folder`, each once, in the order of their paths.

    Numbers in names count as numbers: `step=2` comes before `step=10`. Hidden and temporary files are passed over.
    Links are not followed into other folders; a link to a checkpoint that is listed itself is left out.
    """
    found = list(_walk(LocalLocation(Path(folder)), SEARCH_DEPTH))
    own = {p.resolve() for p in found if not p.is_symlink()}
    yield from sorted((p for p in found if not p.is_symlink() or p.resolve() not in own), key=_as_people_count)


def checkpoints_at(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The checkpoints that paths name: each path itself, the checkpoints in a folder of them, what a pattern matches.

    A path or pattern that leads to no checkpoint is given back as it is, for the verification to say so.
    """
    for path in paths:
        text = os.fspath(path)
        for match in _matches(text):
            location = locate(match)
            if location.is_folder() and not is_checkpoint_folder(location):
                yield from [str(p) for p in find_checkpoints(match)] or [match]
            else:
                yield match


def _matches(path: str) -> list[str]:
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    return sorted(glob.glob(path, recursive=True), key=_as_people_count) or [path]  # noqa: PTH207 - an absolute pattern


def _walk(folder: Location, depth: int) -> Iterator[Path]:
    assert isinstance(folder, LocalLocation)
    if is_checkpoint_folder(folder):
        yield folder.path
        return
    try:
        entries = sorted(os.scandir(folder.path), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth > 0 and not entry.name.startswith("."):
                yield from _walk(LocalLocation(Path(entry.path)), depth - 1)
        elif entry.name.endswith(".ckpt") and not entry.name.startswith("."):
            yield Path(entry.path)


def _as_people_count(path: str | Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
