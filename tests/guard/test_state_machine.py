"""A run's folder through whatever befalls it, in any order: once a verified checkpoint exists, one always exists and is
found, unless the user destroys it.

Hypothesis draws the order: saves, crashes at any file call, power losses, a full disk, checkpoints damaged or deleted
by the user, requests to remove some as `ModelCheckpoint` makes them, restarts, fallbacks. What is good is told without
the verification: a checkpoint that torch loads and that equals, bit by bit, what was saved.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import flip_bit, flip_in_pickle, loop_counters, truncate
from file_calls import CrashPoint, full_disk, in_child
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from killing import Tell
from lightning.pytorch.plugins.io import TorchCheckpointIO

from enstack_lightning.checkpoint import Options, Verdict, find_last_good, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.errors import CheckpointError, CheckpointGuardError, CheckpointSaveError
from enstack_lightning.guard.loading.choice import choose, choose_newest, set_aside
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO

OPTIONS = Options(digests=True)
CALLS = st.one_of(st.integers(0, 64), st.integers(60, 88), st.integers(84, 120))
"""Crash points: while a file is written, while it gets its place and its manifest, while others are removed."""

ONE_NAME = "last.ckpt"
names = st.sampled_from(["new", ONE_NAME, ONE_NAME])
picks = st.integers(0, 99)


def checkpoint_of(step: int, bad: bool = False) -> dict[str, Any]:
    """What a Trainer saves, with one small parameter; a bad one has no weights, and must not be resumed from."""
    weight = torch.full((8, 8), float(step))
    state = {"step": torch.tensor(float(step)), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square()}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {} if bad else {"weight": weight},
        "loops": loop_counters(step),
        "callbacks": {},
        "optimizer_states": [] if bad else [{"state": {0: state}, "param_groups": [group]}],
        "lr_schedulers": [],
    }


def step_if_good(path: Path) -> int | None:
    """The step of a checkpoint that holds what was saved at that step, to the last bit; None of any other file."""
    try:
        loaded = torch.load(path, weights_only=True)
        saved = checkpoint_of(loaded["global_step"])
        same = torch.equal(loaded["state_dict"]["weight"], saved["state_dict"]["weight"])
        states = (c["optimizer_states"][0]["state"][0] for c in (loaded, saved))
        return loaded["global_step"] if same and _equal(*states) and loaded["loops"] == saved["loops"] else None
    except Exception:
        return None


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Folder(RuleBasedStateMachine):
    """The folder on disk is the model's own state, read anew after every rule by `good`."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="run-"))
        self.step = 0
        self.damaged: set[str] = set()
        self.start()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """What a new process does first."""
        self.io = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None, OPTIONS)
        self.io.remove_leftovers(self.folder)

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("[!.]*.ckpt"))

    def good(self) -> dict[str, int]:
        """Steps by name, of what is whole and has not been touched."""
        untouched = (p for p in self.checkpoints() if p.name not in self.damaged)
        return {p.name: step for p in untouched if (step := step_if_good(p)) is not None}

    def pick(self, number: int) -> Path:
        found = self.checkpoints()
        return found[number % len(found)]

    def place(self, name: str) -> Path:
        return self.folder / (ONE_NAME if name == ONE_NAME else f"step={self.step}.ckpt")

    # What the run does

    @rule(name=names)
    def save(self, name: str) -> None:
        self.step += 1
        path = self.place(name)
        self.io.save_checkpoint(checkpoint_of(self.step), path)
        self.damaged.discard(path.name)
        assert self.good().get(path.name) == self.step

    @rule(name=names)
    def save_what_does_not_verify(self, name: str) -> None:
        self.step += 1
        before, path = self.good(), self.place(name)
        self.io.save_checkpoint(checkpoint_of(self.step, bad=True), path)
        if path.name not in self.good():
            self.damaged.discard(path.name)
        self.still_stands(before)

    @precondition(lambda self: self.checkpoints())
    @rule(pick=picks)
    def retention_asks_to_remove(self, pick: int) -> None:
        before, path = self.good(), self.pick(pick)
        self.io.remove_checkpoint(path)
        if path.exists():
            assert path.name in before, "what is not good goes when asked"
            assert before[path.name] == max(before.values())
        self.damaged.discard(path.name) if not path.exists() else None
        self.still_stands(before)

    @rule(name=names)
    def save_and_remove_the_one_before(self, name: str) -> None:
        before = self.checkpoints()
        self.save(name)
        for path in before:
            if path != self.place(name):
                self.io.remove_checkpoint(path)
                self.damaged -= {path.name} if not path.exists() else set()
        assert max(self.good().values()) >= self.step

    @rule(name=names, free=st.integers(0, 6_000))
    def save_on_a_full_disk(self, name: str, free: int) -> None:
        self.step += 1
        before, path = self.good(), self.place(name)
        try:
            with full_disk(free):
                self.io.save_checkpoint(checkpoint_of(self.step), path)
        except CheckpointSaveError:
            assert before.items() <= self.good().items()
        else:
            self.damaged.discard(path.name)
            assert self.good()[path.name] == self.step
        assert not [p for p in self.folder.iterdir() if p.name.startswith(".")]

    # What befalls it

    @rule(name=names, call=CALLS, removes=st.booleans(), power_loss=st.booleans())
    def crash(self, name: str, call: int, removes: bool, power_loss: bool) -> None:
        self.step += 1
        before, path, others = self.good(), self.place(name), self.checkpoints()

        def work(tell: Tell) -> None:
            self.io.save_checkpoint(checkpoint_of(self.step), path)
            tell("saved")
            for other in others if removes else ():
                if other != path:
                    self.io.remove_checkpoint(other)

        said = in_child(CrashPoint(call, power_loss=power_loss), work)
        assert not [line for line in said if line.startswith("raised")], said
        if step_if_good(path) == self.step:
            self.damaged.discard(path.name)
        self.damaged &= {p.name for p in self.checkpoints()}
        after = self.good()
        if "saved" in said:
            assert after.get(path.name) == self.step, said
        else:
            lost = {n for n in before if n not in after}
            assert not lost, (lost, said)
        self.restart()

    @rule()
    def restart(self) -> None:
        """The run goes on from the newest good one."""
        self.start()
        assert not [p for p in self.folder.iterdir() if p.name.startswith(".")], "leftovers"
        good = self.good()
        try:
            found = choose_newest([self.folder], lambda path: verify_checkpoint(path, OPTIONS))
        except CheckpointError:
            assert not good
        else:
            assert (found.facts.progress.global_step if found else None) == max(good.values(), default=None)

    @precondition(lambda self: self.checkpoints())
    @rule(pick=picks)
    def resume_from_a_certain_one_or_fall_back(self, pick: int) -> None:
        self.start()
        good, path = self.good(), self.pick(pick)
        try:
            choice = choose(str(path), lambda p: verify_checkpoint(p, OPTIONS), "previous")
        except CheckpointGuardError:
            assert not good
            return
        assert Path(choice.path).name in good
        if path.name in good:
            assert choice.path == str(path)
        else:
            assert choice.report.facts.progress.global_step == max(good.values())
        set_aside(choice.refused)
        self.damaged &= {p.name for p in self.checkpoints()}
        assert self.good() == good

    # What the user does

    @precondition(lambda self: self.checkpoints())
    @rule(pick=picks, how=st.sampled_from(["cut", "empty", "flip in the pickle", "flip", "no checkpoint"]), at=picks)
    def damage(self, pick: int, how: str, at: int) -> None:
        path = self.pick(pick)
        size = path.stat().st_size
        if how == "flip in the pickle" and b"pytorch-lightning_version" in path.read_bytes():
            flip_in_pickle(path)
        elif how == "flip" and size and manifest_path(path).exists():  # without one, only a deep look finds it
            flip_bit(path, size * at // 100, at % 8)
        elif how == "no checkpoint":
            path.write_bytes(b"not a checkpoint")
        else:
            truncate(path, 0 if how == "empty" else size * at // 100)
        later = path.stat().st_mtime_ns + 10**9  # the file system's clock ticks too slowly to tell
        os.utime(path, ns=(later, later))
        self.damaged.add(path.name)

    @precondition(lambda self: self.checkpoints())
    @rule(pick=picks, with_manifest=st.booleans())
    def delete(self, pick: int, with_manifest: bool) -> None:
        path = self.pick(pick)
        path.unlink()
        if with_manifest:
            manifest_path(path).unlink(missing_ok=True)
        self.damaged.discard(path.name)

    @precondition(lambda self: self.checkpoints())
    @rule(pick=picks)
    def delete_a_manifest(self, pick: int) -> None:
        path = self.pick(pick)
        if path.name not in self.damaged:  # of a flipped one it is the only witness
            manifest_path(path).unlink(missing_ok=True)

    @precondition(lambda self: self.good())
    @rule(pick=picks)
    def copy(self, pick: int) -> None:
        good = sorted(self.good())
        path = self.folder / good[pick % len(good)]
        target = self.folder / f"copy-{pick % 3}.ckpt"
        if target == path:
            return
        shutil.copy(path, target)
        manifest_path(target).unlink(missing_ok=True)
        self.damaged.discard(target.name)

    # What always holds

    def still_stands(self, before: dict[str, int]) -> None:
        assert not before or self.good(), "the last good checkpoint is lost"
        assert max(before.values(), default=0) <= max(self.good().values(), default=0), "the newest good one is lost"

    @invariant()
    def the_newest_good_one_is_found(self) -> None:
        good = self.good()
        found = find_last_good(self.folder, OPTIONS)
        assert (found.facts.progress.global_step if found else None) == max(good.values(), default=None)
        assert found is None or Path(found.path).name in good

    @invariant()
    def verification_tells_good_from_bad(self) -> None:
        good = self.good()
        for path in self.checkpoints():
            assert (verify_checkpoint(path, OPTIONS).verdict is not Verdict.FAIL) == (path.name in good), path


def explore(examples: int, steps: int, derandomize: bool) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        print_blob=True,
        phases=[Phase.generate] if derandomize else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(Folder, settings=chosen)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning.pytorch")  # until the test ends


def test_the_last_good_checkpoint_outlives_whatever_befalls_its_folder() -> None:
    explore(examples=10, steps=20, derandomize=True)


@pytest.mark.faults_long
@pytest.mark.timeout(7_200)
def test_it_outlives_thousands_of_mishaps() -> None:
    explore(examples=400, steps=50, derandomize=False)
