"""What users do with a Trainer beside training: fit again after a failure, pickle it, bring parts of their own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, every_step, quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torchmetrics import Metric

from enstack_lightning import CheckpointGuard


def resumed(module: LightningModule, folder: Path) -> Trainer:
    trainer = quiet_trainer(folder / "again", CheckpointGuard(strict=True))
    trainer.fit(module, ckpt_path=folder / "step=3.ckpt")
    return trainer


class FailsOnce(Callback):
    """Raises in the first `on_fit_start`."""

    failed = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.failed:
            self.failed = True
            raise ConnectionError("once")


def test_a_resume_that_failed_leaves_nothing_behind_for_the_next_fit(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_step(tmp_path), CheckpointGuard(), max_epochs=1).fit(TinyModule())
    trainer = quiet_trainer(tmp_path / "again", CheckpointGuard(), FailsOnce())
    with pytest.raises(ConnectionError):
        trainer.fit(TinyModule(), ckpt_path=tmp_path / "step=3.ckpt")
    trainer._checkpoint_connector.resume_end()  # else Lightning itself goes on from it
    module = TinyModule()
    trainer.fit(module)
    assert len(module.rows) == trainer.global_step == 15


def test_a_trainer_can_be_pickled_after_a_fit(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1)
    trainer.fit(BoringModel())
    pickle.loads(pickle.dumps(trainer))


class FindsItsRate(torch.optim.SGD):
    """Its `lr` is None until it steps, as that of `transformers.Adafactor`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] = 0.01
        return super().step(closure)


class Rateless(TinyModule):
    def configure_optimizers(self) -> Any:
        return FindsItsRate(self.parameters())


def test_an_optimizer_without_a_learning_rate(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), max_epochs=1).fit(Rateless())
    assert resumed(Rateless(), tmp_path).global_step == 15


class Masks(Metric):
    """Keeps encoded masks, which are no tensors, as `MeanAveragePrecision(iou_type="segm")` does."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("masks", default=[], dist_reduce_fx=None)

    def update(self) -> None:
        self.masks.append(((2, 2), b"mask"))

    def compute(self) -> Tensor:
        return torch.tensor(float(len(self.masks)))

    def _apply(self, *args: Any, **kwargs: Any) -> Masks:
        return self


class Masked(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.masks = Masks()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.masks.update()
        return super().training_step(batch)


def test_a_metric_whose_states_are_no_tensors(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), max_epochs=1).fit(Masked())
    assert resumed(Masked(), tmp_path).global_step == 15
