"""Loaders that are made before a checkpoint is loaded, streams, and what stands at an epoch's end, at a restart."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, quiet_trainer
from exact_runs import BATCH_SIZE, BATCHES, ROWS, Counting, Recorded, differences, exactness, train
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard import CheckpointGuard
from enstack_lightning.guard.restart import fetched_ahead

pytestmark = pytest.mark.filterwarnings("ignore")


class OfAStream(Recorded):
    def train_dataloader(self) -> Any:
        if self.order != "stream":
            return super().train_dataloader()
        return StatefulDataLoader(Counting(), self.batch_size, num_workers=self.num_workers)


class AsksInSetup(OfAStream):
    """Makes its training loader before the checkpoint is loaded, to know how many steps there will be."""

    def setup(self, stage: str) -> None:
        self.steps = self.trainer.estimated_stepping_batches


class AsksForASchedule(OfAStream):
    """Makes it before the loops are restored."""

    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator", "plain", "stream"])
@pytest.mark.parametrize("kind", [OfAStream, AsksForASchedule, AsksInSetup])
def test_a_loader_goes_on_whenever_it_is_made(kind: type[Recorded], order: str, tmp_path: Path) -> None:
    names = ("batch-2", f"batch-{BATCHES}", f"batch-{BATCHES + 2}", "validation-1", "epoch-1")
    module, trainer = {"order": order}, {"max_epochs": 2}
    whole = train(tmp_path, module, trainer, saves=names, kind=kind)
    for name in names:
        again = train(tmp_path / "again", module, trainer, tmp_path / f"{name}.ckpt", seed=9, kind=kind)
        assert differences(whole, again) == [], name


# With batches of another size


def of_another_size(folder: Path, name: str, batch_size: int, **trainer: Any) -> Any:
    """The run that was saved at a moment, and the one that goes on from it."""
    whole = train(folder, {}, trainer, saves=(name,))
    path = folder / f"{name}.ckpt"
    return whole, train(folder / "again", {"batch_size": batch_size}, trainer, path, seed=9)


def steps_in(run: dict[str, Any], epoch: int) -> list[Any]:
    return [event for event in run["events"] if event[0] == "step" and event[1] == epoch]


def test_loggers_count_each_step_once_where_a_validation_was_due_after_as_many_batches(tmp_path: Path) -> None:
    _, again = of_another_size(tmp_path, "batch-9", 2, max_epochs=2, val_check_interval=2)
    assert len(steps_in(again, 1)) == 10
    assert again["counters"]["stepped"] == 9 + 10
    assert again["counters"]["batch"]["total"]["completed"] == BATCHES + ROWS // 2


def test_no_more_batches_are_trained_than_the_epoch_is_limited_to(tmp_path: Path) -> None:
    _, again = of_another_size(tmp_path, "batch-5", 2, max_epochs=2, limit_train_batches=4)
    assert [step[2] for step in steps_in(again, 1)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "left"), [("batch-9", 20), ("batch-14", 0)])
@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator", "plain", "stream"])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_an_epoch_ends_as_any_other_with_batches_of_another_size(
    batch_size: int, order: str, name: str, left: int, tmp_path: Path
) -> None:
    trainer = {"max_epochs": 3}
    whole = train(tmp_path, {"order": order}, trainer, saves=(name,), kind=OfAStream)
    module, path = {"order": order, "batch_size": batch_size}, tmp_path / f"{name}.ckpt"
    again = train(tmp_path / "again", module, trainer, path, seed=9, kind=OfAStream)
    if order != "plain":  # whose order is drawn anew
        before, rows = list(chain(*rows_of(whole, 1)))[: ROWS - left], list(chain(*rows_of(again, 1)))
        assert sorted(before + rows) == list(range(ROWS))
    assert validations(again) == [1, 2]
    assert len(rows_of(again, 2)) == ROWS // batch_size


@pytest.mark.parametrize("name", ["batch-9", "epoch-1"])
def test_an_epoch_that_was_not_begun_is_trained_whole(name: str, tmp_path: Path) -> None:
    _, again = of_another_size(tmp_path, name, 2, max_epochs=3)
    assert [step[2] for step in steps_in(again, 2)] == list(range(ROWS // 2))
    assert len(steps_in(again, 1)) == (10 if name == "batch-9" else ROWS // 2)


def test_gradients_of_batches_of_another_size_are_left_out(tmp_path: Path) -> None:
    def without_gradients(checkpoint: dict[str, Any]) -> None:
        (rank,) = checkpoint["callbacks"]["CheckpointGuard"]["resume"]["ranks"]
        assert rank["gradients"]
        rank["gradients"] = {}

    trainer = {"accumulate_grad_batches": 3, "max_epochs": 2}
    train(tmp_path, {}, trainer, saves=("batch-9",))
    kept = tmp_path / "batch-9.ckpt"
    bare = edited(kept, tmp_path / "bare.ckpt", without_gradients)
    runs = [train(tmp_path / "again", {"batch_size": 2}, trainer, path, seed=9) for path in (kept, bare)]
    assert runs[0]["weights"] == runs[1]["weights"]


# Workers of validation that last


def test_workers_that_had_not_started_start_when_they_would_have(tmp_path: Path) -> None:
    module = {"num_workers": 1, "persistent": True}
    trainer = {"num_sanity_val_steps": 0, "max_epochs": 2}
    whole = train(tmp_path, module, trainer, saves=("batch-2",))
    assert differences(whole, train(tmp_path / "again", module, trainer, tmp_path / "batch-2.ckpt", seed=9)) == []


# Of another number of processes


class Sees(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics.get("val_loss", -1)))


def test_callbacks_see_the_figures_that_they_saw_last(tmp_path: Path) -> None:
    def of_two(checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"]["CheckpointGuard"]["resume"]["ranks"] *= 2

    before, after = Sees(), Sees()
    train(tmp_path, {}, {"max_epochs": 2}, callbacks=(before,), saves=("batch-9",))
    path = edited(tmp_path / "batch-9.ckpt", tmp_path / "two.ckpt", of_two)
    train(tmp_path / "again", {}, {"max_epochs": 2}, path, (after,), seed=9)
    assert after.seen[0] == before.seen[9] > 0


# Loaders that are made anew by epoch


class NumberedEarly(AsksForASchedule):
    """Notes the epoch that its training loader is made in, which is made before the loops are restored as well."""

    def train_dataloader(self) -> Any:
        self.events.append(["step", float(self.trainer.current_epoch)])
        return super().train_dataloader()


def test_a_loader_of_a_schedule_is_made_again_as_in_the_epoch_that_it_was_made_in(tmp_path: Path) -> None:
    trainer = {"reload_dataloaders_every_n_epochs": 3, "max_epochs": 6}
    train(tmp_path, {}, trainer, saves=(f"batch-{4 * BATCHES + 2}",))
    again = train(
        tmp_path / "again", {}, trainer, tmp_path / f"batch-{4 * BATCHES + 2}.ckpt", seed=9, kind=NumberedEarly
    )
    assert [event[1] for event in again["events"] if len(event) == 2 and event[0] == "step"][-1] == 3.0


# After a restart that failed


class Failed(Exception):
    pass


class FailsOnce(OfAStream):
    """Fails in a hook of the first run, and notes in the second what the loops have of their own as it starts."""

    def __init__(self, hook: str, order: str) -> None:
        super().__init__(order=order)
        self.hook, self.failed = hook, False
        self.left: set[str] = set()

    def on_fit_start(self) -> None:
        self._fail("on_fit_start")

    def on_train_start(self) -> None:
        self._fail("on_train_start")

    def _fail(self, hook: str) -> None:
        if not self.failed and hook == self.hook:
            self.failed = True
            raise Failed
        if self.failed:
            loop = self.trainer.fit_loop
            for owner in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
                self.left |= {"setup_data", "reset", "advance", "on_run_start"} & set(vars(owner))


OPTIONS = {"reload_dataloaders_every_n_epochs": 1, "check_val_every_n_epoch": 3, "max_epochs": 2}


@pytest.mark.parametrize("order", ["stream", "plain"])
def test_a_restart_that_failed_leaves_nothing_to_the_next_fit(order: str, tmp_path: Path) -> None:
    names = ("batch-2", "epoch-1")
    train(tmp_path, {"order": order}, OPTIONS, saves=names, kind=OfAStream)
    for name in names:
        module, trainer = FailsOnce("on_train_start", order), quiet_trainer(tmp_path, CheckpointGuard(), **OPTIONS)
        with pytest.raises(Failed):
            trainer.fit(module, ckpt_path=tmp_path / f"{name}.ckpt")
        trainer.fit(module)
        assert module.left == set()


def test_a_restart_that_failed_early_leaves_the_sanity_check_to_later_fits(tmp_path: Path) -> None:
    """Lightning resumes again in the next fit, as it has the checkpoint still."""
    train(tmp_path, {}, OPTIONS, saves=("batch-2",))
    module, trainer = FailsOnce("on_fit_start", "sampler"), quiet_trainer(tmp_path, CheckpointGuard(), **OPTIONS)
    with pytest.raises(Failed):
        trainer.fit(module, ckpt_path=tmp_path / "batch-2.ckpt")
    trainer.fit(module)
    assert trainer.num_sanity_val_steps == 2


# Saves inside a step


class Fails(OfAStream):
    """Ends its second epoch with an exception: in a step or before it."""

    in_hook, at_batch = "training_step", 0

    def _fail(self, hook: str, batch_idx: int) -> None:
        if (hook, self.trainer.current_epoch, batch_idx) == (self.in_hook, 1, self.at_batch):
            raise RuntimeError("out of memory")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._fail("on_train_batch_start", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._fail("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._fail("on_before_zero_grad", self.trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._fail("on_train_batch_end", batch_idx)
        super().on_train_batch_end(outputs, batch, batch_idx)


class SavesWhatFailed(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def rows_of(run: dict[str, Any], epoch: int) -> list[Any]:
    return [event[4] for event in run["events"] if event[0] == "step" and event[1] == epoch]


def validations(run: dict[str, Any]) -> list[int]:
    return [event[1] for event in run["events"] if event[0] == "validation"]


def steps_of_loggers(run: dict[str, Any]) -> list[int]:
    return [step for step, _ in run["lines"]]


STEP = ("on_train_batch_start", "training_step", "on_before_zero_grad")


def fail(
    folder: Path,
    module: dict[str, Any],
    hook: str,
    at_batch: int,
    path: Path | None = None,
    kind: type[Fails] = Fails,
    **trainer: Any,
) -> Path:
    """Trains until an exception, from the start or from a checkpoint, and returns what it saves."""
    failed = folder / "failed.ckpt"
    failing = type("Failing", (kind,), {"in_hook": hook, "at_batch": at_batch})
    saves, seed = (SavesWhatFailed(failed),), 1 if path is None else 9
    with pytest.raises(RuntimeError, match="out of memory"):
        train(folder, module, {"max_epochs": 2, **trainer}, path, saves, seed=seed, kind=failing)
    return failed


def after_a_failure(
    folder: Path, module: dict[str, Any], hook: str, at_batch: int, batch_size: int = BATCH_SIZE, **trainer: Any
) -> tuple[Any, Any]:
    """The run that never failed, and the one that goes on from what an exception saved, with batches of a size."""
    trainer = {"max_epochs": 2, **trainer}
    whole = train(folder, module, trainer, kind=OfAStream)
    path = fail(folder, module, hook, at_batch, **trainer)
    then = {**module, "batch_size": batch_size}
    return whole, train(folder / "again", then, trainer, path, seed=9, kind=OfAStream)


@pytest.mark.parametrize("at_batch", [2, BATCHES - 1])
@pytest.mark.parametrize("order", ["sampler", "plain", "stream"])
def test_the_batch_of_a_step_that_failed_comes_from_workers(order: str, at_batch: int, tmp_path: Path) -> None:
    whole, again = after_a_failure(tmp_path, {"order": order, "num_workers": 1}, "training_step", at_batch)
    assert rows_of(again, 1) == rows_of(whole, 1)[at_batch:]
    assert validations(again) == [1]


@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator", "plain", "stream"])
@pytest.mark.parametrize(
    ("hook", "at_batch"), [(hook, n) for n in (0, 2, BATCHES - 1) for hook in STEP] + [("on_train_batch_end", 2)]
)
def test_the_batch_of_a_step_that_failed_is_trained(order: str, hook: str, at_batch: int, tmp_path: Path) -> None:
    whole, again = after_a_failure(tmp_path, {"order": order}, hook, at_batch)
    rows, expected = rows_of(again, 1), rows_of(whole, 1)[at_batch + (hook == "on_train_batch_end") :]
    if order == "plain" and at_batch == 0:  # of an epoch that nothing is trained of the order is drawn anew
        rows, expected = ([sorted(chain.from_iterable(batches))] for batches in (rows, expected))
    assert rows == expected
    assert validations(again) == [1]
    assert again["counters"] == whole["counters"]
    assert steps_of_loggers(again) == steps_of_loggers(whole)[again["begins"][1] :]


@pytest.mark.parametrize(
    "trainer",
    [{}, {"accumulate_grad_batches": 2}, {"check_val_every_n_epoch": None, "val_check_interval": 2}],
    ids=["each batch", "accumulation", "validation by batches of all epochs"],
)
@pytest.mark.parametrize("order", ["shuffle", "plain", "stream"])
def test_a_step_that_failed_before_it_drew_a_number_is_taken_as_if_it_had_not(
    order: str, trainer: dict[str, Any], tmp_path: Path
) -> None:
    whole, again = after_a_failure(tmp_path, {"order": order}, "training_step", 2, **trainer)
    assert differences(whole, again) == []


class ByHand(Fails):
    """Steps after every second batch, by hand; ends with an exception once it has the gradients of a batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        self._fail("manual_backward", batch_idx)
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def test_gradients_of_a_step_that_failed_are_not_added_again(tmp_path: Path) -> None:
    """They cannot be told from those of its accumulation window that came before."""
    path = fail(tmp_path, {}, "manual_backward", 1, kind=ByHand)
    (rank,) = torch.load(path)["callbacks"]["CheckpointGuard"]["resume"]["ranks"]
    assert not rank.get("gradients")


