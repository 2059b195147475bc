"""Processes that are signalled while they train: what is saved, how they end, and that the run goes on as if nothing
had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, every_epoch, quiet_trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard, RecoveryCheckpoint
from enstack_lightning.checkpoint import Options, Verdict, verify_checkpoint
from enstack_lightning.guard.loading.choice import choose_newest
from enstack_lightning.guard.training import preemption

SCRIPT = Path(__file__).with_name("preempted_ranks.py")
RECOVERY = "recovery_checkpoint.ckpt"
TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


class Validated(TinyModule):
    """With a validation that draws random numbers, whose result goes into the next steps."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("noise", torch.rand(()))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations += 1
            with torch.no_grad():
                self.layer.bias += 1e-3 * self.trainer.callback_metrics["noise"]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(6, 4)), batch_size=2, shuffle=True)


class Pause(Callback):
    """Tells at the start of a batch that a signal may come, and waits for it there."""

    def __init__(self, at: int, tell: Callable[[], None], seconds: float = 0.2, validation: bool = False) -> None:
        self.at, self.tell, self.seconds, self.validation = at, tell, seconds, validation
        self.batches = 0

    def _count(self) -> None:
        self.batches += 1
        if self.batches == self.at:
            self.tell()
            time.sleep(self.seconds)

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.validation:
            self._count()

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.validation and not trainer.sanity_checking:
            self._count()


