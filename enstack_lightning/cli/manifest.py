"""`enstack manifest`: writes the digests of checkpoints that verify, so that later damage of any kind is found."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, judge, verify_checkpoint
from enstack_lightning.checkpoint.deep import Progress
from enstack_lightning.checkpoint.manifest import write_manifest
from enstack_lightning.checkpoint.search import checkpoints_at
from enstack_lightning.checkpoint.wording import many, size
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
        report = _verified(path, deep, read)
        if report.verdict is Verdict.FAIL:
            errors = report.of(Severity.ERROR)
            said = f"{errors[0].code} {errors[0].message}" if errors else "nothing in it could be verified"
            more = f" (and {many(len(errors) - 1, 'more error')})" if len(errors) > 1 else ""
            print(f"enstack manifest: {path} gets no manifest, as it fails: {said}{more}", file=sys.stderr)
            refused += 1
            continue
        try:
            written = _write(path, report, read)
            if bar:
                bar.advance()
                bar.clear()
            print(f"{written}  digests of {size(sum(f.size for f in report.facts.files))}", flush=True)
        except CheckpointError as e:
            print(f"enstack manifest: {e}", file=sys.stderr)
            refused += 1
    return 1 if refused else 0


def _verified(path: str, deep: bool, read: Progress | None) -> Report:
    """The report on a checkpoint, without regard to an older manifest; a model alone is judged as one."""
    options = Options(deep=deep, ignore=(_MANIFEST_RULES,))
    report = verify_checkpoint(path, options, read)
    if report.facts.model_only:
        findings = judge(report.facts, dataclasses.replace(options, purpose="inference"))
        return dataclasses.replace(report, findings=findings)
    return report


def _write(path: str, report: Report, read: Progress | None) -> str:
    facts, counters = report.facts, report.facts.progress
    written = write_manifest(path, read, format=facts.format, global_step=counters.global_step, epoch=counters.epoch)
    return str(written)


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
