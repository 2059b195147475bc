"""Iterable data sets at an epoch's end: what they give is fetched once, and when the run that never stopped did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import quiet_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.multiprocessing import Queue
from torch.utils.data import DataLoader, IterableDataset

from enstack_lightning import CheckpointGuard


class OfAQueue(IterableDataset):
    """Rows of which each is there once, whoever fetches it."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def __iter__(self) -> Any:
        for _ in range(5):
            yield torch.full((1, 32), float(self.queue.get(timeout=5)))


class Seen(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows.append(int(batch[0, 0]))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("workers", "lasting"), [(0, False), (1, False), (1, True)])
def test_a_resume_takes_no_row_of_a_queue_for_nothing(workers: int, lasting: bool, tmp_path: Path) -> None:
    queue: Any = Queue()
    for row in range(20):
        queue.put(row)

    def train(epochs: int, path: Path | None) -> list[int]:
        loader = DataLoader(OfAQueue(queue), num_workers=workers, batch_size=None, persistent_workers=lasting)
        trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=epochs, limit_val_batches=0)
        model = Seen()
        trainer.fit(model, loader, ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(tmp_path / "model.ckpt")
        return model.rows

    assert train(2, None) == list(range(10))
    assert train(4, tmp_path / "model.ckpt") == list(range(10, 20))


class Tenths(IterableDataset):
    def __iter__(self) -> Any:
        for i in range(6):
            yield torch.full((32,), i / 10)


class Dropping(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.dropout(self.layer(batch), 0.5).square().mean()


@pytest.mark.parametrize(("workers", "lasting"), [(0, False), (1, False), (2, True)])
def test_a_resume_at_an_epochs_end_draws_what_was_drawn(workers: int, lasting: bool, tmp_path: Path) -> None:
    def train(epochs: int, seed: int, path: Path | None) -> Dropping:
        seed_everything(1, verbose=False)
        model = Dropping()
        seed_everything(seed, verbose=False)
        loader = DataLoader(Tenths(), batch_size=2, num_workers=workers, persistent_workers=lasting)
        trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=epochs, limit_val_batches=0)
        trainer.fit(model, loader, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"epoch-{epochs}.ckpt")
        return model

    whole = train(4, 1, None)
    train(2, 1, None)
    again = train(4, 2, tmp_path / "epoch-2.ckpt")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
