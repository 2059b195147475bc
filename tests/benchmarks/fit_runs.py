"""What the guard and the ledger take of `enstack fit` in deterministic mode, with the model of `configs/demo.yaml`.

The same run again and again, in one process, in turn with and without them, and without them a second time, which shows
what noise is. Each step is compared with itself in the other runs, since the lengths of the rows differ from batch to
batch; a figure is the sum over all steps of each one's median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from enstack_lightning import CheckpointGuard
from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.guard import RecoveryCheckpoint
from enstack_lightning.guard.ledger import SampleLedger
from enstack_lightning.model import VulnerabilityClassifier

WAYS = ("without", "with", "without, again")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
EPOCHS = 2
BATCH_SIZE = 8
"""A quarter of the demo's: a step costs less, and what comes on top of it counts for more."""
WARM_UP = 5
"""Steps at a run's beginning that are not counted."""

Times = dict[str, list[float]]


class Clocks(Callback):
    """The seconds of each step but an epoch's last, and of each epoch with its validation and its checkpoints."""

    def __init__(self) -> None:
        self.steps: Times = {name: [] for name in CLOCKS}
        self.epochs: Times = {name: [] for name in CLOCKS}
        self._step: dict[str, float] = {}
        self._epoch: dict[str, float] = {}

    def on_train_epoch_start(self, *args: Any) -> None:
        self._step = {}
        self._epoch = _noted(self._epoch, self.epochs)

    def on_train_batch_start(self, *args: Any) -> None:
        self._step = _noted(self._step, self.steps)

    def on_train_end(self, *args: Any) -> None:
        _noted(self._epoch, self.epochs)


def _noted(began: dict[str, float], times: Times) -> dict[str, float]:
    now = {name: clock() for name, clock in CLOCKS.items()}
    for name, moment in began.items():
        times[name].append(now[name] - moment)
    return now


def fit(folder: Path, guarded: bool, batches: int) -> Clocks:
    """One run of the demo's model on the generated sample, with the callbacks of `enstack fit`."""
    seed_everything(42, verbose=False)
    model = VulnerabilityClassifier(
        pretrained=False,
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=258,
        learning_rate=1e-3,
        schedule="linear",
        dropout=0.1,
    )
    data = VulnerabilityDataModule(
        vocab_size=1024,
        max_length=256,
        train_batch_size=BATCH_SIZE,
        eval_batch_size=32,
        length_bucketing=True,
        cache_dir=str(folder / "cache"),
    )
    clocks, run = Clocks(), folder / "run"
    ours: list[Callback] = [CheckpointGuard(), SampleLedger(rows="row")] if guarded else []
    saves = {"dirpath": run, "save_on_train_epoch_end": True}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        deterministic=True,
        gradient_clip_val=1.0,
        limit_train_batches=batches,
        limit_val_batches=1,
        log_every_n_steps=10,
        default_root_dir=run,
        logger=TensorBoardLogger(run, name=None, version="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            clocks,
            *ours,
            ModelCheckpoint(filename="best_model", monitor="val/f1", mode="max", **saves),
            ModelCheckpoint(filename="last_checkpoint", **saves),
            RecoveryCheckpoint(dirpath=str(run)),
            LearningRateMonitor(),
        ],
    )
    trainer.fit(model, data)
    return clocks


def measure_fit(folder: Path, rounds: int, batches: int) -> dict[str, dict[str, float]]:
    """Seconds of all steps, and of all epochs, by the way of running and the clock.

    Returns:
        By `steps, wall` and the like the seconds of each way.
    """
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for number in range(rounds + 1):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            clocks = fit(folder, way == "with", batches)
            if number == 0:
                continue  # imports, caches
            for name in CLOCKS:
                found.setdefault(("steps", name, way), []).append(clocks.steps[name][WARM_UP:])
                found.setdefault(("epochs", name, way), []).append(clocks.epochs[name])
    return {
        f"{what}, {name}": {way: sum(map(statistics.median, zip(*found[what, name, way], strict=True))) for way in WAYS}
        for what in ("steps", "epochs")
        for name in CLOCKS
    }
