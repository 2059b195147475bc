"""Reading every byte once: checksums compared and values that are not finite found, at the speed of memory."""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from enstack_lightning.checkpoint.facts import Defect, DefectKind, ValueFacts
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.number_formats import ByteOrder
from enstack_lightning.checkpoint.source import ContainerDefectError, Source, joined
from enstack_lightning.checkpoint.tensor_values import CHUNK_BYTES, Budget, SpanValues, Unsearched

if TYPE_CHECKING:
    from enstack_lightning.checkpoint.number_formats import Bytes

SEGMENT_BYTES = 32 * CHUNK_BYTES
"""What a thread takes at a time of a storage that is larger."""

WINDOW_BYTES = 16 * 2**20
"""What is asked of a remote file at a time."""

MIN_PARALLEL_BYTES = 8 * 2**20
MIN_BUDGET_BYTES = 256 * 2**20
MAX_THREADS = 32

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
    """

    where: str
    offset: int
    size: int
    crc32: int | None
    tensors: tuple[NamedTensor, ...]
    byteorder: ByteOrder = "<"


@dataclass(frozen=True)
class DeepResult:
    """What reading every byte found. `verified_bytes` were compared with a checksum and agreed."""

    defects: tuple[Defect, ...]
    values: tuple[ValueFacts, ...]
    verified_bytes: int


def read_deeply(source: Source, spans: Sequence[Span], deep: DeepRead) -> DeepResult:
    """Reads every span once, on all cores: compares checksums, and finds values that are not finite or all zero.

    Memory is bounded by a buffer of a megabyte a thread. What cannot be read is a defect, and the rest is read all the
    same; so is a change of the file meanwhile.
    """
    reading = _Reading(source, spans, deep)
    reading.run()
    return reading.result()


def mismatch(actual: int, saved: int) -> str:
    """The sentence on a record whose bytes are not those that were saved."""
    return f"its bytes have CRC-32 {actual:08x} and were saved with {saved:08x}: they have changed"


class _Segment(NamedTuple):
    """A part of a span that one thread reads."""

    span: int
    start: int
    end: int


class _Reading:
    def __init__(self, source: Source, spans: Sequence[Span], deep: DeepRead) -> None:
        self._source = source
        self._spans = spans
        self._values = {i: values for i, span in enumerate(spans) if span.tensors and (values := SpanValues(span))}
        self._progress = deep.progress
        self._crc32, self._combine = _checksum_functions()
        self._local = source.local_fd()
        self._segments = deque(self._cut())
        self._checksums: dict[_Segment, int] = {}
        self._defects: dict[int, Defect] = {}
        self._stopped = False

    def run(self) -> None:
        threads = min(_cores(), len(self._segments)) if self._local is not None else 1
        if threads <= 1 or sum(span.size for span in self._spans) < MIN_PARALLEL_BYTES:
            self._work()
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            try:
                for work in [pool.submit(self._work) for _ in range(threads)]:
                    work.result()
            finally:
                self._stopped = True  # an interrupt, or an error in one thread, must not wait for the others to finish

    def result(self) -> DeepResult:
        verified = 0
        checksums = self._checksums_of_spans()
        for i, span in enumerate(self._spans):
            if span.crc32 is None or i in self._defects:
                continue
            if checksums[i] == span.crc32:
                verified += span.size
            else:
                self._defects[i] = Defect(DefectKind.DAMAGED, span.where, mismatch(checksums[i], span.crc32))
        values, unsearched = self._found_values()
        defects = [*(self._defects[i] for i in sorted(self._defects)), *unsearched]
        if self._source.has_changed():
            where = self._spans[0].where.partition(":")[0] if self._spans else ""
            defects.append(Defect.changed(where))
        return DeepResult(tuple(defects), tuple(values), verified)

    def _cut(self) -> Iterator[_Segment]:
        """The spans in pieces, in the order of the file; a span is one piece where checksums cannot be combined."""
        for i in sorted(range(len(self._spans)), key=lambda i: self._spans[i].offset):
            size = self._spans[i].size
            step = SEGMENT_BYTES if self._combine is not None else max(size, 1)
            for start in range(0, size, step):
                yield _Segment(i, start, min(start + step, size))

    def _work(self) -> None:
        """Reads segments until none is left."""
        import numpy as np

        buffer = np.empty(CHUNK_BYTES, np.uint8)
        window = None if self._local is not None else _Window(self._source, self._spans)
        while not self._stopped:
            try:
                segment = self._segments.popleft()
            except IndexError:
                return
            span = self._spans[segment.span]
            try:
                self._checksums[segment] = self._read_segment(segment, buffer, window)
            except ContainerDefectError as e:
                self._defects[segment.span] = Defect(DefectKind(e.kind), span.where, str(e))
            except OSError as e:
                self._defects[segment.span] = Defect.unreadable(span.where, e)

    def _read_segment(self, segment: _Segment, buffer: Bytes, window: _Window | None) -> int:
        """Reads one segment chunk by chunk; returns its CRC-32."""
        span, values = self._spans[segment.span], self._values.get(segment.span)
        checksum = 0
        for at in range(segment.start, segment.end, CHUNK_BYTES):
            if self._stopped:
                break
            data = buffer[: min(CHUNK_BYTES, segment.end - at)]
            if window is not None:
                data = window.read(span.offset + at, len(data))
            elif self._local is not None:
                fd, base = self._local
                offset = base + span.offset + at
                count = read_into(fd, data.data, offset)
                if count < len(data):
                    raise ContainerDefectError(
                        "truncated", f"the file ends at byte {offset + count:,}, in the middle of it"
                    )
            if span.crc32 is not None:
                checksum = self._crc32(data, checksum)
            if values is not None:
                values.examine(at // CHUNK_BYTES, data)
            if self._progress is not None:
                self._progress(len(data))
        return checksum

    def _checksums_of_spans(self) -> list[int]:
        checksums = [0] * len(self._spans)
        for segment in sorted(self._checksums):
            checksum = self._checksums[segment]
            if segment.start and self._combine is not None:
                checksum = self._combine(checksums[segment.span], checksum, segment.end - segment.start)
            checksums[segment.span] = checksum
        return checksums

    def _found_values(self) -> tuple[list[ValueFacts], list[Defect]]:
        budget = Budget(2 * sum(span.size for span in self._spans) + MIN_BUDGET_BYTES)
        values: list[ValueFacts] = []
        unsearched: list[Defect] = []
        for i, judged in self._values.items():
            span = self._spans[i]
            if i in self._defects and self._defects[i].kind is not DefectKind.DAMAGED:
                continue
            try:
                for found in judged.found(partial(self._read_again, span), budget):
                    if isinstance(found, ValueFacts):
                        values.append(found)
                    else:
                        unsearched.append(_unsearched(found))
            except (ContainerDefectError, OSError) as e:
                unsearched.append(Defect(DefectKind.UNREADABLE, span.where, f"it cannot be read again: {e}"))
        return values, unsearched

    def _read_again(self, span: Span, offset: int, count: int) -> Bytes:
        import numpy as np

        return np.frombuffer(self._source.read_at(span.offset + offset, count, span.where), np.uint8)


class _Window:
    """A few megabytes of a remote file, so that neighbouring chunks and small spans take one request together."""

    def __init__(self, source: Source, spans: Sequence[Span]) -> None:
        self._source = source
        self._runs = joined((span.offset, span.offset + span.size) for span in spans if span.size)
        self._start = 0
        self._data = b""

    def read(self, offset: int, count: int) -> Bytes:
        import numpy as np

        if not self._start <= offset <= offset + count <= self._start + len(self._data):
            run = bisect_right(self._runs, (offset, sys.maxsize)) - 1
            self._data = b""
            self._data = self._source.read_at(offset, max(min(self._runs[run][1] - offset, WINDOW_BYTES), count))
            self._start = offset
        return np.frombuffer(self._data, np.uint8, count, offset - self._start)


def read_into(fd: int, block: memoryview, offset: int) -> int:
    """Fills a block from a file; returns its bytes, which are fewer only where the file ends.

    Some file systems give less at a time than they are asked for.
    """
    done = 0
    while done < len(block) and (count := os.preadv(fd, [block[done:]], offset + done)):
        done += count
    return done


def _unsearched(found: Unsearched) -> Defect:
    return Defect(
        DefectKind.DAMAGED,
        found.where,
        f"it holds values that are not finite, and whether they are in {found.name:.80} cannot be told: "
        "its shape and strides let its values overlap too often",
    )


def _checksum_functions() -> tuple[Callable[[Bytes, int], int], Callable[[int, int, int], int] | None]:
    """CRC-32 of bytes continued from another, and that of two parts joined; isal's are four times as fast as zlib's."""
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib.crc32, None  # type: ignore[return-value]
    return isal_zlib.crc32, isal_zlib.crc32_combine


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(len(affinity(0)) if affinity is not None else os.cpu_count() or 1, MAX_THREADS)
