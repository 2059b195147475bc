"""The container of torch before 1.6, which `torch.save(..., _use_new_zipfile_serialization=False)` still writes.

Five pickles stand one behind the other - a magic number, a protocol version, facts on the machine, the object, the
list of storage keys - and then, for each key, the number of elements and the bytes. There is no checksum and no
directory, but the end is determined by the pickles, so bytes that are missing or too many are seen.

Format: `_legacy_save` and `_legacy_load` in torch/serialization.py; `writeFileRaw` in torch/csrc/serialization.cpp,
which writes little-endian on every machine, so that the `little_endian` of the third pickle says nothing of the values.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from enstack_lightning.checkpoint.deep import Named, NamedTensor, Span
from enstack_lightning.checkpoint.facts import Oddity
from enstack_lightning.checkpoint.inert_pickle import (
    DTYPE_BYTES,
    MAX_OPCODES,
    Global,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Unpickled,
    read_pickle_at,
)
from enstack_lightning.checkpoint.pickle_values import bytes_of
from enstack_lightning.checkpoint.source import ContainerDefectError, Source

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001

MAX_PICKLE_BYTES = 64 * 2**20
_FIRST_WINDOW = 256 * 2**10
_FEW_OPCODES = 1_000
_KEYS_OPCODES = 300_000
"""Three an entry: as many storages as the object's pickle can describe."""

_MAGIC_OPCODES = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little") + b"."
_NUMEL = struct.Struct("<q")
_TAR_MAGIC = slice(257, 262)
_TAR_MEMBERS = (b"sys_info\0", b"pickle\0", b"storages\0", b"tensors\0")
_SCALAR_FORMS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}


def is_legacy_file(beginning: bytes) -> bool:
    """Whether a file that begins so is a stack of pickles as torch before 1.6 saved; 64 bytes are enough."""
    return beginning[:1] == b"\x80" and _MAGIC_OPCODES in beginning[:32]


def is_legacy_tar(beginning: bytes) -> bool:
    """Whether a file that begins so is a tar archive of torch 0.1.1; 512 bytes are needed."""
    return beginning[_TAR_MAGIC] == b"ustar" and beginning.startswith(_TAR_MEMBERS)


