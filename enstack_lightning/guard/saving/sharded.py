"""Saves of the strategies that shard: all ranks write one folder, and it stands under its name whole or not at all.

FSDP, DeepSpeed and `ModelParallelStrategy` write their shards past every CheckpointIO, into the place itself and over
what stands there. Here they write into a hidden folder beside it, and rank 0 puts that in place once every rank has
written. After each step all ranks tell each other how it went, and go on or raise together.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from enstack_lightning.checkpoint.manifest import digest_files, manifest_path
from enstack_lightning.checkpoint.manifest_file import ManifestEntry
from enstack_lightning.errors import CheckpointGuardError, CheckpointSaveError
from enstack_lightning.guard.flavor import is_a, lightning_base, rank_zero_warn
from enstack_lightning.guard.ranks import gathered
from enstack_lightning.guard.saving.atomic import digest_on_disk, local_path, staging, sync

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO

_RANK = re.compile(r"(?:__|_rank_)(\d+)_")
"""The rank in the name of a shard: `__3_0.distcp`, `zero_pp_rank_3_mp_rank_00_optim_states.pt`."""

T = TypeVar("T")


class ShardedSaves:
    """Stands in for `save_checkpoint` of a strategy that may write folders past its CheckpointIO.

    What a save promises is what `GuardedCheckpointIO` says of folders on disk, and:

    - All ranks must see one file system at the path, as they must to load. Where they do not, the strategy saves as it
      would without the guard, and a warning says so.
    - What goes wrong on one rank, or where rank 0 puts things in place, is the same `CheckpointSaveError` on every
      rank. A rank that dies or hangs inside the strategy's own exchange ends that exchange for the others as it would
      without the guard, by an error or by the process group's timeout.
    - DeepSpeed's checkpoints are of a form that the guard cannot verify: they are whole, on the disk and have a
      manifest, but retention knows none of them for good. Its engines that write in the background are not for it.

    Args:
        strategy: the strategy.
        guarded: its CheckpointIO, which judges and keeps what is saved.
    """

    def __init__(self, strategy: Any, guarded: GuardedCheckpointIO) -> None:
        self.strategy = strategy
        self.guarded = guarded

    def __call__(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        target = local_path(self.strategy.broadcast(filepath))
        if target is None or storage_options is not None:
            self._as_ever(checkpoint, filepath, storage_options)
            return
        together = _Together(self.strategy, lambda why: self.guarded.what_stands(target, why))
        if writes_folders(self.strategy):
            self._save(checkpoint, target, together)
        elif (target / "meta.pt").is_file():
            together(lambda: self._save_one_file(checkpoint, target))
        else:
            together(lambda: self._as_ever(checkpoint, target))

    def _as_ever(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        type(self.strategy).save_checkpoint(self.strategy, checkpoint, path, storage_options)

    def _save_one_file(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Saves one file over a folder, which the strategy would remove before it writes."""
        own = next(filter(None, (lightning_base(self.strategy, name) for name in _SWITCHED)))
        super(own, self.strategy).save_checkpoint(checkpoint, target)  # type: ignore[misc]

    def _save(self, checkpoint: dict[str, Any], target: Path, together: _Together) -> None:
        first = self.strategy.is_global_zero
        if first:
            self.guarded.remove_leftovers(target.parent)
        with contextlib.ExitStack() as on_rank_zero:
            staged = Path(together(lambda: str(on_rank_zero.enter_context(staging(target))) if first else "")[0])
            if not all(together(staged.parent.is_dir)):
                rank_zero_warn(
                    f"CheckpointGuard: not every rank sees {target.parent} as rank 0 does, so {target} is written in "
                    "place and without a manifest. Save to a file system that all ranks share"
                )
                manifest_path(target).unlink(missing_ok=True)
                self._as_ever(checkpoint, target)
                return
            together(lambda: self._as_ever(checkpoint, staged))
            entries = sorted(entry for of_rank in together(lambda: self._on_disk(staged)) for entry in of_rank)
            together(lambda: self._commit(checkpoint, staged, target, entries) if first else None)

    def _on_disk(self, staged: Path) -> tuple[ManifestEntry, ...]:
        """Brings this rank's files to the disk, and rank 0 the folder; returns their digests."""
        rank, ranks = self.strategy.global_rank, self.strategy.world_size
        entries = digest_files(staged, lambda name: _rank_of(name) % ranks == rank)
        for entry in entries:
            sync(staged / entry.name)
        if rank == 0:
            sync(staged)
        for entry in entries if self.guarded.verify_after_save else ():
            if digest_on_disk(staged / entry.name) != entry.blake3:
                raise CheckpointGuardError(f"{entry.name} read back from the disk differs from what was written")
        return entries

    def _commit(self, checkpoint: Mapping[str, Any], staged: Path, target: Path, entries: list[ManifestEntry]) -> None:
        if self.guarded.verify_after_save:
            self.guarded.verify_deeply(staged)
        written = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if not path.is_dir()}
        complete = written == {entry.name for entry in entries}  # file systems may show files late
        self.guarded.release(*self.guarded.commit(checkpoint, staged, target, entries if complete else None))


