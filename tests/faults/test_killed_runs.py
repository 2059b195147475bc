"""`enstack fit --ckpt_path auto` killed at any moment, or failed by its disk, and started again: it ends as the run
that nobody disturbed, bit for bit.

Every start is the whole command in a child process. After each kill nothing in the folder may be taken for a checkpoint
that is none; the next start must go on by itself; and at the end every batch's data, random state, learning rate, loss,
weights and optimizer state, and every metric, are those of the undisturbed run, and the ledger says that every row was
used once an epoch.
"""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytest
import torch
import yaml
from file_calls import CrashPoint
from killing import Ended, Kill, Tell, run_child
from lightning.pytorch import Callback, LightningModule, Trainer

from enstack_lightning.checkpoint import Options, Verdict, find_checkpoints, verify_checkpoint
from enstack_lightning.checkpoint.ledger import read_ledger
from enstack_lightning.cli.main import main
from enstack_lightning.cli.resume_check import Line, first_difference
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO
from enstack_lightning.guard.step_record import StepRecord, digest_of

EPOCHS, BATCHES = 3, 6
MOMENTS = (
    "between steps",
    "in a forward pass",
    "in validation",
    "in a save",
    "after a save",
    "at a file call",
    "in a stalled fsync",
    "any time",
)
FAULTS = ("ENOSPC", "EIO")
EVERY_BYTE = Options(deep=True, digests=True)


class Teller(Callback):
    """Tells where the run is, so that it can be killed there."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

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
        with Path(trainer.default_root_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps([when, trainer.current_epoch, metrics]) + "\n")


@dataclass(frozen=True)
class Disturbance:
    """What happens to a start: a kill at a moment, or a file call of a save that kills, fails or takes its time."""

    name: str
    kill: Kill | None = None
    crash: CrashPoint | None = None
    at_save: int = 0
    stall_seconds: float = 0.0


def start(config: Path, folder: Path, disturbance: Disturbance | None = None) -> Ended:
    """One start of the command, to its end or to its kill."""

    def work(tell: Tell) -> None:
        tell_saves(tell, disturbance)
        make = lightning.pytorch.cli.LightningCLI.instantiate_trainer

        def with_record(self: Any, callbacks: list[Callback], **kwargs: Any) -> Trainer:
            own = [StepRecord(str(folder / "record.jsonl")), Teller(tell)]
            trainer: Trainer = make(self, callbacks=[*callbacks, *own], **kwargs)
            return trainer

        lightning.pytorch.cli.LightningCLI.instantiate_trainer = with_record
        root = ["--trainer.default_root_dir", str(folder)]
        tell(f"status {main(['fit', '--config', str(config), *root, '--ckpt_path', 'auto'])}")

    folder.mkdir(exist_ok=True)
    return run_child(work, disturbance and disturbance.kill, folder / "log.txt")


def tell_saves(tell: Tell, disturbance: Disturbance | None) -> None:
    """Lets every save of this process be told, and puts the crash point into one of them."""
    save = GuardedCheckpointIO.save_checkpoint
    count = 0

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


def stall(tell: Tell, seconds: float) -> None:
    """Lets the next fsync take its time, as on a disk that others write to."""
    fsync = os.fsync

    def stalled(fd: int) -> None:
        os.fsync = fsync
        tell("stalled")
        time.sleep(seconds)
        fsync(fd)

    os.fsync = stalled


def disturbance(moment: str, dice: random.Random, seconds: float, done: int, ahead: int) -> Disturbance:
    """A disturbance of this kind, somewhere in the `ahead` steps after the `done` ones, or in a save soon."""
    step, soon = dice.randint(done + 1, min(done + ahead, EPOCHS * BATCHES - 1)), dice.uniform(0, 0.01)
    save = dice.randint(1, min(4, ahead))
    if moment in FAULTS:
        return Disturbance(moment, crash=CrashPoint(dice.randint(0, 12), error=getattr(errno, moment)), at_save=save)
    return {
        "between steps": Disturbance(moment, Kill(0, f"step {step}")),
        "in a forward pass": Disturbance(moment, Kill(soon / 4, f"forward {step}")),
        "in validation": Disturbance(moment, Kill(soon / 4, f"validation {-(-(done + 1) // BATCHES) * BATCHES}")),
        "in a save": Disturbance(moment, Kill(soon, f"saving {save}")),
        "after a save": Disturbance(moment, Kill(soon, f"saved {save}")),
        "at a file call": Disturbance(moment, crash=CrashPoint(dice.randint(0, 30)), at_save=save),
        "in a stalled fsync": Disturbance(
            moment, Kill(dice.uniform(0.1, 0.4), "stalled"), at_save=save, stall_seconds=dice.choice((0.2, 2.0))
        ),
        "any time": Disturbance(moment, Kill(dice.uniform(0, seconds * min(1, ahead / EPOCHS / BATCHES)))),
    }[moment]


# What must hold


def lines_of(folder: Path) -> list[Line]:
    record = folder / "record.jsonl"
    text = record.read_text() if record.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics of every validation and epoch; each is the same however often it was computed."""
    found: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
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


