r"""Reads what a pickle says of one tensor in one step: nine tenths of a checkpoint's pickle are the same 40 opcodes.

They follow a name that stands on the stack, `torch._utils._rebuild_tensor_v2`, and are what Python's pickler makes of
torch's tensors in protocol 2 when 256 values have been memoized; `#n` is the n-th value memoized from here on:

    MARK MARK BINGET 'storage'  BINGET torch.FloatStorage
         BINUNICODE '203' #0  BINGET 'cpu'  number of elements  TUPLE #1  BINPERSID
    offset  sizes TUPLE2 #2  strides TUPLE2 #3  NEWFALSE
    BINGET collections.OrderedDict  EMPTY_TUPLE  REDUCE #4
    TUPLE #5  REDUCE #6

Only what is written exactly so is read here, with the same checks and to the same effect as opcode by opcode. Anything
else, and whatever a check would refuse, is left to the machine, which then says what is wrong with it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Protocol

from enstack_lightning.checkpoint.pickle_rebuild import ORDERED_DICT, sizes_of
from enstack_lightning.checkpoint.pickle_values import (
    Global,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Work,
)

_PUT = rb"r(....)"
_INTEGER = rb"(?:K.|M..|J....)"
_INTEGERS = rb"\(?" + _INTEGER + rb"{1,8}[t\x85-\x87]"
tensor_call = re.compile(
    rb"\(h(.)h(.)X(.)\0\0\0([0-9]{1,9})" + _PUT + rb"h(.)(" + _INTEGER + rb")t" + _PUT + rb"Q(" + _INTEGER + rb")"
    rb"(?:\)\)|(" + _INTEGERS + rb")" + _PUT + rb"(" + _INTEGERS + rb")" + _PUT + rb")"
    rb"\x89h(.)\)R" + _PUT + rb"t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
).match
"""Matches the template from behind its first MARK on; every opcode in it has one way to be matched."""

_REBUILD_NAME = "torch._utils", "_rebuild_tensor_v2"
_ORDERED_DICT_NAME = ORDERED_DICT.module, ORDERED_DICT.name
_FIVE, _SEVEN = (sum(1 << 32 * n for n in range(count)) for count in (5, 7))
_FIVE_IN_A_ROW, _SEVEN_IN_A_ROW = (sum(n << 32 * n for n in range(count)) for count in (5, 7))
"""Numbers of 32 bits side by side, as one: each is 1, or they are 0, 1, 2 and so on."""

_OPCODES_BESIDE_SIZES = 20


class Machine(Protocol):
    """What reading a tensor needs of the machine that reads the pickle, and changes in it."""

    stack: list[Any]
    memo: dict[int, Any]
    globals: dict[tuple[str, str], Global]
    tensors: list[TensorDescriptor]
    ordered: dict[int, dict[Any, Any]]
    work: Work

    def storage(self, pid: object) -> StorageDescriptor: ...


def read_tensor(machine: Machine, match: re.Match[bytes], most_opcodes: int) -> int:
    """Does what the opcodes of a match of `tensor_call` would do, behind the MARK that the machine stands at.

    Returns:
        How many opcodes they were; 0 when they are to be read one by one, and nothing that matters has been done.
    """
    (
        word, kind, length, key_text, key_put, place, numel, pid_put, offset_text,
        sizes, shape_put, strides, stride_put, hooks_kind, hooks_put, args_put, tensor_put,
    ) = match.groups()  # fmt: skip
    stack, memo, names = machine.stack, machine.memo, machine.globals
    first = len(memo)
    if sizes is None:
        (shape, sizes_opcodes), (stride, strides_opcodes) = _NO_SIZES, _NO_SIZES
        puts, expected = key_put + pid_put + hooks_put + args_put + tensor_put, first * _FIVE + _FIVE_IN_A_ROW
    else:
        (shape, sizes_opcodes), (stride, strides_opcodes) = _integers(sizes), _integers(strides)
        puts = key_put + pid_put + shape_put + stride_put + hooks_put + args_put + tensor_put
        expected = first * _SEVEN + _SEVEN_IN_A_ROW
    opcodes = _OPCODES_BESIDE_SIZES + sizes_opcodes + strides_opcodes
    # Numbered like this, with one byte for each value that is fetched, no fetched value is one that is put here.
    if int.from_bytes(puts, "little") != expected or first < 256:
        return 0
    if shape is None or stride is None or len(key_text) != length[0] or opcodes > most_opcodes:
        return 0
    if not stack or stack[-1] is not names.get(_REBUILD_NAME):
        return 0
    ordered_dict = memo.get(hooks_kind[0])
    if ordered_dict is None or ordered_dict is not names.get(_ORDERED_DICT_NAME):
        return 0
    key = key_text.decode("ascii")
    hooks: dict[Any, Any] = {}
    pid = memo.get(word[0]), memo.get(kind[0]), key, memo.get(place[0]), _integer(numel)
    offset = _integer(offset_text)
    if offset < 0 or len(shape) != len(stride):
        return 0
    try:
        storage = machine.storage(pid)
    except PickleDefectError:
        return 0
    tensor = TensorDescriptor(storage, storage.dtype, shape, stride, offset)
    args = storage, offset, shape, stride, False, hooks
    memo[first], memo[first + 1] = key, pid
    if sizes is None:
        last = first + 4
    else:
        memo[first + 2], memo[first + 3] = shape, stride
        last = first + 6
    memo[last - 2], memo[last - 1], memo[last] = hooks, args, tensor
    machine.ordered[id(hooks)] = hooks
    machine.work.hooks.append(hooks)
    machine.tensors.append(tensor)
    stack[-1] = tensor
    return opcodes


@lru_cache(4_096)
def _integer(text: bytes) -> int:
    """The value of BININT1, BININT2 or BININT."""
    return int.from_bytes(text[1:], "little", signed=text[0] == 0x4A)


@lru_cache(4_096)
def _integers(text: bytes) -> tuple[tuple[int, ...] | None, int]:
    """The sizes that opcodes make, and how many they are with the one that memoizes them; None for anything else."""
    values = tuple(_integer(found) for found in _each_integer(text))
    marked = text[0] == 0x28
    right = marked if text[-1] == 0x74 else not marked and len(values) == text[-1] - 0x84
    try:
        return sizes_of(values) if right else None, len(values) + 2 + marked
    except PickleDefectError:
        return None, 0


_each_integer = re.compile(_INTEGER, re.DOTALL).findall
_NO_SIZES: tuple[tuple[int, ...] | None, int] = (), 1
