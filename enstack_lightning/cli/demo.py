"""`enstack demo`: the whole job in a few minutes, offline: train, be killed, verify what is left, resume, test.

Every step is the real command in a process of its own, printed before it runs; the kill is a real SIGKILL.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from enstack_lightning.checkpoint import find_last_good
from enstack_lightning.cli.output import WrongCallError
from enstack_lightning.errors import CheckpointError, EnStackError

DEMO_SECONDS = 300
_MADE = ("checkpoints", "ledger", "logs")
_MARK = ".enstack-demo"
_MARKED = "enstack demo made this folder, and removes the run in it when it is called again\n"
_POLL_SECONDS = 0.05


def main(argv: Sequence[str]) -> int:
    """Runs `enstack demo`; the status is 0 only if every step did what it must."""
    arguments = _parser().parse_args(argv[1:])
    if not arguments.folder:
        raise WrongCallError("--folder names no folder; is a variable of the script unset?")
    config, folder = Path(arguments.config), Path(arguments.folder)
    if not config.is_file():
        raise EnStackError(f"{config} does not exist; run the demo from the root of the project, or name --config")
    _clear(folder)
    fit = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder)]

    _say("1. Train, verify the first checkpoint, and be killed with SIGKILL in the middle of an epoch")
    _run_until_killed(fit, folder / "checkpoints")

    _say("2. Verify what is left")
    _run(["verify", str(folder)])
    last_good = find_last_good(folder)
    if last_good is None:
        raise CheckpointError(f"nothing below {folder} can be resumed from")
    print(f"last good checkpoint: {last_good.path}", flush=True)

    _say("3. Resume from it")
    _run([*fit, "--ckpt_path", last_good.path])

    _say("4. Verify the finished run: its checkpoint, and that every row was trained once an epoch")
    best = str(folder / "checkpoints" / "best_model.ckpt")
    _run(["verify", best, "--strict"])
    _run(["ledger", str(folder)])

    _say("5. Final metrics on the test split")
    _run(["test", "--config", str(config), "--trainer.default_root_dir", str(folder), "--ckpt_path", best])
    return 0


def _run(arguments: Sequence[str]) -> None:
    status = subprocess.run(_command(arguments), check=False).returncode
    if status != 0:
        raise EnStackError(f"enstack {shlex.join(arguments)} ended with status {status}")


def _run_until_killed(arguments: Sequence[str], checkpoints: Path) -> None:
    """Verifies the checkpoint of the first epoch's end, and kills the run once it has saved inside a later one."""
    process = subprocess.Popen(_command(arguments))
    try:
        first = checkpoints / "last_checkpoint.ckpt"
        _wait_for(process, first, since=0.0)
        _run(["verify", str(first)])
        _wait_for(process, checkpoints / "recovery_checkpoint.ckpt", since=time.time())
    finally:
        process.kill()
        process.wait()
    print(f"killed: process {process.pid} ended by signal {-process.returncode}", flush=True)


def _wait_for(process: subprocess.Popen[bytes], file: Path, since: float) -> None:
    """Waits until the training process has written `file` after the time `since`, in seconds since the epoch."""
    deadline = time.monotonic() + DEMO_SECONDS
    while _written_at(file) <= since:
        if process.poll() is not None:
            raise EnStackError(f"training ended with status {process.returncode} before it could be killed")
        if time.monotonic() > deadline:
            raise EnStackError(f"no {file} after {DEMO_SECONDS} s of training")
        time.sleep(_POLL_SECONDS)


def _written_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # also one that training has just removed
        return 0.0


def _command(arguments: Sequence[str]) -> list[str]:
    print(f"$ enstack {shlex.join(arguments)}", flush=True)
    return [sys.executable, "-m", "enstack_lightning", *arguments]


def _clear(folder: Path) -> None:
    """Removes what an earlier demo left, which it marked before it made anything, and nothing else.

    Raises:
        WrongCallError: the folder is not the demo's.
    """
    mark = folder / _MARK
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        if names and not (names <= {*_MADE, _MARK} and mark.is_file() and mark.read_bytes() == _MARKED.encode()):
            raise WrongCallError(
                f"{folder} holds what no earlier demo left, and nothing in it was touched; name an empty or new folder "
                "by --folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(_MARKED, encoding="utf-8")
    except OSError as e:
        raise WrongCallError(f"--folder {folder} cannot be used: {e.strerror or e}") from e
    for name in _MADE:
        shutil.rmtree(folder / name, ignore_errors=True)


def _say(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack demo",
        description="Trains offline, is killed, verifies what is left, resumes and tests, in a few minutes.",
    )
    parser.add_argument("--config", default="configs/demo.yaml", help="config of the run (default: %(default)s)")
    parser.add_argument("--folder", default="runs/demo", help="folder of the run (default: %(default)s)")
    return parser
