"""A manifest: the size and BLAKE3 digest of every file of a checkpoint, kept in a small JSON file beside it.

It finds what no format shows by itself: a bit turned over in a safetensors file, a file exchanged for that of another
save, a file that is gone. For a file `NAME` it is `NAME.manifest.json`, for a folder `checkpoint.manifest.json` inside;
the manifest of a link is that of the file it leads to. What it holds is said in `manifest_file`. A digest shows
accidents: who can change a checkpoint and its manifest can make them agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.checkpoint.deep import Progress, read_into
from enstack_lightning.checkpoint.facts import DefectKind, ManifestFacts
from enstack_lightning.checkpoint.location import LocalLocation, Location, RemoteLocation, is_url, leads_out, locate
from enstack_lightning.checkpoint.manifest_file import (
    MAX_FILES,
    Manifest,
    ManifestDefectError,
    ManifestEntry,
    as_json,
    is_being_written,
    read_manifest,
    write_atomically,
)
from enstack_lightning.checkpoint.source import ContainerDefectError, Source
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from blake3 import blake3

FOLDER_MANIFEST = "checkpoint.manifest.json"
MANIFEST_SUFFIX = ".manifest.json"

MAX_DEPTH = 8
MAX_DIFFERENCES = 20
BLOCK_BYTES = 4 * 2**20

_threads_of: int | None = None
"""The process that blake3 has started its threads in."""


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of the checkpoint at `path` stands, whether or not there is one.

    Example:
        >>> str(manifest_path("epoch=2.ckpt"))
        'epoch=2.ckpt.manifest.json'
    """
    checkpoint = Path(path)
    if checkpoint.is_dir():
        return checkpoint / FOLDER_MANIFEST
    return checkpoint.with_name(checkpoint.name + MANIFEST_SUFFIX)


def write_manifest(
    path: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    format: str = "",
    global_step: int | None = None,
    epoch: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    known: Sequence[ManifestEntry] | None = None,
    write: Callable[[Path, bytes], None] | None = None,
) -> Path:
    """Reads every byte of a checkpoint and writes its manifest, in place of an older one.

    The manifest is complete or absent at every moment: it is written under another name, brought to the disk and then
    renamed. Whether the checkpoint is good is not asked; verify it first.

    Args:
        path: file or folder on disk.
        progress: called with the number of bytes just read, from any thread.
        format: the checkpoint's format, as a report names it.
        global_step: optimizer steps taken, as the checkpoint says.
        epoch: likewise.
        fingerprints: of the configuration and the data that the checkpoint was trained with, by name.
        versions: of the libraries that wrote it, by name.
        known: size and digest of each file, where they were taken already; then no byte is read.
        write: writes a small file so that it is whole or absent at every moment.

    Returns:
        The manifest's path.

    Raises:
        CheckpointNotFoundError: nothing stands at `path`.
        CheckpointError: a file in it cannot be read, is a link that leads out or changes meanwhile, or the manifest
            cannot be written.
    """
    location = _writable_location(path)
    try:
        entries = tuple(known) if known is not None else _digests(location, progress, lambda name: True)
        target = manifest_path(path)
        manifest = Manifest(entries, global_step, epoch, format, fingerprints or {}, versions or {})
        (write or write_atomically)(target, as_json(manifest))
    except _UnfitError as e:
        raise CheckpointError(f"{path} gets no manifest: {e}") from e
    except OSError as e:
        raise CheckpointError(f"{path} gets no manifest: {e.filename or 'a file'}: {e.strerror or e}") from e
    return target


def digest_files(
    path: str | os.PathLike[str], wanted: Callable[[str], bool], progress: Progress | None = None
) -> tuple[ManifestEntry, ...]:
    """Size and digest of those files of a checkpoint whose names, as a manifest has them, are wanted.

    Raises:
        CheckpointError: as `write_manifest`.
    """
    try:
        return _digests(_writable_location(path), progress, wanted)
    except _UnfitError as e:
        raise CheckpointError(f"{path} cannot be digested: {e}") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be digested: {e.filename or 'a file'}: {e.strerror or e}") from e


