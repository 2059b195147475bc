"""One line for every batch that was trained, with digests of all that decides the next one: two runs are the same run
exactly where their lines are the same.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from blake3 import blake3

from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard.flavor import Callback, join_imported_flavors
from enstack_lightning.guard.live import learning_rates
from enstack_lightning.guard.restart.rng import capture_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Moment = Literal["batch", "forward", "step", "save"]
"""Where a run ends itself: before a batch, after its forward pass, after its step, inside the next save."""

_LONGEST_SAVE_SECONDS = 0.02


class StepRecord(Callback):
    """Appends a JSON line to a file after every training batch, for `enstack resume-check` or to compare runs by hand.

    A line holds `epoch`, `batch` and `step` (the Trainer's `global_step` after it), `loss` and `lrs` as exact
    hexadecimal numbers, and BLAKE3 digests of the batch, of every random generator, of the weights and buffers, and of
    the optimizers' state. Reading all weights takes time: it is no callback for long runs.

    Args:
        path: file to append to; processes other than the first write to `path` with their rank appended.
        kill_at: the batch, counted from 1 over this process, at which the process ends itself with SIGKILL. None: it
            does not.
        moment: where in that batch.

    Raises:
        CheckpointGuardError: `kill_at` or `moment` cannot be meant.
    """

    def __init__(self, path: str, kill_at: int | None = None, moment: Moment = "step") -> None:
        join_imported_flavors()
        super().__init__()
        if kill_at is not None and kill_at < 1:
            raise CheckpointGuardError(f"kill_at is {kill_at} and must be 1 or more")
        if moment not in get_args(Moment):
            raise CheckpointGuardError(f"moment is {moment!r} and must be one of {', '.join(get_args(Moment))}")
        self.path = path
        self.kill_at = kill_at
        self.moment = moment
        self._batches = 0
        self._batch = ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = digest_of(batch)
        self._batches += 1
        self._end_itself("batch")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._end_itself("forward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if is_mapping(outputs) else outputs
        line = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": trainer.global_step,
            "loss": float(loss).hex() if isinstance(loss, torch.Tensor) else None,
            "lrs": [rate.hex() for rate in learning_rates(trainer)],
            "data": self._batch,
            "random": {name: digest_of(state) for name, state in capture_random_state().items()},
            "weights": digest_of(dict(pl_module.state_dict())),
            "optimizer": digest_of([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]),
        }
        _append(f"{self.path}.{trainer.global_rank}" if trainer.global_rank else self.path, json.dumps(line))
        self._end_itself("step")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.moment == "save" and self._is_due():
            delay = int.from_bytes(os.urandom(2)) / 2**16 * _LONGEST_SAVE_SECONDS
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def _is_due(self) -> bool:
        return self.kill_at is not None and self._batches >= self.kill_at

    def _end_itself(self, moment: Moment) -> None:
        if self.moment == moment and self._is_due():
            os.kill(os.getpid(), signal.SIGKILL)


def digest_of(value: Any) -> str:
    """The BLAKE3 digest, 16 hexadecimal digits, of plain values and tensors, however nested; types and shapes count."""
    hasher = blake3()
    for part in _parts(value):
        hasher.update(part)
    return hasher.hexdigest(8)


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        yield f"tensor {plain.dtype} {tuple(plain.shape)}".encode()
        dense = plain.to_dense() if plain.layout is not torch.strided else plain
        yield dense.contiguous().flatten().view(torch.uint8).numpy().data
    elif is_mapping(value):
        yield f"mapping {len(value)}".encode()
        for key in value:
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def _append(path: str, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)
