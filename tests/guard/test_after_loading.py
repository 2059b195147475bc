"""What the guard says once a checkpoint is restored into a live Trainer: steps, schedules, and what changed since."""

from __future__ import annotations

import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import edited, enstack_folder, every_epoch, every_step, quiet_trainer, truncate
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.migration import utils as migration
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import Report, Severity, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.readers import lightning as lightning_reader
from enstack_lightning.guard import live
from enstack_lightning.guard.live import loaded_as_judged, loaded_facts

EPOCHS = 4
ROWS, BATCH_SIZE = 20, 4


def features(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


class Net(LightningModule):
    """Two linear layers; what the tests change between the run that saves and the run that resumes are arguments."""

    def __init__(
        self,
        optimizer: Callable[..., Any] = lambda p: AdamW(p, lr=1e-2),
        schedule: Callable[..., Any] | None = None,
        interval: str = "step",
        data: Any = None,
        batch_size: int = BATCH_SIZE,
        backwards: bool = False,
        width: int = 4,
        **hyper_parameters: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "schedule", "interval", "data", "backwards", "batch_size"])
        self.first, self.second = torch.nn.Linear(4, width), torch.nn.Linear(width, 4)
        self.make_optimizer, self.make_schedule, self.interval = optimizer, schedule, interval
        self.data = TensorDataset(features(ROWS)) if data is None else data
        self.rows_of_batch, self.backwards = batch_size, backwards

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.second(self.first(batch[0])).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(parameters[::-1] if self.backwards else parameters)
        if self.make_schedule is None:
            return optimizer
        scheduler = {"scheduler": self.make_schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.rows_of_batch)


def save(folder: Path, module: LightningModule, *callbacks: Callback, guard: bool = True, **options: Any) -> Path:
    """Trains for four epochs and returns the checkpoint of the end of the second."""
    guards, data = [CheckpointGuard()] if guard else [], options.pop("datamodule", None)
    trainer = quiet_trainer(folder, *guards, *callbacks, every_epoch(folder), **{"max_epochs": EPOCHS, **options})
    trainer.fit(module, datamodule=data)
    return folder / "epoch=1.ckpt"


def resume(path: Path, module: LightningModule, *callbacks: Callback, **options: Any) -> Report:
    """Resumes, and returns the report; what the guard warns of must be in it."""
    guard = CheckpointGuard()
    arguments = {"datamodule": options.pop("datamodule", None), "ckpt_path": path}
    trainer = quiet_trainer(path.parent / "again", guard, *callbacks, **{"max_epochs": EPOCHS, **options})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, **arguments)
    assert guard.report is not None
    assert guard.report.facts.live
    warned = [str(w.message) for w in said if "CheckpointGuard" in str(w.message) and "CK" in str(w.message)]
    assert len(warned) == guard.report.count(Severity.WARNING), warned
    return guard.report


def said(report: Report, code: str) -> str:
    return " | ".join(f"{f.severity} {f.message}" for f in report.findings if f.code == code)


def complaints(report: Report) -> list[str]:
    """All that is neither right nor only worth knowing, and every change that was noticed."""
    return [
        f"{f.severity} {f.code} {f.message}"
        for f in report.findings
        if f.severity in (Severity.WARNING, Severity.ERROR) or (f.code.startswith("CK9") and f.severity != "pass")
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a `Net` without arguments."""
    return save(tmp_path_factory.mktemp("plain"), Net())


# A healthy resume: not a word


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(row,) for row in features(ROWS)])


class Gan(LightningModule):
    """Two optimizers under manual optimization, one of which steps every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            if number and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(self.second(self.first(batch[0])).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [Adam(self.first.parameters()), Adam(self.second.parameters())]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(features(ROWS)), batch_size=BATCH_SIZE)


class ScheduledGan(Gan):
    """A `Gan` that steps its schedulers itself."""

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [schedules.ExponentialLR(o, 0.9) for o in optimizers]


class UnfreezeLater(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer)


class SetRateByHand(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-2 / (trainer.current_epoch + 1)
            group["weight_decay"] = 1e-3 * trainer.current_epoch


def sequence(optimizer: Any) -> Any:
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=5), schedules.CosineAnnealingLR(optimizer, 15)]
    return schedules.SequentialLR(optimizer, parts, milestones=[5])


HEALTHY: dict[str, tuple[Callable[[], LightningModule], dict[str, Any]]] = {
    "Adam, no schedule": (Net, {}),
    "SGD without state": (lambda: Net(lambda p: SGD(p, lr=0.1)), {}),
    "SGD with momentum": (lambda: Net(lambda p: SGD(p, lr=0.1, momentum=0.9)), {}),
    "a function": (lambda: Net(schedule=lambda o: schedules.LambdaLR(o, lambda s: 1 / (s + 1))), {}),
    "one cycle": (lambda: Net(schedule=lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20)), {}),
    "cosine": (lambda: Net(schedule=lambda o: schedules.CosineAnnealingLR(o, 20)), {}),
    "warm restarts": (lambda: Net(schedule=lambda o: schedules.CosineAnnealingWarmRestarts(o, 5, 2)), {}),
    "steps by epoch": (lambda: Net(schedule=lambda o: schedules.MultiStepLR(o, [1, 3]), interval="epoch"), {}),
    "a sequence": (lambda: Net(schedule=sequence), {}),
    "two optimizers by hand": (Gan, {}),
    "accumulation": (Net, {"accumulate_grad_batches": 2}),
    "data without a length": (lambda: Net(data=Streamed()), {}),
    "hyper-parameters": (lambda: Net(dropout=0.1, labels=["a", "b"], nested={"x": (1, 2)}), {}),
    "a capturable rate": (lambda: Net(lambda p: AdamW(p, lr=torch.tensor(1e-2))), {}),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("ignore")
def test_a_healthy_resume_hears_not_a_word(name: str, tmp_path: Path) -> None:
    make, options = HEALTHY[name]
    report = resume(save(tmp_path, make(), **options), make(), **options)
    assert complaints(report) == []
    assert report.verdict is Verdict.PASS


@pytest.mark.filterwarnings("ignore")
def test_a_rate_set_by_hand_is_no_change_of_the_configuration(tmp_path: Path) -> None:
    assert complaints(resume(save(tmp_path, Net(), SetRateByHand()), Net(), SetRateByHand())) == []


def saved_without_what_is_frozen(checkpoint: dict[str, Any]) -> None:
    checkpoint["callbacks"]["CheckpointGuard"]["resume"]["frozen"] = None


