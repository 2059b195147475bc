"""The container that `torch.save` writes: a zip archive of stored records, one of them the pickle `data.pkl`.

The archive's directory is checked against the file before any record is believed: one folder, no name twice, nothing
compressed, every record where the directory says and within the file, from the first byte to the last. Each record that
is read is compared with its CRC-32, which `torch.load` never does.

Formats: PKWARE APPNOTE.TXT sections 4.3 and 4.5.3 (zip64); caffe2/serialize/inline_container.cc (the records).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from enstack_lightning.checkpoint.deep import Named, NamedTensor, Span, mismatch
from enstack_lightning.checkpoint.facts import Oddity
from enstack_lightning.checkpoint.inert_pickle import (
    DTYPE_BYTES,
    PickleDefectError,
    TensorDescriptor,
    Unpickled,
    read_pickle,
)
from enstack_lightning.checkpoint.source import ContainerDefectError, Source

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIRECTORY_BYTES = 64 * 2**20
MAX_SCALAR_STORAGE_BYTES = 64 * 2**10

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_HAS_DESCRIPTOR = 0x0008
_ALLOWED_FLAGS = 0x0800 | _HAS_DESCRIPTOR
_ZIP64 = 0xFFFFFFFF
_IS_FOLDER = 0x10


@dataclass(frozen=True)
class Record:
    """One stored member: `size` bytes whose local header stands at `header_offset`."""

    name: str
    size: int
    crc32: int
    header_offset: int
    flags: int


class TorchFile:
    """A torch zip archive in an open source, which stays the caller's to close.

    Raises:
        ContainerDefectError: the bytes are no intact torch zip archive.
        OSError: they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        directory = self._find_directory()
        records = self._read_directory(directory)
        self._payload_offsets = self._payload_offsets_of(records, directory.start)
        self.records = {_without_prefix(r.name): r for r in records}
        self.defects: list[ContainerDefectError] = []
        self.oddities: list[Oddity] = []
        self.without_checksum = 0

    def read(self, name: str) -> bytes:
        """The bytes of record `name` (without the archive's folder), compared with the CRC-32 it was saved with."""
        record = self.records.get(name)
        if record is None:
            raise ContainerDefectError("damaged", f"record {name} is missing", name)
        data = self._pread(record.size, self._payload_offsets[record.name], name)
        actual = zlib.crc32(data)
        # torch.serialization's `compute_crc32 = False` writes 0 for every record.
        if record.crc32 and actual != record.crc32:
            raise ContainerDefectError("damaged", mismatch(actual, record.crc32), name)
        return data

    def payload_offset(self, name: str) -> int:
        """Where the bytes of record `name` (without the archive's folder) begin in the file."""
        return self._payload_offsets[self.records[name].name]

    def spans(self, named: Iterable[Named] = ()) -> list[Span]:
        """Every record of the archive, with those of the `named` tensors that lie in it."""
        tensors: dict[str, list[NamedTensor]] = {}
        for name, role, tensor in named:
            if tensor.storage is not None:
                described = NamedTensor(name, role, tensor.dtype, tensor.shape, tensor.stride, tensor.offset)
                tensors.setdefault(f"data/{tensor.storage.key}", []).append(described)
        return [
            Span(name, self.payload_offset(name), r.size, r.crc32 or None, tuple(tensors.get(name, ())))
            for name, r in self.records.items()
        ]

    def read_pickle(self) -> Unpickled:
        """The symbolic content of `data.pkl`.

        Raises:
            ContainerDefectError: the record is missing, too large, changed, or no readable pickle.
        """
        record = self.records.get("data.pkl")
        if record is None:
            raise ContainerDefectError("unrecognised", "it is a zip archive without data.pkl, so not of torch.save")
        if record.size > MAX_PICKLE_BYTES:
            raise ContainerDefectError(
                "damaged", f"data.pkl has {record.size:,} bytes; the limit is 64 MiB", "data.pkl"
            )
        data = self.read("data.pkl")
        try:
            return read_pickle(data)
        except PickleDefectError as e:
            raise ContainerDefectError("damaged", f"data.pkl cannot be read: {e}", "data.pkl") from e

    def read_scalar(self, tensor: TensorDescriptor) -> float | None:
        """The value of a tensor of one element; None for a dtype that has no simple number.

        Raises:
            ContainerDefectError: its storage is missing, too short or changed.
        """
        form = {"float32": "f", "float64": "d", "int64": "q", "int32": "i"}.get(tensor.dtype)
        if form is None or tensor.storage is None or tensor.shape not in ((), (1,)):
            return None
        name = f"data/{tensor.storage.key}"
        if name in self.records and self.records[name].size > MAX_SCALAR_STORAGE_BYTES:
            return None
        data = self.read(name)
        start = tensor.offset * struct.calcsize(form)
        if start + struct.calcsize(form) > len(data):
            raise ContainerDefectError("damaged", f"record {name} is shorter than the tensor in it", name)
        (value,) = struct.unpack_from(self._byteorder + form, data, start)
        return float(value)

    @cached_property
    def _byteorder(self) -> str:
        # Files older than torch 2.1 have no such record and are little-endian.
        return ">" if "byteorder" in self.records and self.read("byteorder") == b"big" else "<"

    def check_storage(self, tensor: TensorDescriptor) -> None:
        """Compares a tensor's header with its storage record, without reading the record.

        Raises:
            ContainerDefectError: the record is missing, has another size than the pickle says, or the tensor
                reaches beyond it.
        """
        storage = tensor.storage
        if storage is None:
            return
        name = f"data/{storage.key}"
        record = self.records.get(name)
        if record is None:
            raise ContainerDefectError("damaged", f"record {name}, which holds a tensor's values, is missing", name)
        expected = storage.numel * DTYPE_BYTES.get(storage.dtype, 1)
        if record.size != expected:
            raise ContainerDefectError(
                "damaged", f"record {name} has {record.size:,} bytes and its tensor needs {expected:,}", name
            )
        itemsize = DTYPE_BYTES.get(tensor.dtype)
        if itemsize is None:
            raise ContainerDefectError("damaged", f"record {name} has the unknown dtype {tensor.dtype}", name)
        if all(tensor.shape):
            last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
            if (last + 1) * itemsize > record.size:
                raise ContainerDefectError(
                    "damaged", f"a tensor of shape {tensor.shape} reaches beyond its storage {name}", name
                )

    # The archive

    def _pread(self, count: int, offset: int, what: str) -> bytes:
        return self._source.read_at(offset, count, what)

    def _read_directory(self, directory: _Directory) -> list[Record]:
        raw = self._pread(directory.end - directory.start, directory.start, "the archive's directory")
        records, at = [], 0
        for _ in range(directory.entries):
            record, at = _central_entry(raw, at)
            records.append(record)
        if at != len(raw):
            raise ContainerDefectError("damaged", f"the archive's directory has {len(raw) - at:,} bytes too many")
        _check_names(records)
        return records

    def _find_directory(self) -> _Directory:
        tail_size = min(self.size, _END.size + _LOCATOR.size + _END64.size)
        tail = self._pread(tail_size, self.size - tail_size, "the end of the archive")
        if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
            raise ContainerDefectError(
                "truncated", f"the file ends after {self.size:,} bytes without the archive's directory: it was cut off"
            )
        _, disk, first_disk, count_here, count, length, start, comment = _END.unpack(tail[-_END.size :])
        end = self.size - _END.size
        if comment:
            raise ContainerDefectError("damaged", "the archive ends with a comment, which torch never writes")
        if tail[-_END.size - _LOCATOR.size :][:4] == b"PK\x06\x07":
            narrow = (disk, first_disk, count_here, count, length, start)
            _, locator_disk, end, disks = _LOCATOR.unpack(tail[-_END.size - _LOCATOR.size : -_END.size])
            if end != self.size - tail_size or tail[:4] != b"PK\x06\x06" or (locator_disk, disks) != (0, 1):
                raise ContainerDefectError("damaged", "the archive's zip64 directory is not where its locator says")
            _, rest, _, _, *wide = _END64.unpack(tail[: _END64.size])
            disk, first_disk, count_here, count, length, start = wide
            if rest != _END64.size - 12 or any(n not in (w, _ZIP64, 0xFFFF) for n, w in zip(narrow, wide, strict=True)):
                raise ContainerDefectError("damaged", "the archive's zip64 directory disagrees with its short form")
        if (disk, first_disk) != (0, 0) or count_here != count:
            raise ContainerDefectError("damaged", "the archive's directory says that it is one part of several")
        if start + length != end or length > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > length:
            raise ContainerDefectError(
                "damaged",
                f"the archive's directory of {count:,} entries and {length:,} bytes at byte {start:,} "
                f"does not end at byte {end:,}",
            )
        return _Directory(start, end, count)

    def _payload_offsets_of(self, records: list[Record], limit: int) -> dict[str, int]:
        """Compares each local header with the directory, and that the records fill the file up to `limit`."""
        payloads = {}
        expected = 0
        for record in sorted(records, key=lambda r: r.header_offset):
            if record.header_offset != expected:
                raise ContainerDefectError(
                    "damaged",
                    f"record {record.name} begins at byte {record.header_offset:,}; the one before it ends at "
                    f"{expected:,}",
                    record.name,
                )
            header = self._pread(_LOCAL.size + len(record.name.encode()), record.header_offset, record.name)
            magic, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
            name = header[_LOCAL.size :]
            if (magic, flags, method) != (b"PK\x03\x04", record.flags, 0) or name_length != len(name):
                raise _header_defect(record)
            if name != record.name.encode():
                raise _header_defect(record)
            payloads[record.name] = record.header_offset + _LOCAL.size + name_length + extra_length
            expected = payloads[record.name] + record.size
            if record.flags & _HAS_DESCRIPTOR:
                expected += self._descriptor_length(record, expected)
        if expected != limit:
            raise ContainerDefectError(
                "damaged", f"the archive's records end at byte {expected:,} and its directory begins at {limit:,}"
            )
        return payloads

    def _descriptor_length(self, record: Record, offset: int) -> int:
        wide = record.size >= _ZIP64 or record.header_offset >= _ZIP64
        form = "<4sI2Q" if wide else "<4s3I"
        magic, crc32, _, size = struct.unpack(form, self._pread(struct.calcsize(form), offset, record.name))
        if magic != b"PK\x07\x08" or crc32 != record.crc32 or size != record.size:
            raise ContainerDefectError(
                "damaged", f"the descriptor of record {record.name} disagrees with the directory", record.name
            )
        return struct.calcsize(form)