def guard_sharded_saves(strategy: Strategy, guarded: GuardedCheckpointIO) -> None:
    """Puts `ShardedSaves` before a strategy's `save_checkpoint`, if it is one that may write past its CheckpointIO."""
    if is_a(strategy, "DeepSpeedStrategy") or any(is_a(strategy, name) for name in _SWITCHED):
        strategy.save_checkpoint = ShardedSaves(strategy, guarded)  # type: ignore[method-assign]


_SWITCHED = {
    "FSDPStrategy": ("_state_dict_type", "sharded"),
    "ModelParallelStrategy": ("_save_distributed_checkpoint", True),
}
"""The strategies that write folders or files: what says which, and its value for folders."""


def writes_folders(strategy: Strategy) -> bool:
    """Whether each rank of a strategy writes shards of its own."""
    switches = (switch for name, switch in _SWITCHED.items() if is_a(strategy, name))
    return is_a(strategy, "DeepSpeedStrategy") or any(getattr(strategy, name, None) == on for name, on in switches)


class _Together:
    """Does a piece of work on every rank; all get every rank's result, or raise one error.

    Args:
        strategy: of the ranks.
        explain: the error's sentence, from what went wrong; called on rank 0.
    """

    def __init__(self, strategy: Any, explain: Callable[[str], str]) -> None:
        self.strategy = strategy
        self.explain = explain

    def __call__(self, work: Callable[[], T]) -> list[T]:
        result: Any = None
        failures: dict[int, tuple[str, int | None]] = {}
        cause: BaseException | None = None
        try:
            result = work()
        except BaseException as e:
            failures = _failures(e, self.strategy.global_rank)
            if not failures:
                raise
            cause = e
        try:
            of_all = gathered((result, failures))
        except RuntimeError as e:
            raise CheckpointSaveError(self.explain("another rank has ended or does not answer")) from cause or e
        failed = {rank: failure for _, of_rank in of_all for rank, failure in of_rank.items()}
        if failed:
            said = "; ".join(f"rank {rank}: {why}" for rank, (why, _) in sorted(failed.items()))
            number = next((number for _, (_, number) in sorted(failed.items()) if number is not None), None)
            message = ""
            if self.strategy.is_global_zero:
                message = str(cause) if isinstance(cause, CheckpointSaveError) else self.explain(said)
            raise CheckpointSaveError(self.strategy.broadcast(message), number) from cause
        return [result for result, _ in of_all]


def _failures(e: BaseException, rank: int) -> dict[int, tuple[str, int | None]]:
    """What went wrong, by rank; nothing for what is no failure but an end, as `KeyboardInterrupt`."""
    of_ranks = getattr(e, "failures", None)  # torch's CheckpointException is no Exception
    if isinstance(of_ranks, dict):
        return {number: _why(error) for number, (error, _) in of_ranks.items()}
    return {rank: _why(e)} if isinstance(e, Exception) else {}


def _why(e: BaseException) -> tuple[str, int | None]:
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror} (errno {e.errno})", e.errno
    return (str(e).strip().splitlines() or [type(e).__name__])[0], getattr(e, "errno", None)


def _rank_of(name: str) -> int:
    found = _RANK.search(name)
    return int(found[1]) if found else 0