@pytest.mark.filterwarnings("ignore")
def test_layers_that_a_callback_unfroze_and_does_not_unfreeze_again_are_said(tmp_path: Path) -> None:
    """Lightning restores the param groups of `BaseFinetuning`, and leaves the layers frozen."""
    module, path = Net(), save(tmp_path, Net(), UnfreezeLater())
    report = resume(edited(path, tmp_path / "other.ckpt", saved_without_what_is_frozen), module, UnfreezeLater())
    assert not module.first.weight.requires_grad
    assert "warning 4 parameters got a gradient at the save, and 2 do now" in said(report, "CK917")
    assert "optimizer 0: 2 of 4 parameters have fewer steps than the others (5 to 10)" in said(report, "CK403")
    module = Net()
    report = resume(path, module, UnfreezeLater())
    assert module.first.weight.requires_grad
    assert complaints(report) == []


class FrozenByStep(Net):
    """Trains its first layer from the twelfth step on, or until then, as its hook says before every batch."""

    def __init__(self, until: bool) -> None:
        super().__init__(lambda _: AdamW(self.parameters(), lr=1e-2))
        self.until = until

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.first.requires_grad_((self.global_step >= 12) is not self.until)


class UnfrozenOnce(Net):
    """Made with a frozen layer, which a hook unfreezes at the start of one epoch."""

    def __init__(self) -> None:
        super().__init__(lambda _: AdamW(self.parameters(), lr=1e-2))
        self.first.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.first.requires_grad_(True)


@pytest.mark.parametrize("until", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_layers_that_a_hook_freezes_by_the_step_are_no_other_parameters(until: bool, tmp_path: Path) -> None:
    """At the report no hook has run yet."""
    for step in (3, 15):
        folder = tmp_path / f"{step}"
        save(folder, FrozenByStep(until), every_step(folder))
        report = resume(folder / f"step={step}.ckpt", FrozenByStep(until))
        frozen = (step > 12) is until
        assert said(report, "CK913") == "pass parameters in their places, as saved"
        assert ("info 2 parameters got a gradient at the save, and 4 do now" in said(report, "CK917")) is frozen
        assert [c for c in complaints(report) if "CK403" not in c and "info CK917" not in c] == []


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_a_hook_unfroze_once_is_said_to_be_frozen_again(tmp_path: Path) -> None:
    module, path = UnfrozenOnce(), save(tmp_path, UnfrozenOnce())
    report = resume(path, module)
    assert not module.first.weight.requires_grad
    assert "warning 4 parameters got a gradient at the save, and 2 do now" in said(report, "CK917")
    assert said(report, "CK913") == "pass parameters in their places, as saved"


def test_a_run_that_deliberately_trains_longer_is_no_warning(tmp_path: Path) -> None:
    def follows_the_length(optimizer: Any) -> Any:
        total = 5 * lengths[-1]
        return schedules.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / total))

    lengths = [4]
    path = save(tmp_path, Net(schedule=follows_the_length))
    lengths.append(8)
    report = resume(path, Net(schedule=follows_the_length), max_epochs=8)
    assert report.verdict is Verdict.PASS
    assert "info max_epochs was 4 and is 8" in said(report, "CK907")
    assert "info learning rate" in said(report, "CK504")


def test_a_schedule_of_the_runs_own_length_that_trains_longer_is_no_warning(tmp_path: Path) -> None:
    path = save(tmp_path, Net(schedule=lambda o: schedules.CosineAnnealingLR(o, 20)))
    report = resume(path, Net(schedule=lambda o: schedules.CosineAnnealingLR(o, 40)), max_epochs=8)
    assert report.verdict is Verdict.PASS
    assert "info T_max of scheduler 0 is given as 40 now, and the restored state keeps 20" in said(report, "CK907")


# What the guard records


def test_what_is_recorded_is_read_back_and_loads_as_weights_only(tmp_path: Path) -> None:
    module = Net(schedule=lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20))
    path = save(tmp_path, module, accumulate_grad_batches=1)
    torch.load(path, weights_only=True)
    run = verify_checkpoint(path).facts.run
    assert (run.batches_per_epoch, run.max_epochs, run.batch_size, run.dataset_rows) == (5, EPOCHS, BATCH_SIZE, ROWS)
    assert (run.optimizer_kinds, run.scheduler_kinds) == (("AdamW",), ("OneCycleLR",))
    assert run.scheduler_options[0]["total_steps"] == 20
    assert run.optimizer_options[0][0]["weight_decay"] == 1e-2
    assert [len(digits) for digits in run.parameter_digests[0]] == [4 * 8]
    assert run.trainable_parameters == 4
    assert (run.dataset_fingerprint or "").startswith("tensors:")
    assert run.total_steps == 20