@dataclass(frozen=True)
class Run:
    """The undisturbed run."""

    config: Path
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    model = {"pretrained": False, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "max_epochs": EPOCHS, "log_every_n_steps": 1, "accumulate_grad_batches": 1}
        | {"enable_progress_bar": False, "enable_model_summary": False},
        "model": {**model, "intermediate_size": 16, "max_position_embeddings": 66, "learning_rate": 1e-3},
        "data": {"path": str(data), "cache_dir": str(cache), "max_length": 64, "vocab_size": 300}
        | {"train_batch_size": 16, "length_bucketing": True},
        "recovery_checkpoint": {"every_n_train_steps": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert start(folder / "config.yaml", folder / "warm").done  # the tokenised rows are in the cache from now on
    ended = start(folder / "config.yaml", folder / "run")
    assert ended.said[-2:] == ("status 0", "done"), ended.said
    assert len(lines_of(folder / "run")) == EPOCHS * BATCHES
    return Run(folder / "config.yaml", folder / "run", ended.seconds)


@dataclass(frozen=True)
class Trial:
    """A run that was disturbed and went on: what was done to it, and what that cost."""

    moment: str
    kills: int
    failures: int
    bad_files: int
    batches_again: int


def trial(
    undisturbed: Run, folder: Path, moments: Sequence[str], dice: random.Random, ahead: int = EPOCHS * BATCHES
) -> Trial:
    """Disturbs a run at each of the moments, lets it end, and asserts that it is the undisturbed one."""
    kills = failures = bad = 0
    for moment in moments:
        done = max((line["step"] for line in lines_of(folder)), default=0)
        if done >= EPOCHS * BATCHES - 1:
            break
        ended = start(undisturbed.config, folder, disturbance(moment, dice, undisturbed.seconds, done, ahead))
        kills += ended.killed
        failures += "status 1" in ended.said
        assert ended.killed or ended.done, (ended.said[-3:], folder)
        bad += no_torn_file_passes(folder)
    ended = start(undisturbed.config, folder)
    assert ended.said[-2:] == ("status 0", "done"), (moments, ended.said[-3:], folder)
    lines = lines_of(folder)
    difference = first_difference(lines_of(undisturbed.folder), lines)
    assert difference is None, (moments, str(difference), folder)
    assert metrics_of(folder) == metrics_of(undisturbed.folder), (moments, folder)
    assert read_ledger(folder).verdict == "pass", (moments, folder)
    assert weights_of(folder) == weights_of(undisturbed.folder), (moments, folder)
    return Trial(moments[0], kills, failures, bad, len(lines) - EPOCHS * BATCHES)


def weights_of(folder: Path) -> list[str]:
    """A digest of the weights in each checkpoint of a run that is over."""

    def work(tell: Tell) -> None:
        for path in sorted((folder / "checkpoints").glob("*.ckpt")):
            tell(f"{path.name} {digest_of(torch.load(path, weights_only=True)['state_dict'])}")

    return [line for line in run_child(work).said if line != "done"]


# The campaigns


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_at_every_kind_of_moment_ends_as_the_undisturbed_one(
    fault: str, undisturbed: Run, tmp_path: Path
) -> None:
    """One run, killed again and again, and failed once by its disk."""
    dice = random.Random(fault)
    moments = [fault, *dice.sample(MOMENTS, len(MOMENTS))]
    done = trial(undisturbed, tmp_path / "run", moments, dice, ahead=2)
    assert done.kills >= 6
    assert done.failures == 1


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_killed_runs(undisturbed: Run, tmp_path: Path) -> None:
    """At least 200 kills, and 40 failures of the disk, in all kinds of moments."""
    dice = random.Random(11)
    trials: list[Trial] = []
    while sum(t.kills for t in trials) < 200 or sum(t.failures for t in trials) < 40:
        moment = [*MOMENTS, *FAULTS][len(trials) % (len(MOMENTS) + len(FAULTS))]
        trials.append(trial(undisturbed, tmp_path / f"run-{len(trials)}", [moment] * dice.randint(1, 3), dice))
    show(trials)


def show(trials: list[Trial]) -> None:
    """The table of results, as Markdown."""
    print("\n| moment | runs | kills | failed starts | files refused | batches trained again | runs that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    totals: Counter[str] = Counter()
    for moment in (*MOMENTS, *FAULTS):
        own = [t for t in trials if t.moment == moment]
        row = Counter(runs=len(own))
        for t in own:
            row.update(kills=t.kills, failures=t.failures, bad=t.bad_files, again=t.batches_again)
        totals += row
        print(_row(moment, row))
    print(_row("all", totals))


def _row(name: str, row: Counter[str]) -> str:
    figures = (f"{row[key]:,}" for key in ("runs", "kills", "failures", "bad", "again"))
    return f"| {name} | {' | '.join(figures)} | 0 |"