@pytest.mark.parametrize("at_batch", [0, 2])
def test_an_epoch_ends_as_any_other_where_the_batch_of_a_step_that_failed_is_left_out(
    at_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched_ahead, "MOST_BYTES", 10)
    whole, again = after_a_failure(tmp_path, {}, "training_step", at_batch)
    assert rows_of(again, 1) == rows_of(whole, 1)[at_batch + 1 :]
    assert validations(again) == [1]
    assert again["counters"]["batch"] == whole["counters"]["batch"]
    assert again["counters"]["stepped"] == again["counters"]["optimizer"]["total"]["completed"] == 2 * BATCHES - 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("order", ["sampler", "shuffle"])
@pytest.mark.parametrize("at_batch", [0, 2, BATCHES - 1])
def test_an_epoch_whose_step_failed_ends_as_any_other_with_batches_of_another_size(
    at_batch: int, order: str, num_workers: int, tmp_path: Path
) -> None:
    """No batch is of the size for which the memory was too small."""
    module = {"order": order, "num_workers": num_workers}
    whole, again = after_a_failure(tmp_path, module, "training_step", at_batch, batch_size=2, max_epochs=3)
    before, batches = rows_of(whole, 1)[:at_batch], rows_of(again, 1)
    assert sorted(chain(*before, *batches)) == list(range(ROWS))
    assert {len(batch) for batch in batches} == {2}
    assert [step[2] for step in steps_in(again, 1)] == list(range(ROWS // 2))[-len(batches) :]
    assert validations(again) == [1, 2]
    assert [event[1] for event in again["events"] if event[0] == "epoch"] == [1, 2]
    steps = BATCHES + at_batch + len(batches) + ROWS // 2
    assert again["counters"]["stepped"] == steps
    assert again["counters"]["optimizer"]["total"] == {"ready": steps, "completed": steps}
    assert again["counters"]["batch"]["total"]["completed"] == BATCHES + ROWS
    assert sorted(set(steps_of_loggers(again))) == list(range(BATCHES + at_batch, steps))


# Saves on an exception of a batch's last hook


@pytest.mark.parametrize("at_batch", [2, BATCHES - 1])
@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator", "plain", "stream"])
def test_what_was_due_after_a_batch_whose_hook_failed_is_done(order: str, at_batch: int, tmp_path: Path) -> None:
    """In the last batch of all the validation and the epoch's end are due, and nothing is to be trained."""
    whole, again = after_a_failure(tmp_path, {"order": order}, "on_train_batch_end", at_batch)
    assert differences(whole, again) == []


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ({"plateau": True}, {}),
        ({}, {"val_check_interval": 3}),
        ({}, {"accumulate_grad_batches": 4}),
        ({}, {"check_val_every_n_epoch": 3, "max_epochs": 3}),
    ],
    ids=["plateau", "validation inside", "accumulation", "no validation"],
)
@pytest.mark.parametrize("at_batch", [2, BATCHES - 1])
def test_what_was_due_after_a_batch_whose_hook_failed_is_done_as_the_run_is_set(
    module: dict[str, Any], trainer: dict[str, Any], at_batch: int, tmp_path: Path
) -> None:
    whole, again = after_a_failure(tmp_path, module, "on_train_batch_end", at_batch, **trainer)
    assert differences(whole, again) == []