def compare_manifest(location: Location, digests: bool, progress: Progress | None = None) -> ManifestFacts | None:
    """Compares a checkpoint with the manifest beside it.

    Args:
        location: the checkpoint.
        digests: read every byte and compare digests too; else names and sizes.
        progress: called with the number of bytes just read, from any thread.

    Returns:
        What differs, or why the manifest cannot be used; None when none is there. Does not raise.
    """
    try:
        beside = _manifest_location(location)
        if not beside.exists():
            return None
    except OSError:
        return None  # where not even that can be asked, reading the checkpoint says why
    name = str(beside)
    try:
        manifest = read_manifest(beside, location if location.is_folder() else beside.parent)
        _check_names(manifest, location)
        differences = list(_differences(location, manifest, digests, progress))
    except ManifestDefectError as e:
        return ManifestFacts(name, defect=str(e))
    except OSError as e:
        return ManifestFacts(name, defect=f"the files it lists cannot be looked at: {e.strerror or e}")
    if len(differences) > MAX_DIFFERENCES:
        rest = len(differences) - MAX_DIFFERENCES
        differences[MAX_DIFFERENCES:] = [(name, f"{rest:,} further differences are not listed")]
    return ManifestFacts(
        name,
        compared="digests" if digests else "sizes",
        differences=tuple(differences),
        files=len(manifest.files),
        global_step=manifest.global_step,
    )


def _check_names(manifest: Manifest, location: Location) -> None:
    if not location.is_folder():
        if len(manifest.files) != 1:
            raise ManifestDefectError(f"it lists {len(manifest.files):,} files beside a checkpoint of one")
        return
    for entry in manifest.files:
        if not _lies_within(entry.name):
            raise ManifestDefectError(f"it lists {entry.name!r:.200}, which names no file of the checkpoint")


def _differences(
    location: Location, manifest: Manifest, digests: bool, progress: Progress | None
) -> Iterator[tuple[str, str]]:
    is_folder = location.is_folder()
    for entry in manifest.files:
        # A checkpoint of one file may be renamed together with its manifest.
        name = entry.name if is_folder else location.name
        file = _descend(location, entry.name) if is_folder else location
        difference = _difference(name, file, location if is_folder else None, entry, digests, progress)
        if difference:
            yield name, difference
    if is_folder:
        listed = {entry.name for entry in manifest.files}
        try:
            yield from ((name, "the manifest does not list it") for name, _ in _files(location) if name not in listed)
        except _UnfitError as e:
            yield str(location), str(e)


def _difference(
    name: str, file: Location, folder: Location | None, entry: ManifestEntry, digests: bool, progress: Progress | None
) -> str:
    """How a file differs from its entry; empty when it does not."""
    try:
        size = _size(name, file, folder)
        if size != entry.size:
            return f"it has {size:,} bytes; the manifest says {entry.size:,}"
        if not digests:
            return ""
        actual = _digest_of(file, progress)
    except _UnfitError as e:
        return str(e)
    except OSError as e:
        return f"it cannot be read: {e.strerror or e}"
    if actual == entry.blake3:
        return ""
    return f"its bytes have changed: BLAKE3 {actual[:16]}... where the manifest says {entry.blake3[:16]}..."


# The files of a checkpoint


class _UnfitError(ValueError):
    """A file that no manifest can list: missing, not regular, a link that leads out, changed while it was read."""


def _files(location: Location) -> Iterator[tuple[str, Location]]:
    """Every file of a checkpoint with its name relative to the manifest's folder, sorted by name."""
    if not location.is_folder():
        yield location.name, location
        return
    for count, (name, file) in enumerate(_below(location, "", MAX_DEPTH)):
        if count == MAX_FILES:
            raise _UnfitError(f"the folder holds more than {MAX_FILES:,} files")
        yield name, file


def _below(folder: Location, prefix: str, depth: int) -> Iterator[tuple[str, Location]]:
    for name in folder.names():
        file = folder.child(name)
        if not prefix and (name == FOLDER_MANIFEST or is_being_written(name)):
            continue
        if not file.is_folder():
            yield prefix + name, file
        elif isinstance(file, LocalLocation) and file.path.is_symlink():
            raise _UnfitError(f"{prefix}{name} is a link to a folder, which is not followed")
        elif depth == 0:
            raise _UnfitError(f"{prefix}{name} lies more than {MAX_DEPTH} folders deep")
        else:
            yield from _below(file, f"{prefix}{name}/", depth - 1)


def _lies_within(name: str) -> bool:
    """Whether a name can be that of a file in a checkpoint's folder, other than its manifest."""
    return not leads_out(name) and name != FOLDER_MANIFEST


