"""CheckpointGuard in plain Trainers: what it refuses, what it says, and that a resumed run is the run it continues."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    BATCHES,
    TinyModule,
    edited,
    every_epoch,
    every_step,
    flip_bit,
    quiet_trainer,
    truncate,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from enstack_lightning import CheckpointGuard, CheckpointGuardError, RecoveryCheckpoint
from enstack_lightning.checkpoint import Verdict, verify_checkpoint


def resume(path: Path, folder: Path, guard: CheckpointGuard | None = None, **options: Any) -> TinyModule:
    module = TinyModule()
    quiet_trainer(folder, guard or CheckpointGuard(), **options).fit(module, ckpt_path=path)
    return module


def set_all_steps(checkpoint: dict[str, Any], step: float) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["step"] = torch.tensor(step)


# In any Trainer


def test_it_works_with_lightnings_boring_model_and_nothing_else(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    quiet_trainer(tmp_path, CheckpointGuard(), saves, max_epochs=1).fit(BoringModel())
    path = tmp_path / "step=64.ckpt"
    if not path.exists():
        path = sorted(tmp_path.glob("*.ckpt"))[-1]
    assert verify_checkpoint(path).verdict is not Verdict.FAIL
    guard = CheckpointGuard()
    trainer = quiet_trainer(tmp_path, guard, max_epochs=2)
    trainer.fit(BoringModel(), ckpt_path=path)
    assert guard.report is not None
    assert trainer.current_epoch == 2


def test_a_fresh_start_is_left_alone(tmp_path: Path) -> None:
    guard = CheckpointGuard()
    quiet_trainer(tmp_path, guard).fit(TinyModule())
    assert guard.report is None


@pytest.mark.parametrize("flag", ["fast_dev_run", "barebones"])
def test_it_stays_out_of_the_way_of_short_runs(flag: str, tmp_path: Path) -> None:
    Trainer(
        callbacks=[] if flag == "barebones" else [CheckpointGuard()], accelerator="cpu", max_epochs=1, **{flag: True}
    ).fit(BoringModel())


# Before loading


def cut(path: Path) -> None:
    truncate(path, path.stat().st_size // 2)


def flip_in_pickle(path: Path) -> None:
    flip_bit(path, 5_000)


@pytest.mark.parametrize("damage", [cut, flip_in_pickle, lambda p: truncate(p, 0), Path.unlink])
def test_a_bad_file_is_refused_before_a_byte_of_it_is_loaded(
    damage: Callable[[Path], None], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "c.ckpt"))
    damage(path)
    loads: list[object] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    with pytest.raises(CheckpointGuardError, match=r"c\.ckpt must not be used: CK10[1345]"):
        resume(path, tmp_path)
    assert not loads


@pytest.mark.parametrize("entry_point", ["validate", "test", "predict"])
def test_it_guards_evaluation_too(entry_point: str, trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "c.ckpt"))
    cut(path)
    with pytest.raises(CheckpointGuardError, match=r"c\.ckpt"):
        getattr(quiet_trainer(tmp_path, CheckpointGuard()), entry_point)(BoringModel(), ckpt_path=path)


def test_weights_alone_are_enough_to_evaluate_and_not_to_resume(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    quiet_trainer(tmp_path, saves, max_epochs=1).fit(BoringModel())
    quiet_trainer(tmp_path, CheckpointGuard()).validate(BoringModel(), ckpt_path=tmp_path / "w.ckpt", verbose=False)
    with pytest.raises(CheckpointGuardError, match="weights only"):
        quiet_trainer(tmp_path, CheckpointGuard()).fit(BoringModel(), ckpt_path=tmp_path / "w.ckpt")


# After loading


def test_an_optimizer_ahead_of_the_counters_stops_the_run(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_all_steps(c, 12.0))
    with pytest.raises(CheckpointGuardError, match=r"optimizer steps 12, expected 7 .*5 more than expected"):
        resume(path, tmp_path)


def test_an_optimizer_behind_warns_and_strict_stops(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_all_steps(c, 6.0))
    with pytest.warns(UserWarning, match="CK401 optimizer steps 6, expected 7"):
        resume(path, tmp_path)
    with pytest.raises(CheckpointGuardError, match="has warnings, and strict is set: CK401"):
        resume(path, tmp_path, CheckpointGuard(strict=True))
    resume(path, tmp_path, CheckpointGuard(strict=True, step_tolerance=1))


class Fresh(Callback):
    """Loses the optimizer's state on the way, as a plugin or an override of load_state_dict may."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].state.clear()


def test_the_live_optimizer_is_judged_and_not_only_the_file(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match="CK402 optimizer 0 has no state"):
        quiet_trainer(tmp_path, Fresh(), CheckpointGuard()).fit(TinyModule(), ckpt_path=trained / "step=7.ckpt")


def test_a_scheduler_of_another_length_is_said(trained: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"CK504 learning rate 9\.306931e-03 at scheduler step 7, where this run's"):
        quiet_trainer(tmp_path, CheckpointGuard()).fit(TinyModule(total_steps=40), ckpt_path=trained / "step=7.ckpt")


def test_the_bounds_of_the_learning_rate_are_the_users(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match=r"above 1\.00e-03"):
        resume(trained / "step=7.ckpt", tmp_path, CheckpointGuard(strict=True, lr_bounds=(1e-8, 1e-3)))