class FailsAtTheEnd(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 * BATCHES:
            pl_module.eval()  # as to draw samples, of which the exception is
            raise RuntimeError("out of memory")


def test_the_last_epoch_ends_after_a_callback_failed_in_its_last_batch(tmp_path: Path) -> None:
    trainer = {"max_epochs": 2}

    def saves() -> Callback:
        return ModelCheckpoint(tmp_path, "{epoch}-{step}", "val_loss", save_top_k=-1, save_on_exception=True)

    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, {}, trainer, callbacks=(FailsAtTheEnd(), saves()))
    failed, ended = (tmp_path / f"epoch=1-step={2 * BATCHES}{version}.ckpt" for version in ("", "-v1"))
    again = train(tmp_path, {}, trainer, failed, (saves(),), seed=9)
    assert differences(train(tmp_path / "whole", {}, trainer), again) == []
    with pytest.raises(CheckpointGuardError, match="CK906 max_epochs is 2, and 2 epochs are done"):
        train(tmp_path, {}, trainer, ended)


def test_layers_that_a_failed_hook_had_put_into_evaluation_are_trained(tmp_path: Path) -> None:
    trainer, path = {"max_epochs": 3}, tmp_path / "failed.ckpt"
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, {}, trainer, callbacks=(FailsAtTheEnd(), SavesWhatFailed(path)))
    again = train(tmp_path / "again", {}, trainer, path, seed=9)
    assert differences(train(tmp_path / "whole", {}, trainer), again) == []


