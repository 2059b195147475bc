"""`CheckpointGuard(repair=True)`: what the checkpoint proves is set right, all else is left, and both are said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    LEARNING_RATE,
    SavesAsEpochsBegin,
    TinyModule,
    edited,
    enstack_folder,
    every_epoch,
    every_step,
    quiet_trainer,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import Severity, Verdict, verify_checkpoint
from enstack_lightning.guard.loading.repair import Repair, awaiting_repair, judged_after_repair

Edit = Callable[[dict[str, Any]], object]

SCHEDULES: dict[str, tuple[Callable[[Optimizer], Any], str]] = {
    "LambdaLR": (lambda o: LambdaLR(o, lambda t: 1 - min(t, 100) / 101), "step"),
    "MultiplicativeLR": (lambda o: MultiplicativeLR(o, lambda t: 0.9), "step"),
    "OneCycleLR": (lambda o: OneCycleLR(o, 0.1, 15), "step"),
    "SequentialLR": (lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1, 4), CosineAnnealingLR(o, 20)], [4]), "step"),
    "StepLR": (lambda o: StepLR(o, 1, 0.5), "epoch"),
    "ExponentialLR": (lambda o: ExponentialLR(o, 0.9), "epoch"),
    "ReduceLROnPlateau": (lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0), "epoch"),
}


class Scheduled(TinyModule):
    """Trains with one of `SCHEDULES`, and keeps what the optimizer's group said at each step."""

    def __init__(self, schedule: str | None = "LambdaLR", optimizer: Callable[..., Optimizer] = AdamW) -> None:
        super().__init__()
        self.schedule, self.optimizer = schedule, optimizer
        self.groups: list[tuple[Any, ...]] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=LEARNING_RATE)
        if self.schedule is None:
            return optimizer
        make, interval = SCHEDULES[self.schedule]
        config = {"scheduler": make(optimizer), "interval": interval}
        if self.schedule == "ReduceLROnPlateau":
            config["monitor"] = "loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        group = self.trainer.optimizers[0].param_groups[0]
        self.groups.append((group["lr"], group.get("betas"), group.get("momentum")))
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss


@dataclass
class Resumed:
    """A run that was resumed with `repair=True` from an edited checkpoint."""

    module: Any
    guard: CheckpointGuard
    trainer: Trainer
    said: list[str] = field(default_factory=list)

    @property
    def repaired(self) -> list[str]:
        return [str(r) for r in self.guard.repairs if r.changed]

    @property
    def left(self) -> list[str]:
        return [str(r) for r in self.guard.repairs if not r.changed]

    @property
    def warned(self) -> list[str]:
        assert self.guard.report is not None
        return [f.code for f in self.guard.report.of(Severity.WARNING)]


def resume(path: Path, folder: Path, module: LightningModule, *callbacks: Callback, **options: Any) -> Resumed:
    guard = CheckpointGuard(repair=True, **options)
    trainer = quiet_trainer(folder, guard, *callbacks)
    torch.manual_seed(99)
    trainer.fit(module, ckpt_path=path)
    return Resumed(module, guard, trainer)


