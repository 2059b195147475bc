"""`enstack manifest` as a user calls it: a line for each manifest written, a reason for each that is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, enstack_folder, truncate
from safetensors.torch import save_file

from enstack_lightning.checkpoint import Options, Report, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.cli.main import main


def enstack(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "enstack_lightning", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert not any(line.split()[-1] == "torch" for line in imported)
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    return done


@pytest.fixture
def good(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "good.ckpt"))


def test_a_checkpoint_that_verifies_gets_its_manifest(good: Path) -> None:
    done = enstack("manifest", good)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{manifest_path(good)}  ")
    assert len(done.stdout.splitlines()) == 1
    content = json.loads(manifest_path(good).read_text())
    assert (content["format"], content["global_step"], content["epoch"]) == ("lightning", 7, 1)
    assert verify_checkpoint(good, Options(deep=True)).verdict is Verdict.PASS


def test_a_checkpoint_that_fails_gets_none(good: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copy(good, tmp_path / "bad.ckpt"))
    truncate(bad, bad.stat().st_size - 1)
    done = enstack("manifest", bad, good, tmp_path / "none.ckpt")
    assert done.returncode == 1
    assert "bad.ckpt gets no manifest, as it fails: CK1" in done.stderr
    assert "none.ckpt gets no manifest, as it fails: CK101" in done.stderr
    assert manifest_path(good).exists()
    assert not manifest_path(bad).exists()


def test_damage_that_only_a_deep_look_shows_is_not_sealed_in(good: Path) -> None:
    data = bytearray(good.read_bytes())
    at = good.read_bytes().index(torch.load(good, weights_only=True)["state_dict"]["layer.weight"].numpy().tobytes())
    data[at] ^= 1
    good.write_bytes(data)
    done = enstack("manifest", "--deep", good)
    assert done.returncode == 1
    assert "CK105" in done.stderr
    assert not manifest_path(good).exists()


def test_a_manifest_is_written_anew_after_a_change_on_purpose(good: Path) -> None:
    assert enstack("manifest", good).returncode == 0
    edited(good, good, lambda c: c.update(epoch=c["epoch"], note="added on purpose"))
    assert verify_checkpoint(good).verdict is Verdict.FAIL
    assert enstack("manifest", good).returncode == 0
    assert verify_checkpoint(good).verdict is Verdict.PASS


def test_folders_and_models_alone_get_theirs(tmp_path: Path) -> None:
    folder, model = enstack_folder(tmp_path / "runs" / "best"), tmp_path / "runs" / "weights.safetensors"
    save_file({"w": torch.ones(3)}, model)
    done = enstack("manifest", folder, model)
    assert (done.returncode, done.stderr) == (0, "")
    assert manifest_path(folder).exists()
    assert manifest_path(model).exists()
    assert enstack("manifest", tmp_path / "runs").returncode == 0


def test_a_call_without_a_path_is_wrong() -> None:
    assert enstack("manifest").returncode == 2


def test_a_checkpoint_replaced_after_its_verification_got_a_manifest(
    good: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify_and_lose_the_race(path: str, *arguments: Any) -> Report:
        report = verify_checkpoint(path, *arguments)
        other = Path(shutil.copy(trained / "step=3.ckpt", good.with_name("other")))
        other.replace(good)
        return report

    monkeypatch.setattr("enstack_lightning.cli.manifest.verify_checkpoint", verify_and_lose_the_race)
    assert main(["manifest", str(good)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        said.err == f"enstack manifest: {good} gets no manifest: good.ckpt changed after it was verified; try again\n"
    )
    assert not manifest_path(good).exists()


def test_a_file_that_joined_a_folder_after_its_verification_was_sealed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = enstack_folder(tmp_path / "best")

    def verify_and_lose_the_race(path: str, *arguments: Any) -> Report:
        report = verify_checkpoint(path, *arguments)
        (folder / "tokenizer.json").write_text("{}")
        return report

    assert main(["manifest", str(folder)]) == 0, "a manifest that is there already is no change"
    monkeypatch.setattr("enstack_lightning.cli.manifest.verify_checkpoint", verify_and_lose_the_race)
    assert main(["manifest", str(folder)]) == 1
    assert "tokenizer.json changed after it was verified" in capsys.readouterr().err


def test_control_characters_in_a_name_reached_the_terminal(good: Path, tmp_path: Path) -> None:
    odd = good.rename(tmp_path / "a\x1b[31m\nb.ckpt")
    bad = Path(shutil.copy(odd, tmp_path / "c\x1b[31m\nd.ckpt"))
    truncate(bad, 100)
    done = enstack("manifest", odd, bad)
    assert done.returncode == 1
    assert "a\\x1b[31m\\nb.ckpt.manifest.json" in done.stdout
    assert "c\\x1b[31m\\nd.ckpt gets no manifest" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
