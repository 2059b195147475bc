"""The CheckpointIO that the guard puts around a strategy's own: verified before a load, whole and on the disk after a
save, and never without a checkpoint that verified.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.checkpoint import Options, Severity
from enstack_lightning.checkpoint.durable import sync_folder
from enstack_lightning.checkpoint.facts import Format
from enstack_lightning.checkpoint.location import is_url
from enstack_lightning.checkpoint.manifest_file import ManifestEntry
from enstack_lightning.checkpoint.search import NONFINITE_SUFFIX, UNVERIFIED_SUFFIX
from enstack_lightning.errors import CheckpointGuardError, CheckpointSaveError
from enstack_lightning.guard.flavor import (
    CheckpointIO,
    checkpoint_dirpaths,
    is_a,
    is_just,
    rank_zero_info,
    rank_zero_warn,
)
from enstack_lightning.guard.saving.atomic import (
    DurableFile,
    digest_on_disk,
    is_device,
    local_path,
    put_in_place,
    remove_leftovers,
    staging,
    sync,
)
from enstack_lightning.guard.saving.background import BackgroundSaves, Snapshot, SnapshotMemory
from enstack_lightning.guard.saving.comparing import first_difference
from enstack_lightning.guard.saving.manifest import remove_manifest, without_manifest, write_save_manifest
from enstack_lightning.guard.saving.retention import BAD, Level, Retention
from enstack_lightning.guard.saving.sharded import guard_sharded_saves

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

_HANDED_OVER = ".temp.ckpt"
"""The weights that processes which Lightning has spawned give back to the first one, which removes this file alone."""
PlaceFor = Callable[[Mapping[str, Any], str | Path], str | Path]
"""Where to save a checkpoint that was to stand at a path."""


class GuardedCheckpointIO(CheckpointIO):
    """Saves, loads and removes through another CheckpointIO, and sees to it that checkpoints are whole.

    What a save promises depends on where it goes:

    - A path on disk, one file or a folder: `checkpoint_io` writes into a hidden folder beside the path, everything is
      brought to the disk (fsync of files and folders) and moved to its place in one step, then its manifest is written.
      After a kill, a full disk or a power loss at any moment the path holds the checkpoint before or the new one.
      Lightning's own `TorchCheckpointIO` is not asked: torch writes the file directly, where Lightning would hold it
      in memory and copy it through the system's temporary folder.
    - Inside an `AsyncCheckpointIO`: the same, in its thread; an error is raised where it raises errors, at the next
      save or at the end.
    - A URL that fsspec knows: what its store and `checkpoint_io` promise (objects of S3 and the like appear whole or
      not at all). Nothing is synchronised here, there is no manifest, and no read-back. Retention holds there too.
    - Strategies that shard (FSDP, DeepSpeed, `ModelParallelStrategy` with `save_distributed_checkpoint`) write past
      every CheckpointIO; `ShardedSaves` lets them write beside the place, and says what they promise.

    A CheckpointIO that writes nothing at the first path it is given writes elsewhere, or later: that is said once, and
    from then on it is given the paths that were asked for and promises what it promises without the guard. If it has
    written before, a save that leaves nothing is an error.

    Args:
        checkpoint_io: the CheckpointIO that reads and writes.
        verify: called with each path that is about to be loaded; raises to refuse it.
        options: how a checkpoint is judged after it is saved.
        verify_after_save: read each checkpoint back from the disk and compare it with what was saved.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO,
        verify: Callable[[str], None],
        options: Options | None = None,
        verify_after_save: bool = False,
    ) -> None:
        self.checkpoint_io = checkpoint_io
        self.verify = verify
        self.verify_after_save = verify_after_save
        self.retention = Retention(options or Options())
        self.place_for: PlaceFor = _as_asked
        self.resumed_from: str | None = None
        self._cleaned: set[Path] = set()
        self._warned = False
        self._writes_where_told: bool | None = None
        self.background: BackgroundSaves | None = None

    # Saving

    def save_checkpoint(
        self, checkpoint: dict[str, Any] | Snapshot, path: str | Path, storage_options: Any = None
    ) -> None:
        if isinstance(checkpoint, Snapshot):
            try:
                self._save_and_release(checkpoint.checkpoint, path, storage_options)
            finally:
                checkpoint.release()
        else:
            self._save_and_release(checkpoint, path, storage_options)

    def _save_and_release(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        asked, is_saved = path, False
        try:
            path = self.place_for(checkpoint, path)
            target = local_path(path)
            saved = None
            if target is not None and not is_device(target) and self._writes_where_told is not False:
                self.remove_leftovers(target.parent)
                with self._explained(target):
                    saved = self._save(checkpoint, target, storage_options)
            if saved is None:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
                saved = str(path), self.retention.level(str(path))[0]
            self.release(*saved)
            is_saved = True
        finally:
            self.retention.settle(_name(asked), is_saved)

    def _save(self, checkpoint: dict[str, Any], target: Path, storage_options: Any) -> tuple[str, Level] | None:
        """Saves; returns where the checkpoint stands now, and how good it is. None: it is not written where told."""
        with staging(target) as staged:
            entry = self._write(checkpoint, staged, storage_options)
            if self._writes_where_told is False:
                return None
            if self.verify_after_save:
                self._compare(checkpoint, staged, entry)
            return self.commit(checkpoint, staged, target, entry and (entry,))

    def commit(
        self, checkpoint: Mapping[str, Any], staged: Path, target: Path, entries: Sequence[ManifestEntry] | None
    ) -> tuple[str, Level]:
        """Puts what is written and on the disk in its place, and its manifest beside it.

        Returns:
            Where the checkpoint stands now, which is not `target` if it would have replaced the last good one, and how
            good it is.
        """
        place, level = self._judged(staged, target)
        is_folder = staged.is_dir()
        if is_folder:
            write_save_manifest(staged, checkpoint, entries)
        with without_manifest(place):
            put_in_place(staged, place)
        _sync_name(place)
        if place == target and not is_folder and target.name != _HANDED_OVER:
            write_save_manifest(target, checkpoint, entries)
        return str(place), level

    def _write(self, checkpoint: dict[str, Any], staged: Path, storage_options: Any) -> ManifestEntry | None:
        """Writes to `staged`, down to the disk; what was written where that is known, which is for torch's own file."""
        if is_just(self.checkpoint_io, "TorchCheckpointIO") and storage_options is None:
            with DurableFile(staged) as file:
                try:
                    torch.save(checkpoint, file)  # type: ignore[arg-type]
                except Exception as e:
                    if file.error is not None and e is not file.error:
                        raise file.error from e
                    raise
                return file.finish()
        self.checkpoint_io.save_checkpoint(checkpoint, staged, storage_options=storage_options)
        if os.path.lexists(staged):
            self._writes_where_told = True
            sync(staged)
            return None
        nothing = f"{type(self.checkpoint_io).__name__} wrote nothing at the path it was given"
        if self._writes_where_told:
            raise CheckpointGuardError(f"{nothing}, as it did before")
        self._writes_where_told = False
        rank_zero_warn(
            f"CheckpointGuard: {nothing}. From now on it saves as it does without the guard: its checkpoints are not "
            "moved into place in one step, and have no manifest. If it writes in the background, put it into "
            "Lightning's AsyncCheckpointIO instead"
        )
        return None

    def _compare(self, checkpoint: dict[str, Any], staged: Path, entry: ManifestEntry | None) -> None:
        """Reads back what was written.

        Raises:
            CheckpointGuardError: it differs.
        """
        if entry is not None:
            actual = digest_on_disk(staged)
            if actual != entry.blake3:
                raise CheckpointGuardError(
                    f"what was read back differs from what was written: BLAKE3 {actual[:16]}... instead of "
                    f"{entry.blake3[:16]}..., {entry.size:,} bytes. Look at the disk"
                )
            return
        difference = first_difference(checkpoint, self.checkpoint_io.load_checkpoint(staged))
        if difference:
            raise CheckpointGuardError(f"what was read back differs from what was saved: {difference}")

    def verify_deeply(self, staged: Path) -> None:
        """Reads every byte of a checkpoint from the disk, and holds it against the checksums that its writer took.

        Raises:
            CheckpointGuardError: it is damaged.
        """
        report = self.retention.deep_report(str(staged))
        damage = [f for f in report.of(Severity.ERROR) if f.code.startswith("CK1")]
        if damage:
            said = "; ".join(f"{f.code} {f.message}" for f in damage)
            raise CheckpointGuardError(f"what was read back is damaged: {said}")

    def _judged(self, staged: Path, target: Path) -> tuple[Path, Level]:
        """Where to put a checkpoint, and how good it is: not over the last one that verified, unless it does too."""
        level, report = self.retention.level(str(staged))
        if level.quality > BAD or target.name.endswith(NONFINITE_SUFFIX):
            return target, level
        said = "; ".join(f"{f.code} {f.message}" for f in report.of(Severity.ERROR))
        if self.retention.is_last_good(str(target)):
            aside = target.with_name(target.name + UNVERIFIED_SUFFIX)
            rank_zero_warn(
                f"CheckpointGuard: {target} stays as it is, for it is the last checkpoint that verified. What was to "
                f"replace it does not, and stands at {aside}: {said}"
            )
            return aside, level
        if not self._warned and report.facts.format is not Format.UNKNOWN:  # that form, only what loads it may know
            self._warned = True
            rank_zero_warn(f"CheckpointGuard: {target} was saved, but a resume from it would be refused: {said}")
        return target, level

    @contextlib.contextmanager
    def _explained(self, target: Path) -> Iterator[None]:
        """Errors of the system and of the guard say that nothing was saved, and what still stands."""
        try:
            yield
        except CheckpointSaveError:
            raise
        except (OSError, CheckpointGuardError) as e:
            reason = f"{e.strerror} (errno {e.errno})" if isinstance(e, OSError) and e.strerror else str(e)
            raise CheckpointSaveError(
                self.what_stands(target, reason or type(e).__name__), getattr(e, "errno", None)
            ) from e
        except Exception as e:
            e.add_note(self.what_stands(target, str(e) or type(e).__name__))
            raise

    def what_stands(self, target: Path, reason: str) -> str:
        """The sentence on a save that has failed: why, what stands at its place, and which checkpoint is good."""
        before = os.path.lexists(target)
        stands = "The checkpoint that stood there before is untouched." if before else "Nothing stands at that path."
        good = self.retention.newest_good(besides=str(target))
        newest = f" The newest good checkpoint elsewhere is {good}." if good else ""
        return f"CheckpointGuard: {target} was not saved: {reason.rstrip('.')}. {stands}{newest}"

    def remove_leftovers(self, folder: Path) -> None:
        """Removes what killed saves have left in a folder, once in a run."""
        if folder not in self._cleaned:
            self._cleaned.add(folder)
            for path in remove_leftovers(folder):
                rank_zero_info(f"CheckpointGuard: removed {path}, left by a save that was interrupted")

    # Removing

    def remove_checkpoint(self, path: str | Path) -> None:
        name = _name(path)
        if name == self.resumed_from and is_url(name):
            # ModelCheckpoint keeps it where it is local: https://github.com/Lightning-AI/pytorch-lightning/issues/21813
            rank_zero_info(f"CheckpointGuard: {name} is kept, for this run was resumed from it")
        elif self.retention.may_remove(name):
            self._remove(name)
        else:
            rank_zero_info(
                f"CheckpointGuard: {name} is kept, for no other checkpoint has verified; it goes when one has"
            )

    def _remove(self, name: str) -> None:
        # The manifest goes first: beside a later checkpoint of the same name, an old one would be wrong.
        if not is_url(name):
            remove_manifest(Path(name))
        if self._is_own_folder(name):
            with staging(Path(name)) as hidden:  # what is half removed must not stand under its name
                os.replace(name, hidden)  # noqa: PTH105
        else:
            self.checkpoint_io.remove_checkpoint(name)
        self.retention.removed(name)

    def _is_own_folder(self, name: str) -> bool:
        path = Path(name)
        plain = is_just(self.checkpoint_io, "TorchCheckpointIO") and not is_url(name)
        return plain and path.is_dir() and not path.is_symlink()

    def release(self, name: str, level: Level) -> None:
        for kept in self.retention.saved(name, level):
            rank_zero_info(f"CheckpointGuard: {kept} goes now, for {name} has verified")
            try:
                self._remove(kept)
            except Exception as e:  # whatever the client of a store raises: the save itself went well
                rank_zero_warn(f"CheckpointGuard: {kept} could not be removed: {e}")

    # Everything else

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.verify(str(path))
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        return loaded

    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def guard_checkpoint_io(
    strategy: Strategy, verify: Callable[[str], None], options: Options, verify_after_save: bool = False
) -> GuardedCheckpointIO:
    """Puts a `GuardedCheckpointIO` around a strategy's CheckpointIO; one that is there already is set anew.

    Inside wrappers as `AsyncCheckpointIO`, it goes around what they wrap: only there a save is over when it returns.
    """
    outer: Any = None
    outermost: Any = strategy.checkpoint_io
    inner: Any = outermost
    while is_a(inner, "_WrappingCheckpointIO") and inner.checkpoint_io is not None:
        outer, inner = inner, inner.checkpoint_io
    if isinstance(inner, GuardedCheckpointIO):
        inner.verify, inner.verify_after_save = verify, verify_after_save
        inner._cleaned.clear()
        inner.retention.judge_by(options)
        if inner.background is not None:
            inner.background.install()
        guard_sharded_saves(strategy, inner)
        return inner
    guarded = GuardedCheckpointIO(inner, verify, options, verify_after_save)
    if outer is None:
        strategy.checkpoint_io = guarded
    else:
        outer._checkpoint_io = guarded  # its setter takes only the first
        # Others may look into the checkpoint, or keep it.
        alone = outer is outermost and is_just(outer, "AsyncCheckpointIO") and is_just(inner, "TorchCheckpointIO")
        guarded.background = BackgroundSaves(
            outermost, lambda path: guarded.retention.announce(_name(path)), SnapshotMemory() if alone else None
        )
        guarded.background.install()
    guard_sharded_saves(strategy, guarded)
    return guarded


def remove_all_leftovers(trainer: Trainer, guarded: GuardedCheckpointIO) -> None:
    """Removes what killed saves have left in the folders that the Trainer's callbacks save to; on rank 0."""
    for dirpath in checkpoint_dirpaths(trainer) if trainer.is_global_zero else ():
        if (folder := local_path(dirpath)) is not None:
            guarded.remove_leftovers(folder)


def _as_asked(checkpoint: Mapping[str, Any], path: str | Path) -> str | Path:
    return path


def _name(path: str | os.PathLike[str]) -> str:
    return str(local_path(path) or path)


def _sync_name(target: Path) -> None:
    try:
        sync_folder(target.parent)
    except OSError as e:
        raise CheckpointSaveError(
            f"CheckpointGuard: {target} is saved, but the disk does not confirm its name: {e.strerror or e}. "
            "A power loss may bring the checkpoint before back",
            e.errno,
        ) from e
