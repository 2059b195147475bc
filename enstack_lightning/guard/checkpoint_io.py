"""The CheckpointIO that the guard puts around a strategy's own: verified before a load, whole and on the disk after a
save, and never without a checkpoint that verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fsspec.implementations.local import LocalFileSystem

from enstack_lightning.checkpoint import Options, Severity
from enstack_lightning.checkpoint.facts import Format
from enstack_lightning.checkpoint.location import is_url
from enstack_lightning.checkpoint.manifest import ManifestEntry, manifest_path, write_manifest
from enstack_lightning.errors import CheckpointError, CheckpointGuardError, CheckpointSaveError
from enstack_lightning.guard.flavor import (
    CheckpointIO,
    is_a,
    is_just,
    is_model_checkpoint,
    rank_zero_info,
    rank_zero_warn,
)
from enstack_lightning.guard.live import versions
from enstack_lightning.guard.retention import BAD, Retention
from enstack_lightning.guard.saving import (
    DurableFile,
    digest_on_disk,
    put_in_place,
    remove_leftovers,
    staging,
    sync,
    sync_folder,
    write_durably,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

UNVERIFIED_SUFFIX = ".unverified"
"""What was saved, does not verify, and would have taken the place of the last checkpoint that did."""


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
      every CheckpointIO: such a save is as its strategy makes it, not atomic and without a manifest. What they remove
      goes through here, and so through the retention.

    A CheckpointIO that returns before it has written (other than an `AsyncCheckpointIO`) is refused with an error.

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
        self._cleaned: set[Path] = set()
        self._warned = False

    # Saving

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = local_path(path)
        try:
            if target is not None:
                self.remove_leftovers(target.parent)
                with self._explained(target):
                    place, level = self._save(checkpoint, target, storage_options)
            else:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
                place, level = str(path), self.retention.level(str(path))[0]
            self._release(place, level)
        finally:
            self.retention.settle(_name(path))

    def _save(self, checkpoint: dict[str, Any], target: Path, storage_options: Any) -> tuple[str, int]:
        """Saves; returns where the checkpoint stands now, and how good it is."""
        with staging(target) as staged:
            entry = self._write(checkpoint, staged, storage_options)
            if self.verify_after_save:
                self._compare(checkpoint, staged, entry)
            place, level = self._judged(staged, target)
            if staged.is_dir():
                _write_manifest(staged, checkpoint, None)
            with _without_manifest(place):
                put_in_place(staged, place)
            _sync_name(place)
        if place == target and not target.is_dir():
            _write_manifest(target, checkpoint, entry)
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
        if not os.path.lexists(staged):
            raise CheckpointGuardError(
                f"{type(self.checkpoint_io).__name__} wrote nothing at the path it was given. If it writes in the "
                "background, put it into Lightning's AsyncCheckpointIO instead; if it writes elsewhere, the guard "
                "cannot see to its files"
            )
        sync(staged)
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

    def _judged(self, staged: Path, target: Path) -> tuple[Path, int]:
        """Where to put a checkpoint, and how good it is: not over the last one that verified, unless it does too."""
        level, report = self.retention.level(str(staged))
        if level > BAD:
            return target, level
        said = "; ".join(f"{f.code} {f.message}" for f in report.of(Severity.ERROR))
        if os.path.lexists(target) and not target.is_symlink() and self.retention.is_last_good(str(target)):
            aside = target.with_name(target.name + UNVERIFIED_SUFFIX)
            rank_zero_warn(
                f"CheckpointGuard: {target} stays as it is, for it is the last checkpoint that verified. What was to "
                f"replace it does not, and stands at {aside}: {said}"
            )
            return aside, level
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"CheckpointGuard: {target} was saved, but a resume from it would be refused: {said}")
        return target, level

    @contextlib.contextmanager
    def _explained(self, target: Path) -> Iterator[None]:
        """Errors of the system and of the guard say that nothing was saved, and what still stands."""
        before = os.path.lexists(target)
        try:
            yield
        except CheckpointSaveError:
            raise
        except (OSError, CheckpointGuardError) as e:
            raise CheckpointSaveError(self._what_stands(target, before, e), getattr(e, "errno", None)) from e
        except Exception as e:
            e.add_note(self._what_stands(target, before, e))
            raise

    def _what_stands(self, target: Path, before: bool, e: Exception) -> str:
        why = f"{e.strerror} (errno {e.errno})" if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        stands = "The checkpoint that stood there before is untouched." if before else "Nothing stands at that path."
        good = self.retention.newest_good(besides=str(target))
        newest = f" The newest good checkpoint elsewhere is {good}." if good else ""
        return f"CheckpointGuard: {target} was not saved: {why.rstrip('.')}. {stands}{newest}"

    def remove_leftovers(self, folder: Path) -> None:
        """Removes what killed saves have left in a folder, once in a run."""
        if folder not in self._cleaned:
            self._cleaned.add(folder)
            for path in remove_leftovers(folder):
                rank_zero_info(f"CheckpointGuard: removed {path}, left by a save that was interrupted")

    # Removing

    def remove_checkpoint(self, path: str | Path) -> None:
        name = _name(path)
        if self.retention.may_remove(name):
            self._remove(name)
        else:
            rank_zero_info(
                f"CheckpointGuard: {name} is kept, for no other checkpoint has verified; it goes when one has"
            )

    def _remove(self, name: str) -> None:
        # The manifest goes first: beside a later checkpoint of the same name, an old one would be wrong.
        if not is_url(name):
            _remove_manifest(Path(name))
        self.checkpoint_io.remove_checkpoint(name)
        self.retention.removed(name)

    def _release(self, name: str, level: int) -> None:
        for kept in self.retention.saved(name, level):
            rank_zero_info(f"CheckpointGuard: {kept} goes now, for {name} has verified")
            try:
                self._remove(kept)
            except OSError as e:  # the save itself went well
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
        return inner
    guarded = GuardedCheckpointIO(inner, verify, options, verify_after_save)
    if outer is None:
        strategy.checkpoint_io = guarded
    else:
        outer._checkpoint_io = guarded  # its setter takes only the first
        _announce_queued(outermost, guarded.retention)
    return guarded


def remove_all_leftovers(trainer: Trainer, guarded: GuardedCheckpointIO) -> None:
    """Removes what killed saves have left in the folders that the Trainer's callbacks save to; on rank 0."""
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        folder = local_path(callback.dirpath) if is_model_checkpoint(callback) and callback.dirpath else None
        if folder is not None:
            guarded.remove_leftovers(folder)


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """The path on disk, also of a `file://` URL; None for other URLs."""
    name = os.fspath(path)
    if name.startswith(("file:", "local:")):
        return Path(LocalFileSystem._strip_protocol(name))
    return None if is_url(name) else Path(name)


