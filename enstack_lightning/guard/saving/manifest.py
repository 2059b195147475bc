"""The manifest of what the guard has just saved, and the moments at which an older one must go."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint.durable import sync_folder
from enstack_lightning.checkpoint.facts import Format
from enstack_lightning.checkpoint.manifest import manifest_path, write_manifest
from enstack_lightning.checkpoint.manifest_file import ManifestEntry
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.errors import CheckpointError
from enstack_lightning.guard.flavor import rank_zero_warn
from enstack_lightning.guard.live import versions
from enstack_lightning.guard.saving.atomic import write_durably


def write_save_manifest(target: Path, checkpoint: Mapping[str, Any], entries: Sequence[ManifestEntry] | None) -> None:
    """Writes the manifest of what stands at `target`; a checkpoint without one is none the worse, so failing warns."""
    try:
        write_manifest(
            target,
            format=Format.SHARDED if target.is_dir() else Format.LIGHTNING,
            global_step=_count(checkpoint.get("global_step")),
            epoch=_count(checkpoint.get("epoch")),
            fingerprints=_fingerprints(checkpoint),
            versions=versions(),
            known=entries,
            write=write_durably,
        )
    except CheckpointError as e:
        rank_zero_warn(f"CheckpointGuard: {target} is saved and on the disk, but has no manifest: {e}")


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _fingerprints(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the hyper-parameters as canonical JSON, and what a data module says of its own data."""
    found: dict[str, str] = {}
    options = {key: checkpoint[key] for key in ("hyper_parameters", "datamodule_hyper_parameters") if key in checkpoint}
    if options:
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            text = json.dumps(options, sort_keys=True, separators=(",", ":"), default=_named)
            found["config"] = hashlib.sha256(text.encode()).hexdigest()
    for state in checkpoint.values():
        if is_mapping(state) and is_mapping(state.get("fingerprints")):
            found |= {f"data/{split}": str(value) for split, value in state["fingerprints"].items()}
    return found


def _named(value: object) -> object:
    """Values that JSON has no form for: paths as text, mappings as objects, others by the name of their class."""
    if is_mapping(value):
        return dict(value)
    return str(value) if isinstance(value, os.PathLike) else type(value).__qualname__


@contextlib.contextmanager
def without_manifest(target: Path) -> Iterator[None]:
    """Takes the manifest away while its checkpoint is replaced: beside the new one, the old would be wrong."""
    manifest = manifest_path(target)
    if target.is_dir() or not os.path.isfile(manifest):  # noqa: PTH113 - False also where the name is too long
        yield
        return
    content = manifest.read_bytes()
    remove_manifest(target)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            write_durably(manifest, content)
        raise


def remove_manifest(target: Path) -> None:
    manifest = manifest_path(target)
    if os.path.isfile(manifest) and not target.is_dir():  # noqa: PTH113 - as above
        os.unlink(manifest)  # noqa: PTH108
        sync_folder(manifest.parent)
