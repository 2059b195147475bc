"""`enstack verify`: reports on checkpoints without loading them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from enstack_lightning.checkpoint import (
    Options,
    Report,
    find_checkpoints,
    newest_good,
    to_json,
    to_table,
    to_text,
    verify_checkpoint,
)
from enstack_lightning.checkpoint.location import LocalLocation
from enstack_lightning.checkpoint.readers import is_enstack_folder


def main(argv: Sequence[str]) -> int:
    """Runs `enstack verify` and returns 0 when every checkpoint may be used, 1 when one may not."""
    arguments = _parser().parse_args(argv[1:])
    options = Options(purpose=arguments.purpose, tolerance=arguments.tolerance)
    paths = [checkpoint for path in arguments.paths for checkpoint in _checkpoints_at(path)]
    reports = [verify_checkpoint(path, options) for path in paths]
    text = _render(reports, arguments.format)
    if arguments.output is None:
        print(text)
    else:
        try:
            Path(arguments.output).write_text(text + "\n", encoding="utf-8")
        except OSError as e:
            print(f"enstack verify: {arguments.output} cannot be written: {e.strerror}", file=sys.stderr)
            return 2
    return 0 if all(r.accepted(arguments.strict) for r in reports) else 1


def _checkpoints_at(path: str) -> list[str]:
    """The checkpoint itself, or every checkpoint in a folder of them."""
    folder = Path(path)
    if folder.is_dir() and not is_enstack_folder(LocalLocation(folder)):
        return [str(p) for p in find_checkpoints(folder)] or [path]
    return [path]


def _render(reports: list[Report], form: str) -> str:
    best = newest_good(reports)
    if form == "json":
        return to_json(reports, best.path if best else None)
    if len(reports) == 1:
        return to_text(reports[0])
    return to_table(reports, best)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack verify",
        description="Checks Lightning .ckpt files and EnStack folders. Nothing in them is executed and torch is not "
        "imported. A folder of checkpoints gives one line each and names the newest good one.",
        epilog="Exit status: 0 pass (warnings allowed), 1 fail (any error; with --strict any warning), 2 wrong call.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="checkpoint, or folder of checkpoints")
    parser.add_argument("--strict", action="store_true", help="warnings fail the verification too")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    parser.add_argument("--output", metavar="FILE", help="write the report to a file")
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("resume", "inference"),
        default="resume",
        help="what the checkpoint is wanted for; inference needs its weights only (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=_whole_number,
        metavar="N",
        help="optimizer steps that may differ from the expected (default: 0 where the checkpoint has exact counters, "
        "else max(20, batches per epoch // 10))",
    )
    return parser


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)
