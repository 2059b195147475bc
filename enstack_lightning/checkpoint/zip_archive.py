"""A zip archive of stored records that fill the file from its first byte to its last, checked before it is believed.

Whatever two readers of zip could see differently ends the reading: the directory against each record's own header and
descriptor, one folder, no name twice (without regard to case, as torch looks names up), nothing compressed or
encrypted, no byte before, between or behind the records. What torch's writer would have done otherwise, and its reader
lets pass, is counted in `ZipArchive.unlike_torch`.

Format: PKWARE APPNOTE.TXT sections 4.3 and 4.5.3 (zip64); the padding and the descriptors of torch's writer:
caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from operator import sub
from typing import NamedTuple

from enstack_lightning.checkpoint.source import ContainerDefectError, Source

MAX_DIRECTORY_BYTES = 64 * 2**20
MAX_RECORDS = 100_000
"""Of one archive, and about a second of work. A checkpoint of 6,000 tensors with their optimizer's state has 24,000."""

MAX_NAME_BYTES = 1_024
MAX_PREFETCHED_RECORD = 64 * 2**20
DEFAULT_ALIGNMENT = 64

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_DESCRIPTORS = {form.size: form for form in (_DESCRIPTOR, _DESCRIPTOR64)}
_HAS_DESCRIPTOR = 0x0008
_ALLOWED_FLAGS = 0x0800 | _HAS_DESCRIPTOR
_CENTRAL_MAGIC = b"PK\x01\x02"
_WIDE = 0xFFFFFFFF
_IS_FOLDER = 0x10
_ZIP64_EXTRA = 0x0001
_PADDING_EXTRA = b"FB"
_USUAL_EXTRA_BYTES = 160
"""Of a local header: a zip64 field and padding to 64 bytes take less; more is read when it is said to be there."""

_READ_AHEAD_BYTES = 256
"""Read with a descriptor in a file on disk: as a rule, the header behind it."""

_SMALL_PAYLOAD = 4 * 2**10
"""A payload of no more is read along with the headers around it: that costs less than to read these one by one."""

_KEPT_PAYLOAD = 64
"""One of no more is kept, of all `MAX_RECORDS` 6.4 MB: the scalars of an optimizer, and torch's own records."""

_RUN_BYTES = 64 * 2**10
"""Of headers and small payloads that are read at a time."""

_TORCH_CENTRAL = struct.Struct("<4xH6x3I2H10xI")
"""What follows the signature of a directory's entry: flags, CRC-32, sizes, lengths of name and extra field, offset."""

_ZERO_BYTES = (*range(4), *range(6, 12), *range(28, 38))
"""Of the same what torch leaves 0: versions, method and time; comment, disk and attributes."""


class Record(NamedTuple):
    """One stored member: `size` bytes from `offset` of the file on, behind the header at `header_offset`.

    Attributes:
        name: without the archive's folder.
    """

    name: str
    size: int
    crc32: int
    header_offset: int
    offset: int


