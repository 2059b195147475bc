"""Saves in the background of training: what the training loop waits for is one copy of the checkpoint in memory.

Lightning's `AsyncCheckpointIO` clones every tensor for each save. The copy itself is quick; the system's handing out of
fresh memory takes most of the time. Here the copy goes to memory that is kept from one save to the next.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

_ALIGNMENT = 64
_SMALL_BYTES = 4096


class Snapshot:
    """A copy of a checkpoint. No collection, so that `AsyncCheckpointIO` hands it on without cloning what it holds.

    Attributes:
        checkpoint: the copy; valid until `release`.
    """

    def __init__(self, checkpoint: dict[str, Any], release: Callable[[], None]) -> None:
        self.checkpoint = checkpoint
        self._release = release

    def release(self) -> None:
        """Gives the memory of the copy back for the next one."""
        self.checkpoint = {}
        self._release()


class SnapshotMemory:
    """Makes snapshots, one after the other in the same memory; while that is in use, in new memory.

    Between saves it holds as much memory as the largest checkpoint so far, until `let_go`.
    """

    def __init__(self) -> None:
        self._idle: mmap.mmap | None = None
        self._lock = threading.Lock()

    def snapshot(self, checkpoint: dict[str, Any]) -> Snapshot:
        """A copy of `checkpoint`; tensors that are one stay one.

        Tensors of other devices, layouts and classes are cloned, as `AsyncCheckpointIO` does with all.
        """
        places: dict[tuple[Any, ...], int] = {}
        end = 0

        def plan(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal end
            if _is_plain(tensor) and (key := _identity(tensor)) not in places:
                places[key] = end
                end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            return tensor

        copies: dict[tuple[Any, ...], torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            key = _identity(tensor) if _is_plain(tensor) else None
            if key is None:
                return tensor.detach().clone()
            if key not in copies:
                copies[key] = _copy_at(tensor, memory, places[key])
            return copies[key]

        apply_to_collection(checkpoint, torch.Tensor, plan)
        memory = self._take(end)
        return Snapshot(apply_to_collection(checkpoint, torch.Tensor, copy), lambda: self._give_back(memory))

    def let_go(self) -> None:
        """Gives the memory back to the system."""
        with self._lock:
            self._idle = None

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            memory, self._idle = self._idle, None
        # Shared with children, for they would otherwise make the next copy pay for every page anew.
        return memory if memory is not None and len(memory) >= size else mmap.mmap(-1, max(size, 1))

    def _give_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            if self._idle is None or len(self._idle) < len(memory):
                self._idle = memory


class BackgroundSaves:
    """Stands in for `save_checkpoint` and `teardown` of an `AsyncCheckpointIO` whose saves `GuardedCheckpointIO` makes.

    Args:
        checkpoint_io: the `AsyncCheckpointIO`, or what wraps it.
        announce: called with each path before its save is queued.
        memory: what snapshots are made in; None where what comes after wants the checkpoint itself.
    """

    def __init__(self, checkpoint_io: Any, announce: Callable[[Any], None], memory: SnapshotMemory | None) -> None:
        self._checkpoint_io = checkpoint_io
        self._announce = announce
        self._memory = memory
        self._installed = False

    def install(self) -> None:
        """What a user had set on the object comes back at `teardown`, which a Trainer calls after each of its runs."""
        if self._installed:
            return
        own = vars(self._checkpoint_io)
        self._before = {name: own[name] for name in ("save_checkpoint", "teardown") if name in own}
        self._save, self._teardown = self._checkpoint_io.save_checkpoint, self._checkpoint_io.teardown
        own.update(save_checkpoint=self.save_checkpoint, teardown=self.teardown)
        self._installed = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        handed_on = checkpoint if self._memory is None else self._memory.snapshot(checkpoint)
        self._announce(path)
        self._save(handed_on, path, *args, **kwargs)

    def teardown(self) -> None:
        try:
            self._teardown()
        finally:
            if self._memory is not None:
                self._memory.let_go()
            if self._before:
                own = vars(self._checkpoint_io)
                del own["save_checkpoint"], own["teardown"]
                own.update(self._before)
                self._installed = False


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is bytes in a row, in this process's own memory."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.nbytes >= _SMALL_BYTES
        and not (tensor.is_neg() or tensor.is_conj())
        and (tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)))
    )


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _copy_at(tensor: torch.Tensor, memory: mmap.mmap, offset: int) -> torch.Tensor:
    """A copy with a storage of its own: torch would write a storage that is shared whole, for each of its tensors."""
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
    copy = raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor.detach())