def test_the_steps_of_the_run_are_those_that_lightning_estimates(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.estimated = trainer.estimated_stepping_batches

    for options in ({"max_epochs": 2, "accumulate_grad_batches": 2}, {"max_epochs": -1, "max_steps": 3}):
        asks = Asks()
        path = save(tmp_path, Net(), asks, every_step(tmp_path), **options)  # type: ignore[arg-type]
        path = tmp_path / "step=1.ckpt"
        assert verify_checkpoint(path).facts.run.total_steps == asks.estimated, options
        path.unlink()


# What changed since the save


def second(cls: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda o: cls(o, **options)


SINGLE = TensorDataset(features(ROWS))
CHANGES: dict[str, tuple[Callable[[], Net], Callable[[], Net], dict[str, Any], str, str]] = {
    "batch size": (
        Net,
        lambda: Net(batch_size=10),
        {},
        "CK903",
        "warning the batch size was 4 and is 10: an epoch of 5 batches has about 2 now",
    ),
    "accumulation": (Net, Net, {"accumulate_grad_batches": 5}, "CK904", "warning a step took the gradients of 1 batch"),
    "precision": (Net, Net, {"precision": "bf16-mixed"}, "CK909", "info the precision was 32-true and is bf16-mixed"),
    "true precision": (Net, Net, {"precision": "bf16-true"}, "CK909", "warning the precision was 32-true and is bf16"),
    "fewer rows": (
        Net,
        lambda: Net(data=TensorDataset(features(12))),
        {},
        "CK910",
        "warning the training data shrank from 20 to 12 rows: an epoch had 5 batches and has 3",
    ),
    "more rows": (Net, lambda: Net(data=TensorDataset(features(21))), {}, "CK910", "warning the training data grew"),
    "other rows": (
        Net,
        lambda: Net(data=TensorDataset(features(ROWS, seed=1))),
        {},
        "CK910",
        "warning the training data of 20 rows changed: its fingerprint was",
    ),
    "another split": (
        lambda: Net(data=Subset(SINGLE, range(8))),
        lambda: Net(data=Subset(SINGLE, range(8, 16))),
        {},
        "CK910",
        "warning the training data of 8 rows changed",
    ),
    "class of optimizer": (
        Net,
        lambda: Net(lambda p: Adam(p, lr=1e-2, weight_decay=1e-2)),
        {},
        "CK911",
        "warning optimizer 0 was AdamW and is Adam: it goes on with the moments of the other",
    ),
    "optimizer that lacks its options": (
        Net,
        lambda: Net(lambda p: SGD(p, lr=1e-2, momentum=0.9)),
        {},
        "CK911",
        "error optimizer 0 was AdamW and is SGD: the restored groups have no momentum",
    ),
    "class of scheduler": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.StepLR, step_size=9)),
        {},
        "CK912",
        "warning scheduler 0 was CosineAnnealingLR and is StepLR: it has the position of the other, 10",
    ),
    "interval": (
        lambda: Net(schedule=second(schedules.StepLR, step_size=50)),
        lambda: Net(schedule=second(schedules.StepLR, step_size=50), interval="epoch"),
        {},
        "CK912",
        "warning scheduler 0 stepped every step and is to step every epoch: its position 10 counts steps",
    ),
    "no scheduler": (
        lambda: Net(schedule=second(schedules.StepLR, step_size=50)),
        Net,
        {},
        "CK912",
        "warning the checkpoint has 1 scheduler and the run 0: the others are dropped",
    ),
    "a new scheduler": (
        Net,
        lambda: Net(schedule=second(schedules.StepLR, step_size=50)),
        {},
        "CK912",
        "warning the checkpoint has 0 schedulers and the run 1: the others begin at step 0",
    ),
    "order of parameters": (
        Net,
        lambda: Net(backwards=True),
        {},
        "CK913",
        "error optimizer 0: 4 of 4 parameters stand in another order than saved; parameter 0 was first.weight and is "
        "second.bias, with each other's moments",
    ),
    "learning rate": (
        Net,
        lambda: Net(lambda p: AdamW(p, lr=3e-4)),
        {},
        "CK907",
        "warning lr of optimizer 0 is given as 0.0003 now, and the restored state keeps 0.01",
    ),
    "weight decay": (
        Net,
        lambda: Net(lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)),
        {},
        "CK907",
        "warning weight_decay of optimizer 0 is given as 0.1 now, and the restored state keeps 0.01",
    ),
    "learning rate under a schedule": (
        lambda: Net(schedule=second(schedules.StepLR, step_size=2)),
        lambda: Net(lambda p: AdamW(p, lr=3e-4), second(schedules.StepLR, step_size=2)),
        {},
        "CK907",
        "warning lr of optimizer 0 is given as 0.0003 now, and the restored state keeps 0.01",
    ),
    "T_max": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=50)),
        {},
        "CK907",
        "warning T_max of scheduler 0 is given as 50 now, and the restored state keeps 20",
    ),
    "milestones": (
        lambda: Net(schedule=second(schedules.MultiStepLR, milestones=[15])),
        lambda: Net(schedule=second(schedules.MultiStepLR, milestones=[12])),
        {},
        "CK907",
        "warning milestones of scheduler 0",
    ),
    "a part of a sequence": (
        lambda: Net(schedule=sequence),
        lambda: Net(
            schedule=lambda o: schedules.SequentialLR(
                o, [schedules.LinearLR(o, 0.1, total_iters=5), schedules.CosineAnnealingLR(o, 99)], milestones=[5]
            )
        ),
        {},
        "CK907",
        "warning schedulers[1].T_max of scheduler 0 is given as 99 now, and the restored state keeps 15",
    ),
    "hyper-parameter": (
        lambda: Net(dropout=0.1),
        lambda: Net(dropout=0.5),
        {},
        "CK901",
        "info dropout was 0.1 and is 0.5: the run goes on with the new value",
    ),
    "heads": (
        lambda: Net(num_attention_heads=2),
        lambda: Net(num_attention_heads=4),
        {},
        "CK901",
        "error num_attention_heads was 2 and is 4",
    ),
    "order of labels": (
        lambda: Net(label_names=["a", "b"]),
        lambda: Net(label_names=["b", "a"]),
        {},
        "CK902",
        "error label_names are in another order",
    ),
    "a longer run than its one cycle": (
        lambda: Net(schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=20)),
        lambda: Net(schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=40)),
        {"max_epochs": 8},
        "CK505",
        "error the schedule has 10 of 20 steps left and the run 30",
    ),
    "more data than its one cycle": (
        lambda: Net(schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=20)),
        lambda: Net(
            data=TensorDataset(features(40)), schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=40)
        ),
        {},
        "CK505",
        "error the schedule has 10 of 20 steps left and the run 20",
    ),
    "less data than its one cycle": (
        lambda: Net(schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=20)),
        lambda: Net(
            data=TensorDataset(features(12)), schedule=second(schedules.OneCycleLR, max_lr=0.1, total_steps=20)
        ),
        {},
        "CK505",
        "warning the schedule has 10 of 20 steps left and the run 6: training ends before its learning rate has come",
    ),
    "a shorter run than its cosine": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        {"max_epochs": 3},
        "CK505",
        "info the schedule has 10 of 20 steps left and the run 5",
    ),
    "a longer run than its cosine": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        {"max_epochs": 8},
        "CK505",
        "info CosineAnnealingLR reaches its end at step 20, and the run goes on to 40: the rate rises again after it",
    ),
    "a frozen layer": (
        Net,
        lambda: frozen_but_given(),
        {},
        "CK917",
        "warning 4 parameters got a gradient at the save, and 2 do now, before the first batch: 2 more are frozen",
    ),
}