def signalled(
    train: Callable[[Callable[[], None]], object], *signals: tuple[float, int], group: bool = False
) -> tuple[int, float]:
    """Trains in a child, and sends each signal so many seconds after the one before, from when the child tells.

    With `group` its own children get them too, as when a scheduler ends a job.

    Returns:
        How the child ended, as `subprocess` has it, and how long it lived after the first signal.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            torch.set_num_threads(1)
            train(lambda: os.write(writing, b"!") and None)
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 0
        finally:
            os._exit(status)
    os.close(writing)
    assert os.read(reading, 1) == b"!", "the child ended early"
    os.close(reading)
    began = time.monotonic()
    for seconds, number in signals:
        time.sleep(seconds)
        (os.killpg if group else os.kill)(child, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - began


def trained(folder: Path, kind: type[TinyModule], *callbacks: Callback, seed: int = 1, **options: Any) -> TinyModule:
    path = options.pop("ckpt_path", None)
    guard = options.pop("guard", None) or CheckpointGuard()
    torch.manual_seed(seed)
    module = kind()
    quiet_trainer(folder, guard, *callbacks, **options).fit(module, ckpt_path=path)
    return module


def checked(path: Path) -> Path:
    report = verify_checkpoint(path, Options(digests=True, deep=True))
    assert report.verdict is Verdict.PASS, report
    return path


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# The run goes on as if nothing had been

MOMENTS = {  # options of the Trainer, the batch that is signalled in, the batches that are trained by the save
    "inside an epoch": ({}, 7, False, 7),
    "in a run's first batch": ({}, 1, False, 1),
    "inside an accumulation window": ({"accumulate_grad_batches": 2}, 6, False, 6),
    "with saves in the background": ({"plugins": [AsyncCheckpointIO()]}, 7, False, 7),
    "in the last batch of an epoch": ({}, 10, False, 10),
    "before a validation": ({"val_check_interval": 2}, 7, False, 7),
    "inside a validation": ({"val_check_interval": 2}, 5, True, 4),
    "inside the validation at an epoch's end": ({}, 5, True, 10),
}


@pytest.mark.parametrize(("options", "at", "validation", "done"), MOMENTS.values(), ids=MOMENTS)
def test_a_run_that_was_ended_goes_on_at_the_next_batch(
    options: dict[str, Any], at: int, validation: bool, done: int, tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", Validated, every_epoch(tmp_path / "whole"), **options)

    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, Validated, every_epoch(tmp_path), Pause(at, tell, validation=validation), **options)

    status, _ = signalled(train, (0, TERM))
    assert status == 0
    path = checked(tmp_path / RECOVERY)
    newest = choose_newest([tmp_path], verify_checkpoint)
    assert newest is not None
    assert newest.path == str(path)
    resumed = trained(tmp_path, Validated, every_epoch(tmp_path), seed=99, ckpt_path=path, **options)
    assert resumed.rows == whole.rows[done:]
    assert resumed.losses == whole.losses[done:]
    assert same_weights(resumed, whole)


def test_the_status_is_that_of_a_run_without_the_guard(tmp_path: Path) -> None:
    for number in (TERM, USR1):
        statuses = []
        for name in ("with", "without"):
            guards = [CheckpointGuard()] if name == "with" else []
            folder = tmp_path / f"{name}-{number}"

            def train(tell: Callable[[], None], folder: Path = folder, guards: list[Callback] = guards) -> None:  # type: ignore[assignment]
                quiet_trainer(folder, *guards, every_epoch(folder), Pause(7, tell)).fit(TinyModule())

            statuses.append(signalled(train, (0, number))[0])
            assert (folder / RECOVERY).exists() == bool(guards)
        assert statuses == ([0, 0] if number == TERM else [-USR1, -USR1])
        checked(tmp_path / f"with-{number}" / RECOVERY)


class Workers(TinyModule):
    def train_dataloader(self) -> StatefulDataLoader:
        loader = super().train_dataloader()
        return StatefulDataLoader(
            loader.dataset, batch_size=4, sampler=loader.sampler, num_workers=2, generator=torch.Generator()
        )


@pytest.mark.parametrize("number", [TERM, USR1])
def test_a_signal_to_the_whole_group_that_ends_the_workers_too(number: int, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Workers, every_epoch(tmp_path / "whole"))

    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, Workers, every_epoch(tmp_path), Pause(7, tell))

    assert signalled(train, (0, number), group=True)[0] == (0 if number == TERM else -USR1)
    resumed = trained(tmp_path, Workers, every_epoch(tmp_path), ckpt_path=checked(tmp_path / RECOVERY))
    assert resumed.rows == whole.rows[7:]
    assert same_weights(resumed, whole)


# Which signals, and how often


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell, seconds=60))

    status, seconds = signalled(train, (0, TERM), (2.5, TERM))
    assert status == -TERM
    assert seconds < 30
    assert not (tmp_path / RECOVERY).exists()


def test_a_signal_that_comes_doubled_is_one(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell))

    status, _ = signalled(train, (0, TERM), (0.05, TERM))
    assert status == 0
    checked(tmp_path / RECOVERY)


def test_a_handler_of_the_users_decides_whether_sigusr1_ends_the_run(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        signal.signal(USR1, lambda *_: (tmp_path / "called").touch())
        trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell))

    assert signalled(train, (0, USR1))[0] == 0
    assert (tmp_path / "called").exists()
    assert torch.load(checked(tmp_path / RECOVERY))["global_step"] == 7
    assert (tmp_path / "epoch=2.ckpt").exists()


def test_both_can_be_had_without(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        guard = CheckpointGuard(save_on_signal=False)
        trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell), guard=guard)

    assert signalled(train, (0, TERM))[0] == 0
    assert not (tmp_path / RECOVERY).exists()


class Forks(Callback):
    """Signals a process that it forks, as a user's own code may, often enough to end this one at once."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            preemption.DOUBLED_SECONDS = 0.0
            child = os.fork()
            if child == 0:
                for _ in range(3):
                    os.kill(os.getpid(), self.number)
                os._exit(7)
            self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("handler", [signal.SIG_DFL, "the user's"])
