"""Two processes under DDP, of which one is signalled: `python preempted_ranks.py FOLDER`.

Trains three times, each from where the one before was saved: rank 1 alone is signalled in the first run, rank 0 alone
in the second, none in the third. Each rank writes to `FOLDER/rankN.json` how the runs went. In a fourth run rank 0 is
signalled twice while rank 1 is busy, and would write to `FOLDER/lived on` afterwards.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from enstack_lightning import CheckpointGuard
from enstack_lightning.guard.training import preemption

SIGNAL_AFTER = 20
preemption._AGREE_SECONDS = 0.1


class Signals(Callback):
    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.began = self.signalled = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.002 * trainer.global_rank)
        self.began = trainer.global_step if self.began < 0 else self.began
        if trainer.global_step == self.began + SIGNAL_AFTER:
            self.signalled = trainer.global_step
            if trainer.global_rank == self.rank:
                os.kill(os.getpid(), signal.SIGTERM)


class Twice(Callback):
    """Goes on after its second signal only where this does not end it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        preemption.DOUBLED_SECONDS = 0.0
        if trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        (self.folder / "lived on").touch()


def run(folder: Path, rank: int | None) -> tuple[Trainer, dict[str, Any]]:
    path = folder / "recovery_checkpoint.ckpt"
    signals = Signals(rank)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=4,
        limit_val_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}"), CheckpointGuard(), signals],
    )
    ended = "its end"
    try:
        trainer.fit(BoringModel(), ckpt_path=path if path.exists() else None)
    except SystemExit as e:
        ended = type(e).__name__
    saved = torch.load(path)["global_step"]
    return trainer, {"began": signals.began, "signalled": signals.signalled, "saved": saved, "by": ended}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainers, went = zip(*[run(folder, rank) for rank in (1, 0, None)], strict=True)
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(went))
    trainers[0].callbacks.append(Twice(folder))
    trainers[0].fit(BoringModel())  # the Trainer that has started rank 1
