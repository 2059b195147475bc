"""Where a report goes: standard output as it can show it, or a file that is there only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from enstack_lightning.checkpoint.location import LocalLocation
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.checkpoint.readers.content import ContentKind, content_of
from enstack_lightning.checkpoint.rendering.text import PLAIN, Style
from enstack_lightning.checkpoint.source import ContainerDefectError
from enstack_lightning.errors import EnStackError


class WrongCallError(EnStackError):
    """The command line asks for what cannot or must not be done; nothing was done, and the status is 2."""


class OutputError(EnStackError):
    """A report cannot be written where it was wanted."""


class StandardOutputError(OutputError):
    """Standard output takes no more; the status is 2, so that nobody takes what is missing for a verdict."""


class Output:
    """Text that goes to one place, line by line."""

    def __init__(self, stream: IO[str] | None, name: str, style: Style = PLAIN) -> None:
        self._stream, self._name, self.style = stream, name, style

    def write(self, text: str) -> None:
        """Writes the text and a line's end, so that whoever reads along has it at once.

        Raises:
            BrokenPipeError: the reader has gone.
            OutputError: the disk is full, or the like.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(text.encode("ascii", "backslashreplace").decode() + "\n" if self._ascii else text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            error = StandardOutputError if self._stream is sys.stdout else OutputError
            raise error(f"{self._name} cannot be written: {e.strerror}") from e

    @property
    def _ascii(self) -> bool:
        return not _is_utf8(self._stream)


@contextlib.contextmanager
def output_to(path: str | None) -> Iterator[Output]:
    """The output: standard output, or the file at `path`, which appears when all of it is written.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        yield Output(sys.stdout, "standard output", style_of(sys.stdout))
        return
    if not path:
        raise OutputError("--output names no file; is a variable of the script unset?")
    target = Path(path)
    try:
        if target.is_dir():
            raise OutputError(f"{path} cannot be written: it is a folder")
        if target.exists() and not target.is_file():  # a device or a pipe, which nothing must replace
            with target.open("w", encoding="utf-8") as stream:
                yield Output(stream, path)
            return
        target = Path(os.path.realpath(target))  # not resolve(), which breaks at links that go round in a circle
        part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
        stream = part.open("x", encoding="utf-8")
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e
    try:
        with stream:
            yield Output(stream, path)
        part.replace(target)
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)


def refuse_to_replace(path: str | None, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Nothing, where `--output` may be written: a report may take the place of an earlier one, and of nothing else.

    Args:
        path: the value of `--output`, if there is one.
        inputs: what the command reads.

    Raises:
        WrongCallError: there stands what the command reads, or a checkpoint.
    """
    target = Path(path or "")
    if not path or not target.is_file():
        return
    for given in inputs:
        with contextlib.suppress(OSError, ValueError):  # a URL, or nothing
            if target.samefile(given):
                raise WrongCallError(f"--output {path} would replace what is read, {given}; name another file")
    if _is_checkpoint(target):
        raise WrongCallError(f"--output {path} would replace a checkpoint; name another file")


def _is_checkpoint(file: Path) -> bool:
    try:
        if manifest_path(file).is_file():
            return True
        with LocalLocation(file).open() as source:
            return content_of(source).kind is not ContentKind.OTHER
    except (OSError, ContainerDefectError):
        return False


def say(text: str) -> None:
    """Writes a text to standard output, as it can show it.

    Raises:
        BrokenPipeError: the reader has gone.
        OutputError: the disk is full, or the like.
    """
    with output_to(None) as output:
        output.write(text)


def style_of(stream: IO[str] | None) -> Style:
    """How text on a stream may look: colour, characters beyond ASCII and folded lines are for terminals.

    `NO_COLOR` takes colour away, `FORCE_COLOR` gives it anywhere (https://no-color.org, https://force-color.org).
    """
    terminal = stream is not None and stream.isatty()
    colour = bool(os.environ.get("FORCE_COLOR")) or (terminal and os.environ.get("TERM") != "dumb")
    columns = shutil.get_terminal_size(fallback=(0, 0)).columns if terminal else 0
    return Style(colour and not os.environ.get("NO_COLOR"), terminal and _is_utf8(stream), columns)


def _is_utf8(stream: IO[str] | None) -> bool:
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").replace("_", "") == "utf8"
