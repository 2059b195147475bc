"""Genuine checkpoints of many kinds, each written by the library that writes it in life and by nothing else.

`GENUINE` names them. A verification must find no error in any of them, and no warning but those that `Genuine.warnings`
lists with the reason why the warning is right.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torchmetrics
import transformers
from builders import enstack_folder, quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

ROWS, BATCH_SIZE = 28, 4
BATCHES = ROWS // BATCH_SIZE

NO_POSITION = {
    "CK305": "a plain DataLoader's position is not in the checkpoint, so a resume inside the epoch trains other batches"
}


@dataclasses.dataclass(frozen=True)
class Genuine:
    """How to write one checkpoint.

    Attributes:
        write: writes it into a folder and returns the path to verify.
        warnings: the codes of the warnings that are right here, each with the reason.
        purpose: what it is fit for.
    """

    write: Callable[[Path], Path]
    warnings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    purpose: Literal["resume", "inference"] = "resume"


GENUINE: dict[str, Genuine] = {}


def genuine(name: str, write: Callable[[Path], Path], **options: Any) -> None:
    if name in GENUINE:
        raise ValueError(f"two checkpoints are called {name}")
    GENUINE[name] = Genuine(write, **options)


# Lightning


class Net(LightningModule):
    """Two layers, trained by whatever optimizer and schedule a case names."""

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        interval: str = "step",
        frequency: int = 1,
        stateful: bool = True,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.interval, self.frequency = interval, frequency
        self.stateful = stateful
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(features)))  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = self(batch[0]).square().mean() + 0.1
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_schedule is None:
            return optimizer
        schedule = {
            "scheduler": self.make_schedule(optimizer),
            "interval": self.interval,
            "frequency": self.frequency,
            "monitor": "loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> DataLoader[Any]:
        loader: type[DataLoader[Any]] = StatefulDataLoader if self.stateful else DataLoader
        return loader(rows(), batch_size=BATCH_SIZE)


def rows() -> Dataset[Any]:
    return TensorDataset(torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)))


def fit(folder: Path, module: LightningModule, *callbacks: Callback, file: str = "c.ckpt", **options: Any) -> Path:
    """Trains, and saves as the Trainer stands at the end."""
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module)
    trainer.save_checkpoint(folder / file)
    return folder / file


def saved_while_training(folder: Path, module: LightningModule, *callbacks: Callback, **options: Any) -> Path:
    """Trains with a ModelCheckpoint and returns the first file that it wrote."""
    saves = {name: options.pop(name) for name in ("every_n_train_steps", "monitor", "save_last") if name in options}
    keep = ModelCheckpoint(folder / "saved", save_top_k=-1, filename="{epoch}-{step}", **saves)
    torch.manual_seed(0)
    start = options.pop("ckpt_path", None)
    quiet_trainer(folder, keep, *callbacks, **{"max_epochs": 2, **options}).fit(module, ckpt_path=start)
    return min((folder / "saved").glob("epoch=*.ckpt"), key=lambda p: int(p.stem.rpartition("=")[2].partition("-")[0]))


def lightning(
    name: str,
    module: Callable[[], LightningModule] = Net,
    *callbacks: Callable[[], Callback],
    write: Callable[..., Path] = fit,
    warnings: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    genuine(
        f"lightning, {name}",
        lambda folder: write(folder, module(), *(make() for make in callbacks), **options),
        warnings=warnings or {},
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "Muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=1e-3),
    "transformers Adafactor": lambda p: transformers.Adafactor(p, relative_step=True, warmup_init=True, lr=None),
    "tensor learning rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, one tensor at a time": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW with a group of no parameters": lambda p: torch.optim.AdamW([{"params": list(p)}, {"params": []}]),
}
for _name, _optimizer in OPTIMIZERS.items():
    lightning(f"optimizer {_name}", lambda o=_optimizer: Net(o))

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedules.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, total_iters=40, power=2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=20, eta_min=1e-5),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=30),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-4, 1e-2, step_size_up=4, cycle_momentum=False),
    "OneCycleLR to its end": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=14),
    "OneCycleLR to its end, linear": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=14, anneal_strategy="linear"),
    "CosineAnnealingLR to its end": lambda o: schedules.CosineAnnealingLR(o, T_max=14),
    "CosineAnnealingLR past its end": lambda o: schedules.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts at a restart": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=7),
    "CyclicLR, each half as high": lambda o: schedules.CyclicLR(
        o, 1e-4, 1e-2, step_size_up=2, mode="triangular2", cycle_momentum=False
    ),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.95),
    "transformers linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 30),
    "transformers linear, in its warm-up": lambda o: transformers.get_linear_schedule_with_warmup(o, 10_000, 100_000),
    "transformers linear, to its end": lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 14),
    "transformers inverse square root": lambda o: transformers.get_inverse_sqrt_schedule(o, 3),
    "transformers cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, 30),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, T_max=20)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, total_iters=4), schedules.ExponentialLR(o, 0.9)]
    ),
}
for _name, _schedule in SCHEDULES.items():
    lightning(f"schedule {_name} every step", lambda s=_schedule: Net(schedule=s))
for _name in ("StepLR", "CosineAnnealingLR", "ExponentialLR"):
    lightning(f"schedule {_name} every epoch", lambda s=SCHEDULES[_name]: Net(schedule=s, interval="epoch"))
lightning(
    "schedule ReduceLROnPlateau", lambda: Net(schedule=lambda o: schedules.ReduceLROnPlateau(o), interval="epoch")
)
lightning(
    "schedule ReduceLROnPlateau at its lowest",
    lambda: Net(
        schedule=lambda o: schedules.ReduceLROnPlateau(o, patience=0, min_lr=1e-4, threshold=10.0), interval="epoch"
    ),
    max_epochs=6,
)
lightning("schedule every second epoch", lambda: Net(schedule=SCHEDULES["StepLR"], interval="epoch", frequency=2))
lightning("schedule every second step", lambda: Net(schedule=SCHEDULES["StepLR"], frequency=2))

for _k in (2, 3):  # 7 batches an epoch: neither divides it
    lightning(f"accumulation over {_k}", lambda: Net(schedule=SCHEDULES["OneCycleLR"]), accumulate_grad_batches=_k)
lightning(
    "accumulation over 2, saved inside an epoch",
    Net,
    write=saved_while_training,
    every_n_train_steps=2,
    accumulate_grad_batches=2,
)
lightning("accumulation that changes", Net, lambda: GradientAccumulationScheduler({0: 3, 1: 2}))
lightning("bfloat16 mixed", Net, precision="bf16-mixed")
lightning("bfloat16", Net, precision="bf16-true")
lightning("float64", Net, precision="64-true")
lightning("gradient clipping", Net, gradient_clip_val=0.5)
lightning("an exponential average of the weights", Net, lambda: _ema())
lightning("stopped early", Net, lambda: EarlyStopping("loss", patience=1, min_delta=10.0), max_epochs=5)
lightning("max_steps inside an epoch", Net, max_steps=10, max_epochs=-1)
lightning("limited batches", Net, limit_train_batches=3)
lightning("part of the batches", Net, limit_train_batches=0.5)
lightning(
    "stochastic weight averaging",
    lambda: Net(lambda p: torch.optim.SGD(p, lr=1e-2), SCHEDULES["CosineAnnealingLR"], "epoch"),
    lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    max_epochs=4,
    warnings={"CK501": "the averaging's own schedule took over, with a position of its own"},
)
lightning("inside an epoch", Net, write=saved_while_training, every_n_train_steps=3)
lightning(
    "inside an epoch, plain loader",
    lambda: Net(stateful=False),
    write=saved_while_training,
    every_n_train_steps=3,
    warnings=NO_POSITION,
)
lightning("at an epoch's end, plain loader", lambda: Net(stateful=False), write=saved_while_training)
lightning("with a monitored best", Net, write=saved_while_training, monitor="loss", save_last=True)


class Saves(Callback):
    """Saves once in some hook, as people do in their own callbacks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *others: object) -> None:
        path = Path(trainer.default_root_dir) / "saved.ckpt"
        if trainer.current_epoch == 1 and not path.exists():
            trainer.save_checkpoint(path)


