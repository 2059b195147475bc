"""Reads a pickle without executing it: bytes in, plain values out.

A small symbolic machine over the opcodes that torch, Lightning and transformers write. A global that the pickle names
becomes an inert `Global`, calling it becomes an inert `Call`, torch's own rebuild functions become `TensorDescriptor`s.
Nothing is imported, nothing is called, and work and memory are bounded by the length of the bytes.

Opcodes: Lib/pickletools.py of CPython. The arguments of torch's rebuild functions: torch/_utils.py; the persistent id
of a storage: torch/serialization.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_OPCODES = 2_000_000
"""About 8 times what a checkpoint of 6,000 tensors needs, and about two seconds of work."""

MAX_GLOBAL_NAME = 1_024


class PickleDefectError(ValueError):
    """The bytes are no pickle that this reader understands, cut short, or built to do harm.

    Attributes:
        cut_short: the bytes ended before the pickle did, so that more of them may make it whole.
    """

    cut_short = False


class _CutShortError(PickleDefectError):
    cut_short = True


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import, kept as a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What the pickle would call, with what, kept as data."""

    function: object
    args: tuple[Any, ...]
    state: object = None
    entries: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.function}>"


@dataclass(frozen=True)
class StorageDescriptor:
    """Where a tensor's bytes lie: the record `data/<key>`, `numel` elements of `dtype`.

    Attributes:
        view: key, offset and length in elements of the part of it that is meant; torch before 0.4 saved such views.
    """

    key: str
    dtype: str
    numel: int
    location: str
    view: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class TensorDescriptor:
    """A tensor by its header: `shape` and `stride` in elements, `offset` in elements into its storage."""

    storage: StorageDescriptor | None
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Unpickled:
    """The top-level value, every global that the pickle names and every tensor that it describes.

    Attributes:
        storages: the storages by their persistent ids, in the order in which the pickle first names them.
    """

    value: Any
    globals: tuple[Global, ...]
    tensors: tuple[TensorDescriptor, ...]
    storages: tuple[StorageDescriptor, ...] = ()


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
}

_MARK = object()
_SCALARS = (str, int, float, bool, bytes, type(None), Global)
_KEYS = (*_SCALARS, Call)  # a Call is a key by identity; `torch.distributed.checkpoint` has objects as keys


def read_pickle(data: bytes) -> Unpickled:
    """Reads one pickle that fills `data` from its first to its last byte.

    Raises:
        PickleDefectError: the pickle is cut short, malformed, uses an opcode that no checkpoint needs, is followed by
            further bytes, or asks for more work than any checkpoint does.
    """
    machine = _Machine(data)
    content = machine.run()
    if machine.at != len(data):
        raise PickleDefectError(f"{len(data) - machine.at:,} bytes follow the end of the pickle")
    return content


def read_pickle_at(data: bytes, start: int) -> tuple[Unpickled, int]:
    """Reads the pickle that begins at `start`, and says where it ends.

    Raises:
        PickleDefectError: as for `read_pickle`, but that further bytes may follow.
    """
    machine = _Machine(data, start)
    return machine.run(), machine.at


