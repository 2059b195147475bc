"""The container that `torch.save` writes: a zip archive of records, one of them the pickle `data.pkl`.

Everything that `torch.load` acts on is compared with what else the archive says of it: each record that is read with
its CRC-32, which `torch.load` never does; each tensor with the storage that holds it; all records' checksums with the
fingerprint that torch's writer left of them.

Records: `_save` in torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

from enstack_lightning.checkpoint.deep import Named, NamedTensor, Role, Span, mismatch
from enstack_lightning.checkpoint.facts import Oddity, OddityKind
from enstack_lightning.checkpoint.inert_pickle import (
    DTYPE_BYTES,
    Global,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Unpickled,
    read_pickle,
)
from enstack_lightning.checkpoint.pickle_values import bytes_of
from enstack_lightning.checkpoint.source import ContainerDefectError, Source
from enstack_lightning.checkpoint.zip_archive import DEFAULT_ALIGNMENT, Record, ZipArchive

MAX_PICKLE_BYTES = 64 * 2**20
MAX_SMALL_RECORD_BYTES = 1_024
MAX_SCALAR_STORAGE_BYTES = 64 * 2**10
MAX_SCALAR_BYTES = 32 * 2**20
"""Read for the sake of scalars from one file; 100,000 step counts take 0.4 MB."""

MAX_DIMENSIONS = 64
MAX_LOGICAL_SIZE = 64
"""A tensor of more elements than this many times what its storage holds is told of: copying it would fill them in."""

MIN_VERSION, MAX_VERSION = 1, 10
"""Of the archive: `kMinSupportedFileFormatVersion` and the like in caffe2/serialize/versions.h."""

_STORAGE = "data/"
_PICKLE = "data.pkl"
_SERIALIZATION_ID = ".data/serialization_id"
_ALIGNMENT = ".storage_alignment"
_OWN_RECORDS = (".format_version", _ALIGNMENT, "byteorder", "version", ".data/version", _SERIALIZATION_ID)
_NAMED_BY_TORCH = (_PICKLE, "constants.pkl")
_FINGERPRINT, _FEW_DIGITS = re.compile(rb"\d{40}"), re.compile(rb"\d{1,18}\s?")
_FORMS = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "bfloat16": "H",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint64": "Q",
    "uint32": "I",
    "uint16": "H",
    "uint8": "B",
    "bool": "B",
}


class UnreadablePickleError(ContainerDefectError):
    """The pickle cannot be read or believed; `globals` are the names that it would have imported all the same."""

    def __init__(self, message: str, globals_seen: tuple[Global, ...]) -> None:
        super().__init__("damaged", message, _PICKLE)
        self.globals = globals_seen


class TorchFile:
    """A torch zip archive in an open source, which stays the caller's to close.

    Attributes:
        records: by their names without the archive's folder, in the order in which they lie in the file.
        defects: those that stop no reader: a record of torch's own that is wrong, or not the one that was saved.
        oddities: valid and unusual; complete when the pickle has been read.
        without_checksum: bytes of records that were saved without one (`compute_crc32 = False`, `skip_data()`).

    Raises:
        ContainerDefectError: the bytes are no intact zip archive.
        OSError: they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._archive = ZipArchive(source)
        self.records = self._archive.records
        self.defects: list[ContainerDefectError] = []
        self.oddities: list[Oddity] = []
        self._computes_crc32 = any(r.crc32 for r in self.records.values())
        self.without_checksum = sum(
            r.size for r in self.records.values() if not r.crc32 and self._checksum_of(r) is None
        )
        self._compared: set[str] = set()
        self._whole: dict[str, int] = {}
        self._scalars: dict[str, bytes] = {}
        self._scalar_bytes = 0
        self._byteorder: Literal["<", ">"] = "<"
        self._own = {name: self._read_own(name) for name in _OWN_RECORDS if name in self.records}
        self._check_own_records()
        self._check_serialization_id()
        self._check_writer()

    def read(self, name: str) -> bytes:
        """The bytes of record `name` (without the archive's folder), compared with the CRC-32 it was saved with."""
        data = self._read_unchecked(name)
        saved = self._checksum_of(self.records[name])
        if saved is not None:
            actual = zlib.crc32(data)
            if actual != saved:
                raise ContainerDefectError("damaged", mismatch(actual, saved), name)
            self._compared.add(name)
        return data

    def read_pickle(self) -> Unpickled:
        """The symbolic content of `data.pkl`.

        Raises:
            UnreadablePickleError: the record has changed or is no readable pickle.
            ContainerDefectError: it is missing or too large, or the archive is a program of TorchScript.
        """
        if "constants.pkl" in self.records:
            raise ContainerDefectError(
                "unrecognised",
                "it is a TorchScript archive: it contains code, and torch.load would hand it to torch.jit",
            )
        record = self.records.get(_PICKLE)
        if record is None:
            raise ContainerDefectError("unrecognised", "it is a zip archive without data.pkl, so not of torch.save")
        if record.size > MAX_PICKLE_BYTES:
            raise ContainerDefectError("damaged", f"it has {record.size:,} bytes; the limit is 64 MiB", _PICKLE)
        data = self._read_unchecked(_PICKLE)
        actual, saved = zlib.crc32(data), self._checksum_of(record)
        try:
            content = read_pickle(data)
        except PickleDefectError as e:
            # That its bytes have changed says why it cannot be read.
            message = mismatch(actual, saved) if saved is not None and saved != actual else f"it cannot be read: {e}"
            raise UnreadablePickleError(message, e.globals) from e
        if saved is not None and actual != saved:
            raise UnreadablePickleError(mismatch(actual, saved), content.globals)
        self._compared.add(_PICKLE)
        self._check_references(content.storages)
        return content

    def read_scalar(self, tensor: TensorDescriptor) -> float | None:
        """The value of a tensor of one element; None for a dtype that has no simple number.

        Raises:
            ContainerDefectError: its storage is missing, too short or changed.
        """
        form = _FORMS.get(tensor.dtype)
        if form is None or tensor.storage is None or tensor.shape not in ((), (1,)):
            return None
        name = _STORAGE + tensor.storage.key
        record = self.records.get(name)
        if record is not None and record.size > MAX_SCALAR_STORAGE_BYTES:
            return None
        data = self._read_scalar_storage(name)
        itemsize = struct.calcsize(form)
        start = tensor.offset * itemsize
        if not 0 <= start <= len(data) - itemsize:
            raise ContainerDefectError("damaged", "it is shorter than the tensor in it", name)
        (value,) = struct.unpack_from(self._byteorder + form, data, start)
        if tensor.dtype == "bfloat16":
            (value,) = struct.unpack("<f", struct.pack("<I", value << 16))
        return -float(value) if tensor.negated else float(value)

    def check_storages(self, tensors: Iterable[TensorDescriptor]) -> Iterator[ContainerDefectError]:
        """Compares the headers of tensors with their storages' records, without reading these.

        Yields:
            An error for each tensor whose record is missing or has another size than the pickle says, and for each
            that reaches beyond it.
        """
        for tensor in tensors:
            storage = tensor.storage
            if storage is None:
                continue
            name = _STORAGE + storage.key
            size = self._whole.get(name)
            if size is None:
                record, size = self.records.get(name), _size_of(storage)
                if record is None or record.size != size:
                    yield _size_defect(record, size, name)
                    continue
            fault, oddity = _judged(tensor.dtype, tensor.shape, tensor.stride, tensor.offset, size)
            if fault:
                yield ContainerDefectError("damaged", fault, name)
            if oddity:
                self.oddities.append(Oddity(OddityKind.LOGICAL_SIZE, name, oddity))

    def spans(self, named: Iterable[Named] = ()) -> list[Span]:
        """Every record of the archive, with those of the `named` tensors that lie in it."""
        tensors: dict[str, list[NamedTensor]] = {}
        for name, role, tensor in named:
            for part in tensor.parts[-1:] or (tensor,):  # of a sparse tensor, its values
                if part.storage is not None:
                    tensors.setdefault(_STORAGE + part.storage.key, []).append(_described(name, role, part))
        return [
            Span(
                where=name,
                offset=record.offset,
                size=record.size,
                crc32=self._checksum_of(record),
                tensors=tuple(tensors.get(name, ())),
                byteorder=self._byteorder,
            )
            for name, record in self.records.items()
        ]

    @property
    def not_read(self) -> int:
        """Bytes of records that have a checksum and were not compared with it so far."""
        return sum(
            r.size
            for n, r in self.records.items()
            if n not in self._compared and (r.crc32 or self._checksum_of(r) is not None)
        )

    # Records

    def _read_unchecked(self, name: str) -> bytes:
        record = self.records.get(name)
        if record is None:
            raise ContainerDefectError("damaged", "it is missing", name)
        kept = self._archive.kept.get(name)
        return kept if kept is not None else self._source.read_at(record.offset, record.size, name)

    def _read_scalar_storage(self, name: str) -> bytes:
        data = self._scalars.get(name)
        if data is None:
            record = self.records.get(name)
            if record is not None and self._scalar_bytes + record.size > MAX_SCALAR_BYTES:
                raise ContainerDefectError(
                    "damaged", f"the storages of scalars take more than {MAX_SCALAR_BYTES:,} bytes", name
                )
            data = self._scalars[name] = self.read(name)
            self._scalar_bytes += len(data)
        return data

    def _checksum_of(self, record: Record) -> int | None:
        """The CRC-32 that a record was saved with; None where torch was told to write 0 instead.

        torch leaves it out for all records, or for storages alone; any other 0 is taken at its word.
        """
        if record.crc32 or not record.size:
            return record.crc32
        return 0 if self._computes_crc32 and not record.name.startswith(_STORAGE) else None

    def _check_references(self, storages: Iterable[StorageDescriptor]) -> None:
        """Whether the storages that the pickle names, and no others, are in the archive."""
        expected = {_STORAGE + storage.key: _size_of(storage) for storage in storages}
        for name, size in expected.items():
            record = self.records.get(name)
            if record is not None and record.size == size:
                self._whole[name] = size
            else:
                self.defects.append(_size_defect(record, size, name))
        for name, record in self.records.items():
            if name not in expected and name != _PICKLE and name not in _OWN_RECORDS:
                beginning = self._source.read_at(record.offset, min(record.size, 2), name)
                pickled = " and begins like a pickle" if beginning[:1] == b"\x80" and beginning[1:] < b"\x06" else ""
                message = f"the pickle does not refer to this record; it has {record.size:,} bytes{pickled}"
                self.oddities.append(Oddity(OddityKind.UNREFERENCED_RECORD, name, message))

    # What torch's writer says of the archive

    def _read_own(self, name: str) -> bytes:
        """A small record of torch's own; what is wrong with it is noted, and what it says is then nothing."""
        if self.records[name].size > MAX_SMALL_RECORD_BYTES:
            size = self.records[name].size
            self.defects.append(ContainerDefectError("damaged", f"it has {size:,} bytes; torch writes a few", name))
            return b""
        try:
            return self.read(name)
        except ContainerDefectError as e:
            self.defects.append(e)
            return b""

    def _check_own_records(self) -> None:
        by_torch = (*_OWN_RECORDS, *_NAMED_BY_TORCH)
        for name in self.records:
            if not name.startswith(_STORAGE) and name not in by_torch and name.lower() in by_torch:
                self._note(f"torch takes it for {name.lower()}, as it looks names up without regard to case", name)
        if not {"version", ".data/version"} & self._own.keys():
            self._note("it is missing, and torch.load refuses an archive without it", "version")
        for name in ("version", ".data/version"):
            if name in self._own and not MIN_VERSION <= _number(self._own[name]) <= MAX_VERSION:
                self._note(
                    f"it holds {self._own[name][:20]!r}; torch reads versions {MIN_VERSION} to {MAX_VERSION}", name
                )
        # Files of torch before 2.1 have no record of the byte order and are little-endian.
        byteorder = self._own.get("byteorder", b"little")
        if byteorder == b"big":
            self._byteorder = ">"
        elif byteorder != b"little":
            self._note(f"it holds {byteorder[:20]!r}; torch reads b'little' and b'big'", "byteorder")
        alignment = _number(self._own[_ALIGNMENT]) if _ALIGNMENT in self._own else DEFAULT_ALIGNMENT
        if alignment < 1:
            self._note(f"it holds {self._own[_ALIGNMENT][:20]!r} where a number of bytes is needed", _ALIGNMENT)
        else:
            self._archive.check_alignment(alignment)

    def _check_serialization_id(self) -> None:
        """Recomputes the last 20 digits of the archive's fingerprint: a hash of all records' checksums."""
        saved = self._own.get(_SERIALIZATION_ID)
        if not saved:
            return
        if not _FINGERPRINT.fullmatch(saved):
            self._note(f"it holds {saved[:50]!r} where 40 digits are needed", _SERIALIZATION_ID)
            return
        at = self.records[_SERIALIZATION_ID].header_offset
        written = [r.crc32 for r in self.records.values() if r.header_offset < at and r.size]
        orders = [written]
        if self._archive.unlike_torch:
            # Another writer may have put the same records in another order: then that of torch gives the fingerprint.
            others = [r for r in self.records.values() if r.size and r.name != _SERIALIZATION_ID]
            orders.append([r.crc32 for r in sorted(others, key=_torch_order)])
        if int(saved[20:]) not in [_combined(order) for order in orders]:
            self.defects.append(
                ContainerDefectError(
                    "replaced",
                    f"the checksums of the archive's {len(written):,} records do not give the fingerprint that was "
                    "saved with them: at least one record is not the one that was saved",
                    _SERIALIZATION_ID,
                )
            )

    def _check_writer(self) -> None:
        """Tells of records that torch's writer would have written otherwise."""
        unlike = [f"{count:,} of its records {'each ' * (count > 1)}{what}" for what, count in self._unlike_torch()]
        if unlike:
            message = f"it was not written by torch.save as it is: {'; '.join(unlike)}"
            self.oddities.append(Oddity(OddityKind.REPACKED, "", message))

    def _unlike_torch(self) -> list[tuple[str, int]]:
        unlike = list(self._archive.unlike_torch.items())
        without = sum(1 for r in self.records.values() if not r.crc32 and r.size and r.name.startswith(_STORAGE))
        if without and any(r.crc32 and r.size and r.name.startswith(_STORAGE) for r in self.records.values()):
            unlike.append(("has no checksum (CRC-32 0) while others have one", without))
        return unlike

    def _note(self, message: str, record: str) -> None:
        """Notes a defect of a record, unless that could not be read, which is noted already."""
        if not any(e.record == record for e in self.defects):
            self.defects.append(ContainerDefectError("damaged", message, record))