def frozen_but_given() -> Net:
    net = Net()
    net.make_optimizer = lambda _: AdamW(net.parameters(), lr=1e-2)
    net.first.requires_grad_(False)
    return net


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_a_change_is_said_before_a_batch_is_trained(name: str, plain: Path, tmp_path: Path) -> None:
    before, after, options, code, says = CHANGES[name]
    path = plain if before is Net else save(tmp_path, before())
    if says.startswith("error"):
        module = after()
        with pytest.raises(CheckpointGuardError, match=code) as raised:
            resume(path, module, **options)
        assert says.removeprefix("error ") in str(raised.value)
    else:
        report = resume(path, after(), **options)
        assert says in said(report, code)
        severity = says.partition(" ")[0]
        also = {
            "batch size",
            "accumulation",
            "class of scheduler",
            "interval",
            "a new scheduler",
            "no scheduler",
            "less data than its one cycle",
        }
        assert name in also or all(code in c or severity == "info" for c in complaints(report)), complaints(report)


# Checkpoints of runs without the guard: as much is compared as their own entries give away

BARE: dict[str, tuple[Callable[[], Net], Callable[[], Net], str, str]] = {
    "learning rate under a schedule": (
        lambda: Net(schedule=second(schedules.StepLR, step_size=2)),
        lambda: Net(lambda p: AdamW(p, lr=3e-4), second(schedules.StepLR, step_size=2)),
        "CK907",
        "lr of optimizer 0 is given as 0.0003 now, and the restored state keeps 0.01",
    ),
    "weight decay": (
        Net,
        lambda: Net(lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)),
        "CK907",
        "weight_decay of optimizer 0 is given as 0.1 now",
    ),
    "T_max": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=50)),
        "CK907",
        "T_max of scheduler 0 is given as 50 now",
    ),
    "class of scheduler": (
        lambda: Net(schedule=second(schedules.CosineAnnealingLR, T_max=20)),
        lambda: Net(schedule=second(schedules.StepLR, step_size=9)),
        "CK912",
        "scheduler 0 was CosineAnnealingLR and is StepLR",
    ),
    "optimizer that lacks its options": (
        Net,
        lambda: Net(lambda p: SGD(p, lr=1e-2, momentum=0.9)),
        "CK911",
        "optimizer 0 is SGD now: the restored groups have no momentum",
    ),
    "batch size": (
        lambda: Net(batch_size_of_data=4, data=TensorDataset(features(ROWS))),
        lambda: Net(batch_size_of_data=4),
        "",
        "",
    ),
}


@pytest.mark.parametrize("name", BARE)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_a_run_without_the_guard_is_compared_too(name: str, tmp_path: Path) -> None:
    before, after, code, says = BARE[name]
    path = save(tmp_path, before(), guard=False)
    assert complaints(resume(path, before())) == []
    if code == "CK911":
        with pytest.raises(CheckpointGuardError, match=says):
            resume(path, after())
    elif code:
        assert says in said(resume(path, after()), code)


def test_a_checkpoint_without_callbacks_is_judged_as_well(tmp_path: Path) -> None:
    """Lightning calls no callback's on_load_checkpoint for it."""
    path = edited(save(tmp_path, Net()), tmp_path / "bare.ckpt", lambda c: c.pop("callbacks"))
    assert resume(path, Net()).verdict is Verdict.PASS
    with pytest.raises(CheckpointGuardError, match="CK906 max_epochs is 2, and 2 epochs are done"):
        resume(path, Net(), max_epochs=2)


# A run that would train nothing


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_epochs": 2}, "CK906 max_epochs is 2, and 2 epochs are done: the run would train nothing"),
        ({"max_epochs": 1}, "CK906 max_epochs is 1, and 2 epochs are done"),
        ({"max_steps": 10}, "CK906 max_steps is 10, and 10 steps are taken"),
    ],
)
def test_a_run_with_nothing_left_ends_before_anything_is_restored(
    options: dict[str, Any], says: str, strict: bool, plain: Path, tmp_path: Path
) -> None:
    class Begun(Callback):
        begun = False

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.begun = True

    begun = Begun()
    trainer = quiet_trainer(tmp_path, CheckpointGuard(strict=strict), begun, **{"max_epochs": EPOCHS, **options})
    with pytest.raises(CheckpointGuardError, match=re.escape(says)):
        trainer.fit(Net(), ckpt_path=plain)
    assert not begun.begun


# Optimizers that torch cannot restore, or restores wrongly


def test_parameters_of_other_shapes_in_another_order_are_refused_before_the_first_step(tmp_path: Path) -> None:
    path = save(tmp_path, Net(width=3), guard=False)
    with pytest.raises(CheckpointGuardError, match=r"CK405 .*exp_avg of second\.bias has shape \[3, 4\].*first step"):
        resume(path, Net(width=3, backwards=True))


def frozen() -> Net:
    net = Net()
    net.first.requires_grad_(False)
    return net


def in_two_groups(parameters: list[Any]) -> Any:
    return AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=1e-2)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (Net, frozen, "CK913 optimizer 0, group 0 had 4 parameters and has 2: 2 are missing"),
        (frozen, Net, "CK913 optimizer 0, group 0 had 2 parameters and has 4: 2 were added"),
        (Net, lambda: Net(in_two_groups), "CK913 optimizer 0 had 1 param group and has 2"),
    ],
)
@pytest.mark.parametrize("guarded", [True, False])
def test_what_torch_refuses_is_explained(
    before: Callable[[], Net], after: Callable[[], Net], says: str, guarded: bool, tmp_path: Path
) -> None:
    path = save(tmp_path, before(), guard=guarded, max_epochs=2)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match=says), pytest.raises(ValueError, match="loaded state dict"):
        trainer.fit(after(), ckpt_path=path)


def test_other_parameters_in_the_same_places_are_a_warning(plain: Path) -> None:
    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = self.first
            del self.first

        @property
        def first(self) -> Any:  # type: ignore[override]
            return self.encoder

        @first.deleter
        def first(self) -> None:
            del self._modules["first"]

        @first.setter
        def first(self, value: Any) -> None:
            self._modules["first"] = value

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k.replace("first", "encoder"): v for k, v in weights.items()}

        def configure_optimizers(self) -> Any:
            return AdamW([*self.encoder.parameters(), *self.second.parameters()], lr=1e-2)

    report = resume(plain, Renamed())
    assert (
        "warning optimizer 0: 2 of 4 parameters are not those that were saved; parameter 0 is encoder.weight and was "
        "one of another name or shape" in said(report, "CK913")
    )


def of_the_optimizer(checkpoint: dict[str, Any]) -> dict[int, Any]:
    state: dict[int, Any] = checkpoint["optimizer_states"][0]["state"]
    return state