class _Machine:
    def __init__(self, data: bytes, start: int = 0) -> None:
        self.data = data
        self.at = start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[Global, None] = {}
        self.tensors: list[TensorDescriptor] = []
        self.storages: dict[StorageDescriptor, None] = {}

    def run(self) -> Unpickled:
        data, dispatch = self.data, _DISPATCH
        if not data:
            raise PickleDefectError("the pickle is empty")
        for _ in range(MAX_OPCODES):
            if self.at >= len(data):
                raise _CutShortError(f"the pickle ends after {len(data):,} bytes without its STOP opcode")
            opcode = data[self.at]
            self.at += 1
            if opcode == _STOP:
                return self._stop()
            method = dispatch.get(opcode)
            if method is None:
                raise PickleDefectError(
                    f"opcode 0x{opcode:02x} at byte {self.at - 1:,} is none that a checkpoint is written with"
                )
            try:
                method(self)
            except PickleDefectError:
                raise
            except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError) as e:
                raise PickleDefectError(f"the pickle is malformed at byte {self.at - 1:,} ({type(e).__name__})") from e
        raise PickleDefectError(f"the pickle has more than {MAX_OPCODES:,} opcodes; no checkpoint needs that many")

    def _stop(self) -> Unpickled:
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise PickleDefectError(f"the pickle ends with {len(self.stack)} values on its stack instead of one")
        return Unpickled(self.stack[0], tuple(self.globals), tuple(self.tensors), tuple(self.storages))

    # Reading arguments

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise _CutShortError(
                f"the pickle asks for {count:,} bytes at byte {self.at:,} and has {len(self.data) - self.at:,} left"
            )
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_GLOBAL_NAME)
        if end < 0:
            kind = _CutShortError if len(self.data) - self.at < MAX_GLOBAL_NAME else PickleDefectError
            raise kind(f"a name at byte {self.at:,} has no end within {MAX_GLOBAL_NAME:,} bytes")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode("utf-8")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleDefectError(f"a value is missing on the stack at byte {self.at - 1:,}")
        return value

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                values = stack[i + 1 :]
                del stack[i:]
                return values
        raise PickleDefectError(f"no mark on the stack at byte {self.at - 1:,}")

    # Opcodes

    def proto(self) -> None:
        version = self.number("<B")
        if not 2 <= version <= 5:
            raise PickleDefectError(f"pickle protocol {version} is not one of 2 to 5")

    def frame(self) -> None:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise _CutShortError(
                f"a frame of {length:,} bytes begins with {len(self.data) - self.at:,} bytes left in the pickle"
            )

    def tuple_of(self, count: int) -> None:
        values = tuple(self.pop() for _ in range(count))
        self.stack.append(values[::-1])

    def append(self) -> None:
        value = self.pop()
        _extend(self.stack[-1], [value])

    def appends(self) -> None:
        values = self.pop_to_mark()
        _extend(self.stack[-1], values)

    def additems(self) -> None:
        values = self.pop_to_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleDefectError(f"ADDITEMS on a {type(target).__name__}")
        target.update(_key(v) for v in values)

    def setitem(self) -> None:
        value = self.pop()
        key = self.pop()
        _entries(self.stack[-1])[_key(key)] = value

    def setitems(self) -> None:
        values = self.pop_to_mark()
        if len(values) % 2:
            raise PickleDefectError(f"a key without a value at byte {self.at - 1:,}")
        entries = _entries(self.stack[-1])
        for i in range(0, len(values), 2):
            entries[_key(values[i])] = values[i + 1]

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("utf-8", "surrogatepass"))

    def latin_text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("latin-1"))

    def binary(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)))

    def put(self, index: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleDefectError(f"a mark is put into the memo at byte {self.at - 1:,}")
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleDefectError(f"memo value {index:,} is used at byte {self.at - 1:,} and was never set")
        self.stack.append(self.memo[index])

    def global_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleDefectError("a global is named by values that are not text")
        if len(module) + len(name) > MAX_GLOBAL_NAME:
            raise PickleDefectError(f"a global's name is longer than {MAX_GLOBAL_NAME:,} characters")
        symbol = Global(module, name)
        self.globals[symbol] = None
        self.stack.append(symbol)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.global_name(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(args, tuple):
            raise PickleDefectError(f"arguments that are no tuple at byte {self.at - 1:,}")
        result = _call(function, args)
        if isinstance(result, TensorDescriptor):
            self.tensors.append(result)
        self.stack.append(result)

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):
            # OrderedDicts of modules carry a `_metadata` attribute; anything else has no state to set.
            raise PickleDefectError(f"BUILD on a {type(target).__name__} at byte {self.at - 1:,}")

    def persistent_id(self) -> None:
        storage = _storage(self.pop())
        self.storages[storage] = None
        self.stack.append(storage)


def _extend(target: object, values: list[Any]) -> None:
    if isinstance(target, Call):
        target = target.items
    if not isinstance(target, list):
        raise PickleDefectError(f"items are appended to a {type(target).__name__}")
    target.extend(values)


def _entries(target: object) -> dict[Any, Any]:
    if isinstance(target, Call):
        return target.entries
    if not isinstance(target, dict):
        raise PickleDefectError(f"items are set on a {type(target).__name__}")
    return target


def _key(value: Any) -> Any:
    # Hashing a deeply nested tuple overflows the C stack, so keys are scalars or flat tuples of scalars.
    if isinstance(value, _KEYS) or (isinstance(value, tuple) and all(isinstance(v, _SCALARS) for v in value)):
        return value
    raise PickleDefectError(f"a {type(value).__name__} is used as a key")


def _storage(pid: object) -> StorageDescriptor:
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise PickleDefectError("a persistent id does not name a torch storage")
    storage_type, key, location, numel = pid[1:5]
    if not isinstance(storage_type, Global) or storage_type.name not in STORAGE_DTYPES:
        raise PickleDefectError(f"storage type {storage_type} is not known")
    if not isinstance(key, str) or not isinstance(location, str) or type(numel) is not int or numel < 0:
        raise PickleDefectError("a storage's persistent id has a field of the wrong type")
    view = pid[5] if len(pid) == 6 else None
    if view is not None and not _is_view(view):
        raise PickleDefectError(f"a view of storage {key} is described by {view!r:.100}")
    return StorageDescriptor(key, STORAGE_DTYPES[storage_type.name], numel, location, view)


def _is_view(view: object) -> bool:
    if not isinstance(view, tuple) or len(view) != 3:
        return False
    key, offset, size = view
    return isinstance(key, str) and type(offset) is int and type(size) is int and offset >= 0 and size >= 0


def _rebuild_tensor(args: tuple[Any, ...]) -> TensorDescriptor:
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, StorageDescriptor):
        raise PickleDefectError("a tensor is built from something that is no storage")
    return _tensor(storage, storage.dtype, shape, stride, offset)