def saved_in(hook: str) -> Callable[..., Path]:
    def write(folder: Path, module: LightningModule, **options: Any) -> Path:
        trainer = quiet_trainer(folder, Saves(hook), max_epochs=2, **options)
        trainer.fit(module, val_dataloaders=DataLoader(rows(), batch_size=BATCH_SIZE))
        return folder / "saved.ckpt"

    return write


HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
)
for _name in HOOKS:
    lightning(
        f"saved in {_name}",
        lambda: Net(schedule=SCHEDULES["OneCycleLR"]),
        write=saved_in(_name),
        warnings={"CK305": "Lightning takes the epoch for done"} if _name == "on_train_epoch_start" else {},
    )
for _name in ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"):
    lightning(
        f"saved in {_name}",
        write=saved_in(_name),
        warnings={"CK303": "the hook runs inside a step: weights and optimizer may be one step from the counters"},
    )
lightning("validated twice an epoch", Net, write=saved_in("on_validation_end"), val_check_interval=0.5)
lightning("validated every second epoch", Net, write=saved_in("on_validation_end"), check_val_every_n_epoch=2)
lightning("a Timer", Net, lambda: Timer({"hours": 1}))
lightning("ended by max_time", Net, max_time={"seconds": 0.02}, max_epochs=1000)
lightning("pruned", Net, lambda: ModelPruning("l1_unstructured", amount=0.5))
lightning(
    "pruned, masks in the checkpoint",
    Net,
    lambda: ModelPruning("l1_unstructured", amount=0.5),
    write=saved_while_training,
)
lightning(
    "stochastic weight averaging to come",
    lambda: Net(OPTIMIZERS["SGD"]),
    lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=5),
)


