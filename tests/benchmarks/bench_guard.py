"""What the guard's saves cost, on a checkpoint of CodeBERT's shape. Run by hand:

    python tests/benchmarks/bench_guard.py [--layers 12] [--repeats 5] [--folder DIR]

Each way of saving is run in turn, `--repeats` times; shown are the median and the best of the seconds until the save
is over, and the ratio of the medians to plain `torch.save` followed by an fsync. A plain save without an fsync leaves
most of the file in memory only and is shown for what it hides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).parent))
from bench_verify import lightning_dict, weights_of

from enstack_lightning.checkpoint import Options
from enstack_lightning.guard.checkpoint_io import GuardedCheckpointIO

Save = Callable[[dict[str, Any], Path], None]


def plain(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def plain_fsync(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def lightning(checkpoint: dict[str, Any], path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(checkpoint, path)


def guarded(verify_after_save: bool) -> Save:
    save_io = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None, Options(), verify_after_save)
    return save_io.save_checkpoint


def seconds(save: Save, checkpoint: dict[str, Any], path: Path) -> float:
    began = time.perf_counter()
    save(checkpoint, path)
    return time.perf_counter() - began


def async_seconds(checkpoint: dict[str, Any], path: Path) -> float:
    """What the training loop waits for, with the save itself in the background."""
    save_io = AsyncCheckpointIO(GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None, Options()))
    waited = seconds(save_io.save_checkpoint, checkpoint, path)
    save_io.teardown()
    return waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; the disk is what is measured")
    parser.add_argument("--only", type=int, help="only the first so many ways of saving")
    arguments = parser.parse_args()
    checkpoint = lightning_dict(weights_of(arguments.layers))
    ways: dict[str, Callable[[Path], float]] = {
        "plain torch.save, then fsync": lambda path: seconds(plain_fsync, checkpoint, path),
        "guard: atomic, fsync, manifest": lambda path: seconds(guarded(False), checkpoint, path),
        "guard, verify_after_save": lambda path: seconds(guarded(True), checkpoint, path),
        "guard in AsyncCheckpointIO, the loop's wait": lambda path: async_seconds(checkpoint, path),
        "Lightning's own save (no fsync)": lambda path: seconds(lightning, checkpoint, path),
        "plain torch.save (no fsync)": lambda path: seconds(plain, checkpoint, path),
    }
    ways = dict(list(ways.items())[: arguments.only])
    times: dict[str, list[float]] = {name: [] for name in ways}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for _ in range(arguments.repeats):
            for name, run in ways.items():
                times[name].append(run(folder / "c.ckpt"))
                size = (folder / "c.ckpt").stat().st_size
                for file in folder.iterdir():
                    file.unlink()
                os.sync()
    finally:
        shutil.rmtree(folder)
    base = statistics.median(times["plain torch.save, then fsync"])
    print(f"{size:,} bytes, {arguments.repeats} runs each\n")
    print("| save | median s | best s | median ratio |\n| --- | --- | --- | --- |")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"| {name} | {middle:.2f} | {min(taken):.2f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
