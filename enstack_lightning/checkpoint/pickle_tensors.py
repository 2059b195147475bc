r"""Reads what a pickle says of tensors in a row in one step: nine tenths of a checkpoint's pickle are the same opcodes.

They follow a name that stands on the stack, `torch._utils._rebuild_tensor_v2`, and are what Python's pickler makes of
torch's tensors in protocol 2; `#n` is the n-th value memoized from here on, by LONG_BINPUT or, for the first 256 values
of a pickle, by BINPUT:

    MARK MARK BINGET 'storage'  BINGET torch.FloatStorage
         BINUNICODE '203' #0  BINGET 'cpu'  number of elements  TUPLE #1  BINPERSID
    offset  sizes TUPLE2 #2  strides TUPLE2 #3  NEWFALSE
    BINGET collections.OrderedDict  EMPTY_TUPLE  REDUCE #4
    TUPLE #5  REDUCE #6

Before the next tensor stand its key, which is a name (BINUNICODE 'layer.weight' #0) or one that was used before (BINGET
'exp_avg'), and the function (BINGET). Where the state of an optimizer's next parameter begins, SETITEMS, its key and
EMPTY_DICT #0 MARK stand before those.

Only what is written exactly so is read here, with the same checks and to the same effect as opcode by opcode. Anything
else, and whatever a check would refuse, is left to the machine, which then says what is wrong with it.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate, chain, repeat
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from enstack_lightning.checkpoint.pickle_rebuild import ORDERED_DICT, sizes_of, storage_of
from enstack_lightning.checkpoint.pickle_values import (
    MAX_KEY_LENGTH,
    Global,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Work,
)

MAX_RUN = 256
"""Tensors that are read in one step; what it takes for them is used again for the next ones."""

MIN_RUN = 4
"""Fewer are read opcode by opcode, which is quicker for them."""

_INTEGER = rb"(?:K.|M..|J....)"
_INTEGERS = rb"\(?" + _INTEGER + rb"{1,8}[t\x85-\x87]"
_CALL = (
    rb"\((h.h.)X(.)\0\0\0([0-9]{1,9})PUT(h.)(" + _INTEGER + rb")tPUTQ(" + _INTEGER + rb")"
    rb"(?:\)\)|(" + _INTEGERS + rb")PUT(" + _INTEGERS + rb")PUT)\x89h(.)\)RPUTtPUTRPUT"
)
_BETWEEN = rb"(?:u(" + _INTEGER + rb")\}PUT\()?(?:(h.|j....)|X(.)\0\0\0([\w.]{1,255})PUT)h(.)\("

tensor_call = re.compile(rb"\(h.h.X.\0\0\0[0-9]", re.DOTALL).match
"""Matches the beginning of the template behind its first MARK."""

_Match = Callable[[bytes, int, int], re.Match[bytes] | None]


class _Form(NamedTuple):
    """How the numbers of memoized values are written.

    Attributes:
        first: matches the template from behind its first MARK on; every opcode in it has one way to be matched.
        following: matches what leads from one tensor to the next, and that one.
        end: of the numbers that can be written so.
        letter: each of them, as `struct` has it.
    """

    first: _Match
    following: _Match
    end: int
    letter: str


def _form(put: bytes, end: int, letter: str) -> _Form:
    first, following = (re.compile(p.replace(b"PUT", put), re.DOTALL).match for p in (_CALL, _BETWEEN + _CALL))
    return _Form(first, following, end, letter)


_SHORT, _LONG = _form(rb"q(.)", 2**8, "B"), _form(rb"r(....)", 2**32, "I")


class _Columns(NamedTuple):
    """The groups of `_Form.following`, each of all tensors in a row; empty where a tensor has none."""

    state_key: tuple[bytes, ...]
    state_put: tuple[bytes, ...]
    known_key: tuple[bytes, ...]
    text_length: tuple[bytes, ...]
    text: tuple[bytes, ...]
    text_put: tuple[bytes, ...]
    function: tuple[bytes, ...]
    kind: tuple[bytes, ...]
    key_length: tuple[bytes, ...]
    key: tuple[bytes, ...]
    key_put: tuple[bytes, ...]
    place: tuple[bytes, ...]
    numel: tuple[bytes, ...]
    pid_put: tuple[bytes, ...]
    offset: tuple[bytes, ...]
    shape: tuple[bytes, ...]
    shape_put: tuple[bytes, ...]
    stride: tuple[bytes, ...]
    stride_put: tuple[bytes, ...]
    hooks: tuple[bytes, ...]
    hooks_put: tuple[bytes, ...]
    args_put: tuple[bytes, ...]
    tensor_put: tuple[bytes, ...]


_NOTHING_BEFORE = (b"",) * _Columns._fields.index("kind")
_puts = itemgetter(*(number for number, name in enumerate(_Columns._fields) if name.endswith("_put")))

_OPCODES = 23
"""Of a tensor with its key and its function, besides those that make its sizes and these:"""
_OPCODES_OF_A_STATE, _OPCODES_OF_A_NAME, _OPCODES_BEFORE = 5, 1, 3
"""The last of these have been done of the first tensor."""

_Sizes = tuple[int, ...]
_StorageType = tuple[str, Global, str, str]
"""The word, the class and the device of a persistent id, and the dtype."""
_Row = tuple[dict[Any, Any] | None, str, _StorageType, TensorDescriptor]
"""The state and the name that it begins with, if any, what its persistent id says, and the tensor."""


class Machine(Protocol):
    """What reading tensors needs of the machine that reads the pickle, and changes in it."""

    stack: list[Any]
    below_marks: list[list[Any]]
    memo: list[Any]
    far_memo: dict[int, Any]
    globals: dict[tuple[str, str], Global]
    tensors: list[TensorDescriptor]
    storages: dict[object, StorageDescriptor]
    first_of_key: dict[str, StorageDescriptor]
    ordered: dict[int, dict[Any, Any]]
    work: Work

    def storage(self, pid: object) -> StorageDescriptor: ...


def read_tensors(machine: Machine, start: re.Match[bytes], most_opcodes: int) -> tuple[int, int]:
    """Does what the opcodes of the template would do, behind the MARK that the machine stands at.

    So it does with those of the tensors that follow.

    Args:
        start: a match of `tensor_call`.
        most_opcodes: that may be done.

    Returns:
        Where the last of them ends, and how many opcodes have been done: 0, and nothing else, when they are to be read
        one by one.

    Raises:
        PickleDefectError: as the machine would.
    """
    data, end, at = start.string, start.endpos, start.start()
    if not machine.stack or not _is_rebuild(machine, machine.stack[-1]):
        return at, 0
    form = _form_of(machine)
    found = form.first(data, at, end)
    if found is None:
        return at, 0
    rows, at = [_NOTHING_BEFORE + found.groups(b"")], found.end()
    while len(rows) < MAX_RUN and (found := form.following(data, at, end)):
        rows.append(found.groups(b""))
        at = found.end()
    if len(rows) < MIN_RUN:
        return at, 0
    try:
        run = Run(machine, rows)
    except PickleDefectError:
        return at, 0
    if run.opcodes > most_opcodes:
        return at, 0
    run.do()
    return at, run.opcodes


class _UnusualError(PickleDefectError):
    """Tensors in a row are not, or not surely, what a pickler writes."""


class Run:
    """Tensors in a row; stands in the memo for all that they memoize.

    Attributes:
        opcodes: how many they are.

    Raises:
        PickleDefectError: they are to be read opcode by opcode; nothing has been changed.
    """

    def __init__(self, machine: Machine, rows: list[tuple[bytes, ...]]) -> None:
        self._machine = machine
        self._first = len(machine.memo)
        self._columns = columns = _Columns._make(zip(*rows, strict=True))
        if not are_put_in_a_row(machine, *_puts(columns)):
            raise _UnusualError("values that are memoized in another order")
        if not (are_as_long(columns.text, columns.text_length) and are_as_long(columns.key, columns.key_length)):
            raise _UnusualError("a text of another length")
        self._check_functions()
        self._numbers = {text: _integer(text) for text in {*columns.numel, *columns.offset}}
        if min(self._numbers.values()) < 0:
            raise _UnusualError("a number of elements or an offset below 0")
        self._keys = {fetched: self._key(fetched) for fetched in {*columns.known_key} - {b""}}
        kinds = set(zip(columns.kind, columns.place, strict=True))
        self._storage_types = {fetched: self._storage_type(*fetched) for fetched in kinds}
        sizes = {text: _integers(text) for text in {*columns.shape, *columns.stride}}
        self._sizes = {text: values for text, (values, _) in sizes.items()}
        opcodes = {text: count for text, (_, count) in sizes.items()}
        for shape, stride in set(zip(columns.shape, columns.stride, strict=True)):
            if len(self._sizes[shape]) != len(self._sizes[stride]):
                raise _UnusualError("a shape and a stride of different lengths")
        states, names, sized = (len(rows) - c.count(b"") for c in (columns.state_key, columns.text, columns.shape))
        if states and not self._can_end_state():
            raise _UnusualError("items that are set on something else than a dict")
        self.opcodes = (
            _OPCODES * len(rows) - _OPCODES_BEFORE + _OPCODES_OF_A_STATE * states + _OPCODES_OF_A_NAME * names
        )
        self.opcodes += sum(map(opcodes.__getitem__, chain(columns.shape, columns.stride)))
        self._memoized = states + names + 5 * len(rows) + 2 * sized
        self._rows: list[_Row] = []
        self._starts: list[int] = []

    def _fetched(self, number: bytes) -> Any:
        return fetched_from_before(self._machine.memo, number)

    def _key(self, fetched: bytes) -> str:
        """The key that is fetched: one from before, or the name of a tensor in this row."""
        columns, number = self._columns, fetched[1:]
        if number in columns.text_put and (row := columns.text_put.index(number)) < columns.known_key.index(fetched):
            return columns.text[row].decode("ascii")
        key = self._fetched(number)
        if not is_short_text(key):
            raise _UnusualError("a key that is no text, or too long")
        return str(key)

    def _storage_type(self, kind: bytes, place: bytes) -> _StorageType:
        word, class_, device = (self._fetched(fetched[1:2]) for fetched in (kind, kind[2:], place))
        return word, class_, device, storage_of((word, class_, "", device, 0), legacy=False).dtype

    def _check_functions(self) -> None:
        machine, columns = self._machine, self._columns
        if not all(_is_rebuild(machine, self._fetched(number)) for number in {*columns.function[1:]}):
            raise _UnusualError("another function than that for tensors")
        ordered_dict = machine.globals.get((ORDERED_DICT.module, ORDERED_DICT.name))
        if ordered_dict is None or any(self._fetched(number) is not ordered_dict for number in {*columns.hooks}):
            raise _UnusualError("hooks that are no OrderedDict")

    def _can_end_state(self) -> bool:
        machine = self._machine
        outer = machine.below_marks[-1] if machine.below_marks else []
        return bool(outer) and outer[-1].__class__ is dict and len(machine.stack) % 2 == 0

    def do(self) -> None:
        """Does the opcodes; the memo's values are made when one of them is fetched, which most pickles never do."""
        machine, columns, sizes, numbers = self._machine, self._columns, self._sizes, self._numbers
        types = list(map(self._storage_types.__getitem__, zip(columns.kind, columns.place, strict=True)))
        shapes, strides = (map(sizes.__getitem__, column) for column in (columns.shape, columns.stride))
        offsets = map(numbers.__getitem__, columns.offset)
        dtypes = [dtype for _, _, _, dtype in types]
        tensors = list(map(TensorDescriptor, self._storages(types), dtypes, shapes, strides, offsets))
        names = _texts(columns.text)
        states: list[dict[Any, Any] | None] = [{} if key else None for key in columns.state_key]
        machine.stack.pop()  # the function's name
        machine.tensors += tensors
        self._stack(states, names, tensors)
        self._rows = list(zip(states, names, types, tensors, strict=True))
        machine.memo += repeat(self, self._memoized)
        del self._columns

    def _storages(self, types: list[_StorageType]) -> list[StorageDescriptor]:
        machine, keys = self._machine, _texts(self._columns.key)
        numels = list(map(self._numbers.__getitem__, self._columns.numel))
        _, _, devices, dtypes = zip(*types, strict=True)
        made = list(map(StorageDescriptor, keys, dtypes, numels, devices))
        by_key = dict(zip(keys, made, strict=True))
        if len(by_key) == len(made) and machine.first_of_key.keys().isdisjoint(by_key):
            machine.first_of_key.update(by_key)
            machine.storages.update(by_key)
            return made
        return [machine.storage(_pid(*row)) for row in zip(types, keys, numels, strict=True)]

    def _stack(self, states: list[dict[Any, Any] | None], names: list[str], tensors: list[TensorDescriptor]) -> None:
        """Puts keys and tensors on the stack, and in each state those that lie between it and the next one."""
        machine, columns, keys = self._machine, self._columns, self._keys
        stack = machine.stack
        for state, state_key, name, fetched, tensor in zip(
            states, columns.state_key, names, columns.known_key, tensors, strict=True
        ):
            if state is not None:
                outer = machine.below_marks[-1]
                machine.work.set_items(outer[-1], stack)
                outer += _integer(state_key), state
                stack = []
            if name:
                stack.append(name)
            elif fetched:
                stack.append(keys[fetched])
            stack.append(tensor)
        machine.stack = stack

    def fetched(self, number: int) -> Any:
        """The value under a number of the memo at which this run stands."""
        if not self._starts:
            counts = ((state is not None) + (name != "") + (7 if t.shape else 5) for state, name, _, t in self._rows)
            self._starts = list(accumulate(counts, initial=self._first))
        row, memo = bisect_right(self._starts, number) - 1, self._machine.memo
        for n, value in enumerate(self._values(*self._rows[row]), self._starts[row]):
            if memo[n] is self:
                memo[n] = value
        return memo[number]

    def _values(
        self, state: dict[Any, Any] | None, name: str, storage_type: _StorageType, tensor: TensorDescriptor
    ) -> list[Any]:
        """What a row memoizes."""
        machine, storage, shape, stride = self._machine, tensor.storage, tensor.shape, tensor.stride
        assert storage is not None
        hooks: dict[Any, Any] = {}
        machine.ordered[id(hooks)] = hooks
        machine.work.hooks.append(hooks)
        return [
            *([] if state is None else [state]),
            *([name] if name else []),
            storage.key,
            _pid(storage_type, storage.key, storage.numel),
            *([shape, stride] if shape else []),
            hooks,
            (storage, tensor.offset, shape, stride, False, hooks),
            tensor,
        ]


