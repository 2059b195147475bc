"""The `.metadata` of a sharded checkpoint: a symbolic pickle in, the stored pieces of every entry out.

The classes: `torch/distributed/checkpoint/metadata.py` (`Metadata`, `MetadataIndex`, `TensorStorageMetadata`, …) and
`filesystem.py` (`_StorageInfo`). A tensor is stored in chunks, of which each is a file of `torch.save` within a data
file; everything else is one such file an entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enstack_lightning.checkpoint.inert_pickle import DTYPE_BYTES, Call, Global

PathTo = tuple[str | int, ...]
"""The keys under which an entry stood in the state dict that was saved."""

MAX_ENTRIES = 2_000_000
MAX_DEPTH = 64
MAX_COMPARISONS = 2_000_000
"""Comparisons of chunks with each other; a tensor on a grid of 64 x 64 processes needs 260,000."""

_LIMIT = 2**63
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class MetadataDefectError(ValueError):
    """A `.metadata` is not of the form that torch writes, or contradicts itself."""


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of the state dict, whole; `filled_chunks` pieces of it have elements."""

    name: str
    path: PathTo
    dtype: str
    shape: tuple[int, ...]
    filled_chunks: int


@dataclass(frozen=True)
class Piece:
    """A file of `torch.save` at `[offset, offset + length)` of the data file `file`.

    Attributes:
        tensor: the tensor that it is a chunk of; None for an entry that is no tensor.
        start: where the chunk begins in the tensor, one number a dimension.
        shape: the chunk's shape.
    """

    name: str
    path: PathTo
    file: str
    offset: int
    length: int
    tensor: ShardedTensor | None = None
    start: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def is_chunk(self) -> bool:
        """Whether it is one of several chunks."""
        return self.tensor is not None and self.tensor.filled_chunks > 1

    @property
    def data_bytes(self) -> int:
        """Bytes of the chunk's values."""
        return 0 if self.tensor is None else DTYPE_BYTES[self.tensor.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class ShardMetadata:
    """What a `.metadata` describes, and what in it cannot be."""

    tensors: tuple[ShardedTensor, ...]
    pieces: tuple[Piece, ...]
    defects: tuple[str, ...]


def shard_metadata(value: object) -> ShardMetadata:
    """The tensors and pieces that the value of a `.metadata` describes.

    Raises:
        MetadataDefectError: it is no `Metadata` of torch, or a part of it is of another form.
    """
    fields = _fields(value, _METADATA, "Metadata")
    entries, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise MetadataDefectError("it lacks state_dict_metadata or storage_data")
    if len(entries) + len(stored) > MAX_ENTRIES:
        raise MetadataDefectError(f"it has {len(entries) + len(stored):,} entries; the limit is {MAX_ENTRIES:,}")
    places = _places(stored)
    paths = fields.get("planner_data")
    comparisons = MAX_COMPARISONS
    tensors: list[ShardedTensor] = []
    pieces: list[Piece] = []
    defects: list[str] = []
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise MetadataDefectError(f"an entry is named by a {type(name).__name__}")
        path = _path(paths, name)
        if _is_a(entry, _METADATA, "BytesStorageMetadata"):
            place = places.pop((name, None), None)
            if place is None:
                defects.append(f"it does not say where {name} is stored")
            else:
                pieces.append(Piece(name, path, *place))
            continue
        tensor, chunks = _tensor(name, path, entry)
        tensors.append(tensor)
        problem, used = _why_not_whole(tensor.shape, chunks, comparisons)
        comparisons -= used
        if problem:
            defects.append(f"{name}: {problem}")
        for start, shape in chunks:
            place = places.pop((name, start), None)
            if place is not None:
                pieces.append(Piece(name, path, *place, tensor, start, shape))
                if place[2] < pieces[-1].data_bytes:
                    defects.append(
                        f"{name}: {place[2]:,} bytes of {place[0]} are given to a chunk of "
                        f"{pieces[-1].data_bytes:,} bytes"
                    )
            elif math.prod(shape):
                defects.append(f"it does not say where the chunk of {name} from {list(start)} on is stored")
    defects += [f"it stores {name}, which is no entry or chunk of the state dict" for name, _ in places]
    return ShardMetadata(tuple(tensors), tuple(pieces), tuple(defects))


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(entry, start of the chunk) -> (file, offset, length)."""
    places = {}
    for index, info in stored.items():
        key, place = _fields(index, _METADATA, "MetadataIndex"), _fields(info, _FILESYSTEM, "_StorageInfo")
        name, file = key.get("fqn"), place.get("relative_path")
        start = None if key.get("offset") is None else _sizes(key["offset"], "the start of a chunk")
        if not isinstance(name, str) or not isinstance(file, str):
            raise MetadataDefectError("an entry or a file is not named by text")
        if place.get("transform_descriptors"):
            raise MetadataDefectError(f"{name} was transformed when it was stored (compressed, say), and is not read")
        offset, length = _size(place.get("offset"), "an offset"), _size(place.get("length"), "a length")
        if (name, start) in places:
            raise MetadataDefectError(f"{name} is stored twice")
        places[name, start] = (file, offset, length)
    return places


def _tensor(name: str, path: PathTo, entry: object) -> tuple[ShardedTensor, list[tuple[tuple[int, ...], ...]]]:
    fields = _fields(entry, _METADATA, "TensorStorageMetadata")
    shape, chunks = _sizes(fields.get("size"), "a shape"), fields.get("chunks")
    if not isinstance(chunks, list):
        raise MetadataDefectError(f"{name} has no list of chunks")
    pieces: list[tuple[tuple[int, ...], ...]] = []
    for chunk in chunks:
        parts = _fields(chunk, _METADATA, "ChunkStorageMetadata")
        pieces.append((_sizes(parts.get("offsets"), "a chunk"), _sizes(parts.get("sizes"), "a chunk")))
    filled = sum(1 for _, size in pieces if math.prod(size))
    return ShardedTensor(name, path, _dtype(name, fields.get("properties")), shape, filled), pieces


def _dtype(name: str, properties: object) -> str:
    if not _is_a(properties, _METADATA, "TensorProperties"):
        raise MetadataDefectError(f"{name} has no TensorProperties")
    assert isinstance(properties, Call)
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in DTYPE_BYTES:
        raise MetadataDefectError(f"{name} has the unknown dtype {dtype!s:.60}")
    return dtype.name


def _why_not_whole(
    shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], ...]], budget: int
) -> tuple[str, int]:
    """Why the chunks do not make up the tensor, each element once; empty when they do. And the comparisons used."""
    for start, size in chunks:
        if len(start) != len(shape) or len(size) != len(shape):
            return f"a chunk has {len(size)} dimensions and the tensor {len(shape)}", 0
        if any(a + n > whole for a, n, whole in zip(start, size, shape, strict=True)):
            return f"a chunk of shape {list(size)} from {list(start)} on reaches beyond the shape {list(shape)}", 0
    covered = sum(math.prod(size) for _, size in chunks)
    if covered != math.prod(shape):
        return f"its chunks hold {covered:,} of {math.prod(shape):,} elements", 0
    return _overlap([c for c in chunks if math.prod(c[1])], budget)


def _overlap(chunks: list[tuple[tuple[int, ...], ...]], budget: int) -> tuple[str, int]:
    """Sweeps along the first dimension, comparing each chunk with those that have not ended."""
    used = 0
    alive: list[tuple[tuple[int, ...], ...]] = []
    for start, size in sorted(chunks):
        if not start:
            return ("it has more than one chunk", used) if len(chunks) > 1 else ("", used)
        alive = [(a, n) for a, n in alive if a[0] + n[0] > start[0]]
        used += len(alive)
        if used > budget:
            return "its chunks lie in a pattern too tangled to check", used
        for a, n in alive:
            if all(p < b + m and b < p + q for p, q, b, m in zip(start, size, a, n, strict=True)):
                return f"its chunks from {list(a)} and from {list(start)} on overlap", used
        alive.append((start, size))
    return "", used


def _path(paths: object, name: str) -> PathTo:
    path = paths.get(name) if isinstance(paths, dict) else None
    if path is None:
        return (name,)
    if not isinstance(path, tuple) or not 0 < len(path) <= MAX_DEPTH or any(type(p) not in (str, int) for p in path):
        raise MetadataDefectError(f"the place of {name} in the state dict is no tuple of keys")
    if ".".join(map(str, path)) != name:
        raise MetadataDefectError(f"{name} is said to stand at {'.'.join(map(str, path))[:200]} in the state dict")
    return path


def _fields(value: object, module: str, name: str) -> Mapping[str, Any]:
    if not _is_a(value, module, name) or not isinstance(value, Call) or not isinstance(value.state, dict | None):
        raise MetadataDefectError(f"it holds a {_shown(value)} where a {name} of torch is needed")
    return value.state or {}


def _is_a(value: object, module: str, name: str) -> bool:
    return isinstance(value, Call) and value.function == Global(module, name)


def _shown(value: object) -> str:
    return f"{value.function!s:.80}" if isinstance(value, Call) else type(value).__name__


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DEPTH:
        raise MetadataDefectError(f"{what} is a {_shown(value)} and no list of whole numbers")
    return tuple(_size(n, what) for n in value)


def _size(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise MetadataDefectError(f"{what} is {value!r:.40}, and must be a whole number from 0 up")
    return value


def nested(values: Iterable[tuple[PathTo, object]]) -> dict[str, Any]:
    """The state dict with each value under its path, where whole numbers are places in a list.

    Raises:
        MetadataDefectError: a value stands where another's container is needed.

    >>> nested([(("optimizer", "param_groups", 0, "lr"), 0.1), (("epoch",), 3)])
    {'optimizer': {'param_groups': [{'lr': 0.1}]}, 'epoch': 3}
    """
    root: dict[Any, Any] = {}
    containers = {id(root)}
    for path, value in values:
        at = root
        for key in path[:-1]:
            if key not in at:
                at[key] = {}
                containers.add(id(at[key]))
            elif id(at[key]) not in containers:
                raise MetadataDefectError(f"{'.'.join(map(str, path))[:200]} lies within a value")
            at = at[key]
        if path[-1] in at:
            raise MetadataDefectError(f"{'.'.join(map(str, path))[:200]} stands twice in the state dict")
        at[path[-1]] = value
    tree: dict[str, Any] = {str(key): _with_lists(value, containers) for key, value in root.items()}
    return tree


def _with_lists(value: Any, containers: set[int]) -> Any:
    if id(value) not in containers:
        return value
    inner = {key: _with_lists(v, containers) for key, v in value.items()}
    if inner and all(type(key) is int for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner
