"""The guard in every kind of Trainer and module: each is trained, its checkpoints verified and resumed from, and the
guard has no word to say against a run that is as it should be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import quiet_trainer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Options, Report, Severity, verify_checkpoint

EPOCHS, BATCHES = 3, 4


def rows(batches: int = BATCHES) -> StatefulDataLoader:
    features = torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(0))
    return StatefulDataLoader(TensorDataset(features), batch_size=2)


class Net(LightningModule):
    """Two layers and AdamW, validation and a schedule; each test leaves out or replaces one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def loss(self, batch: Any) -> Tensor:
        return self.head(self.backbone(batch[0])).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    def train_dataloader(self) -> Any:
        return rows()

    def val_dataloader(self) -> Any:
        return rows(2)

    test_dataloader = predict_dataloader = val_dataloader


class Gan(LightningModule):
    """Written by hand: two optimizers that take turns, each with a schedule that the module steps."""

    discriminates_every = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        of_generator, of_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), 2))
        self._step(of_generator, -self.discriminator(fake).mean())
        if batch_idx % self.discriminates_every == 0:
            self._step(of_discriminator, self.discriminator(fake.detach()).mean() - self.discriminator(real).mean())
        for schedule in self.lr_schedulers():
            schedule.step()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4) for m in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in optimizers]

    def train_dataloader(self) -> Any:
        return rows()


class RareDiscriminator(Gan):
    discriminates_every = 3


class Truncated(Net):
    """Backpropagation through time by hand: several steps of the optimizer within one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in batch[0].split(1):
            optimizer.zero_grad()
            self.manual_backward(self.head(self.backbone[0](part)).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[torch.ones(2, 4)] for _ in range(BATCHES)])


class Plain:
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(Stream())

    def __len__(self) -> int:
        return BATCHES


class Endless(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Iterator[list[Tensor]]:
        while True:
            yield [torch.ones(2, 4)]


def net(**methods: Callable[..., Any]) -> type[Net]:
    return type("Net", (Net,), methods)


def with_optimizer(make: Callable[[Net], Any]) -> type[Net]:
    return net(configure_optimizers=make)


def one_cycle(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    total = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=total)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def plateau(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}


def warm_up(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)]
    parts.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def two_schedules(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    by_step = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}
    return [optimizer], [by_step, torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Stateless:
    """A scheduler of the user's own, which has nothing to save."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.9

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: None) -> None:
        assert state is None


def scheduler_without_state(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return [optimizer], [Stateless(optimizer)]


def frozen_part(module: Net) -> Any:
    module.backbone.requires_grad_(False)
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def every_other_loss(self: Net, batch: Any, batch_idx: int) -> Any:
    return self.loss(batch) if batch_idx % 2 else None


def skip_the_rest(self: Net, batch: Any, batch_idx: int) -> int | None:
    return -1 if batch_idx == 2 else None


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=get_ema_avg_fn(0.9))


LOST_EPOCH = "CK305 saved after the last batch of an epoch"
"""True of the file, which may be resumed from without the guard; with it no epoch is lost."""


@dataclass(frozen=True)
class Case:
    """A kind of run.

    Attributes:
        allowed: codes of what is true of it and worth a warning.
        steps: checkpoints inside an epoch to resume from.
    """

    module: Callable[[], LightningModule] = Net
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    allowed: tuple[str, ...] = ()
    steps: tuple[int, ...] = (3, 6)


NO_POSITION = ("CK305",)
"""The data has no position to save, so that a resume inside an epoch trains some of it again."""