# What holds of all that is read in a row


def are_put_in_a_row(machine: Machine, *columns: tuple[bytes, ...]) -> bool:
    """Whether all values are memoized one by one from where the memo ends, and nothing lies behind that.

    Args:
        columns: their numbers, row by row from left to right; empty where a row has none.
    """
    first, form = len(machine.memo), _form_of(machine)
    numbers = b"".join(map(b"".join, zip(*columns, strict=True)))
    end = first + len(numbers) // struct.calcsize(form.letter)
    if machine.far_memo or end > form.end:
        return False
    return numbers == struct.pack(f"<{end - first}{form.letter}", *range(first, end))


def _form_of(machine: Machine) -> _Form:
    return _SHORT if len(machine.memo) < _SHORT.end else _LONG


def fetched_from_before(memo: list[Any], number: bytes) -> Any:
    """The value that is fetched, if its number comes before all that are put here; else None."""
    index = int.from_bytes(number, "little")
    value = memo[index] if index < len(memo) else None
    return value.fetched(index) if value.__class__ is Run else value


def _texts(column: tuple[bytes, ...]) -> list[str]:
    return b",".join(column).decode("ascii").split(",")


def _pid(of: _StorageType, key: str, numel: int) -> tuple[str, Global, str, str, int]:
    word, class_, device, _ = of
    return word, class_, key, device, numel


