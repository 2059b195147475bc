"""Real runs for `bench_guard.py`: resumes of a large checkpoint, steps of a small model, whole command lines."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_verify import codebert, drop_from_memory
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from transformers import RobertaConfig, RobertaForSequenceClassification

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.guard.restart.loops import ExactRestart

HERE = Path(__file__).parent
PLAIN = [str(HERE / "plain_cli.py"), "fit", "--model.vocab_size", "300"]
ROWS = 4096
_RESTORE_ALL = ExactRestart._restore_all
OF_STEPS = ("batch", "backward", "optimizer_step", "zero_grad")


class Encoder(LightningModule):
    """A RoBERTa to be trained on token ids without a meaning."""

    def __init__(self, config: RobertaConfig, batch_size: int, tokens: int) -> None:
        super().__init__()
        with torch.device("meta"):
            network = RobertaForSequenceClassification(config)
        self.network = network.to_empty(device="cpu")
        for parameter in self.network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(
                torch.arange(buffer.numel()).view_as(buffer) if name.endswith("position_ids") else buffer.zero_()
            )
        self.rows = torch.randint(5, config.vocab_size, (ROWS, tokens)), torch.randint(0, 5, (ROWS,))
        self.batch_size = batch_size

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        ids, labels = batch
        loss: torch.Tensor = self.network(input_ids=ids, labels=labels).loss
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100_000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.rows), self.batch_size)


class StepTimes(Callback):
    """The seconds from one batch's start to the next one's, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self._began: float | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        now = self.clock()
        if self._began is not None:
            self.seconds.append(now - self._began)
        self._began = now


class FirstBatchReachedError(Exception):
    """Ends a run."""


