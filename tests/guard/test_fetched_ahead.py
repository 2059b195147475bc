"""Lightning fetches a batch ahead where a loader has no length: a resume must not leave it out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_runs import BATCH_SIZE, ROWS, Recorded, Rows, differences, train
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.guard import CheckpointGuard
from enstack_lightning.guard.restart import fetched_ahead

pytestmark = pytest.mark.filterwarnings("ignore")


class Stream(IterableDataset):
    """Gives rows one after the other, those of a worker its share, and keeps its position."""

    def __init__(self, noise: bool) -> None:
        self.rows = Rows(noise)
        self.begin = self.given = 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine = range(ROWS) if worker is None else range(worker.id, ROWS, worker.num_workers)
        self.given, self.begin = self.begin, 0
        return map(self._give, list(mine)[self.given :])

    def _give(self, row: int) -> Any:
        self.given += 1
        return self.rows[row]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["given"]


class Streaming(Recorded):
    def train_dataloader(self) -> Any:
        return StatefulDataLoader(Stream(self.noise), batch_size=BATCH_SIZE, num_workers=self.num_workers)


class OddBatches(Streaming):
    """Batches of a class of the user's own, which no checkpoint can hold."""

    def train_dataloader(self) -> Any:
        collate = torch.utils.data.default_collate
        return StatefulDataLoader(Stream(False), batch_size=BATCH_SIZE, collate_fn=lambda rows: Odd(collate(rows)))


class Odd(list[Any]):
    pass


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("workers", "noise"), [(0, True), (2, False)])
def test_a_batch_that_was_fetched_before_the_save_is_trained_after_it(
    workers: int, noise: bool, accumulate: int, tmp_path: Path
) -> None:
    module = {"num_workers": workers, "noise": noise}
    trainer = {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
    names = ("batch-2", "validation-1", "batch-6", "epoch-1", "batch-9")
    whole = train(tmp_path / "whole", module, trainer, saves=names, kind=Streaming)
    for name in names:
        path = tmp_path / "whole" / f"{name}.ckpt"
        guard = CheckpointGuard()
        resumed = train(tmp_path / "again", module, trainer, path, seed=99, guard=guard, kind=Streaming)
        assert differences(whole, resumed) == [], name


def test_resumed_four_times_in_one_epoch(tmp_path: Path) -> None:
    """No batch more is kept with every resume."""
    whole = train(tmp_path / "whole", {"noise": True}, {}, kind=Streaming)
    path = None
    for number in (1, 2, 4, 5):
        again, name = tmp_path / f"{number}", f"batch-{number}"
        train(again, {"noise": True}, {}, path, seed=number, saves=(name,), kind=Streaming)
        path = again / f"{name}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["CheckpointGuard"]["resume"]["ranks"][0]
        assert len(state["fetched"]) == 1
    assert differences(whole, train(tmp_path / "last", {"noise": True}, {}, path, seed=9, kind=Streaming)) == []


@pytest.mark.parametrize("why", ["of a class", "too large"])
def test_a_batch_that_cannot_be_kept_is_said(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = OddBatches if why == "of a class" else Streaming
    if why == "too large":
        monkeypatch.setattr(fetched_ahead, "MOST_BYTES", 10)
    train(tmp_path, {}, {}, saves=("batch-2",), kind=kind)
    with caplog.at_level("INFO"):
        train(tmp_path, {}, {}, tmp_path / "batch-2.ckpt", kind=kind)
    assert "not promised: a batch that the loader had given ahead is in no checkpoint, and is left out" in caplog.text


def test_the_loader_is_of_its_own_class_again(tmp_path: Path) -> None:
    loaders: list[Any] = []

    class Kept(Streaming):
        def train_dataloader(self) -> Any:
            loaders.append(super().train_dataloader())
            return loaders[-1]

    train(tmp_path, {}, {}, saves=("batch-2",), kind=Kept)
    train(tmp_path, {}, {}, tmp_path / "batch-2.ckpt", kind=Kept)
    assert {type(loader) for loader in loaders} == {StatefulDataLoader}


class TakesOut(Recorded):
    """Batches are dicts, of which a hook takes an entry; fails once, in a step."""

    at_batch = 2

    def train_dataloader(self) -> Any:
        def collate(rows: list[Any]) -> dict[str, Any]:
            return dict(zip(("features", "labels", "rows"), torch.utils.data.default_collate(rows), strict=True))

        return StatefulDataLoader(Rows(False), batch_size=BATCH_SIZE, collate_fn=collate)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch.pop("features"), batch.pop("labels"), batch.pop("rows")] if isinstance(batch, dict) else batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.at_batch:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_a_batch_is_kept_as_it_was_before_a_hook_took_an_entry_out_of_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, {}, {"max_epochs": 1}, callbacks=(OnExceptionCheckpoint(tmp_path, "failed"),), kind=TakesOut)
    whole = type("Whole", (TakesOut,), {"at_batch": -1})
    again = train(tmp_path / "again", {}, {"max_epochs": 1}, tmp_path / "failed.ckpt", kind=whole)
    steps = [event[4] for event in again["events"] if event[0] == "step"]
    assert steps == [list(range(row, row + BATCH_SIZE)) for row in range(2 * BATCH_SIZE, ROWS, BATCH_SIZE)]
