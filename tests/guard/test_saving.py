"""Saves through the guard, in real Trainers: whole and on the disk or not at all, with a manifest, never the last good
one lost."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from builders import TinyModule, every_step, flip_bit, quiet_trainer
from file_calls import full_disk
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from enstack_lightning import CheckpointGuard, CheckpointGuardError, RecoveryCheckpoint
from enstack_lightning.checkpoint import Options, Verdict, find_last_good, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path, write_manifest
from enstack_lightning.errors import CheckpointSaveError
from enstack_lightning.guard.saving import atomic
from enstack_lightning.guard.saving.atomic import is_device, remove_leftovers, same_file, staging
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO, guard_checkpoint_io
from enstack_lightning.guard.saving.comparing import first_difference
from enstack_lightning.guard.saving.retention import RESUMABLE, USABLE, Level, Retention

DIGESTS = Options(digests=True)


def fit(folder: Path, *callbacks: Callback, guard: CheckpointGuard | None = None, **options: Any) -> Trainer:
    trainer = quiet_trainer(folder, guard or CheckpointGuard(), *callbacks, **options)
    trainer.fit(TinyModule())
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def with_manifests(*checkpoints: str) -> list[str]:
    return sorted([*checkpoints, *(f"{name}.manifest.json" for name in checkpoints)])


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        yield caplog


# The manifest


def test_every_checkpoint_has_a_manifest_that_agrees_to_the_last_bit(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_epochs=1)
    assert names(tmp_path) == with_manifests(*(f"step={n}.ckpt" for n in range(1, 6)))
    for path in tmp_path.glob("*.ckpt"):
        report = verify_checkpoint(path, DIGESTS)
        assert report.verdict is Verdict.PASS
        assert report.facts.manifest is not None
        assert report.facts.manifest.compared == "digests"
    content = json.loads(manifest_path(tmp_path / "step=3.ckpt").read_text())
    assert (content["global_step"], content["epoch"], content["format"]) == (3, 0, "lightning")
    assert content["versions"]["torch"] == torch.__version__


class Configured(TinyModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["SomeData"] = {"fingerprints": {"train": "abc"}}


def test_the_manifest_names_configuration_and_data(tmp_path: Path) -> None:
    found = []
    for n, rate in enumerate((0.1, 0.1, 0.2)):
        trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_steps=1)
        trainer.fit(Configured(rate))
        trainer.save_checkpoint(tmp_path / f"{n}.ckpt")
        found.append(json.loads(manifest_path(tmp_path / f"{n}.ckpt").read_text())["fingerprints"])
    assert [f["data/train"] for f in found] == ["abc"] * 3
    assert found[0] == found[1]
    assert found[1]["config"] != found[2]["config"]


def test_a_flipped_bit_in_a_tensor_is_found_before_loading_by_the_manifest(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_epochs=1)
    path = tmp_path / "step=3.ckpt"
    raw = path.read_bytes()
    flip_bit(path, raw.index(torch.load(path)["state_dict"]["layer.weight"].numpy().tobytes()))
    with pytest.raises(CheckpointGuardError, match=r"CK801 .*bytes have changed: BLAKE3"):
        quiet_trainer(tmp_path, CheckpointGuard()).fit(TinyModule(), ckpt_path=path)
    with pytest.raises(CheckpointGuardError, match=r"CRC-32"):
        quiet_trainer(tmp_path, CheckpointGuard(deep=True)).fit(TinyModule(), ckpt_path=path)
    quiet_trainer(tmp_path, CheckpointGuard(deep=False), max_epochs=1).fit(TinyModule(), ckpt_path=path)
    manifest_path(path).unlink()
    quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1).fit(TinyModule(), ckpt_path=path)


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(CheckpointGuardError, match="deep is 'manifests' and must be"):
        CheckpointGuard(deep="manifests")  # type: ignore[arg-type]


def test_top_k_removal_takes_the_manifests_too(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1))
    assert names(tmp_path) == with_manifests("step=15.ckpt")


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_as_copy_and_as_link(save_last: Any, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, save_last=save_last)
    fit(tmp_path, saves)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() == (save_last == "link")
    kept = with_manifests("step=14.ckpt") + (["last.ckpt"] if save_last == "link" else with_manifests("last.ckpt"))
    assert names(tmp_path) == sorted(kept)
    report = verify_checkpoint(last, DIGESTS)
    assert report.verdict is Verdict.PASS
    assert report.facts.manifest is not None
    quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=4).fit(TinyModule(), ckpt_path=last)


def test_a_link_in_place_of_an_older_copy_is_not_held_against_the_copys_manifest(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("new.ckpt")
    manifest = verify_checkpoint(tmp_path / "last.ckpt", DIGESTS).facts.manifest
    assert manifest is not None
    assert (manifest.compared, manifest.differences) == ("digests", ())


def test_a_name_that_leaves_no_room_for_a_manifests_is_saved_without_one(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1)
    trainer.fit(TinyModule())
    path = tmp_path / ("x" * 250 + ".ckpt")
    for _ in range(2):  # anew, and over itself
        with pytest.warns(UserWarning, match="is saved and on the disk, but has no manifest"):
            trainer.save_checkpoint(path)
    assert verify_checkpoint(path).verdict is Verdict.PASS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_versions_of_one_name(tmp_path: Path) -> None:
    for _ in range(3):
        fit(tmp_path, ModelCheckpoint(tmp_path, filename="a"), max_epochs=1)
    assert names(tmp_path) == with_manifests("a-v1.ckpt", "a-v2.ckpt", "a.ckpt")


def test_saving_again_under_one_name_writes_the_manifest_anew(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=1, enable_version_counter=False)
    fit(tmp_path, saves)
    assert names(tmp_path) == with_manifests("a.ckpt")
    assert verify_checkpoint(tmp_path / "a.ckpt", DIGESTS).verdict is Verdict.PASS


def test_the_recovery_checkpoint_goes_with_its_manifest(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    fit(tmp_path, last, RecoveryCheckpoint(str(tmp_path), every_n_train_steps=2))
    assert names(tmp_path) == with_manifests("last.ckpt")


def test_the_file_has_the_mode_that_the_user_gave_files(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1).save_checkpoint(tmp_path / "new" / "folder" / "c.ckpt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / "folder" / "c.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1).save_checkpoint(f"file://{tmp_path}/a.ckpt")
    assert names(tmp_path) == with_manifests("a.ckpt")


# Failing saves

FULL_DISK = """
import resource, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import torch
from builders import TinyModule, quiet_trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from enstack_lightning import CheckpointGuard
folder = Path(sys.argv[1])
plugins = [AsyncCheckpointIO()] if sys.argv[2] == "async" else []
trainer = quiet_trainer(folder, CheckpointGuard(), max_epochs=1, plugins=plugins)
trainer.fit(TinyModule())
trainer.save_checkpoint(folder / "c.ckpt")
trainer.strategy.checkpoint_io.teardown()
trainer.lightning_module.layer = torch.nn.Linear(300, 300)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    trainer.save_checkpoint(folder / "c.ckpt")
    trainer.strategy.checkpoint_io.teardown()