def are_as_long(texts: Iterable[bytes], lengths: Iterable[bytes]) -> bool:
    """Whether each text has the length that its opcode says; empty where a row has none."""
    return [*b"".join(lengths)] == [*map(len, filter(None, texts))]


def is_short_text(key: Any) -> bool:
    return key.__class__ is str and len(key) <= MAX_KEY_LENGTH


def _is_rebuild(machine: Machine, value: object) -> bool:
    return value is not None and value is machine.globals.get(("torch._utils", "_rebuild_tensor_v2"))


def _integer(text: bytes) -> int:
    """The value of BININT1, BININT2 or BININT."""
    return int.from_bytes(text[1:], "little", signed=text[0] == 0x4A)


@lru_cache(4_096)
def _integers(text: bytes) -> tuple[_Sizes, int]:
    """The sizes that opcodes make, and how many they are with the one that memoizes them.

    Those of a scalar are EMPTY_TUPLE, which is not memoized: here, no text.
    """
    if not text:
        return (), 1
    values = tuple(_integer(found) for found in _each_integer(text))
    marked = text[0] == 0x28
    if not (marked if text[-1] == 0x74 else not marked and len(values) == text[-1] - 0x84):
        raise _UnusualError("sizes that are no tuple of them all")
    return sizes_of(values), len(values) + 2 + marked


_each_integer = re.compile(_INTEGER, re.DOTALL).findall