Whole = Callable[..., tuple[Path, Scheduled]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Gives a run that never stopped, and the folder with its checkpoints of every step and every epoch."""
    runs: dict[Any, tuple[Path, Scheduled]] = {}

    def run(schedule: str | None, optimizer: Callable[..., Optimizer] = AdamW) -> tuple[Path, Scheduled]:
        if (schedule, optimizer) not in runs:
            folder = tmp_path_factory.mktemp("whole")
            torch.manual_seed(1)
            module = Scheduled(schedule, optimizer)
            quiet_trainer(folder, CheckpointGuard(), every_step(folder), every_epoch(folder)).fit(module)
            runs[schedule, optimizer] = folder, module
        return runs[schedule, optimizer]

    return run


def check_goes_on_as(whole: Scheduled, resumed: Resumed, done: int) -> None:
    assert resumed.module.groups == whole.groups[done:]
    assert resumed.module.losses == whole.losses[done:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor), name


def lose_schedulers(checkpoint: dict[str, Any]) -> None:
    checkpoint["lr_schedulers"] = []


def lose_optimizers(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = []


def lose_both(checkpoint: dict[str, Any]) -> None:
    lose_schedulers(checkpoint)
    lose_optimizers(checkpoint)


def lose_moments(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"] = {}


def lose_loops(checkpoint: dict[str, Any]) -> None:
    del checkpoint["loops"]


def set_rate(checkpoint: dict[str, Any], rate: float = 5e-3) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = rate


def set_steps(checkpoint: dict[str, Any], steps: float) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["step"] = torch.tensor(steps)


def both(*edits: Edit) -> Edit:
    return lambda checkpoint: [edit(checkpoint) for edit in edits]


# A healthy checkpoint


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_changed_and_nothing_said_of_a_healthy_checkpoint(
    schedule: str, whole: Whole, tmp_path: Path
) -> None:
    folder, never_stopped = whole(schedule)
    for saved, done in (("step=7", 7), ("epoch=1", 10)):
        resumed = resume(folder / f"{saved}.ckpt", tmp_path, Scheduled(schedule))
        assert resumed.guard.repairs == ()
        check_goes_on_as(never_stopped, resumed, done)


def test_nothing_is_repaired_where_nobody_asked_for_it(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    guard, module = CheckpointGuard(), TinyModule()
    with pytest.warns(UserWarning, match=r"CK501 scheduler steps 0, expected 7.*CheckpointGuard\(repair=True\)"):
        quiet_trainer(tmp_path, guard).fit(module, ckpt_path=path)
    assert guard.repairs == ()
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(LEARNING_RATE * (1 - 8 / 101))


# A scheduler without state


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "ReduceLROnPlateau"])
def test_a_scheduler_without_state_is_fast_forwarded(schedule: str, whole: Whole, tmp_path: Path) -> None:
    folder, never_stopped = whole(schedule)
    for saved, done in (("step=3", 3), ("step=7", 7), ("epoch=1", 10)):
        path = edited(folder / f"{saved}.ckpt", tmp_path / "c.ckpt", lose_schedulers)
        resumed = resume(path, tmp_path, Scheduled(schedule))
        if SCHEDULES[schedule][1] == "epoch" and done < 5:
            assert resumed.repaired == []  # it had not stepped yet
        else:
            (said,) = resumed.repaired
            assert said.startswith(f"repaired         scheduler 0 ({schedule}): fast-forwarded")
            assert resumed.guard.report is not None
            assert "CK501" not in resumed.warned
        check_goes_on_as(never_stopped, resumed, done)


def test_a_fast_forward_says_how_it_was_reckoned_and_the_rate_before_and_after(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        resumed = resume(path, tmp_path, TinyModule())
    said = (
        "repaired         scheduler 0 (LambdaLR): fast-forwarded 7 steps = (1 epoch x 5 steps) + 2 mid-epoch steps; "
        "learning rate 1.000000e-02 before, 9.306931e-03 after; the optimizer has that rate already and is left as it "
        "is"
    )
    assert resumed.repaired == [said]
    assert said in [r.getMessage() for r in caplog.records]
    assert resumed.guard.report is not None
    assert resumed.guard.report.verdict is Verdict.PASS


def test_strict_lets_what_can_be_repaired_through_and_judges_it_again(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    assert len(resume(path, tmp_path, TinyModule(), strict=True).repaired) == 1
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", both(lose_schedulers, set_rate))
    with pytest.raises(CheckpointGuardError, match="has warnings, and strict is set: CK501 scheduler steps 0"):
        resume(path, tmp_path, TinyModule(), strict=True)


@pytest.mark.parametrize("lose", [lose_optimizers, lose_both])
@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "SequentialLR", "MultiplicativeLR", "StepLR"])
def test_an_optimizer_that_was_lost_gets_the_rate_and_the_momentum_of_the_schedule(
    lose: Edit, schedule: str, whole: Whole, tmp_path: Path
) -> None:
    folder, never_stopped = whole(schedule)
    for saved, done in (("step=7", 7), ("epoch=1", 10)):
        path = edited(folder / f"{saved}.ckpt", tmp_path / "c.ckpt", lose)
        with pytest.warns(UserWarning, match="CK402 optimizer 0 has no state .* repair=True: the moments are lost"):
            resumed = resume(path, tmp_path, Scheduled(schedule))
        assert resumed.module.groups == never_stopped.groups[done:]
        assert len(resumed.repaired) == 1
        assert resumed.trainer.global_step == 15
        assert {float(s["step"]) for s in resumed.trainer.optimizers[0].state.values()} == {15 - done}
        assert f"after {done:,} steps, which nothing can bring back" in resumed.left[0]
        assert f"the counter stays at {done}" in resumed.left[0]


@pytest.mark.parametrize("lose", [lose_optimizers, lose_both])
def test_an_optimizer_that_keeps_nothing_loses_nothing(lose: Edit, whole: Whole, tmp_path: Path) -> None:
    folder, never_stopped = whole("LambdaLR", SGD)
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lose)
    resumed = resume(path, tmp_path, Scheduled("LambdaLR", SGD))
    assert resumed.left == []
    check_goes_on_as(never_stopped, resumed, 7)


@pytest.mark.parametrize(("edit", "saved", "done"), [(lose_schedulers, "step=4", 4), (lose_loops, "epoch=1", 6)])
def test_accumulated_steps_are_counted_as_steps(edit: Edit, saved: str, done: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    never_stopped = Scheduled()
    saves = every_step(tmp_path), every_epoch(tmp_path)
    quiet_trainer(tmp_path, CheckpointGuard(), *saves, accumulate_grad_batches=2).fit(never_stopped)
    path = edited(tmp_path / f"{saved}.ckpt", tmp_path / "c.ckpt", edit)
    guard, module = CheckpointGuard(repair=True), Scheduled()
    quiet_trainer(tmp_path, guard, accumulate_grad_batches=2).fit(module, ckpt_path=path)
    assert [r.changed for r in guard.repairs] == [True]
    assert module.groups == never_stopped.groups[-len(module.groups) :]
    assert module.trainer.global_step == never_stopped.trainer.global_step == 9
    assert f"fast-forwarded {done} steps = (1 epoch x 3 steps) + 1 mid-epoch" in str(guard.repairs[0]) or (
        f"global_step 0 before, {done} after" in str(guard.repairs[0])
    )


def test_a_scheduler_that_steps_by_epochs_is_forwarded_after_an_epochs_last_batch(whole: Whole, tmp_path: Path) -> None:
    """It has stepped then, and the epoch is not counted yet."""
    folder, never_stopped = whole("StepLR")
    path = edited(folder / "step=10.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    resumed = resume(path, tmp_path, Scheduled("StepLR"))
    assert "fast-forwarded 2 steps = 2 epochs x 1 step" in resumed.repaired[0]
    check_goes_on_as(never_stopped, resumed, 10)


class EverySecondStep(Scheduled):
    def configure_optimizers(self) -> Any:
        config = super().configure_optimizers()
        config["lr_scheduler"]["frequency"] = 2
        return config


def test_a_scheduler_that_steps_every_second_step_is_forwarded_as_often(tmp_path: Path) -> None:
    torch.manual_seed(1)
    never_stopped = EverySecondStep()
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path)).fit(never_stopped)
    path = edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    resumed = resume(path, tmp_path, EverySecondStep())
    assert "fast-forwarded 3 steps = the loop's counter of scheduler steps, one every 2 steps" in resumed.repaired[0]
    check_goes_on_as(never_stopped, resumed, 7)


def test_a_plateau_that_is_not_lost_gives_a_lost_optimizer_its_rate(whole: Whole, tmp_path: Path) -> None:
    folder, _ = whole("ReduceLROnPlateau")
    edit = both(lose_optimizers, lambda c: c["lr_schedulers"][0].update(_last_lr=[2.5e-3]))
    path = edited(folder / "epoch=1.ckpt", tmp_path / "c.ckpt", edit)
    with pytest.warns(UserWarning, match="CK402"):
        resumed = resume(path, tmp_path, Scheduled("ReduceLROnPlateau"))
    assert "learning rate 1.000000e-02 before, 2.500000e-03 after" in resumed.repaired[0]
    assert resumed.module.groups[0][0] == 2.5e-3


def tensor_rate(parameters: Any, lr: float) -> Optimizer:
    return AdamW(parameters, lr=torch.tensor(lr, dtype=torch.float64))


@pytest.mark.parametrize("lose", [lose_optimizers, lose_both])
def test_a_rate_that_is_a_tensor_stays_one(lose: Edit, whole: Whole, tmp_path: Path) -> None:
    folder, never_stopped = whole("LambdaLR", tensor_rate)
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lose)
    with pytest.warns(UserWarning, match="CK402"):
        resumed = resume(path, tmp_path, Scheduled("LambdaLR", tensor_rate))
    assert len(resumed.repaired) == 1
    assert isinstance(resumed.trainer.optimizers[0].param_groups[0]["lr"], Tensor)
    assert float(resumed.module.groups[-1][0]) == pytest.approx(float(never_stopped.groups[-1][0]), rel=1e-12)


def test_a_scheduler_lost_before_its_first_step_has_lost_nothing(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), SavesAsEpochsBegin(tmp_path), max_epochs=1).fit(Scheduled())
    path = edited(tmp_path / "start-0.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    assert resume(path, tmp_path, Scheduled()).guard.repairs == ()


# What contradicts itself is left


def check_left(resumed: Resumed, *words: str) -> None:
    assert resumed.repaired == []
    (said,) = resumed.left
    assert said.startswith("left as it is    ")
    for part in words:
        assert part in said


def test_a_rate_that_the_schedule_does_not_give_keeps_the_scheduler_where_it_is(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", both(lose_schedulers, set_rate))
    resumed = resume(path, tmp_path, Scheduled())
    check_left(resumed, "gives 9.306931e-03 at step 7", "in the checkpoint is 5.000000e-03", "left at step 0")
    assert "CK501" in resumed.warned
    assert resumed.module.groups[0][0] == 5e-3


class OtherRate(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=2e-2)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda t: 1 - t / 101), "interval": "step"}]


def forget_the_run(checkpoint: dict[str, Any]) -> None:
    checkpoint["callbacks"]["CheckpointGuard"]["run"] = {}


@pytest.mark.parametrize(
    ("module", "edit", "why"),
    [
        (OtherRate(), lose_schedulers, "the run that saved had base_lrs [0.01], and this one has [0.02]"),
        (
            OtherRate(),
            both(lose_schedulers, forget_the_run),
            "its base rate is 2.000000e-02, and that of the optimizer 1.000000e-02",
        ),
        (Scheduled("OneCycleLR"), lose_both, "the run that saved had LambdaLR"),
    ],
    ids=["of another base rate", "of another base rate, by the optimizer", "of another class"],
)
def test_a_schedule_that_is_not_the_saved_one_is_left(
    module: TinyModule, edit: Edit, why: str, trained: Path, tmp_path: Path
) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit)
    resumed = resume(path, tmp_path, module)
    assert resumed.repaired == []
    assert why in resumed.left[-1]


def test_a_plateau_depends_on_metrics_and_is_left(whole: Whole, tmp_path: Path) -> None:
    folder, _ = whole("ReduceLROnPlateau")
    path = edited(folder / "epoch=1.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    check_left(resume(path, tmp_path, Scheduled("ReduceLROnPlateau")), "depends on the metrics of the run")


def test_a_schedule_that_the_run_did_not_have_begins_at_its_beginning(whole: Whole, tmp_path: Path) -> None:
    folder, _ = whole(None)
    resumed = resume(folder / "step=7.ckpt", tmp_path, Scheduled("LambdaLR"))
    check_left(resumed, "had counted no step of a scheduler")
    assert resumed.module.groups[1][0] == pytest.approx(LEARNING_RATE * (1 - 1 / 101))


class TwoSchedules(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=LEARNING_RATE)
        every = {"scheduler": ExponentialLR(optimizer, 0.99), "interval": "step"}
        return [optimizer], [every, {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"}]


@pytest.mark.parametrize("kept", [0, 1])
def test_several_schedules_on_one_optimizer_are_left(kept: int, tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path)).fit(TwoSchedules())

    def lose(checkpoint: dict[str, Any]) -> None:
        del checkpoint["lr_schedulers"][kept:]

    path = edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", lose)
    check_left(resume(path, tmp_path, TwoSchedules()), f"the checkpoint has {kept} of 2 schedulers")
    assert resume(tmp_path / "step=7.ckpt", tmp_path, TwoSchedules()).guard.repairs == ()


class Two(TinyModule):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 2)

    def configure_optimizers(self) -> Any:
        return [AdamW(self.layer.parameters(), lr=LEARNING_RATE), AdamW(self.other.parameters(), lr=LEARNING_RATE)]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            optimizer.step()


def test_one_of_two_optimizers_that_was_lost_is_the_one_that_is_named(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_epoch(tmp_path)).fit(Two())
    path = edited(tmp_path / "epoch=1.ckpt", tmp_path / "c.ckpt", lambda c: c["optimizer_states"].pop())
    with pytest.warns(UserWarning, match="CK402 optimizer 1 has no state"):
        resumed = resume(path, tmp_path, Two())
    check_left(resumed, "optimizer 1 (AdamW): the checkpoint lacks its moments after 20 steps")
    assert resumed.trainer.global_step == 30
    for optimizer, steps in zip(resumed.trainer.optimizers, (15, 5), strict=True):
        assert {float(s["step"]) for s in optimizer.state.values()} == {steps}


def test_a_second_optimizer_that_the_run_lost_still_stops_it(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_epoch(tmp_path)).fit(Two())
    path = edited(tmp_path / "epoch=1.ckpt", tmp_path / "c.ckpt", lambda c: c["optimizer_states"].pop())
    guard = CheckpointGuard(repair=True)
    with pytest.raises(CheckpointGuardError, match="CK402"):
        quiet_trainer(tmp_path, Fresh(), guard).fit(Two(), ckpt_path=path)


class Idle(Two):
    """The second of its optimizers has not stepped yet."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers()[0]  # type: ignore[index]
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        optimizer.step()


def test_an_optimizer_that_has_not_stepped_yet_has_lost_nothing(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_epoch(tmp_path)).fit(Idle())
    assert resume(tmp_path / "epoch=1.ckpt", tmp_path, Idle()).guard.repairs == ()


class ByHand(TinyModule):
    """Manual optimization, with a scheduler that it steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return loss


def test_manual_optimization_counts_no_scheduler_steps_and_is_left(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path)).fit(ByHand())
    path = edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    check_left(resume(path, tmp_path, ByHand()), "under automatic optimization")


def move_counter(checkpoint: dict[str, Any]) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_loop.scheduler_progress"]["total"].update(ready=9, completed=9)


def test_counters_that_contradict_each_other_prove_no_position(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", both(lose_schedulers, move_counter))
    check_left(resume(path, tmp_path, TinyModule()), "the loop counted 9 scheduler steps and 7 optimizer steps")


def move_epoch_counter(checkpoint: dict[str, Any]) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_loop.scheduler_progress"]["total"].update(ready=4, completed=4)


def test_counters_of_epochs_that_contradict_each_other_prove_no_position(whole: Whole, tmp_path: Path) -> None:
    folder, _ = whole("StepLR")
    path = edited(folder / "epoch=1.ckpt", tmp_path / "c.ckpt", both(lose_schedulers, move_epoch_counter))
    check_left(resume(path, tmp_path, Scheduled("StepLR")), "the loop counted 4 scheduler steps and 2 complete epochs")


class Forward(Scheduled):
    """Sets its schedule forward itself, to a step of its own choice."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_fit_start(self) -> None:
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        for _ in range(self.step):
            scheduler.step()


def test_a_schedule_that_the_module_set_forward_is_left(whole: Whole, tmp_path: Path) -> None:
    folder, never_stopped = whole("LambdaLR")
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lose_schedulers)
    check_left(resume(path, tmp_path, Forward(3)), "the run has set it forward itself, and not to 7")
    resumed = resume(path, tmp_path, Forward(7))
    assert resumed.guard.repairs == ()
    check_goes_on_as(never_stopped, resumed, 7)


