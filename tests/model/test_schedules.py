"""The schedules against those of transformers, alone and through a real fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_classifier import TokenRows, loader, short_trainer, tiny_classifier
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from enstack_lightning.errors import ModelError
from enstack_lightning.model.schedules import lr_factor, warmup_schedule, warmup_steps

OF_TRANSFORMERS = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def one_parameter() -> Optimizer:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def learning_rates(scheduler: LambdaLR, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (10, 1), (10, 9), (37, 5), (200, 20)])
def test_every_step_equals_transformers(schedule: Any, total: int, warmup: int) -> None:
    ours = warmup_schedule(one_parameter(), total, warmup, schedule)
    theirs = OF_TRANSFORMERS[schedule](one_parameter(), warmup, total)
    assert learning_rates(ours, total + 1) == pytest.approx(learning_rates(theirs, total + 1), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_stays_at_zero_after_the_last_step(schedule: Any) -> None:
    assert [lr_factor(step, 10, 1, schedule) for step in (10, 11, 15, 100)] == [0.0] * 4


def test_warmup_steps_round_down() -> None:
    assert warmup_steps(19, 0.1) == 1
    assert warmup_steps(1_270, 0.0) == 0


def test_a_longer_run_does_not_inherit_the_old_length() -> None:
    shorter = warmup_schedule(one_parameter(), 4, 0, "linear")
    longer = warmup_schedule(one_parameter(), 8, 0, "linear")
    longer.load_state_dict(shorter.state_dict())
    assert learning_rates(longer, 8)[-1] > 0


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fit_with_accumulation_steps_as_transformers(tmp_path: Path, schedule: Any) -> None:
    seen = LearningRates()
    trainer = short_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, callbacks=[seen])
    trainer.fit(tiny_classifier(schedule=schedule, warmup_fraction=0.3, learning_rate=1e-3), loader(TokenRows(28)))
    total = 3 * 4  # 7 batches an epoch, the last one steps alone
    theirs = OF_TRANSFORMERS[schedule](one_parameter(), int(0.3 * total), total)
    assert seen.rates == pytest.approx([1e-3 * rate for rate in learning_rates(theirs, total)], rel=1e-9)


def test_open_ended_run_says_what_to_set(tmp_path: Path) -> None:
    trainer = short_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(
        ModelError, match=r"max_epochs=-1 with max_steps=-1 leaves it open: set the Trainer's max_steps"
    ):
        trainer.fit(tiny_classifier(), loader(TokenRows(8)))