class ZipArchive:
    """The records of a zip archive.

    Attributes:
        records: by name, in the order in which they lie in the file.
        unlike_torch: how many records differ from what torch's writer makes, by the kind of difference.
        kept: the payloads of a few bytes that were read along with the headers, by the names of their records; they
            have been compared with nothing yet.

    Raises:
        ContainerDefectError: the bytes are no intact archive of stored records in one folder.
        OSError: they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.unlike_torch: Counter[str] = Counter()
        directory = _find_directory(source)
        columns = _read_directory(source, directory)
        if columns.header_offsets[-1] >= directory.start:
            raise _beyond(columns, directory.start)
        source.prefetch(_beside_payloads(columns, directory.start))
        self.kept: dict[str, bytes] = {}
        if source.local_fd() is not None and (layout := _as_torch_lays_out(columns, directory.start)):
            kept = _payloads_between(source, columns, layout)
            if kept is not None:
                self.records, self.kept = _records(columns, layout), kept
                return
        self._ahead = 0 if source.local_fd() is None else _READ_AHEAD_BYTES
        self._near, self._near_offset = b"", 0
        entries = list(map(_Entry._make, zip(*columns, strict=True)))
        self.records = self._read_headers(entries, directory.start)

    def check_alignment(self, alignment: int) -> None:
        """Counts the records that do not begin at a multiple of `alignment` bytes."""
        elsewhere = [record for record in self.records.values() if record.offset % alignment and record.size]
        if elsewhere:
            self.unlike_torch[f"does not begin at a multiple of {alignment:,} bytes"] = len(elsewhere)

    def _read_headers(self, entries: list[_Entry], end: int) -> dict[str, Record]:
        """Compares each record's own header with the directory, and that the records fill the file up to `end`."""
        records = {}
        expected = 0
        borders = [e.header_offset for e in entries[1:]]
        borders.append(end)
        for entry, border in zip(entries, borders, strict=True):
            if entry.header_offset != expected:
                raise _misplaced(entry, expected)
            offset = self._payload_offset(entry, border)
            expected = offset + entry.size
            if expected > border:
                raise ContainerDefectError(
                    "damaged",
                    f"its {entry.size:,} bytes from byte {offset:,} on reach beyond byte {border:,}, the next record",
                    entry.name,
                )
            if entry.flags & _HAS_DESCRIPTOR:
                expected += self._descriptor_length(entry, expected, border, end)
            elif entry.size:
                self.unlike_torch["has no descriptor behind it"] += 1
            records[entry.name] = Record(entry.name, entry.size, entry.crc32, entry.header_offset, offset)
        if expected != end:
            raise ContainerDefectError(
                "damaged", f"the archive's records end at byte {expected:,} and its directory begins at byte {end:,}"
            )
        return records

    def _payload_offset(self, entry: _Entry, border: int) -> int:
        size = min(_LOCAL.size + len(entry.raw_name) + _USUAL_EXTRA_BYTES, border - entry.header_offset)
        if size < _LOCAL.size + len(entry.raw_name):
            raise _header_defect(entry, "there is no room for it")
        start = entry.header_offset - self._near_offset
        header = self._near[start : start + size] if start >= 0 else b""
        if len(header) < size:
            header = self._source.read_at(entry.header_offset, size, entry.name)
        magic, _, flags, method, _, _, crc32, compressed, whole, name_length, extra_length = _LOCAL.unpack_from(header)
        extra_start = _LOCAL.size + name_length
        if magic != b"PK\x03\x04":
            raise _header_defect(entry, "it does not begin with PK\\x03\\x04")
        if header[_LOCAL.size : extra_start] != entry.raw_name:
            raise _header_defect(entry, "they give it different names")
        if (flags, method) != (entry.flags, 0):
            raise _header_defect(entry, f"it has flags 0x{flags:04x} and method {method}")
        payload: int = entry.header_offset + extra_start + extra_length
        if payload > border:
            raise _header_defect(entry, f"its extra field of {extra_length:,} bytes reaches into the next record")
        extra = header[extra_start : extra_start + extra_length]
        if len(extra) < extra_length:
            extra = self._source.read_at(entry.header_offset + extra_start, extra_length, entry.name)
        if whole or compressed or crc32 or not flags & _HAS_DESCRIPTOR:
            _check_local_sizes(entry, extra, crc32, compressed, whole)
        if not _is_torch_padding(extra):
            self.unlike_torch["has a header without torch's padding"] += 1
        return payload

    def _descriptor_length(self, entry: _Entry, offset: int, border: int, end: int) -> int:
        """The length of the descriptor at `offset`, which must fill the file up to the next record at `border`."""
        form = _DESCRIPTORS.get(border - offset)
        if form is None:
            raise ContainerDefectError(
                "damaged",
                f"{border - offset:,} bytes lie between its end and the next record; a descriptor has 16 or 24",
                entry.name,
            )
        self._near = self._source.read_at(offset, form.size + max(0, min(self._ahead, end - border)), entry.name)
        self._near_offset = offset
        if form.unpack_from(self._near) != (b"PK\x07\x08", entry.crc32, entry.size, entry.size):
            raise ContainerDefectError(
                "damaged", "the descriptor behind it disagrees with the archive's directory", entry.name
            )
        return form.size


class _Layout(NamedTuple):
    """Where an archive's payloads begin, and what has to lie before each.

    Last comes the directory, and what has to lie before that.
    """

    offsets: list[int]
    gaps: list[bytes]


