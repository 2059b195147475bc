"""A save and a retention pass, stopped at each of their file calls in turn: what stands afterwards is found and loads.

A child process kills itself at its n-th call that opens, writes, syncs, renames or removes something. A killed write
leaves half of its bytes. Where `power loss` is played, what was not synchronised is lost as well.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, quiet_trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Options, find_last_good
from enstack_lightning.guard.checkpoint_io import GuardedCheckpointIO

CALLS = ("open", "write", "fsync", "fdatasync", "replace", "unlink", "remove", "mkdir", "rmdir")


class CrashPoint:
    """Counts the file calls of this process, and kills it (or lets the call fail) at one of them."""

    def __init__(self, at: int, power_loss: bool = False, error: int | None = None) -> None:
        self.at, self.power_loss, self.error = at, power_loss, error
        self.made: list[str] = []
        self._paths: dict[int, str] = {}
        self._unsynced: set[str] = set()
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
                result = call(*args, **kwargs)
                self._follow(name, args, result)
                return result

        return counted

    def _follow(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._paths[result] = os.fspath(args[0])
        elif name == "write":
            self._unsynced.add(self._paths.get(args[0], ""))
        elif name in ("fsync", "fdatasync"):
            self._unsynced.discard(self._paths.get(args[0], ""))
        elif name == "replace" and os.fspath(args[0]) in self._unsynced:
            self._unsynced.add(os.fspath(args[1]))

    def _die(self) -> None:
        for path in self._unsynced if self.power_loss else ():
            if Path(path).is_file():
                os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(crash: CrashPoint, work: Callable[[Callable[[str], None]], None]) -> list[str]:
    """Runs `work` in a child with a crash point; returns what it said before it died."""
    reading, writing = os.pipe()
    write = os.write
    child = os.fork()
    if child == 0:
        try:
            crash.install()
            work(lambda text: write(writing, f"{text}\n".encode()) and None)
            write(writing, f"calls {' '.join(crash.made)}\n".encode())
        except BaseException as e:
            write(writing, f"raised {type(e).__name__} {e}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read().splitlines()
    os.waitpid(child, 0)
    return said


def guarded() -> GuardedCheckpointIO:
    return GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)


class Run:
    """A folder with the checkpoint of step 3, and what a run does next: it saves that of step 4."""

    def __init__(self, trained: Path, folder: Path, over: bool) -> None:
        self.folder = folder
        self.start = folder / "start"
        self.checkpoints = {n: torch.load(trained / f"step={n}.ckpt") for n in (3, 4, 5)}
        self.old, self.new = ("last.ckpt", "last.ckpt") if over else ("step=3.ckpt", "step=4.ckpt")
        guarded().save_checkpoint(self.checkpoints[3], self.start / self.old)
        self.place = folder / "run"

    def save_and_remove(self, tell: Callable[[str], None]) -> None:
        io = guarded()
        io.save_checkpoint(self.checkpoints[4], self.place / self.new)
        tell("saved")
        if self.new != self.old:
            io.remove_checkpoint(self.place / self.old)
            tell("removed")

    def crash(self, at: int, **options: Any) -> list[str]:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place)
        return in_child(CrashPoint(at, **options), self.save_and_remove)

    def check(self, said: list[str], where: object) -> None:
        """The right checkpoint is found, it loads with what was saved, and the next start goes on from there."""
        good = find_last_good(self.place, Options(digests=True))
        assert good is not None, where
        step = good.facts.progress.global_step
        assert step == 4 if "saved" in said else step in (3, 4), (where, said)
        assert step is not None
        loaded = torch.load(good.path)
        for name, tensor in self.checkpoints[step]["state_dict"].items():
            assert torch.equal(loaded["state_dict"][name], tensor), where
        guarded().save_checkpoint(self.checkpoints[5], self.place / "step=5.ckpt")
        assert not [p for p in self.place.iterdir() if p.name.startswith(".")], where
        newest = find_last_good(self.place, Options(digests=True))
        assert newest is not None
        assert newest.facts.progress.global_step == 5, where

    def calls(self) -> list[str]:
        (said,) = [line for line in self.crash(-1) if line.startswith("calls ")]
        return said.split()[1:]


def points(calls: list[str], every_write: int) -> list[int]:
    """Every call, but of the writes only each `every_write`-th."""
    writes = [n for n, name in enumerate(calls) if name == "write"]
    return [n for n, name in enumerate(calls) if name != "write" or writes.index(n) % every_write == 0]


@pytest.mark.parametrize("over", [False, True], ids=["a new name", "the same name"])
@pytest.mark.parametrize("power_loss", [False, True], ids=["killed", "power loss"])
def test_a_crash_at_a_file_call_leaves_the_right_checkpoint(
    over: bool, power_loss: bool, trained: Path, tmp_path: Path
) -> None:
    run = Run(trained, tmp_path, over)
    calls = run.calls()
    assert set(calls) >= {"open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir"}
    tried = points(calls, every_write=25)
    assert len(tried) >= 25
    for at in tried:
        run.check(run.crash(at, power_loss=power_loss), (at, calls[at]))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("over", [False, True], ids=["a new name", "the same name"])
def test_a_call_that_fails_leaves_the_right_checkpoint(number: int, over: bool, trained: Path, tmp_path: Path) -> None:
    run = Run(trained, tmp_path, over)
    calls = run.calls()
    for at in points(calls, every_write=50):
        said = run.crash(at, error=number)
        raised = [line.split()[1] for line in said if line.startswith("raised")]
        assert raised in ([], ["CheckpointSaveError"]) or "saved" in said, (at, calls[at], said)
        run.check(said, (at, calls[at], said))


@pytest.mark.faults_long
@pytest.mark.parametrize("over", [False, True], ids=["a new name", "the same name"])
@pytest.mark.parametrize("power_loss", [False, True], ids=["killed", "power loss"])
def test_every_crash_point(over: bool, power_loss: bool, trained: Path, tmp_path: Path) -> None:
    run = Run(trained, tmp_path, over)
    calls = run.calls()
    for at in range(len(calls)):
        said = run.crash(at, power_loss=power_loss)
        good = find_last_good(run.place, Options(digests=True))
        assert good is not None, (at, calls[at])
        if at % 10 == 0:
            resumed = quiet_trainer(tmp_path, CheckpointGuard())
            resumed.fit(TinyModule(), ckpt_path=good.path)
            assert resumed.global_step == 15
        run.check(said, (at, calls[at]))