CHANGES_AFTER_LOADING: dict[str, Callable[[dict[str, Any]], object]] = {
    "a weight's dtype": lambda c: c["state_dict"].update({"first.bias": c["state_dict"]["first.bias"].half()}),
    "a weight's shape": lambda c: c["state_dict"].update({"first.bias": torch.zeros(7)}),
    "a weight's name": lambda c: c["state_dict"].update({"bias": c["state_dict"].pop("first.bias")}),
    "a weight more": lambda c: c["state_dict"].update({"more": torch.zeros(7)}),
    "a weight less": lambda c: c["state_dict"].pop("first.bias"),
    "the order of the weights": lambda c: c["state_dict"].update({"first.bias": c["state_dict"].pop("first.bias")}),
    "an entry more": lambda c: c.update(more=1),
    "a step": lambda c: of_the_optimizer(c)[0].update(step=torch.tensor(1.0)),
    "a step that is none": lambda c: of_the_optimizer(c)[0].update(step=torch.zeros(2)),
    "a moment's shape": lambda c: of_the_optimizer(c)[0].update(exp_avg=torch.zeros(7)),
    "a moment less": lambda c: of_the_optimizer(c)[0].pop("exp_avg"),
    "a learning rate": lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=0.5),
    "a counter": lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(processed=9),
}


@pytest.mark.parametrize("change", CHANGES_AFTER_LOADING.values(), ids=CHANGES_AFTER_LOADING)
def test_what_a_hook_changes_after_loading_is_not_as_judged(change: Callable[..., object], plain: Path) -> None:
    checkpoint, judged = torch.load(plain), verify_checkpoint(plain).facts
    assert loaded_as_judged(checkpoint, str(plain), judged)[1]
    change(checkpoint)
    loaded, is_as_judged = loaded_as_judged(checkpoint, str(plain), judged)
    assert not is_as_judged
    assert loaded == loaded_facts(checkpoint, str(plain)), "its defects are looked for"


def test_what_was_never_judged_is_judged_when_loaded(plain: Path) -> None:
    checkpoint = torch.load(plain)
    assert loaded_as_judged(checkpoint, str(plain), None) == (loaded_facts(checkpoint, str(plain)), False)


def damage(checkpoint: dict[str, Any]) -> dict[str, Any]:
    of_the_optimizer(checkpoint)[0]["step"] = torch.zeros(2)
    return checkpoint


class DamagingNet(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        damage(checkpoint)


class DamagingCallback(Callback):
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        damage(checkpoint)


class DamagingStrategy(SingleDeviceStrategy):
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return damage(super().load_checkpoint(*args, **kwargs))


class DamagingAtWeights(SingleDeviceStrategy):
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        super().load_model_state_dict(damage(checkpoint), strict)


class DamagingIO(TorchCheckpointIO):
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return damage(super().load_checkpoint(*args, **kwargs))


class DamagingWrapper(AsyncCheckpointIO):
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return damage(super().load_checkpoint(*args, **kwargs))


class DamagingGuard(CheckpointGuard):
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, damage(checkpoint))


class StandIn:
    """A callback of no class of Lightning's, without a `__dict__`, that hands everything on to another one."""

    __slots__ = ("callback", "log", "log_dict")  # which Lightning sets

    def __init__(self) -> None:
        self.callback = DamagingCallback()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)


def changed(thing: Any, method: str) -> Any:
    """The thing with a method of its own that damages what the method returns, or is given first."""
    own = getattr(thing, method)
    if method == "on_load_checkpoint":
        setattr(thing, method, damage)
    elif method == "load_checkpoint":
        setattr(thing, method, lambda *args, **kwargs: damage(own(*args, **kwargs)))
    else:
        setattr(thing, method, lambda checkpoint, **kwargs: own(damage(checkpoint), **kwargs))
    return thing


def on_cpu() -> SingleDeviceStrategy:
    return SingleDeviceStrategy(torch.device("cpu"))


DAMAGING: dict[str, dict[str, Callable[[], Any]]] = {
    "module": {"module": DamagingNet},
    "module's instance": {"module": lambda: changed(Net(), "on_load_checkpoint")},
    "callback": {"callback": DamagingCallback},
    "callback of another kind": {"callback": StandIn},
    "guard": {"guard": DamagingGuard},
    "strategy": {"strategy": lambda: DamagingStrategy(torch.device("cpu"))},
    "strategy, with the weights": {"strategy": lambda: DamagingAtWeights(torch.device("cpu"))},
    "strategy's instance": {"strategy": lambda: changed(on_cpu(), "load_checkpoint")},
    "strategy's instance, with the weights": {"strategy": lambda: changed(on_cpu(), "load_model_state_dict")},
    "io": {"plugins": DamagingIO},
    "io's instance": {"plugins": lambda: changed(TorchCheckpointIO(), "load_checkpoint")},
    "wrapper": {"plugins": DamagingWrapper},
    "wrapper's instance": {"plugins": lambda: changed(AsyncCheckpointIO(TorchCheckpointIO()), "load_checkpoint")},
    "migration": {},
}


