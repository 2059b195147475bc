"""The sample ledger's file: which rows one process trained, batch by batch, from one start of a run to its end.

Every start writes a file of its own on each process, `start-0001-rank-0.ledger`, and only appends to it. So a file is
never repaired or rewritten, and a kill can tear nothing but its last record.

The rows themselves are kept, sorted, as gaps of few bits: about log2(rows / batch size) + 2 bits a row, which is a byte
or two. A digest of a batch would be smaller only from some rows on, could name no row, and would have to be compared
with an order drawn again by the generator of the torch that trained. The set of rows is evidence by itself: the reader
needs no torch, no data and no seed, and the order inside a batch, which changes nothing, costs nothing.

The bytes. A file is `ENSLEDG1` and then records:

    head      1 byte     what it is, below
    length    varint     bytes of the payload
    payload   length     below
    crc       4 bytes    CRC-32 (zlib), little-endian, of head, length and payload, continued from the CRC of the
                         record before (of the 8 bytes `ENSLEDG1` for the first), so that a record left out is noticed

A varint is LEB128: seven bits a byte, the lowest first, the highest bit set on all but the last.

    head      payload
    48  'H'   JSON: the start, see `Header`. The first record, and only the first.
    4C  'L'   JSON: what the training loader is set to give in an epoch, see `Loader`. Holds until the next.
    50  'P'   varints epoch, batch, global step: the position of the next batch. Without it a batch is the one after
              the batch before, and the step that of the batch before.
    45  'E'   varint epoch: its last batch is done.
    80-8F     a batch that was trained. Bits of the head: 1, an optimizer step followed (the global step is one more);
              2, it added to gradients from before the start; 4, the rows follow; 8, it gave no loss, so no gradient.
              Payload: varint number of rows (0: not known) and, with bit 4, one byte `width` (1 to 63) and the gaps:
              the rows sorted, the first as it is, each other as its distance to the one before. Gaps are big-endian
              numbers of `width` bits, eight in `width` bytes; the last, incomplete group ends with zero bits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

MAGIC = b"ENSLEDG1"
VERSION = 1
SUFFIX = ".ledger"
FOLDER = "ledger"

MAX_ROW = 2**63 - 1
MAX_PAYLOAD_BYTES = 2**26
MAX_JSON_BYTES = 2**16

STEPPED, CONTINUED, NAMED, WITHOUT_LOSS = 1, 2, 4, 8
_HEADER, _LOADER, _POSITION, _EPOCH_END, _BATCH = 0x48, 0x4C, 0x50, 0x45, 0x80
_CRC_BYTES = 4
_GROUP = 8


class LedgerDefectError(ValueError):
    """A ledger's file holds what no ledger's file can hold."""


@dataclass(frozen=True)
class Header:
    """One start of a run, as one of its processes tells it.

    Attributes:
        id: 16 hexadecimal digits drawn for this start, the same on all its processes.
        start: number of the start in its folder, from 1.
        created: when, UTC, `2026-01-31T12:00:00Z`.
        rank: number of the process.
        world_size: how many there are.
        parent: id of the start whose checkpoint this one goes on from; None for a fresh start.
        parent_batches: batches of the parent that this checkpoint contains, on each process.
        checkpoint: path of that checkpoint.
        global_step: optimizer steps of the run before this start.
    """

    id: str
    start: int
    created: str
    rank: int
    world_size: int
    parent: str | None = None
    parent_batches: int = 0
    checkpoint: str | None = None
    global_step: int = 0


@dataclass(frozen=True)
class Loader:
    """What a process's training loader is set to give in an epoch; None where it cannot be known.

    Attributes:
        rows: rows of the data set, over all processes.
        batches: batches of an epoch on this process.
        planned_rows: rows in these batches.
        drop_last: an incomplete last batch is left out.
        limited: the Trainer takes fewer batches than the loader has (`limit_train_batches`).
        replacement: the sampler may draw a row several times.
        sampler: its class.
    """

    rows: int | None = None
    batches: int | None = None
    planned_rows: int | None = None
    drop_last: bool = False
    limited: bool = False
    replacement: bool = False
    sampler: str = ""


class EpochEnd(NamedTuple):
    """The last batch of an epoch is done."""

    epoch: int


class Tail(NamedTuple):
    """What stands after the last record that can be read.

    Attributes:
        at: byte at which it begins.
        damage: what is wrong with it; empty where a process was killed while it wrote its last record.
    """

    at: int
    damage: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that was trained; `global_step` is that after it."""

    epoch: int
    batch: int
    global_step: int
    flags: int
    num_rows: int
    packed: bytes

    @property
    def stepped(self) -> bool:
        """Whether an optimizer step followed."""
        return bool(self.flags & STEPPED)

    @property
    def continued(self) -> bool:
        """Whether it added to gradients from before the start."""
        return bool(self.flags & CONTINUED)

    @property
    def has_loss(self) -> bool:
        """Whether `training_step` gave a loss."""
        return not self.flags & WITHOUT_LOSS

    def rows(self) -> list[int] | None:
        """The rows, sorted; None where they are not known."""
        return unpack_rows(self.packed, self.num_rows) if self.flags & NAMED else None


