"""A checkpoint that stands under its name whole and on the disk, or not at all.

It is written under its own name into a hidden folder beside its place, brought to the disk and moved to its place in
one step. A kill at any moment leaves the checkpoint that stood there before, or the new one; what it leaves of the
hidden folder is removed at the next start, by `remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem

from enstack_lightning.checkpoint.durable import sync_folder
from enstack_lightning.checkpoint.location import is_url
from enstack_lightning.checkpoint.manifest import hasher_on_all_cores
from enstack_lightning.checkpoint.manifest_file import ManifestEntry

LEFTOVER_SECONDS = 24 * 3600
"""After so long without a change, what another host has left is taken for a leftover."""

_STAGING = re.compile(r"\..*\.([0-9a-f]{8})-[0-9a-f]{8}\.guard\.tmp", re.DOTALL)
_PREVIOUS = ".previous"
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_LARGE_BYTES = 2**20
_SYNC_BYTES = 64 * 2**20
_BLOCK_BYTES = 8 * 2**20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A place to write what shall stand at `target`: the same name, in a hidden folder beside it, gone afterwards.

    Processes that look for leftovers keep off `target`'s folder meanwhile.
    """
    make_folder(target.parent)
    with _folder_lock(target.parent, exclusive=False):
        folder = target.parent / f".{target.name[:40]}.{_HOST}-{os.urandom(4).hex()}.guard.tmp"
        folder.mkdir()
        try:
            yield folder / target.name
        finally:
            discard(folder)


def put_in_place(staged: Path, target: Path) -> None:
    """Moves a file or folder that is on the disk to its place, over what stands there; `sync_folder` makes it last.

    A file is exchanged in one step, and so is a folder where the system can exchange two names (Linux). Elsewhere the
    folder that stood there bears the name `target.previous` between two renames.
    """
    if (not target.is_symlink() and target.is_dir()) or (staged.is_dir() and os.path.lexists(target)):
        _exchange(staged, target)
    else:
        os.replace(staged, target)  # noqa: PTH105 - the calls of a save are those of `os`, for the tests to stop at each


def write_durably(target: Path, content: bytes) -> None:
    """Writes a small file so that it is whole or absent at every moment."""
    with staging(target) as staged:
        with DurableFile(staged) as file:
            file.write(content)
            file.finish()
        put_in_place(staged, target)
        sync_folder(target.parent)


def sync(path: Path) -> None:
    """Brings a file, or every file of a folder and the folders themselves, to the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in sorted(path.iterdir()):
            sync(child)
        sync_folder(path)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, and brings their names to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def discard(path: Path) -> None:
    """Removes a file or folder, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for child in list(path.iterdir()):
                discard(child)
            path.rmdir()
        else:
            os.unlink(path)  # noqa: PTH108


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what killed saves have left in `folder`, and nothing that any process may still be writing.

    Only names that `staging` gives are looked at. While a process of this host saves into the folder, nothing is
    removed: it holds a lock on the folder, which the system takes back when the process dies. What another host has
    left, or where the file system has no locks, goes once it has been unchanged for a day.

    Returns:
        What was removed.
    """
    try:
        found = {p: m for p in folder.iterdir() if (m := _STAGING.fullmatch(p.name)) and not p.is_symlink()}
    except OSError:
        return []
    removed = []
    if found:
        try:
            with _folder_lock(folder, exclusive=True) as locked:
                for path, name in found.items():
                    if (locked and name[1] == _HOST) or _age_seconds(path) > LEFTOVER_SECONDS:
                        discard(path)
                        removed.append(path)
        except BlockingIOError:
            return []  # a save goes on there; the next start looks again
    return removed


def digest_on_disk(path: Path) -> str:
    """The BLAKE3 digest of a file's bytes, read from the disk where the system lets go of its copy in memory."""
    hasher = hasher_on_all_cores()
    fd = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while block := os.read(fd, _BLOCK_BYTES):
            hasher.update(block)
    finally:
        os.close(fd)
    return hasher.hexdigest()