class RestoresItself(SingleDeviceStrategy):
    """Has files of its own for its optimizers, as strategies do that shard."""

    lightning_restore_optimizer = False


class FromItsOwnFile(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = 4.2e-3


def test_a_rate_that_a_strategy_restored_is_not_overwritten(whole: Whole, tmp_path: Path) -> None:
    folder, _ = whole("LambdaLR")
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lose_both)
    guard, module = CheckpointGuard(repair=True), Scheduled()
    strategy = RestoresItself(torch.device("cpu"))
    trainer = quiet_trainer(tmp_path, FromItsOwnFile(), guard, strategy=strategy)
    trainer.fit(module, ckpt_path=path)
    assert not any(r.changed for r in guard.repairs)
    assert module.groups[0][0] == 4.2e-3


# The optimizer's rate against its scheduler's


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "SequentialLR", "StepLR", "ExponentialLR"])
def test_a_rate_that_disagrees_is_set_to_the_schedules(schedule: str, whole: Whole, tmp_path: Path) -> None:
    folder, never_stopped = whole(schedule)
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_rate(c, 4.2e-3))
    resumed = resume(path, tmp_path, Scheduled(schedule), strict=True)
    (said,) = resumed.repaired
    assert f"learning rate 4.200000e-03 before, {never_stopped.groups[7][0]:.6e} after" in said
    check_goes_on_as(never_stopped, resumed, 7)


