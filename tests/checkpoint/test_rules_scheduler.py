"""Position, rate and length of schedules: real schedulers of real runs, wrong, right and odd."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, edited, enstack_folder, every_epoch, every_step, quiet_trainer
from genuine import huggingface_trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim import lr_scheduler as schedules

from enstack_lightning.checkpoint import Facts, Format, Report, Severity, Verdict, judge, verify_checkpoint
from enstack_lightning.checkpoint.facts import OptimizerFacts, ParamGroupFacts, ProgressFacts, RunFacts, SchedulerFacts
from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard import CheckpointGuard


def said(report: Report, code: str, severity: str = "") -> str:
    return " | ".join(f.message for f in report.findings if f.code == code and f.severity.startswith(severity))


class Scheduled(TinyModule):
    """A TinyModule under the schedules that `make` gives for its optimizer, in two param groups."""

    def __init__(self, make: Callable[[Any], Any], interval: str = "step", lr: float = 1e-2) -> None:
        super().__init__()
        self.make, self.interval, self.rate = make, interval, lr

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": self.rate / 2}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        made = self.make(optimizer)
        made = made if isinstance(made, list) else [made]
        return [optimizer], [{"scheduler": s, "interval": self.interval, "monitor": "loss"} for s in made]

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss


def run(folder: Path, module: TinyModule, **options: Any) -> list[Path]:
    """The checkpoints of a guarded run, one after every step and every epoch."""
    quiet_trainer(folder, CheckpointGuard(), every_step(folder), every_epoch(folder), **options).fit(module)
    return sorted(folder.glob("*.ckpt"))


HEALTHY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "step by epoch": (lambda o: schedules.StepLR(o, 1), "epoch"),
    "plateau": (lambda o: schedules.ReduceLROnPlateau(o), "epoch"),
    "one cycle": (lambda o: schedules.OneCycleLR(o, [0.1, 0.2], total_steps=15), "step"),
    "cosine to the end": (lambda o: schedules.CosineAnnealingLR(o, 15), "step"),
    "two on one optimizer": (lambda o: [schedules.StepLR(o, 3), schedules.ExponentialLR(o, 0.9)], "step"),
    "warm-up from next to nothing": (lambda o: schedules.LinearLR(o, 1e-9, total_iters=100), "step"),
    "warm-up of a function": (lambda o: schedules.LambdaLR(o, lambda t: t * 1e-8), "step"),
    "chain": (lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]), "step"),
    "one group that never trains": (lambda o: schedules.LambdaLR(o, [lambda t: 1.0, lambda t: 0.0]), "step"),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("ignore")
def test_every_checkpoint_of_a_healthy_run_passes(name: str, tmp_path: Path) -> None:
    make, interval = HEALTHY[name]
    for path in run(tmp_path, Scheduled(make, interval)):
        report = verify_checkpoint(path)
        warned = report.of(Severity.WARNING)
        assert report.verdict is Verdict.PASS, (path.name, warned, report.of(Severity.ERROR))


def scheduler(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["lr_schedulers"][0].update(entries)


def both(**entries: Any) -> Callable[[dict[str, Any]], None]:
    """The scheduler's last rates and the optimizer's, which then agree with each other."""

    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"][0].update(entries)
        for group, rate in zip(checkpoint["optimizer_states"][0]["param_groups"], entries["_last_lr"], strict=True):
            group["lr"] = rate

    return edit


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str, str, str]] = {
    "second group's rate": (
        "cosine to the end",
        lambda c: c["optimizer_states"][0]["param_groups"][1].update(lr=4e-3),
        "CK503",
        "warning",
        "the optimizer's learning rate is 4.000000e-03",
    ),
    "second group beyond its peak": (
        "one cycle",
        lambda c: c["optimizer_states"][0]["param_groups"][1].update(lr=9.0),
        "CK502",
        "warning",
        "9.00e+00 of optimizer 0, group 1 is above 4.00e-01",
    ),
    "all groups next to nothing": (
        "cosine to the end",
        both(_last_lr=[1e-12, 1e-13]),
        "CK502",
        "warning",
        "1.00e-12, 1.00e-13 of optimizer 0 is below 1e-08",
    ),
    "a cycle's rate of another step": (
        "one cycle",
        both(_last_lr=[0.05, 0.1]),
        "CK504",
        "warning",
        "where its own OneCycleLR gives",
    ),
    "a rate set by hand": (
        "cosine to the end",
        both(_last_lr=[5e-3, 2.5e-3]),
        "CK504",
        "info",
        "where its own CosineAnnealingLR gives",
    ),
    "a cycle shorter than the run": ("one cycle", scheduler(total_steps=10), "CK505", "error", "3 of 10 steps left"),
    "a cosine shorter than the run": (
        "cosine to the end",
        lambda c: c["lr_schedulers"][0].update(T_max=9),
        "CK505",
        "info",
        "reaches its end at step 9, and the run goes on to 15: the rate rises again",
    ),
    "behind": ("cosine to the end", scheduler(last_epoch=5), "CK501", "warning", "scheduler steps 5, expected 7"),
    "read as epochs": (
        "step by epoch",
        lambda c: (
            c["lr_schedulers"][0].update(last_epoch=7),
            c["loops"]["fit_loop"]["epoch_loop.scheduler_progress"]["total"].update(completed=7),
        ),
        "CK501",
        "warning",
        "steps every epoch and stands at 7, expected 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str, tmp_path: Path) -> None:
    name, edit, code, severity, words = FAULTS[fault]
    run(tmp_path, Scheduled(*HEALTHY[name]))
    report = verify_checkpoint(edited(tmp_path / "step=7.ckpt", tmp_path / "edited.ckpt", edit))
    assert words in said(report, code, severity), report.findings
    expected = {"error": Verdict.FAIL, "warning": Verdict.WARN, "info": Verdict.PASS}[severity]
    assert report.verdict is expected, report.findings


def test_a_schedule_that_is_over_is_said_to_have_ended_where_it_did(tmp_path: Path) -> None:
    run(tmp_path, Scheduled(lambda o: schedules.CosineAnnealingLR(o, 4)))
    message = said(verify_checkpoint(tmp_path / "step=7.ckpt"), "CK505", "info")
    assert "CosineAnnealingLR reached its end at step 4, and the run goes on to 15" in message


class ByFractions(Scheduled):
    """Warm restarts every 2 or so epochs, put to a fraction of an epoch after each batch as torch's page shows it."""

    def __init__(self, growth: int = 1, lr: float = 1e-2) -> None:
        super().__init__(lambda o: schedules.CosineAnnealingWarmRestarts(o, 1, growth), lr=lr)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(self.trainer.fit_loop.epoch_loop.total_batch_idx / 5)