except Exception as e:
    print(type(e).__name__, isinstance(e, OSError), getattr(e, "errno", None), e)
"""


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(way: str, tmp_path: Path) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), way], capture_output=True, text=True, check=False, timeout=120
    )
    path = tmp_path / "c.ckpt"
    assert done.stdout.startswith("CheckpointSaveError True 27 "), done.stdout + done.stderr
    assert f"{path} was not saved: File too large (errno 27)" in done.stdout
    assert "The checkpoint that stood there before is untouched." in done.stdout
    assert names(tmp_path) == with_manifests("c.ckpt")
    assert verify_checkpoint(path, DIGESTS).verdict is Verdict.PASS


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users may write to, and reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


def as_nobody(work: Callable[[], str]) -> str:
    """What `work` returns in a process without root's rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


def test_permission_lost_leaves_the_previous_checkpoint_and_says_so(trained: Path, shared_folder: Path) -> None:
    path = shared_folder / "c.ckpt"
    io = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    checkpoint = torch.load(trained / "step=7.ckpt")
    io.save_checkpoint(checkpoint, path)
    shared_folder.chmod(0o555)

    def save() -> str:
        try:
            io.save_checkpoint(checkpoint, path)
        except CheckpointSaveError as e:
            return str(e)
        return "saved"

    answer = as_nobody(save)
    assert f"{path} was not saved: Permission denied" in answer
    assert "untouched" in answer
    assert verify_checkpoint(path, DIGESTS).verdict is Verdict.PASS


class Unpicklable(Callback):
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lock"] = threading.Lock()


def test_what_cannot_be_pickled_raises_as_without_the_guard_and_leaves_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), Unpicklable(), max_epochs=1)
    trainer.fit(TinyModule())
    with pytest.raises(TypeError, match="cannot pickle") as raised:
        trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert "c.ckpt was not saved" in raised.value.__notes__[0]
    assert names(tmp_path) == []


# Other ways of saving


