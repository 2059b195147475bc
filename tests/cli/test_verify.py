"""`enstack verify` as a user calls it: a process, its two outputs and its exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import edited, enstack_folder, truncate

KINDS = ["PASS", "WARNING", "ERROR", "INFO"]


def enstack(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "enstack_lightning", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def good(trained: Path) -> Path:
    return trained / "step=7.ckpt"


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copy(good, tmp_path / "bad.ckpt"))
    truncate(path, path.stat().st_size - 1)
    return path


@pytest.fixture
def suspicious(good: Path, tmp_path: Path) -> Path:
    def edit(checkpoint: dict[str, object]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["step"] = torch.tensor(3.0)  # type: ignore[index]

    return edited(good, tmp_path / "suspicious.ckpt", edit)


def test_a_good_checkpoint_ends_with_0_and_says_what_resuming_does(good: Path) -> None:
    done = enstack("verify", good)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict     PASS" in done.stdout
    assert "2 of 5 batches into epoch 1 (1 of 3 epochs done); continues with epoch 1, batch 2 of 5" in done.stdout
    assert done.stdout.isascii()


def test_a_bad_one_ends_with_1_and_says_what_to_do(bad: Path) -> None:
    done = enstack("verify", bad)
    assert (done.returncode, done.stderr) == (1, "")
    assert "CK104" in done.stdout
    assert "-> Use another checkpoint of this run" in done.stdout
    assert "verdict     FAIL" in done.stdout


def test_a_warning_ends_with_0_and_under_strict_with_1(suspicious: Path) -> None:
    assert enstack("verify", suspicious).returncode == 0
    strict = enstack("verify", suspicious, "--strict")
    assert strict.returncode == 1
    assert "verdict     WARN" in strict.stdout


@pytest.mark.parametrize(
    "arguments",
    [["verify"], ["verify", "x", "--tolerance", "-1"], ["verify", "x", "--format", "xml"], ["verify", "x", "--nope"]],
)
def test_a_wrong_call_ends_with_2_and_prints_no_result(arguments: list[str]) -> None:
    done = enstack(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: enstack verify" in done.stderr


def test_a_path_that_is_not_there_fails(tmp_path: Path) -> None:
    done = enstack("verify", tmp_path / "nowhere.ckpt")
    assert done.returncode == 1
    assert "it is missing" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_json_is_one_object_and_nothing_else(good: Path, bad: Path, suspicious: Path) -> None:
    done = enstack("verify", good, bad, suspicious, "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    document = json.loads(done.stdout)
    assert set(document) == {"version", "verdict", "checkpoints", "newest_good"}
    assert (document["version"], document["verdict"], document["newest_good"]) == (1, "fail", str(good))
    assert [c["verdict"] for c in document["checkpoints"]] == ["pass", "fail", "warn"]
    for entry in document["checkpoints"]:
        assert list(entry) == ["path", "format", "verdict", "summary", "elapsed_seconds", "findings", "resume"]
        severities = [f["severity"] for f in entry["findings"]]
        assert entry["summary"] == {
            "passed": severities.count("pass"),
            "warnings": severities.count("warning"),
            "errors": severities.count("error"),
        }
        assert all(set(f) == {"code", "name", "severity", "message", "where", "hint"} for f in entry["findings"])
    assert document["checkpoints"][0]["format"] == "lightning"


def test_a_folder_gives_a_line_each_and_names_the_newest_good(trained: Path, tmp_path: Path) -> None:
    for step in (3, 7, 12):
        shutil.copy(trained / f"step={step}.ckpt", tmp_path / f"s{step}.ckpt")
    truncate(tmp_path / "s12.ckpt", 1000)
    enstack_folder(tmp_path / "folder", epoch=1, batches=4)
    done = enstack("verify", tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["PASS", "PASS", "PASS", "FAIL"]
    assert "CK104" in lines[3]
    assert lines[-1] == f"newest good  {tmp_path / 's7.ckpt'} (global step 7)"


def test_an_enstack_folder_is_one_checkpoint(tmp_path: Path) -> None:
    done = enstack("verify", enstack_folder(tmp_path / "c"))
    assert done.returncode == 0
    assert "format      enstack" in done.stdout


def test_a_folder_without_checkpoints_fails(tmp_path: Path) -> None:
    done = enstack("verify", tmp_path)
    assert done.returncode == 1
    assert "none of the files of a checkpoint" in done.stdout


def test_the_tolerance_decides(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c", optimizer_steps=12)
    assert enstack("verify", folder, "--strict").returncode == 0
    assert enstack("verify", folder, "--strict", "--tolerance", "7").returncode == 1


def test_weights_alone_pass_for_inference_and_fail_for_resuming(good: Path, tmp_path: Path) -> None:
    def leave_weights(checkpoint: dict[str, object]) -> None:
        for name in ("optimizer_states", "lr_schedulers", "loops"):
            del checkpoint[name]

    path = edited(good, tmp_path / "weights.ckpt", leave_weights)
    assert enstack("verify", path, "--for", "inference").returncode == 0
    resume = enstack("verify", path, "--for", "resume")
    assert resume.returncode == 1
    assert "holds weights only" in resume.stdout


def test_the_report_goes_to_a_file(good: Path, tmp_path: Path) -> None:
    done = enstack("verify", good, "--format", "json", "--output", tmp_path / "report.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "pass"
    nowhere = enstack("verify", good, "--output", tmp_path / "no" / "folder.txt")
    assert nowhere.returncode == 2
    assert "cannot be written: No such file or directory" in nowhere.stderr


def test_a_reader_that_closes_early_gets_no_traceback(trained: Path) -> None:
    command = f"{sys.executable} -m enstack_lightning verify {trained} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("PASS")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_names_that_are_no_text_are_shown_and_break_nothing(good: Path, tmp_path: Path) -> None:
    name = b"caf\xe9\x1b[31m\n.ckpt"
    path = Path(shutil.copy(good, Path(tmp_path / name.decode("utf-8", "surrogateescape"))))
    for form in ("text", "json"):
        done = enstack("verify", path, "--format", form)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
