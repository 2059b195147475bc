"""The pieces of a sharded checkpoint's data files, each a file of `torch.save` at a place that `.metadata` gives.

Pieces of the same bytes, such as one learning rate kept for each of 600 parameters, are read once.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead, Named, Role, Span, mismatch, read_deeply
from enstack_lightning.checkpoint.facts import Defect, DefectKind, GlobalFacts, Oddity, ValueFacts
from enstack_lightning.checkpoint.inert_pickle import Global, TensorDescriptor, Unpickled
from enstack_lightning.checkpoint.readers.shard_metadata import Piece
from enstack_lightning.checkpoint.readers.torch_archive import defect_of, globals_seen
from enstack_lightning.checkpoint.source import ContainerDefectError, Source
from enstack_lightning.checkpoint.torch_file import TorchFile

SMALL_PIECE_BYTES = 64 * 2**10
MAX_DIFFERENT_SMALL_PIECES = 5_000
"""About two seconds of work; the options of a flattened optimizer are hundreds, whatever their number of names."""
MAX_HEADERS = 2_000
"""Tensors whose headers are read without `--deep`: half a second of work, and 600 weights with their moments."""
MAX_DEFECTS = 20


@dataclass(frozen=True)
class Naming:
    """What to call a tensor's values in findings."""

    name: str
    role: Role


@dataclass(frozen=True)
class _Opened:
    """A piece that was opened: what its pickle holds, and why that cannot be believed.

    Attributes:
        spans: its records, offsets counted from the piece's beginning.
        number: of a scalar tensor.
    """

    content: Unpickled | None = None
    errors: tuple[ContainerDefectError, ...] = ()
    globals: tuple[Global, ...] = ()
    oddities: tuple[Oddity, ...] = ()
    spans: tuple[Span, ...] = ()
    number: float | None = None
    without_checksum: int = 0

    @property
    def value(self) -> Any:
        return None if self.content is None else self.content.value