class Folders(CheckpointIO):
    """Writes a folder, as strategies that shard do, and not through torch alone."""

    flip = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).mkdir()
        (Path(path) / "deeper").mkdir()
        (Path(path) / "deeper" / "note.txt").write_text("x")
        torch.save(checkpoint, Path(path) / "all.pt")
        if self.flip:
            weight = checkpoint["state_dict"]["layer.weight"].numpy().tobytes()
            flip_bit(Path(path) / "all.pt", (Path(path) / "all.pt").read_bytes().index(weight))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(Path(path) / "all.pt")
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.filterwarnings("ignore:CheckpointGuard. .* a resume from it would be refused")
def test_a_checkpoint_io_that_writes_folders(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    trainer = fit(tmp_path, max_epochs=1, plugins=[Folders()])
    for _ in range(2):
        trainer.save_checkpoint(tmp_path / "c")
        assert names(tmp_path) == ["c"]
        assert names(tmp_path / "c") == ["all.pt", "checkpoint.manifest.json", "deeper"]
        listed = [f["name"] for f in json.loads(manifest_path(tmp_path / "c").read_text())["files"]]
        assert listed == ["all.pt", "deeper/note.txt"]
        with (tmp_path / "c" / "all.pt").open("ab") as file:
            file.write(b"old")
    trainer.strategy.remove_checkpoint(tmp_path / "c")
    assert names(tmp_path) == []


def test_what_a_kill_left_between_two_renames_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    for folder in ("c", "new", "c.previous"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name.txt").write_text(folder)
    atomic.put_in_place(tmp_path / "new", tmp_path / "c")
    assert names(tmp_path) == ["c"]
    assert (tmp_path / "c" / "name.txt").read_text() == "new"


def test_a_folder_is_on_the_disk_before_it_stands_and_the_one_before_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def noted_fsync(fd: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink()}")
        fsync(fd)

    def noted_replace(one: Path, other: Path) -> None:
        done.append(f"move {one} {other}")
        replace(one, other)

    def noted_unlink(path: Path) -> None:
        done.append(f"unlink {path}")
        unlink(path)

    monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    trainer = fit(tmp_path, max_epochs=1, plugins=[Folders()])
    trainer.save_checkpoint(tmp_path / "c")
    for name, noted in (("fsync", noted_fsync), ("replace", noted_replace), ("unlink", noted_unlink)):
        monkeypatch.setattr(os, name, noted)
    trainer.save_checkpoint(tmp_path / "c")
    stands = next(n for n, call in enumerate(done) if call.endswith(f"/c {tmp_path / 'c'}"))
    staged = done[stands].split()[1]
    for name in ("", "/all.pt", "/deeper", "/deeper/note.txt"):
        assert f"sync {staged}{name}" in done[:stands]
    assert done[stands + 1] == f"sync {tmp_path}"
    assert done.index(f"unlink {tmp_path}/c.previous/all.pt") > stands + 1


def synchronise_no_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fsync = os.fsync

    def of_files_only(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_files_only)


def test_a_disk_that_does_not_confirm_the_name_is_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronise_no_folders(monkeypatch, errno.EIO)
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    with pytest.raises(CheckpointSaveError, match="is saved, but the disk does not confirm its name") as raised:
        saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "c.ckpt")
    assert raised.value.errno == errno.EIO
    assert (tmp_path / "c.ckpt").exists()


def test_a_write_that_fails_on_its_way_to_the_disk_ends_the_save(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once: to the thread that synchronises while torch makes the next bytes."""

    def fails_late(fd: int) -> None:
        time.sleep(0.3)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fails_late)
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    with pytest.raises(CheckpointSaveError, match="was not saved: Input/output error"):
        saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "c.ckpt")
    assert names(tmp_path) == []


def test_a_write_of_fewer_bytes_than_asked_is_gone_on_with(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, memoryview(data)[:100]))
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "c.ckpt")
    assert verify_checkpoint(tmp_path / "c.ckpt", DIGESTS).verdict is Verdict.PASS


def test_storage_options_are_refused_as_without_the_guard(trained: Path, tmp_path: Path) -> None:
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    with pytest.raises(TypeError, match="storage_options"):
        saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "c.ckpt", storage_options={})


def test_a_file_system_that_synchronises_no_folders_is_saved_to(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronise_no_folders(monkeypatch, errno.EINVAL)
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "new" / "c.ckpt")
    assert names(tmp_path / "new") == with_manifests("c.ckpt")
    assert write_manifest(tmp_path / "new" / "c.ckpt").is_file()


def test_a_folder_that_cannot_take_its_place_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two names."""
    old, new = tmp_path / "c", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name.txt").write_text(folder.name)
    replace = os.replace

    def fails_for_the_new(one: Path, other: Path) -> None:
        if one == new:
            raise OSError(errno.ESTALE, "Stale file handle")
        replace(one, other)

    monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    monkeypatch.setattr(os, "replace", fails_for_the_new)
    with pytest.raises(OSError, match="Stale"):
        atomic.put_in_place(new, old)
    assert names(tmp_path) == ["c", "new"]
    assert (old / "name.txt").read_text() == "c"


class Elsewhere(CheckpointIO):
    """Keeps checkpoints in memory, by their paths."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.kept[str(path)] = copy.deepcopy(checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = self.kept[str(path)]
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        del self.kept[str(path)]


def test_a_checkpoint_io_that_writes_elsewhere_is_left_to_it_and_that_is_said_once(
    tmp_path: Path, recwarn: Any
) -> None:
    saves = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=1)
    elsewhere = Elsewhere()
    fit(tmp_path, saves, plugins=[elsewhere], max_steps=4)
    (first, *others) = elsewhere.kept
    assert ".guard.tmp" in first
    assert others == [str(tmp_path / "c" / "step=4.ckpt")]
    assert names(tmp_path / "c") == []
    (said,) = [str(w.message) for w in recwarn if "wrote nothing" in str(w.message)]
    assert said.startswith("CheckpointGuard: Elsewhere wrote nothing at the path it was given")

    resumed = quiet_trainer(tmp_path, CheckpointGuard(), plugins=[elsewhere], max_steps=6)
    resumed.fit(TinyModule(), ckpt_path=others[0])
    assert resumed.global_step == 6


class OnceThenNever(TorchCheckpointIO):
    """Fails without a word at its second save."""

    saves = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1
        if self.saves == 1:
            super().save_checkpoint(*args, **kwargs)


def test_a_checkpoint_io_that_wrote_before_and_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1, plugins=[OnceThenNever()])
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(CheckpointSaveError, match="OnceThenNever wrote nothing at the path it was given, as it did be"):
        trainer.save_checkpoint(tmp_path / "d.ckpt")
    assert names(tmp_path) == ["c.ckpt", "c.ckpt.manifest.json"]


def test_an_async_checkpoint_io_commits_in_its_thread(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    for _ in range(2):
        trainer = fit(tmp_path, saves, plugins=[AsyncCheckpointIO()])
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
    # That of the first run may stand still when the second one names its last.
    assert names(tmp_path) in (with_manifests("step=15.ckpt"), with_manifests("step=15-v1.ckpt"))
    assert find_last_good(tmp_path, DIGESTS) is not None


def test_under_async_no_checkpoint_goes_before_its_successor_stands(tmp_path: Path) -> None:
    """`AsyncCheckpointIO` removes at once what a save still in its queue is to replace."""
    gate = threading.Event()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if checkpoint["global_step"] > 1:
                gate.wait(20)
            super().save_checkpoint(checkpoint, path, storage_options)

    seen: list[list[str]] = []

    class Looks(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append(sorted(p.name for p in tmp_path.glob("*.ckpt")))

        def on_train_end(self, *args: Any) -> None:
            gate.set()

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    first = tmp_path / "step=1.ckpt"

    class Waits(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            while trainer.global_step == 2 and not manifest_path(first).exists():
                threading.Event().wait(0.01)

    fit(tmp_path, saves, Looks(), Waits(), max_epochs=1, plugins=[AsyncCheckpointIO(Slow())])
    assert seen[2:] == [["step=1.ckpt"]] * 3
    assert names(tmp_path) == with_manifests("step=5.ckpt")


def test_a_url_is_left_to_its_store_and_retention_holds_there(tmp_path: Path) -> None:
    saves = ModelCheckpoint("memory://guard/run", filename="{step}", every_n_train_steps=5, save_top_k=1)
    fit(tmp_path, saves)
    store = fsspec.filesystem("memory")
    assert [Path(p).name for p in store.ls("/guard/run", detail=False)] == ["step=15.ckpt"]
    trainer = fit(tmp_path, max_epochs=1)
    trainer.strategy.remove_checkpoint("memory://guard/run/step=15.ckpt")
    assert store.exists("/guard/run/step=15.ckpt")
    trainer.strategy.save_checkpoint({"global_step": 99}, "memory://guard/run/bad.ckpt")
    assert store.exists("/guard/run/step=15.ckpt")
    store.rm("/guard/run/bad.ckpt")
    trainer.save_checkpoint("memory://guard/run/other.ckpt")
    assert [Path(p).name for p in store.ls("/guard/run", detail=False)] == ["other.ckpt"]
    store.rm("/guard", recursive=True)


# Reading back


class Corrupting(TorchCheckpointIO):
    """Turns a bit of a weight over on the way to the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        weight = checkpoint["state_dict"]["layer.weight"].numpy().tobytes()
        flip_bit(path, path.read_bytes().index(weight))


@pytest.mark.parametrize("plugin", [None, TorchCheckpointIO, Folders])
@pytest.mark.filterwarnings("ignore:CheckpointGuard. .* a resume from it would be refused")
def test_verify_after_save_lets_a_good_save_pass(plugin: Any, tmp_path: Path) -> None:
    guard = CheckpointGuard(verify_after_save=True, on_nonfinite="ignore")
    trainer = fit(tmp_path, guard=guard, max_epochs=1, plugins=[plugin()] if plugin else [])
    trainer.lightning_module.layer.weight.data[0, 0] = float("nan")
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").exists()


def test_verify_after_save_finds_what_a_checkpoint_io_wrote_otherwise(tmp_path: Path) -> None:
    trainer = fit(tmp_path, guard=CheckpointGuard(verify_after_save=True), max_epochs=1, plugins=[Corrupting()])
    with pytest.raises(CheckpointSaveError, match=r"differs from what was saved: checkpoint\['state_dict'\]\['layer"):
        trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert names(tmp_path) == []


def test_verify_after_save_finds_what_the_disk_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fit(tmp_path, guard=CheckpointGuard(verify_after_save=True), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    before = (tmp_path / "c.ckpt").read_bytes()
    finish = atomic.DurableFile.finish

    def flipping(file: atomic.DurableFile) -> Any:
        written = finish(file)
        flip_bit(file.path, 7_000)
        return written

    monkeypatch.setattr(atomic.DurableFile, "finish", flipping)
    with pytest.raises(CheckpointSaveError, match=r"c\.ckpt was not saved: what was read back differs .*untouched"):
        trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").read_bytes() == before
    assert names(tmp_path) == with_manifests("c.ckpt")


def test_what_is_damaged_on_the_disk_is_no_save(trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained / "step=1.ckpt", tmp_path))
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None, verify_after_save=True)
    saves.verify_deeply(path)
    weight = torch.load(path)["state_dict"]["layer.weight"].numpy().tobytes()
    flip_bit(path, path.read_bytes().index(weight))
    with pytest.raises(CheckpointGuardError, match=r"what was read back is damaged: CK1"):
        saves.verify_deeply(path)


def test_a_second_run_has_its_own_options(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    first, path = trainer.strategy.checkpoint_io, tmp_path / "a.ckpt"
    trainer.strategy.optimizers[0].param_groups[0]["lr"] = -1.0
    trainer.save_checkpoint(path)
    assert first.retention.level_now(str(path)).quality == USABLE
    left = left_behind(tmp_path)
    verified: list[str] = []
    second = guard_checkpoint_io(trainer.strategy, verified.append, Options(ignore=("CK407",)), verify_after_save=True)
    assert second is first
    assert second.verify_after_save
    assert second.retention.level_now(str(path)).quality == RESUMABLE
    second.load_checkpoint(path)
    assert verified == [str(path)]
    trainer.save_checkpoint(path)
    assert not left.exists()


def test_the_manifest_is_of_what_was_written_and_not_of_what_the_disk_made_of_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = atomic.DurableFile.finish

    def flipping(file: atomic.DurableFile) -> Any:
        written = finish(file)
        if file.path.name == "c.ckpt":
            flip_bit(file.path, file.path.read_bytes().index(weight))
        return written

    monkeypatch.setattr(atomic.DurableFile, "finish", flipping)
    saved = torch.load(trained / "step=1.ckpt")
    weight = saved["state_dict"]["layer.weight"].numpy().tobytes()
    GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None).save_checkpoint(saved, tmp_path / "c.ckpt")
    assert verify_checkpoint(tmp_path / "c.ckpt", DIGESTS).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        ({1}, "1"),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [1]),
        (float("nan"), 1.0),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        ("a", None),
    ],
)
def test_first_difference(saved: Any, loaded: Any) -> None:
    assert first_difference({"x": saved}, {"x": loaded}).startswith("checkpoint['x']")
    assert first_difference(saved, saved) == ""


