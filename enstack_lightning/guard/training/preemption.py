"""SIGTERM and SIGUSR1, by which schedulers announce that a process must end: the run is saved at the end of the batch,
in full and on the disk, and the process then ends as it does without the guard.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.guard.flavor import (
    Callback,
    checkpoint_dirpaths,
    is_a,
    is_model_checkpoint,
    lightning_base,
    rank_zero_info,
)
from enstack_lightning.guard.recovery import RECOVERY_NAME, RecoveryCheckpoint, recovery_path
from enstack_lightning.guard.restart.resume_state import capture_resume_state

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

DOUBLED_SECONDS = 1.0
"""A signal so soon after the first is the same one: `timeout` and others signal a process and then its group."""
_AGREE_SECONDS = 1.0
_MOST_BATCHES = 1_000
_CHILD: Any = getattr(signal, "SIGCHLD", None)


class Preemption:
    """Handles the signals of a fit, in the main thread, between its first and its last batch.

    - SIGTERM: the recovery checkpoint is saved at the end of the batch, then Lightning's `SIGTERMException` ends the
      run.
    - SIGUSR1: the same, then the process ends by this signal, as it does by default. A handler of the user's is called
      at once, and decides whether the process ends.
    - The signal by which Lightning requeues SLURM jobs: Lightning's handler, which saves and requeues, runs at the end
      of the batch instead of in the middle of a step, and in this process only, not in a loader's workers as well.

    A second signal ends the process at once. During a validation the checkpoint is that of the batch before it, and the
    resumed run validates anew; with several processes the validation is waited for, since they may not validate alike.

    All ranks save after the same batch, whichever of them a signal has reached: they ask each other once in about
    a second, or after each batch where batches take longer.

    Args:
        enabled: whether to do anything.
        key: the guard's key among the callbacks of a checkpoint.
    """

    def __init__(self, enabled: bool, key: str) -> None:
        self.enabled = enabled
        self.key = key
        self._begin()

    def _begin(self) -> None:
        self._trainer: Trainer | None = None
        self._before: dict[int, Any] = {}
        self._received: int = 0
        self._received_at = 0.0
        self._childrens: Any = None
        self._path = ""
        self._last: _Last | None = None
        self._agreement = _Agreement()
        self._before_validation: tuple[dict[str, Any], dict[str, Any]] | None = None

    # Signals

    def start(self, trainer: Trainer) -> None:
        """`on_train_start`: Lightning has set its own handlers by now."""
        self.stop()
        self._begin()
        if not self.enabled or threading.current_thread() is not threading.main_thread() or _folder(trainer) is None:
            return
        self._trainer, self._pid = trainer, os.getpid()
        if trainer.is_global_zero and _recovery(trainer) is None:
            self._path = recovery_path(trainer, f"{_folder(trainer)}/{RECOVERY_NAME}.ckpt")
        for number in _signals(trainer):
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._on_signal)

    def stop(self) -> None:
        """`on_train_end`, `on_exception`, `teardown`: the handlers are as they were."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)
        self._before = {}
        self._hear_children()
        if self._trainer is not None and self._last in self._trainer.callbacks:  # type: ignore[attr-defined]
            # A callback between has raised: in a further run it would save, and end it with its first batch.
            self._trainer.callbacks.remove(self._last)  # type: ignore[attr-defined]
        self._trainer = self._last = self._before_validation = None  # the latter holds gradients, and batches

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a loader's worker, or another that was forked, which has no run to save
            self._call_users_handlers(number, frame)
        elif self._received and time.monotonic() - self._received_at > DOUBLED_SECONDS:
            self._end_at_once(number)
        elif not self._received:
            self._received, self._received_at = number, time.monotonic()
            self._do_not_hear_children()
            self._call_users_handlers(number, frame)

    def _call_users_handlers(self, number: int, frame: Any) -> None:
        for handler in self._handlers(number, lightnings=False):
            handler(number, frame)

    def _do_not_hear_children(self) -> None:
        """A signal to the whole group ends the loaders' workers, and torch raises an error of that in mid-step."""
        handler = signal.getsignal(_CHILD) if _CHILD is not None else None
        if callable(handler):
            self._childrens = handler
            signal.signal(_CHILD, _nothing)

    def _hear_children(self) -> None:
        if self._childrens is not None and signal.getsignal(_CHILD) is _nothing:
            signal.signal(_CHILD, self._childrens)
        self._childrens = None

    def _go_on(self) -> None:
        """The signal is dealt with, and the run does not end of it."""
        self._received = 0
        self._hear_children()

    def _end_at_once(self, number: int) -> None:
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        if launcher is not None:  # of the processes that this one has started, if any
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        _end_by(number)

    def _handlers(self, number: int, lightnings: bool) -> list[Callable[[int, Any], Any]]:
        """Of the handlers that were there before, those of Lightning's or the others."""
        connector = getattr(self._trainer, "_signal_connector", None)
        handlers = _one_by_one(self._before.get(number))
        return [h for h in handlers if callable(h) and (getattr(h, "__self__", None) is connector) == lightnings]

    def _requeueing(self, number: int) -> list[Callable[[int, Any], Any]]:
        """Lightning's handlers that save and requeue; those of SIGTERM itself only take note of it."""
        return [h for h in self._handlers(number, lightnings=True) if "sigterm" not in h.__name__]

    # Boundaries

    def batch_end(self, trainer: Trainer) -> None:
        """`on_train_batch_end`."""
        if trainer is not self._trainer:
            return
        self._before_validation = None
        number = self._agreement.ask(trainer, self._received)
        if number:
            self._afterwards(trainer, "on_train_batch_end", lambda: self._act(trainer, number))
        elif trainer.world_size == 1 and _validation_is_due(trainer) and not _swaps_weights(trainer):
            self._before_validation = (
                trainer._checkpoint_connector._get_loops_state_dict(),
                capture_resume_state(trainer),
            )

    def validation_batch_end(self, trainer: Trainer) -> None:
        """`on_validation_batch_end`."""
        number = self._received
        if trainer is self._trainer and number and self._before_validation is not None:
            self._afterwards(trainer, "on_validation_batch_end", lambda: self._act(trainer, number))

    def train_end(self, trainer: Trainer) -> None:
        """`on_train_end`: all is trained, and saved as the callbacks have it."""
        if trainer is self._trainer:
            number = self._agreement.ask(trainer, self._received, now=True)
            ends = number == signal.SIGTERM or (number and not self._handlers(number, lightnings=True))
            if number and ends:
                self._end(trainer, number, at_once=True)
            self.stop()

    def _afterwards(self, trainer: Trainer, hook: str, act: Callable[[], None]) -> None:
        """Acts after the callbacks that follow in the hook under way, which may still change what is saved."""
        if self._last is None:
            self._last = _Last(hook, act)
            trainer.callbacks.append(self._last)  # type: ignore[attr-defined]

    def _act(self, trainer: Trainer, number: int) -> None:
        self._last = None
        requeue = self._requeueing(number)
        if requeue:
            # They save by this method, and inside a validation it is the batch before that is to be saved.
            vars(trainer)["save_checkpoint"] = partial(self._save_as, trainer)
            try:
                for handler in requeue:
                    handler(number, None)
            finally:
                del vars(trainer)["save_checkpoint"]
            if number != signal.SIGTERM:
                self._go_on()
                return
        else:
            path = self._save(trainer)
            rank_zero_info(f"CheckpointGuard: {signal.Signals(number).name} received; saved {path} to resume from")
        # Lightning raises its exception itself after the batch; a validation must not begin first.
        at_once = self._before_validation is not None or _validation_is_due(trainer)
        for callback in trainer.checkpoint_callbacks:
            if at_once and is_model_checkpoint(callback):
                callback._last_global_step_saved = trainer.global_step  # what `save_on_exception` would save is saved
        self._end(trainer, number, at_once)

    def _save(self, trainer: Trainer) -> str:
        recovery = _recovery(trainer)
        path = recovery.about_to_save(trainer) if recovery else trainer.strategy.broadcast(self._path)
        self._save_as(trainer, path)
        return path

    def _save_as(self, trainer: Trainer, path: str) -> None:
        if self._before_validation is None:
            type(trainer).save_checkpoint(trainer, path, weights_only=False)
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["loops"], resume = self._before_validation
        checkpoint["callbacks"][self.key].update(resume)
        trainer.strategy.save_checkpoint(checkpoint, path)

    def _end(self, trainer: Trainer, number: int, at_once: bool) -> None:
        if number == signal.SIGTERM:
            trainer._signal_connector.received_sigterm = True
            if at_once:
                raise _sigterm_exception(trainer)
        elif self._handlers(number, lightnings=False):
            self._go_on()
        else:
            trainer.strategy.checkpoint_io.teardown()  # saves in the background come to their end
            for logger in trainer.loggers:
                logger.finalize("failed")
            _end_by(number)