@pytest.mark.parametrize("made_by", DAMAGING)
def test_what_puts_a_wrong_form_into_the_loaded_checkpoint_is_found(
    made_by: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {name: make() for name, make in DAMAGING[made_by].items()}
    path, module, guard = plain, made.pop("module", Net()), made.pop("guard", CheckpointGuard())
    before = [made.pop("callback")] if "callback" in made else []
    if made_by == "migration":
        monkeypatch.setattr(migration, "_migration_index", lambda: {"2.0.1": [damage]})
        path = edited(plain, tmp_path / "older.ckpt", lambda c: c.update({"pytorch-lightning_version": "2.0.0"}))
    trainer = quiet_trainer(tmp_path / "again", *before, guard, max_epochs=EPOCHS, **made)
    with pytest.raises(CheckpointGuardError, match="step is a tensor of shape"):
        trainer.fit(module, ckpt_path=path)
    assert not trainer.fit_loop.epoch_loop.batch_progress.total.ready, "before anything was restored"


class WatchingCallback(Callback):
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Could change it."""


@pytest.mark.parametrize(
    ("callback", "plugins", "times"),
    [(Callback, [], 0), (Callback, [AsyncCheckpointIO], 0), (WatchingCallback, [], 1)],
)
def test_optimizers_that_nobody_can_have_changed_are_not_read_twice(
    callback: type[Callback], plugins: list[Any], times: int, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_dicts, read = [], lightning_reader.optimizers_of

    def counted(entries: object, read_scalar: Any, known: Any = None) -> Any:
        of_dicts.extend([entries] if read_scalar is live._scalar and known is None else [])
        return read(entries, read_scalar, known)

    monkeypatch.setattr(lightning_reader, "optimizers_of", counted)
    resume(plain, Net(), callback(), plugins=[make() for make in plugins])
    assert len(of_dicts) == times


def replaced(plain: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[..., object]) -> Path:
    """A checkpoint in whose place another one of the same run is loaded."""
    judged, other = folder / "judged.ckpt", folder / "other.ckpt"
    shutil.copy(plain, judged)
    edited(plain, other, edit)
    load = torch_io.pl_load
    monkeypatch.setattr(torch_io, "pl_load", lambda path, **options: load(other, **options))
    return judged


def of_one_step(checkpoint: dict[str, Any]) -> None:
    of_the_optimizer(checkpoint)[0].update(step=torch.tensor(1.0))


def without_a_rate(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = math.nan


@pytest.mark.parametrize(("edit", "message"), [(without_a_rate, "lr is nan"), (damage, "step is a tensor of shape")])
def test_a_file_that_is_replaced_by_a_bad_one_once_it_is_judged_is_refused(
    edit: Callable[..., object], message: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointGuardError, match=message):
        resume(replaced(plain, tmp_path, monkeypatch, edit), Net())


def test_a_rate_that_is_no_number_once_all_is_restored_is_refused(plain: Path) -> None:
    """Set by what comes after the guard."""

    class SetsRate(Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            without_a_rate(checkpoint)

    with pytest.raises(CheckpointGuardError, match="lr is nan"):
        resume(plain, Net(), SetsRate())


def test_a_file_that_is_replaced_once_it_is_judged_is_found(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same counters, and an optimizer that has made fewer steps."""
    report = resume(replaced(plain, tmp_path, monkeypatch, of_one_step), Net())
    assert "warning optimizer 0: 1 of 4 parameters have fewer steps than the others (1 to 10)" in said(report, "CK403")


class ByHand(Net):
    """Manual optimization with one optimizer, or automatic with the same."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


@pytest.mark.parametrize("automatic", [True, False])
def test_a_change_between_automatic_and_manual_optimization_is_refused(automatic: bool, tmp_path: Path) -> None:
    path = save(tmp_path, ByHand(automatic))
    assert resume(path, ByHand(automatic)).verdict is Verdict.PASS
    with pytest.raises(CheckpointGuardError, match="CK302 the run's global_step is 0, and 10 optimizer steps are"):
        resume(path, ByHand(not automatic))


class TwoInTurn(Gan):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()[: self.count]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        optimizers = super().optimizers(use_pl_optimizer)
        return optimizers if isinstance(optimizers, list) else [optimizers]


@pytest.mark.parametrize(("before", "now", "says"), [(2, 1, "the state of the last 1 is dropped"), (1, 2, "begin")])
@pytest.mark.filterwarnings("ignore")
def test_more_or_fewer_optimizers_are_said(before: int, now: int, says: str, tmp_path: Path) -> None:
    path = save(tmp_path, TwoInTurn(before))
    report = resume(path, TwoInTurn(now))
    assert says in said(report, "CK911")


# Steps against counters, on the live run


class Losing(Callback):
    """Loses part of the optimizer's state on the way, as a plugin or an override of load_state_dict may."""

    def __init__(self, lose: Callable[[Any], object]) -> None:
        self.lose = lose

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lose(trainer.optimizers[-1])


def some_fresh(optimizer: Any) -> None:
    for parameter in list(optimizer.state)[:2]:
        del optimizer.state[parameter]


def step_of(optimizer: Any, parameters: slice, step: float) -> None:
    for state in list(optimizer.state.values())[parameters]:
        state["step"] = torch.tensor(step)


LOSSES: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "all state": (lambda o: o.state.clear(), "CK402", "error optimizer 0 has no state for any of its 4 parameters"),
    "part of it": (some_fresh, "CK408", "info optimizer 0: 2 of 4 parameters have no state: first.weight, first.bias"),
    "a few steps": (lambda o: step_of(o, slice(4), 8), "CK401", "warning optimizer steps 8, expected 10"),
    "the first epoch": (lambda o: step_of(o, slice(4), 5), "CK401", "warning optimizer steps 5, expected 10"),
    "too many": (lambda o: step_of(o, slice(4), 12), "CK401", "error optimizer steps 12, expected 10"),
    "frozen for a while": (
        lambda o: step_of(o, slice(2), 7),
        "CK403",
        "warning optimizer 0: 2 of 4 parameters have fewer steps than the others (7 to 10)",
    ),
    "one moment": (
        lambda o: next(iter(o.state.values())).pop("exp_avg"),
        "CK408",
        "error optimizer 0: 1 parameters have one of exp_avg and exp_avg_sq without the other: first.weight",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_live_optimizer_is_reconciled_with_the_counters(name: str, plain: Path, tmp_path: Path) -> None:
    lose, code, says = LOSSES[name]
    guard = CheckpointGuard()
    trainer = quiet_trainer(tmp_path, Losing(lose), guard, max_epochs=EPOCHS)
    if says.startswith("error"):
        with pytest.raises(CheckpointGuardError, match=code):
            trainer.fit(Net(), ckpt_path=plain)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Net(), ckpt_path=plain)
    assert guard.report is not None
    assert says in said(guard.report, code)
    hints = {f.hint for f in guard.report.findings if f.code == code and f.severity is not Severity.PASS}
    assert all(hints), "each says what to do"


def test_of_several_optimizers_under_manual_optimization_the_steps_are_added_up(tmp_path: Path) -> None:
    path = save(tmp_path, Gan())
    report = resume(path, Gan())
    assert said(report, "CK401").startswith("pass optimizer steps 16, expected 16")
    guard = CheckpointGuard()
    with pytest.warns(UserWarning, match="CK401 optimizer steps 10, expected 16"):
        quiet_trainer(tmp_path, Losing(lambda o: step_of(o, slice(9), 0.0)), guard, max_epochs=EPOCHS).fit(
            Gan(), ckpt_path=path
        )


class Overflowing(Net):
    """Its loss is infinite in one batch of an epoch, and the scaler skips that step; or it returns no loss there."""

    def __init__(self, loss: float | None) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx != 2 else None if self.loss is None else loss * self.loss


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))]}