class EndsAtFirstBatch(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        raise FirstBatchReachedError


class Timed:
    """A guard, and the seconds that its hooks, its judgement and what it restores took, by the name of what is called.

    Attributes:
        taken: the seconds of what is called inside another one of these are that one's.
    """

    def __init__(self, **options: Any) -> None:
        self.guard = CheckpointGuard(**options)
        self.taken: Counter[str] = Counter()
        self._inside = False
        for name in ("_judge", "state_dict", "load_state_dict", *(n for n in vars(Callback) if not n.startswith("_"))):
            if callable(method := getattr(self.guard, name, None)):
                setattr(self.guard, name, self._timed(name, method))
        ExactRestart._restore_all = self._timed("restart", _RESTORE_ALL)  # called by a loop, between hooks

    @property
    def seconds(self) -> float:
        return sum(self.taken.values())

    @property
    def seconds_of_steps(self) -> float:
        return sum(seconds for name, seconds in self.taken.items() if any(part in name for part in OF_STEPS))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            began, self._inside = time.perf_counter(), True
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = False
                self.taken[name] += time.perf_counter() - began

        return timed


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", max_epochs=-1, callbacks=list(callbacks), **{**quiet, **options})


# A resume


def write_checkpoint(path: Path, layers: int) -> None:
    """A checkpoint that a Trainer saved with the guard after a step, with its manifest."""
    trainer = trainer_of(CheckpointGuard(), max_steps=1)
    trainer.fit(Encoder(codebert(layers), batch_size=1, tokens=8))
    trainer.save_checkpoint(path)


def resume_seconds(path: Path, layers: int, timed: Timed | None) -> float:
    """From `trainer.fit` to the first batch."""
    model = Encoder(codebert(layers), batch_size=1, tokens=8)
    trainer = trainer_of(*([timed.guard] if timed else []), EndsAtFirstBatch(), max_steps=100)
    began = time.perf_counter()
    try:
        trainer.fit(model, ckpt_path=path)
    except FirstBatchReachedError:
        return time.perf_counter() - began
    raise AssertionError("no batch came")


def one_resume(path: Path, layers: int, options: dict[str, Any] | None) -> tuple[float, float]:
    """Seconds of a resume, and what of it was the guard's; None is without it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    timed = None if options is None else Timed(**options)
    return resume_seconds(path, layers, timed), timed.seconds if timed else 0.0


def measure_resume(path: Path, layers: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a resume and of the guard's part, by the place that the file is read from and the guard's way.

    Each is a process of its own, as a restart is, that has imported everything and has run nothing. It is not forked:
    a forked one would pay for the memory that it shares with its parent at the first write.
    """
    ways: dict[str, dict[str, Any] | None] = {"without": None, "quick": {"deep": False}, "manifest": {}}
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(repeats):
        for place in ("disk", "memory"):
            for way, options in ways.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    if place == "disk":
                        drop_from_memory(path)
                    taken[f"from {place}, {way}"].append(pool.submit(one_resume, path, layers, options).result())
    return {
        name: (statistics.median(wall for wall, _ in found), statistics.median(own for _, own in found))
        for name, found in taken.items()
    }


# Training


def measure_steps(rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step without the guard and with it, and what its hooks take of one."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = RobertaConfig(vocab_size=1024, num_labels=5, **sizes)
    model = partial(Encoder, config, batch_size=16, tokens=64)
    wall: dict[bool, list[float]] = {False: [], True: []}
    ratios, of_cpu, hooks = [], [], []
    for round_number in range(rounds):
        wall_here, cpu_here = {}, {}
        for guarded in (False, True) if round_number % 2 else (True, False):
            clocks, timed = (StepTimes(time.perf_counter), StepTimes(time.process_time)), Timed()
            trainer_of(*([timed.guard] if guarded else []), *clocks, max_steps=steps).fit(model())
            wall[guarded] += clocks[0].seconds[5:]
            wall_here[guarded], cpu_here[guarded] = (statistics.median(clock.seconds[5:]) for clock in clocks)
            if guarded:
                hooks.append(timed.seconds_of_steps / steps)
        ratios.append(wall_here[True] / wall_here[False])
        of_cpu.append(cpu_here[True] / cpu_here[False])
    return {
        "without": statistics.median(wall[False]),
        "with": statistics.median(wall[True]),
        "its hooks": statistics.median(hooks),
        "ratio": statistics.median(ratios),
        "ratio of processor time": statistics.median(of_cpu),
    }


# The command line


def write_rows(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = ({"func": f"int f{i}(void) {{ return {i}; }}", "target": i % 5, "idx": i} for i in range(64))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_line(folder: Path, layers: int) -> list[str]:
    """Options that both command lines know."""
    model = {
        "pretrained": "false",
        "hidden_size": "768",
        "num_hidden_layers": str(layers),
        "num_attention_heads": "12",
        "intermediate_size": "3072",
    }
    data = {
        "path": str(folder),
        "vocab_size": "300",
        "max_length": "32",
        "train_batch_size": "1",
        "cache_dir": str(folder),
    }
    call = [part for name, value in model.items() for part in (f"--model.{name}", value)]
    call += [part for name, value in data.items() for part in (f"--data.{name}", value)]
    call += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder / "run")]
    return [*call, "--trainer.num_sanity_val_steps", "0"]


def run(arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_cli_checkpoint(folder: Path, layers: int) -> Path:
    """A checkpoint of the plain command line, of 1.5 GB with 17 layers."""
    write_rows(folder)
    run([*PLAIN, *command_line(folder, layers), "--trainer.max_steps", "1"])
    (path,) = folder.rglob("*.ckpt")
    manifest_path(path).unlink(missing_ok=True)
    return path


def measure_cli(folder: Path, path: Path, layers: int, repeats: int) -> dict[str, float]:
    """Median seconds from the start of a process to its first batch, when it resumes."""
    ends = ["--trainer.callbacks+=first_batch.FirstBatch", "--trainer.max_steps", "20", "--ckpt_path", str(path)]
    call = [*command_line(folder, layers), *ends]
    ways = {"plain": PLAIN, "enstack": ["-m", "enstack_lightning", "fit"]}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, program in ways.items():
            began = time.time()
            said = run([*program, *call])
            taken[way].append(float(said.rsplit("first batch at ", 1)[1].split()[0]) - began)
    return {way: statistics.median(seconds) for way, seconds in taken.items()}
