"""`enstack fit --ckpt_path auto`: one command line for the first start and for every restart."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import edited, flip_bit, truncate

from enstack_lightning.checkpoint import find_last_good
from enstack_lightning.cli.main import main
from enstack_lightning.cli.training import EnStackCLI

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def started(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one epoch that was started with `auto` in an absent folder, and its command line."""
    run = tmp_path_factory.mktemp("auto") / "run"
    call = ["fit", "--data", str(data), "--data.cache_dir", str(cache), "--data.max_length", "64"]
    call += ["--data.vocab_size", "300", "--data.train_batch_size", "16", "--trainer.accelerator", "cpu"]
    call += ["--model.pretrained", "false", "--model.max_position_embeddings", "66", "--ckpt_path", "auto"]
    call += [part for name, value in SIZES.items() for part in (f"--model.{name}", str(value))]
    (run / "checkpoints").mkdir(parents=True)
    assert main([*call, "--trainer.default_root_dir", str(run), "--trainer.max_epochs", "1"]) == 0
    return run, call


@pytest.fixture
def run(started: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(started[0], tmp_path / "run"))


def call_of(started: tuple[Path, list[str]], run: Path, epochs: int) -> list[str]:
    return [*started[1], "--trainer.default_root_dir", str(run), "--trainer.max_epochs", str(epochs)]


def steps(run: Path) -> int:
    """Steps of the newest good checkpoint; Lightning numbers the names of files that it did not save itself."""
    newest = find_last_good(run)
    assert newest is not None
    return newest.facts.progress.global_step or 0


def test_one_command_line_starts_restarts_and_ends(
    started: tuple[Path, list[str]], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert steps(run) == 6
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert main(call_of(started, run, 2)) == 0
        assert f"ckpt_path auto   {run / 'checkpoints'}" in caplog.text
        assert steps(run) == 12
        caplog.clear()
        saved = {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")}
        assert main(call_of(started, run, 2)) == 0
        (line,) = [r.getMessage() for r in caplog.records]
        assert line.startswith(f"ckpt_path auto   {run / 'checkpoints'}")
        assert "nothing left to train, finished: 2 of 2 epochs done, 12 steps taken; raise max_epochs" in line
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")} == saved
    assert yaml.safe_load(next(run.rglob("config.yaml")).read_text())["ckpt_path"] == "auto"


def test_an_absent_folder_is_a_fresh_start_and_said(
    started: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert main(call_of(started, tmp_path / "new", 1)) == 0
    assert f"ckpt_path auto   none in {tmp_path / 'new' / 'checkpoints'}: a fresh start" in caplog.text


def test_only_bad_checkpoints_are_an_error(
    started: tuple[Path, list[str]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").glob("*.ckpt"):
        truncate(path, 3_000)
    assert main(call_of(started, run, 2)) == 1
    said = capsys.readouterr().err
    assert "start anew:\n  (1) checkpoint" in said
    assert "\n  (2) checkpoint" in said
    assert ".." not in said
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.rename(f"{path}.corrupt")
    assert main(call_of(started, run, 2)) == 1
    assert "was set aside" in capsys.readouterr().err


def test_a_bad_one_is_passed_over(started: tuple[Path, list[str]], run: Path) -> None:
    truncate(run / "checkpoints" / "last_checkpoint.ckpt", 3_000)
    assert main(call_of(started, run, 2)) == 0
    assert steps(run) == 12


def test_a_named_one_falls_back_where_the_guard_is_told_to(started: tuple[Path, list[str]], run: Path) -> None:
    last = run / "checkpoints" / "last_checkpoint.ckpt"
    truncate(last, 3_000)
    call = [*call_of(started, run, 2), "--ckpt_path", str(last), "--checkpoint_guard.fallback", "previous"]
    with pytest.warns(UserWarning, match=r"loading .*best_model\.ckpt instead of .*last_checkpoint\.ckpt"):
        assert main(call) == 0
    assert last.with_name("last_checkpoint.ckpt.corrupt").exists()


def test_nothing_to_evaluate_is_an_error(
    started: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["validate", *call_of(started, tmp_path / "new", 1)[1:]]
    assert main(call) == 1
    assert "--ckpt_path auto found no checkpoint in" in capsys.readouterr().err


def flip_a_moment(file: Path) -> None:
    """Turns over one bit of a tensor, which only a look at every byte finds."""
    moment = torch.load(file, weights_only=True)["optimizer_states"][0]["state"][0]["exp_avg"]
    flip_bit(file, file.read_bytes().index(moment.numpy().tobytes()), bit=3)


@pytest.mark.parametrize("deep", ["manifest", "true"])
def test_auto_chose_one_that_the_guard_then_refused(started: tuple[Path, list[str]], run: Path, deep: str) -> None:
    last = run / "checkpoints" / "last_checkpoint.ckpt"
    for _ in range(2 if deep == "true" else 1):
        flip_a_moment(last)
        last = last.with_name("best_model.ckpt")
    if deep == "true":
        shutil.copy(started[0] / "checkpoints" / "last_checkpoint.ckpt", run / "checkpoints" / "older.ckpt")
        for manifest in run.rglob("*.manifest.json"):
            manifest.unlink()
    assert main([*call_of(started, run, 2), "--checkpoint_guard.deep", deep]) == 0
    assert steps(run) == 12


def raise_rate(checkpoint: dict[str, Any]) -> None:
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["lr"] = 0.5
    checkpoint["lr_schedulers"][0]["_last_lr"] = [0.5] * len(checkpoint["lr_schedulers"][0]["_last_lr"])


@pytest.mark.parametrize(("bounds", "refused"), [([], True), (["--checkpoint_guard.lr_bounds", "[0,1]"], False)])
def test_the_check_before_the_start_judges_as_the_guard_is_told_to(
    started: tuple[Path, list[str]],
    run: Path,
    bounds: list[str],
    refused: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[bool] = []
    build = EnStackCLI.instantiate_classes
    monkeypatch.setattr(EnStackCLI, "instantiate_classes", lambda self: (built.append(True), build(self)))
    path = edited(run / "checkpoints" / "last_checkpoint.ckpt", run / "raised.ckpt", raise_rate)
    call = [*call_of(started, run, 2), "--ckpt_path", str(path), "--checkpoint_guard.strict", "true", *bounds]
    assert main(call) in ((1,) if refused else (0, 1))
    assert bool(built) is not refused
    assert ("has warnings, and strict is set: CK502" in capsys.readouterr().err) is refused