# More than one failure in an epoch


class OfFewRows(Fails):
    """Of batches of one row too; ends with no exception."""

    at_batch = -1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network[1] = torch.nn.Identity()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("order", ["sampler", "shuffle"])
def test_pieces_of_a_batch_that_wait_are_in_the_saves_between_them(
    order: str, num_workers: int, tmp_path: Path
) -> None:
    failed = fail(tmp_path, {"order": order, "num_workers": num_workers}, "training_step", 2, kind=OfFewRows)
    smaller = {"order": order, "num_workers": num_workers, "batch_size": 2}
    name = f"batch-{BATCHES + 2 * BATCH_SIZE // 2 + 1}"  # after the first piece
    pieces = train(tmp_path / "pieces", smaller, {"max_epochs": 2}, failed, saves=(name,), kind=OfFewRows)
    assert sorted(map(len, rows_of(pieces, 1))) == [2] * ((ROWS - 2 * BATCH_SIZE) // 2)
    path = tmp_path / "pieces" / f"{name}.ckpt"
    again = train(tmp_path / "again", smaller, {"max_epochs": 2}, path, seed=9, kind=OfFewRows)
    assert rows_of(again, 1) == rows_of(pieces, 1)[1:]
    assert validations(again) == [1]
    assert (again["weights"], again["counters"]) == (pieces["weights"], pieces["counters"])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("order", ["sampler", "shuffle"])
def test_an_epoch_that_goes_on_with_batches_of_a_third_size_has_each_row_once(
    order: str, hook: str, num_workers: int, tmp_path: Path
) -> None:
    module = {"order": order, "num_workers": num_workers}
    whole = train(tmp_path, module, {"max_epochs": 2}, kind=OfFewRows)
    first = fail(tmp_path / "first", module, hook, 2, kind=OfFewRows)
    second = train(tmp_path / "whole", {**module, "batch_size": 3}, {"max_epochs": 2}, first, seed=9, kind=OfFewRows)
    at_batch = rows_index(second, 2)
    failed = fail(tmp_path / "second", {**module, "batch_size": 3}, hook, at_batch, first, OfFewRows)
    third = train(tmp_path / "third", {**module, "batch_size": 2}, {"max_epochs": 2}, failed, seed=9, kind=OfFewRows)
    done = 2 + (hook == "on_train_batch_end")
    rows = list(chain(*rows_of(whole, 1)[:done], *rows_of(second, 1)[:done], *rows_of(third, 1)))
    assert sorted(rows) == list(range(ROWS))
    assert validations(third) == [1]


def rows_index(run: dict[str, Any], number: int) -> int:
    """The index that Lightning gives to a batch of the second epoch."""
    return int(steps_in(run, 1)[number][2])


# Loaders that are not alone, or that the module asks itself


class OfADict(Fails):
    def train_dataloader(self) -> Any:
        return {"rows": super().train_dataloader()}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch["rows"], batch_idx)


def test_a_batch_of_loaders_in_a_dict_is_left_out_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = fail(tmp_path, {}, "training_step", 2, kind=OfADict), type("Whole", (OfADict,), {"at_batch": -1})
    with caplog.at_level(logging.INFO):
        again = train(tmp_path / "again", {}, {"max_epochs": 2}, path, seed=9, kind=whole)
    assert len(rows_of(again, 1)) == BATCHES - 3
    assert validations(again) == [1]
    assert "not promised" in exactness(caplog)


class AsksTheLoader(Fails):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        (features, _, _), batch_idx, _ = next(dataloader_iter)
        self._fail("training_step", batch_idx)
        return self.network(features).square().mean()

    def on_train_epoch_end(self) -> None:
        """Logs nothing: Lightning would have to be told the size of each batch."""


def test_no_batch_of_a_validation_is_kept_as_one_of_a_training(tmp_path: Path) -> None:
    path = fail(tmp_path, {}, "training_step", 2, kind=AsksTheLoader)
    (rank,) = torch.load(path)["callbacks"]["CheckpointGuard"]["resume"]["ranks"]
    assert not rank.get("fetched")
