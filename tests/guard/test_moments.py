"""Where a save lies: one that is made while something else ends the run promises no more than a resume can keep."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from builders import SavesAsEpochsBegin
from exact_runs import BATCH_SIZE, BATCHES, Recorded, differences, train
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")
NO_MOMENT = "not promised: it was saved at no moment that a run can go on at"


def exactness(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("exact  ")]
    return line.removeprefix("exact").strip()


class Stopped(Exception):
    pass


def stop_once(module: Recorded, epoch: int = 1) -> None:
    trainer = module.trainer
    if trainer.ckpt_path is None and trainer.current_epoch == epoch and not trainer.sanity_checking:
        raise Stopped


class InValidation(Recorded):
    def on_validation_epoch_start(self) -> None:
        stop_once(self)


class AtAnEpochsEnd(Recorded):
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        stop_once(self)


class AtABatchsEnd(Recorded):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        stop_once(self)


class AtAnEpochsStart(Recorded):
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        stop_once(self, epoch=0)


@pytest.mark.parametrize("kind", [InValidation, AtAnEpochsEnd, AtABatchsEnd, AtAnEpochsStart])
def test_what_is_saved_as_a_hook_fails_is_not_called_exact(
    kind: type[Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, {}, {}, callbacks=(OnExceptionCheckpoint(tmp_path, "stopped"),), kind=kind)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, {}, tmp_path / "stopped.ckpt", kind=kind)
    assert exactness(caplog).startswith("not promised: it was saved " + ("in" if kind is AtAnEpochsStart else "at no"))


def test_a_batch_whose_last_hook_failed_was_the_end_of_a_plain_loaders_order(tmp_path: Path) -> None:
    """Its step is done: Lightning goes on with the next one."""
    module = {"order": "plain"}
    with pytest.raises(Stopped):
        train(tmp_path, module, {}, callbacks=(OnExceptionCheckpoint(tmp_path, "stopped"),), kind=AtABatchsEnd)
    whole = train(tmp_path / "whole", module, {})
    again = train(tmp_path / "again", module, {}, tmp_path / "stopped.ckpt", seed=9, kind=AtABatchsEnd)
    rows = [[event[4] for event in run["events"] if event[0] == "step" and event[1] == 1] for run in (whole, again)]
    assert rows[0][1:] == rows[1]


def nothing_of_row_10(rows: list[Any]) -> Any:
    return None if any(row == 10 for _, _, row in rows) else default_collate(rows)


class Skipping(Recorded):
    """Its loader gives None in place of a batch, which Lightning passes over."""

    def train_dataloader(self) -> StatefulDataLoader:
        loader = super().train_dataloader()
        return StatefulDataLoader(
            loader.dataset, batch_size=BATCH_SIZE, sampler=loader.sampler, collate_fn=nothing_of_row_10
        )


def test_after_a_batch_of_none_every_save_was_of_no_moment_and_log_lines_were_counted_on_by_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("batch-2", "batch-3", f"batch-{BATCHES}", "validation-1", "epoch-1", f"batch-{BATCHES + 2}")
    whole = train(tmp_path, {}, {"max_epochs": 2}, saves=names, kind=Skipping)
    assert sum(event[0] == "step" for event in whole["events"]) == 2 * (BATCHES - 1)
    for name in names:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(tmp_path / "a", {}, {"max_epochs": 2}, tmp_path / f"{name}.ckpt", seed=9, kind=Skipping)
        assert differences(whole, again) == [], name
        assert exactness(caplog) == "bit for bit", name


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_that_a_save_began_in_is_counted_once(epoch: int, tmp_path: Path) -> None:
    whole = train(tmp_path, {}, {"max_epochs": 2}, callbacks=(SavesAsEpochsBegin(tmp_path),))
    path = tmp_path / f"start-{epoch}.ckpt"
    again = train(tmp_path / "a", {}, {"max_epochs": 2}, path, (SavesAsEpochsBegin(tmp_path / "b"),), seed=9)
    steps = [[event[:5] for event in run["events"] if event[0] == "step"] for run in (whole, again)]
    assert steps[1] == steps[0][epoch * BATCHES :]
    for counter in ("epoch", "batch", "optimizer"):
        assert again["counters"][counter] == whole["counters"][counter]


class Signalled(Callback):
    """The run gets SIGTERM in a batch, once."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.ckpt_path is None and trainer.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("guards_signals", [True, False])
def test_a_save_on_a_signals_exception_before_a_validation_is_done_was_called_exact(
    guards_signals: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The guard raises it in the batch's last hook where a validation is due, and Lightning inside the validation."""
    trainer, guard = {"val_check_interval": 2}, CheckpointGuard(save_on_signal=guards_signals)
    saves = OnExceptionCheckpoint(tmp_path, "stopped"), ModelCheckpoint(tmp_path, "{step}")
    with pytest.raises(SystemExit):
        train(tmp_path, {}, trainer, callbacks=(Signalled(2), *saves), guard=guard)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, trainer, tmp_path / "stopped.ckpt", (Signalled(2),))
    assert exactness(caplog).startswith(NO_MOMENT)


@pytest.mark.parametrize("at", [3, BATCHES])
def test_a_save_on_lightnings_exception_after_a_batch_is_exact(
    at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, guard = {"val_check_interval": 2}, CheckpointGuard(save_on_signal=False)
    whole = train(tmp_path / "whole", {}, trainer)
    callbacks = Signalled(at), OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(SystemExit):
        train(tmp_path, {}, trainer, callbacks=callbacks, guard=guard)
    with caplog.at_level(logging.INFO):
        again = train(tmp_path / "again", {}, trainer, tmp_path / "stopped.ckpt", seed=9)
    assert exactness(caplog) == "bit for bit"
    assert differences(whole, again) == []


def test_an_epoch_that_max_steps_cuts_off_is_not_called_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, {}, {"max_steps": BATCHES + 2}, saves=("epoch-2",))
    whole = train(tmp_path / "whole", {}, {})
    with caplog.at_level(logging.INFO):
        again = train(tmp_path / "again", {}, {}, tmp_path / "epoch-2.ckpt")
    print(exactness(caplog), differences(whole, again))
    assert exactness(caplog).startswith(NO_MOMENT)