@pytest.mark.filterwarnings("ignore")
def test_steps_that_the_gradient_scaler_skipped_are_what_float16_does(tmp_path: Path) -> None:
    path = save(tmp_path, Overflowing(float("inf")), **scaled())
    report = resume(path, Overflowing(float("inf")), **scaled())
    assert "info optimizer steps 8, expected 10" in said(report, "CK401")
    lost = resume(path, Overflowing(float("inf")))
    assert "warning the precision was 16-mixed and is 32-true: the gradient scaler's state is dropped" in said(
        lost, "CK909"
    )


@pytest.mark.filterwarnings("ignore")
def test_batches_without_a_loss_are_a_warning_that_names_them(tmp_path: Path) -> None:
    report = resume(save(tmp_path, Overflowing(None)), Overflowing(None))
    assert "warning optimizer steps 8, expected 10" in said(report, "CK401")
    (hint,) = {f.hint for f in report.findings if f.code == "CK401"}
    assert "batches without a loss would explain it" in hint


# The data


def test_data_that_shrank_below_the_position_is_refused(tmp_path: Path) -> None:
    """Lightning would begin the epoch anew and count on, without a word."""
    save(tmp_path, Net(), every_step(tmp_path), max_epochs=1)
    path = tmp_path / "step=4.ckpt"
    with pytest.raises(CheckpointGuardError, match="CK301 4 batches of the epoch are done, and an epoch has 3"):
        resume(path, Net(data=TensorDataset(features(12))), max_epochs=1)


class Fingerprinted(LightningDataModule):
    """As `VulnerabilityDataModule`: it tells the digest of its rows, and keeps it in checkpoints."""

    def __init__(self, digest: str, path: str = "here", tokenizer: str = "bytes") -> None:
        super().__init__()
        self.save_hyperparameters("path", "tokenizer")
        self.fingerprints, self.num_rows = {"train": digest}, {"train": ROWS}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(features(ROWS)), batch_size=BATCH_SIZE)

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprints": self.fingerprints, "num_rows": self.num_rows}


@pytest.mark.parametrize("guarded", [True, False])
def test_the_fingerprint_of_a_data_module_is_taken(guarded: bool, tmp_path: Path) -> None:
    path = save(tmp_path, Net(), guard=guarded, datamodule=Fingerprinted("a" * 64))
    assert complaints(resume(path, Net(), datamodule=Fingerprinted("a" * 64))) == []
    report = resume(path, Net(), datamodule=Fingerprinted("b" * 64))
    assert "warning the training data of 20 rows changed: its fingerprint was aaaaaaaaaaaa and is bbbbbbbbbbbb" in said(
        report, "CK910"
    )


def test_the_same_rows_in_another_place_and_another_tokenizer_are_told_apart(tmp_path: Path) -> None:
    save(tmp_path, Net(), every_step(tmp_path), datamodule=Fingerprinted("a" * 64), max_epochs=1)
    path = tmp_path / "step=3.ckpt"
    report = resume(path, Net(), datamodule=Fingerprinted("a" * 64, path="there"), max_epochs=1)
    assert said(report, "CK908") == "info path was 'here' and is 'there': the rows are the same"
    report = resume(path, Net(), datamodule=Fingerprinted("b" * 64, "there", "words"), max_epochs=1)
    assert "warning path was 'here' and is 'there': other rows, unless it is a copy" in said(report, "CK908")
    assert "warning tokenizer was 'bytes' and is 'words': token ids mean other tokens" in said(report, "CK908")


