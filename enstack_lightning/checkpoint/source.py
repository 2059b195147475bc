"""Bytes that can be read at any offset, from a local file or from an object store, and nothing else.

Everything the readers know of a file's content comes through a `Source`: it opens regular files only, never waits for
a FIFO, never reads beyond the end, and tells whether the file changed while it was read.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

RANGE_GAP = 64 * 2**10
"""Remote ranges that are closer to each other than this are fetched as one."""
MAX_HELD = 32 * 2**20
"""Bytes of earlier ranges that a remote source keeps."""


ContainerDefectKind = Literal["empty", "truncated", "damaged", "unrecognised", "unreadable", "replaced"]
"""The values of `DefectKind` that a container can have."""


class ContainerDefectError(ValueError):
    """A file is not what its format demands.

    Attributes:
        kind: `truncated` when bytes are missing at the end, `damaged` when bytes are not what they were,
            `unrecognised` when the file is something else, `replaced` when a record is not the one that was saved.
        record: the record concerned, where there is one.
    """

    def __init__(self, kind: ContainerDefectKind, message: str, record: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.record = record


class Source(ABC):
    """An open file of `size` bytes; use it as a context manager."""

    size: int

    @abstractmethod
    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        """Exactly `count` bytes from `offset` on.

        Raises:
            ContainerDefectError: the file ends before.
            OSError: the file cannot be read.
        """

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Says which `(offset, count)` ranges will be read next, so that a store or a disk can fetch them together."""
        return

    def part(self, offset: int, size: int) -> Source:
        """A window on `size` bytes from `offset` on, as a source of its own; closing it closes nothing."""
        return _Part(self, offset, size)

    def local_fd(self) -> tuple[int, int] | None:
        """The file descriptor and the offset in it at which this source begins; None for a remote one."""
        return None

    def has_changed(self) -> bool:
        """Whether the file was written to or replaced since it was opened."""
        return False

    def close(self) -> None:
        """Closes the file."""
        return

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LocalSource(Source):
    """A regular file on disk.

    Raises:
        ContainerDefectError: what stands at `path` is no regular file.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        self._status = os.fstat(self._fd)
        if not stat.S_ISREG(self._status.st_mode):
            os.close(self._fd)
            raise ContainerDefectError("unrecognised", "it is not a regular file")
        self.size = self._status.st_size

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        data = os.pread(self._fd, count, offset)
        if len(data) != count:
            raise ContainerDefectError("truncated", f"{what} ends after {len(data):,} of {count:,} bytes")
        return data

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Has the kernel read them side by side, where the first is not in memory: in turn, each waits for the disk."""
        ranges = iter(ranges)
        first = next(ranges, None)
        if first is None or self._is_in_memory(*first):
            return
        for start, end in joined((offset, offset + count) for offset, count in (first, *ranges)):
            os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def _is_in_memory(self, offset: int, count: int) -> bool:
        """True also where the system cannot tell (preadv(2), Linux from 4.14)."""
        try:
            return os.preadv(self._fd, [bytearray(min(count, 1))], offset, os.RWF_NOWAIT) >= 0
        except BlockingIOError:
            return False
        except (AttributeError, OSError):
            return True

    def local_fd(self) -> tuple[int, int] | None:
        return self._fd, 0

    def has_changed(self) -> bool:
        try:
            return _identity(self._path.stat()) != _identity(self._status)
        except FileNotFoundError:
            return True

    def close(self) -> None:
        os.close(self._fd)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def object_store() -> Iterator[None]:
    """Whatever the client of an object store raises on its own account is raised as an `OSError` that says the same.

    Such clients have classes of their own for missing credentials, a server that cannot be reached and the like; a
    timeout has no words of its own.
    """
    try:
        yield
    except (FileNotFoundError, ContainerDefectError):
        raise
    except OSError as e:
        if str(e):
            raise
        raise OSError(type(e).__name__) from e
    except Exception as e:
        raise OSError(f"{type(e).__name__}: {e}".splitlines()[0][:300]) from e


class RemoteSource(Source):
    """An object behind an fsspec file system, read in ranges.

    The whole object is fetched, once, only from an HTTP server that knows no ranges and answers each with all of it.

    Args:
        filesystem: an `fsspec.AbstractFileSystem`.
        path: the object's path within it.
        info: what the file system says of the object, where that was asked already.

    Attributes:
        requests: for ranges of the object, so far.
    """

    def __init__(self, filesystem: Any, path: str, info: Mapping[str, Any] | None = None) -> None:
        self._filesystem = filesystem
        self._path = path
        self._info = self._ask() if info is None else info
        self.size = int(self._info.get("size") or 0)
        self.requests = 0
        self._fetched: list[tuple[int, bytes]] = []

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        if offset + count > self.size:
            raise ContainerDefectError("truncated", f"{what} ends after {self.size - offset:,} of {count:,} bytes")
        for start, data in self._fetched:
            if start <= offset and offset + count <= start + len(data):
                return data[offset - start : offset - start + count]
        self.requests += 1
        with object_store():
            data = bytes(self._filesystem.cat_file(self._path, start=offset, end=offset + count)) if count else b""
        if len(data) == self.size != count:
            self._fetched = [(0, data)]
            return data[offset : offset + count]
        if len(data) != count:
            raise ContainerDefectError("truncated", f"{what} ends after {len(data):,} of {count:,} bytes")
        return data

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        spans = [(offset, min(offset + count, self.size)) for offset, count in ranges]
        wanted = joined((start, end) for start, end in spans if not self._holds(start, end))
        self.requests += len(wanted)
        starts, ends = [s for s, _ in wanted], [e for _, e in wanted]
        with object_store():
            found = self._filesystem.cat_ranges([self._path] * len(wanted), starts, ends, on_error="raise")
        for start, end, data in zip(starts, ends, found, strict=True):
            if len(data) == self.size != end - start:
                self._fetched = [(0, bytes(data))]
                return
        fetched = [(start, bytes(data)) for start, data in zip(starts, found, strict=True)]
        self._fetched = [*fetched, *self._fetched] if self._held() < MAX_HELD else fetched

    def has_changed(self) -> bool:
        """Asks the store again, unless all that was read came in one answer."""
        if self.requests < 2:
            return False
        try:
            return _version(self._ask()) != _version(self._info)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # what was read was read

    def _ask(self) -> dict[str, Any]:
        with object_store():
            return dict(self._filesystem.info(self._path))

    def _holds(self, start: int, end: int) -> bool:
        return any(begin <= start and end <= begin + len(data) for begin, data in self._fetched)

    def _held(self) -> int:
        return sum(len(data) for _, data in self._fetched)


def _version(info: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells an object from the one that takes its place, as far as its store says."""
    return tuple(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "updated", "created"))


class _Part(Source):
    def __init__(self, whole: Source, offset: int, size: int) -> None:
        self._whole = whole
        self._offset = offset
        self.size = size

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        if offset + count > self.size:
            raise ContainerDefectError("truncated", f"{what} ends after {self.size - offset:,} of {count:,} bytes")
        return self._whole.read_at(self._offset + offset, count, what)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._whole.prefetch((self._offset + offset, count) for offset, count in ranges)

    def local_fd(self) -> tuple[int, int] | None:
        whole = self._whole.local_fd()
        return None if whole is None else (whole[0], whole[1] + self._offset)

    def has_changed(self) -> bool:
        return self._whole.has_changed()


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans with those that lie close together joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= RANGE_GAP:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