Record = Header | Loader | Batch | EpochEnd | Tail


class Encoder:
    """Turns what happens into the bytes to append; it knows what the reader will take for granted."""

    def __init__(self) -> None:
        self._crc = zlib.crc32(MAGIC)
        self._next = (-1, 0, 0)

    def begin(self, header: Header) -> bytes:
        """The beginning of a file."""
        return MAGIC + self._record(_HEADER, _json(asdict(header)))

    def loader(self, loader: Loader) -> bytes:
        """What the following epochs are planned to be."""
        return self._record(_LOADER, _json(asdict(loader)))

    def epoch_end(self, epoch: int) -> bytes:
        """The epoch's last batch is done."""
        return self._record(_EPOCH_END, _varint(epoch))

    def batch(
        self, epoch: int, batch: int, global_step: int, flags: int, rows: Sequence[int] | None, num_rows: int
    ) -> bytes:
        """A batch that was trained.

        Args:
            epoch: Number of the epoch, from 0.
            batch: Number of the batch in it, from 0.
            global_step: Optimizer steps of the run after this batch.
            flags: `STEPPED`, `CONTINUED` and `WITHOUT_LOSS`.
            rows: The rows, from 0 to 2**63 - 1, in any order; None if they are not known.
            num_rows: How many they are; 0 if that is not known either.
        """
        before = (epoch, batch, global_step - (flags & STEPPED))
        record = b"" if before == self._next else self._record(_POSITION, b"".join(map(_varint, before)))
        self._next = (epoch, batch + 1, global_step)
        payload = _varint(num_rows)
        if rows:
            flags, payload = flags | NAMED, payload + pack_rows(rows)
        return record + self._record(_BATCH | flags, payload)

    def _record(self, head: int, payload: bytes) -> bytes:
        record = bytes((head,)) + _varint(len(payload)) + payload
        self._crc = zlib.crc32(record, self._crc)
        return record + self._crc.to_bytes(_CRC_BYTES, "little")


