"""A save and a retention pass, stopped at each of their file calls in turn: what stands afterwards is found and loads.

`file_calls` stops or fails them.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, quiet_trainer
from file_calls import CrashPoint, in_child
from killing import Tell
from lightning.pytorch.plugins.io import TorchCheckpointIO

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Options, find_last_good
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO


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

    def save_and_remove(self, tell: Tell) -> None:
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


CRASHES = [{}, {"power_loss": True}, {"power_loss": True, "last_name_stays": True}]
KINDS = ["killed", "power loss", "power loss, and the last name on the disk"]


@pytest.mark.parametrize("over", [False, True], ids=["a new name", "the same name"])
@pytest.mark.parametrize("kind", CRASHES, ids=KINDS)
def test_a_crash_at_a_file_call_leaves_the_right_checkpoint(
    over: bool, kind: dict[str, bool], trained: Path, tmp_path: Path
) -> None:
    run = Run(trained, tmp_path, over)
    calls = run.calls()
    assert set(calls) >= {"open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir"}
    tried = points(calls, every_write=25)
    assert len(tried) >= 20, "opening, writing, syncing, moving and removing of a checkpoint and of its manifest"
    for at in tried:
        said = run.crash(at, **kind)
        run.check(said, (at, calls[at]))
        assert "saved" not in said or manifest_path(run.place / run.new).exists(), (at, calls[at])


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
@pytest.mark.parametrize("kind", CRASHES, ids=KINDS)
def test_every_crash_point(over: bool, kind: dict[str, bool], trained: Path, tmp_path: Path) -> None:
    run = Run(trained, tmp_path, over)
    calls = run.calls()
    for at in range(len(calls)):
        said = run.crash(at, **kind)
        good = find_last_good(run.place, Options(digests=True))
        assert good is not None, (at, calls[at])
        if at % 10 == 0:
            resumed = quiet_trainer(tmp_path, CheckpointGuard())
            resumed.fit(TinyModule(), ckpt_path=good.path)
            assert resumed.global_step == 15
        run.check(said, (at, calls[at]))
