"""`enstack fit --checkpoint_guard.repair`: a checkpoint without its schedule, or its optimizer, is trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited

from enstack_lightning.cli.main import main

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
EPOCHS, STEPS = 3, 6


@pytest.fixture(scope="module")
def call(data: Path, cache: Path) -> list[str]:
    words = ["fit", "--data", str(data), "--data.cache_dir", str(cache), "--data.max_length", "64"]
    words += ["--data.vocab_size", "300", "--data.train_batch_size", "16", "--trainer.accelerator", "cpu"]
    words += ["--model.pretrained", "false", "--model.max_position_embeddings", "66"]
    words += ["--trainer.max_epochs", str(EPOCHS), "--last_checkpoint.save_top_k", "-1"]
    words += ["--last_checkpoint.filename", "{epoch}"]
    return words + [part for name, value in SIZES.items() for part in (f"--model.{name}", str(value))]


@pytest.fixture(scope="module")
def whole(call: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that never stopped."""
    run = tmp_path_factory.mktemp("whole")
    assert main([*call, "--trainer.default_root_dir", str(run)]) == 0
    return run / "checkpoints"


def rate_of(folder: Path) -> float:
    checkpoint = torch.load(folder / "epoch=1.ckpt", weights_only=True)
    return float(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"])


def lose_schedule(checkpoint: dict[str, Any]) -> None:
    checkpoint["lr_schedulers"] = []


def lose_both(checkpoint: dict[str, Any]) -> None:
    checkpoint["lr_schedulers"] = checkpoint["optimizer_states"] = []


@pytest.mark.parametrize("lose", [lose_schedule, lose_both])
def test_a_run_goes_on_at_the_rate_of_its_schedule(
    lose: Callable[[dict[str, Any]], None],
    call: list[str],
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = edited(whole / "epoch=0.ckpt", tmp_path / "c.ckpt", lose)
    again = [*call, "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(path)]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert main([*again, "--checkpoint_guard.repair", "true"]) == 0
    assert f"fast-forwarded {STEPS} steps = (1 epoch x {STEPS} steps) + 0 mid-epoch steps" in caplog.text
    assert rate_of(tmp_path / "checkpoints") == rate_of(whole) > 0


def test_without_the_option_a_lost_optimizer_ends_the_run(
    call: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(whole / "epoch=0.ckpt", tmp_path / "c.ckpt", lose_both)
    assert main([*call, "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(path)]) == 1
    assert "CheckpointGuard(repair=True) trains on with fresh moments" in capsys.readouterr().err
