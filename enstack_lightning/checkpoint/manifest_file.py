"""The manifest's own file: what a manifest says, and how that is written and read.

    {
      "version": 1,
      "tool": "enstack-lightning 0.1.0",
      "created": "2026-01-31T12:00:00Z",
      "format": "enstack",
      "global_step": null,
      "epoch": 3,
      "fingerprints": {"config": "<of the hyper-parameters>", "data/train": "<of the rows>"},
      "versions": {"torch": "2.13.0", "lightning": "2.6.6"},
      "files": [
        {"name": "config.json", "size": 772, "blake3": "<64 hexadecimal digits>"},
        ...
      ]
    }

`name` is relative to the manifest's own folder and has `/` between its parts; `blake3` is what `b3sum` prints;
`fingerprints` and `versions` are there where the writer knew them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from enstack_lightning.checkpoint.durable import sync_folder
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.json_file import parse_json
from enstack_lightning.checkpoint.source import ContainerDefectError

VERSION = 1

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_FILES = 10_000

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\..*\.manifest\.json\.[0-9a-f]{8}\.tmp", re.DOTALL)


class ManifestEntry(NamedTuple):
    """One file of a checkpoint, by its name relative to the manifest's folder."""

    name: str
    size: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    files: tuple[ManifestEntry, ...]
    global_step: int | None = None
    epoch: int | None = None
    format: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


class ManifestDefectError(ValueError):
    """A manifest cannot be read or says what no manifest can say."""


# Writing


def as_json(manifest: Manifest) -> bytes:
    """The bytes of a manifest's file, with the tool and the time that it is written."""
    content = {
        "version": VERSION,
        "tool": _tool(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "format": manifest.format,
        "global_step": manifest.global_step,
        "epoch": manifest.epoch,
        "fingerprints": dict(manifest.fingerprints),
        "versions": dict(manifest.versions),
        "files": [entry._asdict() for entry in manifest.files],
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _tool() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"enstack-lightning {version('enstack-lightning')}"
    except PackageNotFoundError:  # run from a source tree
        return "enstack-lightning"


def write_atomically(target: Path, content: bytes) -> None:
    """Writes a manifest under another name, brings it to the disk and renames it."""
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def is_being_written(name: str) -> bool:
    """Whether a name is one under which `write_atomically` writes."""
    return _TEMPORARY.fullmatch(name) is not None


# Reading


def read_manifest(location: Location, folder: Location) -> Manifest:
    """What the manifest at `location` says, which a link must not bring from out of `folder`.

    Raises:
        ManifestDefectError: it cannot be read, or is not what this module writes.
    """
    defect, _ = location.check_file(location.name, folder)
    if defect is not None:
        raise ManifestDefectError(defect.message)
    try:
        with location.open() as source:
            if source.size > MAX_MANIFEST_BYTES:
                raise ManifestDefectError(f"it has {source.size:,} bytes; the limit is {MAX_MANIFEST_BYTES:,}")
            raw = source.read_at(0, source.size)
    except ContainerDefectError as e:
        raise ManifestDefectError(str(e)) from e
    except OSError as e:
        raise ManifestDefectError(f"it cannot be read: {e.strerror or e}") from e
    try:
        content = parse_json(raw.decode("utf-8"), finite=True)
    except (ValueError, RecursionError) as e:
        raise ManifestDefectError(f"it is no valid JSON: {e}") from e
    return _checked(content)


def _checked(content: Any) -> Manifest:
    if not isinstance(content, dict):
        raise ManifestDefectError(f"it holds a JSON {type(content).__name__} where an object is needed")
    if content.get("version") != VERSION:
        raise ManifestDefectError(
            f"its version is {content.get('version')!r:.50}; this is a reader of version {VERSION}"
        )
    files = content.get("files")
    if not isinstance(files, list) or not files:
        raise ManifestDefectError("it lists no files")
    if len(files) > MAX_FILES:
        raise ManifestDefectError(f"it lists {len(files):,} files; the limit is {MAX_FILES:,}")
    entries = tuple(_checked_entry(entry) for entry in files)
    if len({entry.name for entry in entries}) != len(entries):
        raise ManifestDefectError("it lists a file twice")
    form = content.get("format", "")
    if not isinstance(form, str):
        raise ManifestDefectError("its format is no text")
    counts = _count(content, "global_step"), _count(content, "epoch")
    return Manifest(entries, *counts, form, _texts(content, "fingerprints"), _texts(content, "versions"))


def _checked_entry(entry: object) -> ManifestEntry:
    if not isinstance(entry, dict):
        raise ManifestDefectError("an entry of its files is no object")
    name, size, digest = entry.get("name"), entry.get("size"), entry.get("blake3")
    if not isinstance(name, str):
        raise ManifestDefectError(f"it lists {name!r:.200}, which is no name of a file")
    if type(size) is not int or size < 0:
        raise ManifestDefectError(f"it gives {name!r:.200} the size {size!r:.50}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ManifestDefectError(f"the BLAKE3 digest of {name!r:.200} is not 64 hexadecimal digits")
    return ManifestEntry(name, size, digest)


def _count(content: dict[str, Any], key: str) -> int | None:
    value = content.get(key)
    if value is not None and type(value) is not int:
        raise ManifestDefectError(f"its {key} is {value!r:.50}, which is no whole number")
    return value


def _texts(content: dict[str, Any], key: str) -> dict[str, str]:
    values = content.get(key, {})
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ManifestDefectError(f"its {key} are no object of texts")
    return values