class LegacyFile:
    """A legacy torch file in an open source, which stays the caller's to close.

    Attributes:
        defects: what is wrong with the storages, which does not keep the pickles from being read.
        oddities: none are known of this format.
        without_checksum: the whole file, as nothing in it has a checksum.

    Raises:
        ContainerDefectError: the pickles cannot be read, or are not those of the format.
        OSError: the bytes cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self.without_checksum = source.size
        self.defects: list[ContainerDefectError] = []
        self.oddities: list[Oddity] = []
        pickles = _Pickles(source)
        beginning = source.read_at(0, min(512, source.size))
        if is_legacy_tar(beginning):
            raise ContainerDefectError(
                "unrecognised",
                "it is a tar archive of torch 0.1.1, which torch refuses to load safely: before torch 2.6 such a file "
                "could run any code even so (CVE-2025-32434)",
            )
        if not is_legacy_file(beginning):
            raise ContainerDefectError("unrecognised", "it does not begin with the magic number of a torch file")
        pickles.next("the magic number", _FEW_OPCODES)
        version = pickles.next("the protocol version", _FEW_OPCODES).value
        if version != PROTOCOL_VERSION:
            raise _damaged(f"its protocol version is {version!r:.50}; torch knows {PROTOCOL_VERSION} only")
        self._check_machine(pickles.next("the facts on the machine", _FEW_OPCODES).value)
        content = pickles.next("the pickled object", MAX_OPCODES)
        keys = pickles.next("the list of storage keys", _KEYS_OPCODES).value
        self._content = dataclasses.replace(content, globals=tuple(pickles.globals))
        self._check_types(content)
        self._storages = self._place(content.storages, keys, pickles.end)

    def read_pickle(self) -> Unpickled:
        """The symbolic content of the object's pickle, with the globals that any of the pickles names."""
        return self._content

    def read_scalar(self, tensor: TensorDescriptor) -> float | None:
        """The value of a tensor of one element; None for a dtype that has no simple number.

        Raises:
            ContainerDefectError: its storage is missing or the file ends before it.
        """
        form = _SCALAR_FORMS.get(tensor.dtype)
        if form is None or tensor.storage is None or tensor.shape not in ((), (1,)):
            return None
        self._check_storage(tensor, tensor.storage)
        stored = self._storages[tensor.storage.key]
        at = stored.offset + (_view_offset(tensor.storage) + tensor.offset) * struct.calcsize(form)
        (value,) = struct.unpack(form, self._source.read_at(at, struct.calcsize(form), _name(tensor.storage.key)))
        return -float(value) if tensor.negated else float(value)

    def check_storages(self, tensors: Iterable[TensorDescriptor]) -> Iterator[ContainerDefectError]:
        """Compares the headers of tensors with their storages, without reading these.

        Yields:
            An error for each tensor whose storage is missing or has another size than the pickle says, and for each
            that reaches beyond it itself or with its view.
        """
        for tensor in tensors:
            try:
                if tensor.storage is not None:
                    self._check_storage(tensor, tensor.storage)
            except ContainerDefectError as e:
                yield e

    def _check_storage(self, tensor: TensorDescriptor, storage: StorageDescriptor) -> None:
        name, stored = _name(storage.key), self._storages.get(storage.key)
        if stored is None:
            raise _damaged(f"{name}, which holds a tensor's values, is not in the file's list of storages", name)
        expected = _bytes_of(storage)
        if tensor.dtype not in DTYPE_BYTES or expected is None:
            raise _damaged(f"{name} has the unknown dtype {tensor.dtype}", name)
        if expected != stored.size:
            raise _damaged(f"{name} has {stored.size:,} bytes and its tensor needs {expected:,}", name)
        room, unit = storage.numel, expected // storage.numel if storage.numel else 1
        if storage.view is not None:
            _, begin, room = storage.view
            if begin + room > storage.numel:
                raise _damaged(f"a view reaches beyond {name}, which has {storage.numel:,} elements", name)
        if all(tensor.shape):
            last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
            if bytes_of(tensor.dtype, last + 1) > room * unit:
                raise _damaged(f"a tensor of shape {tensor.shape} reaches beyond {name}", name)

    def spans(self, named: Iterable[Named] = ()) -> list[Span]:
        """The bytes of every storage that the file holds whole, with those of the `named` tensors that lie in it."""
        tensors: dict[str, list[NamedTensor]] = {}
        for name, role, tensor in named:
            if tensor.storage is not None:
                offset = _view_offset(tensor.storage) + tensor.offset
                described = NamedTensor(name, role, tensor.dtype, tensor.shape, tensor.stride, offset)
                tensors.setdefault(tensor.storage.key, []).append(described)
        return [
            Span(_name(key), stored.offset, stored.size, None, tuple(tensors.get(key, ())))
            for key, stored in self._storages.items()
            if stored.size and stored.offset + stored.size <= self.size
        ]

    # The container

    def _check_machine(self, machine: object) -> None:
        """The third pickle, which torch reads and does not use; it is the same wherever torch has run."""
        if not isinstance(machine, dict) or machine.get("protocol_version") != PROTOCOL_VERSION:
            self.defects.append(_damaged("its facts on the machine that saved it are not those of torch"))

    def _check_types(self, content: Unpickled) -> None:
        if any(g.name == "UntypedStorage" for g in content.globals):
            self.defects.append(
                _damaged(
                    "it holds an UntypedStorage (tensors of float8 and uint16 are saved as one), which torch writes in "
                    "this format and cannot load from it; save it again as a zip archive, torch's default"
                )
            )

    def _place(self, named: tuple[StorageDescriptor, ...], keys: object, at: int) -> dict[str, _Stored]:
        """Where each storage lies, by the sizes that the pickle states; what the file says instead is a defect."""
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _damaged("its list of storage keys is no list of text")
        first: dict[str, StorageDescriptor] = {}
        for storage in named:
            first.setdefault(storage.key, storage)
        stored: dict[str, _Stored] = {}
        for key in keys:
            size = _bytes_of(first[key]) if key in first else None
            if size is None or key in stored:
                what = "twice" if key in stored else "and its pickle does not describe it"
                raise _damaged(f"its list of storages has {_name(key)} {what}", _name(key))
            stored[key] = _Stored(at + _NUMEL.size, size, first[key].numel)
            at += _NUMEL.size + size
        if at > self.size:
            self.defects.append(
                ContainerDefectError("truncated", f"its storages need {at:,} bytes and the file has {self.size:,}")
            )
        self._check_counts(stored)
        if at < self.size:
            self.defects.append(_damaged(f"{self.size - at:,} bytes follow the last storage, which ends at {at:,}"))
        return stored

    def _check_counts(self, stored: dict[str, _Stored]) -> None:
        """Compares the number of elements before each storage with what the pickle says, as far as the file goes."""
        whole = {k: s for k, s in stored.items() if s.offset <= self.size}
        self._source.prefetch((s.offset - _NUMEL.size, _NUMEL.size) for s in whole.values())
        for key, storage in whole.items():
            (numel,) = _NUMEL.unpack(self._source.read_at(storage.offset - _NUMEL.size, _NUMEL.size, _name(key)))
            if numel != storage.numel:
                message = f"{_name(key)} is said to have {numel:,} elements and its pickle says {storage.numel:,}"
                self.defects.append(_damaged(message, _name(key)))
                return  # where the next one begins is not known


class _Stored(NamedTuple):
    """A storage in the file: its first byte, its bytes, its elements."""

    offset: int
    size: int
    numel: int


class _Pickles:
    """Reads pickle after pickle from the beginning of a source, and no more of it than they seem to need."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = source.read_at(0, min(source.size, _FIRST_WINDOW))
        self.end = 0
        self.globals: dict[Global, None] = {}

    def next(self, what: str, max_opcodes: int) -> Unpickled:
        while True:
            try:
                content, self.end = read_pickle_at(self._data, self.end, max_opcodes)
            except PickleDefectError as e:
                if e.cut_short and self._grow():
                    continue
                raise self._defect(what, e) from e
            self.globals |= dict.fromkeys(content.globals)
            return content

    def _grow(self) -> bool:
        wanted = min(self._source.size, MAX_PICKLE_BYTES)
        if wanted == len(self._data):
            return False
        self._data = self._source.read_at(0, wanted)
        return True

    def _defect(self, what: str, error: PickleDefectError) -> ContainerDefectError:
        if error.cut_short and len(self._data) < self._source.size:
            return _damaged(f"its pickles do not end within {MAX_PICKLE_BYTES:,} bytes, which are the limit", what)
        return ContainerDefectError("truncated" if error.cut_short else "damaged", f"{what} cannot be read: {error}")


def _bytes_of(storage: StorageDescriptor) -> int | None:
    itemsize = DTYPE_BYTES.get(storage.dtype)
    return None if itemsize is None else storage.numel * itemsize


def _view_offset(storage: StorageDescriptor) -> int:
    return 0 if storage.view is None else storage.view[1]


def _name(key: str) -> str:
    return f"storage {key if key.isalnum() and len(key) <= 40 else ascii(key[:40])}"


def _damaged(message: str, record: str = "") -> ContainerDefectError:
    return ContainerDefectError("damaged", message, record)