def _descend(folder: Location, name: str) -> Location:
    for part in name.split("/"):
        folder = folder.child(part)
    return folder


def _size(name: str, file: Location, folder: Location | None) -> int:
    if folder is not None and isinstance(file, LocalLocation) and isinstance(folder, LocalLocation):
        _check_parents(file.path, folder.path)
    defect, size = file.check_file(name, folder)
    if defect is not None and defect.kind is not DefectKind.EMPTY:
        raise _UnfitError(defect.message)
    return size


def _check_parents(path: Path, folder: Path) -> None:
    for parent in path.parents:
        if parent == folder:
            return
        if parent.is_symlink():
            raise _UnfitError(f"it lies behind {parent.name}, which is a link to a folder and not followed")


# Digests


def _digests(location: Location, progress: Progress | None, wanted: Callable[[str], bool]) -> tuple[ManifestEntry, ...]:
    files = ((name, file) for name, file in _files(location) if wanted(name))
    return tuple(_digest(name, file, location, progress) for name, file in files)


def _digest(name: str, file: Location, location: Location, progress: Progress | None) -> ManifestEntry:
    try:
        folder = location if location.is_folder() else None
        if folder is not None and not _lies_within(name):
            raise _UnfitError("its name would lead out of the folder on some systems")
        size = _size(name, file, folder)
        return ManifestEntry(name, size, _digest_of(file, progress))
    except _UnfitError as e:
        raise _UnfitError(f"{name}: {e}") from e


def hasher_on_all_cores() -> blake3:
    """A BLAKE3 hasher on all cores; on one in a child forked from a process that had used the others.

    The threads of blake3 live as long as their process and do not come along into a fork: the child would wait for
    them forever.
    """
    global _threads_of
    from blake3 import blake3

    if _threads_of not in (None, os.getpid()):
        return blake3()
    _threads_of = os.getpid()
    return blake3(max_threads=blake3.AUTO)


def _digest_of(file: Location, progress: Progress | None) -> str:
    hasher = hasher_on_all_cores()
    try:
        with file.open() as source:
            for block in _blocks(source):
                hasher.update(block)
                if progress is not None:
                    progress(len(block))
            if source.has_changed():
                raise _UnfitError("it changed while it was read")
    except ContainerDefectError as e:
        raise _UnfitError(str(e)) from e
    return hasher.hexdigest()


def _blocks(source: Source) -> Iterator[memoryview | bytes]:
    """The bytes of a source, block by block; the next block is read while the caller works on this one."""
    if source.size <= BLOCK_BYTES:
        yield source.read_at(0, source.size)
        return
    from concurrent.futures import ThreadPoolExecutor

    starts = range(0, source.size, BLOCK_BYTES)
    buffers = [bytearray(BLOCK_BYTES) for _ in range(2)]

    def read(index: int) -> memoryview | bytes:
        start = starts[index]
        count = min(BLOCK_BYTES, source.size - start)
        local = source.local_fd()
        if local is None:
            return source.read_at(start, count)
        block = memoryview(buffers[index % 2])[:count]
        if read_into(local[0], block, local[1] + start) < count:
            raise ContainerDefectError("truncated", "it became shorter while it was read")
        return block

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, 0)
        for index in range(1, len(starts)):
            block, coming = coming.result(), ahead.submit(read, index)
            yield block
        yield coming.result()


# Where a manifest stands


def _manifest_location(location: Location) -> Location:
    if location.is_folder():
        return location.child(FOLDER_MANIFEST)
    if isinstance(location, RemoteLocation):
        return RemoteLocation(location.url + MANIFEST_SUFFIX, location.filesystem, location.path + MANIFEST_SUFFIX)
    assert isinstance(location, LocalLocation)
    if location.path.is_symlink() and location.path.exists():  # resolve() breaks at links that go round in a circle
        of_target = manifest_path(location.path.resolve())
        if of_target.exists():
            return LocalLocation(of_target)
    return LocalLocation(manifest_path(location.path))


def _writable_location(path: str | os.PathLike[str]) -> LocalLocation:
    if is_url(os.fspath(path)):
        raise CheckpointError(f"{path} is a URL: write the manifest on disk, and copy it with the checkpoint")
    location = locate(path)
    assert isinstance(location, LocalLocation)
    if not location.exists():
        raise CheckpointNotFoundError(f"{path} gets no manifest: nothing stands there")
    return location