def pack_rows(rows: Sequence[int]) -> bytes:
    """The width and the gaps of the rows, sorted.

    Example:
        >>> unpack_rows(pack_rows([7, 300, 2]), 3), len(pack_rows(range(0, 1600, 100)))
        ([2, 7, 300], 15)
    """
    ordered = sorted(rows)
    gaps = [ordered[0], *(b - a for a, b in pairwise(ordered))]
    width = max(1, max(gaps).bit_length())
    packed = [bytes((width,))]
    for first in range(0, len(gaps), _GROUP):
        group = gaps[first : first + _GROUP]
        bits = 0
        for gap in group:
            bits = bits << width | gap
        length = -(-len(group) * width // 8)
        packed.append((bits << (length * 8 - len(group) * width)).to_bytes(length, "big"))
    return b"".join(packed)


def unpack_rows(packed: bytes, num_rows: int) -> list[int]:
    """The rows that `pack_rows` was given, sorted.

    Raises:
        LedgerDefectError: these are no such bytes.
    """
    width = packed[0] if packed else 0
    bits = num_rows * width
    if not 1 <= width <= 63 or len(packed) - 1 != num_rows // _GROUP * width + -(-(num_rows % _GROUP) * width // 8):
        raise LedgerDefectError(f"{num_rows:,} rows of {width} bits are not {len(packed):,} bytes")
    rows: list[int] = []
    row, mask = 0, (1 << width) - 1
    for first in range(1, len(packed), width):
        group = packed[first : first + width]
        value, left = int.from_bytes(group, "big"), len(group) * 8
        for _ in range(min(_GROUP, bits // width)):
            left -= width
            row += value >> left & mask
            rows.append(row)
        bits -= _GROUP * width
    return rows


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file from its beginning to the first that cannot be read, which is told by a `Tail` at the end.

    Memory is bounded by the longest record, 64 MiB at most, whatever the file says.

    Raises:
        OSError: the file cannot be read.
        LedgerDefectError: it has no beginning: no start can be told from it.
    """
    with path.open("rb") as file:
        found = file.read(len(MAGIC))
        if found != MAGIC:
            raise LedgerDefectError("is empty" if MAGIC.startswith(found) else "is no ledger's file")
        crc, position, at = zlib.crc32(MAGIC), (0, 0, 0), len(MAGIC)
        while True:
            try:
                head, payload, crc, length = _next_record(file, crc)
                if not length:
                    if at == len(MAGIC):
                        raise _TornError
                    return
                if (head == _HEADER) != (at == len(MAGIC)):
                    raise LedgerDefectError("no start stands at its beginning, and only there")
                if head == _POSITION:
                    epoch, batch, step = _varints(payload, 3)
                    position = (epoch, batch, step)
                else:
                    record = _understood(head, payload, position)
                    if isinstance(record, Batch):
                        position = (record.epoch, record.batch + 1, record.global_step)
                    yield record
            except _TornError:
                if at == len(MAGIC):
                    raise LedgerDefectError("is empty") from None
                yield Tail(at, "")
                return
            except LedgerDefectError as e:
                if at == len(MAGIC):
                    raise
                yield Tail(at, str(e))
                return
            at += length


class _TornError(Exception):
    """The file ends inside a record."""


def _next_record(file: IO[bytes], crc: int) -> tuple[int, bytes, int, int]:
    """Head, payload, CRC and length of the next record; length 0 at the file's end."""
    head = file.read(1)
    if not head:
        return 0, b"", crc, 0
    encoded = b""
    while not encoded or encoded[-1] & 0x80:
        if len(encoded) == _CRC_BYTES + 1:
            raise LedgerDefectError("a record's length is none")
        byte = file.read(1)
        if not byte:
            raise _TornError
        encoded += byte
    size, _ = _varint_at(encoded, 0)
    if size > MAX_PAYLOAD_BYTES:
        raise LedgerDefectError(f"a record claims {size:,} bytes")
    rest = file.read(size + _CRC_BYTES)
    if len(rest) < size + _CRC_BYTES:
        raise _TornError
    payload = rest[:size]
    crc = zlib.crc32(head + encoded + payload, crc)
    if rest[size:] != crc.to_bytes(_CRC_BYTES, "little"):
        if not any(head + encoded + rest) and _only_zeros(file):
            raise _TornError  # the machine went down before the bytes came to the disk
        raise LedgerDefectError("the checksum of a record does not agree with it")
    return head[0], payload, crc, 1 + len(encoded) + size + _CRC_BYTES


def _only_zeros(file: IO[bytes]) -> bool:
    return not any(map(any, iter(lambda: file.read(2**16), b"")))


def _understood(head: int, payload: bytes, position: tuple[int, int, int]) -> Record:
    if head == _HEADER:
        return _header(_object(payload))
    if head == _LOADER:
        return _loader(_object(payload))
    if head == _EPOCH_END:
        return EpochEnd(*_varints(payload, 1))
    if not _BATCH <= head <= _BATCH | 15:
        raise LedgerDefectError(f"a record of the kind {head:02x} is not known")
    epoch, batch, step = position
    flags = head & 15
    num_rows, at = _varint_at(payload, 0)
    record = Batch(epoch, batch, step + (flags & STEPPED), flags, num_rows, payload[at:])
    rows = record.rows()
    if (rows and rows[-1] > MAX_ROW) or (rows is None and record.packed):
        raise LedgerDefectError("a batch's rows are none")
    return record


def _header(values: dict[str, Any]) -> Header:
    if values.get("version") != VERSION:
        raise LedgerDefectError(f"has version {str(values.get('version'))[:20]} of the format, and {VERSION} is known")
    try:
        header = Header(**{name: value for name, value in values.items() if name != "version"})
    except TypeError as e:
        raise LedgerDefectError("its start is not described as a start is") from e
    numbers = (header.start, header.rank, header.world_size, header.parent_batches, header.global_step)
    texts = (header.id, header.created, header.parent or "", header.checkpoint or "")
    if not all(_is_count(n) for n in numbers) or not all(isinstance(t, str) for t in texts):
        raise LedgerDefectError("its start is not described as a start is")
    return header


def _loader(values: dict[str, Any]) -> Loader:
    try:
        loader = Loader(**values)
    except TypeError as e:
        raise LedgerDefectError("a loader is not described as a loader is") from e
    numbers = (loader.rows, loader.batches, loader.planned_rows)
    flags = (loader.drop_last, loader.limited, loader.replacement)
    if not all(n is None or _is_count(n) for n in numbers) or not all(isinstance(f, bool) for f in flags):
        raise LedgerDefectError("a loader is not described as a loader is")
    return loader


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ROW


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **values} if "id" in values else values).encode()


def _object(payload: bytes) -> dict[str, Any]:
    if len(payload) > MAX_JSON_BYTES:
        raise LedgerDefectError(f"a description has {len(payload):,} bytes")
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError) as e:
        raise LedgerDefectError("a description is no JSON") from e
    if not isinstance(values, dict):
        raise LedgerDefectError("a description is no JSON object")
    return values


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_at(encoded: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and the byte after it."""
    value = 0
    for shift in range(0, 63, 7):
        if at == len(encoded):
            break
        value |= (encoded[at] & 0x7F) << shift
        at += 1
        if encoded[at - 1] < 0x80:
            return value, at
    raise LedgerDefectError("a number does not end")


def _varints(payload: bytes, count: int) -> list[int]:
    values, at = [], 0
    for _ in range(count):
        value, at = _varint_at(payload, at)
        values.append(value)
    if at != len(payload):
        raise LedgerDefectError("a record is longer than what it says")
    return values
