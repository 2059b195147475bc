"""`enstack verify`: reports on checkpoints without loading them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enstack_lightning import __version__
from enstack_lightning.checkpoint import (
    RULES,
    Options,
    Report,
    checkpoints_at,
    newest_good,
    to_text,
    verify_checkpoint,
)
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.checkpoint.rendering.text import Tally, to_brief, to_line
from enstack_lightning.cli.output import Output, OutputError, WrongCallError, output_to, refuse_to_replace
from enstack_lightning.cli.progress import ProgressBar, bytes_to_read, wants_progress
from enstack_lightning.errors import CheckpointError

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2
PROGRESS_FROM = 10
"""From so many checkpoints on a terminal shows how far the verification is; with `--deep` it always does."""


@dataclass(frozen=True)
class Batch:
    """The checkpoints of one call and what is wanted of them.

    Attributes:
        one: the user named a single checkpoint: it is reported on in full.
    """

    paths: Sequence[str]
    options: Options
    strict: bool
    progress: ProgressBar | None

    @property
    def one(self) -> bool:
        return len(self.paths) == 1

    def reports(self) -> Iterator[Report]:
        """The report on each checkpoint, as soon as it is done."""
        if self.progress is None:
            yield from (verify_checkpoint(path, self.options) for path in self.paths)
            return
        with self.progress as bar:
            for path in self.paths:
                report = verify_checkpoint(path, self.options, bar.read)
                bar.advance()
                bar.clear()
                yield report


def main(argv: Sequence[str]) -> int:
    """Runs `enstack verify`: 0 when every checkpoint may be used, 1 when one may not, 2 for a wrong call."""
    arguments = _parser().parse_args(argv[1:])
    try:
        options = _options(arguments)
        paths = list(dict.fromkeys(_checkpoints_at(arguments.paths)))
        refuse_to_replace(arguments.output, [*paths, *([arguments.config] if arguments.config else [])])
    except WrongCallError as e:
        return _wrong_call(str(e))
    try:
        with output_to(arguments.output) as output:
            batch = Batch(paths, options, arguments.strict, _progress(paths, arguments))
            return 0 if _WRITERS[arguments.format](batch, output, arguments) else EXIT_FAILED
    except OutputError as e:
        if arguments.output is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in it would fail again
        return _wrong_call(str(e))


def _wrong_call(message: str) -> int:
    print(f"enstack verify: {printable(message)}", file=sys.stderr)
    return EXIT_WRONG_CALL


def _checkpoints_at(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        try:
            yield from checkpoints_at([path])
        except (CheckpointError, OSError, ValueError):  # the verification says what is wrong with it
            yield path


def _progress(paths: Sequence[str], arguments: argparse.Namespace) -> ProgressBar | None:
    if arguments.quiet or not (arguments.deep or len(paths) >= PROGRESS_FROM) or not wants_progress():
        return None
    return ProgressBar(len(paths), sum(map(_bytes_read_deeply, paths)) if arguments.deep else 0)


def _bytes_read_deeply(path: str) -> int:
    """All of them, and once more for a manifest's digests."""
    return bytes_to_read(path) * (2 if manifest_path(path).exists() else 1)


# The forms. Each writes the reports and says whether all of them are accepted.


def _write_text(batch: Batch, output: Output, arguments: argparse.Namespace) -> bool:
    style, accepted, tally = output.style, True, Tally()
    width = max(len(style.line(path)) for path in batch.paths)

    def written() -> Iterator[Report]:
        nonlocal accepted
        for report in batch.reports():
            if arguments.quiet:
                text = to_brief(report, style)
            elif batch.one or arguments.verbose:
                text = to_text(report, style, verbose=arguments.verbose, strict=batch.strict)
                text += "" if batch.one else "\n"
            else:
                text = to_line(report, style, width)
            output.write(text)
            tally.add(report)
            accepted = accepted and report.accepted(batch.strict)
            if report.accepted(batch.strict):
                yield report

    best = newest_good(written())
    if not batch.one and not arguments.quiet:
        closing = tally.closing(best, batch.options.purpose, style)
        output.write(closing.lstrip("\n") if arguments.verbose else closing)
    return accepted


def _write_json(batch: Batch, output: Output, arguments: argparse.Namespace) -> bool:
    from enstack_lightning.checkpoint.rendering.json import checkpoint_object, document

    objects, best, accepted = _collected(batch, checkpoint_object)
    output.write(document(objects, best))
    return accepted


def _write_sarif(batch: Batch, output: Output, arguments: argparse.Namespace) -> bool:
    from enstack_lightning.checkpoint.rendering.sarif import CheckpointResults, log, results_of

    results: list[CheckpointResults]
    results, _, accepted = _collected(batch, results_of)
    output.write(log(results, __version__))
    return accepted