@pytest.mark.parametrize("growth", [1, 2])
def test_a_schedule_put_to_fractions_of_an_epoch_is_at_no_count_of_steps(growth: int, tmp_path: Path) -> None:
    paths = run(tmp_path, ByFractions(growth))
    for path in paths:
        report = verify_checkpoint(path)
        assert report.verdict is Verdict.PASS, (path.name, report.of(Severity.WARNING))
        assert "is what the schedule gives" in said(report, "CK504", "pass"), path.name
        assert said(report, "CK501") == said(report, "CK506") == "", path.name
    guard = CheckpointGuard()
    quiet_trainer(tmp_path, guard).fit(ByFractions(growth), ckpt_path=tmp_path / "step=7.ckpt")
    assert guard.report is not None
    assert said(guard.report, "CK501") == "", guard.report.findings
    assert "is what the schedule gives" in said(guard.report, "CK504", "pass")
    assert guard.report.of(Severity.ERROR) == guard.report.of(Severity.WARNING) == ()


def test_a_rate_next_to_nothing_before_a_restart_is_told_only_of_a_run_that_has_no_other(tmp_path: Path) -> None:
    run(tmp_path, ByFractions())
    before_restart = both(_last_lr=[2.4e-10, 1.2e-10], T_cur=0.9999)
    path = edited(tmp_path / "step=7.ckpt", tmp_path / "low.ckpt", before_restart)
    assert said(verify_checkpoint(path), "CK502", "warning") == ""
    (tmp_path / "slow").mkdir()
    run(tmp_path / "slow", ByFractions(lr=1e-10))
    assert "below 1e-08" in said(verify_checkpoint(tmp_path / "slow" / "step=7.ckpt"), "CK502", "warning")