def test_a_signal_to_a_forked_child_is_the_childs_own_affair(handler: Any, tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        tell()
        calls = tmp_path / "calls"
        signal.signal(USR1, handler if handler is signal.SIG_DFL else lambda *_: calls.open("a").write("!") and None)
        forks = Forks(USR1)
        trained(tmp_path, TinyModule, every_epoch(tmp_path), forks)
        assert forks.status == 7
        assert handler is signal.SIG_DFL or calls.read_text() == "!!!"

    assert signalled(train)[0] == 0
    assert not (tmp_path / RECOVERY).exists()
    assert (tmp_path / "epoch=2.ckpt").exists()


class Handlers(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        self.during = [signal.getsignal(number) for number in (TERM, USR1, USR2)]


class Fails(TinyModule):
    def on_train_epoch_end(self) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_as_they_were_afterwards(fails: bool, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (TERM, USR1)]
    handlers = Handlers()
    if fails:
        with pytest.raises(ZeroDivisionError):
            trained(tmp_path, Fails, every_epoch(tmp_path), handlers)
    else:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), handlers, max_epochs=1)
    assert [signal.getsignal(number) for number in (TERM, USR1)] == before
    assert not set(handlers.during[:2]) & set(before)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    handlers, before = Handlers(), signal.signal(USR1, signal.SIG_IGN)
    try:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), handlers, max_epochs=1)
    finally:
        signal.signal(USR1, before)
    assert handlers.during[1] is signal.SIG_IGN


def test_in_another_thread_than_the_main_one_no_signal_is_handled(tmp_path: Path) -> None:
    handlers = Handlers()
    thread = threading.Thread(target=trained, args=(tmp_path, TinyModule, every_epoch(tmp_path), handlers))
    thread.start()
    thread.join()
    assert handlers.during[1] is signal.SIG_DFL
    assert (tmp_path / "epoch=2.ckpt").exists()


class Kills(Callback):
    """Signals its own process in a batch, and keeps what handles a child's end after each batch."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.of_children: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.of_children.append(signal.getsignal(signal.SIGCHLD))
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)
            self.of_children.append(signal.getsignal(signal.SIGCHLD))


@pytest.mark.parametrize("number", [TERM, USR1])
def test_the_end_of_a_child_is_heard_of_again_once_a_signal_is_dealt_with(number: int, tmp_path: Path) -> None:
    def heard(*_: Any) -> None:
        """Of a user who hears of children, and of the signal, which then does not end the run."""

    kills, before = Kills(number), {n: signal.signal(n, heard) for n in (signal.SIGCHLD, USR1)}
    try:
        with pytest.raises(SystemExit) if number == TERM else nullcontext():
            trained(tmp_path, TinyModule, every_epoch(tmp_path), kills, max_epochs=1)
        assert signal.getsignal(signal.SIGCHLD) is heard
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert [of is heard for of in kills.of_children] == [True, True, True, False] + [True] * (2 * (number == USR1))


class EndsWithASignal(TinyModule):
    number = TERM

    def on_train_end(self) -> None:
        (Path(self.trainer.default_root_dir) / "ended").touch()

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 2:
            os.kill(os.getpid(), self.number)


class EndsWithUsr1(EndsWithASignal):
    number = USR1


class ToldTheEnd(CSVLogger):
    def finalize(self, status: str) -> None:
        super().finalize(status)
        (Path(self.root_dir) / status).touch()


@pytest.mark.parametrize(("kind", "requeues"), [(EndsWithASignal, False), (EndsWithUsr1, False), (EndsWithUsr1, True)])
def test_a_signal_after_the_last_batch_ends_the_run_as_any_other_unless_it_requeues(
    kind: type[TinyModule], requeues: bool, tmp_path: Path
) -> None:
    def train(tell: Callable[[], None]) -> None:
        tell()
        with slurm(tmp_path / "bin") if requeues else nullcontext():
            options = {"plugins": [SLURMEnvironment()]} if requeues else {}
            logger = ToldTheEnd(tmp_path, "log")
            trained(tmp_path, kind, every_epoch(tmp_path), logger=logger, log_every_n_steps=1, **options)
            (tmp_path / "went on").touch()

    assert signalled(train)[0] == (-USR1 if kind is EndsWithUsr1 and not requeues else 0)
    assert (tmp_path / "went on").exists() == requeues
    assert (tmp_path / "log" / ("success" if requeues else "failed")).exists()
    assert (tmp_path / "epoch=2.ckpt").exists()


def test_averaged_weights_that_a_validation_has_are_not_those_that_are_trained_on(tmp_path: Path) -> None:
    options = {"val_check_interval": 2}
    whole = trained(tmp_path / "whole", Validated, every_epoch(tmp_path / "whole"), WeightAveraging(), **options)

    def train(tell: Callable[[], None]) -> None:
        callbacks = every_epoch(tmp_path), WeightAveraging(), Pause(5, tell, validation=True)
        trained(tmp_path, Validated, *callbacks, **options)

    assert signalled(train, (0, TERM))[0] == 0
    again = every_epoch(tmp_path), WeightAveraging()
    resumed = trained(tmp_path, Validated, *again, seed=9, ckpt_path=checked(tmp_path / RECOVERY), **options)
    assert resumed.losses == whole.losses[5:]
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_a_run_without_checkpoints_is_left_alone(options: dict[str, Any], tmp_path: Path) -> None:
    handlers = Handlers()
    trained(tmp_path, TinyModule, handlers, **options)
    assert handlers.during[1] is signal.SIG_DFL


# Where it is saved


def test_a_recovery_callback_is_told_and_clears_up_later(tmp_path: Path) -> None:
    def recovery() -> RecoveryCheckpoint:
        return RecoveryCheckpoint(str(tmp_path), filename="rescue", every_n_train_steps=100)

    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), recovery(), Pause(7, tell))

    assert signalled(train, (0, TERM))[0] == 0
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "rescue.ckpt"]
    path = checked(tmp_path / "rescue.ckpt")
    trained(tmp_path, TinyModule, every_epoch(tmp_path), recovery(), ckpt_path=path)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]


class Average(Callback):
    """A callback that stands behind the guard and keeps state of its own, changed after each batch."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}


