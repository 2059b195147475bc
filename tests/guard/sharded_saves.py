"""Saves of two processes that shard, with the guard: `python sharded_saves.py FOLDER ANSWERS CASE...`.

For each case both save `FOLDER/CASE/c.ckpt`, and save there again with other weights; on the way to the second save
happens what the case names:

    nothing         both saves are good
    full 0, full 1  no file of that rank may grow beyond a few hundred bytes
    flip            a byte of rank 1's shard changes between its writing and its being read back
    spoiled         what is saved lacks the weights
    one file        a file is written over the folder, and rank 0's disk is full
    other disk      rank 1 sees another file system
    kill 0, kill 1  that rank is killed while it writes

Each rank writes to `ANSWERS/CASE RANK` what came of it, a line for each save.
"""

import contextlib
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import Trainer
from torch.distributed.checkpoint import filesystem
from two_ranks import Module, strategy_of

from enstack_lightning import CheckpointGuard
from enstack_lightning.guard.saving import sharded

LIMIT_BYTES = 300

# Lightning looks every five seconds for a rank that has ended, and kills the others, which are to answer here.
subprocess_script._ChildProcessObserver._run = lambda observer: True


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def happening(case: str, rank: int, trainer: Trainer) -> Any:
    """What happens to this rank meanwhile."""
    write_item, digest_files, is_dir = filesystem._write_item, sharded.digest_files, Path.is_dir
    connector = trainer._checkpoint_connector
    dump = connector.dump_checkpoint

    def killed(*args: Any) -> Any:
        write_item(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def flipped(path: Path, *args: Any) -> Any:
        entries = digest_files(path, *args)
        shard = path / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[-200] ^= 1
        shard.write_bytes(content)
        return entries

    if case == f"full {rank}" or (case == "one file" and rank == 0):
        return full_disk()
    if case == f"kill {rank}":
        return patch.object(filesystem, "_write_item", killed)
    if case == "flip" and rank == 1:
        return patch.object(sharded, "digest_files", flipped)
    if case == "spoiled":
        spoiled = lambda *args: {**dump(*args), "state_dict": {}, "optimizer_states": []}  # noqa: E731
        return patch.object(connector, "dump_checkpoint", spoiled)
    if case == "other disk" and rank == 1:
        return patch.object(Path, "is_dir", lambda path: not path.name.endswith(".guard.tmp") and is_dir(path))
    return contextlib.nullcontext()


def save(trainer: Trainer, path: Path) -> str:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            trainer.save_checkpoint(path)
        except Exception as e:
            return f"{type(e).__name__} {e.errno}: {e}"
    said = [str(w.message) for w in warned if "CheckpointGuard" in str(w.message)]
    return "; ".join(["saved", *said])


def main(folder: Path, answers: Path, *cases: str) -> None:
    guard = CheckpointGuard(verify_after_save="flip" in cases)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy_of("sharded"),
        max_epochs=1,
        callbacks=[guard],
        enable_checkpointing=False,
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(Module())
    for case in cases:
        path = folder / case / "c.ckpt"
        said = [save(trainer, path)]
        with torch.no_grad():
            for weight in trainer.lightning_module.parameters():
                weight.add_(1)
        trainer.strategy._save_distributed_checkpoint = case != "one file"
        with happening(case, trainer.global_rank, trainer):
            said.append(save(trainer, path))
        trainer.strategy._save_distributed_checkpoint = True
        (answers / f"{case} {trainer.global_rank}").write_text("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
