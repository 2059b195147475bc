"""`enstack manifest`: writes the digests of checkpoints that verify, so that later damage of any kind is found."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, judge, verify_checkpoint
from enstack_lightning.checkpoint.deep import Progress
from enstack_lightning.checkpoint.manifest import FOLDER_MANIFEST, digest_files, write_manifest
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.checkpoint.search import checkpoints_at
from enstack_lightning.checkpoint.wording import many, size
from enstack_lightning.cli.output import output_to
from enstack_lightning.cli.progress import ProgressBar, bytes_to_read, wants_progress
from enstack_lightning.errors import CheckpointError

_MANIFEST_RULES = "CK8"


def main(argv: Sequence[str]) -> int:
    """Runs `enstack manifest` and returns 0 when every checkpoint has its manifest, 1 when one was refused."""
    arguments = _parser().parse_args(argv[1:])
    paths = list(checkpoints_at(arguments.paths))
    if not wants_progress():
        return _write_all(paths, arguments.deep, None)
    with ProgressBar(len(paths), sum(map(bytes_to_read, paths)) * (2 if arguments.deep else 1)) as bar:
        return _write_all(paths, arguments.deep, bar)


def _write_all(paths: Sequence[str], deep: bool, bar: ProgressBar | None) -> int:
    refused = 0
    read = bar.read if bar else None
    for path in paths:
        stands = _as_it_stands(path)
        report = _verified(path, deep, read)
        try:
            if report.verdict is Verdict.FAIL:
                raise CheckpointError(f"{path} gets no manifest, as it fails: {_first_error(report)}")
            written = _write(path, stands, report, read)
        except CheckpointError as e:
            print(f"enstack manifest: {printable(str(e))}", file=sys.stderr)
            refused += 1
            continue
        if bar:
            bar.advance()
            bar.clear()
        with output_to(None) as output:
            output.write(f"{printable(written)}  digests of {size(sum(f.size for f in report.facts.files))}")
    return 1 if refused else 0


def _first_error(report: Report) -> str:
    errors = report.of(Severity.ERROR)
    said = f"{errors[0].code} {errors[0].message}" if errors else "nothing in it could be verified"
    return said + (f" (and {many(len(errors) - 1, 'more error')})" if len(errors) > 1 else "")


def _as_it_stands(path: str) -> dict[str, tuple[int, ...]]:
    """What tells each file of a checkpoint from one that takes its place; what cannot be asked is left out."""
    place = Path(path)
    files = place.rglob("*") if place.is_dir() else (place,)
    stands: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.parent == place and FOLDER_MANIFEST in file.name:
            continue  # an older manifest, or one in the making
        try:
            status = file.stat()
        except (OSError, ValueError):
            continue
        name = str(file.relative_to(place)) if place.is_dir() else file.name
        stands[name] = () if file.is_dir() else (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return stands


def _verified(path: str, deep: bool, read: Progress | None) -> Report:
    """The report on a checkpoint, without regard to an older manifest; a model alone is judged as one."""
    options = Options(deep=deep, ignore=(_MANIFEST_RULES,))
    report = verify_checkpoint(path, options, read)
    if report.facts.model_only:
        findings = judge(report.facts, dataclasses.replace(options, purpose="inference"))
        return dataclasses.replace(report, findings=findings)
    return report


def _write(path: str, stands: dict[str, tuple[int, ...]], report: Report, read: Progress | None) -> str:
    """Digests what was verified, and nothing that took its place meanwhile.

    Raises:
        CheckpointError: a file changed since, or cannot be read, or the manifest cannot be written.
    """
    entries = digest_files(path, lambda name: True, read)
    now = _as_it_stands(path)
    changed = sorted(name for name in {*stands, *now} if stands.get(name) != now.get(name))
    if changed:
        more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        raise CheckpointError(f"{path} gets no manifest: {changed[0]}{more} changed after it was verified; try again")
    counters = report.facts.progress
    form = report.facts.format
    return os.fspath(
        write_manifest(path, format=form, global_step=counters.global_step, epoch=counters.epoch, known=entries)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack manifest",
        description="Verifies checkpoints and writes, beside each that passes, a manifest: the size and BLAKE3 digest "
        "of every file of it. `enstack verify` compares sizes with it, and with --deep digests, which finds damage "
        "that the checkpoint's own format cannot show. A manifest that is there already is written anew.",
        epilog="Exit status: 0 all written, 1 a checkpoint fails or its manifest cannot be written, 2 wrong call.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="checkpoint, or folder of checkpoints")
    parser.add_argument("--deep", action="store_true", help="verify every byte before its digest is taken")
    return parser
