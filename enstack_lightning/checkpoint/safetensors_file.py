"""The safetensors container: header in, tensor descriptions out; the buffer is read only by `--deep`.

Every validity rule of the format is applied, also those that the reference reader lets pass: a header that does not
begin with `{`, a name that stands twice, an entry with further fields. The header is scanned with a grammar of its own
rather than with a JSON parser, so that whatever the format has no use for (fractions, NaN, nested values) ends the
reading at once, and memory is bounded by the tensors that are really described.

Format: the "Format" section of the safetensors README; the order of the checks on sizes: `Metadata::validate` and
`TensorInfo` in safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from enstack_lightning.checkpoint.deep import NamedTensor, Span
from enstack_lightning.checkpoint.source import ContainerDefectError, ContainerDefectKind, Source

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_TENSORS = 100_000
MAX_VALUES = 2_000_000
"""Numbers and names in one header; the largest published models have some 100,000 tensors in all their shards."""

MAX_DIMENSIONS = 1_000
MAX_NAME_BYTES = 64 * 2**10
MAX_METADATA_BYTES = 16 * 2**20


class SafetensorsTensor(NamedTuple):
    """A tensor by its header.

    Attributes:
        name: as the file has it, which may be any text: empty, with control characters, like a path.
        dtype: torch's name without `torch.`, or the name torch would use for one that it lacks.
        shape: as torch gives it (two elements of `float4_e2m1fn_x2` are one there).
        offset: of its first byte in the file.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself: its tensors in the order of their bytes, and the free `__metadata__`."""

    tensors: tuple[SafetensorsTensor, ...]
    metadata: Mapping[str, str]


class _Dtype(NamedTuple):
    bits: int
    torch_name: str


_DTYPES = {
    "BOOL": _Dtype(8, "bool"),
    "F4": _Dtype(4, "float4_e2m1fn"),
    "F6_E2M3": _Dtype(6, "float6_e2m3fn"),
    "F6_E3M2": _Dtype(6, "float6_e3m2fn"),
    "U8": _Dtype(8, "uint8"),
    "I8": _Dtype(8, "int8"),
    "F8_E5M2": _Dtype(8, "float8_e5m2"),
    "F8_E4M3": _Dtype(8, "float8_e4m3fn"),
    "F8_E8M0": _Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": _Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": _Dtype(8, "float8_e5m2fnuz"),
    "I16": _Dtype(16, "int16"),
    "U16": _Dtype(16, "uint16"),
    "F16": _Dtype(16, "float16"),
    "BF16": _Dtype(16, "bfloat16"),
    "I32": _Dtype(32, "int32"),
    "U32": _Dtype(32, "uint32"),
    "F32": _Dtype(32, "float32"),
    "C64": _Dtype(64, "complex64"),
    "F64": _Dtype(64, "float64"),
    "I64": _Dtype(64, "int64"),
    "U64": _Dtype(64, "uint64"),
}


def read_safetensors_header(source: Source) -> SafetensorsHeader:
    """The header of a safetensors file.

    Raises:
        ContainerDefectError: the file breaks a rule of the format, or describes more than any checkpoint holds.
        OSError: the file cannot be read.
    """
    size = source.size
    if size < 8:
        raise ContainerDefectError("truncated", f"the file has {size:,} bytes; a header alone needs more")
    length = int.from_bytes(source.read_at(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ContainerDefectError(
            "unrecognised", f"its first 8 bytes are no header length of safetensors ({length:,} bytes)"
        )
    if 8 + length > size:
        raise ContainerDefectError("truncated", f"the header needs {8 + length:,} bytes and the file has {size:,}")
    entries, metadata = _Scanner(source.read_at(8, length, "the header")).header()
    begin = 8 + length
    tensors = _placed(entries, begin)
    end = tensors[-1].offset + tensors[-1].size if tensors else begin
    if end != size:
        kind: ContainerDefectKind = "truncated" if size < end else "damaged"
        raise ContainerDefectError(kind, f"the header describes {end:,} bytes and the file has {size:,}")
    return SafetensorsHeader(tensors, metadata)


def spans(header: SafetensorsHeader, where: str = "") -> list[Span]:
    """The bytes of every tensor that has some, for reading them deeply; the format keeps no checksum.

    Args:
        where: what the file is called in findings.
    """
    return [Span(where, t.offset, t.size, None, (_as_weight(t),)) for t in header.tensors if t.size]


def _as_weight(tensor: SafetensorsTensor) -> NamedTensor:
    """As contiguous as the format has all tensors."""
    stride, step = [], 1
    for n in reversed(tensor.shape):
        stride.append(step)
        step *= max(n, 1)
    return NamedTensor(tensor.name, "weight", tensor.dtype, tensor.shape, tuple(reversed(stride)), 0)


class _Entry(NamedTuple):
    """A tensor as the header has it; begin first, so that entries sort by their place in the buffer."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def _placed(entries: list[_Entry], begin: int) -> tuple[SafetensorsTensor, ...]:
    """The tensors in the order of their bytes, which fill the buffer without holes and without overlaps."""
    entries.sort(key=itemgetter(0, 1))
    tensors, end = [], 0
    for entry in entries:
        if entry.begin != end:
            raise _damaged(
                f"tensor {shown(entry.name)} begins at byte {entry.begin:,} of the buffer; "
                f"the one before it ends at {end:,}"
            )
        size = _size(entry)
        if entry.end - entry.begin != size:
            raise _damaged(f"tensor {shown(entry.name)} needs {size:,} bytes and is given {entry.end - entry.begin:,}")
        dtype, shape = _as_torch_has_it(entry)
        tensors.append(SafetensorsTensor(entry.name, dtype, shape, begin + entry.begin, size))
        end = entry.end
    return tuple(tensors)