def _ema() -> Callback:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging()


class Gan(LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self, second_every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.second_every = second_every
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for optimizer, turn in ((generator, True), (discriminator, batch_idx % self.second_every == 0)):
            if turn:
                optimizer.zero_grad()
                self.manual_backward(self.discriminator(self.generator(batch[0])).square().mean())
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.discriminator.parameters())]

    def train_dataloader(self) -> DataLoader[Any]:
        return StatefulDataLoader(rows(), batch_size=BATCH_SIZE)


class LateSecond(Gan):
    """Its second optimizer begins in the second epoch, which a run of one epoch does not see."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.current_epoch:
            super().training_step(batch, batch_idx)
        else:
            generator, _ = self.optimizers()
            generator.zero_grad()
            self.manual_backward(self.generator(batch[0]).square().mean())
            generator.step()


class ByHand(Net):
    """Manual optimization in one of the forms that Lightning's documentation shows."""

    def __init__(self, form: str) -> None:
        super().__init__(schedule=SCHEDULES["ExponentialLR"])
        self.automatic_optimization = False
        self.form = form

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self(batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss  # type: ignore[no-any-return]

        if self.form == "closure":
            optimizer.step(closure)
        elif self.form == "toggled":
            with optimizer.toggle_model():
                closure()
                optimizer.step()
        elif self.form == "accumulated":
            self.manual_backward(self(batch[0]).square().mean())
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        self.lr_schedulers().step()


for _name in ("closure", "toggled", "accumulated"):
    lightning(f"optimized by hand, {_name}", lambda form=_name: ByHand(form))
lightning("two optimizers, the second not begun", LateSecond, max_epochs=1)
lightning("two optimizers", Gan)
lightning("two optimizers, one every second batch", lambda: Gan(2))


class Grouped(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.first.parameters(), "lr": 1e-4}, {"params": self.second.parameters(), "lr": 1e-2}]
        optimizer = torch.optim.AdamW(groups)
        schedule = schedules.OneCycleLR(optimizer, max_lr=[1e-3, 1e-1], total_steps=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class NamedByPart(Net):
    """Two groups, each with the names that the parameters have in their own layer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([{"params": list(part.named_parameters())} for part in (self.first, self.second)])


class TwoSchedules(Net):
    """A warm-up by steps and a decay by epochs on one optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        warm_up = {"scheduler": schedules.LinearLR(optimizer, 0.1, total_iters=5), "interval": "step"}
        return [optimizer], [warm_up, {"scheduler": schedules.ExponentialLR(optimizer, 0.9), "interval": "epoch"}]


class Finetuned(Net):
    """Its first layer joins the optimizer later, in a group of its own (BackboneFinetuning)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.first

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()))
        return [optimizer], [schedules.StepLR(optimizer, 2)]


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class FrozenInTheOptimizer(Frozen):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Unfrozen(Frozen):
    """The first layer joins in the second epoch, as in gradual unfreezing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())

    def on_train_epoch_start(self) -> None:
        self.first.requires_grad_(self.current_epoch > 0)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.third(self.second(torch.relu(self.first(features))))  # type: ignore[no-any-return]