class Counted(torch.utils.data.Dataset[Any]):
    """A dataset of nobody's class that counts how often it is asked for a row."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        return (features(ROWS)[index],)


def test_a_dataset_of_an_unknown_class_is_never_asked_for_a_row(tmp_path: Path) -> None:
    data = Counted()
    path = save(tmp_path, Net(data=data))
    assert data.asked == EPOCHS * ROWS
    data = Counted()
    report = resume(path, Net(data=data))
    assert data.asked == 2 * ROWS
    assert said(report, "CK910") == "pass 20 rows of training data, as saved"


def test_a_dataset_of_hugging_face_that_was_made_anew_is_worth_knowing(tmp_path: Path) -> None:
    def data(shift: float) -> Any:
        rows = {"x": (features(ROWS) + shift).tolist()}
        return datasets.Dataset.from_dict(rows).with_format("torch")

    class Columns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["x"]], batch_idx)

    path = save(tmp_path, Columns(data=data(0)))
    assert complaints(resume(path, Columns(data=data(0)))) == []
    assert "info the training data of 20 rows changed" in said(resume(path, Columns(data=data(1))), "CK910")


@pytest.mark.filterwarnings("ignore")
def test_other_processes_seeds_and_versions_are_said(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(c: dict[str, Any]) -> None:
        c["pytorch-lightning_version"] = "2.99.0"
        guard = c["callbacks"]["CheckpointGuard"]
        guard["run"] |= {"world_size": 2, "seed": 7}
        guard["versions"] |= {"torch": "2.6.0"}

    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    report = resume(edited(plain, tmp_path / "c.ckpt", elsewhere), Net())
    assert said(report, "CK905").startswith("warning 2 processes saved and 1 are to resume")
    assert said(report, "CK914").startswith("info the seed was 7 and is 8")
    assert "warning the checkpoint was saved under lightning 2.99.0, and" in said(report, "CK915")
    assert "info the checkpoint was saved under torch 2.6.0, and this is" in said(report, "CK915")


# What it says, and to whom


def test_the_resume_report_says_steps_calculation_and_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = lambda: Net(schedule=lambda o: schedules.LambdaLR(o, lambda s: 1 - s / 20))  # noqa: E731
    path = save(tmp_path, module())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        resume(path, module())
    told = [r.getMessage() for r in caplog.records]
    for line in (
        f"resume from      {path}",
        "epoch            end of epoch 1 (2 of 4 epochs done); continues with epoch 2, batch 0 of 5; 0 batches trained "
        "twice; next LR 5.00e-03",
        "global step      10 of 20 = (2 epochs x 5 steps) + 0 mid-epoch steps",
        "optimizer steps  10, expected 10",
        "difference       0, tolerance 0 (the loop's counter): consistent",
        "scheduler steps  10, expected 10",
        "learning rate    1.00e-02 before restoring, 5.00e-03 after",
        "expected range   1.00e-08 to 2.00e-02: in range",
        "verdict          PASS",
    ):
        assert line in told


def test_the_report_expects_no_steps_that_manual_optimization_counts_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Several optimizers take more steps than an epoch has batches, and the loop counts no step of a scheduler."""
    path = save(tmp_path, ScheduledGan())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        resume(path, ScheduledGan())
        resume(path, ScheduledGan(), max_steps=30)
    told = [r.getMessage() for r in caplog.records]
    steps = [line for line in told if line.startswith(("global step", "scheduler steps"))]
    assert steps == ["global step      16", "scheduler steps  4", "global step      16 of 30", "scheduler steps  4"]


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [(None, "1.00e-08 to 2.00e-02: next to 0, as at"), ((1e-8, 1e-3), "1.00e-08 to 1.00e-03: out of range")],
)
def test_the_range_is_judged_as_the_rule_judges_it(
    bounds: tuple[float, float] | None, shown: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate of 0 at the start of a warm-up is in order, and so said; one above the bounds is not."""

    def module() -> Net:
        factor = 0.0 if bounds is None else 1.0
        return Net(schedule=lambda o: schedules.LambdaLR(o, lambda s: factor if s < 12 else 1.0))

    path = save(tmp_path, module())
    trainer = quiet_trainer(tmp_path, CheckpointGuard(lr_bounds=bounds), max_epochs=EPOCHS)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module(), ckpt_path=path)
    assert f"expected range   {shown}" in "\n".join(r.getMessage() for r in caplog.records)


def test_a_mismatch_is_shown_with_figures_and_possible_causes(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = CheckpointGuard()
    trainer = quiet_trainer(tmp_path, Losing(lambda o: step_of(o, slice(4), 8)), guard, max_epochs=EPOCHS)
    with (
        caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"),
        pytest.warns(UserWarning, match="CK401"),
    ):
        trainer.fit(Net(), ckpt_path=plain)
    told = [r.getMessage() for r in caplog.records]
    assert "optimizer steps  8, expected 10" in told
    assert "difference       2, tolerance 0 (the loop's counter): beyond it" in told
    assert any(line.startswith("possible causes  Steps skipped on overflow (GradScaler)") for line in told)


class Kept(CSVLogger):
    """A logger that keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.given: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.given.append((dict(metrics), step))
        super().log_metrics(metrics, step)


class Logging(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_the_scalars_go_to_the_runs_loggers_once_and_disturb_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, Logging())
    plainly, guarded = Kept(tmp_path / "a"), Kept(tmp_path / "b")
    quiet_trainer(tmp_path, max_epochs=EPOCHS, logger=plainly, log_every_n_steps=1).fit(Logging(), ckpt_path=path)
    resume(path, Logging(), logger=guarded, log_every_n_steps=1)
    (first, *others) = guarded.given
    assert first == (
        {
            "guard/optimizer_steps": 10.0,
            "guard/expected_optimizer_steps": 10.0,
            "guard/global_step": 10.0,
            "guard/lr_before": 1e-2,
            "guard/lr_after": 1e-2,
            "guard/warnings": 0.0,
            "guard/errors": 0.0,
        },
        10,
    )
    assert others == plainly.given
    rows = (tmp_path / "b" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 10


SEARCHES: dict[str, Callable[[], Callback]] = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=5, early_stop_threshold=None),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.filterwarnings("ignore")
def test_what_a_search_saves_and_goes_back_to_is_no_resume(search: str, tmp_path: Path) -> None:
    class Searched(Net):
        def __init__(self) -> None:
            super().__init__(lr=1e-2)
            self.batch_size = 2
            self.make_optimizer = lambda p: AdamW(p, lr=self.hparams["lr"])

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.data, batch_size=self.batch_size)

    guard = CheckpointGuard()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, guard, SEARCHES[search](), max_epochs=1).fit(Searched())
    assert not [w for w in told if "CheckpointGuard" in str(w.message)]
    assert guard.report is None, "the file is not judged, and the run that begins then is not called resumed"


# What the original document says it catches, and its warnings


def lose_file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def empty_file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"")


def in_a_lightning_file(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: edited(path, path, edit)


def all_steps(c: dict[str, Any], steps: float) -> None:
    for state in c["optimizer_states"][0]["state"].values():
        state["step"] = torch.tensor(steps)


def rate(c: dict[str, Any], value: float) -> None:
    c["optimizer_states"][0]["param_groups"][0].update(lr=value, initial_lr=1e-2)


ORIGINAL: dict[str, tuple[bool, Callable[[Path], object], bool, str]] = {
    "missing file": (True, lose_file("training_state.pth"), True, "CK205 .*training_state.pth"),
    "missing weights": (True, lose_file("model.safetensors"), True, "CK101 .*model.safetensors"),
    "empty file": (True, empty_file("config.json"), True, "CK102|CK103 .*config.json"),
    "empty checkpoint": (False, lambda p: p.write_bytes(b""), True, "CK10. .*is empty|CK10. .*empty"),
    "corrupted state (EOFError)": (False, lambda p: truncate(p, p.stat().st_size // 2), True, "CK104"),
    "no optimizer state": (False, in_a_lightning_file(lambda c: c.pop("optimizer_states")), True, "CK20"),
    "optimizer steps beyond the counters": (
        False,
        in_a_lightning_file(lambda c: all_steps(c, 5_000)),
        True,
        "CK401 optimizer steps 5,000, expected 10 .* 4,990 more than expected",
    ),
    "optimizer steps behind them": (
        False,
        in_a_lightning_file(lambda c: all_steps(c, 3)),
        False,
        "CK401 optimizer steps 3, expected 10 .* 7 fewer than expected",
    ),
    "learning rate very small": (False, in_a_lightning_file(lambda c: rate(c, 1.23e-9)), False, "CK502 .*1.23e-09"),
    "learning rate too large": (False, in_a_lightning_file(lambda c: rate(c, 0.5)), False, "CK502 .*5.00e-01 .*above"),
    "epoch and step out of range": (
        False,
        in_a_lightning_file(lambda c: c.update(epoch=-1, global_step=-5)),
        True,
        "CK30",
    ),
}


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.filterwarnings("ignore:.*(PyTree|LeafSpec|callbacks used to create)")
def test_every_issue_of_the_original_document_is_caught_by_the_guard(name: str, plain: Path, tmp_path: Path) -> None:
    is_folder, damage, refused, says = ORIGINAL[name]
    path = enstack_folder(tmp_path / "c") if is_folder else Path(shutil.copy(plain, tmp_path / "c.ckpt"))
    damage(path)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=EPOCHS)
    if refused:
        with pytest.raises(CheckpointGuardError, match=says):
            trainer.fit(Net(), ckpt_path=path)
    else:
        with pytest.warns(UserWarning, match=says):
            trainer.fit(Net(), ckpt_path=path)