@dataclass
class PieceReader:
    """Reads pieces and gathers what it meets.

    Attributes:
        values: of entries that are no tensors, and the numbers in scalar tensors.
        found: the noteworthy values of each chunk.
    """

    deep: DeepRead | None
    defects: list[Defect] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    globals: dict[tuple[Global, bool], GlobalFacts] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    found: list[tuple[Piece, ValueFacts]] = field(default_factory=list)
    _without_checksum: dict[tuple[str, int], int] = field(default_factory=dict)
    _seen: dict[bytes, _Opened] = field(default_factory=dict)
    _headers: int = MAX_HEADERS

    def read_small(self, source: Source, pieces: Sequence[Piece]) -> None:
        """Reads the pieces that are no tensors, and the scalar tensors."""
        small = [piece for piece in pieces if _is_small(piece)]
        source.prefetch((piece.offset, piece.length) for piece in small if piece.length <= SMALL_PIECE_BYTES)
        for piece in small:
            opened = self._open(source, piece)
            if piece.tensor is not None:
                self.values[piece.name] = opened.number
            elif opened.content is not None:
                self.values[piece.name] = opened.value

    def read_tensors(self, source: Source, pieces: Sequence[Piece], namings: Mapping[str, Naming]) -> int:
        """Reads the headers of tensors, and every byte of all pieces if that is asked for.

        Returns:
            The bytes of tensors that were not compared with their checksum.
        """
        if self.deep is not None:
            self._read_deeply(source, [piece for piece in pieces if not _is_compared(piece)], namings)
            self._count_compared([piece for piece in pieces if _is_compared(piece)], namings)
            return 0
        tensors = [piece for piece in pieces if not _is_small(piece)]
        for piece in tensors if source.local_fd() is not None else ():
            if self._headers > 0:
                self._headers -= 1
                self._open(source, piece)
        return sum(piece.data_bytes for piece in tensors)

    def _read_deeply(self, source: Source, pieces: Sequence[Piece], namings: Mapping[str, Naming]) -> None:
        assert self.deep is not None
        spans: list[Span] = []
        labels: dict[str, Piece] = {}
        for piece in pieces:
            naming = namings.get(piece.name, Naming(piece.name, "other"))
            label = f"{naming.name} from {list(piece.start)} on" if piece.is_chunk else naming.name
            labels[label] = piece
            opened = self._open(source, piece, Naming(label, naming.role))
            spans += [
                dataclasses.replace(s, where=f"{piece.where}:{s.where}", offset=s.offset + piece.offset)
                for s in opened.spans
            ]
        try:
            result = read_deeply(source, spans, self.deep)
        except ContainerDefectError as e:
            self._note(pieces[0].file, e)
            return
        except OSError as e:
            self._note(pieces[0].file, _unreadable(e))
            return
        self._add(result.defects)
        self.found += [(labels[value.name], value) for value in result.values if value.name in labels]

    def _count_compared(self, pieces: Sequence[Piece], namings: Mapping[str, Naming]) -> None:
        """Pieces that were read whole before: their bytes are counted, and their numbers looked at."""
        for piece in pieces:
            naming, number = namings.get(piece.name), self.values.get(piece.name)
            if naming is not None and naming.role != "other" and number is not None and not math.isfinite(number):
                shown = str(number)
                self.found.append((piece, ValueFacts(naming.name, naming.role, piece.where, 1, (), shown)))
        if self.deep is not None and self.deep.progress is not None:
            self.deep.progress(sum(piece.length for piece in pieces))

    def without_checksum(self, pieces: Iterable[Piece]) -> int:
        """The bytes of tensors in these pieces, as far as they were opened, that no checksum covers."""
        return sum(self._without_checksum.get((piece.file, piece.offset), 0) for piece in pieces)

    def whole_values(self, namings: Mapping[str, Naming]) -> tuple[ValueFacts, ...]:
        """The noteworthy values of whole tensors, whose chunks may lie in several files."""
        by_name: dict[str, list[tuple[Piece, ValueFacts]]] = {}
        for piece, value in self.found:
            by_name.setdefault(piece.name, []).append((piece, value))
        whole = (_whole(chunks, namings[name].name) for name, chunks in by_name.items() if name in namings)
        return tuple(value for value in whole if value.nonfinite or value.all_zero)

    def _open(self, source: Source, piece: Piece, naming: Naming | None = None) -> _Opened:
        raw = b""
        try:
            if _is_compared(piece):
                raw = source.read_at(piece.offset, piece.length, piece.name)
                opened = self._seen.get(raw)
                if opened is None:
                    if len(self._seen) >= MAX_DIFFERENT_SMALL_PIECES:
                        message = f"more than {MAX_DIFFERENT_SMALL_PIECES:,} small entries differ; the rest is not read"
                        raise ContainerDefectError("damaged", message)
                    opened = self._seen[raw] = _opened(_Bytes(raw), None, compare=True)
            else:
                opened = _opened(source.part(piece.offset, piece.length), naming)
        except ContainerDefectError as e:
            opened = _Opened(errors=(e,))
        except OSError as e:
            opened = _Opened(errors=(_unreadable(e),))
        self._gather(piece, opened)
        return opened

    def _gather(self, piece: Piece, opened: _Opened) -> None:
        self._without_checksum[piece.file, piece.offset] = opened.without_checksum
        for error in opened.errors:
            self._note(piece.where, error)
        # `torch.distributed.checkpoint` loads tensors with weights_only=True and everything else without.
        for g in opened.globals:
            where = f"{piece.where}:data.pkl"
            self.globals.setdefault(
                (g, piece.tensor is None),
                GlobalFacts(g.module, g.name, where, "torch" if piece.tensor is None else "weights_only"),
            )
        for oddity in opened.oddities[: MAX_DEFECTS - len(self.oddities)]:
            self.oddities.append(dataclasses.replace(oddity, where=f"{piece.where}:{oddity.where}"))
        problem = "" if opened.content is None else _why_another(piece, opened.value)
        if problem:
            self._add([Defect(DefectKind.DAMAGED, piece.where, problem)])

    def _note(self, where: str, error: ContainerDefectError) -> None:
        self._add([defect_of(error, where)])

    def _add(self, defects: Iterable[Defect]) -> None:
        """Adds what is not there yet, up to a number: a piece may be read twice, and its damage is one."""
        for defect in defects:
            if defect in self.defects or len(self.defects) > MAX_DEFECTS:
                continue
            if len(self.defects) == MAX_DEFECTS:
                defect = dataclasses.replace(defect, message="further defects of the shards are not listed")
            self.defects.append(defect)


