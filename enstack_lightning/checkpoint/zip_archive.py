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
from collections.abc import Iterator
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
_WIDE = 0xFFFFFFFF
_IS_FOLDER = 0x10
_ZIP64_EXTRA = 0x0001
_PADDING_EXTRA = b"FB"
_USUAL_EXTRA_BYTES = 160
"""Of a local header: a zip64 field and padding to 64 bytes take less; more is read when it is said to be there."""

_READ_AHEAD_BYTES = 256
"""Read with a descriptor in a file on disk: as a rule, the header behind it."""


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

    Raises:
        ContainerDefectError: the bytes are no intact archive of stored records in one folder.
        OSError: they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.unlike_torch: Counter[str] = Counter()
        directory = _find_directory(source)
        entries = _read_directory(source, directory)
        entries.sort(key=_header_offset)
        source.prefetch(_beside_payloads(entries, directory.start))
        if source.local_fd() is not None and (records := _as_torch_writes(source, entries, directory.start)):
            self.records = records
            return
        self._ahead = 0 if source.local_fd() is None else _READ_AHEAD_BYTES
        self._near, self._near_offset = b"", 0
        self.records = self._read_headers(entries, directory.start)

    def check_alignment(self, alignment: int) -> None:
        """Counts the records that do not begin at a multiple of `alignment` bytes."""
        for record in self.records.values():
            if record.size and record.offset % alignment:
                self.unlike_torch[f"does not begin at a multiple of {alignment:,} bytes"] += 1

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


def _as_torch_writes(source: Source, entries: list[_Entry], end: int) -> dict[str, Record] | None:
    """The records, where all bytes beside them are those that torch writes in an archive below 4 GiB; else None.

    What lies between two payloads follows from the directory, and is compared at once: the descriptor of the one, the
    header of the other and its padding.
    """
    if end >= _WIDE:
        return None
    records = {}
    at, descriptor = 0, b""
    borders = [e.header_offset for e in entries[1:]]
    borders.append(end)
    for (_, name, raw_name, size, crc32, header_offset, flags), border in zip(entries, borders, strict=True):
        offset = border - size - (_DESCRIPTOR.size if flags & _HAS_DESCRIPTOR else 0)
        name_length = len(raw_name)
        padding = _PADDINGS.get(offset - header_offset - _LOCAL.size - name_length)
        if padding is None or (not flags & _HAS_DESCRIPTOR and (size or crc32)):
            return None
        header = _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, name_length, len(padding))
        between = descriptor + header + raw_name + padding
        if at + len(between) != offset or source.read_at(at, len(between), name) != between:
            return None
        descriptor = _DESCRIPTOR.pack(b"PK\x07\x08", crc32, size, size) if flags & _HAS_DESCRIPTOR else b""
        at = offset + size
        records[name] = Record(name, size, crc32, header_offset, offset)
    return records if source.read_at(at, end - at, name) == descriptor else None


_PADDINGS = {n + 4: _PADDING_EXTRA + n.to_bytes(2, "little") + b"Z" * n for n in range(2 * DEFAULT_ALIGNMENT)}
"""Torch's extra fields by their length: what puts the payload behind one at a multiple of 64."""


def _beside_payloads(entries: list[_Entry], end: int) -> Iterator[tuple[int, int]]:
    """Offset and length of all headers, descriptors and whatever small lies between them, and of the pickle.

    Begins in the middle, which is in memory only if all is: both ends have been read already.
    """
    spans = list(zip(entries, [*(e.header_offset for e in entries[1:]), end], strict=True))
    half = len(spans) // 2
    for entry, border in (*spans[half:], *spans[:half]):
        start, whole = entry.header_offset, border - entry.header_offset
        if entry.name == "data.pkl" and whole <= MAX_PREFETCHED_RECORD:
            yield start, whole
        elif whole > 0:
            yield start, min(whole, _LOCAL.size + len(entry.raw_name) + _USUAL_EXTRA_BYTES)
            yield max(border - _DESCRIPTOR64.size, start), min(whole, _DESCRIPTOR64.size)


class _Directory(NamedTuple):
    start: int
    end: int
    entries: int


class _Entry(NamedTuple):
    """A record as the directory has it; `path` with the archive's folder, `name` without."""

    path: str
    name: str
    raw_name: bytes
    size: int
    crc32: int
    header_offset: int
    flags: int


def _header_offset(entry: _Entry) -> int:
    return entry.header_offset


def _header_defect(entry: _Entry, why: str) -> ContainerDefectError:
    return ContainerDefectError("damaged", f"its header disagrees with the archive's directory: {why}", entry.name)


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


def _read_directory(source: Source, directory: _Directory) -> list[_Entry]:
    raw = source.read_at(directory.start, directory.end - directory.start, "the archive's directory")
    entries, at = [], 0
    for _ in range(directory.entries):
        entry, at = _read_entry(raw, at)
        entries.append(entry)
    if at != len(raw):
        raise ContainerDefectError("damaged", f"the archive's directory has {len(raw) - at:,} bytes too many")
    _check_names(entries)
    return entries


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
    if magic != b"PK\x01\x02" or not 0 < name_length <= MAX_NAME_BYTES or end > len(raw):
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
    return _Entry(path, name, raw_name, size, crc32, offset, flags), end


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
    folder = entries[0].path.partition("/")[0] + "/"
    usual = folder[:-1] not in _LEADING_AWAY and "\\" not in folder and "\0" not in folder
    storages = folder + "data/" if usual else "/"
    for entry in entries:
        path = entry.path
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
