"""Checkpoints for tests, written by the tools that write them in life, and the damage that befalls them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.data.loaders import TrainingSampler
from enstack_lightning.data.sample import sample_rows
from enstack_lightning.guard import CheckpointGuard

ROWS, BATCH_SIZE = 20, 4
BATCHES = ROWS // BATCH_SIZE
LEARNING_RATE = 1e-2


class TinyModule(LightningModule):
    """A linear layer with dropout, AdamW and a rate that falls with every step; it keeps the rows it was trained on."""

    def __init__(self, total_steps: int = 100, asks_for_total: bool = False) -> None:
        super().__init__()
        self.total_steps = total_steps
        self.asks_for_total = asks_for_total
        self.layer = torch.nn.Linear(4, 2)
        self.dropout = torch.nn.Dropout(0.3)
        self.record = SimpleNamespace(rows=[], losses=[])  # out of the guard's sight, as what a run writes elsewhere

    @property
    def rows(self) -> list[list[int]]:
        return self.record.rows

    @property
    def losses(self) -> list[float]:
        return self.record.losses

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, row = batch
        loss: Tensor = self.dropout(self.layer(features)).square().mean()
        self.rows.append(row.tolist())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        total = self.trainer.estimated_stepping_batches if self.asks_for_total else self.total_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step, total) / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> StatefulDataLoader:
        features = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        rows = TensorDataset(features, torch.arange(ROWS))
        # torchdata's own shuffling goes on differently in the epoch after the one that is resumed.
        order = TrainingSampler(ROWS, BATCH_SIZE, seed=7)
        order.set_epoch(self.trainer.current_epoch)
        return StatefulDataLoader(rows, batch_size=BATCH_SIZE, sampler=order, generator=torch.Generator())


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_epochs": 3,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def every_step(folder: Path) -> ModelCheckpoint:
    """Saves `step=N.ckpt` after every step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Saves `epoch=N.ckpt` at every epoch's end."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


class SavesAsEpochsBegin(Callback):
    """Saves `start-N.ckpt` in a hook after which Lightning takes the epoch that begins for done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"start-{trainer.current_epoch}.ckpt")


def train_lightning(folder: Path, **options: Any) -> Path:
    """Trains for three epochs of five batches with the guard, saving after every step and every epoch."""
    torch.manual_seed(1)
    saves = every_step(folder), every_epoch(folder)
    quiet_trainer(folder, CheckpointGuard(), *saves, **options).fit(TinyModule())
    return folder


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The torch file `source` with its dict edited, saved again by torch."""
    checkpoint = torch.load(source, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, target)
    return target


def loop_counters(steps: int) -> dict[str, Any]:
    """The entry `loops` of a checkpoint made by hand: one epoch of so many batches, a step each, no scheduler."""
    counter = dict.fromkeys(("ready", "started", "processed", "completed"), steps)
    progress = {"total": counter, "current": counter}
    none, one = ({"total": c, "current": c} for c in (dict.fromkeys(counter, 0), dict.fromkeys(counter, 1)))
    return {
        "fit_loop": {
            "epoch_progress": one,
            "epoch_loop.batch_progress": {**progress, "is_last_batch": True},
            "epoch_loop.scheduler_progress": none,
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": progress}},
            "epoch_loop.manual_optimization.optim_step_progress": none,
        }
    }


def enstack_folder(
    folder: Path,
    epoch: int = 2,
    step: int = 0,
    batches: int = 10,
    optimizer_steps: int | None = None,
    weights: str = "model.safetensors",
    **state: Any,
) -> Path:
    """An EnStack checkpoint whose optimizer and scheduler have really stepped; a `state` entry of `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    done = (epoch if step == 0 else epoch - 1) * batches + step
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 10_000)
    for _ in range(done if optimizer_steps is None else optimizer_steps):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    entries = {
        "epoch": epoch,
        "step": step,
        "total_batches": batches,
        "best_val_f1": 0.71,
        "best_val_acc": 0.73,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "scaler_state_dict": None,
    }
    kept = {name: value for name, value in {**entries, **state}.items() if value is not ...}
    torch.save(kept, folder / "training_state.pth")
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta", "transformers_version": "5.0.0"}))
    if weights.endswith(".safetensors"):
        save_file(model.state_dict(), folder / weights)
    else:
        torch.save(model.state_dict(), folder / weights)
    return folder


def functions(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """C functions of the generated sample, the five classes in turn."""
    return [{"func": row.func, "target": row.target} for row in islice(sample_rows(seed), count)]


def write_jsonl(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Turns one bit over, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def flip_in_pickle(path: Path) -> None:
    """Turns over one bit of the pickle of a Lightning checkpoint, in a name that every one of them holds."""
    flip_bit(path, path.read_bytes().index(b"pytorch-lightning_version"))


def truncate(path: Path, size: int) -> None:
    """Cuts a file off after `size` bytes."""
    with path.open("r+b") as file:
        file.truncate(size)