def _rebuild_tensor_v3(args: tuple[Any, ...]) -> TensorDescriptor:
    # (storage, offset, size, stride, requires_grad, backward_hooks, dtype[, metadata])
    storage, offset, shape, stride, dtype = args[0], args[1], args[2], args[3], args[6]
    if not isinstance(storage, StorageDescriptor) or not isinstance(dtype, Global):
        raise PickleDefectError("a tensor is built from something that is no storage or no dtype")
    return _tensor(storage, dtype.name, shape, stride, offset)


def _tensor(storage: StorageDescriptor, dtype: str, shape: Any, stride: Any, offset: Any) -> TensorDescriptor:
    shape, stride = _sizes(shape), _sizes(stride)
    if len(shape) != len(stride) or type(offset) is not int or offset < 0:
        raise PickleDefectError(f"a tensor has {len(shape)} sizes, {len(stride)} strides and offset {offset!r}")
    return TensorDescriptor(storage, dtype, shape, stride, offset)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or any(type(v) is not int or v < 0 for v in value):
        raise PickleDefectError("a tensor's shape or stride is not a list of whole numbers from 0 up")
    return tuple(value)


def _ordered_dict(args: tuple[Any, ...]) -> Any:
    if not args:
        return {}
    pairs = args[0]
    return {_key(k): v for k, v in pairs} if isinstance(pairs, list) else Call(_ORDERED_DICT, args)


def _first_argument(args: tuple[Any, ...]) -> Any:
    return args[0]


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(args[0]) if args else ()


_ORDERED_DICT = Global("collections", "OrderedDict")

_REBUILD: dict[Global, Callable[[tuple[Any, ...]], Any]] = {
    _ORDERED_DICT: _ordered_dict,
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _first_argument,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first_argument,
    Global("torch", "Size"): _size,
}


def _call(function: object, args: tuple[Any, ...]) -> Any:
    rebuild = _REBUILD.get(function) if isinstance(function, Global) else None
    return Call(function, args) if rebuild is None else rebuild(args)


_STOP = ord(".")

_DISPATCH: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): lambda m: m.stack.append(_MARK),
    ord("}"): lambda m: m.stack.append({}),
    ord("]"): lambda m: m.stack.append([]),
    ord(")"): lambda m: m.stack.append(()),
    0x8F: lambda m: m.stack.append(set()),
    ord("t"): lambda m: m.stack.append(tuple(m.pop_to_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    0x90: _Machine.additems,
    ord("s"): _Machine.setitem,
    ord("u"): _Machine.setitems,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.number("<i")),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.stack.append(m.number("<H")),
    0x8A: _Machine.long1,
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    ord("B"): lambda m: m.binary("<I"),
    ord("C"): lambda m: m.binary("<B"),
    0x8E: lambda m: m.binary("<Q"),
    ord("T"): lambda m: m.latin_text("<i"),
    ord("U"): lambda m: m.latin_text("<B"),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("c"): lambda m: m.global_name(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}