CASES: dict[str, Case] = {
    "plain": Case(),
    "gan": Case(Gan),
    "gan that rarely discriminates": Case(RareDiscriminator),
    "truncated backpropagation": Case(Truncated),
    "iterable of unknown length": Case(
        net(train_dataloader=lambda self: DataLoader(Stream(), batch_size=None)), allowed=NO_POSITION
    ),
    "endless data": Case(
        net(train_dataloader=lambda self: DataLoader(Endless(), batch_size=None)),
        {"max_steps": 9, "max_epochs": -1, "val_check_interval": 5},
        allowed=(*NO_POSITION, "trained nothing"),
    ),
    "data that is no loader": Case(net(train_dataloader=lambda self: Plain()), allowed=NO_POSITION),
    "a plain loader": Case(
        net(train_dataloader=lambda self: DataLoader(rows().dataset, batch_size=2)), allowed=NO_POSITION
    ),
    "no validation": Case(net(validation_step=LightningModule.validation_step)),
    "no scheduler": Case(with_optimizer(lambda m: torch.optim.AdamW(m.parameters()))),
    "no optimizer": Case(with_optimizer(lambda m: None)),
    "optimizer without state": Case(with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))),
    "lbfgs": Case(with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), lr=1e-3))),
    "one cycle": Case(with_optimizer(one_cycle)),
    "plateau": Case(with_optimizer(plateau)),
    "warm-up in sequence": Case(with_optimizer(warm_up)),
    "two schedules on one optimizer": Case(with_optimizer(two_schedules)),
    "scheduler without state": Case(
        net(configure_optimizers=scheduler_without_state, lr_scheduler_step=lambda self, scheduler, _: scheduler.step())
    ),
    "frozen part": Case(with_optimizer(frozen_part)),
    # Lightning counts a step that the optimizer, without a gradient, does not do: to a file that is a step lost.
    "losses left out": Case(net(training_step=every_other_loss), allowed=("CK401", "CK402"), steps=(6,)),
    "rest of the epoch skipped": Case(net(on_train_batch_start=skip_the_rest)),
    "logger": Case(options={"logger": True}),
    "overfit_batches": Case(options={"overfit_batches": 2}),
    "limit_train_batches": Case(options={"limit_train_batches": 3}),
    "limit_train_batches as a share": Case(options={"limit_train_batches": 0.5}),
    "max_time": Case(options={"max_time": "00:01:00:00"}),
    "max_steps": Case(options={"max_steps": 7, "max_epochs": -1}),
    "min_epochs": Case(options={"min_epochs": 2}),
    "val_check_interval": Case(options={"val_check_interval": 2}),
    "val_check_interval across epochs": Case(options={"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "check_val_every_n_epoch": Case(options={"check_val_every_n_epoch": 2}),
    "accumulation": Case(options={"accumulate_grad_batches": 2}),
    "accumulation that leaves a rest": Case(options={"accumulate_grad_batches": 3}),
    "accumulation that changes": Case(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]),
    "gradient clipping": Case(options={"gradient_clip_val": 0.1}),
    "bf16-mixed": Case(options={"precision": "bf16-mixed"}),
    "bf16-true": Case(options={"precision": "bf16-true"}),
    "64-true": Case(options={"precision": "64-true"}),
    "several training loaders": Case(
        net(
            train_dataloader=lambda self: CombinedLoader({"a": rows(), "b": rows(4)}, "max_size_cycle"),
            training_step=lambda self, batch, batch_idx: self.loss(batch["a"]) + self.loss(batch["b"]),
        )
    ),
    "several validation loaders": Case(net(val_dataloader=lambda self: [rows(1), rows(2)])),
    "loaders made anew every epoch": Case(options={"reload_dataloaders_every_n_epochs": 1}),
    "swa": Case(callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, device=None)]),
    "ema": Case(callbacks=lambda: [Ema()]),
    "early stopping": Case(callbacks=lambda: [EarlyStopping("loss", patience=5)]),
    "fine-tuning of a backbone": Case(
        with_optimizer(lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)),
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)],
        steps=(3,),  # later ones are resumed with a frozen backbone, and the guard says so
    ),
}