@pytest.mark.parametrize(
    "options", [{"step_tolerance": -1}, {"lr_bounds": (2.0, 1.0)}, {"lr_bounds": (-1.0, 1.0)}, {"repair": "no"}]
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointGuardError, match="must be"):
        CheckpointGuard(**options)


# What it says


def test_the_resume_report(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = CheckpointGuard()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        resume(trained / "step=7.ckpt", tmp_path, guard)
    said = [r.getMessage() for r in caplog.records]
    assert f"resume from      {trained / 'step=7.ckpt'}" in said
    assert (
        "epoch            2 of 5 batches into epoch 1 (1 of 3 epochs done); continues with epoch 1, batch 2 of 5; "
        "0 batches trained twice; next LR 9.31e-03"
    ) in said
    assert "optimizer steps  7, expected 7" in said
    assert "scheduler steps  7, expected 7" in said
    assert "learning rate    1.00e-02 before restoring, 9.31e-03 after" in said
    assert "verdict          PASS" in said
    assert guard.report is not None
    assert guard.report.facts.live
    assert guard.report.verdict is Verdict.PASS


def test_a_resume_that_would_train_nothing_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match=r"CK906 max_epochs is 3, and 3 epochs are done.*train nothing"):
        resume(trained / "epoch=2.ckpt", tmp_path)


# The continuation is exact


def whole_run(folder: Path, **options: Any) -> TinyModule:
    torch.manual_seed(1)
    module = TinyModule(asks_for_total=options.pop("asks_for_total", False))
    quiet_trainer(folder, CheckpointGuard(), every_step(folder), every_epoch(folder), **options).fit(module)
    return module


@pytest.mark.parametrize(
    "asks_for_total", [False, True], ids=["loader made late", "loader made by configure_optimizers"]
)
@pytest.mark.parametrize("saved", ["step=1", "step=7", "step=9", "step=10", "epoch=0", "epoch=1", "step=14"])
def test_a_resumed_run_equals_the_one_that_never_stopped(saved: str, asks_for_total: bool, tmp_path: Path) -> None:
    never_stopped = whole_run(tmp_path, asks_for_total=asks_for_total)
    done = torch.load(tmp_path / f"{saved}.ckpt", weights_only=True)["global_step"]
    torch.manual_seed(99)
    resumed = TinyModule(asks_for_total=asks_for_total)
    quiet_trainer(tmp_path / "again", CheckpointGuard()).fit(resumed, ckpt_path=tmp_path / f"{saved}.ckpt")
    assert resumed.rows == never_stopped.rows[done:]
    assert resumed.losses == never_stopped.losses[done:]
    for name, tensor in never_stopped.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_without_the_guard_such_a_run_trains_other_rows(tmp_path: Path) -> None:
    """What the guard is for; should Lightning mend it, `restore_loader_position` can go."""
    never_stopped = whole_run(tmp_path, asks_for_total=True)
    resumed = TinyModule(asks_for_total=True)
    quiet_trainer(tmp_path / "again").fit(resumed, ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.rows != never_stopped.rows[7:]


def test_every_row_is_trained_once_an_epoch_across_a_resume(tmp_path: Path) -> None:
    never_stopped = whole_run(tmp_path)
    resumed = resume(tmp_path / "step=7.ckpt", tmp_path / "again")
    rows = never_stopped.rows[:7] + resumed.rows
    for epoch in range(3):
        batches = rows[epoch * BATCHES : (epoch + 1) * BATCHES]
        assert sorted(row for batch in batches for row in batch) == list(range(20))


class Draws(Callback):
    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


def test_every_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    before, after = Draws(), Draws()
    quiet_trainer(tmp_path, before, CheckpointGuard(), every_step(tmp_path)).fit(TinyModule())
    quiet_trainer(tmp_path / "again", after, CheckpointGuard()).fit(TinyModule(), ckpt_path=tmp_path / "step=7.ckpt")
    assert after.drawn == before.drawn[7:]


# The recovery checkpoint


class Files(Callback):
    """The files in a folder after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[list[str]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(sorted(p.stem for p in self.folder.glob("*.ckpt")))


def test_the_recovery_checkpoint_lives_inside_an_epoch(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    recovery = RecoveryCheckpoint(str(tmp_path), every_n_train_steps=2)
    files = Files(tmp_path)
    # Callbacks that are checkpoints run last, so the files seen are those of the batch before.
    quiet_trainer(tmp_path, last, recovery, files).fit(TinyModule())
    assert files.seen[:8] == [
        [],
        [],
        ["recovery_checkpoint"],
        ["recovery_checkpoint"],
        ["recovery_checkpoint"],
        ["last"],
        ["last", "recovery_checkpoint"],
        ["last", "recovery_checkpoint"],
    ]
    assert sorted(p.stem for p in tmp_path.glob("*.ckpt")) == ["last"]


def test_the_recovery_checkpoint_stays_where_nothing_else_was_saved(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, RecoveryCheckpoint(str(tmp_path), every_n_train_steps=2)).fit(TinyModule())
    assert [p.stem for p in tmp_path.glob("*.ckpt")] == ["recovery_checkpoint"]
