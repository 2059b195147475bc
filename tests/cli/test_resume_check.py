"""`enstack resume-check`: a run that can be resumed exactly passes, one that cannot is told where and why it parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import TinyModule, quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer

from enstack_lightning import CheckpointGuardError
from enstack_lightning.cli.main import main
from enstack_lightning.cli.resume_check import CAUSES, UNREPEATABLE, first_difference
from enstack_lightning.guard.step_record import StepRecord, digest_of


class Forgetful(Callback):
    """Changes the weights by a count that is in no checkpoint."""

    count = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.count += 1
        with torch.no_grad():
            next(pl_module.parameters()).add_(self.count * 1e-6)


class Unseeded(Callback):
    """Changes the weights by what the system's generator says."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).add_(int.from_bytes(os.urandom(2)) * 1e-9)


@pytest.fixture
def config(data: Path, cache: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of a small run, as the folder of that run holds it."""
    model = {"pretrained": False, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
        "model": {**model, "intermediate_size": 16, "max_position_embeddings": 66},
        "data": {"path": str(data), "cache_dir": str(cache), "max_length": 64, "vocab_size": 300}
        | {"train_batch_size": 8},
        "last_checkpoint": {"dirpath": str(tmp_path / "run" / "checkpoints")},
    }


def check(config: dict[str, Any], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "run" / "logs").mkdir(parents=True)
    (folder / "run" / "logs" / "config.yaml").write_text(yaml.safe_dump(config))
    call = [sys.executable, "-m", "enstack_lightning", "resume-check", str(folder / "run"), *options]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.run(call, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


def test_a_run_that_resumes_exactly_passes(config: dict[str, Any], tmp_path: Path) -> None:
    result = check(config, tmp_path, "--steps", "8", "--seed", "1")
    assert result.returncode == 0, result.stderr + result.stdout
    assert "verdict      PASS: the resumed run equals the undisturbed one, bit for bit" in result.stdout
    assert "trained      8 steps in 3 epochs, 8 batches" in result.stdout
    assert "killed       " in result.stdout
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["logs"], "the run's own folder is not touched"


def test_a_state_that_no_checkpoint_holds_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"] = [{"class_path": "test_resume_check.Forgetful"}]
    result = check(config, tmp_path, "--steps", "6", "--seed", "1", "--format", "json")
    assert result.returncode == 1, result.stderr + result.stdout
    said = json.loads(result.stdout)
    assert said["verdict"] == "fail"
    assert said["difference"]["what"] == "weights"
    assert said["difference"]["cause"] == CAUSES["weights"]


@pytest.mark.faults_long
def test_what_no_two_runs_have_in_common_is_not_the_resumes_fault(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"] = [{"class_path": "test_resume_check.Unseeded"}]
    result = check(config, tmp_path, "--steps", "4")
    assert result.returncode == 1, result.stderr + result.stdout
    assert UNREPEATABLE in result.stdout


def test_a_run_that_fails_is_told_in_a_sentence(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["path"] = str(tmp_path / "nowhere")
    result = check(config, tmp_path)
    assert result.returncode == 1
    assert "a run of the check ended with status 1: enstack fit: " in result.stderr
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_configuration_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume-check", str(tmp_path)]) == 2  # 1 is: the runs differ
    assert "holds no config.yaml of a run" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--steps", "3"], ["--kills", "0"]])
def test_a_wrong_call(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["resume-check", str(tmp_path), *options])


# The record


def record(folder: Path, name: str = "a", **options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    quiet_trainer(folder, StepRecord(str(folder / name)), **{"max_epochs": 2, **options}).fit(TinyModule())
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_line_holds_what_decides_the_next_batch(tmp_path: Path) -> None:
    lines = record(tmp_path)
    assert [(line["epoch"], line["batch"], line["step"]) for line in lines[:6]] == [
        *((0, i, i + 1) for i in range(5)),
        (1, 0, 6),
    ]
    assert len({line["weights"] for line in lines}) == len(lines)
    assert lines == record(tmp_path, "b")


@pytest.mark.parametrize(
    ("what", "value"),
    [("data", "0"), ("lrs", ["0x1p-3"]), ("loss", "0x1.8p+1"), ("weights", "0"), ("optimizer", "0"), ("step", 99)],
)
def test_the_first_difference_is_named(what: str, value: Any, tmp_path: Path) -> None:
    lines = record(tmp_path)
    other = [*lines[:6], {**lines[6], what: value}, {**lines[7], "data": "1"}, *lines[8:]]
    found = first_difference(lines, other)
    assert found is not None
    assert (found.epoch, found.batch, found.step) == (1, 1, 7)
    assert found.what == ("batches" if what == "step" else what)
    assert found.what in CAUSES


def test_the_generator_that_differs_is_named(tmp_path: Path) -> None:
    lines = record(tmp_path)
    other = [*lines[:3], {**lines[3], "random": {**lines[3]["random"], "numpy": "0"}}, *lines[4:]]
    assert "random state numpy 0, undisturbed numpy" in str(first_difference(lines, other))


def test_a_batch_too_few_or_too_many_is_named(tmp_path: Path) -> None:
    lines = record(tmp_path)
    assert "epoch 0, batch 3 (step 4): not trained" in str(first_difference(lines, lines[:3] + lines[4:]))
    extra = {**lines[-1], "batch": 5, "step": 11}
    assert "epoch 1, batch 5 (step 11): trained, undisturbed it was not" in str(
        first_difference(lines, [*lines, extra])
    )


def test_what_was_trained_again_is_compared_each_time(tmp_path: Path) -> None:
    lines = record(tmp_path)
    assert first_difference(lines, [*lines[:5], *lines[3:]]) is None
    assert first_difference(lines, [*lines[:4], {**lines[4], "loss": "0x0p+0"}, *lines[3:]]) is not None


def test_digests_tell_values_types_and_shapes_apart() -> None:
    values = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, -0.0])]
    values += [{"a": 1}, {"a": 2}, [1, 2], [[1], 2], None, "1", 1, 1.0]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"x": torch.ones(3)}) == digest_of({"x": torch.ones(3)})


@pytest.mark.parametrize("options", [{"kill_at": 0}, {"moment": "later"}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointGuardError, match="must be"):
        StepRecord("record", **options)
