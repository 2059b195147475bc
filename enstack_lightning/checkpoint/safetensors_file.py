"""The safetensors container: header in, tensor descriptions out; the buffer is never read.

Every validity rule of the format is applied, also the two that the reference reader lets pass (a header that does not
begin with `{`, a name that stands twice). Format: the "Format" section of the safetensors README.
"""

from __future__ import annotations

import json
from typing import Any

from enstack_lightning.checkpoint.facts import TensorFacts
from enstack_lightning.checkpoint.source import ContainerDefectError, Source

MAX_HEADER_BYTES = 100_000_000

_DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


def read_safetensors_header(source: Source) -> tuple[TensorFacts, ...]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        ContainerDefectError: the file breaks a rule of the format.
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
    raw = source.read_at(8, length)
    header = _parse(raw)
    header.pop("__metadata__", None)
    spans = sorted((_span(name, entry), name) for name, entry in header.items())
    end = 0
    for (begin, stop), name in spans:
        if begin != end:
            raise ContainerDefectError(
                "damaged", f"tensor {name} begins at byte {begin:,} of the buffer; the one before it ends at {end:,}"
            )
        end = stop
    if 8 + length + end != size:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise ContainerDefectError(kind, f"the header describes {8 + length + end:,} bytes and the file has {size:,}")
    return tuple(TensorFacts(name, header[name]["dtype"], tuple(header[name]["shape"])) for _, name in spans)


def _parse(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise ContainerDefectError("damaged", "the header does not begin with '{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise ContainerDefectError("damaged", f"the header is no valid JSON: {e}") from e
    assert isinstance(header, dict)
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return unique


def _span(name: str, entry: object) -> tuple[int, int]:
    """Begin and end of a tensor's bytes in the buffer, once its description has proved consistent."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ContainerDefectError("damaged", f"the description of tensor {name} lacks dtype, shape or data_offsets")
    bits = _DTYPE_BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if bits is None:
        raise ContainerDefectError("damaged", f"tensor {name} has the unknown dtype {entry['dtype']!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ContainerDefectError("damaged", f"tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
    for n in shape:
        bits *= n
        if bits >= 2**67:
            raise ContainerDefectError("damaged", f"tensor {name} of shape {shape} is larger than any file")
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ContainerDefectError(
            "damaged", f"tensor {name} needs {bits / 8:,.0f} bytes and is given {offsets[1] - offsets[0]:,}"
        )
    return offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**64 for v in value)
