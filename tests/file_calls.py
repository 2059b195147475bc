"""The file calls of a save, each of which can be the last one of its process, or fail, or take its time.

A child process kills itself at its n-th call that opens, writes, syncs, renames or removes something. A killed write
leaves half of its bytes. Where a power loss is played, what was not synchronised is lost as well: the bytes of a file,
and of a folder the names that came into it or went; all of these, or all but the last, as no order is promised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from killing import Tell, run_child

CALLS = ("open", "write", "fsync", "fdatasync", "replace", "unlink", "remove", "mkdir", "rmdir")


class CrashPoint:
    """Counts the file calls of this process, and kills it (or lets the call fail) at one of them."""

    def __init__(
        self, at: int, power_loss: bool = False, last_name_stays: bool = False, error: int | None = None
    ) -> None:
        self.at, self.power_loss, self.error = at, power_loss, error
        self.last_name_stays = last_name_stays
        self.made: list[str] = []
        self._paths: dict[int, str] = {}
        self._unsynced: set[str] = set()
        self._names: list[tuple[str, Callable[[], object]]] = []
        self._lock = threading.RLock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if len(self.made) == self.at:
                    self.made.append(name)
                    if self.error is not None:
                        raise OSError(self.error, os.strerror(self.error))
                    if name == "write":
                        call(args[0], bytes(args[1])[: len(args[1]) // 2])
                    self._die()
                self.made.append(name)
                undone = _before(name, args) if self.power_loss else None
                result = call(*args, **kwargs)
                self._follow(name, args, result)
                if undone is not None:
                    self._names.append(undone)
                return result

        return counted

    def _follow(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._paths[result] = os.fspath(args[0])
        elif name == "write":
            self._unsynced.add(self._paths.get(args[0], ""))
        elif name in ("fsync", "fdatasync"):
            synced = self._paths.get(args[0], "")
            self._unsynced.discard(synced)
            self._names = [(folder, undo) for folder, undo in self._names if folder != synced]
        elif name == "replace" and os.fspath(args[0]) in self._unsynced:
            self._unsynced.add(os.fspath(args[1]))

    def _die(self) -> None:
        for path in self._unsynced if self.power_loss else ():
            if Path(path).is_file():
                os.truncate(path, 0)
        for _, undo in reversed(self._names[:-1] if self.last_name_stays else self._names):
            undo()
        os.kill(os.getpid(), signal.SIGKILL)


def _before(name: str, args: tuple[Any, ...]) -> tuple[str, Callable[[], object]] | None:
    """The folder in which a call sets or takes a name, and what brings that folder back to the moment before it."""
    if name not in ("replace", "unlink", "remove", "mkdir"):
        return None
    path = Path(os.fspath(args[-1] if name == "replace" else args[0]))
    if name == "mkdir":
        return str(path.parent), lambda: shutil.rmtree(path, ignore_errors=True)
    if path.is_file() and not path.is_symlink():
        content = path.read_bytes()
        return str(path.parent), lambda: path.write_bytes(content)
    return str(path.parent), lambda: path.unlink(missing_ok=True)


def in_child(crash: CrashPoint, work: Callable[[Tell], None]) -> list[str]:
    """Runs `work` in a child with a crash point; returns what it said before it died."""

    def crashing(tell: Tell) -> None:
        crash.install()
        work(tell)
        tell(f"calls {' '.join(crash.made)}")

    return [line for line in run_child(crashing).said if line != "done"]


@contextlib.contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """A disk that takes so many more bytes; the write that comes to its end is short, and what follows fails."""
    write, left = os.write, free_bytes

    def limited(fd: int, data: bytes | memoryview) -> int:
        nonlocal left
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return write(fd, data)
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(fd, memoryview(data)[:left])
        left -= written
        return written

    os.write = limited
    try:
        yield
    finally:
        os.write = write
