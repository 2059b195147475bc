"""The recovery checkpoint in a folder that holds those of earlier runs: what they left stays, and each run has one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from builders import TinyModule, every_epoch, quiet_trainer
from lightning.pytorch.callbacks import Callback

from enstack_lightning import CheckpointGuard, RecoveryCheckpoint


class Stop(Callback):
    """Ends a run in the middle, as a failure does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("stopped")


def train(folder: Path | str, *callbacks: Callback, at: int | None = None, every: int = 2, **options: Any) -> None:
    """A run of three epochs of five batches, which ends at the step `at` if that is given."""
    stop = [] if at is None else [Stop(at)]
    recovery = RecoveryCheckpoint(str(folder), every_n_train_steps=every)
    path = options.pop("ckpt_path", None)
    root = options.pop("default_root_dir", folder)
    trainer = quiet_trainer(root, CheckpointGuard(), *callbacks, recovery, *stop, **options)
    try:
        trainer.fit(TinyModule(), ckpt_path=path)
    except RuntimeError as e:
        if str(e) != "stopped":
            raise


def steps(folder: Path, pattern: str = "recovery*.ckpt") -> dict[str, int]:
    return {p.name: torch.load(p, weights_only=True)["global_step"] for p in sorted(folder.glob(pattern))}


@pytest.fixture
def earlier(tmp_path: Path) -> bytes:
    """The recovery checkpoint that an earlier run left in the folder, at step 6."""
    train(tmp_path, at=7)
    return (tmp_path / "recovery_checkpoint.ckpt").read_bytes()


def test_a_fresh_run_leaves_that_of_an_earlier_one(earlier: bytes, tmp_path: Path) -> None:
    train(tmp_path, at=5)
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 4, "recovery_checkpoint.ckpt": 6}
    train(tmp_path, at=3)
    assert steps(tmp_path, "recovery*-v2.ckpt") == {"recovery_checkpoint-v2.ckpt": 2}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == earlier


def test_a_finished_run_removes_its_own_and_no_other(earlier: bytes, tmp_path: Path) -> None:
    train(tmp_path, every_epoch(tmp_path))
    assert steps(tmp_path) == {"recovery_checkpoint.ckpt": 6}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == earlier


@pytest.mark.parametrize("name", ["recovery_checkpoint-v1.ckpt", "epoch=0-v1.ckpt"])
@pytest.mark.parametrize("every", [2, 3])
def test_a_resumed_run_goes_on_with_its_own(name: str, every: int, tmp_path: Path) -> None:
    train(tmp_path, every_epoch(tmp_path), at=9)
    first = (tmp_path / "recovery_checkpoint.ckpt").read_bytes()
    train(tmp_path, every_epoch(tmp_path), at=7)
    assert sorted(steps(tmp_path)) == ["recovery_checkpoint-v1.ckpt", "recovery_checkpoint.ckpt"]
    train(tmp_path, every_epoch(tmp_path), at=9, every=every, ckpt_path=tmp_path / name)
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 8 if every == 2 else 9, "recovery_checkpoint.ckpt": 8}
    train(tmp_path, every_epoch(tmp_path), every=every, ckpt_path=tmp_path / "recovery_checkpoint-v1.ckpt")
    assert steps(tmp_path) == {"recovery_checkpoint.ckpt": 8}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == first


def test_the_first_run_goes_on_with_its_own_after_a_second(earlier: bytes, tmp_path: Path) -> None:
    train(tmp_path, at=5)
    second = (tmp_path / "recovery_checkpoint-v1.ckpt").read_bytes()
    train(tmp_path, at=9, ckpt_path=tmp_path / "recovery_checkpoint.ckpt")
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 4, "recovery_checkpoint.ckpt": 8}
    assert (tmp_path / "recovery_checkpoint-v1.ckpt").read_bytes() == second


