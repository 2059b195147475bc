"""Two processes that train as one run: forked from the test process, killed one or both, and waited for.

They are started as torchrun starts them, with their rank and the port in the environment, and ended as it ends them:
where one has died, the other has `GRACE_SECONDS` to come to its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killing import Kill, Work, live
from lightning.pytorch.utilities import rank_zero_only

RANKS = 2
GRACE_SECONDS = 15.0
LIMIT_SECONDS = 90.0


@dataclass
class Rank:
    """One of the processes.

    Attributes:
        said: the lines that it told.
        status: its exit status, or the negative number of the signal that ended it.
        seconds: how long it lived.
        lived_on: seconds between the first death among the others and its own end; None where nobody died, or it was
            killed itself.
        given_up: whether it was still there after its grace.
    """

    pid: int
    pipe: int
    text: str = ""
    ended_at: float | None = None
    seconds: float = 0.0
    status: int = 0
    lived_on: float | None = None
    given_up: bool = False
    said: tuple[str, ...] = field(default=())

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL and not self.given_up

    @property
    def done(self) -> bool:
        return self.said[-1:] == ("done",)

    @property
    def raised(self) -> str:
        """The error that it ended with, in the words of the process."""
        return next((line for line in self.said if line.startswith("raised ")), "")

    def numbers(self, what: str) -> list[int]:
        """The numbers in the lines that say `what NUMBER`."""
        return [int(line.split()[1]) for line in self.said if line.startswith(f"{what} ")]


def run_ranks(work: Work, kill: Kill | None = None, victims: Sequence[int] = (), log: Path | None = None) -> list[Rank]:
    """Runs `work` in two processes of one group, kills the victims when any process tells that it is time, and waits.

    Raises:
        TimeoutError: nobody has died, and the processes are still there after `LIMIT_SECONDS`.
    """
    port, began = _free_port(), time.monotonic()
    ranks = [_fork(work, rank, port, log) for rank in range(RANKS)]
    moment = began + kill.after if kill is not None and not kill.since else None
    first_death: float | None = None
    while open_ones := [rank for rank in ranks if rank.ended_at is None]:
        now = time.monotonic()
        if moment is not None and now >= moment:
            for victim in (ranks[number] for number in victims):
                if victim.ended_at is None:
                    os.kill(victim.pid, signal.SIGKILL)
            moment, kill = None, None
        if (first_death is not None and now > first_death + GRACE_SECONDS) or now > began + LIMIT_SECONDS:
            for rank in open_ones:
                rank.given_up = True
                os.kill(rank.pid, signal.SIGKILL)
        wait = 0.1 if moment is None else max(0.0, min(0.1, moment - now))
        ready, _, _ = select.select([rank.pipe for rank in open_ones], [], [], wait)
        for rank in open_ones:
            if rank.pipe in ready and _has_ended(rank) and first_death is None and not rank.done | rank.given_up:
                first_death = rank.ended_at
        if kill is not None and moment is None and any(kill.since in rank.text.splitlines() for rank in ranks):
            moment = time.monotonic() + kill.after
    if any(rank.given_up for rank in ranks) and first_death is None:
        raise TimeoutError(f"two processes were not at their end after {LIMIT_SECONDS} s: {ranks}; log: {log}")
    deaths = [rank.ended_at for rank in ranks if rank.killed and rank.ended_at is not None]
    for rank in ranks:
        rank.seconds = (rank.ended_at or began) - began
        if first_death is not None and not rank.killed:
            rank.lived_on = max(0.0, began + rank.seconds - min(deaths, default=first_death))
    return ranks


def _fork(work: Work, rank: int, port: int, log: Path | None) -> Rank:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        rank_zero_only.rank = rank  # Lightning has read it before, for the test process
        live(work, writing, log.with_name(f"{log.name}.{rank}") if log is not None else None)
    os.close(writing)
    return Rank(pid, reading)


def _has_ended(rank: Rank) -> bool:
    """Reads what a process tells; at its end, waits for it and for what it has started."""
    read = os.read(rank.pipe, 65_536)
    rank.text += read.decode(errors="replace")
    if read:
        return False
    os.close(rank.pipe)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.status = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
    rank.ended_at = time.monotonic()
    rank.said = tuple(rank.text.splitlines())
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