def test_what_callbacks_behind_the_guard_do_after_the_batch_is_in_it(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell), Average())

    signalled(train, (0, TERM))
    callbacks = torch.load(tmp_path / RECOVERY)["callbacks"]
    assert callbacks["Average"] == {"batches": 7}
    assert not [key for key in callbacks if "Last" in key]


def test_a_callback_that_fails_in_the_batch_of_the_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), TERM)

        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("this callback fails")

    trainer = quiet_trainer(tmp_path, CheckpointGuard(), Fails(), every_epoch(tmp_path))
    before = list(trainer.callbacks)
    with pytest.raises(ValueError, match="this callback fails"):
        trainer.fit(TinyModule())
    assert trainer.callbacks == before


def test_what_is_saved_on_the_exception_does_not_stand_before_it(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Validated, every_epoch(tmp_path / "whole"), val_check_interval=2)

    def train(tell: Callable[[], None]) -> None:
        saves = ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True)
        trained(tmp_path, Validated, saves, Pause(7, tell), val_check_interval=2)

    signalled(train, (0, TERM))
    newest = choose_newest([tmp_path], verify_checkpoint)
    assert newest is not None
    resumed = trained(tmp_path, Validated, every_epoch(tmp_path), ckpt_path=newest.path, val_check_interval=2)
    assert same_weights(resumed, whole)


# SLURM


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A job's environment, with a `scontrol` that writes down what it is told."""
    folder.mkdir(parents=True, exist_ok=True)
    control = folder / "scontrol"
    control.write_text(f'#!/bin/sh\necho "$@" >> {folder}/told\n')
    control.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**job, "PATH": f"{folder}:{os.environ['PATH']}"}.items():
            patch.setenv(name, value)
        yield


@pytest.mark.parametrize("number", [USR1, USR2])
def test_slurms_requeueing_saves_after_the_batch(number: signal.Signals, tmp_path: Path) -> None:
    module = trained(tmp_path / "whole", TinyModule, every_epoch(tmp_path / "whole"))

    def train(tell: Callable[[], None]) -> None:
        with slurm(tmp_path / "bin"):
            plugins = [SLURMEnvironment(auto_requeue=True, requeue_signal=number)]
            trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell), plugins=plugins)

    assert signalled(train, (0, number))[0] == 0
    assert (tmp_path / "bin" / "told").read_text() == "requeue 7\n"
    path = checked(tmp_path / "hpc_ckpt_1.ckpt")
    assert (tmp_path / "epoch=2.ckpt").exists(), "Lightning trains on until SLURM ends the job"
    assert not (tmp_path / RECOVERY).exists()
    resumed = trained(tmp_path / "again", TinyModule, every_epoch(tmp_path / "again"), ckpt_path=path)
    assert resumed.rows == module.rows[7:]
    assert same_weights(resumed, module)


