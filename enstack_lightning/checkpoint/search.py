"""From what a user names - a file, a folder of checkpoints, a pattern - to the checkpoints themselves, one by one.

No file is opened: names decide what may be a checkpoint, and verifying it says whether it is one. Files of bare weights
are taken only where they are named, because a folder may be full of them that belong to no run.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from enstack_lightning.checkpoint.location import LocalLocation, Location, RemoteLocation, is_url, locate
from enstack_lightning.checkpoint.manifest import MANIFEST_SUFFIX
from enstack_lightning.checkpoint.readers import is_checkpoint_folder
from enstack_lightning.checkpoint.readers.content import is_unfinished
from enstack_lightning.checkpoint.source import object_store
from enstack_lightning.errors import CheckpointError

SEARCH_DEPTH = 5
"""How many folders deep checkpoints are looked for."""
CORRUPT_SUFFIX = ".corrupt"
"""Set aside as unusable: such a name is that of no checkpoint any more."""
UNVERIFIED_SUFFIX = ".unverified"
"""What was saved, does not verify, and would have taken the place of the last checkpoint that did."""
NONFINITE_SUFFIX = ".nonfinite"
"""What was saved of a run whose weights were not finite any more."""
SET_ASIDE_SUFFIXES = (CORRUPT_SUFFIX, UNVERIFIED_SUFFIX, NONFINITE_SUFFIX)


def find_checkpoints(folder: str | os.PathLike[str]) -> Iterator[Path | str]:
    """Every checkpoint below `folder`, each once, as it is found: a path, or a URL where `folder` is one.

    Found are `.ckpt` files and folders, EnStack folders, folders of the Hugging Face Trainer and sharded ones. The
    order is that of the paths, with numbers in names counted as numbers: `step=2` comes before `step=10`. Hidden and
    temporary names and those that were set aside (`.corrupt`, `.unverified`, `.nonfinite`) are passed over. Links are
    not followed into other folders; a link to a checkpoint that is listed itself is left out.

    Example:
        >>> list(find_checkpoints("does-not-exist"))
        []
    """
    root = locate(folder)
    for found in _walk(root, root, SEARCH_DEPTH):
        yield found.path if isinstance(found, LocalLocation) else str(found)


def checkpoints_at(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The checkpoints that paths name: each path itself, the checkpoints in a folder of them, what a pattern matches.

    A path or pattern that leads to no checkpoint is given back as it is, for the verification to say so.
    """
    for path in paths:
        for match in _matches(os.fspath(path)):
            yield from _within(match)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as people count: `step=2` before `step=10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _within(path: str) -> Iterator[str]:
    empty = True
    if _is_folder_of_checkpoints(path):
        for found in find_checkpoints(path):
            empty = False
            yield str(found)
    if empty:
        yield path


def _is_folder_of_checkpoints(path: str) -> bool:
    if not path:
        return False  # it would be the folder that the process happens to be in
    try:
        location = locate(path)
        return location.is_folder() and not is_checkpoint_folder(location)
    except (OSError, CheckpointError):
        return False  # verifying it says why it cannot be looked at


def _matches(path: str) -> list[str]:
    """What a pattern matches, but for what stands beside checkpoints; a path that is no pattern matches itself."""
    if is_url(path):
        matches = _remote_matches(path)
    elif os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    else:
        matches = glob.glob(path, recursive=True)  # noqa: PTH207 - the pattern may be absolute
    kept = [match for match in matches if not _is_set_aside(match) and not match.endswith(MANIFEST_SUFFIX)]
    return sorted(kept, key=natural_order) or [path]


def _remote_matches(url: str) -> list[str]:
    if not re.search(r"[*\[]", url) or url.startswith(("http://", "https://")):
        return [url]
    try:
        location = locate(url)
        assert isinstance(location, RemoteLocation)
        with object_store():
            return [location.filesystem.unstrip_protocol(found) for found in location.filesystem.glob(location.path)]
    except (OSError, CheckpointError):
        return [url]


def _walk(folder: Location, root: Location, depth: int) -> Iterator[Location]:
    if is_checkpoint_folder(folder):
        yield folder
        return
    for name, is_folder in sorted(_entries(folder), key=lambda entry: natural_order(entry[0])):
        if name.startswith((".", "tmp-checkpoint-")) or _is_set_aside(name):
            continue
        place = folder.child(name)
        if name.endswith(".ckpt"):
            if not _is_listed_elsewhere(place, root):
                yield place
        elif is_folder and depth > 0:
            yield from _walk(place, root, depth - 1)


def _entries(folder: Location) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder itself and no link to one."""
    try:
        if isinstance(folder, LocalLocation):
            with os.scandir(folder.path) as entries:
                return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        return list(folder.entries()) if isinstance(folder, RemoteLocation) else []
    except OSError:
        return []


def _is_set_aside(name: str) -> bool:
    return name.endswith(SET_ASIDE_SUFFIXES) or is_unfinished(name)


def _is_listed_elsewhere(place: Location, root: Location) -> bool:
    """Whether a link leads to a checkpoint that the search from `root` comes upon by its own name."""
    if not isinstance(place, LocalLocation) or not isinstance(root, LocalLocation) or not place.path.is_symlink():
        return False
    try:
        target, home = place.path.resolve(), root.path.resolve()
    except (OSError, RuntimeError):  # links that go round in a circle: verifying it says so
        return False
    if not target.exists() or not target.is_relative_to(home):
        return False
    parts = target.relative_to(home).parts
    hidden = any(part.startswith(".") or _is_set_aside(part) for part in parts)
    return not hidden and len(parts) <= SEARCH_DEPTH + 1 and (target.suffix == ".ckpt" or target.is_dir())