def _size(entry: _Entry) -> int:
    """Bytes of a tensor, counted from its shape as the reference reader does: in 64 bits, from left to right."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise _damaged(f"tensor {shown(entry.name)} has the unknown dtype {shown(entry.dtype)}")
    count = 1
    for n in entry.shape:
        count *= n
        if count >= 2**64:
            raise _damaged(f"tensor {shown(entry.name)} of shape {_shown_shape(entry.shape)} is larger than any file")
    bits = count * dtype.bits
    if bits >= 2**64:
        raise _damaged(f"tensor {shown(entry.name)} of shape {_shown_shape(entry.shape)} is larger than any file")
    if bits % 8:
        raise _damaged(f"tensor {shown(entry.name)} ends within a byte: {count:,} elements of {dtype.bits} bits")
    return bits // 8


def _as_torch_has_it(entry: _Entry) -> tuple[str, tuple[int, ...]]:
    name = _DTYPES[entry.dtype].torch_name
    if entry.dtype == "F4" and entry.shape and entry.shape[-1] % 2 == 0:
        return f"{name}_x2", (*entry.shape[:-1], entry.shape[-1] // 2)
    return name, entry.shape


_WS = rb"[ \t\n\r]*+"
_TEXT = rb'"((?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+)"'
_NUMBER = rb"(?:0|[1-9][0-9]{0,19}+)(?![0-9.eE])"

_NAME = re.compile(_WS + _TEXT + _WS + rb":" + _WS + rb"\{" + _WS)
_FIELD = re.compile(
    _WS + _TEXT + _WS + rb":" + _WS + rb"(?:" + _TEXT + rb"|\[" + _WS
    + rb"((?:" + _NUMBER + _WS + rb"(?:," + _WS + _NUMBER + _WS + rb")*+)?+)\])" + _WS + rb"([,}])"
)  # fmt: skip
_USUAL_ENTRY = re.compile(
    rb'"dtype":"([A-Z0-9_]++)","shape":\[((?:' + _NUMBER + rb"(?:," + _NUMBER + rb')*+)?+)\],"data_offsets":\[('
    + _NUMBER + rb"," + _NUMBER + rb")\]\}"
)  # fmt: skip
"""A description as the reference writer has it, in one go."""

_PAIR = re.compile(_WS + _TEXT + _WS + rb":" + _WS + _TEXT + _WS + rb"([,}])")
_AFTER = re.compile(_WS + rb"([,}])")
_BLANK = re.compile(_WS)

_FIELDS = ("dtype", "shape", "data_offsets")


class _Scanner:
    """Reads the header's JSON, of which the format needs only text, whole numbers, and objects two deep."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def header(self) -> tuple[list[_Entry], dict[str, str]]:
        raw = self._raw
        if raw[:1] != b"{":
            raise _damaged("the header does not begin with '{'")
        values, escapes = raw.count(b",") + 1, raw.count(b"\\")
        if values > MAX_VALUES or escapes > MAX_VALUES:
            raise _damaged(
                f"the header has {values:,} values and {escapes:,} escapes in its texts; "
                f"no checkpoint needs more than {MAX_VALUES:,}"
            )
        entries: dict[str, _Entry] = {}
        metadata: dict[str, str] | None = None
        self._at = 1
        more = self._match(_BLANK, "") and raw[self._at : self._at + 1] != b"}"
        if not more:
            self._match(_AFTER, "the end of the header")
        while more:
            name = self._text(self._match(_NAME, "a tensor's name and description")[1], MAX_NAME_BYTES)
            if name == "__metadata__":
                if metadata is not None:
                    raise _twice(name)
                metadata = self._metadata()
            else:
                if name in entries:
                    raise _twice(name)
                if len(entries) == MAX_TENSORS:
                    raise _damaged(
                        f"the header describes more than {MAX_TENSORS:,} tensors; no checkpoint has that many"
                    )
                entries[name] = self._entry(name)
            more = self._match(_AFTER, "a comma or the end of the header")[1] == b","
        self._match(_BLANK, "")
        if self._at != len(raw):
            raise self._unexpected("the end of the header")
        return list(entries.values()), metadata or {}

    def _entry(self, name: str) -> _Entry:
        usual = _USUAL_ENTRY.match(self._raw, self._at)
        if usual is not None:
            self._at = usual.end()
            return _entry_of(name, usual[1].decode("ascii"), usual[2], usual[3])
        found: dict[str, bytes] = {}
        is_list: dict[str, bool] = {}
        more = True
        while more:
            match = self._match(_FIELD, "dtype, shape or data_offsets of a tensor")
            key = self._text(match[1], MAX_NAME_BYTES)
            if key in found or key not in _FIELDS:
                what = "twice" if key in found else "as well"
                raise _damaged(f"the description of tensor {shown(name)} has {shown(key)} {what}")
            text, numbers = match[2], match[3]
            found[key], is_list[key] = (numbers, True) if text is None else (text, False)
            more = match[4] == b","
        if len(found) != 3:
            raise _damaged(
                f"the description of tensor {shown(name)} lacks {' and '.join(k for k in _FIELDS if k not in found)}"
            )
        if is_list != {"dtype": False, "shape": True, "data_offsets": True}:
            raise _damaged(f"the description of tensor {shown(name)} has a field of the wrong type")
        return _entry_of(name, self._text(found["dtype"], MAX_NAME_BYTES), found["shape"], found["data_offsets"])

    def _metadata(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        begin, more = self._at, self._raw[self._at : self._at + 1] != b"}"
        if not more:
            self._at += 1
        while more:
            match = self._match(_PAIR, "a pair of texts in __metadata__")
            if self._at - begin > MAX_METADATA_BYTES:
                raise _damaged(
                    f"__metadata__ has more than {MAX_METADATA_BYTES:,} bytes; no checkpoint needs that many"
                )
            key = self._text(match[1], MAX_METADATA_BYTES)
            if key in metadata:
                raise _twice(key)
            metadata[key] = self._text(match[2], MAX_METADATA_BYTES)
            more = match[3] == b","
        return metadata

    def _match(self, pattern: re.Pattern[bytes], wanted: str) -> re.Match[bytes]:
        match = pattern.match(self._raw, self._at)
        if match is None:
            raise self._unexpected(wanted)
        self._at = match.end()
        return match

    def _unexpected(self, wanted: str) -> ContainerDefectError:
        found = _BLANK.match(self._raw, self._at)
        at = self._at if found is None else found.end()
        begins = shown(self._raw[at : at + 20].decode("utf-8", "replace"))
        return _damaged(f"the header has {begins} at byte {at:,}, where {wanted} should be")

    def _text(self, raw: bytes, limit: int) -> str:
        if len(raw) > limit:
            raise _damaged(f"the header holds a text of {len(raw):,} bytes where {limit:,} are the limit")
        try:
            text = str(json.loads(b'"' + raw + b'"')) if b"\\" in raw else raw.decode("utf-8")
            text.encode("utf-8")
        except UnicodeError:
            raise _damaged(f"the header holds text that is not UTF-8 before byte {self._at:,}") from None
        return text


def _entry_of(name: str, dtype: str, shape_text: bytes, offsets_text: bytes) -> _Entry:
    dimensions = shape_text.count(b",") + 1
    if dimensions > MAX_DIMENSIONS:
        raise _damaged(f"tensor {shown(name)} has {dimensions:,} dimensions; the limit is {MAX_DIMENSIONS:,}")
    shape = tuple(map(int, shape_text.split(b","))) if shape_text else ()
    offsets = tuple(map(int, offsets_text.split(b","))) if offsets_text.count(b",") == 1 else ()
    if len(offsets) != 2 or max(offsets) >= 2**64 or max(shape, default=0) >= 2**64:
        raise _damaged(f"tensor {shown(name)} has shape {_shown_shape(shape)} and data_offsets {list(offsets)}")
    return _Entry(offsets[0], offsets[1], name, dtype, shape)


def _twice(name: str) -> ContainerDefectError:
    return _damaged(f"the name {shown(name)} stands twice in the header")


def _damaged(message: str) -> ContainerDefectError:
    return ContainerDefectError("damaged", message)


def shown(name: str) -> str:
    """A name from a file as it can stand in a message: one line, no control characters, not too long."""
    short = name if len(name) <= 80 else f"{name[:60]}...{name[-17:]}"
    return short if short.isprintable() and short.strip() else repr(short)


def _shown_shape(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"of {len(shape):,} dimensions"