# Retention


class Spoils(Callback):
    """Makes every checkpoint from a step on one that no resume may take."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step >= self.step:
            checkpoint |= {"state_dict": {}, "optimizer_states": []}


@pytest.mark.filterwarnings("ignore:CheckpointGuard. .* a resume from it would be refused")
def test_the_last_checkpoint_that_verified_is_not_removed(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    fit(tmp_path, saves, Spoils(4), max_epochs=2)
    assert names(tmp_path) == with_manifests("step=10.ckpt", "step=3.ckpt")
    assert "step=3.ckpt is kept, for no other checkpoint has verified" in said(logged)
    good = find_last_good(tmp_path)
    assert good is not None
    assert good.path.endswith("step=3.ckpt")


class SpoilsBetween(Spoils):
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step < 7:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


@pytest.mark.filterwarnings("ignore:CheckpointGuard. .* a resume from it would be refused")
def test_what_was_kept_goes_once_another_has_verified(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    fit(tmp_path, saves, SpoilsBetween(4), max_epochs=2)
    assert names(tmp_path) == with_manifests("step=10.ckpt")
    assert "step=3.ckpt goes now" in said(logged)


def test_a_save_stands_though_what_goes_for_it_cannot_be_removed(trained: Path, tmp_path: Path) -> None:
    class Refuses(TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            raise RuntimeError("the store refuses")

    saves = GuardedCheckpointIO(Refuses(), lambda path: None)
    saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "step=1.ckpt")
    saves.remove_checkpoint(tmp_path / "step=1.ckpt")
    with pytest.warns(UserWarning, match=r"step=1\.ckpt could not be removed: the store refuses"):
        saves.save_checkpoint(torch.load(trained / "step=2.ckpt"), tmp_path / "step=2.ckpt")


def test_the_last_good_one_is_not_overwritten_by_one_that_does_not_verify(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=1, enable_version_counter=False)
    with pytest.warns(UserWarning, match=r"a\.ckpt stays as it is, .* stands at .*a\.ckpt\.unverified"):
        fit(tmp_path, saves, Spoils(4), max_epochs=1)
    assert names(tmp_path) == sorted([*with_manifests("a.ckpt"), "a.ckpt.unverified"])
    good = find_last_good(tmp_path, DIGESTS)
    assert good is not None
    assert good.facts.progress.global_step == 3


def test_a_good_one_of_an_earlier_run_counts_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_epochs=1)
    trainer = fit(tmp_path, max_epochs=1)
    for step in (1, 2):
        trainer.strategy.remove_checkpoint(tmp_path / f"step={step}.ckpt")
    assert not (tmp_path / "step=2.ckpt").exists()
    for step in (3, 4):
        (tmp_path / f"step={step}.ckpt").write_bytes(b"damaged")
    trainer.strategy.remove_checkpoint(tmp_path / "step=5.ckpt")
    assert (tmp_path / "step=5.ckpt").exists()
    trainer.strategy.remove_checkpoint(tmp_path / "step=4.ckpt")
    assert not (tmp_path / "step=4.ckpt").exists()


def test_one_that_was_damaged_where_it_stands_is_judged_anew(tmp_path: Path) -> None:
    trainer = fit(tmp_path, every_step(tmp_path), max_epochs=1)
    for step in (1, 2, 3, 5):
        (tmp_path / f"step={step}.ckpt").unlink()
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    with (tmp_path / "later.ckpt").open("r+b") as file:  # the same file of the same size
        file.write(b"damaged")
    trainer.strategy.remove_checkpoint(tmp_path / "step=4.ckpt")
    assert (tmp_path / "step=4.ckpt").exists()


def test_two_checkpoints_do_not_go_for_each_others_sake(trained: Path, tmp_path: Path) -> None:
    """Both were asked to go, the second while its save was still queued, as in background saves of one checkpoint."""
    saves, retention = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None), Retention(Options())
    one, other = (str(tmp_path / f"step={n}.ckpt") for n in (1, 2))
    for n, path in enumerate((one, other), start=1):
        saves.save_checkpoint(torch.load(trained / f"step={n}.ckpt"), path)
    retention.saved(one, Level(RESUMABLE, 1))
    retention.announce(other)
    Path(other).rename(tmp_path / "not yet")
    assert not retention.may_remove(one)
    assert not retention.may_remove(other)
    (tmp_path / "not yet").rename(other)
    assert retention.saved(other, Level(RESUMABLE, 2)) == [one]
    retention.settle(other, is_saved=True)
    assert not retention.may_remove(other)  # `one` is about to go, in whatever thread


def test_one_that_could_not_be_removed_and_is_saved_anew_counts_again(trained: Path, tmp_path: Path) -> None:
    retention = Retention(Options())
    one, other = (str(shutil.copy(trained / f"step={n}.ckpt", tmp_path)) for n in (1, 2))
    for path in (one, other):
        retention.saved(path, Level(RESUMABLE, 2))
    assert retention.may_remove(one)
    assert not retention.may_remove(other)
    retention.saved(one, Level(RESUMABLE, 3))
    assert retention.may_remove(other)


def test_one_that_is_asked_to_go_while_its_save_ends_goes_with_the_next(trained: Path, tmp_path: Path) -> None:
    retention = Retention(Options())
    one, other = (str(shutil.copy(trained / f"step={n}.ckpt", tmp_path)) for n in (1, 2))
    retention.announce(one)
    retention.saved(one, Level(RESUMABLE, 1))
    assert not retention.may_remove(one)
    retention.settle(one, is_saved=True)
    assert retention.saved(other, Level(RESUMABLE, 2)) == [one]


def test_one_that_is_saved_anew_after_it_was_asked_to_go_stays(trained: Path, tmp_path: Path) -> None:
    retention = Retention(Options())
    one, other = (str(shutil.copy(trained / f"step={n}.ckpt", tmp_path)) for n in (1, 2))
    retention.announce(one)
    assert not retention.may_remove(one)
    retention.announce(one)
    retention.saved(one, Level(RESUMABLE, 1))
    retention.settle(one, is_saved=True)
    assert retention.saved(other, Level(RESUMABLE, 2)) == []


def weights_alone(trained: Path, folder: Path, step: int) -> str:
    checkpoint = torch.load(trained / f"step={step}.ckpt")
    for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        del checkpoint[name]
    torch.save(checkpoint, folder / f"weights={step}.ckpt")
    return str(folder / f"weights={step}.ckpt")


@pytest.mark.parametrize("ignored", [(), ("CK205",)])
def test_none_to_resume_from_goes_for_weights_alone(ignored: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    retention = Retention(Options(ignore=ignored))
    one, weights = str(shutil.copy(trained / "step=1.ckpt", tmp_path)), weights_alone(trained, tmp_path, 2)
    for path in (one, weights):
        retention.saved(path, retention.level(path)[0])
    assert not retention.may_remove(one)
    assert retention.may_remove(weights)


def test_one_of_an_earlier_run_goes_for_another_of_the_same_step(trained: Path, tmp_path: Path) -> None:
    one, last = (str(shutil.copy(trained / "step=1.ckpt", tmp_path / name)) for name in ("a.ckpt", "last.ckpt"))
    retention = Retention(Options())
    assert retention.may_remove(one)
    assert not retention.may_remove(last)


def test_what_was_judged_by_other_options_is_judged_anew(trained: Path, tmp_path: Path) -> None:
    checkpoint, path = torch.load(trained / "step=1.ckpt"), str(tmp_path / "a.ckpt")
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = -1.0
    torch.save(checkpoint, path)
    retention = Retention(Options())
    assert retention.level_now(path).quality == USABLE
    retention.judge_by(Options(ignore=("CK407",)))
    assert retention.level_now(path).quality == RESUMABLE


def test_one_that_was_asked_to_go_before_its_save_goes_with_it_where_another_stands(
    trained: Path, tmp_path: Path
) -> None:
    retention = Retention(Options())
    one, other = (str(shutil.copy(trained / f"step={n}.ckpt", tmp_path)) for n in (1, 2))
    retention.saved(other, Level(RESUMABLE, 2))
    retention.announce(one)
    assert not retention.may_remove(one)
    assert retention.saved(one, Level(RESUMABLE, 1)) == [one]


def test_one_that_stays_since_the_save_over_it_failed_was_not_asked_to_go(trained: Path, tmp_path: Path) -> None:
    saves, one = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None), tmp_path / "step=1.ckpt"
    saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), one)
    saves.retention.announce(str(one))
    saves.remove_checkpoint(one)
    with full_disk(100), pytest.raises(CheckpointSaveError):
        saves.save_checkpoint(torch.load(trained / "step=2.ckpt"), one)
    saves.save_checkpoint(torch.load(trained / "step=3.ckpt"), tmp_path / "step=3.ckpt")
    assert one.exists()
    saves.remove_checkpoint(one)  # none is queued any more
    assert not one.exists()


def test_the_good_one_elsewhere_is_not_the_one_at_the_place(trained: Path, tmp_path: Path) -> None:
    retention = Retention(Options())
    one = str(shutil.copy(trained / "step=1.ckpt", tmp_path))
    retention.saved(one, Level(RESUMABLE, 1))
    assert retention.newest_good() == one
    assert retention.newest_good(besides=one) == ""


def test_the_last_one_of_weights_alone_is_not_removed(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.strategy.remove_checkpoint(tmp_path / "weights.ckpt")
    assert names(tmp_path) == with_manifests("weights.ckpt")
    assert "is kept, for no other checkpoint has verified" in said(logged)


def test_the_newest_stays_where_an_older_one_stands_until_its_successor_does(tmp_path: Path) -> None:
    """A resumed run leaves the one that it came from, and background saves ask for the one before to go early."""
    fit(tmp_path, every_step(tmp_path), max_epochs=1)
    trainer = fit(tmp_path, max_epochs=1)
    for step in (5, 3):
        trainer.strategy.remove_checkpoint(tmp_path / f"step={step}.ckpt")
    assert names(tmp_path) == with_manifests(*(f"step={n}.ckpt" for n in (1, 2, 4, 5)))
    trainer.save_checkpoint(tmp_path / "successor.ckpt")
    assert names(tmp_path) == with_manifests(*(f"step={n}.ckpt" for n in (1, 2, 4)), "successor.ckpt")


def test_what_no_search_finds_goes_when_asked_and_nothing_goes_for_its_sake(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    for name in ("a.ckpt", ".b.ckpt"):
        trainer.save_checkpoint(tmp_path / name)
    trainer.strategy.remove_checkpoint(tmp_path / "a.ckpt")
    trainer.strategy.remove_checkpoint(tmp_path / ".b.ckpt")
    assert names(tmp_path) == with_manifests("a.ckpt")
    alone = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    alone.save_checkpoint(torch.load(tmp_path / "a.ckpt"), tmp_path / "alone" / ".c.ckpt")
    alone.remove_checkpoint(tmp_path / "alone" / ".c.ckpt")
    assert names(tmp_path / "alone") == []


def test_the_good_one_is_named_though_others_were_deleted(trained: Path, tmp_path: Path) -> None:
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    for n in (1, 2, 3):
        saves.save_checkpoint(torch.load(trained / f"step={n}.ckpt"), tmp_path / f"step={n}.ckpt")
    (tmp_path / "step=3.ckpt").unlink()
    with full_disk(100), pytest.raises(CheckpointSaveError, match=r"No space left .*elsewhere is .*step=2\.ckpt\.$"):
        saves.save_checkpoint(torch.load(trained / "step=4.ckpt"), tmp_path / "step=4.ckpt")


def test_a_link_to_the_checkpoint_is_no_second_one(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    trainer.strategy.remove_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists()
    trainer.strategy.remove_checkpoint(tmp_path / "last.ckpt")
    assert names(tmp_path) == with_manifests("a.ckpt")
    other_way = tmp_path.with_name(f"{tmp_path.name} by a link")
    other_way.symlink_to(tmp_path)
    trainer.strategy.remove_checkpoint(other_way / "a.ckpt")
    assert names(tmp_path) == with_manifests("a.ckpt")


# Leftovers


def left_behind(folder: Path, kill: bool = True) -> Path:
    """A hidden folder as a killed save leaves it."""
    child = os.fork()
    if child == 0:
        with staging(folder / "c.ckpt") as staged:
            staged.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = folder.glob(".c.ckpt.*.guard.tmp")
    return left


def test_a_leftover_is_no_checkpoint_and_goes_at_the_next_start(tmp_path: Path) -> None:
    left = left_behind(tmp_path)
    assert find_last_good(tmp_path) is None
    bystander = tmp_path / ".c.ckpt.tmp"
    bystander.touch()
    fit(tmp_path, ModelCheckpoint(tmp_path, every_n_epochs=100), max_epochs=1)
    assert not left.exists()
    assert bystander.exists()


def test_nothing_that_another_process_writes_is_removed(tmp_path: Path) -> None:
    left_behind(tmp_path)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with staging(tmp_path / "c.ckpt") as staged:
            staged.write_bytes(b"in use")
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert remove_leftovers(tmp_path) == []
    assert len(list(tmp_path.glob(".*.guard.tmp"))) == 2
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    assert len(remove_leftovers(tmp_path)) == 1
    assert names(tmp_path) == []


def test_a_child_that_was_forked_in_a_save_keeps_nothing_from_being_removed(tmp_path: Path) -> None:
    with staging(tmp_path / "c.ckpt"):
        left = next(tmp_path.iterdir())
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        left.mkdir()
        assert remove_leftovers(tmp_path) == [left]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_killed_saves_left_goes_at_the_first_save_into_a_folder(trained: Path, tmp_path: Path) -> None:
    with staging(tmp_path / "c.ckpt"):
        left = next(tmp_path.iterdir())
    left.mkdir()
    saves = GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None)
    saves.save_checkpoint(torch.load(trained / "step=1.ckpt"), tmp_path / "other.ckpt")
    assert names(tmp_path) == with_manifests("other.ckpt")


def test_what_changes_while_its_age_is_asked_is_new(tmp_path: Path) -> None:
    assert atomic._age_seconds(tmp_path / "gone") == 0.0


def test_a_link_is_no_leftover(tmp_path: Path) -> None:
    left = left_behind(tmp_path)
    left.rename(tmp_path / "kept")
    left.symlink_to("kept")
    assert remove_leftovers(tmp_path) == []
    assert names(tmp_path) == [left.name, "kept"]


def test_a_folder_whose_file_was_written_anew_is_another(tmp_path: Path) -> None:
    file = tmp_path / "a.distcp"
    file.write_bytes(b"1")
    before = same_file(tmp_path)
    assert same_file(tmp_path) == before
    os.utime(file, ns=(0, 0))
    assert same_file(tmp_path) != before


def test_what_another_host_has_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_behind(tmp_path)
    monkeypatch.setattr(atomic, "_HOST", "00000000")
    assert remove_leftovers(tmp_path) == []
    old = left.stat().st_mtime - atomic.LEFTOVER_SECONDS - 10
    for path in (left / "c.ckpt", left):
        os.utime(path, (old, old))
    assert remove_leftovers(tmp_path) == [left]


def test_a_long_name_can_be_saved(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 230 + ".ckpt")
    GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None).save_checkpoint(
        torch.load(trained / "step=7.ckpt"), path
    )
    assert verify_checkpoint(path).verdict is Verdict.PASS


def test_a_device_is_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_device(Path("/dev/null"))
    assert is_device(tmp_path / "pipe")
    assert not is_device(tmp_path)
    assert not is_device(tmp_path / "absent")
