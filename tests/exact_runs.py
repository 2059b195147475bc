"""Runs whose every figure is recorded, for comparing a run that was resumed with the one that never stopped.

`python exact_runs.py FOLDER OPTIONS` trains with two processes, then resumes from each checkpoint that OPTIONS names,
and writes what each rank recorded to `FOLDER/rank-N`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAveragePrecision, BinaryF1Score, BinaryRecall

from enstack_lightning.data.loaders import TrainingSampler
from enstack_lightning.guard import CheckpointGuard

if TYPE_CHECKING:
    import pytest

ROWS, BATCH_SIZE = 28, 4
BATCHES = ROWS // BATCH_SIZE


class Rows(Dataset):
    """Rows with random noise from all three generators, as augmentation in a worker draws it."""

    def __init__(self, noise: bool) -> None:
        self.features = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, int]:
        features = self.features[row]
        if self.noise:
            features = features + 0.1 * torch.rand(4) + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return features, (features.sum() > 0).long(), row


class Counting(IterableDataset):
    """Gives rows one after the other, and keeps its position in a number that its iterators share."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(False)
        while self.at < ROWS:
            self.at += 1
            yield rows[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Recorded(LightningModule):
    """Dropout, metrics of every kind, validation, and a record of all that happens.

    Args:
        order: what shuffles: "sampler" is ours, "shuffle" torchdata's own, "generator" the same with a generator.
        plateau: a scheduler that goes by the validation's loss at an epoch's end, in place of one that goes by steps.
    """

    def __init__(
        self,
        order: str = "sampler",
        num_workers: int = 0,
        persistent: bool = False,
        noise: bool = False,
        plateau: bool = False,
        bucketed: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        super().__init__()
        self.order, self.num_workers, self.persistent, self.noise = order, num_workers, persistent, noise
        self.plateau, self.bucketed, self.batch_size = plateau, bucketed, batch_size
        self.network = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
        )
        self.mean = MeanMetric()
        self.scores = MetricCollection([BinaryAccuracy(), BinaryF1Score(), BinaryRecall()])
        self.curve = BinaryAveragePrecision()
        self.record = SimpleNamespace(events=[])  # out of the guard's sight, as what a run writes elsewhere

    @property
    def events(self) -> list[Any]:
        return self.record.events

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels, rows = batch
        logits = self.network(features)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        self.mean(loss.detach())
        self.scores.update(logits.detach().argmax(1), labels)
        self.curve.update(logits.detach().float().softmax(1)[:, 1], labels)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("loss", loss.detach(), on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("peak", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx == 0:
            self.log("first", loss.detach(), on_step=False, on_epoch=True)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append(["step", self.current_epoch, batch_idx, self.global_step, rows.tolist(), loss.item(), rate])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features, labels, _ = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.network(features).float(), labels))

    def on_train_epoch_start(self) -> None:
        self.scores.reset()
        self.curve.reset()

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.scores.compute())
        self.log("curve", self.curve.compute())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.plateau:
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.persistent,
        }
        rows = Rows(self.noise)
        if self.order == "plain":
            return DataLoader(rows, shuffle=True, **options)
        if self.order == "sampler":
            lengths = [1 + row * 7 % 10 for row in range(ROWS)] if self.bucketed else ROWS
            ranks = self.trainer.world_size, self.trainer.global_rank
            options["sampler"] = TrainingSampler(lengths, self.batch_size, 7, *ranks)
            options["sampler"].set_epoch(self.trainer.current_epoch)
        else:
            options["shuffle"] = True
        if self.order == "generator":
            options["generator"] = torch.Generator().manual_seed(5)
        return StatefulDataLoader(rows, **options)

    def val_dataloader(self) -> Any:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.persistent}
        return DataLoader(Rows(False), batch_size=14, **workers)


class InMemory(Logger):
    """A logger that keeps what it is given."""

    name = version = "in memory"

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not any(name.startswith("guard/") for name in metrics):  # said once at a resume, by the guard
            self.lines.append([step, dict(metrics)])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Record(Callback):
    """Adds validations and epochs to the module's record, and saves how long the records were."""

    def __init__(self, logger: InMemory) -> None:
        self.logger = logger
        self.module: Recorded | None = None
        self.events = self.lines = 0

    def setup(self, trainer: Trainer, pl_module: Recorded, stage: str) -> None:
        self.module = pl_module

    def on_validation_end(self, trainer: Trainer, pl_module: Recorded) -> None:
        if not trainer.sanity_checking:
            seen = float(trainer.callback_metrics["val_loss"])
            pl_module.events.append(["validation", trainer.current_epoch, trainer.global_step, seen])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Recorded) -> None:
        pl_module.events.append(["epoch begins", trainer.current_epoch])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Recorded) -> None:
        pl_module.events.append(["epoch", trainer.current_epoch, trainer.global_step])

    def on_train_end(self, trainer: Trainer, pl_module: Recorded) -> None:
        pl_module.events.append(["end", trainer.current_epoch, trainer.global_step])

    def state_dict(self) -> dict[str, int]:
        return {"events": len(self.module.events) + self.events, "lines": len(self.logger.lines) + self.lines}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.events, self.lines = state_dict["events"], state_dict["lines"]