def test_a_job_that_is_requeued_at_sigterm_is_saved_at_the_end_of_the_batch(tmp_path: Path) -> None:
    module = trained(tmp_path / "whole", TinyModule, every_epoch(tmp_path / "whole"))

    def train(tell: Callable[[], None]) -> None:
        with slurm(tmp_path / "bin"):
            plugins = [SLURMEnvironment(requeue_signal=TERM)]
            trained(tmp_path, TinyModule, every_epoch(tmp_path), Pause(7, tell), plugins=plugins)

    assert signalled(train, (0, TERM))[0] == 0
    assert (tmp_path / "bin" / "told").read_text() == "requeue 7\n"
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "hpc_ckpt_1.ckpt"]
    path = checked(tmp_path / "hpc_ckpt_1.ckpt")
    resumed = trained(tmp_path / "again", TinyModule, every_epoch(tmp_path / "again"), ckpt_path=path)
    assert resumed.rows == module.rows[7:]
    assert same_weights(resumed, module)


def test_a_signal_that_no_job_is_requeued_by_is_left_alone(tmp_path: Path) -> None:
    handlers = Handlers()
    with slurm(tmp_path / "bin"):
        plugins = [SLURMEnvironment(auto_requeue=False, requeue_signal=USR2)]
        trained(tmp_path, TinyModule, every_epoch(tmp_path), handlers, plugins=plugins, max_epochs=1)
    assert handlers.during[2] is signal.SIG_DFL


def test_a_job_that_is_requeued_in_a_validation_validates_anew(tmp_path: Path) -> None:
    options = {"val_check_interval": 2}
    whole = trained(tmp_path / "whole", Validated, every_epoch(tmp_path / "whole"), **options)

    def train(tell: Callable[[], None]) -> None:
        with slurm(tmp_path / "bin"):
            pause, plugins = Pause(5, tell, validation=True), [SLURMEnvironment()]
            trained(tmp_path, Validated, every_epoch(tmp_path), pause, plugins=plugins, **options)

    assert signalled(train, (0, USR1))[0] == 0
    assert (tmp_path / "epoch=2.ckpt").exists()
    path = checked(tmp_path / "hpc_ckpt_1.ckpt")
    resumed = trained(
        tmp_path / "again", Validated, every_epoch(tmp_path / "again"), seed=99, ckpt_path=path, **options
    )
    assert resumed.losses == whole.losses[4:]
    assert resumed.validations == whole.validations - 1
    assert same_weights(resumed, whole)


def test_workers_that_get_slurms_signal_too_neither_save_nor_requeue(tmp_path: Path) -> None:
    def train(tell: Callable[[], None]) -> None:
        with slurm(tmp_path / "bin"):
            trained(tmp_path, Workers, every_epoch(tmp_path), Pause(7, tell), plugins=[SLURMEnvironment()])

    assert signalled(train, (0, USR1), group=True)[0] == 0
    assert (tmp_path / "bin" / "told").read_text() == "requeue 7\n"
    assert [path.name for path in tmp_path.glob("hpc_ckpt*.ckpt")] == ["hpc_ckpt_1.ckpt"]


# Several ranks


def test_two_ranks_save_after_the_same_batch_whichever_is_signalled(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    call = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=180, env=environment)
    assert done.returncode == -TERM, done.stderr  # a second signal ended rank 0 at once, and with it rank 1
    assert not (tmp_path / "lived on").exists()
    of_rank_0, of_rank_1 = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert of_rank_0 == of_rank_1
    assert [ended["by"] for ended in of_rank_0] == ["SIGTERMException", "SIGTERMException", "its end"]
    for ended in of_rank_0[:2]:
        assert ended["signalled"] <= ended["saved"] <= ended["signalled"] + 40
    assert of_rank_0[2]["began"] == of_rank_0[1]["saved"]
