"""Before a batch is trained the resume report says whether the run goes on bit for bit, and if not, why."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BATCH_SIZE, ROWS, TinyModule, edited, every_step, quiet_trainer
from exact_runs import exactness
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Finding, Severity, verify_checkpoint
from enstack_lightning.data.loaders import TrainingSampler
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.exactness import lost_guarantees, of_device


class OtherBatches(TinyModule):
    def train_dataloader(self) -> StatefulDataLoader:
        features = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        order = TrainingSampler(ROWS, BATCH_SIZE // 2, seed=7)
        return StatefulDataLoader(
            TensorDataset(features, torch.arange(ROWS)), batch_size=BATCH_SIZE // 2, sampler=order
        )


class Plain(TinyModule):
    def train_dataloader(self) -> Any:
        features = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(features, torch.arange(ROWS)), batch_size=BATCH_SIZE)


def said(path: Path, folder: Path, caplog: pytest.LogCaptureFixture, module: TinyModule, **options: Any) -> str:
    with caplog.at_level(logging.INFO):
        quiet_trainer(folder, CheckpointGuard(), **options).fit(module, ckpt_path=path)
    return exactness(caplog)


def test_a_sound_resume_promises_to_be_exact(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(trained / "step=7.ckpt", tmp_path, caplog, TinyModule()) == "bit for bit"


def test_a_checkpoint_without_the_guards_state_does_not(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: c["callbacks"].pop("CheckpointGuard"))
    assert "not promised: the checkpoint holds no random state" in said(path, tmp_path, caplog, TinyModule())


def test_another_batch_size_says_what_is_kept(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = said(trained / "step=7.ckpt", tmp_path, caplog, OtherBatches())
    assert "batches have another size; a TrainingSampler gives each row that is left of the epoch once" in line


@pytest.mark.parametrize(
    ("option", "was", "now"),
    [
        ("gradient_clip_val", None, 0.01),
        ("limit_train_batches", 1.0, 3),
        ("limit_val_batches", 1.0, 1),
        ("val_check_interval", 1.0, 2),
        ("check_val_every_n_epoch", 1, 3),
    ],
)
def test_other_settings_of_the_trainer_are_said(
    option: str, was: Any, now: Any, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = said(trained / "step=7.ckpt", tmp_path, caplog, TinyModule(), **{option: now})
    assert line.startswith("not promised: ")
    assert f"{option} was {was} and is {now}" in line


def test_another_version_of_torch_is_said(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def older(checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"]["CheckpointGuard"]["versions"]["torch"] = "2.1.0"

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", older)
    assert "another version of torch or Lightning" in said(path, tmp_path, caplog, TinyModule())


def test_weights_that_were_made_smaller_are_said(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def halved(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: tensor.bfloat16() for name, tensor in checkpoint["state_dict"].items()}

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", halved)
    line = said(path, tmp_path, caplog, TinyModule())
    assert "weights were saved as bfloat16 and are trained as float32, such as layer.weight" in line


class StopsItself(TinyModule):
    def on_train_batch_start(self, *args: Any) -> None:
        if self.trainer.global_step == 6:
            self.trainer.should_stop = True


def test_a_run_that_had_stopped_itself_is_said_to_train_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path)).fit(StopsItself())
    assert "step=7.ckpt" in {file.name for file in tmp_path.iterdir()}
    line = said(tmp_path / "step=7.ckpt", tmp_path, caplog, StopsItself())
    assert "the run had been told to stop (trainer.should_stop), and trains on" in line


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


CHANGES = ("CK903", "CK904", "CK905", "CK909", "CK910", "CK911", "CK912", "CK913", "CK915", "CK916", "CK917")


def test_each_change_that_a_rule_finds_is_a_guarantee_lost(trained: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(TinyModule())
    report = verify_checkpoint(trained / "step=7.ckpt")

    def lost(code: str, severity: Severity) -> list[str]:
        found = dataclasses.replace(report, findings=(Finding(code, "drift", severity, "changed"),))
        return lost_guarantees(found, None, trainer, Parts(trainer.lightning_module))

    unchanged = lost("CK903", Severity.PASS)
    for code in CHANGES:
        assert lost(code, Severity.PASS) == unchanged, code
        for severity in (Severity.INFO, Severity.WARNING, Severity.ERROR):
            assert len(lost(code, severity)) == len(unchanged) + 1, code


@pytest.mark.usefixtures("restored")
def test_an_accelerator_is_exact_only_with_deterministic_algorithms() -> None:
    cuda = torch.device("cuda")
    assert of_device(torch.device("cpu")) == []
    assert "Trainer(deterministic=True)" in of_device(cuda)[0]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "only warned of" in of_device(cuda)[0]
    torch.use_deterministic_algorithms(True)
    assert of_device(cuda) == []


def without_order(checkpoint: dict[str, Any]) -> None:
    """As one that was saved before the guard kept it."""
    del checkpoint["callbacks"]["CheckpointGuard"]["resume"]["ranks"][0]["order"]


def test_a_plain_loader_in_the_middle_of_an_epoch_is_exact_where_its_order_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), max_epochs=1).fit(Plain())
    assert said(tmp_path / "step=3.ckpt", tmp_path, caplog, Plain()) == "bit for bit"
    caplog.clear()
    path = edited(tmp_path / "step=3.ckpt", tmp_path / "c.ckpt", without_order)
    line = said(path, tmp_path, caplog, Plain())
    assert "2 batches are trained twice, since the loader's position is not in the checkpoint" in line
