"""`SampleLedger`: writes down which rows are trained, as evidence that no restart left any out or used any twice.

`enstack ledger RUN_DIR` reads it. The format is described in `enstack_lightning.checkpoint.ledger_file`. A batch is
written when it is done, with one small write, so a SIGKILL loses at most the batch that it falls into; with every
checkpoint the file is brought to the disk, lest the machine itself goes down. The checkpoint holds which start saved it
and how many of its batches it contains, from which the reader knows what was trained and then rolled back.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from enstack_lightning.checkpoint.durable import sync_folder
from enstack_lightning.checkpoint.ledger_file import (
    CONTINUED,
    FOLDER,
    MAX_ROW,
    STEPPED,
    SUFFIX,
    WITHOUT_LOSS,
    Encoder,
    Header,
    Loader,
)
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.guard.flavor import FITTING, Callback, rank_zero_warn
from enstack_lightning.guard.training_data import length_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

STATE_VERSION = 1


class SampleLedger(Callback):
    """Writes the rows of every training batch to a file, a byte or two a row; works in any Trainer.

    It never stops a run: where a ledger cannot be written, or a batch does not say its rows, it warns once.

    Args:
        dirpath: folder of the ledger, the same in every start of the run. None: `ledger` in the Trainer's
            `default_root_dir`.
        rows: where a batch has the numbers of its rows: a key (of a dict) or an index (of a tuple), or a function that
            takes the batch and returns them. They are whole numbers from 0, unique in the training data, as a tensor,
            an array or a list; best are positions in the data set, as then `enstack ledger` can name rows that were
            left out. Batches that do not have them are only counted.

    Example:
        >>> SampleLedger(rows=lambda batch: batch[1]).state_dict()
        {}
    """

    def __init__(self, dirpath: str | None = None, rows: str | int | Callable[[Any], Any] = "idx") -> None:
        super().__init__()
        self.dirpath = dirpath
        self.rows = rows
        self._trainer: Trainer | None = None
        self._file: _LedgerFile | None = None
        self._loaded: dict[str, Any] = {}
        self._id = ""
        self._batches = 0
        self._in_flight: _Rows | None = None
        self._waiting: deque[_Done] = deque()
        self._global_step = 0
        self._epoch = -1
        self._loader: Loader | None = None
        self._asks_for_gradients = False
        self._continued = False
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == FITTING:
            self._loaded = {}
            self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        goes_on = trainer.global_step and not trainer.ckpt_path  # a further fit() of the same Trainer
        parent = self.state_dict() if goes_on else self._loaded
        self._in_flight, self._waiting, self._batches, self._id = None, deque(), 0, ""
        if getattr(trainer, "fast_dev_run", False):
            return
        self._epoch, self._loader, self._global_step = -1, None, trainer.global_step
        self._asks_for_gradients, self._continued = bool(parent), False
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / FOLDER)
        self._id, start = trainer.strategy.broadcast((secrets.token_hex(8), _next_start(folder)))
        header = Header(
            self._id,
            start,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            trainer.global_rank,
            trainer.world_size,
            str(parent["id"]) if parent else None,
            int(parent["batches"]) if parent else 0,
            str(trainer.ckpt_path) if trainer.ckpt_path else None,
            trainer.global_step,
        )
        self._file = _LedgerFile(folder, header)
        self._loaded = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._file is not None:
            self._in_flight = self._rows_of(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._asks_for_gradients:  # asked once a start: does its first batch add to gradients from before?
            self._asks_for_gradients = False
            gradients = (p.grad for p in pl_module.parameters() if p.grad is not None)
            self._continued = any(bool(gradient.any()) for gradient in gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        without_loss = pl_module.automatic_optimization and not isinstance(outputs, torch.Tensor) and not outputs
        self._batch_done(trainer, batch_idx, WITHOUT_LOSS if without_loss else 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is not None:
            self._write_waiting(all_of_them=True)
            self._file.append(self._file.encoder.epoch_end(trainer.current_epoch))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write_waiting(all_of_them=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != FITTING:
            return
        self._write_waiting(all_of_them=True)
        if self._file is not None:
            self._file.close()
        self._trainer = self._file = self._in_flight = None

    def state_dict(self) -> dict[str, Any]:
        """Which start saves, and how many of its batches the weights contain."""
        if self._file is not None and self._trainer is not None:
            progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
            if progress.ready == progress.started == progress.processed:
                # saved after the batch's optimizer step, and before this callback has heard that it is done
                self._batch_done(self._trainer, progress.ready - 1, 0)
            self._write_waiting(all_of_them=True)
            self._file.sync()
        return {"version": STATE_VERSION, "id": self._id, "batches": self._batches} if self._id else dict(self._loaded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _batch_done(self, trainer: Trainer, batch_idx: int, flags: int) -> None:
        rows, self._in_flight = self._in_flight, None
        if self._file is None or rows is None:
            return
        step = trainer.global_step
        if step != self._global_step or not trainer.lightning_module.automatic_optimization:
            flags |= STEPPED  # a step taken by hand may be one that no counter of the Trainer shows
        if self._continued:
            flags, self._continued = flags | CONTINUED, False
        self._batches, self._global_step = self._batches + 1, step
        if trainer.current_epoch != self._epoch:
            self._epoch = trainer.current_epoch
            self._describe_loader(trainer)
        self._waiting.append(_Done(self._epoch, batch_idx, step, flags, rows))
        self._write_waiting()

    def _write_waiting(self, all_of_them: bool = False) -> None:
        while self._file is not None and self._waiting and (all_of_them or self._waiting[0].rows.here()):
            done = self._waiting.popleft()
            rows = done.rows.numbers()
            count = len(rows) if rows else done.rows.count
            self._file.append(
                self._file.encoder.batch(done.epoch, done.batch, done.global_step, done.flags, rows, count)
            )

    def _describe_loader(self, trainer: Trainer) -> None:
        loader = loader_facts(trainer)
        if loader != self._loader and self._file is not None:
            self._write_waiting(all_of_them=True)
            self._loader = loader
            self._file.append(self._file.encoder.loader(loader))

    def _rows_of(self, batch: Any) -> _Rows:
        try:
            value = self.rows(batch) if callable(self.rows) else batch[self.rows]
            rows = _on_the_way(value) if _is_on_gpu(value) else _Rows(_numbers(value))
        except Exception as e:
            if not self._warned:
                self._warned = True
                where = "the function in `rows` failed" if callable(self.rows) else f"a batch has no {self.rows!r}"
                rank_zero_warn(
                    f"SampleLedger cannot tell the rows of a batch and only counts batches: {where} "
                    f"({type(e).__name__}: {e}). Pass SampleLedger(rows=...): a key or index of the batch, or a "
                    "function of it, that gives whole numbers from 0."
                )
            return _Rows(None)
        return rows


class _Rows:
    """The rows of a batch; on the way from the accelerator, training does not wait for them."""

    def __init__(self, numbers: list[int] | None, copy: torch.Tensor | None = None, arrived: Any = None) -> None:
        self._numbers, self._copy, self._arrived = numbers, copy, arrived
        self.count = len(numbers or ()) if copy is None else copy.numel()

    def here(self) -> bool:
        return self._arrived is None or bool(self._arrived.query())

    def numbers(self) -> list[int] | None:
        if self._copy is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # the accelerator may have failed, and the run with it
                self._arrived.synchronize()
                self._numbers = _numbers(self._copy)
            self._copy = self._arrived = None
        return self._numbers


class _Done(NamedTuple):
    """A batch that is trained; `global_step` is that after it."""

    epoch: int
    batch: int
    global_step: int
    flags: int
    rows: _Rows


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _on_the_way(value: torch.Tensor) -> _Rows:
    copy = value.detach().to("cpu", non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(value.device))
    return _Rows(None, copy, arrived)


def _numbers(value: Any) -> list[int]:
    """The row numbers in a tensor, an array or a list.

    Raises:
        ValueError: they are none.
    """
    flat = value.flatten() if hasattr(value, "flatten") else value
    numbers = flat.tolist() if hasattr(flat, "tolist") else [int(n) if hasattr(n, "item") else n for n in flat]
    if not numbers or not all(type(n) is int for n in numbers) or min(numbers) < 0 or max(numbers) > MAX_ROW:
        raise ValueError(f"{str(numbers)[:40]} are no whole numbers from 0")
    return numbers


class _LedgerFile:
    """One process's file of one start; what cannot be written ends it with a warning, and not the run."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.encoder = Encoder()
        self._fd = -1
        self._syncing: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._unsynced = False
        self._path = folder / f"start-{header.start:04}-rank-{header.rank}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():  # of another run, where each machine has a disk of its own
                self._path = self._path.with_name(f"{self._path.stem}-{header.id}{SUFFIX}")
            self._fd = os.open(self._path, flags, 0o666)
            self.append(self.encoder.begin(header))
            with contextlib.suppress(OSError):
                sync_folder(folder)
        except OSError as e:
            self._give_up(e)

    def append(self, record: bytes) -> None:
        """Writes a record; whole, unless the process is killed."""
        self._unsynced = True
        try:
            while self._fd >= 0 and record:
                record = record[os.write(self._fd, record) :]
        except OSError as e:
            self._give_up(e)

    def sync(self) -> None:
        """Begins to bring what was written to the disk, while the checkpoint, which takes longer, goes there too."""
        if self._unsynced:
            self.wait()
        if self._fd >= 0 and self._unsynced:
            self._unsynced = False
            self._syncing = threading.Thread(target=self._sync, args=(self._fd,), name="ledger-sync", daemon=True)
            self._syncing.start()

    def wait(self) -> None:
        """Waits until what `sync` has begun is done."""
        if self._syncing is not None:
            self._syncing.join()
            self._syncing = None
        if self._sync_error is not None:
            error, self._sync_error = self._sync_error, None
            self._give_up(error)

    def _sync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as e:
            self._sync_error = e  # for `wait`: the training thread may be writing to the file now

    def close(self) -> None:
        self.sync()
        self.wait()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _give_up(self, error: OSError) -> None:
        rank_zero_warn(
            f"SampleLedger cannot write {self._path} ({error.strerror}): training goes on without it, and "
            "`enstack ledger` will say from where the rows are not recorded"
        )
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _next_start(folder: Path) -> int:
    found = (re.match(r"start-(\d+)-", path.name) for path in folder.glob(f"*{SUFFIX}"))
    return 1 + max((int(match[1]) for match in found if match), default=0)


def loader_facts(trainer: Trainer) -> Loader:
    """What this process's training loader is set to give in an epoch; unknown where it is none of torch's kind."""
    loader = trainer.train_dataloader
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    batch_size = getattr(loader, "batch_size", None) or getattr(batch_sampler, "batch_size", None)
    drop_last = bool(getattr(loader, "drop_last", False) or getattr(batch_sampler, "drop_last", False))
    of_epoch = trainer.num_training_batches
    batches = int(of_epoch) if of_epoch != float("inf") else None
    drawn, available = _length(sampler), _length(loader) if hasattr(loader, "dataset") else None
    planned = None
    if batches is not None and drawn is not None and isinstance(batch_size, int):
        planned = min(drawn // batch_size * batch_size if drop_last else drawn, batches * batch_size)
    return Loader(
        _length(getattr(loader, "dataset", None)),
        batches,
        planned,
        drop_last,
        available is not None and batches is not None and batches < available,
        bool(getattr(sampler, "replacement", False)),
        type(sampler).__name__ if sampler is not None else "",
    )


def _length(thing: Any) -> int | None:
    return None if is_mapping(thing) else length_of(thing)
