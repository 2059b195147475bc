"""Two processes that shard the model, of which one is killed inside a save: the folder of before is resumed from, and
each process goes on with its own weights, moments, random numbers and rows, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_fits import EVERY_BYTE, HELD_SECONDS, lines_of, of_rank
from killing import Kill, Tell, run_child
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_processes import GRACE_SECONDS, RANKS, Rank, run_ranks
from torch.distributed.checkpoint import filesystem
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import find_checkpoints, verify_checkpoint
from enstack_lightning.data.loaders import TrainingSampler
from enstack_lightning.guard.loading.choice import choose_newest
from enstack_lightning.guard.saving import sharded
from enstack_lightning.guard.step_record import digest_of

ROWS, BATCH_SIZE, STEPS = 32, 2, 16


class Sharded(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

    def configure_model(self) -> None:
        for part in (self.layer, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.layer(batch[0]), 0.3)
        return self.head(hidden).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> StatefulDataLoader:
        rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        sampler = TrainingSampler(ROWS, BATCH_SIZE, 7, self.trainer.world_size, self.trainer.global_rank)
        sampler.set_epoch(self.trainer.current_epoch)
        return StatefulDataLoader(TensorDataset(rows), batch_size=BATCH_SIZE, sampler=sampler)


class Record(Callback):
    """Writes a line for every step of this process's own part of the model."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self.path = path
        self.tell = tell

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = trainer.optimizers[0].state
        parts = [part.to_local() for p in pl_module.parameters() for part in (p, *(state[p][k] for k in _MOMENTS))]
        line = [trainer.global_step, batch_idx, outputs["loss"].item().hex(), digest_of(batch), digest_of(parts)]
        with of_rank(self.path, trainer.global_rank).open("a") as file:
            file.write(json.dumps([*line, digest_of(torch.get_rng_state())]) + "\n")
        self.tell(f"step {trainer.global_step}")


_MOMENTS = ("exp_avg", "exp_avg_sq")


def train(folder: Path, tell: Tell) -> None:
    newest = choose_newest([folder], verify_checkpoint)
    torch.manual_seed(1 if newest is None else 50 + int(os.environ["RANK"]))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=ModelParallelStrategy(RANKS, 1, process_group_backend="gloo"),
        max_epochs=2,
        callbacks=[Record(folder / "record.jsonl", tell), CheckpointGuard(), save],
        **quiet,
    )
    trainer.fit(Sharded(), ckpt_path=newest.path if newest is not None else None)
    tell(f"resumed {newest.facts.progress.global_step if newest is not None else 0}")


def start(folder: Path, victim: int | None = None, moment: str = "", save: int = 0) -> list[Rank]:
    """One start, of which a rank may be killed in its n-th save."""

    def work(tell: Tell) -> None:
        if int(os.environ["RANK"]) == victim:
            tell_saves(tell, f"{moment} {save}")
        train(folder, tell)

    folder.mkdir(exist_ok=True)
    kill = Kill(random.Random(save).uniform(0, 0.02), f"{moment} {save}") if victim is not None else None
    return run_ranks(work, kill, () if victim is None else (victim,), folder / "log")


def tell_saves(tell: Tell, held: str) -> None:
    """Tells of each save when it writes this rank's shard, syncs it, and puts the folder in place; waits at one."""

    def telling(owner: Any, name: str, moment: str) -> None:
        call, count = getattr(owner, name), 0

        def told(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            tell(f"{moment} {count}")
            if held == f"{moment} {count}":
                time.sleep(HELD_SECONDS)
            return call(*args, **kwargs)

        setattr(owner, name, told)

    telling(sharded.ShardedSaves, "_save", "beginning")
    telling(filesystem, "_write_item", "writing")
    telling(sharded.ShardedSaves, "_on_disk", "syncing")
    telling(sharded.ShardedSaves, "_commit", "committing")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "undisturbed"
    ranks = start(folder)
    assert all(rank.done for rank in ranks), ranks
    assert [len(lines_of(folder, rank)) for rank in range(RANKS)] == [STEPS] * RANKS
    return folder


def all_good(folder: Path) -> int:
    """How many checkpoints stand in a folder; all are good to the last byte."""

    def work(tell: Tell) -> None:
        for path in find_checkpoints(folder):
            assert verify_checkpoint(path, EVERY_BYTE).accepted(strict=False), path
            tell("good")

    ended = run_child(work)  # threads that reading starts here would be missing in later children
    assert ended.done, ended
    return ended.said.count("good")


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        *((0, moment) for moment in ("beginning", "writing", "syncing", "committing")),
        *((1, m) for m in ("writing", "syncing")),
    ],
)
def test_a_rank_killed_inside_a_save(victim: int, moment: str, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save = 30 if moment == "writing" else 3  # each save writes about a dozen tensors
    ranks = start(folder, victim, moment, save)
    assert ranks[victim].killed, ranks
    survivor = ranks[1 - victim]
    assert not survivor.given_up
    assert survivor.lived_on is not None
    assert survivor.lived_on < GRACE_SECONDS
    good = all_good(folder)
    ranks = start(folder)
    assert all(rank.done for rank in ranks), ranks
    (resumed,) = {rank.numbers("resumed")[0] for rank in ranks}
    assert resumed == 3 * good > 0
    for rank in range(RANKS):
        expected, lines = lines_of(undisturbed, rank), lines_of(folder, rank)
        again = {line[0]: line for line in lines}
        assert all(line == again[line[0]] for line in lines)
        assert list(again.values()) == expected
