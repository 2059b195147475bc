"""Reading every byte once: checksums compared and values that are not finite found, at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from enstack_lightning.checkpoint.facts import Defect, ValueFacts
from enstack_lightning.checkpoint.source import Source

Progress = Callable[[int], None]
"""Called with the number of bytes just read, from any thread."""


@dataclass(frozen=True)
class DeepRead:
    """Asks a reader to read every byte; where a reader is given None instead, it reads headers and scalars only."""

    progress: Progress | None = None


@dataclass(frozen=True)
class NamedTensor:
    """A tensor within a span: `stride` and `offset` in elements, `dtype` in torch's names."""

    name: str
    role: Literal["weight", "optimizer", "other"]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Span:
    """A run of bytes that holds tensors: a record of a torch file, a tensor of a safetensors file.

    Attributes:
        where: the file and record, for findings.
        offset: where it begins in the source, in bytes.
        size: bytes.
        crc32: the CRC-32 it was saved with; None where the format keeps none.
        byteorder: of its numbers, as the struct module writes it.
    """

    where: str
    offset: int
    size: int
    crc32: int | None
    tensors: tuple[NamedTensor, ...]
    byteorder: Literal["<", ">"] = "<"


@dataclass(frozen=True)
class DeepResult:
    """What reading every byte found. `verified_bytes` were compared with a checksum and agreed."""

    defects: tuple[Defect, ...]
    values: tuple[ValueFacts, ...]
    verified_bytes: int


def read_deeply(source: Source, spans: Sequence[Span], deep: DeepRead) -> DeepResult:
    """Reads every span once, on all cores."""
    raise NotImplementedError