def _as_torch_lays_out(columns: _Columns, end: int) -> _Layout | None:
    """What lies beside the payloads of an archive as torch writes it; None where there is no room for it.

    All of it follows from the directory: the descriptor of one record, the header of the next and its extra fields.
    """
    _, raw_names, sizes, crc32s, headers_at, flags = columns
    if headers_at[0] or max(sizes) >= end:
        return None
    fields = [b""] * len(sizes)
    if end >= _WIDE:
        fields = [_zip64_field(size, 0, at) for size, at in zip(sizes, headers_at, strict=True)]
    descriptors = [
        (_DESCRIPTOR64 if field else _DESCRIPTOR).pack(b"PK\x07\x08", crc32, size, size)
        if flag & _HAS_DESCRIPTOR
        else b""
        for flag, crc32, size, field in zip(flags, crc32s, sizes, fields, strict=True)
    ]
    if not all(descriptors) and any(s or c for d, s, c in zip(descriptors, sizes, crc32s, strict=True) if not d):
        return None
    borders = (*headers_at[1:], end)
    offsets = [border - len(d) - size for border, d, size in zip(borders, descriptors, sizes, strict=True)]
    lengths = map(sub, offsets, headers_at)
    headers = list(map(_torch_header, flags, map(len, raw_names), map(len, fields), lengths))
    if not all(headers):
        return None
    before, behind = zip(*headers, (b"", b""), strict=True)
    gaps = zip((b"", *descriptors), before, (*raw_names, b""), (*fields, b""), behind, strict=True)
    return _Layout([*offsets, end], list(map(b"".join, gaps)))


@lru_cache(4_096)
def _torch_header(flags: int, name_length: int, field_length: int, length: int) -> tuple[bytes, ...]:
    """What stands before name and zip64 field in a header of `length` bytes and behind; empty where none is torch's."""
    padding = _PADDINGS.get(length - _LOCAL.size - name_length - field_length)
    if padding is None:
        return ()
    extra_length = field_length + len(padding)
    return _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, name_length, extra_length), padding


def _zip64_field(size: int, compressed: int, offset: int) -> bytes:
    """The extra field that torch writes for what takes more than 32 bits; empty where nothing does."""
    if size >= _WIDE:
        wide = (size, compressed, offset) if offset >= _WIDE else (size, compressed)
        return struct.pack(f"<2H{len(wide)}Q", _ZIP64_EXTRA, 8 * len(wide), *wide)
    return struct.pack("<2HQ", _ZIP64_EXTRA, 8, offset) if offset >= _WIDE else b""


_PADDINGS = {n + 4: _PADDING_EXTRA + n.to_bytes(2, "little") + b"Z" * n for n in range(2 * DEFAULT_ALIGNMENT)}
"""Torch's extra fields by their length: what puts the payload behind one at a multiple of 64."""


def _payloads_between(source: Source, columns: _Columns, layout: _Layout) -> dict[str, bytes] | None:
    """The smallest payloads, read with all that lies beside the records; None where that is not what it has to be."""
    kept = {}
    offsets, gaps = layout
    sizes = (*columns.sizes, _WIDE)  # the directory has been read
    runs = _runs(offsets, sizes)
    data, start, stop = b"", 0, 0
    for name, size, offset, gap in zip((*columns.names, ""), sizes, offsets, gaps, strict=True):
        if offset > stop:
            start, stop = next(runs)
            data = source.read_at(start, stop - start, "what lies between the records")
        at = offset - start
        if not data.endswith(gap, 0, at):
            return None
        if size <= _KEPT_PAYLOAD and offset + size <= stop:
            kept[name] = data[at : at + size]
    return kept


