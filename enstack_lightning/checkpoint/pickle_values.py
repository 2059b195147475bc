"""What a pickle is read into: inert symbols for what it names and calls, descriptors for its storages and tensors.

Here are also the bounds on what a pickle may hold, as far as its values' own nature sets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from enstack_lightning.checkpoint.facts import OddityKind

MAX_KEY_LENGTH = 8_192
MAX_WORK = 1_000_000
_MAX_INT_KEY = 2**60
_MAX_KEY_DEPTH = 8
_MAX_OF_ONE_HASH = 32
"""Keys whose hashes are equal: a dict compares each with all others. All tuples of five -1 and -2 are as many."""


class PickleDefectError(ValueError):
    """The bytes are no pickle that this reader understands, cut short, or built to do harm.

    Attributes:
        globals: the names that the pickle would have imported until there; judge them all the same.
        cut_short: the bytes ended before the pickle did, so that more of them may make it whole.
    """

    def __init__(self, message: str, cut_short: bool = False) -> None:
        super().__init__(message)
        self.globals: tuple[Global, ...] = ()
        self.cut_short = cut_short


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import, kept as a name. Judge `module` and `name` apart: both may hold dots."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_NO_ENTRIES: Mapping[Any, Any] = MappingProxyType({})


class Call:
    """What the pickle would call, with what, kept as data. Calls are equal only to themselves.

    Attributes:
        function: a `Global`, or the `Call` that would have made the function.
        state: what `__setstate__` would be given.
        entries: what would be set by key.
        items: what would be appended or added.
    """

    __slots__ = ("args", "entries", "function", "items", "state")

    def __init__(self, function: object, args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args
        self.state: Any = None
        self.entries = _NO_ENTRIES
        self.items: Sequence[Any] = ()

    def __repr__(self) -> str:
        return f"<{self.function}>"


class Loop:
    """Stands where a value refers back to one that it lies in."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<loop>"


@dataclass(slots=True, unsafe_hash=True)  # not frozen: that takes five times as long to make
class StorageDescriptor:
    """Where a tensor's bytes lie: the record `data/<key>`, `numel` elements of `dtype`.

    Attributes:
        location: the device it was on, such as `cpu` or `cuda:0`.
        view: key, offset and length in elements of the part of it that is meant; torch before 0.4 saved such views.
            The offset of a tensor in it counts from there.
    """

    key: str
    dtype: str
    numel: int
    location: str
    view: tuple[str, int, int] | None = None


@dataclass(slots=True, unsafe_hash=True)  # not frozen: that takes five times as long to make
class TensorDescriptor:
    """A tensor by its header: `shape` and `stride` in elements, `offset` in elements into its storage.

    Attributes:
        storage: None where the file holds no bytes for it: a tensor on the meta device, or one made of `parts`.
        layout: `strided`, or that of a sparse tensor: `sparse_coo`, `sparse_csr`, …
        parts: the tensors that a sparse one is made of, its values last.
        negated: what stands in the storage has the other sign, as in the imaginary part of a conjugate.
    """

    storage: StorageDescriptor | None
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    layout: str = "strided"
    parts: tuple[TensorDescriptor, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Unpickled:
    """What a pickle holds.

    Attributes:
        value: the top-level value.
        globals: every name that the pickle would import.
        tensors: every tensor that it describes, also those that `value` does not lead to.
        storages: every storage that it refers to, in the order in which it first names them.
        oddities: what is valid and unusual, each with a sentence.
        refused_opcodes: those in it that `torch.load(weights_only=True)` does not know, and ends at.
    """

    value: Any
    globals: tuple[Global, ...]
    tensors: tuple[TensorDescriptor, ...]
    storages: tuple[StorageDescriptor, ...] = ()
    oddities: tuple[tuple[OddityKind, str], ...] = ()
    refused_opcodes: tuple[int, ...] = ()


STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "quint8": 1,
    "qint8": 1,
    "qint32": 4,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    # Several numbers in a byte; one element is the whole byte, but in a tensor of the dtypes of `VALUES_IN_A_BYTE`.
    "float4_e2m1fn_x2": 1,
    "quint4x2": 1,
    "quint2x4": 1,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    "bits8": 1,
    "bits16": 2,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}