class Buffered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.norm(features))


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(self.first)
        self.second = nn.utils.parametrizations.spectral_norm(self.second)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(8)

    def configure_optimizers(self) -> Any:
        self(torch.ones(1, 4))
        return super().configure_optimizers()


class OddParameters(Net):
    """A complex one, a single number, and one without a value."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.scale, self.none = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward((features.to(torch.complex64) @ self.turn).abs() * self.scale)


class SparseEmbedding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4, sparse=True)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.words((features[:, 0] * 3).long().abs() % 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.words.parameters())


class AdapterAlone(Net):
    """Saves only the adapter that it trains, as PEFT does."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.first(features) + self.lora_b(self.lora_a(features)))  # type: ignore[no-any-return]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if "lora" in n}


class Measuring(Net):
    """States of metrics in the checkpoint: counts, lists, and the best so far, infinite at first."""

    def __init__(self) -> None:
        super().__init__()
        parts = torchmetrics.AUROC("binary"), torchmetrics.MaxMetric(), torchmetrics.MinMetric()
        self.metrics = nn.ModuleList([torchmetrics.Accuracy("multiclass", num_classes=2), *parts])
        for metric in self.metrics:
            metric.persistent(True)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.metrics[1].update(torch.rand(4), torch.tensor([0, 1, 0, 1]))
        return super().training_step(batch)


