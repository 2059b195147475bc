"""Tensors read in one step, against the same pickles read opcode by opcode: nothing may differ, whatever the bytes."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from genuine import GENUINE
from mutations import changed_pickle

from enstack_lightning.checkpoint import inert_pickle
from enstack_lightning.checkpoint.inert_pickle import (
    MAX_OPCODES,
    Call,
    Loop,
    PickleDefectError,
    read_pickle,
)

MUTATIONS = 900


def torch_pickle(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


@pytest.fixture(scope="module")
def pickled() -> bytes:
    """Tensors of many kinds, behind as many values as it takes for their numbers in the memo to have four bytes."""
    weight = torch.ones(300, 4)
    return torch_pickle(
        {
            "first": torch.ones(2),
            "first long": torch.ones(2, dtype=torch.long),
            **{f"value {n}": n for n in range(256)},
            "scalar": torch.tensor(1.0),
            "vector": torch.ones(70_000),
            "matrix": weight,
            "view": weight[2:, 1],
            "of five": torch.ones(1, 2, 3, 4, 300),
            "of three": torch.ones(1, 2, 3),
            "nothing": torch.ones(0, 3),
            "long": torch.ones(3, 1000, dtype=torch.long),
            "half": torch.ones(3).half(),
            "parameter": torch.nn.Parameter(torch.ones(2, 2)),
            "state": {"step": torch.tensor(7.0), "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)},
        }
    )


class Reads:
    """How often a tensor was read in one step."""

    def __init__(self) -> None:
        self.count = 0
        self.in_one_step = inert_pickle.read_tensor
        self.matches = inert_pickle.tensor_call

    def __call__(self, *args: Any) -> int:
        opcodes = self.in_one_step(*args)
        self.count += opcodes > 0
        return opcodes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr(inert_pickle, "read_tensor", reads)
    return reads


def outcome(pickled: bytes, max_opcodes: int = MAX_OPCODES) -> object:
    """All that reading a pickle tells, the sharing of what can be changed included."""
    try:
        read = read_pickle(pickled, max_opcodes)
    except PickleDefectError as e:
        return str(e), e.cut_short, e.globals, str(e.__cause__)
    return shown(read.value, {}), read.globals, read.tensors, read.storages, read.oddities, read.refused_opcodes


def shown(value: Any, seen: dict[int, int]) -> object:
    if isinstance(value, list | dict | Call):
        if id(value) in seen:
            return "again", seen[id(value)]
        seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return "dict", [(shown(k, seen), shown(v, seen)) for k, v in value.items()]
    if isinstance(value, Call):
        parts = value.function, value.args, value.state, dict(value.entries), value.items
        return "call", [shown(part, seen) for part in parts]
    if isinstance(value, list | tuple):
        return type(value).__name__, [shown(v, seen) for v in value]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(repr, value))
    return type(value).__name__, "" if isinstance(value, Loop) else repr(value)


def assert_alike(pickled: bytes, max_opcodes: int = MAX_OPCODES) -> None:
    fast = outcome(pickled, max_opcodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inert_pickle, "tensor_call", lambda *args: None)
        assert outcome(pickled, max_opcodes) == fast


def test_every_tensor_of_a_known_type_is_read_in_one_step(pickled: bytes, reads: Reads) -> None:
    read = read_pickle(pickled)
    # Not the first of each of three types nor the view, whose storage has been named before; a parameter counts twice.
    assert reads.count == len(read.tensors) - 5
    assert_alike(pickled)


def test_the_memo_is_the_same_afterwards(pickled: bytes) -> None:
    fetched = b"".join(b"j" + struct.pack("<I", n) for n in range(1, 256 + 90))
    assert_alike(pickled[:-1] + b"(" + fetched + b"t\x86.")


def test_a_limit_of_opcodes_ends_the_reading_at_the_same_one(pickled: bytes) -> None:
    for most in [*range(200, 2_200, 9), *range(1_400, 1_450)]:
        assert_alike(pickled, most)


def test_a_pickle_cut_anywhere_is_as_malformed(pickled: bytes) -> None:
    for size in range(len(pickled) - 1_500, len(pickled), 3):
        assert_alike(pickled[:size])


def test_changed_pickles_are_read_alike(pickled: bytes, reads: Reads) -> None:
    for seed in range(MUTATIONS):
        assert_alike(mutated(pickled, seed))
    assert reads.count > MUTATIONS


def mutated(pickled: bytes, seed: int) -> bytes:
    """With bytes changed behind the first half, or with its opcodes changed, whatever lies there."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        return changed_pickle(draw, pickled)
    changed = bytearray(pickled)
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(len(changed) // 2, len(changed))
        if seed % 3 == 1:
            changed[at] ^= 1 << draw.randrange(8)
        else:
            changed[at] = draw.choice(changed)
    return bytes(changed)


@pytest.mark.faults_long
@pytest.mark.parametrize("name", GENUINE)
@pytest.mark.filterwarnings("ignore")
def test_genuine_pickles_and_changed_ones_are_read_alike(name: str, tmp_path: Path) -> None:
    path = GENUINE[name].write(tmp_path)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        for pickled in pickles_in(file):
            assert_alike(pickled)
            for seed in range(100):
                assert_alike(mutated(pickled, seed))


def pickles_in(file: Path) -> list[bytes]:
    if not zipfile.is_zipfile(file):
        return []
    with zipfile.ZipFile(file) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]


def test_shapes_that_are_written_otherwise_are_left_to_the_machine(pickled: bytes) -> None:
    matrix = b"M\x2c\x01K\x04\x86"
    assert matrix in pickled
    for other in (
        b"M\x2c\x01K\x04\x85",
        b"M\x2c\x01K\x04\x87",
        b"(M\x2c\x01K\x04t",
        b"M\x2c\x01K\x04t",
        b"(M\x2c\x01\x85",
        b"J\xff\xff\xff\xffK\x04\x86",
        b"J\x2c\x01\0\0K\x04\x86",
        b"K\x04\x85",
        b")",
    ):
        assert_alike(pickled.replace(matrix, other))


def test_what_stands_elsewhere_in_the_memo_is_left_to_the_machine(pickled: bytes) -> None:
    """The name of the function, of the storage, of the device: each replaced by another value of the memo."""
    calls = list(inert_pickle.tensor_call.__self__.finditer(pickled))
    assert len(calls) > 10
    call = calls[3]
    for group in (1, 2, 3, 6, 14):
        for value in range(0, 256, 3):
            assert_alike(pickled[: call.start(group)] + bytes([value]) + pickled[call.end(group) :])
    for group in (5, 8, 11, 13, 15, 16, 17):
        for number in (0, 5, 255, 256, 300, 2**31, 2**32 - 1):
            put = struct.pack("<I", number)
            assert_alike(pickled[: call.start(group)] + put + pickled[call.end(group) :])
