"""Where a save lies: one that is made while something else ends the run promises no more than a resume can keep."""

from __future__ import annotations

import copy
import logging
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SavesAsEpochsBegin, quiet_trainer
from exact_runs import BATCH_SIZE, BATCHES, ROWS, Everywhere, InMemory, Recorded, differences, exactness, train
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from torch import Tensor
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")
NO_MOMENT = "not promised: it was saved at no moment that a run can go on at"


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


def test_what_is_saved_once_a_fit_has_failed_is_not_called_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lightning has reset the loaders by then."""
    trainers: list[Any] = []

    class Keeps(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainers.append(trainer)

    with pytest.raises(Stopped):
        train(tmp_path, {}, {}, callbacks=(Keeps(),), kind=AtABatchsEnd)
    trainers[0].save_checkpoint(tmp_path / "later.ckpt")
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, {}, tmp_path / "later.ckpt", kind=AtABatchsEnd)
    assert exactness(caplog).startswith("not promised: it was saved at no moment")


@pytest.mark.parametrize("order", ["sampler", "plain"])
def test_a_batch_whose_last_hook_failed_is_passed_over_by_any_loader(order: str, tmp_path: Path) -> None:
    """Its step is done: Lightning goes on with the next one."""
    module = {"order": order}
    with pytest.raises(Stopped):
        train(tmp_path, module, {}, callbacks=(OnExceptionCheckpoint(tmp_path, "stopped"),), kind=AtABatchsEnd)
    whole = train(tmp_path / "whole", module, {})
    again = train(tmp_path / "again", module, {}, tmp_path / "stopped.ckpt", seed=9, kind=AtABatchsEnd)
    rows = [[event[4] for event in run["events"] if event[0] == "step" and event[1] == 1] for run in (whole, again)]
    assert rows[0][1:] == rows[1]


class AtTheLastBatchsEnd(Recorded):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCHES - 1:
            stop_once(self)


@pytest.mark.parametrize("order", ["sampler", "shuffle", "plain"])
@pytest.mark.parametrize("kind", [AtTheLastBatchsEnd, InValidation])
def test_what_failed_after_an_epochs_last_batch_leaves_the_next_epoch_whole(
    kind: type[Recorded], order: str, tmp_path: Path
) -> None:
    saves = OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(Stopped):
        train(tmp_path, {"order": order}, {}, callbacks=(saves,), kind=kind)
    again = train(tmp_path / "again", {"order": order}, {}, tmp_path / "stopped.ckpt", seed=9, kind=kind)
    steps = [event for event in again["events"] if event[0] == "step"]
    assert {event[1] for event in steps} == {2}
    assert sorted(row for event in steps for row in event[4]) == list(range(ROWS))


class InAStep(Recorded):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            stop_once(self)
        return super().training_step(batch, batch_idx)


def test_gradients_are_accumulated_as_the_epoch_has_it_after_a_step_that_failed_in_it(tmp_path: Path) -> None:
    def scheduler() -> Callback:
        return GradientAccumulationScheduler({0: 1, 1: 2})

    module = {"order": "plain"}
    callbacks = scheduler(), OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(Stopped):
        train(tmp_path, module, {}, callbacks=callbacks, kind=InAStep)
    again = train(tmp_path / "again", module, {}, tmp_path / "stopped.ckpt", (scheduler(),), kind=InAStep)
    assert again["counters"]["optimizer"]["total"]["completed"] == BATCHES + 2 * -(-BATCHES // 2)


def nothing_of_row_10(rows: list[Any]) -> Any:
    return None if any(row == 10 for _, _, row in rows) else default_collate(rows)


class Skipping(Recorded):
    """Its loader gives None in place of a batch, which Lightning passes over."""

    def train_dataloader(self) -> StatefulDataLoader:
        loader = super().train_dataloader()
        return StatefulDataLoader(
            loader.dataset, batch_size=BATCH_SIZE, sampler=loader.sampler, collate_fn=nothing_of_row_10
        )


def test_batches_of_none_count_in_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


class FailingLogger(InMemory):
    """Fails with the second batch, before the validation that is due after it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step == 1:
            raise Stopped


