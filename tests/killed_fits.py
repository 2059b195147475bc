"""Runs of `enstack fit --ckpt_path auto` in child processes that tell where they are, and what is left of them: for
tests that kill such runs, restart them, and hold them against the undisturbed run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch.cli
import torch
from file_calls import CrashPoint
from killing import Kill, Tell, run_child
from lightning.pytorch import Callback, LightningModule, Trainer

from enstack_lightning.checkpoint import Options, Verdict, find_checkpoints, verify_checkpoint
from enstack_lightning.cli.main import main
from enstack_lightning.cli.resume_check import Line
from enstack_lightning.guard.saving import checkpoint_io
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO
from enstack_lightning.guard.step_record import StepRecord, digest_of

EVERY_BYTE = Options(deep=True, digests=True)
HELD_SECONDS = 1.0


def config_of(data: Path, cache: Path, epochs: int, trainer: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The config of a run with a tiny classifier on `data`, that saves within epochs too."""
    model = {"pretrained": False, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "max_epochs": epochs, "log_every_n_steps": 1, "accumulate_grad_batches": 1}
        | {"enable_progress_bar": False, "enable_model_summary": False}
        | trainer,
        "model": {**model, "intermediate_size": 16, "max_position_embeddings": 66, "learning_rate": 1e-3},
        "data": {"path": str(data), "cache_dir": str(cache), "max_length": 64, "vocab_size": 300}
        | {"train_batch_size": 16 // int(trainer.get("devices", 1)), "length_bucketing": True},
        "recovery_checkpoint": {"every_n_train_steps": 2},
        **options,
    }


class Teller(Callback):
    """Tells where the run is, so that it can be killed there."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.tell(f"forward {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.tell(f"step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.tell(f"validation {trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "epoch")

    def _write(self, trainer: Trainer, when: str) -> None:
        metrics = {name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())}
        with of_rank(Path(trainer.default_root_dir, "metrics.jsonl"), trainer.global_rank).open("a") as file:
            file.write(json.dumps([when, trainer.current_epoch, metrics]) + "\n")


@dataclass(frozen=True)
class Disturbance:
    """What happens to a start: a kill at a moment, or a file call of a save that kills, fails or takes its time.

    Attributes:
        held: what is told right before a pause, for a kill that must not come late.
    """

    name: str
    kill: Kill | None = None
    crash: CrashPoint | None = None
    at_save: int = 0
    stall_seconds: float = 0.0
    held: str = ""


def fit(config: Path, folder: Path, tell: Tell, disturbance: Disturbance | None = None) -> None:
    """The whole command, in a process that ends with it."""
    if disturbance is not None and disturbance.held:
        tell = holding(tell, disturbance.held)
    tell_saves(tell, disturbance)
    make = lightning.pytorch.cli.LightningCLI.instantiate_trainer

    def with_record(self: Any, callbacks: list[Callback], **kwargs: Any) -> Trainer:
        own = [StepRecord(str(folder / "record.jsonl")), Teller(tell)]
        trainer: Trainer = make(self, callbacks=[*callbacks, *own], **kwargs)
        return trainer

    lightning.pytorch.cli.LightningCLI.instantiate_trainer = with_record
    root = ["--trainer.default_root_dir", str(folder)]
    tell(f"status {main(['fit', '--config', str(config), *root, '--ckpt_path', 'auto'])}")


def holding(tell: Tell, held: str) -> Tell:
    """Tells, and waits for the kill once `held` is told."""

    def held_there(line: str) -> None:
        tell(line)
        if line == held:
            time.sleep(HELD_SECONDS)

    return held_there


def tell_saves(tell: Tell, disturbance: Disturbance | None) -> None:
    """Lets every save and removal of this process be told, and puts the crash point into one of the saves."""
    save, count = GuardedCheckpointIO.save_checkpoint, 0
    checkpoint_io.write_save_manifest = _after(lambda: tell(f"manifest {count}"), checkpoint_io.write_save_manifest)
    remove, remove_manifest = GuardedCheckpointIO._remove, checkpoint_io.remove_manifest

    def removing(self: GuardedCheckpointIO, name: str) -> None:
        def half_removed(target: Path) -> None:
            remove_manifest(target)
            tell("removing")

        with patch.object(checkpoint_io, "remove_manifest", half_removed):
            remove(self, name)

    GuardedCheckpointIO._remove = removing  # type: ignore[method-assign]

    def told(self: GuardedCheckpointIO, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if disturbance is not None and disturbance.crash is not None and count == disturbance.at_save:
            disturbance.crash.install()
        if disturbance is not None and disturbance.stall_seconds and count == disturbance.at_save:
            stall(tell, disturbance.stall_seconds)
        tell(f"saving {count}")
        save(self, checkpoint, *args, **kwargs)
        tell(f"saved {count}")

    GuardedCheckpointIO.save_checkpoint = told  # type: ignore[method-assign]


def _after(first: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        first()
        return call(*args, **kwargs)

    return called


def stall(tell: Tell, seconds: float) -> None:
    """Lets the next fsync take its time, as on a disk that others write to."""
    fsync = os.fsync

    def stalled(fd: int) -> None:
        os.fsync = fsync
        tell("stalled")
        time.sleep(seconds)
        fsync(fd)

    os.fsync = stalled


# What is left


def of_rank(path: Path, rank: int) -> Path:
    """The file that a process of this rank writes in place of `path`, as `StepRecord` names it."""
    return path.with_name(f"{path.name}.{rank}") if rank else path


def lines_of(folder: Path, rank: int = 0) -> list[Line]:
    """What was recorded of each batch."""
    record = of_rank(folder / "record.jsonl", rank)
    text = record.read_text() if record.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def metrics_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    """The metrics of every validation and epoch; each is the same however often it was computed."""
    found: dict[str, Any] = {}
    for line in of_rank(folder / "metrics.jsonl", rank).read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            when, epoch, metrics = json.loads(line)
            assert found.setdefault(f"{when} {epoch}", metrics) == metrics, (folder, when, epoch)
    return found


def no_torn_file_passes(folder: Path) -> int:
    """How many files are no good; every one that passes is good to the last byte."""

    def work(tell: Tell) -> None:
        for path in find_checkpoints(folder):
            if verify_checkpoint(path).verdict is Verdict.FAIL:
                tell("bad 1")
                continue
            deep = verify_checkpoint(path, EVERY_BYTE)
            assert deep.verdict is not Verdict.FAIL, deep
            torch.load(path, weights_only=True)

    ended = run_child(work)  # threads that reading starts here would be missing in later children
    assert ended.done, (ended.said, folder)
    return len(ended.numbers("bad"))


def weights_of(folder: Path) -> list[str]:
    """A digest of the weights in each checkpoint of a run that is over."""

    def work(tell: Tell) -> None:
        for path in sorted((folder / "checkpoints").glob("*.ckpt")):
            tell(f"{path.name} {digest_of(torch.load(path, weights_only=True)['state_dict'])}")

    return [line for line in run_child(work).said if line != "done"]
