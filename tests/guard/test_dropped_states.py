"""States in a checkpoint that nothing in the resuming run takes back: said, each with what that does to training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, every_epoch, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, Timer

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Finding, Severity


class Monitored(TinyModule):
    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss


class Rows(LightningDataModule):
    def train_dataloader(self) -> Any:
        return TinyModule.train_dataloader(self)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class RenamedRows(Rows):
    pass


class Stateless(LightningDataModule):
    def train_dataloader(self) -> Any:
        return TinyModule.train_dataloader(self)  # type: ignore[arg-type]


def saved(folder: Path, *callbacks: Callback, data: LightningDataModule | None = None) -> Path:
    trainer = quiet_trainer(folder, CheckpointGuard(), every_epoch(folder), *callbacks, max_epochs=1)
    trainer.fit(Monitored(), datamodule=data)
    return folder / "epoch=0.ckpt"


def findings(path: Path, *callbacks: Callback, data: LightningDataModule | None = None) -> list[Finding]:
    guard = CheckpointGuard()
    torch.manual_seed(2)
    quiet_trainer(path.parent, guard, *callbacks, max_epochs=2).fit(Monitored(), datamodule=data, ckpt_path=path)
    assert guard.report is not None
    return [f for f in guard.report.findings if f.code == "CK916"]


def test_the_same_callbacks_take_their_states_back(tmp_path: Path) -> None:
    path = saved(tmp_path, EarlyStopping("loss"))
    (found,) = findings(path, EarlyStopping("loss"), every_epoch(tmp_path))
    assert found.severity is Severity.PASS
    assert found.message == "the state of 3 callbacks taken back"


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_callback_that_is_gone(tmp_path: Path) -> None:
    path = saved(tmp_path, EarlyStopping("loss"))
    (dropped,) = findings(path)
    assert dropped.severity is Severity.WARNING
    assert "EarlyStopping is not among the run's callbacks" in dropped.message


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_callback_with_other_options(tmp_path: Path) -> None:
    path = saved(tmp_path, EarlyStopping("loss"))
    found = [f for f in findings(path, EarlyStopping("loss", mode="max")) if f.severity is Severity.WARNING]
    assert len(found) == 1
    assert "EarlyStopping is there with other options ({'monitor': 'loss', 'mode': 'max'})" in found[0].message


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_another_model_checkpoint_is_worth_knowing_only(tmp_path: Path) -> None:
    other = ModelCheckpoint(tmp_path / "other", monitor="loss")
    (found,) = findings(saved(tmp_path), other)
    assert found.severity is Severity.INFO
    assert "which checkpoint is the best so far is forgotten" in found.message


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_averaged_weights_without_their_callback(tmp_path: Path) -> None:
    found = findings(saved(tmp_path, EMAWeightAveraging()))
    assert any("the checkpoint's weights are averaged ones, and training goes on from them" in f.message for f in found)
    assert not [f for f in findings(tmp_path / "epoch=0.ckpt", EMAWeightAveraging()) if f.severity is Severity.WARNING]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_data_module_of_another_name(tmp_path: Path) -> None:
    path = saved(tmp_path, data=Rows())
    (found,) = [f for f in findings(path, data=RenamedRows()) if f.where == "data"]
    assert found.severity is Severity.WARNING
    assert found.message == "the data module RenamedRows finds no state of its own in the checkpoint, which has Rows"


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("data", [Rows(), Stateless()], ids=lambda d: type(d).__name__)
def test_data_modules_that_miss_nothing(data: LightningDataModule, tmp_path: Path) -> None:
    assert not [f for f in findings(saved(tmp_path, Timer(), data=data), data=data) if f.where == "data"]