class FailsOnASignal(Recorded):
    """Fails once with the batch that was just fetched, as SIGTERM has come."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training and self.trainer.ckpt_path is None and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped
        return batch


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Recorded, {"logger": FailingLogger(), "val_check_interval": 2}), (FailsOnASignal, {})],
    ids=["before a validation", "with a batch fetched"],
)
def test_what_is_saved_as_something_fails_between_two_batches_is_not_called_exact(
    kind: type[Recorded], options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks, guard = (OnExceptionCheckpoint(tmp_path, "stopped"),), CheckpointGuard(save_on_signal=False)
    with pytest.raises(Stopped):
        train(tmp_path, {}, options, callbacks=callbacks, guard=guard, kind=kind)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, {**options, "logger": False}, tmp_path / "stopped.ckpt", kind=kind)
    assert exactness(caplog).startswith(NO_MOMENT)


class SavesAsAFitBegins(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[str] = []

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / "c.ckpt")
        saved = torch.load(self.folder / "c.ckpt", weights_only=True)
        self.points.append(saved["callbacks"]["CheckpointGuard"]["resume"]["point"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)


def test_a_further_fit_of_a_trainer_that_failed_inside_an_epoch_begins_at_no_moment(tmp_path: Path) -> None:
    module, saves = InValidation(), SavesAsAFitBegins(tmp_path)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), saves, max_epochs=4, enable_checkpointing=True)
    with pytest.raises(Stopped):
        trainer.fit(module)
    saves.points.clear()
    with pytest.raises(Stopped):
        trainer.fit(module)
    assert set(saves.points) == {"elsewhere"}


class Signalled(Callback):
    """The run gets SIGTERM in a batch, once."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.ckpt_path is None and trainer.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("guards_signals", [True, False])
def test_a_save_on_a_signals_exception_before_a_validation_is_done_is_not_called_exact(
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


# Why a run was to stop, and whether it is to stop once it is resumed


class StopsItself(Recorded):
    def on_train_batch_start(self, *_: Any) -> None:
        self.trainer.should_stop = True


def early_stopping(**options: Any) -> EarlyStopping:
    return EarlyStopping("val_loss", check_on_train_epoch_end=False, **options)


STOPS: dict[str, tuple[type[Recorded], Callback, str, bool, bool]] = {
    # the save after, whether it stops early again, whether it is said that it trains on
    "patience": (Recorded, early_stopping(patience=1, min_delta=10.0), "validation-2", True, False),
    "at an epoch's end": (Recorded, EarlyStopping("val_loss", patience=1, min_delta=10.0), "epoch-2", True, False),
    "a threshold": (Recorded, early_stopping(patience=9, stopping_threshold=10.0), "validation-1", True, False),
    "the module": (StopsItself, early_stopping(patience=9), "epoch-1", False, True),
    "a time limit": (Recorded, Timer(timedelta(microseconds=1)), "epoch-1", False, False),
}


def why_it_stops(path: Path) -> tuple[bool, bool]:
    state = torch.load(path, weights_only=True)["callbacks"]["CheckpointGuard"]["resume"]
    return state["early_stop"], state["told_to_stop"]


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_stops_again_only_where_it_had_stopped_early(stop: str, tmp_path: Path) -> None:
    kind, callback, name, *wanted = STOPS[stop]
    train(tmp_path, {}, {}, callbacks=(copy.deepcopy(callback),), saves=(name,), kind=kind)
    path = tmp_path / f"{name}.ckpt"
    assert why_it_stops(path) == tuple(wanted)
    again = train(tmp_path / "again", {}, {}, path, (copy.deepcopy(callback),), saves=None)
    if wanted[0]:
        assert [event[0] for event in again["events"]] == ["epoch", "end"][name == "epoch-2" :]
        for after in (tmp_path / "again").glob("*.ckpt"):
            assert why_it_stops(after) == tuple(wanted)


def test_a_trainer_that_stopped_early_and_is_told_to_fit_on_saves_that_it_does(tmp_path: Path) -> None:
    saves = Everywhere(tmp_path, ("batch-15",))
    early = early_stopping(patience=1, min_delta=10.0)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), early, saves, max_epochs=6, enable_checkpointing=True)
    module = Recorded()
    trainer.fit(module)
    assert trainer.current_epoch == 2
    trainer.fit(module)
    assert why_it_stops(tmp_path / "batch-15.ckpt") == (False, False)


def test_a_run_that_a_signal_told_to_stop_is_not_said_to_have_been_told_for_good(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.received_sigterm

    callbacks = Signalled(BATCHES), Stops(), OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(SystemExit):
        train(tmp_path, {}, {}, callbacks=callbacks, guard=CheckpointGuard(save_on_signal=False))
    assert why_it_stops(tmp_path / "stopped.ckpt") == (False, False)