def _write_html(batch: Batch, output: Output, arguments: argparse.Namespace) -> bool:
    from enstack_lightning.checkpoint.rendering.html import CheckpointPart, page, part_of

    parts: list[CheckpointPart]
    parts, best, accepted = _collected(batch, part_of)
    output.write(page(parts, best, __version__))
    return accepted


def _collected(batch: Batch, made_of: Callable[[Report], Any]) -> tuple[list[Any], str | None, bool]:
    """What is made of each report, the path of the newest good one, and whether all are accepted."""
    made: list[Any] = []
    accepted = True

    def seen() -> Iterator[Report]:
        nonlocal accepted
        for report in batch.reports():
            made.append(made_of(report))
            accepted = accepted and report.accepted(batch.strict)
            if report.accepted(batch.strict):
                yield report

    best = newest_good(seen())
    return made, best.path if best else None, accepted


_WRITERS: dict[str, Callable[[Batch, Output, argparse.Namespace], bool]] = {
    "text": _write_text,
    "json": _write_json,
    "sarif": _write_sarif,
    "html": _write_html,
}


# The options.


def _options(arguments: argparse.Namespace) -> Options:
    """What the command line and the run's configuration ask for.

    Raises:
        WrongCallError: they ask for what is not there.
    """
    options = Options(
        purpose=arguments.purpose,
        tolerance=arguments.tolerance,
        deep=arguments.deep,
        select=_codes("--select", arguments.select),
        ignore=_codes("--ignore", arguments.ignore),
        allow_globals=frozenset(arguments.allow_global),
    )
    if arguments.config is None:
        return options
    config = _run_config(Path(arguments.config))
    vouched = options.allow_globals | frozenset(_vouched_in(config))
    return dataclasses.replace(options, run_config=config, allow_globals=vouched)


def _codes(option: str, given: Sequence[str]) -> tuple[str, ...]:
    codes = tuple(code for text in given for part in text.split(",") if (code := part.strip().upper()))
    if any(not text.strip(", ") for text in given):
        raise WrongCallError(f"{option} names no rule; is a variable of the script unset?")
    for code in codes:
        if not any(known.startswith(code) for known in RULES):
            raise WrongCallError(f"{option} {code}: no rule's code is or begins so; `enstack rules` lists them")
    return codes


def _run_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise WrongCallError(f"--config {path} cannot be read: {e.strerror or e}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1:,})"
        raise WrongCallError(f"--config {path} is no YAML{place}: {getattr(e, 'problem', None) or e}") from e
    if not isinstance(config, dict):
        raise WrongCallError(f"--config {path} holds no run: it must be a mapping with trainer, model and data")
    return config


def _vouched_in(config: Mapping[str, Any]) -> Iterator[str]:
    """The classes that the run's own `CheckpointGuard` is told to allow."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    guards = [
        entry.get("init_args")
        for entry in entries
        if isinstance(entry, Mapping) and str(entry.get("class_path")).endswith("CheckpointGuard")
    ]
    for guard in [*guards, config.get("checkpoint_guard")]:
        names = guard.get("allow_globals") if isinstance(guard, Mapping) else None
        for name in [names] if isinstance(names, str) else names or ():
            try:
                yield _dotted(name if isinstance(name, str) else str(name))
            except argparse.ArgumentTypeError as e:
                raise WrongCallError(f"--config: allow_globals: {e}") from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack verify",
        description="Checks checkpoints of Lightning, transformers, torch.distributed.checkpoint and EnStack, and "
        "torch and safetensors files. Nothing in them is executed and torch is not imported. A folder of checkpoints "
        "gives one line each and names the newest good one.",
        epilog="Exit status: 0 pass (warnings allowed), 1 fail (any error; with --strict any warning), 2 wrong call.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="checkpoint, folder of checkpoints, quoted pattern or URL"
    )
    parser.add_argument("--deep", action="store_true", help="read every byte: compare checksums, find NaN and infinity")
    parser.add_argument("--strict", action="store_true", help="warnings fail the verification too")
    parser.add_argument("--format", choices=tuple(_WRITERS), default="text", help="form of the report (default: text)")
    parser.add_argument("--output", metavar="FILE", help="write the report to a file instead of standard output")
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
    parser.add_argument(
        "--select",
        action="append",
        default=[],
        metavar="CODES",
        help="apply only these rules: codes or their beginnings, with commas (CK4,CK501); `enstack rules` lists them",
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="CODES", help="leave these rules out")
    parser.add_argument(
        "--config", metavar="RUN.yaml", help="compare with the configuration of the run that is to resume"
    )
    parser.add_argument(
        "--allow-global",
        action="append",
        default=[],
        type=_dotted,
        metavar="MODULE.NAME",
        help="vouch for a class of your own that the checkpoint names; repeatable",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="verdict and path only (text)")
    amount.add_argument("-v", "--verbose", action="store_true", help="list every rule that passed (text)")
    return parser


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def _dotted(text: str) -> str:
    if "." not in text or not all(part and not part[0].isspace() for part in text.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is no MODULE.NAME")
    return text