def _size_of(storage: StorageDescriptor) -> int:
    return storage.numel * DTYPE_BYTES.get(storage.dtype, 1)


def _size_defect(record: Record | None, expected: int, name: str) -> ContainerDefectError:
    """What is wrong with the record of a storage of `expected` bytes, by what the pickle says of it."""
    if record is None:
        return ContainerDefectError("damaged", "it is missing, and a tensor's values are in it", name)
    return ContainerDefectError("damaged", f"it has {record.size:,} bytes and its tensor needs {expected:,}", name)


@lru_cache(4_096)
def _judged(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, size: int) -> tuple[str, str]:
    """What is wrong with a tensor in a storage of `size` bytes, and what is odd about it."""
    if dtype not in DTYPE_BYTES:
        return f"a tensor in it has the unknown dtype {dtype:.40}", ""
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        return f"a tensor in it has {len(shape):,} dimensions and {len(stride):,} strides", ""
    if shape and (min(shape) < 0 or min(stride) < 0):
        return "a tensor in it has a negative dimension or stride", ""
    if offset < 0:
        return "a tensor in it has a negative offset", ""
    count = math.prod(shape)
    if not count:
        return "", ""
    needed = bytes_of(dtype, offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    if needed > size:
        return f"a tensor of shape {shape} needs {needed:,} bytes of its storage, which has {size:,}", ""
    logical = bytes_of(dtype, count)
    if logical > MAX_LOGICAL_SIZE * size:
        return "", f"a tensor of shape {shape} stands for {logical:,} bytes and its storage has {size:,}"
    return "", ""


def _described(name: str, role: Role, tensor: TensorDescriptor) -> NamedTensor:
    return NamedTensor(name, role, tensor.dtype, tensor.shape, tensor.stride, tensor.offset)


def _number(text: bytes) -> int:
    """The number that a record holds as text; -1 for anything else."""
    return int(text) if _FEW_DIGITS.fullmatch(text) else -1


def _combined(crc32s: Iterable[int]) -> int:
    """The hash of checksums in `PyTorchStreamWriter`: `c10::hash_combine` of each, in the order of writing."""
    seed = 0
    for crc32 in crc32s:
        seed ^= (crc32 + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & 0xFFFFFFFFFFFFFFFF
    return seed


def _torch_order(record: Record) -> tuple[int, int, str]:
    """Where torch writes a record: the pickle, its own records, the storages by number, the version."""
    key = record.name.removeprefix(_STORAGE)
    if record.name.startswith(_STORAGE):
        return 4, int(key) if key.isdecimal() and len(key) < 20 else 0, key
    order = (_PICKLE, ".format_version", _ALIGNMENT, "byteorder")
    return (order.index(record.name) if record.name in order else 5), 0, key
