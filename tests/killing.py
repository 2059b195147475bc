"""Child processes of the test process, which has imported everything, and their deaths by SIGKILL; commands at Ctrl-C.

`run_child` runs work in a forked child, collects what the child tells, and kills it at a moment: so long after its
start, or so long after it told something. Work is any function, a Trainer's `fit` or the whole command line alike.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Tell = Callable[[str], None]
Work = Callable[[Tell], object]


@dataclass(frozen=True)
class Kill:
    """When a child is killed: `after` seconds after it has told `since`, or after its start where that is empty."""

    after: float
    since: str = ""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        said: the lines that it told, in order; the last is `done`, or `raised ERROR MESSAGE`, unless it was killed.
        status: its exit status, or the negative number of the signal that ended it.
        seconds: how long it lived.
    """

    said: tuple[str, ...]
    status: int
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def done(self) -> bool:
        return self.said[-1:] == ("done",)

    def numbers(self, what: str) -> list[int]:
        """The numbers in the lines that say `what NUMBER`."""
        return [int(line.split()[1]) for line in self.said if line.startswith(f"{what} ")]


def interrupted(
    command: list[str], once: Callable[[int], bool], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """How a command ends that gets Ctrl-C once something holds of its process, whose id is asked with.

    Raises:
        AssertionError: it ended before.
        TimeoutExpired: it has not ended `timeout` seconds after.
    """
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not once(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, said)


def run_child(work: Work, kill: Kill | None = None, log: Path | None = None, limit_seconds: float = 120.0) -> Ended:
    """Runs `work` in a forked child and waits for its end; `log` gets what the child prints.

    Raises:
        TimeoutError: the child lives longer than `limit_seconds`; it is killed.
    """
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        live(work, writing, log)
    os.close(writing)
    try:
        said, in_time = _listen(reading, child, kill, began + limit_seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # its own children: workers of a loader and the like
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not in_time:
        raise TimeoutError(f"the child was not at its end after {limit_seconds} s; it had said {said[-5:]}; log: {log}")
    return Ended(tuple(said), status, time.monotonic() - began)


def live(work: Work, writing: int, log: Path | None) -> None:
    """The child's life: it ends here, whatever happens."""
    write = os.write  # for good: `work` may put another in its place

    def tell(line: str) -> None:
        write(writing, (" ".join(line.split()) + "\n").encode())

    try:
        os.setsid()
        output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)  # OpenMP's threads do not come along into a fork
        work(tell)
        tell("done")
    except BaseException as e:
        tell(f"raised {type(e).__name__} {e}")
        with contextlib.suppress(Exception):
            write(2, traceback.format_exc().encode())
    finally:
        os._exit(0)


def _listen(reading: int, child: int, kill: Kill | None, limit: float) -> tuple[list[str], bool]:
    """What the child tells until it closes its end, killing it when its moment has come; whether it ended in time."""
    text = ""
    moment = time.monotonic() + kill.after if kill is not None and not kill.since else None
    while (now := time.monotonic()) < limit:
        if moment is not None and now >= moment:
            os.kill(child, signal.SIGKILL)
            kill = moment = None
        ready, _, _ = select.select([reading], [], [], min(limit, moment or limit) - now)
        if not ready:
            continue
        read = os.read(reading, 65_536)
        if not read:
            return text.splitlines(), True
        text += read.decode(errors="replace")
        if kill is not None and moment is None and kill.since in text.splitlines():
            moment = time.monotonic() + kill.after
    return text.splitlines(), False