class _Bytes(Source):
    """A piece that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        if offset < 0 or offset + count > self.size:
            raise ContainerDefectError("truncated", f"{what} ends after {self.size - offset:,} of {count:,} bytes")
        return self._data[offset : offset + count]


def _opened(source: Source, naming: Naming | None, compare: bool = False) -> _Opened:
    """Opens a piece.

    Args:
        naming: what to call its tensor, if its spans are wanted.
        compare: whether to compare every record with its checksum at once.
    """
    if source.read_at(0, min(4, source.size)) != b"PK\x03\x04":
        return _Opened(errors=(ContainerDefectError("damaged", "it does not begin like a file of torch.save"),))
    try:
        file = TorchFile(source)
        content = file.read_pickle()
    except ContainerDefectError as e:
        return _Opened(errors=(e,), globals=globals_seen(e))
    errors = list(file.check_storages(content.tensors))
    value = content.value
    number = None
    if isinstance(value, TensorDescriptor) and not math.prod(value.shape) > 1:
        try:
            number = file.read_scalar(value)
        except ContainerDefectError as e:
            errors.append(e)
    if compare:
        errors += _mismatches(source, file)
    named = [Named(naming.name, naming.role, value)] if naming and isinstance(value, TensorDescriptor) else []
    spans = file.spans(named) if naming else []
    return _Opened(
        content,
        (*errors, *file.defects),
        content.globals,
        tuple(file.oddities),
        tuple(spans),
        number,
        file.without_checksum,
    )


def _mismatches(source: Source, file: TorchFile) -> list[ContainerDefectError]:
    found = []
    for span in file.spans():
        actual = zlib.crc32(source.read_at(span.offset, span.size, span.where))
        if span.crc32 is not None and actual != span.crc32:
            found.append(ContainerDefectError("damaged", mismatch(actual, span.crc32), span.where))
    return found


def _unreadable(error: OSError) -> ContainerDefectError:
    return ContainerDefectError("unreadable", f"it cannot be read: {error.strerror or error}")


def _is_small(piece: Piece) -> bool:
    return piece.tensor is None or not piece.shape


def _is_compared(piece: Piece) -> bool:
    """Whether the piece is read whole in any case."""
    return _is_small(piece) and piece.length <= SMALL_PIECE_BYTES


def _why_another(piece: Piece, value: object) -> str:
    """Why a piece is not the chunk that `.metadata` says it is; empty when it is."""
    if piece.tensor is None:
        return ""
    if not isinstance(value, TensorDescriptor):
        return f"it holds a {type(value).__name__} where a tensor is needed"
    if (value.dtype, value.shape) != (piece.tensor.dtype, piece.shape):
        return (
            f"it holds {value.dtype} of shape {list(value.shape)}, and .metadata says {piece.tensor.dtype} of shape "
            f"{list(piece.shape)}"
        )
    return ""


def _whole(chunks: Sequence[tuple[Piece, ValueFacts]], name: str) -> ValueFacts:
    tensor = chunks[0][0].tensor
    firsts = []
    for piece, value in chunks:
        if value.first_nonfinite is not None:
            place = tuple(a + b for a, b in zip(piece.start, value.first_nonfinite, strict=False))
            firsts.append((place, value))
    first, seen = min(firsts, key=lambda f: f[0]) if firsts else (None, chunks[0][1])
    all_zero = sum(value.all_zero for _, value in chunks)
    return dataclasses.replace(
        seen,
        name=name,
        nonfinite=sum(value.nonfinite for _, value in chunks),
        first_nonfinite=first,
        all_zero=tensor is not None and all_zero == tensor.filled_chunks,
    )
