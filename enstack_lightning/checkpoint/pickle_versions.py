r"""Reads the versions of a module's layers in one step: `state_dict()._metadata` has an entry for each layer.

Behind the first EMPTY_DICT, in protocol 2 when 256 values have been memoized; `#n` is the n-th from here on:

    #0  LONG_BINGET 'version'  BININT1 1  SETITEM
    BINUNICODE 'encoder.layer.0' #1  EMPTY_DICT #2  LONG_BINGET 'version'  BININT1 1  SETITEM
    BINUNICODE …

As in `pickle_tensors`, what is not written exactly so is left to the machine.
"""

from __future__ import annotations

import re
from itertools import chain

from enstack_lightning.checkpoint.pickle_tensors import (
    Machine,
    are_as_long,
    are_put_in_a_row,
    fetched_from_before,
    is_short_text,
)

versions_in_a_row = re.compile(
    rb"r....j....K.s(?:X.\0\0\0[\w.]{1,255}r....\}r....j....K.s){3,9999}+",  # possessive: no memory for each
    re.DOTALL,
).match
"""Matches four entries or more: fewer are read opcode by opcode, which is quicker for them."""

_each = re.compile(rb"(?:X(.)\0\0\0([\w.]{1,255})r(....)\})?r(....)j(....)K(.)s", re.DOTALL).findall

_OPCODES, _OPCODES_BEFORE = 7, 3
_BYTES, _BYTES_BESIDE_NAME = len(b"r....j....K.s"), len(b"X....r....}")


def read_versions(machine: Machine, match: re.Match[bytes], most_opcodes: int) -> int:
    """Does the opcodes of a match of `versions_in_a_row`; the dict of the first stands on the machine's stack.

    Returns:
        How many they are; 0 when they are to be read one by one, and nothing has been done.
    """
    memo, stack = machine.memo, machine.stack
    rows = _each(match.string, match.start(), match.end())
    lengths, texts, name_puts, dict_puts, fetched, versions = zip(*rows, strict=True)
    opcodes = _OPCODES * len(rows) - _OPCODES_BEFORE
    of_names = sum(map(len, texts)) + _BYTES_BESIDE_NAME * (len(rows) - 1)
    if opcodes > most_opcodes or _BYTES * len(rows) + of_names != match.end() - match.start():
        return 0
    if not all(texts[1:]) or not are_as_long(texts, lengths) or not are_put_in_a_row(machine, name_puts, dict_puts):
        return 0
    keys = {number: fetched_from_before(memo, number) for number in set(fetched)}
    if not all(map(is_short_text, keys.values())):
        return 0
    values = [{keys[number]: version[0]} for number, version in zip(fetched, versions, strict=True)]
    stack[-1].update(values[0])
    named = list(zip((text.decode("ascii") for text in texts[1:]), values[1:], strict=True))
    memoized = stack[-1:]
    memoized += chain.from_iterable(named)
    stack += memoized[1:]
    memo += memoized
    return opcodes