def test_a_run_that_goes_on_in_another_folder_leaves_that_where_it_stands(earlier: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(other, at=3)
    train(other, every_epoch(other), ckpt_path=tmp_path / "recovery_checkpoint.ckpt")
    assert steps(other) == {"recovery_checkpoint.ckpt": 2}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == earlier


def test_a_run_whose_folder_was_moved_goes_on_with_its_own(tmp_path: Path) -> None:
    train(tmp_path, every=6, at=7)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "recovery_checkpoint.ckpt", moved)
    train(moved, every_epoch(moved), every=6, max_epochs=2, ckpt_path=moved / "recovery_checkpoint.ckpt")
    assert (steps(moved), steps(tmp_path)) == ({}, {"recovery_checkpoint.ckpt": 6})


def test_names_with_the_step_in_them_get_versions_too(tmp_path: Path) -> None:
    for version in ("", "-v1"):
        recovery = RecoveryCheckpoint(str(tmp_path), "{step}", every_n_train_steps=4)
        quiet_trainer(tmp_path, CheckpointGuard(), recovery, max_steps=5).fit(TinyModule())
        assert Path(recovery.best_model_path).name == f"step=4{version}.ckpt"


def test_it_is_so_behind_a_url(tmp_path: Path) -> None:
    folder, files = f"memory://recovery/{tmp_path.name}", fsspec.filesystem("memory")
    train(folder, at=5, default_root_dir=tmp_path)
    train(folder, at=3, default_root_dir=tmp_path)
    train(folder, at=5, default_root_dir=tmp_path, ckpt_path=f"{folder}/recovery_checkpoint-v1.ckpt")
    names = sorted(name.rpartition("/")[2] for name in files.ls(folder, detail=False) if name.endswith(".ckpt"))
    assert names == ["recovery_checkpoint-v1.ckpt", "recovery_checkpoint.ckpt"]


# At a signal, in a run that has no `RecoveryCheckpoint`


class Signal(Callback):
    """Sends SIGTERM to its own process in the batch that begins at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def signalled_run(folder: Path, at: int, path: Path | None = None) -> None:
    with pytest.raises(SystemExit):
        quiet_trainer(folder, CheckpointGuard(), every_epoch(folder), Signal(at)).fit(TinyModule(), ckpt_path=path)


def test_a_signal_leaves_that_of_an_earlier_run(earlier: bytes, tmp_path: Path) -> None:
    signalled_run(tmp_path, 6)
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 7, "recovery_checkpoint.ckpt": 6}
    signalled_run(tmp_path, 8, tmp_path / "recovery_checkpoint-v1.ckpt")
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 9, "recovery_checkpoint.ckpt": 6}
    signalled_run(tmp_path, 5, tmp_path / "epoch=0.ckpt")
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 6, "recovery_checkpoint.ckpt": 6}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == earlier


def test_a_signal_to_a_run_that_goes_on_from_what_is_younger_than_an_earlier_runs(
    earlier: bytes, tmp_path: Path
) -> None:
    train(tmp_path, every_epoch(tmp_path), at=6, every=100)
    os.utime(tmp_path / "epoch=0.ckpt", (2**31, 2**31))
    signalled_run(tmp_path, 5, tmp_path / "epoch=0.ckpt")
    assert steps(tmp_path) == {"recovery_checkpoint-v1.ckpt": 6, "recovery_checkpoint.ckpt": 6}
    assert (tmp_path / "recovery_checkpoint.ckpt").read_bytes() == earlier


def test_it_stays_until_another_of_its_age_or_younger_stands(tmp_path: Path) -> None:
    recovery, saves = RecoveryCheckpoint(str(tmp_path)), every_epoch(tmp_path)
    trainer = quiet_trainer(tmp_path, saves, recovery)
    other, own = tmp_path / "other.ckpt", tmp_path / "recovery_checkpoint.ckpt"
    for path, seconds in ((other, 10), (own, 20)):
        path.touch()
        os.utime(path, (seconds, seconds))
    saves.best_model_path = str(other)
    assert not recovery._superseded(trainer, own)
    os.utime(other, (20, 20))
    assert recovery._superseded(trainer, own)
    other.unlink()
    assert not recovery._superseded(trainer, own)