def _name(path: str | os.PathLike[str]) -> str:
    return str(local_path(path) or path)


def _announce_queued(outer: Any, retention: Retention) -> None:
    """Lets `retention` know of each save that a wrapper is given, before it hands it on."""
    save = outer.save_checkpoint

    def announced(checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        retention.announce(_name(path))
        save(checkpoint, path, *args, **kwargs)

    outer.save_checkpoint = announced


def first_difference(saved: object, loaded: object, where: str = "checkpoint") -> str:
    """Where two trees of dicts, sequences and tensors first differ; empty where they are equal. NaN equals NaN."""
    if isinstance(saved, torch.Tensor):
        same = isinstance(loaded, torch.Tensor) and saved.shape == loaded.shape and saved.dtype == loaded.dtype
        return "" if same and _equal(saved, loaded) else where  # type: ignore[arg-type]
    if isinstance(saved, Mapping):
        if not isinstance(loaded, Mapping) or saved.keys() != loaded.keys():
            return where
        pairs = [(f"{where}[{key!r}]", value, loaded[key]) for key, value in saved.items()]
    elif isinstance(saved, Sequence) and not isinstance(saved, str | bytes):
        if not isinstance(loaded, Sequence) or len(saved) != len(loaded):
            return where
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(saved, loaded, strict=True))]
    elif isinstance(saved, float) and saved != saved:
        return "" if isinstance(loaded, float) and loaded != loaded else where
    elif isinstance(saved, int | float | str | bytes | bool | None):
        return "" if saved == loaded else where
    else:
        return "" if type(saved) is type(loaded) else where  # objects without an equality of their own
    return next(filter(None, (first_difference(a, b, place) for place, a, b in pairs)), "")


def _equal(saved: torch.Tensor, loaded: torch.Tensor) -> bool:
    a, b = saved.detach().cpu(), loaded.detach().cpu()
    if a.layout is not torch.strided or a.is_quantized:
        return bool((a.to_dense() == b.to_dense()).all()) if a.layout is not torch.strided else torch.equal(a, b)
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _write_manifest(target: Path, checkpoint: Mapping[str, Any], entry: ManifestEntry | None) -> None:
    """Writes the manifest of what stands at `target`; a checkpoint without one is none the worse, so failing warns."""
    try:
        write_manifest(
            target,
            format=Format.SHARDED if target.is_dir() else Format.LIGHTNING,
            global_step=_count(checkpoint.get("global_step")),
            epoch=_count(checkpoint.get("epoch")),
            fingerprints=_fingerprints(checkpoint),
            versions=versions(),
            known=entry,
            write=write_durably,
        )
    except CheckpointError as e:
        rank_zero_warn(f"CheckpointGuard: {target} is saved and on the disk, but has no manifest: {e}")


def _sync_name(target: Path) -> None:
    try:
        sync_folder(target.parent)
    except OSError as e:
        raise CheckpointSaveError(
            f"CheckpointGuard: {target} is saved, but the disk does not confirm its name: {e.strerror or e}. "
            "A power loss may bring the checkpoint before back",
            e.errno,
        ) from e


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _fingerprints(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the hyper-parameters as canonical JSON, and what a data module says of its own data."""
    found: dict[str, str] = {}
    options = {key: checkpoint[key] for key in ("hyper_parameters", "datamodule_hyper_parameters") if key in checkpoint}
    if options:
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            text = json.dumps(options, sort_keys=True, separators=(",", ":"), default=_named)
            found["config"] = hashlib.sha256(text.encode()).hexdigest()
    for state in checkpoint.values():
        if isinstance(state, Mapping) and isinstance(state.get("fingerprints"), Mapping):
            found |= {f"data/{split}": str(value) for split, value in state["fingerprints"].items()}
    return found


def _named(value: object) -> object:
    """Values that JSON has no form for: paths as text, mappings as objects, others by the name of their class."""
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, os.PathLike) else type(value).__qualname__


@contextlib.contextmanager
def _without_manifest(target: Path) -> Iterator[None]:
    """Takes the manifest away while its checkpoint is replaced: beside the new one, the old would be wrong."""
    manifest = manifest_path(target)
    if target.is_dir() or not manifest.is_file():
        yield
        return
    content = manifest.read_bytes()
    _remove_manifest(target)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            write_durably(manifest, content)
        raise


def _remove_manifest(target: Path) -> None:
    manifest = manifest_path(target)
    if manifest.is_file() and not target.is_dir():
        os.unlink(manifest)  # noqa: PTH108
        sync_folder(manifest.parent)
