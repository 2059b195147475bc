"""Reads a pickle without executing it: bytes in, plain values out.

A small symbolic machine over the opcodes that torch, Lightning and transformers write. A global that the pickle names
becomes an inert `Global`, calling it becomes an inert `Call`, torch's own rebuild functions become `TensorDescriptor`s.
Nothing is imported and nothing is called. Work and memory are bounded: whatever up to 64 MB of bytes say, reading them
ends within two seconds and 256 MB. The value that comes out is a tree of at most `MAX_VALUES` values and `MAX_DEPTH`
levels (what refers to itself is cut there), so that whoever walks it may recurse.

Opcodes: Lib/pickletools.py of CPython.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from enstack_lightning.checkpoint.collector import collector_paused
from enstack_lightning.checkpoint.facts import OddityKind
from enstack_lightning.checkpoint.pickle_rebuild import (
    ORDERED_DICT,
    REBUILD,
    SEALED,
    TENSOR_MODULES,
    odd_tensors,
    storage_of,
)
from enstack_lightning.checkpoint.pickle_tensors import Run, read_tensors, tensor_call
from enstack_lightning.checkpoint.pickle_tree import MAX_DEPTH, MAX_VALUES, UNSEEN, untangled
from enstack_lightning.checkpoint.pickle_values import (
    CONTAINERS,
    DTYPE_BYTES,
    MAX_KEY_LENGTH,
    STORAGE_DTYPES,
    Call,
    Global,
    Loop,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Unpickled,
    Work,
)
from enstack_lightning.checkpoint.pickle_versions import read_versions, versions_in_a_row

__all__ = [
    "DTYPE_BYTES",
    "MAX_DEPTH",
    "MAX_OPCODES",
    "MAX_VALUES",
    "STORAGE_DTYPES",
    "Call",
    "Global",
    "Loop",
    "PickleDefectError",
    "StorageDescriptor",
    "TensorDescriptor",
    "Unpickled",
    "read_pickle",
    "read_pickle_at",
]

MAX_OPCODES = 1_500_000
"""Eight times what a checkpoint of 6,000 tensors needs, and about a second of work."""

MAX_GLOBAL_NAME = 1_024
MAX_GLOBALS = 10_000
_MAX_WIDE_TEXT = 4 * 2**20
_MAX_MEMO_GAP = 65_536  # a pickler numbers without gaps; Python's own unpickler takes memory for all of a gap
_UINT16, _UINT32, _INT32, _FLOAT64 = (struct.Struct(form) for form in ("<H", "<I", "<i", ">d"))


def read_pickle(data: bytes, max_opcodes: int = MAX_OPCODES) -> Unpickled:
    """Reads one pickle that fills `data` from its first to its last byte.

    Raises:
        PickleDefectError: the pickle is cut short, malformed, uses an opcode that no checkpoint needs, is followed by
            further bytes, or asks for more work than any checkpoint does.
    """
    machine = _Machine(data, 0, max_opcodes)
    unpickled = machine.run()
    if machine.at != len(data):
        error = PickleDefectError(f"{len(data) - machine.at:,} bytes follow the end of the pickle")
        error.globals = unpickled.globals
        raise error
    return unpickled


def read_pickle_at(data: bytes, start: int, max_opcodes: int = MAX_OPCODES) -> tuple[Unpickled, int]:
    """Reads the pickle that begins at byte `start` of `data`; returns it and where it ends.

    For the files of torch before 1.6, in which several pickles stand one after another: here a persistent id may have
    a view's metadata, or name a module's class.

    Raises:
        PickleDefectError: as `read_pickle`, but for the bytes that follow.
    """
    machine = _Machine(data, start, max_opcodes, legacy=True)
    return machine.run(), machine.at


class _Machine:
    def __init__(self, data: bytes, start: int, max_opcodes: int, legacy: bool = False) -> None:
        self.data = data
        self.at = start
        self.end = len(data)
        self.frame_end = start
        self.max_opcodes = max_opcodes
        self.legacy = legacy
        self.protocol = 0
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.far_memo: dict[int, Any] = {}
        self.shared: dict[int, int] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.storages: dict[object, StorageDescriptor] = {}
        self.first_of_key: dict[str, StorageDescriptor] = {}
        self.tensors: list[TensorDescriptor] = []
        self.ordered: dict[int, dict[Any, Any]] = {}
        self.refused: set[int] = set()
        self.work = Work()

    @collector_paused()
    def run(self) -> Unpickled:
        try:
            self.begin()
            self.step_to_the_end()
            return self.stop()
        except PickleDefectError as e:
            e.globals = tuple(self.globals.values())
            raise
        except (LookupError, TypeError, ValueError, struct.error, RecursionError, OverflowError) as e:
            cut_short = isinstance(e, IndexError | struct.error) and self.at + 8 >= len(self.data)
            error = PickleDefectError(
                f"the pickle is malformed before byte {self.at:,} ({type(e).__name__})", cut_short
            )
            error.globals = tuple(self.globals.values())
            raise error from e

    def begin(self) -> None:
        head = self.data[self.at : self.at + 2]
        if len(head) < 2:
            raise PickleDefectError(f"the pickle ends after {len(head)} bytes", cut_short=True)
        if head[0] != 0x80 or not 2 <= head[1] <= 5:
            raise PickleDefectError(f"it begins with {head.hex(' ')}, not as a pickle of protocol 2 to 5 does")
        self.protocol = head[1]
        self.at += 2

    def step_to_the_end(self) -> None:
        """Runs opcodes until STOP. Those that make up nine tenths of a checkpoint are written out for speed.

        Tensors in a row, written as torch does, are read at once, and so are the versions of a module's layers; the
        opcodes that they are made of are counted all the same.
        """
        data, memo, far_memo, shared, dispatch = self.data, self.memo, self.far_memo, self.shared, _DISPATCH
        stack, at, end = self.stack, self.at, self.end
        containers, uint32, int32, beyond = CONTAINERS, _UINT32.unpack_from, _INT32.unpack_from, _NOT_WEIGHTS_ONLY
        left, one_by_one = self.max_opcodes, 0
        try:
            while True:
                for step in range(1, left + 1):
                    if at >= end:
                        self.at = at
                        end = self.leave_frame()
                    opcode = data[at]
                    at += 1
                    if opcode == 0x72 or opcode == 0x71:  # LONG_BINPUT, BINPUT
                        if opcode == 0x72:
                            index = uint32(data, at)[0]
                            at += 4
                        else:
                            index = data[at]
                            at += 1
                        if index == len(memo) and not far_memo:
                            memo.append(stack[-1])
                        else:
                            self.at = at
                            self.memoize(index, stack[-1])
                    elif opcode == 0x94:  # MEMOIZE
                        self.memoize(len(memo) + len(far_memo), stack[-1])
                        self.refused.add(opcode)
                    elif opcode == 0x68 or opcode == 0x6A:  # BINGET, LONG_BINGET
                        if opcode == 0x68:
                            index = data[at]
                            at += 1
                        else:
                            index = uint32(data, at)[0]
                            at += 4
                        value = memo[index] if index < len(memo) else far_memo[index]
                        if value.__class__ is Run:
                            value = value.fetched(index)
                        if value.__class__ in containers:
                            shared[id(value)] = UNSEEN
                        stack.append(value)
                    elif opcode == 0x4B:  # BININT1
                        stack.append(data[at])
                        at += 1
                    elif opcode == 0x58 or opcode == 0x8C:  # BINUNICODE, SHORT_BINUNICODE
                        if opcode == 0x58:
                            length = uint32(data, at)[0]
                            at += 4
                        else:
                            length = data[at]
                            at += 1
                            self.refused.add(opcode)
                        raw = data[at : at + length]
                        if raw.isascii() and at + length <= end:
                            stack.append(raw.decode("ascii"))
                        else:
                            self.at = at
                            self.text(length)
                        raw = b""
                        at += length
                    elif opcode == 0x28:  # MARK
                        match = None if self.legacy or at < one_by_one else tensor_call(data, at, end)
                        if match is not None:
                            one_by_one, opcodes = read_tensors(self, match, left - step)
                            if opcodes:
                                at, stack = one_by_one, self.stack
                                left -= step + opcodes
                                break
                        self.below_marks.append(stack)
                        stack = self.stack = []
                    elif opcode == 0x73:  # SETITEM
                        value, key, target = stack.pop(), stack.pop(), stack[-1]
                        if (
                            target.__class__ is dict
                            and key.__class__ is str
                            and key not in target
                            and len(key) <= MAX_KEY_LENGTH
                        ):
                            target[key] = value
                        else:
                            self.at = at
                            self.set_item(target, key, value)
                    elif opcode == 0x7D:  # EMPTY_DICT
                        stack.append({})
                        match = versions_in_a_row(data, at, end) if at >= one_by_one else None
                        if match is not None:
                            one_by_one, opcodes = match.end(), read_versions(self, match, left - step)
                            if opcodes:
                                at = one_by_one
                                left -= step + opcodes
                                break
                    elif opcode == 0x4A:  # BININT
                        stack.append(int32(data, at)[0])
                        at += 4
                    elif opcode == 0x8A and at + 5 < end and data[at] <= 5:  # LONG1, as in the state of Python's random
                        after = at + 1 + data[at]
                        stack.append(int.from_bytes(data[at + 1 : after], "little", signed=True))
                        at = after
                    elif opcode == 0x74:  # TUPLE
                        values = tuple(stack)
                        stack = self.stack = self.below_marks.pop()
                        stack.append(values)
                    elif opcode == 0x86:  # TUPLE2
                        last = stack.pop()
                        stack[-1] = (stack[-1], last)
                    elif opcode == 0x85:  # TUPLE1
                        stack[-1] = (stack[-1],)
                    elif opcode == 0x29:  # EMPTY_TUPLE
                        stack.append(())
                    elif opcode == 0x2E:  # STOP
                        return
                    else:
                        self.at = at
                        if opcode in beyond:
                            self.refused.add(opcode)
                        dispatch[opcode](self)
                        at, end, stack = self.at, self.end, self.stack
                else:
                    raise PickleDefectError(
                        f"the pickle has more than {self.max_opcodes:,} opcodes, the most that is read in bounded time"
                    )
        finally:
            self.at = at

    def memoize(self, index: int, value: Any) -> None:
        """Sets a value of the memo whose number need not be the next one."""
        memo, far_memo = self.memo, self.far_memo
        known = len(memo) + len(far_memo)
        if index > known + _MAX_MEMO_GAP:
            raise PickleDefectError(f"memo value {index:,} is set before byte {self.at:,} after {known:,} others")
        if index < len(memo):
            memo[index] = value
        else:
            far_memo[index] = value
        while len(memo) in far_memo:
            memo.append(far_memo.pop(len(memo)))

    def leave_frame(self) -> int:
        """At the end of a frame or of the pickle: the new end."""
        if self.at == self.end < len(self.data):
            self.end = len(self.data)
            return self.end
        if self.end < len(self.data):
            raise PickleDefectError(f"an opcode reaches beyond its frame, which ends at byte {self.end:,}")
        raise PickleDefectError(
            f"the pickle ends after {len(self.data):,} bytes without its STOP opcode", cut_short=True
        )

    def stop(self) -> Unpickled:
        if self.at < self.frame_end:
            raise PickleDefectError(f"the pickle ends before its frame does, at byte {self.frame_end:,}")
        if len(self.stack) != 1 or self.below_marks:
            left = len(self.stack) + sum(map(len, self.below_marks))
            raise PickleDefectError(
                f"the pickle ends with {left:,} values and {len(self.below_marks):,} marks on its stack, not one value"
            )
        if any(self.work.hooks):
            raise PickleDefectError("a tensor has backward hooks, which a backward pass would call; torch writes none")
        self.memo.clear()
        self.far_memo.clear()
        value, loops = untangled(self.stack[0], self.shared)
        oddities = tuple(odd_tensors(self.tensors))
        if loops:
            message = f"{loops:,} of its values refer back to a value that they lie in"
            oddities = (*oddities, (OddityKind.CYCLE, message))
        return Unpickled(
            value,
            tuple(self.globals.values()),
            tuple(self.tensors),
            tuple(self.storages.values()),
            oddities,
            tuple(sorted(self.refused)),
        )

    # Bounds

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise PickleDefectError(
                f"the pickle asks for {count:,} bytes at byte {self.at:,} and has {self.end - self.at:,} left",
                cut_short=self.end == len(self.data),
            )
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.end, self.at + MAX_GLOBAL_NAME))
        if end < 0:
            raise PickleDefectError(
                f"a name at byte {self.at:,} has no end within {MAX_GLOBAL_NAME:,} bytes",
                cut_short=len(self.data) - self.at < MAX_GLOBAL_NAME,
            )
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode("utf-8")

    def pop_to_mark(self) -> list[Any]:
        if not self.below_marks:
            raise PickleDefectError(f"no mark on the stack at byte {self.at - 1:,}")
        values, self.stack = self.stack, self.below_marks.pop()
        return values

    # Opcodes

    def refuse(self) -> None:
        opcode = self.data[self.at - 1]
        if opcode == 0x69:  # INST: its name is worth knowing
            self.global_name(self.line(), self.line())
        raise PickleDefectError(
            f"opcode 0x{opcode:02x} at byte {self.at - 1:,} is none that a checkpoint is written with"
        )

    def frame(self) -> None:
        length = self.number("<Q")
        if self.protocol < 4 or self.at - 9 < self.frame_end:
            raise PickleDefectError(f"a frame begins at byte {self.at - 9:,}, where none can")
        if length > len(self.data) - self.at:
            raise PickleDefectError(
                f"a frame of {length:,} bytes begins with {len(self.data) - self.at:,} bytes left in the pickle",
                cut_short=True,
            )
        self.end = self.frame_end = self.at + length

    def tuple3(self) -> None:
        stack = self.stack
        third, second = stack.pop(), stack.pop()
        stack[-1] = (stack[-1], second, third)

    def append(self) -> None:
        value = self.stack.pop()
        _list_of(self.stack[-1]).append(value)

    def appends(self) -> None:
        values = self.pop_to_mark()
        _list_of(self.stack[-1]).extend(values)

    def empty_set(self) -> None:
        self.work.spend(3)  # it takes three times the memory of a list
        self.stack.append(set())

    def additems(self) -> None:
        values = self.pop_to_mark()
        target = self.stack[-1]
        if isinstance(target, Call):
            _list_of(target).extend(values)
        elif isinstance(target, set):
            target.update(self.work.keys(values))
        else:
            raise PickleDefectError(f"ADDITEMS on a {type(target).__name__}")

    def frozen_set(self) -> None:
        values = self.pop_to_mark()
        self.work.spend(3)
        self.stack.append(frozenset(self.work.keys(values)))

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        _check_open(target)
        self.work.set_items(target, (key, value))

    def setitems(self) -> None:
        values = self.pop_to_mark()
        if len(values) % 2:
            raise PickleDefectError(f"a key without a value at byte {self.at - 1:,}")
        _check_open(self.stack[-1])
        self.work.set_items(self.stack[-1], values)

    def integer2(self) -> None:
        self.stack.append(_UINT16.unpack_from(self.data, self.at)[0])
        self.at += 2

    def long1(self) -> None:
        length = self.data[self.at]
        self.at += 1
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def float8(self) -> None:
        self.stack.append(_FLOAT64.unpack_from(self.data, self.at)[0])
        self.at += 8

    def text(self, length: int) -> None:
        """A text of `length` bytes from here on that is not all ASCII."""
        start = self.at
        raw = self.take(length)
        self.at = start
        if length > _MAX_WIDE_TEXT and not raw.isascii():
            raise PickleDefectError(f"a text of {length:,} bytes begins at byte {start:,}")
        self.work.spend(1 + length // 16)  # a text takes four bytes a character as soon as one of them needs these
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            # Half of a surrogate pair, as in a file name that is not UTF-8. Each takes as long as ten opcodes.
            self.work.spend(10 * raw.count(0xED))
            text = raw.decode("utf-8", "surrogatepass")
        self.stack.append(text)

    def long_text(self, form: str) -> None:
        length = self.number(form)
        self.text(length)
        self.at += length

    def text_of_python_2(self, form: str) -> None:
        length = self.number(form)
        if length < 0:
            raise PickleDefectError(f"a text of {length:,} bytes begins at byte {self.at:,}")
        self.stack.append(self.take(length).decode("utf-8"))  # as torch.load reads it by default

    def binary(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)))

    def byte_array(self) -> None:
        self.binary("<Q")
        self.stack[-1] = bytearray(self.stack[-1])

    def named(self) -> None:
        module, name = self.line(), self.line()
        if self.protocol < 3:
            # A pickle of protocol 2 has the names of Python 2, and every reader puts those of Python 3 for them.
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[module, name]
            else:
                module = IMPORT_MAPPING.get(module, module)
        self.global_name(module, name)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.global_name(module, name)

    def global_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleDefectError(f"a global is named at byte {self.at - 1:,} by values that are not text")
        symbol = self.globals.get((module, name))
        if symbol is None:
            if len(module) + len(name) > MAX_GLOBAL_NAME:
                raise PickleDefectError(f"a global's name is longer than {MAX_GLOBAL_NAME:,} characters")
            if not module or not name or not (module + name).isprintable() or " " in module + name:
                raise PickleDefectError(f"a global is called {module!r}, {name!r}, which is no name")
            if len(self.globals) == MAX_GLOBALS:
                raise PickleDefectError(f"the pickle names more than {MAX_GLOBALS:,} globals")
            symbol = self.globals[module, name] = Global(module, name)
        self.stack.append(symbol)

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if args.__class__ is not tuple:
            raise PickleDefectError(f"arguments that are no tuple at byte {self.at - 1:,}")
        rebuild = REBUILD.get(function) if function.__class__ is Global else None
        if rebuild is not None:
            result = rebuild(self.work, args)
            if result.__class__ is TensorDescriptor:
                self.tensors.append(result)
            elif rebuild is _REBUILD_ORDERED_DICT:
                self.ordered[id(result)] = result
            if result and result.__class__ in CONTAINERS:
                self.share(result)
        else:
            result = self.call(function, args)
        self.stack[-1] = result

    def share(self, result: Any) -> None:
        """Notes what a rebuild function took out of its arguments, in which it still lies."""
        values = () if isinstance(result, Call) else result
        if isinstance(result, dict):
            values = (*result, *result.values())
        self.shared.update((id(value), UNSEEN) for value in (result, *values) if value.__class__ in CONTAINERS)

    def new_object(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if args.__class__ is not tuple:
            raise PickleDefectError(f"arguments that are no tuple at byte {self.at - 1:,}")
        if function == ORDERED_DICT and not args:
            entries: dict[Any, Any] = {}
            self.stack[-1] = entries
            self.ordered[id(entries)] = entries
        elif function in REBUILD:
            # `__new__` leaves the arguments out that `__init__` would have taken: not what a pickler writes.
            raise PickleDefectError(f"{function} is made in a way that torch does not write at byte {self.at - 1:,}")
        else:
            self.stack[-1] = self.call(function, args)

    def call(self, function: object, args: tuple[Any, ...]) -> Call:
        if isinstance(function, Global):
            if function.module in TENSOR_MODULES and function.name.endswith(("Tensor", "Storage")):
                # weights_only allows these, and they take as much memory as their argument says.
                raise PickleDefectError(f"{function} is called, which torch has not written since 0.1")
            if function.module == "torch" and function.name in DTYPE_BYTES:
                raise PickleDefectError(f"{function} is called, and is a dtype")
            if function.module == "torch" and function.name.endswith(_QUANTIZATION_SCHEMES):
                raise PickleDefectError(f"{function} is called, and is a scheme of quantization")
        elif not isinstance(function, Call):
            raise PickleDefectError(f"a {type(function).__name__} is called at byte {self.at - 1:,}")
        return Call(function, args)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Call):
            _check_open(target)
            if target.state is not None:
                raise PickleDefectError(f"the state of {target} is set twice, at byte {self.at - 1:,} again")
            target.state = state
        elif id(target) not in self.ordered or not isinstance(state, dict):
            # OrderedDicts of modules carry a `_metadata` attribute; anything else has no state to set.
            raise PickleDefectError(f"BUILD on a {type(target).__name__} at byte {self.at - 1:,}")
        elif not all(isinstance(name, str) for name in state) or not _OF_ORDERED_DICTS.isdisjoint(state):
            raise PickleDefectError("the state of an OrderedDict would hide its own methods, such as items")

    def persistent_id(self) -> None:
        pid = self.stack.pop()
        if self.legacy and isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and type(pid[1]) is Global:
            self.stack.append(pid[1])  # the class of a module, and its source code, which torch would compare
            return
        self.stack.append(self.storage(pid))

    def storage(self, pid: object) -> StorageDescriptor:
        """The storage that a persistent id names, which must be named alike everywhere."""
        storage = storage_of(pid, self.legacy)
        key = storage.key
        known = self.first_of_key.setdefault(key, storage)
        if known is not storage and _header(known) != _header(storage):
            raise PickleDefectError(
                f"storage {key!r:.40} is {known.numel:,} elements of {known.dtype} on {known.location!r:.40} in one "
                f"place and {storage.numel:,} of {storage.dtype} on {storage.location!r:.40} in another"
            )
        return self.storages.setdefault(key if storage.view is None else (key, storage.view), storage)


def _header(storage: StorageDescriptor) -> tuple[str, int, str]:
    return storage.dtype, storage.numel, storage.location


def _check_open(target: object) -> None:
    if isinstance(target, Call) and target.function in SEALED:
        raise PickleDefectError(f"something is set on {target} or added to it, which has no place for it")


def _list_of(target: object) -> list[Any]:
    _check_open(target)
    if isinstance(target, Call):
        if target.items == ():
            target.items = []
        target = target.items
    if not isinstance(target, list):
        raise PickleDefectError(f"items are appended to a {type(target).__name__}")
    return target


_REBUILD_ORDERED_DICT = REBUILD[ORDERED_DICT]
_OF_ORDERED_DICTS = frozenset(dir(OrderedDict))
_QUANTIZATION_SCHEMES = ("_affine", "_symmetric", "_qparams")

# Left out on purpose, and so refused: the text opcodes of protocols 0 and 1; INST, OBJ and EXT, other ways to call;
# DUP, and POP and POP_MARK, which hide what was called (a pickler writes POP only for a tuple that holds itself);
# NEWOBJ_EX and LONG4, which no checkpoint has; PERSID and the buffers of another process.
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x95: _Machine.frame,
    0x5D: lambda m: m.stack.append([]),
    0x8F: _Machine.empty_set,
    0x91: _Machine.frozen_set,
    0x87: _Machine.tuple3,
    0x61: _Machine.append,
    0x65: _Machine.appends,
    0x90: _Machine.additems,
    0x75: _Machine.setitems,
    0x4E: lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    0x4D: _Machine.integer2,
    0x8A: _Machine.long1,
    0x47: _Machine.float8,
    0x8D: lambda m: m.long_text("<Q"),
    0x42: lambda m: m.binary("<I"),
    0x43: lambda m: m.binary("<B"),
    0x8E: lambda m: m.binary("<Q"),
    0x96: _Machine.byte_array,
    0x54: lambda m: m.text_of_python_2("<i"),
    0x55: lambda m: m.text_of_python_2("<B"),
    0x63: _Machine.named,
    0x93: _Machine.stack_global,
    0x52: _Machine.reduce,
    0x81: _Machine.new_object,
    0x62: _Machine.build,
    0x51: _Machine.persistent_id,
}
_DISPATCH = [_OPCODES.get(opcode, _Machine.refuse) for opcode in range(256)]

# What `torch.load(weights_only=True)` does not know of these: texts shorter than 256 bytes, the memo without numbers,
# bytes, sets, frames and names from the stack of protocols 3 to 5; torch/_weights_only_unpickler.py, `Unpickler.load`.
_NOT_WEIGHTS_ONLY = frozenset((0x42, 0x43, 0x54, 0x8C, 0x8D, 0x8E, 0x90, 0x91, 0x93, 0x94, 0x95, 0x96))