def test_a_rate_that_is_not_that_of_its_fraction_is_told(tmp_path: Path) -> None:
    run(tmp_path, ByFractions())
    report = verify_checkpoint(edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", both(_last_lr=[5e-3, 2.5e-3])))
    assert "learning rate 5.000000e-03, where its own CosineAnnealingWarmRestarts gives" in said(
        report, "CK504", "warning"
    )


def test_warm_restarts_that_count_their_steps_are_held_to_them(tmp_path: Path) -> None:
    run(tmp_path, Scheduled(lambda o: schedules.CosineAnnealingWarmRestarts(o, 5)))
    behind = edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", scheduler(last_epoch=5, T_cur=0))
    assert "scheduler steps 5, expected 7" in said(verify_checkpoint(behind), "CK501", "warning")


class Averaged(Scheduled):
    """Under Lightning's averaging of weights, with and without batch norm, which adds a pass to the run."""

    def __init__(self, batch_norm: bool = False, lr: float = 1e-2) -> None:
        super().__init__(lambda o: schedules.ExponentialLR(o, 0.9), "epoch", lr)
        self.norm = torch.nn.BatchNorm1d(4) if batch_norm else torch.nn.Identity()

    def training_step(self, batch: Any) -> Any:
        return super().training_step((self.norm(batch[0]), batch[1]))

    def validation_step(self, batch: Any) -> None:
        """Before it Lightning drops all gradients, without which the last pass makes no step."""

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def averaging(rate: float = 1e-3) -> StochasticWeightAveraging:
    return StochasticWeightAveraging(rate, swa_epoch_start=1, annealing_epochs=2)


def averaged(folder: Path, module: Scheduled, guard: bool = True, rate: float = 1e-3) -> list[Path]:
    guards = [CheckpointGuard()] if guard else []
    quiet_trainer(folder, *guards, averaging(rate), every_step(folder), every_epoch(folder)).fit(module)
    return sorted(folder.glob("*.ckpt"))


def resumed(path: Path, module: Scheduled, rate: float = 1e-3) -> Report:
    guard = CheckpointGuard()
    quiet_trainer(path.parent / "again", guard, averaging(rate)).fit(module, ckpt_path=path)
    assert guard.report is not None
    return guard.report


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("rate", [1e-3, 1e-1])
@pytest.mark.filterwarnings("ignore")
def test_averaging_anneals_between_the_schedules_rate_and_its_own(
    batch_norm: bool, rate: float, tmp_path: Path
) -> None:
    for path in averaged(tmp_path, Averaged(batch_norm), rate=rate):
        for report in (verify_checkpoint(path), *self_resumed(path, batch_norm, rate)):
            assert not said(report, "CK502", "warning"), path.name
            assert not said(report, "CK401", "warning"), path.name


def self_resumed(path: Path, batch_norm: bool, rate: float) -> list[Report]:
    """The report on a live run from it; none where nothing is left of the run."""
    try:
        return [resumed(path, Averaged(batch_norm), rate)]
    except CheckpointGuardError as error:
        assert "CK906" in str(error)  # noqa: PT017
        return []


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_rate_above_both_of_averaging_and_the_schedule_is_told(live: bool, tmp_path: Path) -> None:
    averaged(tmp_path, Averaged())
    path = edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", both(_last_lr=[0.5, 0.5]))
    report = resumed(path, Averaged()) if live else verify_checkpoint(path)
    assert "learning rate 5.00e-01 of optimizer 0 is above 2.00e-02" in said(report, "CK502", "warning")


@pytest.mark.parametrize("odd", [True, "high", float("nan"), 10**400, [1.0], None])
@pytest.mark.filterwarnings("ignore")
def test_options_of_averaging_that_are_no_rates_name_no_peak(odd: Any, tmp_path: Path) -> None:
    averaged(tmp_path, Averaged())

    def edit(checkpoint: dict[str, Any]) -> None:
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["swa_lr"] = odd
        record = checkpoint["callbacks"]["CheckpointGuard"]["run"]
        record["optimizer_options"] = [[{"lr": odd}]]
        record["scheduler_options"] = [{"max_lrs": odd}]

    report = verify_checkpoint(edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert not said(report, "CK502", "warning"), report.findings


@pytest.mark.filterwarnings("ignore")
def test_averaging_without_a_record_of_the_rate_before_it_names_no_peak(tmp_path: Path) -> None:
    for path in averaged(tmp_path, Averaged(), guard=False):
        assert not said(verify_checkpoint(path), "CK502", "warning"), path.name


@pytest.mark.filterwarnings("ignore")
def test_two_steps_fewer_are_told_in_the_last_pass_of_averaging_too(tmp_path: Path) -> None:
    averaged(tmp_path, Averaged(batch_norm=True))

    def fewer(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["step"] -= 1

    last = tmp_path / "step=16.ckpt"
    assert "1 fewer" in said(resumed(last, Averaged(batch_norm=True)), "CK401", "info")
    path = edited(last, tmp_path / "c.ckpt", fewer)
    assert "2 fewer" in said(resumed(path, Averaged(batch_norm=True)), "CK401", "warning")


def test_a_lost_schedule_whose_steps_were_counted_is_told(tmp_path: Path) -> None:
    run(tmp_path, Scheduled(*HEALTHY["one cycle"]))
    report = verify_checkpoint(
        edited(tmp_path / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: c["lr_schedulers"].clear())
    )
    assert "counted 7 steps of schedulers, and the checkpoint has none" in said(report, "CK501", "warning")


def test_the_next_rates_are_those_that_follow(tmp_path: Path) -> None:
    run(tmp_path, Scheduled(*HEALTHY["one cycle"]))
    coming = [
        torch.load(tmp_path / f"step={n}.ckpt", weights_only=True)["lr_schedulers"][0]["_last_lr"][0]
        for n in range(8, 13)
    ]
    listed = ", ".join(f"{rate:.2e}" for rate in coming)
    assert said(verify_checkpoint(tmp_path / "step=7.ckpt"), "CK506", "pass").endswith(listed)


def test_a_complete_cycle_of_an_unguarded_run_is_worth_knowing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Scheduled(*HEALTHY["one cycle"]))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    report = verify_checkpoint(tmp_path / "c.ckpt")
    assert "the schedule is complete: 15 of 15 steps" in said(report, "CK505", "info")
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_linear_cycle_that_ends_below_zero_was_an_error(phases: bool, tmp_path: Path) -> None:
    make = lambda o: schedules.OneCycleLR(o, 0.1, total_steps=15, anneal_strategy="linear", three_phase=phases)  # noqa: E731
    for path in run(tmp_path, Scheduled(make)):
        assert verify_checkpoint(path).verdict is Verdict.PASS, (path, verify_checkpoint(path).findings)
    report = verify_checkpoint(tmp_path / "step=15.ckpt")
    assert "OneCycleLR goes below 0 with the last of its steps" in said(report, "CK407", "info")


class JoinsLater(Scheduled):
    """A group joins after the schedule was made, and a callback of its own sets the group's rate."""

    def __init__(self) -> None:
        super().__init__(lambda o: schedules.ExponentialLR(o, 0.5), "epoch")
        self.more = torch.nn.Parameter(torch.ones(3))

    def on_train_epoch_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if self.current_epoch == 0:
            optimizer.add_param_group({"params": [self.more], "lr": 1e-3})
        optimizer.param_groups[-1]["lr"] = 1e-3


@pytest.mark.filterwarnings("ignore")
def test_the_rate_of_a_group_that_joined_later_is_not_the_schedulers(tmp_path: Path) -> None:
    run(tmp_path, JoinsLater())
    for name in ("step=3", "step=7", "step=12"):
        report = verify_checkpoint(tmp_path / f"{name}.ckpt")
        assert said(report, "CK503", "warning") == "", name


def test_the_guard_stops_a_longer_run_before_its_cycle_does(tmp_path: Path) -> None:
    run(tmp_path, Scheduled(*HEALTHY["one cycle"]))
    with pytest.raises(CheckpointGuardError, match="CK505 the schedule has 0 of 15 steps left and the run 10"):
        quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=5).fit(
            Scheduled(*HEALTHY["one cycle"]), ckpt_path=tmp_path / "step=15.ckpt"
        )


@pytest.mark.filterwarnings("ignore")
def test_the_guard_sees_a_scheduler_that_now_steps_by_epochs(tmp_path: Path) -> None:
    make = lambda o: schedules.StepLR(o, 100)  # noqa: E731
    run(tmp_path, Scheduled(make, "step"))
    guard = CheckpointGuard()
    quiet_trainer(tmp_path, guard).fit(Scheduled(make, "epoch"), ckpt_path=tmp_path / "step=7.ckpt")
    assert guard.report is not None
    assert "scheduler 0 steps every epoch and stands at 7, expected 1" in said(guard.report, "CK501", "warning")


# EnStack and transformers


def test_a_scheduler_that_shares_the_optimizers_steps_is_not_told_twice(tmp_path: Path) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", 8, optimizer_steps=20))
    assert "optimizer steps 20, expected 80" in said(report, "CK401", "warning")
    assert "scheduler steps 20, expected 80, the optimizer's own 20" in said(report, "CK501", "pass")


def test_a_scheduler_that_stands_alone_is_told(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c", 8)

    def edit(state: dict[str, Any]) -> None:
        state["scheduler_state_dict"]["last_epoch"] = 3

    edited(folder / "training_state.pth", folder / "training_state.pth", edit)
    report = verify_checkpoint(folder)
    assert "scheduler steps 3, expected 80 (8 epochs x 10 batches)" in said(report, "CK501", "warning")


def test_the_scheduler_of_transformers_steps_with_its_optimizer(tmp_path: Path) -> None:
    path = huggingface_trainer(tmp_path, 7)
    assert "scheduler steps 7, expected 7" in said(verify_checkpoint(path), "CK501", "pass")
    edited(path / "scheduler.pt", path / "scheduler.pt", lambda state: state.update(last_epoch=4))
    assert "scheduler steps 4, expected 7 (global_step)" in said(verify_checkpoint(path), "CK501", "warning")


# The bounds, of facts that no run is needed for


def at(position: int | None, rate: float = 1e-2, **entries: Any) -> SchedulerFacts:
    made = SchedulerFacts(position, (rate,), (1e-2,), (), None, kind="StepLR")
    return dataclasses.replace(made, **entries)


def of_rates(*rates: float | None, steps: int = 10) -> OptimizerFacts:
    groups = (ParamGroupFacts((n,), rate, 1e-2, None, True) for n, rate in enumerate(rates))
    return OptimizerFacts(tuple(groups), {0: steps}, 1)


def two_epochs(
    *schedulers: SchedulerFacts,
    intervals: tuple[str, ...] = ("step",),
    every: tuple[int, ...] = (1, 1),
    optimizers: tuple[OptimizerFacts, ...] = (of_rates(1e-2),),
    counted: int | None = None,
    steps: int | None = 10,
    **run: Any,
) -> Facts:
    """Two epochs of five batches, at the end of the second."""
    return Facts(
        "checkpoint",
        Format.LIGHTNING,
        fields={"epoch": "int"},
        progress=ProgressFacts(
            epoch=1,
            global_step=10,
            optimizer_steps=steps,
            scheduler_steps=sum(s.last_epoch or 0 for s in schedulers) if counted is None else counted,
            epochs_completed=2,
            epochs_begun=2,
            batches_in_epoch=0,
        ),
        optimizers=optimizers,
        schedulers=schedulers,
        run=RunFacts(
            scheduler_intervals=intervals,
            scheduler_frequencies=every[: len(intervals)],
            **{"batches_per_epoch": 5, **run},
        ),
    )


def inside_the_third(facts: Facts) -> Facts:
    """Three of its five batches are done."""
    return dataclasses.replace(facts, progress=dataclasses.replace(facts.progress, epochs_begun=3, batches_in_epoch=3))


def outcomes(facts: Facts, code: str) -> list[str]:
    return [f"{f.severity.value}: {f.message}" for f in judge(facts) if f.code == code]


BOTH = ("step", "epoch")
WITH_STEPS = "warning: scheduler 0 steps with the optimizer and stands at 9, expected 10"
POSITIONS: dict[str, tuple[Facts, str]] = {
    "each where it should": (two_epochs(at(10), at(2), intervals=BOTH), "pass: scheduler steps 12"),
    "of steps, one behind": (two_epochs(at(9), at(3), intervals=BOTH), WITH_STEPS),
    "of steps that are not known": (two_epochs(at(9), at(3), intervals=BOTH, steps=None), "pass: "),
    "of every second step": (two_epochs(at(5), at(2), intervals=BOTH, every=(2, 1)), "pass: "),
    "of metrics": (two_epochs(at(9, kind="ReduceLROnPlateau"), at(2), intervals=BOTH), "pass: "),
    "of epochs, before the last or after": (two_epochs(at(10), at(3), intervals=BOTH), "pass: "),
    "of epochs, two off": (two_epochs(at(10), at(4), intervals=BOTH), "warning: scheduler 1 steps every epoch"),
    "of two optimizers": (two_epochs(at(9), at(1), intervals=BOTH, optimizers=(of_rates(1e-2),) * 2), "pass: "),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_each_scheduler_is_held_to_its_own_interval(name: str) -> None:
    facts, expected = POSITIONS[name]
    (said_of_it,) = outcomes(facts, "CK501")
    assert said_of_it.startswith(expected)


def test_positions_of_which_one_is_not_known_are_not_added_up() -> None:
    assert outcomes(two_epochs(at(None), at(5), counted=9), "CK501") == []
    assert outcomes(two_epochs(at(5, kind="SWALR"), at(5), counted=9), "CK501") == []
    assert outcomes(two_epochs(at(5), counted=0), "CK501") == []


@pytest.mark.parametrize(("position", "passes"), [(0, True), (30, True), (40, True), (60, True), (61, False)])
def test_a_scheduler_may_stand_with_the_counters_or_with_the_optimizer(position: int, passes: bool) -> None:
    facts = dataclasses.replace(
        two_epochs(at(position), optimizers=(of_rates(1e-2, steps=40),)),
        format=Format.ENSTACK,
        progress=ProgressFacts(epoch=2, step=0, epochs_completed=2, epochs_begun=2, batches_in_epoch=0),
    )
    assert outcomes(facts, "CK501")[0].startswith("pass" if passes else "warning")
    assert outcomes(dataclasses.replace(facts, schedulers=(at(61, kind="ReduceLROnPlateau"),)), "CK501") == []


NEXT_TO_NOTHING: dict[str, tuple[SchedulerFacts, bool]] = {
    "at the start": (at(0, 0.0), True),
    "after a step": (at(1, 0.0), False),
    "rising": (at(7, 1e-9, next_lrs=(2e-9,)), True),
    "level": (at(7, 1e-9, next_lrs=(1e-9,)), False),
    "of a function, at its 50th step": (at(50, 1e-9, kind=None), True),
    "of a function, at its 51st step": (at(51, 1e-9, kind=None), False),
    "of a function that did not set it": (at(7, 1e-8, kind=None), False),
    "of a function without a rate": (at(7, kind=None, last_lr=()), False),
    "before a restart": (at(None, 0.0, kind="CosineAnnealingWarmRestarts"), True),
    "before a restart, from the least rate": (
        at(None, 0.0, kind="CosineAnnealingWarmRestarts", base_lrs=(0.0, 1e-8)),
        True,
    ),
    "before a restart to next to nothing": (
        at(None, 0.0, kind="CosineAnnealingWarmRestarts", base_lrs=(9e-9,)),
        False,
    ),
    "of no known position": (at(None, 1e-9, next_lrs=(2e-9,)), False),
    "complete": (at(9, 0.0, total_steps=10), True),
    "complete but for a step": (at(8, 0.0, total_steps=10), False),
}


@pytest.mark.parametrize("name", NEXT_TO_NOTHING)
def test_a_rate_next_to_nothing_is_excused_where_the_schedule_gives_it(name: str) -> None:
    scheduler, excused = NEXT_TO_NOTHING[name]
    for rate in (9e-9, 0.0):
        (said_of_it,) = outcomes(two_epochs(scheduler, optimizers=(of_rates(rate),)), "CK502")
        assert said_of_it.startswith("pass: " if excused else "warning: ")
    (said_of_it,) = outcomes(two_epochs(scheduler, optimizers=(of_rates(1e-8),)), "CK502")
    assert said_of_it.startswith("pass: ")


def test_a_rate_is_too_high_above_twice_its_first_one() -> None:
    assert outcomes(two_epochs(optimizers=(of_rates(2e-2),)), "CK502")[0].startswith("pass: ")
    assert outcomes(two_epochs(optimizers=(of_rates(2.001e-2),)), "CK502")[0].startswith("warning: ")
    four, five = of_rates(0.01, 0.011, 0.012, 0.013), of_rates(0.01, 0.011, 0.012, 0.013, 0.014)
    assert [" ..." in outcomes(two_epochs(optimizers=(o,)), "CK502")[0] for o in (four, five)] == [False, True]


SET_LAST: dict[str, tuple[Facts, str]] = {
    "two of one optimizer, one of which it has": (two_epochs(at(5, 0.3), at(5)), "pass: "),
    "two of one optimizer, none of which it has": (
        two_epochs(at(5, 0.3), at(5, 0.2)),
        "warning: the optimizer's learning rate is 1.000000e-02 and its scheduler set 3.000000e-01",
    ),
    "two of two optimizers": (two_epochs(at(5, 0.3), at(5), optimizers=(of_rates(1e-2), of_rates(0.3))), "pass: "),
    "two of two optimizers, one of which none has": (
        two_epochs(at(5, 0.3), at(5), optimizers=(of_rates(1e-2), of_rates(0.2))),
        "warning: no optimizer has the learning rate 3.000000e-01",
    ),
    "a group without a rate": (two_epochs(at(5, 0.3), optimizers=(of_rates(1e-2, None),)), ""),
    "a second optimizer without a rate": (
        two_epochs(at(5, 0.3), optimizers=(of_rates(1e-2), of_rates(None))),
        "",
    ),
    "a scheduler that says nothing of its rate": (two_epochs(at(5, 0.3), at(5, last_lr=())), ""),
}


@pytest.mark.parametrize("name", SET_LAST)
def test_each_scheduler_has_an_optimizer_with_its_rate(name: str) -> None:
    facts, expected = SET_LAST[name]
    said_of_it = outcomes(facts, "CK503")
    assert len(said_of_it) == bool(expected)
    assert " ".join(said_of_it).startswith(expected)


def test_a_rate_that_this_runs_schedule_does_not_give_is_told() -> None:
    (said_of_it,) = outcomes(two_epochs(at(5, scheduled_lr=(0.5,))), "CK504")
    assert said_of_it == (
        "warning: learning rate 1.000000e-02 at scheduler step 5, where this run's schedule gives 5.000000e-01"
    )
    assert outcomes(two_epochs(at(5, scheduled_lr=(1e-2,))), "CK504")[0].startswith("pass: ")


LEFT: dict[str, tuple[Facts, str]] = {
    "in epochs": (two_epochs(at(10, total_steps=20), max_epochs=4), "pass: the schedule has 10 of 20 steps left"),
    "in epochs, one more": (two_epochs(at(10, total_steps=19), max_epochs=4), "error: .* 9 of 19 .* the run 10:"),
    "in steps": (two_epochs(at(10, total_steps=20), max_steps=20), "pass: "),
    "in steps, one more": (two_epochs(at(10, total_steps=20), max_steps=21), "error: .* the run 11:"),
    "in steps and epochs": (two_epochs(at(10, total_steps=20), max_steps=21, max_epochs=4), "pass: "),
    "in no steps": (two_epochs(at(10, total_steps=20), max_steps=-1, max_epochs=5), "error: .* the run 15:"),
    "accumulated": (
        two_epochs(at(10, total_steps=15), max_epochs=4, accumulate_grad_batches=2),
        "error: .* 5 of 15 steps left and the run 6:",
    ),
    "of epochs": (two_epochs(at(2, total_steps=4), intervals=("epoch",), max_epochs=4), "pass: .* 2 of 4 "),
    "of epochs, one more": (
        two_epochs(at(2, total_steps=3), intervals=("epoch",), max_epochs=4, max_steps=11),
        "error: .* 1 of 3 .* the run 2:",
    ),
    "of every second step": (two_epochs(at(10, total_steps=11), every=(2,), max_epochs=9), "pass: "),
    "in a finished run": (two_epochs(at(10, total_steps=10), max_epochs=2), "pass: .* 0 of 10 "),
    "in a finished run of epochs of no known length": (
        two_epochs(at(10, total_steps=10), max_epochs=2, batches_per_epoch=None),
        "pass: .* 0 of 10 ",
    ),
    "inside an epoch": (
        inside_the_third(two_epochs(at(10, total_steps=14), max_epochs=4, accumulate_grad_batches=2)),
        "error: .* 4 of 14 steps left and the run 5:",
    ),
    "in steps of no known count": (
        dataclasses.replace(
            two_epochs(at(10, total_steps=10), max_steps=20), progress=ProgressFacts(epochs_completed=2)
        ),
        "info: the schedule is complete",
    ),
    "of a run of no known length": (two_epochs(at(10, total_steps=10)), "info: the schedule is complete: 10 of 10"),
    "beyond the end": (two_epochs(at(11, total_steps=10)), "error: the schedule has 10 steps and stands at 11"),
    "of a cosine": (
        two_epochs(at(10, kind="CosineAnnealingLR", options={"T_max": 19}), max_epochs=4),
        "",
    ),
    "of a cosine, one more": (
        two_epochs(at(10, kind="CosineAnnealingLR", options={"T_max": 18}), max_epochs=4),
        "info: CosineAnnealingLR reaches its end at step 18, and the run goes on to 20",
    ),
    "of a cosine that counts nothing": (
        two_epochs(at(None, kind="CosineAnnealingLR", options={"T_max": 18}), max_epochs=4),
        "",
    ),
    "of two optimizers": (
        two_epochs(at(10, total_steps=11), optimizers=(of_rates(1e-2),) * 2, max_epochs=4),
        "pass: .* 1 of 11 ",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_steps_left_in_the_schedule_and_in_the_run(name: str) -> None:
    facts, expected = LEFT[name]
    said_of_it = outcomes(facts, "CK505")
    assert len(said_of_it) == bool(expected)
    assert re.match(expected, " ".join(said_of_it)), said_of_it


@pytest.mark.parametrize(("max_epochs", "told"), [(3, True), (4, False), (5, False)])
def test_a_run_made_shorter_than_its_schedule_is_told(max_epochs: int, told: bool) -> None:
    """Of 22 steps of the schedule 10 are done; that a run ends a step before its schedule is common."""
    for scheduler in (at(10, total_steps=22 - 1), at(10, kind="CosineAnnealingLR", options={"T_max": 22 - 1})):
        now = two_epochs(scheduler, max_epochs=max_epochs)
        facts = dataclasses.replace(now, live=True, saved=two_epochs(scheduler, max_epochs=9))
        ends = [line for line in outcomes(facts, "CK505") if "training ends before" in line]
        assert bool(ends) == told
        unchanged = dataclasses.replace(now, live=True, saved=now)
        assert not [line for line in outcomes(unchanged, "CK505") if "training ends before" in line]
        for unknown in (at(None, total_steps=21), at(None, kind="CosineAnnealingLR", options={"T_max": 21})):
            assert not [
                m for m in outcomes(dataclasses.replace(facts, schedulers=(unknown,)), "CK505") if "ends b" in m
            ]
        not_each_step = dataclasses.replace(now.run, scheduler_frequencies=(2,))
        assert not [m for m in outcomes(dataclasses.replace(facts, run=not_each_step), "CK505") if "ends before" in m]
