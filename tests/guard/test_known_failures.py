"""Ways in which a resume is known to go wrong with Lightning that no other test of the guard reproduces."""

from __future__ import annotations

import enum
import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from builders import TinyModule, edited, every_epoch, every_step, flip_in_pickle, quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import Verdict, verify_checkpoint


def resume(path: Path | str | None, folder: Path, *callbacks: Callback, **options: Any) -> CheckpointGuard:
    guard = CheckpointGuard()
    module = options.pop("module", None) or TinyModule()
    quiet_trainer(folder, guard, *callbacks, **options).fit(module, ckpt_path=path)
    return guard


# Files


@pytest.mark.parametrize(
    ("content", "called"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "it is an HTML page"),
        (b"abc", "it is a text file that begins 'abc'"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(content: bytes, called: str, tmp_path: Path) -> None:
    """`torch.load` advises to load such a file with `weights_only=False`."""
    (tmp_path / "c.ckpt").write_bytes(content)
    with pytest.raises(CheckpointGuardError, match=called) as refused:
        resume(tmp_path / "c.ckpt", tmp_path)
    assert "weights_only" not in str(refused.value)


def test_a_missing_record_is_named(trained: Path, tmp_path: Path) -> None:
    """Every checksum of such a file is right."""
    with zipfile.ZipFile(trained / "step=7.ckpt") as whole, zipfile.ZipFile(tmp_path / "c.ckpt", "w") as lacking:
        for name in whole.namelist():
            if not name.endswith("/data/0"):
                lacking.writestr(name, whole.read(name))
    with pytest.raises(CheckpointGuardError, match=r"c\.ckpt must not be used: CK10\d .*data/0"):
        resume(tmp_path / "c.ckpt", tmp_path)


def test_a_bare_state_dict_is_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Lightning raises `KeyError: 'pytorch-lightning_version'`."""
    torch.save(TinyModule().state_dict(), tmp_path / "c.ckpt")
    with pytest.raises(CheckpointGuardError, match="CK205 the checkpoint holds weights only"):
        resume(tmp_path / "c.ckpt", tmp_path)


def test_a_remote_file_that_was_resumed_from_stays(tmp_path: Path) -> None:
    """Lightning keeps a local file that a run was resumed from, and removes a remote one:
    https://github.com/Lightning-AI/pytorch-lightning/issues/21813."""
    saves = [ModelCheckpoint("memory://resumed", filename="{step}", every_n_train_steps=5) for _ in range(2)]
    resume(None, tmp_path, saves[0], max_epochs=1)
    resume("memory://resumed/step=5.ckpt", tmp_path, saves[1])
    paths = fsspec.filesystem("memory").ls("/resumed", detail=False)
    assert {Path(path).name for path in paths if path.endswith(".ckpt")} == {"step=5.ckpt", "step=15.ckpt"}


# Finding the file


def test_a_last_that_is_not_the_last_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`ckpt_path="last"` takes any file that begins so, if it is the youngest."""
    resume(None, tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "lastweek_backup.ckpt")
    with caplog.at_level(logging.INFO):
        guard = resume("last", tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    assert guard.report is not None
    assert guard.report.path == str(tmp_path / "lastweek_backup.ckpt")
    assert "lastweek_backup.ckpt" in caplog.text


def test_a_last_that_leads_nowhere_is_said(trained: Path, tmp_path: Path) -> None:
    """Lightning warns of "no last checkpoint" and trains from scratch."""
    shutil.copy(trained / "step=7.ckpt", tmp_path)
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    with pytest.warns(UserWarning, match=r"training starts anew, and .*last\.ckpt is a link to .*gone\.ckpt") as said:
        resume("last", tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    assert any("The newest good checkpoint there is" in str(w.message) for w in said)
    assert any("step=7.ckpt" in str(w.message) for w in said)


def test_a_start_beside_an_earlier_run_is_said(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(trained / "step=7.ckpt", tmp_path)
    with caplog.at_level(logging.INFO):
        resume(None, tmp_path, ModelCheckpoint(tmp_path), max_epochs=1)
    assert f"{tmp_path} holds checkpoints of an earlier run, the newest good one {tmp_path}/step=7.ckpt" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resume(tmp_path / "step=7.ckpt", tmp_path, ModelCheckpoint(tmp_path))
    assert "earlier run" not in caplog.text


def test_a_resume_that_nobody_asked_for_is_verified_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`fit(ckpt_path=None)` resumes where an `OnExceptionCheckpoint` has left its file."""
    with pytest.raises(RuntimeError, match="on purpose"):
        resume(None, tmp_path, OnExceptionCheckpoint(tmp_path), Fails(7), enable_checkpointing=True)
    shutil.copy(tmp_path / "on_exception.ckpt", tmp_path / "kept")
    with caplog.at_level(logging.INFO):
        guard = resume(None, tmp_path, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    assert guard.report is not None
    assert "resume from" in caplog.text
    assert guard.report.verdict is Verdict.PASS
    shutil.copy(tmp_path / "kept", tmp_path / "on_exception.ckpt")
    flip_in_pickle(tmp_path / "on_exception.ckpt")
    with pytest.raises(CheckpointGuardError, match=r"on_exception\.ckpt must not be used: CK105"):
        resume(None, tmp_path, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)


class Fails(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("on purpose")


# Unpickling


class Color(enum.Enum):
    RED = 1


class WithOption(TinyModule):
    def __init__(self, option: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    "option", [Path("x"), Color.RED, torch.nn.ReLU(), len], ids=["path", "enum", "module", "function"]
)
def test_a_hyper_parameter_that_no_resume_could_load_is_said_at_the_save(option: Any, tmp_path: Path) -> None:
    """torch 2.6 and newer refuse such a file with `Unsupported global`, days later."""
    with pytest.warns(UserWarning, match=r"epoch=0\.ckpt was saved, but a resume from it would be refused: CK701"):
        resume(None, tmp_path, every_epoch(tmp_path), max_epochs=1, module=WithOption(option))
    with pytest.raises(CheckpointGuardError, match="CK701"):
        resume(tmp_path / "epoch=0.ckpt", tmp_path, module=WithOption(option))


# State and progress


class StepsAndFails(TinyModule):
    """Fails between the optimizer's step and the loop's counting of it, as Ctrl-C may."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == 6:
            raise RuntimeError("on purpose")


def test_a_step_that_was_not_counted_is_an_error(tmp_path: Path) -> None:
    """The counter would be one behind for ever."""
    saves = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        resume(None, tmp_path, saves, enable_checkpointing=True, module=StepsAndFails())
    report = verify_checkpoint(tmp_path / "on_exception.ckpt")
    assert report.verdict is Verdict.FAIL
    assert any(f.code == "CK401" and "7" in f.message and "6" in f.message for f in report.findings)
    with pytest.raises(CheckpointGuardError, match="CK401"):
        resume(tmp_path / "on_exception.ckpt", tmp_path)


class Plain(TinyModule):
    def train_dataloader(self) -> Any:
        features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(features, torch.arange(20)), batch_size=4, shuffle=True)


def test_batches_that_a_plain_loader_trains_twice_are_counted(tmp_path: Path) -> None:
    resume(None, tmp_path, every_step(tmp_path), max_epochs=1, module=Plain())
    path = edited(tmp_path / "step=3.ckpt", tmp_path / "c.ckpt", lambda c: c["callbacks"].clear())  # of no guard
    with pytest.warns(UserWarning, match="CheckpointGuard: CK30"):
        guard = resume(path, tmp_path, max_epochs=1, module=Plain())
    assert guard.report is not None
    assert guard.report.resume is not None
    assert guard.report.resume.batches_repeated == 2
    assert "2 batches trained twice" in guard.report.resume.sentence


def test_a_loader_of_another_kind_ends_in_lightnings_error(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CombinedLoader has 0 stateful loaders, but found 1 states"):
        resume(trained / "step=7.ckpt", tmp_path, module=Plain())


class Manual(LightningModule):
    """Steps past Lightning's counter."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.counted = counted
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.counted)
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())

    train_dataloader = TinyModule.train_dataloader


def test_steps_past_the_counter_are_said(tmp_path: Path) -> None:
    """`optimizers(use_pl_optimizer=False)` leaves `global_step` at 0: #17281."""
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), every_epoch(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match="5 optimizer steps are done and global_step is 0: ModelCheckpoint will save"):
        trainer.fit(Manual(counted=False))
    assert not list(tmp_path.glob("*.ckpt"))
    trainer.save_checkpoint(tmp_path / "epoch=0.ckpt")
    report = verify_checkpoint(tmp_path / "epoch=0.ckpt")
    assert report.verdict is not Verdict.PASS
    assert any(f.code in ("CK302", "CK401") for f in report.findings if f.severity in ("warning", "error"))
    resume(None, tmp_path / "counted", every_epoch(tmp_path / "counted"), max_epochs=1, module=Manual(counted=True))
    assert verify_checkpoint(tmp_path / "counted" / "epoch=0.ckpt").verdict is Verdict.PASS


class OldKind(Manual):
    def __init__(self) -> None:
        super().__init__(counted=True)
        self.automatic_optimization = True

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch[0]).square().mean()


def test_a_counter_that_manual_optimization_does_not_read_is_said(tmp_path: Path) -> None:
    """From automatic to manual optimization, `global_step` begins at 0 again: it is another counter."""
    resume(None, tmp_path, every_epoch(tmp_path), max_epochs=1, module=OldKind())
    with pytest.raises(CheckpointGuardError, match="CK302 the run's global_step is 0, and 5 optimizer steps"):
        resume(tmp_path / "epoch=0.ckpt", tmp_path, max_epochs=2, module=Manual(counted=True))


# The list


def test_every_known_failure_names_a_test_that_there_is() -> None:
    here = Path(__file__).parent
    rows = [line for line in (here / "KNOWN_FAILURES.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| without the guard", "| ---"))]
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`([\w./]+\.py)::(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (here / file).read_text(), (file, name)