class AttentionBias(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attn_bias", torch.full((3, 3), float("-inf")).triu(1))


class OfItsOwn(Net):
    """Adds to the checkpoint whatever plain values there are."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = [1, "a", None, {"x": torch.ones(2)}, ("b", 2.0), {1, 2}, b"abc", 1j, 2**70]
        checkpoint["kinds"] = {"dtype": torch.float16, "size": torch.Size([1, 2]), "device": torch.device("cpu")}
        checkpoint["random"] = torch.get_rng_state()


class Wrapped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.DataParallel(self.first)
        self.second = torch.compile(self.second, backend="eager")


class Untrained(Net):
    """Without any optimizer, as a module that only measures."""

    def configure_optimizers(self) -> None:
        return None


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[torch.ones(4)]] * ROWS)


class OfUnknownLength(Net):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=BATCH_SIZE)


class Skipping(Net):
    """Leaves every third batch out, so that the optimizer steps less often than there are batches."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        return None if batch_idx % 3 == 2 else super().training_step(batch)


class WithHyperParameters(Net):
    def __init__(self, width: int = 3, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.save_hyperparameters()


class Breaks(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        if self.global_step == 9:
            raise RuntimeError("the node is gone")
        return super().training_step(batch)


lightning("several param groups", Grouped)
lightning("frozen parameters", Frozen)
lightning("frozen parameters in the optimizer", FrozenInTheOptimizer)
lightning(
    "parameters unfrozen later",
    Unfrozen,
    warnings={"CK403": "parameters with fewer steps than the others may come from another save; the hint names both"},
)
lightning("names that two groups share", NamedByPart)
lightning("two schedules on one optimizer", TwoSchedules)
lightning(
    "a backbone that joins later, under a schedule",
    Finetuned,
    lambda: BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_lr=1e-4),
    max_epochs=4,
    warnings={"CK403": "the backbone joined the optimizer later, and the hint says so"},
)
lightning("weight norm and spectral norm", Parametrized)
lightning("lazy layers", Lazy)
lightning("complex, scalar and empty parameters", OddParameters)
lightning("a sparse embedding", SparseEmbedding)
lightning("an adapter alone", AdapterAlone)
lightning("states of metrics", Measuring)
lightning("a causal mask called bias", AttentionBias)
lightning("entries of its own", OfItsOwn)
lightning("compiled and parallel layers", Wrapped)
lightning("tied weights", Tied)
lightning("buffers with infinite values", Buffered)
lightning("no optimizer", Untrained)
lightning("iterable data of unknown length", OfUnknownLength)
lightning(
    "batches without a loss",
    Skipping,
    warnings={"CK401": "the optimizer is behind the counters, which a lost step looks like too; the hint names both"},
)
lightning("hyper-parameters", WithHyperParameters)
lightning("spaces and Unicode in the path", Net, file="bester Stand – épreuve 1 模型.ckpt")
lightning("renamed", Net, file="renamed.pt")
lightning("renamed without a suffix", Net, file="model")


def _zero_steps(folder: Path) -> Path:
    return fit(folder, Net(schedule=SCHEDULES["CosineAnnealingLR"]), max_epochs=0)


def _after_validation(folder: Path) -> Path:
    trainer = quiet_trainer(folder)
    trainer.validate(Net(), DataLoader(rows(), batch_size=BATCH_SIZE), verbose=False)
    trainer.save_checkpoint(folder / "c.ckpt")
    return folder / "c.ckpt"


def _on_exception(folder: Path) -> Path:
    try:
        quiet_trainer(folder, OnExceptionCheckpoint(folder), enable_checkpointing=True).fit(Breaks())
    except RuntimeError:
        return folder / "on_exception.ckpt"
    raise AssertionError("training was not interrupted")


def _resumed(folder: Path) -> Path:
    path = saved_while_training(folder / "first", Net(), every_n_train_steps=3)
    trainer = quiet_trainer(folder, max_epochs=3)
    trainer.fit(Net(), ckpt_path=path)
    trainer.save_checkpoint(folder / "c.ckpt")
    return folder / "c.ckpt"


def _resumed_three_times(folder: Path) -> Path:
    path = None
    for epochs in (1, 2, 4):
        trainer = quiet_trainer(folder, max_epochs=epochs, accumulate_grad_batches=2)
        trainer.fit(Net(schedule=SCHEDULES["CosineAnnealingLR"], interval="epoch"), ckpt_path=path)
        path = folder / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
    return folder / "4.ckpt"


def _stopped_and_resumed(folder: Path) -> Path:
    path = fit(folder, Net(), EarlyStopping("loss", patience=1, min_delta=10.0), max_epochs=5)
    trainer = quiet_trainer(folder, EarlyStopping("loss", patience=3, min_delta=10.0), max_epochs=8)
    trainer.fit(Net(), ckpt_path=path)
    trainer.save_checkpoint(folder / "more.ckpt")
    return folder / "more.ckpt"


def _resumed_behind_the_last_batch(folder: Path) -> Path:
    path = saved_while_training(folder / "first", Net(), every_n_train_steps=BATCHES, max_epochs=3)
    return saved_while_training(folder / "second", Net(), max_epochs=3, ckpt_path=path)


def _half_precision(folder: Path, module: type[Net]) -> Path:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return fit(folder, module(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])


class Overflowing(Net):
    """One batch an epoch overflows, so that the gradient scaler skips its step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch) * (math.inf if batch_idx == 3 else 1.0)


def _with_a_found_rate(folder: Path) -> Path:
    module = Net()
    module.lr = 1e-3
    return fit(folder, module, LearningRateFinder(num_training_steps=5, min_lr=1e-6))


def _weights_only(folder: Path) -> Path:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(Net())
    trainer.save_checkpoint(folder / "c.ckpt", weights_only=True)
    return folder / "c.ckpt"


def _link(folder: Path) -> Path:
    path = fit(folder, Net())
    (folder / "last.ckpt").symlink_to(path.name)
    return folder / "last.ckpt"


def _with_validation(folder: Path) -> Path:
    keep = ModelCheckpoint(folder / "saved", save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(folder, keep, max_epochs=1, val_check_interval=2)
    trainer.fit(Net(), val_dataloaders=DataLoader(rows(), batch_size=BATCH_SIZE))
    return folder / "saved" / "step=4.ckpt"


genuine("lightning, no step taken", _zero_steps)
genuine(
    "lightning, saved after validating alone",
    _after_validation,
    purpose="inference",
)
genuine(
    "lightning, saved on an exception",
    _on_exception,
    warnings={"CK303": "the exception came inside a step, which the counters show"},
)
genuine("lightning, resumed inside an epoch", _resumed)
genuine("lightning, resumed three times", _resumed_three_times)
genuine("lightning, stopped early and resumed", _stopped_and_resumed)
genuine(
    "lightning, resumed behind an epoch's last batch",
    _resumed_behind_the_last_batch,
    warnings={"CK302": "Lightning counted an epoch that it did not train, so that the run ends one early"},
)
genuine(
    "lightning, behind an epoch's last batch",
    lambda folder: saved_while_training(folder, Net(), every_n_train_steps=BATCHES, max_epochs=3),
    warnings={
        "CK305": "the restored loader stands at its end, and Lightning counts the next epoch without training it"
    },
)
genuine(
    "lightning, behind the last batch of a limited epoch",
    lambda folder: saved_while_training(folder, Net(), every_n_train_steps=3, limit_train_batches=3),
    warnings={
        "CK305": "the loader's length is not in the checkpoint; the hint says that a limited epoch loses nothing"
    },
)
genuine("lightning, float16 mixed", lambda folder: _half_precision(folder, Net))
genuine("lightning, float16 mixed, with steps skipped", lambda folder: _half_precision(folder, Overflowing))
genuine("lightning, with a learning rate found", _with_a_found_rate)
genuine("lightning, weights only", _weights_only, purpose="inference")
genuine("lightning, a link to the last", _link)
genuine("lightning, validated inside the epoch", _with_validation)

# EnStack

ENSTACK_CONFIG = {
    "safetensors at an epoch's end": {},
    "bin at an epoch's end": {"weights": "pytorch_model.bin"},
    "inside an epoch": {"epoch": 3, "step": 4},
    "few optimizer steps fewer": {"epoch": 4, "optimizer_steps": 36},
}
for _name, _options in ENSTACK_CONFIG.items():
    genuine(
        f"enstack, {_name}",
        lambda folder, o=_options: enstack_folder(folder / "best model", **o),
        warnings=NO_POSITION if "inside" in _name else {},
    )

# Hugging Face


def roberta(**options: Any) -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=34, num_labels=5)
    return transformers.RobertaForSequenceClassification(config, **options)


class Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(index, index + 8) % 50 + 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 5)}


class OneWeight(nn.Module):
    """The smallest thing that transformers' Trainer trains, and no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(input_ids[:, :1].float()).square().mean()}


def huggingface_trainer(folder: Path, step: int, model: Callable[[], nn.Module] = roberta, **options: Any) -> Path:
    torch.manual_seed(0)
    defaults = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": step, "logging_steps": 2}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    transformers.Trainer(model(), arguments, train_dataset=Tokens()).train()
    return folder / f"checkpoint-{step}"


HUGGINGFACE: dict[str, tuple[int, dict[str, Any]]] = {
    "AdamW inside an epoch": (5, {}),
    "AdamW at an epoch's end": (7, {}),
    "Adafactor": (7, {"optim": "adafactor"}),
    "SGD": (7, {"optim": "sgd"}),
    "accumulation over 2": (3, {"gradient_accumulation_steps": 2}),
    "cosine with warm-up": (10, {"lr_scheduler_type": "cosine", "warmup_steps": 3}),
    "bfloat16": (7, {"bf16": True}),
    "max_steps": (4, {"max_steps": 9}),
    "finished": (14, {}),
    "AdamW, fused": (7, {"optim": "adamw_torch_fused"}),
    "part of an epoch": (7, {"num_train_epochs": 1.5}),
    "epochs that accumulation does not divide": (
        3,
        {"save_strategy": "epoch", "gradient_accumulation_steps": 3, "num_train_epochs": 2.3},
    ),
    "a constant rate": (7, {"lr_scheduler_type": "constant"}),
    "cosine with restarts": (
        7,
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    ),
    "a polynomial": (7, {"lr_scheduler_type": "polynomial"}),
    "inverse square root": (7, {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}),
    "warm-up, stable, decay": (
        7,
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    ),
    "no clipping": (7, {"max_grad_norm": 0.0}),
    "gradient checkpointing": (7, {"gradient_checkpointing": True}),
    "label smoothing": (7, {"label_smoothing_factor": 0.1}),
    "the newest alone": (14, {"save_total_limit": 1, "save_steps": 2}),
    "a plain torch module": (7, {"model": OneWeight}),
}
for _name, (_step, _options) in HUGGINGFACE.items():
    genuine(
        f"huggingface Trainer, {_name}",
        lambda folder, s=_step, o=_options: huggingface_trainer(folder, s, **o),
    )


def pretrained(model: Callable[[], Any], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.manual_seed(0)
        model().save_pretrained(folder / "model", **options)
        return folder / "model"

    return write


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    return transformers.ViTForImageClassification(config)


def of_roberta(kind: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = {**roberta().config.to_dict(), "id2label": None, "label2id": None, "num_labels": 2, **sizes}
        return getattr(transformers, f"Roberta{kind}")(transformers.RobertaConfig(**config))

    return make


def small(kind: str, config: str, **sizes: Any) -> Callable[[], Any]:
    """A model of any architecture whose configuration calls its sizes as BERT's does."""
    usual = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    usual |= {"intermediate_size": 32, "max_position_embeddings": 34}
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**usual, **sizes))


def encoder_alone() -> Any:
    return transformers.RobertaModel(roberta().config)


MODELS: dict[str, Callable[[], Any]] = {
    "RoBERTa": roberta,
    "RoBERTa's encoder alone": encoder_alone,
    "BERT for masked words": bert,
    "GPT-2": gpt2,
    "T5": t5,
    "ViT": vit,
    "RoBERTa for regression": of_roberta("ForSequenceClassification", num_labels=1),
    "RoBERTa with named labels": of_roberta("ForSequenceClassification", id2label={0: "a", 1: "b", 2: "c"}),
    "RoBERTa for tokens": of_roberta("ForTokenClassification", num_labels=7),
    "RoBERTa for masked words": of_roberta("ForMaskedLM"),
    "RoBERTa that answers questions": of_roberta("ForQuestionAnswering"),
    "RoBERTa as a decoder": of_roberta("ForCausalLM", is_decoder=True, add_cross_attention=True),
    "BERT for classes": small("BertForSequenceClassification", "BertConfig", num_labels=3),
    "BERT for pretraining": small("BertForPreTraining", "BertConfig"),
    "XLM-RoBERTa": small("XLMRobertaForSequenceClassification", "XLMRobertaConfig", num_labels=4),
    "CamemBERT": small("CamembertForMaskedLM", "CamembertConfig"),
    "DistilBERT": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3)
    ),
    "DeBERTa": small("DebertaV2ForSequenceClassification", "DebertaV2Config", num_labels=3),
    "ELECTRA": small("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8, num_labels=3),
    "Longformer": small("LongformerForSequenceClassification", "LongformerConfig", attention_window=4, num_labels=3),
    "ALBERT": small("AlbertForSequenceClassification", "AlbertConfig", embedding_size=8, num_labels=3),
    "Llama": small("LlamaForCausalLM", "LlamaConfig"),
    "Llama for classes": small("LlamaForSequenceClassification", "LlamaConfig", num_labels=4, pad_token_id=0),
    "Mistral": small("MistralForCausalLM", "MistralConfig", num_key_value_heads=1),
    "RoBERTa in bfloat16": lambda: roberta().to(torch.bfloat16),
}
for _name, _model in MODELS.items():
    genuine(f"huggingface model, {_name}", pretrained(_model), purpose="inference")
genuine("huggingface model, several shards", pretrained(roberta, max_shard_size="10KB"), purpose="inference")


def _bin_model(folder: Path) -> Path:
    """As transformers wrote models before safetensors."""
    (folder / "model").mkdir()
    model = roberta()
    model.config.save_pretrained(folder / "model")
    torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")
    return folder / "model"


genuine("huggingface model, pytorch_model.bin", _bin_model, purpose="inference")

# Sharded


def _distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded", no_dist=True)
    return folder / "sharded"


def _distributed_model(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save(nn.Linear(4, 2).state_dict(), checkpoint_id=folder / "sharded", no_dist=True)
    return folder / "sharded"


genuine("sharded, model and optimizer", _distributed, purpose="inference")
genuine("sharded, model alone", _distributed_model, purpose="inference")

# Plain files


def _torch_file(value: Callable[[], object], name: str = "c.pt", **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.manual_seed(0)
        torch.save(value(), folder / name, **options)
        return folder / name

    return write


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


genuine("torch file, a state dict", _torch_file(lambda: _network().state_dict()), purpose="inference")
genuine("torch file, .bin", _torch_file(lambda: _network().state_dict(), "weights.bin"), purpose="inference")
genuine(
    "torch file, before 1.6",
    _torch_file(lambda: _network().state_dict(), _use_new_zipfile_serialization=False),
    purpose="inference",
)
genuine(
    "torch file, quantized values",
    _torch_file(lambda: {"w": torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8)}),
    purpose="inference",
)


def _several_in_a_byte() -> dict[str, Tensor]:
    """Weights as of a quantized embedding: their rows begin at a whole byte."""
    scale, zero = torch.ones(3), torch.zeros(3)
    return {
        str(dtype): torch.quantize_per_channel(torch.randn(3, 5), scale, zero, 0, dtype)
        for dtype in (torch.quint4x2, torch.quint2x4)
    }


genuine("torch file, several quantized values in a byte", _torch_file(_several_in_a_byte), purpose="inference")
genuine(
    "torch file, several quantized values in a byte, before 1.6",
    _torch_file(_several_in_a_byte, _use_new_zipfile_serialization=False),
    purpose="inference",
)
genuine(
    "torch file, float8 and complex values",
    _torch_file(lambda: {"a": torch.randn(3).to(torch.float8_e4m3fn), "b": torch.randn(3, dtype=torch.complex64)}),
    purpose="inference",
)


def _safetensors_file(folder: Path) -> Path:
    save_file(_network().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _tied_safetensors(folder: Path) -> Path:
    save_model(Tied(), str(folder / "tied.safetensors"))
    return folder / "tied.safetensors"


genuine("safetensors file", _safetensors_file, purpose="inference")
genuine("safetensors file, tied weights", _tied_safetensors, purpose="inference")


def _snapshot_with_extras(folder: Path) -> Path:
    path = pretrained(roberta)(folder)
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    (path / "README.md").write_text("# a model")
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return path


genuine("huggingface model, with what else a repository holds", _snapshot_with_extras, purpose="inference")