def _runs(offsets: Iterable[int], sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """From where to where is read at once: what lies between two payloads that are not small."""
    start = 0
    for offset, size in zip(offsets, sizes, strict=True):
        if size > _SMALL_PAYLOAD or offset - start > _RUN_BYTES:
            yield start, offset
            start = offset + size


def _records(columns: _Columns, layout: _Layout) -> dict[str, Record]:
    names, _, sizes, crc32s, header_offsets, _ = columns
    records = map(_new_record, zip(names, sizes, crc32s, header_offsets, layout.offsets[:-1], strict=True))
    return dict(zip(names, records, strict=True))


_new_record = partial(tuple.__new__, Record)
"""What `Record._make` does, in less time."""


def _beside_payloads(columns: _Columns, end: int) -> Iterator[tuple[int, int]]:
    """Offset and length of all headers, descriptors and whatever small lies between them, and of the pickle.

    Begins in the middle, which is in memory only if all is: both ends have been read already.
    """
    starts = columns.header_offsets
    half = len(starts) // 2
    for i in (*range(half, len(starts)), *range(half)):
        start, border = starts[i], starts[i + 1] if i + 1 < len(starts) else end
        whole = border - start
        header = _LOCAL.size + len(columns.raw_names[i]) + _USUAL_EXTRA_BYTES
        is_pickle = columns.names[i] == "data.pkl"
        read_whole = MAX_PREFETCHED_RECORD if is_pickle else header + _SMALL_PAYLOAD + _DESCRIPTOR64.size
        if 0 < whole <= read_whole:
            yield start, whole
        elif whole > 0:
            yield start, min(whole, header)
            yield max(border - _DESCRIPTOR64.size, start), min(whole, _DESCRIPTOR64.size)


class _Directory(NamedTuple):
    start: int
    end: int
    entries: int


class _Entry(NamedTuple):
    """A record as the directory has it; `name` without the archive's folder, `raw_name` with it."""

    name: str
    raw_name: bytes
    size: int
    crc32: int
    header_offset: int
    flags: int


class _Columns(NamedTuple):
    """The fields of all entries, each as `_Entry` has it, in the order in which the records lie in the file."""

    names: tuple[str, ...]
    raw_names: tuple[bytes, ...]
    sizes: tuple[int, ...]
    crc32s: tuple[int, ...]
    header_offsets: tuple[int, ...]
    flags: tuple[int, ...]


def _header_offset(entry: _Entry) -> int:
    return entry.header_offset


def _header_defect(entry: _Entry, why: str) -> ContainerDefectError:
    return ContainerDefectError("damaged", f"its header disagrees with the archive's directory: {why}", entry.name)


def _beyond(columns: _Columns, end: int) -> ContainerDefectError:
    message = f"it begins at byte {columns.header_offsets[-1]:,}, and the archive's directory at byte {end:,}"
    return ContainerDefectError("damaged", message, columns.names[-1])


def _misplaced(entry: _Entry, expected: int) -> ContainerDefectError:
    if expected == 0:
        message = f"{entry.header_offset:,} bytes stand before the archive's first record"
    else:
        message = f"it begins at byte {entry.header_offset:,}; the record before it ends at byte {expected:,}"
    return ContainerDefectError("damaged", message, entry.name)


def _is_torch_padding(extra: bytes) -> bool:
    """Whether an extra field is torch's padding: `FB`, a length and that many `Z`, behind a zip64 field or alone."""
    if extra[:2] == b"\x01\x00":
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    padding = len(extra) - 4
    return (
        extra[:2] == _PADDING_EXTRA
        and int.from_bytes(extra[2:4], "little") == padding
        and extra.count(b"Z", 4) == padding
    )


def _check_local_sizes(entry: _Entry, extra: bytes, crc32: int, compressed: int, size: int) -> None:
    """Compares the sizes and the CRC-32 in a record's header; with a descriptor behind it they may be 0."""
    try:
        size, compressed, *_ = _zip64_values(extra, size, compressed)
    except ContainerDefectError:
        raise _header_defect(entry, "it lacks its zip64 sizes") from None
    unset = (0,) if entry.flags & _HAS_DESCRIPTOR else ()
    if size not in (entry.size, *unset) or compressed not in (entry.size, *unset):
        raise _header_defect(entry, f"it gives {size:,} bytes, the directory {entry.size:,}")
    if crc32 not in (entry.crc32, *unset):
        raise _header_defect(entry, f"it gives the CRC-32 {crc32:08x}, the directory {entry.crc32:08x}")


def _find_directory(source: Source) -> _Directory:
    size = source.size
    tail_size = min(size, _END.size + _LOCATOR.size + _END64.size)
    tail = source.read_at(size - tail_size, tail_size, "the end of the archive")
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise _no_end(source)
    _, disk, first_disk, count_here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    if comment:
        raise ContainerDefectError("damaged", "the archive ends with a comment, which torch never writes")
    if tail[-_END.size - _LOCATOR.size :][:4] == b"PK\x06\x07":
        narrow = (disk, first_disk, count_here, count, length, start)
        _, locator_disk, end, disks = _LOCATOR.unpack(tail[-_END.size - _LOCATOR.size : -_END.size])
        if end != size - tail_size or tail[:4] != b"PK\x06\x06" or (locator_disk, disks) != (0, 1):
            raise ContainerDefectError("damaged", "the archive's zip64 directory is not where its locator says")
        _, rest, _, _, *wide = _END64.unpack(tail[: _END64.size])
        disk, first_disk, count_here, count, length, start = wide
        if rest != _END64.size - 12 or any(n not in (w, _WIDE, 0xFFFF) for n, w in zip(narrow, wide, strict=True)):
            raise ContainerDefectError("damaged", "the archive's zip64 directory disagrees with its short form")
    if (disk, first_disk) != (0, 0) or count_here != count:
        raise ContainerDefectError("damaged", "the archive's directory says that it is one part of several")
    if start + length != end or length > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > length or count > MAX_RECORDS:
        raise ContainerDefectError(
            "damaged",
            f"the archive's directory of {count:,} entries and {length:,} bytes at byte {start:,} does not end at byte "
            f"{end:,}, or has more than {MAX_RECORDS:,} entries or {MAX_DIRECTORY_BYTES:,} bytes",
        )
    if not count:
        raise ContainerDefectError("unrecognised", "it is a zip archive with nothing in it")
    return _Directory(start, end, count)


def _no_end(source: Source) -> ContainerDefectError:
    """What is wrong with a file that does not end as an archive: it goes on, or it was cut off."""
    size = min(source.size, _END.size + 2**16)
    tail = source.read_at(source.size - size, size, "the end of the archive")
    at = tail.rfind(b"PK\x05\x06")
    if 0 <= at <= len(tail) - _END.size:
        *_, length, start, _ = _END.unpack_from(tail, at)
        where = source.size - size + at
        # With zip64, as torch writes it, its two records of 76 bytes lie between.
        if start + length in (where, where - _LOCATOR.size - _END64.size):
            extra = len(tail) - at - _END.size
            return ContainerDefectError("damaged", f"{extra:,} bytes follow the end of the archive")
    return ContainerDefectError(
        "truncated", f"the file ends after {source.size:,} bytes without the archive's directory: it was cut off"
    )


def _read_directory(source: Source, directory: _Directory) -> _Columns:
    raw = source.read_at(directory.start, directory.end - directory.start, "the archive's directory")
    usual = _columns_of_torch(raw, directory.entries)
    if usual is not None:
        return usual
    entries, at = [], 0
    for _ in range(directory.entries):
        entry, at = _read_entry(raw, at)
        entries.append(entry)
    if at != len(raw):
        raise ContainerDefectError("damaged", f"the archive's directory has {len(raw) - at:,} bytes too many")
    _check_names(entries)
    entries.sort(key=_header_offset)
    return _Columns._make(zip(*entries, strict=True))


def _columns_of_torch(raw: bytes, count: int) -> _Columns | None:
    """The entries of a directory as torch writes it, all decoded at once.

    None for any other: nothing is refused here, and nothing passes that `_read_entry` and `_check_names` would refuse.
    """
    before, *pieces = raw.split(_CENTRAL_MAGIC, count + 1)
    fixed = b"".join([piece[: _TORCH_CENTRAL.size] for piece in pieces])
    raw_names = tuple([piece[_TORCH_CENTRAL.size :] for piece in pieces])
    if before or len(pieces) != count or len(fixed) != count * _TORCH_CENTRAL.size:
        return None
    if any(fixed[i :: _TORCH_CENTRAL.size].count(0) != count for i in _ZERO_BYTES):
        return None
    columns = zip(*_TORCH_CENTRAL.iter_unpack(fixed), strict=True)
    flags, crc32s, compressed, sizes, name_lengths, extra_lengths, offsets = columns
    if any(f & ~_ALLOWED_FLAGS for f in set(flags)) or sizes != compressed:
        return None
    if any(extra_lengths) or _WIDE in sizes or _WIDE in offsets:
        entries = _with_zip64_fields(raw_names, name_lengths, extra_lengths, sizes, offsets)
        if entries is None:
            return None
        raw_names, sizes, offsets = zip(*entries, strict=True)
    if list(offsets) != sorted(offsets):
        return None
    if name_lengths != tuple(map(len, raw_names)) or not 0 < min(name_lengths) <= max(name_lengths) <= MAX_NAME_BYTES:
        return None
    names = _names_in_one_folder(raw_names)
    return None if names is None else _Columns(names, raw_names, sizes, crc32s, offsets, flags)


def _with_zip64_fields(
    tails: tuple[bytes, ...],
    name_lengths: tuple[int, ...],
    extra_lengths: tuple[int, ...],
    sizes: tuple[int, ...],
    offsets: tuple[int, ...],
) -> list[tuple[bytes, int, int]] | None:
    """Name, size and offset of each entry; those that are 0xFFFFFFFF from the field that follows the name in its tail.

    None where a field is not the one that torch writes for what is in it.
    """
    entries = []
    for tail, name_length, extra_length, size, offset in zip(
        tails, name_lengths, extra_lengths, sizes, offsets, strict=True
    ):
        field = tail[name_length:]
        if field and size == _WIDE:
            size = int.from_bytes(field[4:12], "little")
        if field and offset == _WIDE:
            offset = int.from_bytes(field[-8:], "little")
        if len(field) != extra_length or field != _zip64_field(size, size, offset):
            return None
        entries.append((tail[:name_length], size, offset))
    return entries


def _names_in_one_folder(raw_names: tuple[bytes, ...]) -> tuple[str, ...] | None:
    """The names without their folder; None where `_check_names` could refuse one, or one is not ASCII."""
    joined = b"\0".join(raw_names)
    if not joined.isascii():
        return None
    text = joined.decode()
    folder = text.partition("\0")[0].partition("/")[0] + "/"
    names = f"\0{text}".split(f"\0{folder}")[1:]
    lower = names if joined == joined.lower() else text.lower().split("\0")
    if not len(raw_names) == text.count("\0") + 1 == len(names) == len(set(lower)):
        return None
    parts = f"/{text}/".replace("\0", "/")
    if "\\" in text or any(f"/{part}/" in parts for part in _LEADING_AWAY):
        return None
    return tuple(names)


def _read_entry(raw: bytes, at: int) -> tuple[_Entry, int]:
    if len(raw) - at < _CENTRAL.size:
        raise ContainerDefectError("damaged", "the archive's directory ends in the middle of an entry")
    (
        magic, _, _, flags, method, _, _, crc32, compressed, size,
        name_length, extra_length, comment_length, disk, _, external, offset,
    ) = _CENTRAL.unpack_from(raw, at)  # fmt: skip
    start = at + _CENTRAL.size
    extra_start = start + name_length
    end = extra_start + extra_length
    raw_name = raw[start:extra_start]
    if magic != _CENTRAL_MAGIC or not 0 < name_length <= MAX_NAME_BYTES or end > len(raw):
        raise ContainerDefectError("damaged", f"the archive's directory has no entry at byte {at:,} of it")
    try:
        path = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise ContainerDefectError("damaged", "a record's name in the archive's directory is not UTF-8") from None
    name = path.partition("/")[2] or path
    if size == _WIDE or compressed == _WIDE or offset == _WIDE:
        size, compressed, offset = _zip64_values(raw[extra_start:end], size, compressed, offset)
    if method or compressed != size:
        raise ContainerDefectError(
            "damaged", f"it is compressed (method {method}); torch stores records as they are", name
        )
    if disk or comment_length or external & _IS_FOLDER:
        raise ContainerDefectError("damaged", "it is said to be a folder, to have a comment or to lie elsewhere", name)
    if flags & ~_ALLOWED_FLAGS:
        raise ContainerDefectError("damaged", f"it has flags 0x{flags:04x}: encrypted, or not written by torch", name)
    return _Entry(name, raw_name, size, crc32, offset, flags), end


def _zip64_values(extra: bytes, *values: int) -> list[int]:
    """The values with each 0xFFFFFFFF replaced by its 64-bit form from the zip64 extra field (APPNOTE 4.5.3)."""
    if _WIDE not in values:
        return list(values)
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64_EXTRA:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            break
        at += 4 + length
    if values.count(_WIDE) > len(wide):
        raise ContainerDefectError("damaged", "an entry of the archive's directory lacks its zip64 sizes")
    return [wide.pop(0) if v == _WIDE else v for v in values]


def _check_names(entries: list[_Entry]) -> None:
    seen: set[str] = set()
    folder = entries[0].raw_name.decode().partition("/")[0] + "/"
    usual = folder[:-1] not in _LEADING_AWAY and "\\" not in folder and "\0" not in folder
    storages = folder + "data/" if usual else "/"
    for entry in entries:
        path = entry.raw_name.decode()
        # torch looks names up without regard to case and takes one of several by chance of its search.
        key = path.lower()
        if key in seen:
            raise ContainerDefectError("damaged", "it is in the archive more than once", entry.name)
        seen.add(key)
        if path.startswith(storages) and path[len(storages) :].isdecimal():
            continue
        parts = path.split("/")
        if not path.startswith(folder) or "\\" in key or "\0" in key or not _LEADING_AWAY.isdisjoint(parts):
            raise ContainerDefectError("damaged", f"record {path!r} does not lie in the archive's one folder")


_LEADING_AWAY = frozenset(("", ".", ".."))
"""What no part of a record's path may be."""