class Everywhere(Checkpoint):
    """Saves in every hook that checkpoints are saved in: `batch-N`, `validation-N`, `epoch-N`, N from 1.

    Args:
        names: those to save; None for all.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] | None = None) -> None:
        self.folder = folder
        self.names = names
        self.validations = 0

    def _save(self, trainer: Trainer, moment: str, number: int) -> None:
        name = f"{moment}-{number}"
        if self.names is None or name in self.names:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch", trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validations += 1
            self._save(trainer, "validation", self.validations)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch", trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]


def exactness(caplog: pytest.LogCaptureFixture) -> str:
    """What the line `exact` of the one resume report said."""
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("exact  ")]
    return line.removeprefix("exact").strip()


def train(
    folder: Path,
    module: dict[str, Any],
    trainer: dict[str, Any],
    path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    saves: tuple[str, ...] | None = (),
    seed: int = 1,
    guard: CheckpointGuard | Literal["default"] | None = "default",
    kind: type[Recorded] = Recorded,
) -> dict[str, Any]:
    """Trains, or goes on from a checkpoint; returns all that was recorded, and where in the record it begins.

    Args:
        saves: the checkpoints to make, as `Everywhere` names them; None for all.
        guard: None for a run without one.
        kind: the module's class, which is made with what `module` says.
    """
    guard = CheckpointGuard() if guard == "default" else guard
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(1)
    trained = kind(**module)
    if seed != 1:  # weights of a DDP run's ranks must not depend on it, and everything else may
        torch.manual_seed(seed)
    logger = InMemory()
    record = Record(logger)
    run = Trainer(
        **{
            "accelerator": "cpu",
            "logger": logger,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            **trainer,
        },
        callbacks=[*([guard] if guard else []), record, *callbacks, Everywhere(folder, saves)],
    )
    run.fit(trained, ckpt_path=path)
    return {
        "events": trained.events,
        "lines": logger.lines,
        "begins": [record.events, record.lines],
        "weights": {name: tensor.tolist() for name, tensor in trained.state_dict().items()},
        "counters": counters(run),
    }


def counters(trainer: Trainer) -> dict[str, Any]:
    loop = trainer.fit_loop
    return {
        "epoch": loop.epoch_progress.state_dict(),
        "batch": loop.epoch_loop.batch_progress.state_dict(),
        "optimizer": loop.epoch_loop.automatic_optimization.optim_progress.state_dict()["optimizer"]["step"],
        "schedulers": loop.epoch_loop.scheduler_progress.state_dict(),
        "stepped": loop.epoch_loop._batches_that_stepped,
    }


def differences(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """What is not the same in a resumed run, in words; the first of each kind."""
    events, lines = resumed["begins"]
    found = []
    for kind, begin in (("events", events), ("lines", lines)):
        expected = whole[kind][begin:]
        for number, (want, got) in enumerate(zip(expected, resumed[kind], strict=False)):
            if json.dumps(want, sort_keys=True) != json.dumps(got, sort_keys=True):
                found.append(f"{kind} {begin + number}: {got} in place of {want}")
                break
        else:
            if len(expected) != len(resumed[kind]):
                longer = expected if len(expected) > len(resumed[kind]) else resumed[kind]
                found.append(
                    f"{len(resumed[kind])} {kind} in place of {len(expected)}: "
                    f"{longer[min(len(expected), len(resumed[kind]))]}"
                )
    found += [f"weight {n}" for n, w in whole["weights"].items() if resumed["weights"][n] != w]
    found += [
        f"counter {n}: {resumed['counters'][n]} in place of {c}"
        for n, c in whole["counters"].items()
        if resumed["counters"][n] != c
    ]
    return found


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    """In each of two processes: of every case the whole run and those from the named checkpoints."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for case, options in cases.items():
        if rank == 0:
            print(f"case {case}", file=sys.stderr)
        two, place = {"strategy": "ddp", "devices": 2, **options["trainer"]}, folder / case
        found = [train(place / "whole", options["module"], two, saves=tuple(options["names"]), seed=1 + rank)]
        for number, name in enumerate(options["names"]):
            path = place / "whole" / f"{name}.ckpt"
            found.append(train(place / str(number), options["module"], two, path, seed=50 + rank + number))
        (place / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()  # whose threads may end a process with an abort where it ends without


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
