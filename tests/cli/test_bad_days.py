"""Calls that go wrong: one clear sentence, the right exit status, no traceback, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from killing import interrupted

ENSTACK = (sys.executable, "-m", "enstack_lightning")

CALLS: dict[str, tuple[Sequence[str], int, str]] = {
    "no command": ([], 2, ""),
    "an unknown command": (["x\x1b[31m"], 2, "enstack: 'x\\x1b[31m' is no command"),
    "an unknown rule": (["rules", "XX\n"], 2, "there is no rule XX\\n; `enstack rules` lists them"),
    "an unknown rule to select": (["verify", "good.ckpt", "--select", "XX"], 2, "--select XX: no rule's code"),
    "an unset variable for the report": (["verify", "good.ckpt", "--output", ""], 2, "--output names no file"),
    "the checkpoint for its report": (
        ["verify", "good.ckpt", "--output", "good.ckpt"],
        2,
        "replace what is read, good",
    ),
    "a link to it": (
        ["verify", "good.ckpt", "--output", "link"],
        2,
        "--output link would replace what is read, good.ckpt",
    ),
    "what is no checkpoint for its report": (
        ["verify", "list.yaml", "--output", "list.yaml"],
        2,
        "replace what is read",
    ),
    "the config for the report": (
        ["verify", "x", "--config", "run.yaml", "--output", "run.yaml"],
        2,
        "what is read, run",
    ),
    "another checkpoint for the report": (["verify", "list.yaml", "--output", "good.ckpt"], 2, "replace a checkpoint;"),
    "one with a manifest for the report": (
        ["verify", "x", "--output", "cut.ckpt"],
        2,
        "cut.ckpt would replace a checkp",
    ),
    "an unset variable to select": (
        ["verify", "good.ckpt", "--select", ""],
        2,
        "--select names no rule; is a variable",
    ),
    "an unset variable to ignore": (
        ["verify", "good.ckpt", "--ignore", " ,"],
        2,
        "--ignore names no rule; is a variable",
    ),
    "an unset variable for a rule": (["rules", ""], 2, "CODE names no rule; is a variable of the script unset?"),
    "a demo in a run's folder": (
        ["demo", "--config", "run.yaml", "--folder", "run"],
        2,
        "run holds what no earlier demo",
    ),
    "a demo in a file": (
        ["demo", "--config", "run.yaml", "--folder", "good.ckpt"],
        2,
        "good.ckpt cannot be used: Not a",
    ),
    "an unset variable for the demo": (
        ["demo", "--config", "run.yaml", "--folder", ""],
        2,
        "--folder names no folder; is",
    ),
    "a folder for the report": (["verify", "good.ckpt", "--output", "empty"], 2, "empty cannot be written: it is"),
    "a folder that is not there": (["verify", "good.ckpt", "--output", "no/x"], 2, "no/x cannot be written: No such"),
    "a checkpoint for the config": (["verify", "good.ckpt", "--config", "good.ckpt"], 2, "good.ckpt is no YAML"),
    "a folder for the config": (["verify", "good.ckpt", "--config", "empty"], 2, "empty cannot be read: Is a dir"),
    "an empty folder": (["verify", "empty"], 1, ""),
    "a pipe": (["verify", "pipe"], 1, ""),
    "a device": (["verify", "/dev/null"], 1, ""),
    "two paths, one bad": (["verify", "good.ckpt", "none.ckpt"], 1, ""),
    "a store of no known kind": (["verify", "foo://x"], 1, ""),
    "a URL with nothing behind it": (["verify", "memory://none/x.ckpt"], 1, ""),
    "a name of bytes that are no text": (["verify", os.fsdecode(b"bad\xff.ckpt")], 1, ""),
    "a manifest of nothing": (["manifest", "none.ckpt"], 1, "none.ckpt gets no manifest, as it fails: CK101"),
    "a manifest of a pipe": (["manifest", "pipe"], 1, "pipe gets no manifest, as it fails: CK102"),
    "a manifest of a URL": (["manifest", "memory://none/x.ckpt"], 1, "x.ckpt gets no manifest"),
    "a ledger of a folder without one": (["ledger", "empty"], 2, "empty holds no sample ledger"),
    "a ledger of a file": (["ledger", "good.ckpt"], 2, "good.ckpt is no folder of a run"),
    "a check of an empty folder": (["resume-check", "empty"], 2, "empty holds no config.yaml of a run"),
    "a check of a checkpoint": (["resume-check", "good.ckpt"], 2, "configuration of a run: it is no YAML"),
    "a check of a list": (["resume-check", "list.yaml"], 2, "list.yaml holds no run: it must be a mapping"),
    "a check of no step": (["resume-check", "empty", "--steps", "0"], 2, "--steps is 0 and must be at least 4"),
}


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad day")
    shutil.copy(trained / "step=7.ckpt", folder / "good.ckpt")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "run.yaml").write_text("trainer: {}\n")
    (folder / "link").symlink_to("good.ckpt")
    (folder / "cut.ckpt").write_bytes(b"cut")
    (folder / "cut.ckpt.manifest.json").write_text("{}")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(trained / "step=7.ckpt", folder / "run" / "checkpoints")
    return folder


def enstack(place: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run([*ENSTACK, *arguments], **{**streams, "timeout": 60, "cwd": place, **options})  # type: ignore[call-overload, no-any-return]


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(place.rglob("*"))}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_goes_wrong_ends_with_a_sentence(name: str, place: Path) -> None:
    arguments, status, says = CALLS[name]
    before = contents(place)
    done = enstack(place, *arguments)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= (1 if not done.stderr.startswith("usage") else 8)
    assert done.stdout or done.stderr
    assert contents(place) == before


@pytest.mark.parametrize(
    "arguments", [["rules"], ["rules", "CK4"], ["verify", "good.ckpt"], ["manifest", "good.ckpt"], ["--version"], []]
)
def test_a_full_disk_behind_standard_output_is_said(arguments: list[str], place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = enstack(place, *arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr.endswith("standard output cannot be written: No space left on device\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["rules"], ["verify", "-v", "good.ckpt"], ["--help"]])
def test_a_reader_that_has_gone_ends_it_without_a_word(arguments: list[str], place: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = enstack(place, *arguments, stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


def bytes_read(pid: int) -> int:
    """By a process's read calls, from files in memory too."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_an_interrupt_ends_a_verification_with_130(place: Path) -> None:
    with (place / "holes.safetensors").open("wb") as file:  # as many zeros as take a while to read
        count = 64 << 30
        header = f'{{"w":{{"dtype":"F32","shape":[{count // 4}],"data_offsets":[0,{count}]}}}}'.encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count)
    command = [*ENSTACK, "verify", "--deep", "holes.safetensors"]
    try:
        done = interrupted(command, lambda pid: bytes_read(pid) >= 64 << 20, timeout=30, cwd=place)
    finally:
        (place / "holes.safetensors").unlink()
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "enstack verify: interrupted\n")