@pytest.mark.parametrize(
    ("schedule", "why"),
    [("MultiplicativeLR", "nothing tells which of them is right"), ("ReduceLROnPlateau", "depends on the metrics")],
)
def test_a_rate_that_disagrees_is_left_where_the_schedule_cannot_tell(
    schedule: str, why: str, whole: Whole, tmp_path: Path
) -> None:
    folder, _ = whole(schedule)
    path = edited(folder / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_rate(c, 4.2e-3))
    resumed = resume(path, tmp_path, Scheduled(schedule))
    check_left(resumed, why)
    assert resumed.module.groups[0][0] == 4.2e-3
    assert "CK503" in resumed.warned


def test_a_rate_is_left_where_the_scheduler_is_off_its_position(trained: Path, tmp_path: Path) -> None:
    def wind_back(checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"][0].update(last_epoch=3, _last_lr=[LEARNING_RATE * (1 - 3 / 101)])

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", wind_back)
    resumed = resume(path, tmp_path, Scheduled())
    check_left(resumed, "left at step 3", "7 = (1 epoch x 5 steps) + 2 mid-epoch steps")
    assert resumed.module.groups[0][0] == pytest.approx(LEARNING_RATE * (1 - 7 / 101))


def test_a_rate_is_left_where_this_runs_schedule_is_another(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", set_rate)
    resumed = resume(path, tmp_path, TinyModule(total_steps=40))
    check_left(resumed, "its scheduler set 9.306931e-03, and this run's schedule gives 8.292683e-03")


def test_a_rate_is_left_where_the_optimizer_began_at_another(trained: Path, tmp_path: Path) -> None:
    def begin_at_another(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["param_groups"][0].update(lr=5e-3, initial_lr=2e-2)

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", begin_at_another)
    resumed = resume(path, tmp_path, Scheduled())
    check_left(resumed, "its base rate is 1.000000e-02, and that of the optimizer 2.000000e-02")
    assert resumed.module.groups[0][0] == 5e-3


# An optimizer without its moments


@pytest.mark.parametrize("lose", [lose_optimizers, lose_moments])
def test_without_repair_a_lost_optimizer_is_refused_before_it_is_loaded(
    lose: Edit, trained: Path, tmp_path: Path
) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose)
    with pytest.raises(CheckpointGuardError, match="CK402"):
        quiet_trainer(tmp_path, CheckpointGuard()).fit(TinyModule(), ckpt_path=path)


@pytest.mark.parametrize("lose", [lose_optimizers, lose_moments])
def test_strict_stops_at_a_lost_optimizer_all_the_same(lose: Edit, trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose)
    with pytest.raises(CheckpointGuardError, match="strict is set: CK402"):
        resume(path, tmp_path, TinyModule(), strict=True)


def test_moments_lost_with_the_groups_kept_change_nothing(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose_moments)
    with pytest.warns(UserWarning, match="CK402"):
        resumed = resume(path, tmp_path, Scheduled())
    check_left(resumed, "zero moments and its own step count 0")
    assert resumed.module.groups[0][0] == pytest.approx(LEARNING_RATE * (1 - 7 / 101), rel=1e-15)


def test_an_optimizer_made_anew_on_the_way_is_named_and_left(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_steps(c, 2.0))
    with pytest.warns(UserWarning, match="CK401 optimizer steps 2, expected 7"):
        resumed = resume(path, tmp_path, TinyModule())
    check_left(resumed, "it did 2 of 7 steps")


def test_an_optimizer_that_missed_a_few_steps_was_not_made_anew(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: set_steps(c, 5.0))
    with pytest.warns(UserWarning, match="CK401 optimizer steps 5, expected 7"):
        assert resume(path, tmp_path, TinyModule()).guard.repairs == ()


def test_a_lost_optimizer_lets_nothing_else_through(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", both(lose_moments, lambda c: c.pop("state_dict")))
    report = verify_checkpoint(path)
    assert judged_after_repair(report, ()) == report
    judged = judged_after_repair(report, [Repair("optimizer 0", "it is lost", lost=True)])
    assert "CK402" in [f.code for f in judged.of(Severity.WARNING)]
    errors = [f.code for f in report.of(Severity.ERROR)]
    assert len(errors) > 1
    assert [f.code for f in judged.of(Severity.ERROR)] == [code for code in errors if code != "CK402"]


def test_only_files_of_lightning_are_let_through(tmp_path: Path) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", optimizer_steps=0))
    assert [f.code for f in report.of(Severity.ERROR)] == ["CK402"]
    assert awaiting_repair(report) == report


class Fresh(Callback):
    """Loses the optimizer's state on the way, as a plugin may."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].state.clear()


def test_moments_that_the_checkpoint_has_and_the_run_lost_still_stop_it(trained: Path, tmp_path: Path) -> None:
    guard = CheckpointGuard(repair=True)
    with pytest.raises(CheckpointGuardError, match="CK402"):
        quiet_trainer(tmp_path, Fresh(), guard).fit(TinyModule(), ckpt_path=trained / "step=7.ckpt")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda c: set_steps(c, 12.0), "CK401 optimizer steps 12, expected 7"),
        (lambda c: c.pop("optimizer_states"), "CK201 optimizer_states is missing"),
        (lambda c: (c.pop("optimizer_states"), c.pop("lr_schedulers")), "CK205"),
    ],
    ids=["optimizer ahead of the counter", "no entry for optimizers", "weights only"],
)
def test_what_nothing_proves_is_refused_as_ever(edit: Edit, why: str, trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit)
    with pytest.raises(CheckpointGuardError, match=why):
        resume(path, tmp_path, TinyModule())


def test_an_optimizer_without_groups_is_no_fresh_one(trained: Path, tmp_path: Path) -> None:
    def lose_groups(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["param_groups"] = []

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lose_groups)
    with pytest.raises(CheckpointGuardError, match=r"CK\d"):
        resume(path, tmp_path, TinyModule())


# Lost counters


class Loaded(Callback):
    """Keeps the entry `loops` that the Trainer is about to restore."""

    def __init__(self) -> None:
        self.loops: dict[str, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loops = checkpoint["loops"]


@pytest.mark.parametrize(("epoch", "done"), [(0, 5), (1, 10)])
@pytest.mark.parametrize("schedule", ["LambdaLR", "StepLR", None])
def test_lost_counters_are_put_back_at_an_epochs_end(
    schedule: str | None, epoch: int, done: int, whole: Whole, tmp_path: Path
) -> None:
    folder, never_stopped = whole(schedule)
    source = folder / f"epoch={epoch}.ckpt"
    path, loaded = edited(source, tmp_path / "c.ckpt", lose_loops), Loaded()
    resumed = resume(path, tmp_path, Scheduled(schedule), loaded, strict=True)
    assert len(resumed.repaired) == 1
    assert f"global_step 0 before, {done} after, complete epochs 0 before, {epoch + 1} after" in resumed.repaired[0]
    check_goes_on_as(never_stopped, resumed, done)
    assert resumed.trainer.global_step == 15
    saved = torch.load(source, weights_only=True)["loops"]
    saved["fit_loop"]["state_dict"].pop("combined_loader")  # the loader's position is lost, and a new epoch needs none
    assert loaded.loops == saved


def test_lost_counters_are_told_where_the_epoch_was_counted_already(whole: Whole, tmp_path: Path) -> None:
    """As in what is saved after the run."""
    folder, never_stopped = whole("LambdaLR")
    path = edited(folder / "epoch=1.ckpt", tmp_path / "c.ckpt", both(lose_loops, lambda c: c.update(epoch=2)))
    resumed = resume(path, tmp_path, Scheduled())
    assert len(resumed.repaired) == 1
    check_goes_on_as(never_stopped, resumed, 10)


@pytest.mark.parametrize(
    ("saved", "edit", "why"),
    [
        ("step=7", lambda c: None, "global_step 7 in epoch 1 is no end of an epoch of 5 steps"),
        ("epoch=1", lambda c: c.update(global_step=9), "global_step is 9, and its optimizer did 10 steps"),
        ("epoch=1", lambda c: c.update(epoch=4), "global_step 10 in epoch 4 is no end of an epoch"),
        ("epoch=1", lambda c: set_steps(c, 9.0), "global_step is 10, and its optimizer did 9 steps"),
        (
            "epoch=1",
            lambda c: c["optimizer_states"][0]["state"][0].update(step=torch.tensor(9.0)),
            "global_step is 10, and its optimizer did 9 steps",
        ),
        ("epoch=1", lambda c: c["optimizer_states"][0]["state"].pop(0), "not every parameter of its optimizer"),
        ("epoch=1", lambda c: c["lr_schedulers"][0].update(last_epoch=9), r"its schedulers stand at \[9\], expected"),
        ("epoch=1", lambda c: c["callbacks"].pop("CheckpointGuard"), "it was saved without a guard"),
        ("epoch=1", lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "it has 2 optimizers"),
        (
            "epoch=1",
            lambda c: c["optimizer_states"][0].update(state={}, param_groups=[]),
            "not every parameter of its optimizer counts its steps",
        ),
        (
            "epoch=1",
            lambda c: c["callbacks"]["CheckpointGuard"]["run"].pop("batches_per_epoch"),
            "it was saved without a guard",
        ),
        (
            "epoch=0",
            both(lambda c: c.update(global_step=0), lambda c: set_steps(c, 0.0)),
            "global_step 0 in epoch 0 is no end of an epoch",
        ),
        (
            "epoch=1",
            lambda c: c["callbacks"]["CheckpointGuard"]["run"].update(scheduler_frequencies=[2]),
            r"its schedulers stand at \[10\]",
        ),
    ],
)
def test_lost_counters_are_not_guessed(saved: str, edit: Edit, why: str, trained: Path, tmp_path: Path) -> None:
    path = edited(trained / f"{saved}.ckpt", tmp_path / "c.ckpt", both(lose_loops, edit))
    with pytest.raises(CheckpointGuardError, match=f"CK201 loops is missing.*cannot be told from the rest: {why}"):
        resume(path, tmp_path, TinyModule())


def test_lost_counters_of_manual_optimization_are_not_told(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_epoch(tmp_path)).fit(ByHand())
    path = edited(tmp_path / "epoch=1.ckpt", tmp_path / "c.ckpt", lose_loops)
    with pytest.raises(CheckpointGuardError, match="CK401 optimizer steps 10, expected 0"):
        resume(path, tmp_path, ByHand())


# Time


def test_five_million_steps_are_skipped_at_once(trained: Path, tmp_path: Path) -> None:
    steps = 5_000_000

    def grow(checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counter in (progress, loop["epoch_loop.scheduler_progress"], loop["epoch_loop.batch_progress"]):
            counter["total"].update(dict.fromkeys(counter["total"], steps))
        checkpoint["global_step"] = steps
        set_steps(checkpoint, float(steps))
        set_rate(checkpoint, LEARNING_RATE * (1 - 100 / 101))
        lose_schedulers(checkpoint)

    path = edited(trained / "epoch=1.ckpt", tmp_path / "c.ckpt", grow)
    began = time.process_time()
    resumed = resume(path, tmp_path, TinyModule())
    assert time.process_time() - began < 5
    assert "fast-forwarded 5,000,000 steps = the loop's counter of optimizer steps" in resumed.repaired[0]
    assert resumed.trainer.lr_scheduler_configs[0].scheduler.last_epoch == steps + 5