def run(
    folder: Path, case: Case, saves: Sequence[Callback] = (), ckpt_path: Path | None = None
) -> tuple[Trainer, list[str]]:
    """A Trainer after its run, with all that the guard warned of and found wrong."""
    guard = CheckpointGuard()
    options = {"num_sanity_val_steps": 0, "max_epochs": EPOCHS} | case.options
    if options.get("logger"):
        options["logger"] = CSVLogger(folder)
    trainer = quiet_trainer(folder, guard, *case.callbacks(), *saves, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(2)
        trainer.fit(case.module(), ckpt_path=ckpt_path)
    said = [str(w.message) for w in caught if "CheckpointGuard" in str(w.message)]
    return trainer, said + (wrong_in(guard.report) if guard.report else [])


def wrong_in(report: Report) -> list[str]:
    findings = [f for severity in (Severity.ERROR, Severity.WARNING) for f in report.of(severity)]
    return [f"{report.path}: {f.code} {f.message}" for f in findings]


def saving(folder: Path, **options: Any) -> list[Callback]:
    by_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, **options)
    by_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, **options)
    return [by_step, by_epoch]


@pytest.mark.parametrize("name", CASES)
def test_a_sound_run_hears_nothing_of_the_guard(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    first, said = run(tmp_path, case, saving(tmp_path))
    inside = [path for path in (tmp_path / f"step={step}.ckpt" for step in case.steps) if path.exists()]
    at_end = sorted(tmp_path.glob("epoch=*.ckpt"))
    assert inside or at_end
    reports = {path: verify_checkpoint(path, Options(deep=True)) for path in [*inside, *at_end]}
    said += [wrong for report in reports.values() for wrong in wrong_in(report) if LOST_EPOCH not in wrong]
    for path in [*inside, *at_end[:1]]:
        if reports[path].facts.progress.global_step != first.global_step:
            again, of_resume = run(tmp_path / "again", case, ckpt_path=path)
            said += of_resume
            assert again.global_step == first.global_step or "CK305" in case.allowed
    assert [line for line in said if not any(code in line for code in case.allowed)] == []


# Runs that save no such checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"enable_checkpointing": False},
        {"limit_train_batches": 0},
        {"max_epochs": 0},
        {"limit_val_batches": 0},
        {"barebones": True, "logger": None, "enable_progress_bar": None, "enable_model_summary": None},
        {"profiler": "simple"},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"inference_mode": False},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in list(options.items())[:2]),
)
def test_a_trainer_without_checkpoints_hears_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    _, said = run(tmp_path, Case(options=options))
    assert said == []
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_weights_alone_are_saved_and_evaluated(tmp_path: Path) -> None:
    _, said = run(tmp_path, Case(), saving(tmp_path, save_weights_only=True))
    assert said == []
    for verb in ("validate", "test", "predict"):
        guard = CheckpointGuard(strict=True)
        getattr(quiet_trainer(tmp_path, guard), verb)(Net(), ckpt_path=tmp_path / "step=6.ckpt")
        assert guard.report is not None


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_without_a_checkpoint_hears_nothing(verb: str, tmp_path: Path, recwarn: Any) -> None:
    getattr(quiet_trainer(tmp_path, CheckpointGuard(strict=True)), verb)(Net())
    assert not [w for w in recwarn if "CheckpointGuard" in str(w.message)]


def test_a_trainer_fits_twice(tmp_path: Path, recwarn: Any) -> None:
    guard = CheckpointGuard(strict=True)
    trainer = quiet_trainer(tmp_path, guard, *saving(tmp_path), max_epochs=1)
    module = Net()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    trainer.test(module, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, ckpt_path=tmp_path / "epoch=0.ckpt")
    trainer.validate(module, ckpt_path="best", verbose=False)
    trainer.predict(module)
    assert trainer.global_step == 3 * BATCHES
    assert guard.report is not None
    assert not [w for w in recwarn if "CheckpointGuard" in str(w.message)]


class WithRate(Net):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("options", [{}, {"fallback": "previous"}])
def test_a_rate_is_searched_for_after_a_run(options: dict[str, Any], tmp_path: Path, recwarn: Any) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(strict=True, **options), max_epochs=1)
    module = WithRate()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "older.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    Tuner(trainer).lr_find(module, num_training=3)
    assert trainer.global_step == 2 * BATCHES
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert sorted(file.name for file in tmp_path.glob("*.ckpt*")) == ["older.ckpt", "older.ckpt.manifest.json"]
    assert not list(tmp_path.glob(".lr_find*"))
    assert not [w for w in recwarn if "CheckpointGuard" in str(w.message)]