class DurableFile:
    """A new file that torch can save to; the digest of what is written is taken while it is written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder, DurableFile(Path(folder, "w.pt")) as file:
        ...     torch.save({"w": torch.zeros(3)}, file)
        ...     file.finish().name
        'w.pt'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._size = 0
        self._hasher = blake3()
        self._beside = ThreadPoolExecutor(2, "save")
        self._on_its_way: Future[None] | None = None
        self._waiting_bytes = 0
        self._early_error: OSError | None = None
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._beside.shutdown()
        os.close(self._fd)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        digested = self._beside.submit(self._hasher.update, view) if len(view) >= _LARGE_BYTES else None
        try:
            written = 0
            while written < len(view):
                written += os.write(self._fd, view[written:])
        except OSError as e:
            self.error = self.error or e  # torch reports some failures as its own, without the system's reason
            raise
        finally:
            if digested is not None:
                digested.result()
        if digested is None:
            self._hasher.update(view)
        self._size += len(view)
        self._start_syncing(len(view))
        return len(view)

    def _start_syncing(self, count: int) -> None:
        """Lets the disk work while torch makes the next bytes; `finish` raises what goes wrong there."""
        self._waiting_bytes += count
        if self._waiting_bytes >= _SYNC_BYTES and (self._on_its_way is None or self._on_its_way.done()):
            self._waiting_bytes = 0
            self._on_its_way = self._beside.submit(self._sync_early)

    def _sync_early(self) -> None:
        try:
            os.fdatasync(self._fd)
        except (OSError, AttributeError) as e:
            self._early_error = e if isinstance(e, OSError) else None

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> ManifestEntry:
        """Brings the file to the disk; returns its name, size and digest."""
        if self._on_its_way is not None:
            self._on_its_way.result()
        if self._early_error is not None:
            raise self._early_error  # the system tells of a failed write once, and of this file not again
        os.fsync(self._fd)
        return ManifestEntry(self.path.name, self._size, self._hasher.hexdigest())


def _exchange(staged: Path, target: Path) -> None:
    if not _exchange_names(staged, target):
        previous = target.with_name(target.name + _PREVIOUS)
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)  # noqa: PTH105
        try:
            os.replace(staged, target)  # noqa: PTH105
        except OSError:
            os.replace(previous, target)  # noqa: PTH105
            raise
        sync_folder(target.parent)
        discard(previous)


def _exchange_names(one: Path, other: Path) -> bool:
    """`renameat2(RENAME_EXCHANGE)`; False where the system or file system does not know it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _age_seconds(path: Path) -> float:
    """How long nothing in a folder has changed; 0 where that cannot be asked."""
    try:
        times = [path.lstat().st_mtime, *(p.lstat().st_mtime for p in path.rglob("*"))]
    except OSError:
        return 0.0
    return time.time() - max(times)


@contextlib.contextmanager
def _folder_lock(folder: Path, exclusive: bool) -> Iterator[bool]:
    """Holds the folder's lock; gives whether there is one, on this file system.

    Raises:
        BlockingIOError: `exclusive` is wanted, and another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            locked = True
        except BlockingIOError:
            raise
        except OSError:  # NFS and others lock no folders
            locked = False
        try:
            yield locked
        finally:
            if locked:
                fcntl.flock(fd, fcntl.LOCK_UN)  # children forked meanwhile would keep it
    finally:
        os.close(fd)


def same_file(path: Path) -> tuple[object, ...]:
    """What changes when a checkpoint is written anew, without reading it."""
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        return info.st_ino, info.st_size, info.st_mtime_ns
    files = sorted((p.name, p.stat()) for p in path.iterdir())
    return tuple((name, i.st_ino, i.st_size, i.st_mtime_ns) for name, i in files)


def is_device(path: Path) -> bool:
    """Whether a path is that of a device or a pipe, such as `/dev/null`, which a file must never replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """The path on disk, also of a `file://` URL; None for other URLs."""
    name = os.fspath(path)
    if name.startswith(("file:", "local:")):
        return Path(LocalFileSystem._strip_protocol(name))
    return None if is_url(name) else Path(name)
