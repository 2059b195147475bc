"""What the guard costs, on a checkpoint of CodeBERT's shape (1.5 GB). Run by hand:

    python tests/benchmarks/bench_guard.py [--only saves resume steps fit cli] [--repeats 5] [--folder DIR]

Every figure is measured in this run: each way of doing a thing in turn, again and again, and the medians compared. A
plain save without an fsync leaves most of the file in memory only, and is shown for what it hides.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_verify import lightning_dict, verdict, weights_of
from fit_runs import WAYS, measure_fit
from guard_runs import measure_cli, measure_resume, measure_steps, write_checkpoint, write_cli_checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from enstack_lightning.checkpoint import Options
from enstack_lightning.guard.saving.checkpoint_io import guard_checkpoint_io

Save = Callable[[dict[str, Any], Path], object]


def table(title: str, rows: dict[str, float], base: float) -> None:
    print(f"\n{title:56} {'seconds':>9} {'ratio':>7}")
    for name, seconds in rows.items():
        print(f"{name:56} {seconds:9.4f} {seconds / base:7.3f}", flush=True)


# Saves


def plain(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def plain_fsync(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def lightning(checkpoint: dict[str, Any], path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(checkpoint, path)


def guarded(checkpoint_io: Any, verify_after_save: bool = False) -> Any:
    """The CheckpointIO of a strategy with this one, as the guard sets it up."""
    strategy = SingleDeviceStrategy(device=torch.device("cpu"), checkpoint_io=checkpoint_io)
    guard_checkpoint_io(strategy, lambda path: None, Options(), verify_after_save)
    return strategy.checkpoint_io


def seconds(save: Save, checkpoint: dict[str, Any], path: Path) -> float:
    began = time.perf_counter()
    save(checkpoint, path)
    return time.perf_counter() - began


class Background:
    """A save's call and, apart from it, the end of what it does in the background."""

    def __init__(self, checkpoint_io: Any) -> None:
        self.checkpoint_io = checkpoint_io

    def __call__(self, checkpoint: dict[str, Any], path: Path) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, path)

    def wait(self) -> None:
        self.checkpoint_io._executor.submit(lambda: None).result()


def measure_saves(folder: Path, layers: int, repeats: int) -> list[str]:
    checkpoint = lightning_dict(weights_of(layers))
    in_background = Background(guarded(AsyncCheckpointIO()))
    ways: dict[str, Save] = {
        "plain torch.save, then fsync": plain_fsync,
        "plain torch.save, no fsync": plain,
        "guard: atomic, fsync, manifest": guarded(TorchCheckpointIO()).save_checkpoint,
        "guard in AsyncCheckpointIO, the loop's wait": in_background,
        "AsyncCheckpointIO without the guard, the loop's wait": Background(AsyncCheckpointIO(TorchCheckpointIO())),
        "guard, verify_after_save": guarded(TorchCheckpointIO(), verify_after_save=True).save_checkpoint,
        "Lightning's own save, no fsync": lightning,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    path, size = folder / "c.ckpt", 0
    for _ in range(repeats):
        for name, save in ways.items():
            times[name].append(seconds(save, checkpoint, path))
            if isinstance(save, Background):
                save.wait()
            size = path.stat().st_size
            for file in folder.iterdir():
                file.unlink()
            os.sync()
    in_background.checkpoint_io.teardown()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    durable, hollow, save, wait, *_ = medians.values()
    first = times["guard in AsyncCheckpointIO, the loop's wait"][0]
    table(f"Saves of {size:,} bytes, medians of {repeats}", medians, durable)
    print(f"{'guard in AsyncCheckpointIO, its first save':56} {first:9.4f} {first / durable:7.3f}")
    kept, waits, shown = save / durable, wait / durable, wait / hollow
    return [
        verdict("save: atomic, fsync, manifest, over plain save and fsync", kept, "<= 1.15", kept <= 1.15),
        verdict("the loop's wait in the background, over plain save and fsync", waits, "<= 0.6", waits <= 0.6),
        verdict("the loop's wait in the background, over plain save alone", shown, "<= 0.6", shown <= 0.6),
    ]


# Runs


def of_resume(folder: Path, layers: int, repeats: int) -> list[str]:
    path = folder / "large.ckpt"
    write_checkpoint(path, layers)
    found = measure_resume(path, layers, repeats)
    print(f"\n{f'Resume of {path.stat().st_size:,} bytes, fit to first batch, medians':56} {'seconds':>9} {'guard':>9}")
    for name, (wall, own) in found.items():
        print(f"{name:56} {wall:9.4f} {own:9.4f}", flush=True)
    shares = {place: own / wall for place in ("disk", "memory") for wall, own in [found[f"from {place}, quick"]]}
    return [
        verdict(f"the guard's share of a resume from {place}, %", 100 * share, "<= 2", share <= 0.02)
        for place, share in shares.items()
    ]


def of_steps(folder: Path, layers: int, repeats: int) -> list[str]:
    found = measure_steps(rounds=2 * repeats, steps=60)
    more, of_cpu = (100 * (found.pop(name) - 1) for name in ("ratio", "ratio of processor time"))
    table(f"A step of training, medians of {2 * repeats} runs of 60", found, found["without"])
    print(f"{'more processor time with the guard, %':56} {of_cpu:9.2f}")
    return [verdict("guard in training, per step, against none, % more", more, "<= 1", more <= 1)]


def of_fit(folder: Path, layers: int, repeats: int) -> list[str]:
    found = measure_fit(folder, rounds=2 * repeats, batches=20)
    print(f"\n{f'enstack fit, sums of medians of {2 * repeats} runs':34} " + " ".join(f"{way:>15}" for way in WAYS))
    more = {}
    for name, taken in found.items():
        without, guarded, again = (taken[way] for way in WAYS)
        more[name], noise = 100 * (guarded / without - 1), 100 * (again / without - 1)
        print(f"{name + ' seconds':34} " + " ".join(f"{taken[way]:15.3f}" for way in WAYS))
        print(f"{'  % more than without':34} {'':15} {more[name]:15.2f} {noise:15.2f}")
    return [
        verdict(
            "enstack fit between saves, processor time, % more", figure := more["steps, processor"], "<= 3", figure <= 3
        ),
        verdict("enstack fit between saves, time, % more", figure := more["steps, wall"], "<= 3", figure <= 3),
    ]


def of_cli(folder: Path, layers: int, repeats: int) -> list[str]:
    layers = layers * 17 // 12  # without CodeBERT's large vocabulary
    path = write_cli_checkpoint(folder, layers)
    found = measure_cli(folder, path, layers, repeats)
    title = f"Resume of {path.stat().st_size:,} bytes, process to first batch, medians of {repeats}"
    table(title, found, found["plain"])
    ratio = found["enstack"] / found["plain"]
    return [verdict("enstack fit --ckpt_path over plain LightningCLI", ratio, "< 1", ratio < 1)]


MEASURES = {"saves": measure_saves, "resume": of_resume, "steps": of_steps, "fit": of_fit, "cli": of_cli}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder; 12 give a file of 1.5 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; the disk is what is measured")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    results: list[str] = []
    for name in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results += MEASURES[name](Path(folder), options.layers, options.repeats)
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
