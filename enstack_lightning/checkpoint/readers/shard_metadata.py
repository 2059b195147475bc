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
from enstack_lightning.checkpoint.safetensors_file import shown

PathTo = tuple[str | int, ...]
"""The keys under which an entry stood in the state dict that was saved."""

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""Where it begins in its tensor, and its shape."""

MAX_DEPTH = 64
MAX_DEFECTS = 100
MAX_COMPARISONS = 2_000_000
"""Comparisons of chunks with each other; a tensor on a grid of 64 x 64 processes needs 260,000."""

_LIMIT = 2**63
_LAYOUTS = frozenset(
    f"torch.{name}"
    for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged", "_mkldnn")
)
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
    found = _Found(_places(stored))
    paths = fields.get("planner_data")
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise MetadataDefectError(f"an entry is named by a {type(name).__name__}")
        path = _path(paths, name)
        if _is_a(entry, _METADATA, "BytesStorageMetadata"):
            found.add_value(name, path)
        else:
            found.add_tensor(name, path, entry)
    for name, _ in found.places:
        found.add_defect(f"it stores {shown(name)}, which is no entry or chunk of the state dict")
    return ShardMetadata(tuple(found.tensors), tuple(found.pieces), tuple(found.defects))


class _Found:
    """Gathers entries; `places` are those that no entry has claimed yet."""

    def __init__(self, places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]) -> None:
        self.places = places
        self.tensors: list[ShardedTensor] = []
        self.pieces: list[Piece] = []
        self.defects: list[str] = []
        # A list of chunks may be shared by all entries of a pickle, so that it is met more often than it is written.
        self._chunks_left = 2 * len(places) + 1_000
        self._comparisons_left = MAX_COMPARISONS

    def add_defect(self, message: str) -> None:
        if len(self.defects) < MAX_DEFECTS:
            self.defects.append(message)

    def add_value(self, name: str, path: PathTo) -> None:
        place = self.places.pop((name, None), None)
        if place is None:
            self.add_defect(f"it does not say where {shown(name)} is stored")
        else:
            self.pieces.append(Piece(name, path, *place))

    def add_tensor(self, name: str, path: PathTo, entry: object) -> None:
        fields = _fields(entry, _METADATA, "TensorStorageMetadata")
        listed = fields.get("chunks")
        if not isinstance(listed, list):
            raise MetadataDefectError(f"{shown(name)} has no list of chunks")
        self._chunks_left -= len(listed)
        if self._chunks_left < 0:
            raise MetadataDefectError(f"its tensors have far more chunks than the {len(self.pieces):,} that are stored")
        shape, chunks = _sizes(fields.get("size"), "a shape"), [_chunk(c) for c in listed]
        filled = sum(1 for _, size in chunks if math.prod(size))
        tensor = ShardedTensor(name, path, _dtype(name, fields.get("properties")), shape, filled)
        self.tensors.append(tensor)
        problem, used = _why_not_whole(shape, chunks, self._comparisons_left)
        self._comparisons_left -= used
        if problem:
            self.add_defect(f"{shown(name)}: {problem}")
        for start, size in chunks:
            self._add_chunk(tensor, start, size)

    def _add_chunk(self, tensor: ShardedTensor, start: tuple[int, ...], size: tuple[int, ...]) -> None:
        place = self.places.pop((tensor.name, start), None)
        if place is None:
            if math.prod(size):
                message = f"it does not say where the chunk of {shown(tensor.name)} from {list(start)} on is stored"
                self.add_defect(message)
            return
        piece = Piece(tensor.name, tensor.path, *place, tensor, start, size)
        self.pieces.append(piece)
        if piece.length < piece.data_bytes:
            self.add_defect(
                f"{shown(tensor.name)}: {piece.length:,} bytes of {shown(piece.file)} are given to a chunk of "
                f"{piece.data_bytes:,} bytes"
            )


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
            raise MetadataDefectError(
                f"{shown(name)} was transformed when it was stored (compressed, say), and is not read"
            )
        offset, length = _size(place.get("offset"), "an offset"), _size(place.get("length"), "a length")
        if (name, start) in places:
            raise MetadataDefectError(f"{shown(name)} is stored twice")
        places[name, start] = (file, offset, length)
    return places


def _chunk(value: object) -> Chunk:
    fields = _fields(value, _METADATA, "ChunkStorageMetadata")
    return _sizes(fields.get("offsets"), "a chunk"), _sizes(fields.get("sizes"), "a chunk")


def _dtype(name: str, properties: object) -> str:
    """The dtype in `TensorProperties`: (dtype, layout, requires_grad, memory format, pinned)."""
    if not _is_a(properties, _METADATA, "TensorProperties") or not isinstance(properties, Call):
        raise MetadataDefectError(f"{shown(name)} has no TensorProperties")
    state = properties.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise MetadataDefectError(f"the TensorProperties of {shown(name)} are not five values")
    dtype, layout, _, memory_format, _ = state
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in DTYPE_BYTES:
        raise MetadataDefectError(f"{shown(name)} has the unknown dtype {dtype!s:.60}")
    if _argument(layout, "torch.serialization", "_get_layout") not in _LAYOUTS:
        raise MetadataDefectError(f"{shown(name)} has an unknown layout")
    if _argument(memory_format, _METADATA, "_MEM_FORMAT_ENCODING") not in (0, 1, 2):
        raise MetadataDefectError(f"{shown(name)} has an unknown memory format")
    return dtype.name


def _argument(value: object, module: str, name: str) -> object:
    """The one argument of a call of that function; None where it is something else."""
    if not isinstance(value, Call) or not _is_a(value, module, name) or len(value.args) != 1:
        return None
    return value.args[0] if type(value.args[0]) in (str, int) else None


def _why_not_whole(shape: tuple[int, ...], chunks: Sequence[Chunk], budget: int) -> tuple[str, int]:
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


def _overlap(chunks: list[Chunk], budget: int) -> tuple[str, int]:
    """Sweeps along the first dimension, comparing each chunk with those that have not ended."""
    used = 0
    alive: list[Chunk] = []
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
    if not isinstance(paths, dict) or not paths:
        return (name,)
    path = paths.get(name)
    if not isinstance(path, tuple) or not 0 < len(path) <= MAX_DEPTH or any(type(p) not in (str, int) for p in path):
        raise MetadataDefectError(f"the place of {shown(name)} in the state dict is no tuple of keys")
    if ".".join(map(str, path)) != name:
        raise MetadataDefectError(
            f"{shown(name)} is said to stand at {shown('.'.join(map(str, path)))} in the state dict"
        )
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
                raise MetadataDefectError(f"{shown('.'.join(map(str, path)))} lies within a value")
            at = at[key]
        if path[-1] in at:
            raise MetadataDefectError(f"{shown('.'.join(map(str, path)))} stands twice in the state dict")
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
