"""`enstack`: finds the command and hands over to it. Light commands import no torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from enstack_lightning import __version__
from enstack_lightning.errors import EnStackError

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """One command: what it does, in a line, and the module whose `main(argv)` runs it."""

    summary: str
    module: str


COMMANDS = {
    "fit": Command("train a classifier, or resume training from a checkpoint", "enstack_lightning.cli.training"),
    "validate": Command("evaluate a checkpoint on the validation split", "enstack_lightning.cli.training"),
    "test": Command("evaluate a checkpoint on the test split", "enstack_lightning.cli.training"),
    "predict": Command("classify functions with a checkpoint", "enstack_lightning.cli.training"),
    "verify": Command("check a checkpoint, or a folder of them, without loading it", "enstack_lightning.cli.verify"),
    "manifest": Command("keep digests beside a checkpoint, for verify to compare", "enstack_lightning.cli.manifest"),
    "resume-check": Command(
        "prove that a killed and resumed run equals one that was not", "enstack_lightning.cli.resume_check"
    ),
    "ledger": Command("show that every row was trained once an epoch, across restarts", "enstack_lightning.cli.ledger"),
    "rules": Command("list what verify checks, or explain one rule", "enstack_lightning.cli.rules"),
    "export": Command("turn a .ckpt into an EnStack or Hugging Face folder", "enstack_lightning.cli.export"),
    "demo": Command("train offline, be killed, verify what is left, resume", "enstack_lightning.cli.demo"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 the call itself is wrong."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `| head` does
        status = EXIT_FAILED
    return _what_is_left_written() or status


def _what_is_left_written() -> int:
    """Lets standard output take the rest of what was written to it: 0, or the status where it does not.

    What it does not take would fail again when Python ends.
    """
    try:
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return EXIT_FAILED
        print(f"enstack: standard output cannot be written: {e.strerror}", file=sys.stderr)
        return EXIT_WRONG_CALL
    return 0


def _run(arguments: list[str]) -> int:
    from enstack_lightning.checkpoint.rendering.plain import printable
    from enstack_lightning.cli.output import StandardOutputError, WrongCallError, say

    name = arguments[0] if arguments else "--help"
    command = f"enstack {name}" if name in COMMANDS else "enstack"
    try:
        if name in ("-h", "--help"):
            say(_help())
            return 0 if arguments else EXIT_WRONG_CALL
        if name == "--version":
            say(f"enstack {__version__}")
            return 0
        if name not in COMMANDS:
            print(f"enstack: {name!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
            return EXIT_WRONG_CALL
        return int(import_module(COMMANDS[name].module).main(arguments))
    except EnStackError as e:
        lines = map(printable, re.split(r"\n(?=  )", str(e)))  # a list has its entries indented
        print(f"{command}: {chr(10).join(lines)}", file=sys.stderr)
        return EXIT_WRONG_CALL if isinstance(e, (WrongCallError, StandardOutputError)) else EXIT_FAILED
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: enstack COMMAND ...",
        "",
        "Checkpoint verification and safe resume for PyTorch Lightning.",
        "",
        *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "enstack COMMAND --help says more. Exit status: 0 done, 1 failed, 2 the call itself is wrong.",
    ]
    return "\n".join(lines)