class _Directory(NamedTuple):
    start: int
    end: int
    entries: int


def _header_defect(record: Record) -> ContainerDefectError:
    return ContainerDefectError(
        "damaged", f"the header of record {record.name} disagrees with the archive's directory", record.name
    )


def _central_entry(raw: bytes, at: int) -> tuple[Record, int]:
    if len(raw) - at < _CENTRAL.size:
        raise ContainerDefectError("damaged", "the archive's directory ends in the middle of an entry")
    entry = _CENTRAL.unpack_from(raw, at)
    magic, flags, method, crc32, compressed, size = entry[0], entry[3], entry[4], entry[7], entry[8], entry[9]
    name_length, extra_length, comment_length, offset = entry[10], entry[11], entry[12], entry[16]
    at += _CENTRAL.size
    try:
        name = raw[at : at + name_length].decode("utf-8")
    except UnicodeDecodeError:
        raise ContainerDefectError("damaged", "a record's name in the archive's directory is not UTF-8") from None
    if magic != b"PK\x01\x02" or not name:
        raise ContainerDefectError(
            "damaged", f"the archive's directory has no entry at byte {at - _CENTRAL.size:,} of it"
        )
    extra = raw[at + name_length : at + name_length + extra_length]
    size, compressed, offset = _zip64_values(extra, size, compressed, offset)
    if method != 0 or compressed != size:
        raise ContainerDefectError("damaged", f"record {name} is compressed; torch stores records as they are", name)
    if entry[13] or comment_length or entry[15] & _IS_FOLDER:
        raise ContainerDefectError("damaged", f"record {name} is said to be a folder, or of another archive", name)
    if flags & ~_ALLOWED_FLAGS:
        raise ContainerDefectError("damaged", f"record {name} has flags 0x{flags:04x}: encrypted or not of torch", name)
    return Record(name, size, crc32, offset, flags), at + name_length + extra_length


def _zip64_values(extra: bytes, *values: int) -> list[int]:
    """The values with each 0xFFFFFFFF replaced by its 64-bit form from the zip64 extra field (APPNOTE 4.5.3)."""
    wide = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 0x0001:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
        at += 4 + length
    if values.count(_ZIP64) > len(wide):
        raise ContainerDefectError("damaged", "an entry of the archive's directory lacks its zip64 sizes")
    return [wide.pop(0) if v == _ZIP64 else v for v in values]


def _check_names(records: list[Record]) -> None:
    seen: set[str] = set()
    prefix = records[0].name.partition("/")[0] if records else ""
    for record in records:
        # torch looks names up without regard to case and takes one of several by chance of its search.
        key = record.name.lower()
        if key in seen:
            raise ContainerDefectError("damaged", f"record {record.name} is in the archive more than once", record.name)
        seen.add(key)
        folder, slash, rest = record.name.partition("/")
        if folder != prefix or not slash or not rest or ".." in record.name.split("/") or "\\" in record.name:
            raise ContainerDefectError(
                "damaged", f"record {record.name!r} does not lie in the archive's one folder", record.name
            )


def _without_prefix(name: str) -> str:
    return name.partition("/")[2]