class _Agreement:
    """Whether any rank has received a signal, asked so seldom that it costs next to nothing."""

    def __init__(self) -> None:
        self._batches = 0
        self._next = 1
        self._asked_at = time.monotonic()

    def ask(self, trainer: Trainer, received: int, now: bool = False) -> int:
        """The signal, the same on every rank; 0 where there is none, or where it is not yet time to ask."""
        if trainer.world_size == 1:
            return received
        self._batches += 1
        if self._batches < self._next and not now:
            return 0
        seconds = (time.monotonic() - self._asked_at) / self._batches
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = torch.tensor([float(received), seconds], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            number, seconds = told.tolist()
            self._next = max(1, min(_MOST_BATCHES, int(_AGREE_SECONDS / max(seconds, 1e-6))))
        else:
            number = signal.SIGTERM if trainer.strategy.reduce_boolean_decision(received > 0, all=False) else 0
            self._next = 10
        self._batches, self._asked_at = 0, time.monotonic()
        return int(number)


class _Last(Callback):
    """Put at the end of a Trainer's callbacks while one of its hooks runs; does its work there, and is gone."""

    def __init__(self, hook: str, act: Callable[[], None]) -> None:
        self.act = act
        setattr(self, hook, self._do)

    def _do(self, trainer: Trainer, *_: Any) -> None:
        trainer.callbacks.remove(self)  # type: ignore[attr-defined]
        self.act()


def _nothing(number: int, frame: Any) -> None:
    """Handles a signal by doing nothing."""


def _one_by_one(handler: Any) -> list[Any]:
    """The handlers that one of Lightning's is made of; at SIGTERM, where that requeues, it has another inside."""
    parts = getattr(handler, "signal_handlers", None)
    return [handler] if parts is None else [one for part in parts for one in _one_by_one(part)]


def _signals(trainer: Trainer) -> list[int]:
    environment = trainer._accelerator_connector.cluster_environment
    requeue = getattr(environment, "requeue_signal", None) if getattr(environment, "auto_requeue", False) else None
    found = [signal.SIGTERM, getattr(signal, "SIGUSR1", None), requeue]
    return list(dict.fromkeys(int(number) for number in found if number is not None))


def _recovery(trainer: Trainer) -> RecoveryCheckpoint | None:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, RecoveryCheckpoint)), None)


def _folder(trainer: Trainer) -> str | None:
    """Where the run's checkpoints stand; None where it saves none."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return next((dirpath.rstrip("/") for dirpath in checkpoint_dirpaths(trainer)), None)


def _validation_is_due(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _swaps_weights(trainer: Trainer) -> bool:
    """Whether a callback validates with other weights than are trained."""
    return any(is_a(callback, "WeightAveraging") for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _sigterm_exception(trainer: Trainer) -> BaseException:
    package = lightning_base(trainer, "Trainer").__module__.partition(".trainer")[0]
    raised: BaseException = import_module(f"{package}.utilities.exceptions").SIGTERMException()
    return raised


def _end_by(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