VALUES_IN_A_BYTE = {"quint4x2": 2, "quint2x4": 4}
"""Elements of a tensor; its storage counts bytes."""


def bytes_of(dtype: str, elements: int) -> int:
    """The least bytes that so many elements of a tensor, side by side, can have.

    Raises:
        KeyError: the dtype is unknown.
    """
    return -(-elements * DTYPE_BYTES[dtype] // VALUES_IN_A_BYTE.get(dtype, 1))


CONTAINERS: Final = frozenset({list, dict, tuple, set, frozenset, Call})


class Work:
    """Counts what reading a pickle costs beyond one step an opcode, and keeps it bounded.

    Attributes:
        hooks: the dicts given to tensors as their backward hooks, which must still be empty at the end.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.hooks: list[Mapping[Any, Any]] = []
        self._first_of_hash: dict[int, Any] = {}
        self._others_of_hash: dict[int, set[Any]] = {}

    def spend(self, steps: int) -> None:
        """Counts values copied by a rebuild function, keys that are slow to compare, wide text, sets."""
        self.steps += steps
        if self.steps > MAX_WORK:
            raise PickleDefectError("the pickle asks for more work than any checkpoint does")

    def set_items(self, target: object, values: Sequence[Any]) -> None:
        """Sets keys and values, which follow each other in `values`, on a dict or a call."""
        if isinstance(target, Call):
            if target.entries is _NO_ENTRIES:
                target.entries = {}
            entries = target.entries
        else:
            entries = target  # type: ignore[assignment]
        if not isinstance(entries, dict):
            raise PickleDefectError(f"items are set on a {type(target).__name__}")
        known = len(entries)
        entries.update(zip(self.keys(values[::2]), values[1::2], strict=True))
        if len(entries) != known + len(values) // 2:
            # What a pickler writes has no key twice; one reader would take the first value, one the last.
            raise PickleDefectError("a key is set twice")

    def keys(self, values: Sequence[Any], depth: int = 0) -> Sequence[Any]:
        """The values, each fit to be a key: cheap to hash, to compare and, by its hash, to tell apart.

        Args:
            values: the keys, or the values of a tuple that is one.
            depth: how many tuples they lie in.
        """
        for key in values:
            kind = key.__class__
            if kind is str or kind is bytes:
                if len(key) > MAX_KEY_LENGTH:
                    raise PickleDefectError(f"a text of {len(key):,} characters is used as a key")
            elif kind is int and -_MAX_INT_KEY < key < _MAX_INT_KEY:
                continue
            elif kind is tuple:
                # Hashing a deeply nested tuple overflows the C stack, and a long one takes long every time.
                self.spend(len(key) + 1)
                if depth == _MAX_KEY_DEPTH:
                    raise PickleDefectError(f"a tuple nested more than {_MAX_KEY_DEPTH} times is used as a key")
                self.keys(key, depth + 1)
                self._tell_apart(key)
            elif kind in _KEY_TYPES_OF_NUMBERS:
                self._tell_apart(key)
            elif kind not in _KEY_TYPES:
                raise PickleDefectError(f"a {kind.__name__} is used as a key")
        return values

    def _tell_apart(self, key: Any) -> None:
        """Counts different keys by their hash, which whoever chooses their numbers may make equal."""
        self.spend(5)
        number = hash(key)
        first = self._first_of_hash.setdefault(number, key)
        if first is not key and first != key:
            others = self._others_of_hash.setdefault(number, set())
            others.add(key)
            if len(others) == _MAX_OF_ONE_HASH:
                raise PickleDefectError(f"more than {_MAX_OF_ONE_HASH} keys have one hash")


_KEY_TYPES_OF_NUMBERS = frozenset({int, float, complex, TensorDescriptor, StorageDescriptor})
"""Their hashes follow from numbers alone, or may be led to equal ones by them; an integer up to 2**60 is its own."""

_KEY_TYPES = frozenset({bool, type(None), Global, Call})
