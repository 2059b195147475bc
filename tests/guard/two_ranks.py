"""Runs of two processes with the guard, one after the other: `python two_ranks.py ANSWERS CASES`.

A case is `[STRATEGY, SAVES, PATH, FALLBACK, RANK_1]`. Each rank writes to `ANSWERS/rank` what came of its runs. Rank 1
"sees nothing" at the path, as with a file system of its own, or "finds nothing" that `ckpt_path="last"` could mean, or
"loses its optimizer" after loading, or has "a hook of its own" when training starts.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning import CheckpointGuard
from enstack_lightning.guard.loading import decision

decision._WAITS = ()


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.head = torch.nn.Linear(3, 2)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (self.layer, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.head(self.layer(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=2)


def strategy_of(name: str) -> DDPStrategy | ModelParallelStrategy:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True, process_group_backend="gloo"
    )


class Loses(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            trainer.optimizers[0].state.clear()


class Hook(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print("a hook of rank 1")


def came_of(strategy: str, saves: str, path: str | None, fallback: str, rank_1: str) -> str:
    guard = CheckpointGuard(fallback=fallback)
    save = ModelCheckpoint(saves, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy_of(strategy),
        max_epochs=2 if path else 1,
        callbacks=[*([Loses()] if rank_1 == "loses its optimizer" else []), save, guard],
        **quiet,
    )
    if trainer.global_rank == 1 and rank_1 == "a hook of its own":
        trainer.callbacks.append(Hook())
    contents = decision.contents
    if trainer.global_rank == 1 and rank_1 == "sees nothing":
        decision.contents = lambda p: contents(f"{p}.nowhere" if p else p)
    elif trainer.global_rank == 1 and rank_1 == "finds nothing":
        path = None
    try:
        trainer.fit(Module(), ckpt_path=path)
        return f"step {trainer.global_step} from {trainer.ckpt_path} judged {guard.report and guard.report.path}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        decision.contents = contents


if __name__ == "__main__":
    answers, cases = sys.argv[1:]
    said = [came_of(*case) for case in json.loads(cases)]
    Path(answers, os.environ.get("LOCAL_RANK", "0")).write_text(json.dumps(said))
