"""Tensors read in one step, against the same pickles read opcode by opcode: nothing may differ, whatever the bytes."""

from __future__ import annotations

import io
import pickletools
import random
import re
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from genuine import GENUINE
from mutations import changed_pickle

from enstack_lightning.checkpoint import inert_pickle, pickle_tensors
from enstack_lightning.checkpoint.inert_pickle import (
    MAX_OPCODES,
    Call,
    Loop,
    PickleDefectError,
    read_pickle,
)

MUTATIONS = 900
MIN_RUN = pickle_tensors.MIN_RUN


@pytest.fixture(autouse=True)
def every_row_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are so short that they would be read opcode by opcode."""
    monkeypatch.setattr(pickle_tensors, "MIN_RUN", 1)


def torch_pickle(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


@pytest.fixture(scope="module")
def pickled() -> bytes:
    """Tensors of many kinds, behind as many values as it takes for their numbers in the memo to have four bytes."""
    weight = torch.ones(300, 4)
    inner = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.ReLU())
    module = torch.nn.ModuleDict({"encoder": inner, "of one-": torch.nn.ReLU(), "last": torch.nn.Linear(2, 1)})
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
            "weights": {name: torch.ones(3, 2) for name in ("a.weight", "a.bias", "b-c.weight", "ü", "x" * 300, "d")},
            "state": {number: moments() for number in (0, 1, 2, 300, 70_000)},
            "named": {name: moments() for name in ("a.weight", "a.bias")},
            "module": module.state_dict(),
        }
    )


def moments() -> dict[str, torch.Tensor]:
    return {"step": torch.tensor(7.0), "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)}


@pytest.fixture(scope="module")
def in_a_row() -> tuple[bytes, int]:
    """A pickle that ends with tensors in a row, and where they begin."""
    state = {number: {"step": torch.tensor(7.0), "exp_avg": torch.ones(5)} for number in range(3)}
    weights = {"a": torch.ones(2), "b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)}
    many = {f"value {n}": n for n in range(256)}
    data = torch_pickle({"first": torch.ones(2), **many, **weights, "state": state, "module": module().state_dict()})
    return data, data.index(b"value 255")


def module() -> torch.nn.Module:
    layers = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.ReLU())
    return torch.nn.ModuleDict({"encoder": layers, "head": torch.nn.Linear(1, 1)})


class Reads:
    """How many tensors were read otherwise than opcode by opcode, and in how many steps."""

    def __init__(self) -> None:
        self.count = self.steps = 0
        self.in_one_step = inert_pickle.read_tensors

    def __call__(self, machine: Any, *args: Any) -> tuple[int, int]:
        known = len(machine.tensors)
        at, opcodes = self.in_one_step(machine, *args)
        self.count += len(machine.tensors) - known
        self.steps += opcodes > 0
        return at, opcodes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr(inert_pickle, "read_tensors", reads)
    return reads


OUTCOME = 6
"""Parts of the outcome of a pickle that can be read; another number are those of one that cannot."""


def outcome(pickled: bytes, max_opcodes: int = MAX_OPCODES) -> tuple[object, ...]:
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
        patch.setattr(inert_pickle, "versions_in_a_row", lambda *args: None)
        assert outcome(pickled, max_opcodes) == fast


def test_every_tensor_of_a_known_type_is_read_in_one_step(pickled: bytes, reads: Reads) -> None:
    read = read_pickle(pickled)
    # Not the first of each of three types nor the view, whose storage has been named before; a parameter counts twice.
    assert reads.count == len(read.tensors) - 5
    assert_alike(pickled)


def test_tensors_in_a_row_are_read_in_one_step(in_a_row: tuple[bytes, int], reads: Reads) -> None:
    read_pickle(in_a_row[0])
    assert (reads.count, reads.steps) == (11, 3)


@pytest.fixture(scope="module")
def among_the_first() -> bytes:
    """Tensors in a row, and the states of an optimizer, whose numbers in the memo have one byte, and then four."""
    weights = {name: torch.ones(3, 2) for name in ("a.weight", "a.bias", "queue", "q", "d")}
    return torch_pickle({"first": torch.ones(2), "weights": weights, "state": {n: moments() for n in range(13)}})


def test_tensors_among_the_first_values_are_read_in_one_step(among_the_first: bytes, reads: Reads) -> None:
    read = read_pickle(among_the_first)
    # Not the first, which names what the others fetch, nor the one at which one byte is no longer enough.
    assert reads.count == len(read.tensors) - 2
    assert reads.steps == 3
    assert_alike(among_the_first)


def test_every_byte_of_tensors_among_the_first_values_changed(among_the_first: bytes) -> None:
    for at in range(len(among_the_first)):
        changed = bytearray(among_the_first)
        changed[at] ^= (0x01, 0x10, 0xFF)[at % 3]
        assert_alike(bytes(changed))
    for seed in range(MUTATIONS // 3):
        assert_alike(mutated(among_the_first, seed))


def test_one_of_the_first_values_fetched_or_put_elsewhere(among_the_first: bytes) -> None:
    """Each fetch led to each value, those of the same row too; each number put there given to another one."""
    for form, step in ((rb"h(.)", 13), (rb"q(.)", 67)):
        for use in re.finditer(form, among_the_first, re.DOTALL):
            for value in range(use.start() % step, 256, step):
                assert_alike(among_the_first[: use.start(1)] + bytes([value]) + among_the_first[use.end(1) :])


def test_versions_of_layers_are_read_in_one_step(in_a_row: tuple[bytes, int], monkeypatch: pytest.MonkeyPatch) -> None:
    opcodes, in_one_step = [], inert_pickle.read_versions
    monkeypatch.setattr(inert_pickle, "read_versions", lambda *args: opcodes.append(in_one_step(*args)) or opcodes[-1])
    read_pickle(in_a_row[0])
    layers = len(list(module().modules()))
    # The names of the root, which is empty, and of the first layer stand before what is matched.
    assert opcodes == [7 * (layers - 1) - 3]


def test_every_byte_of_tensors_in_a_row_changed(in_a_row: tuple[bytes, int]) -> None:
    pickled, begin = in_a_row
    for at in range(begin, len(pickled)):
        changed = bytearray(pickled)
        changed[at] ^= (0x01, 0x10, 0xFF)[at % 3]
        assert_alike(bytes(changed))


def test_a_limit_of_opcodes_within_tensors_in_a_row(in_a_row: tuple[bytes, int]) -> None:
    pickled, _ = in_a_row
    opcodes = sum(1 for _ in pickletools.genops(pickled)) - 1  # without PROTO
    ends = [len(outcome(pickled, most)) for most in range(opcodes - 300, opcodes + 2)]
    assert ends.index(OUTCOME) == 300, "the last opcode that is needed is the last one counted"
    for most in range(opcodes - 300, opcodes + 2):
        assert_alike(pickled, most)


@pytest.mark.parametrize(
    "state",
    [
        b"K\x00",  # a key twice
        b"M\x00\x00",
        b"J\xff\xff\xff\xff",
        b"N",
        b"X\x01\0\0\0a",
    ],
)
def test_odd_keys_of_an_optimizers_states(in_a_row: tuple[bytes, int], state: bytes) -> None:
    pickled, begin = in_a_row
    at = pickled.index(b"uK\x02}r", begin) + 1
    assert_alike(pickled[:at] + state + pickled[at + 2 :])


def test_a_key_that_is_named_later_or_not_at_all(in_a_row: tuple[bytes, int]) -> None:
    pickled, begin = in_a_row
    step, average = (
        re.search(rb"X.\0\0\0" + name + rb"r(....)", pickled, re.DOTALL)[1] for name in (b"step", b"exp_avg")
    )
    uses = [m.start(1) for m in re.finditer(rb"j(....)h.\(\(", pickled[begin:], re.DOTALL)]
    assert len(uses) == 4
    for use in uses:
        for other in (step, average, b"\x01\0\0\0", pickled[-8:-4], b"\xff\xff\0\0", *numbers_beside(step)):
            at = begin + use
            assert_alike(pickled[:at] + other + pickled[at + 4 :])


def numbers_beside(number: bytes) -> list[bytes]:
    (value,) = struct.unpack("<I", number)
    return [struct.pack("<I", value + more) for more in range(-30, 60)]


@pytest.mark.parametrize(
    ("put", "fetched"),
    [
        pytest.param(rb"h.\)Rr....tr....Rr(....)u", rb"j(....)h.\(\(", id="a tensor, fetched as a key of a state"),
        pytest.param(rb"encoder.0r(....)", rb"j(....)K.s", id="a layer's name, fetched as the key of a version"),
    ],
)
def test_a_number_put_early_and_again_in_a_row(put: bytes, fetched: bytes) -> None:
    """Which no pickler writes: what is fetched by it is what was put last, for torch, and so it is here."""
    state = {number: {"step": torch.tensor(7.0), "exp_avg": torch.ones(5)} for number in range(3)}
    many = {f"value {n}": n for n in range(256)}
    versions = dict(module().state_dict()._metadata)
    pickled = torch_pickle({"first": torch.ones(2), **many, "state": state, "versions": versions})
    number = re.search(put, pickled, re.DOTALL)[1]
    use = list(re.finditer(fetched, pickled, re.DOTALL))[-1]
    again = pickled[: use.start(1)] + number + pickled[use.end(1) :]
    assert len(outcome(again)) == OUTCOME
    assert_alike(re.sub(rb"(?s)value 7q.", lambda _: b"value 7r" + number, again))


def test_a_key_too_long_and_states_that_are_none(in_a_row: tuple[bytes, int]) -> None:
    pickled, begin = in_a_row
    long = b"X" + struct.pack("<I", 9_000) + b"s" * 9_000
    assert_alike(pickled.replace(b"X\x04\0\0\0step", long))
    before = pickled.index(b"X\x05\0\0\0state", begin)
    at = pickled.index(b"}", before)
    for other in (b"]", b"N", b")", b"h\0"):
        assert_alike(pickled[:at] + other + pickled[at + 1 :])
    for extra in (b"K\x01", b"N0"):  # one value more than pairs in a parameter's state
        at = pickled.index(b"(X\x04\0\0\0step", before) + 1
        assert_alike(pickled[:at] + extra + pickled[at:])


def test_rows_that_are_refused_again_and_again_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is looked at once: that its last tensor is odd must not have all before it looked at at each of them."""
    count = 300
    weights = {f"w{n}": torch.ones(2) for n in range(count)}
    pickled = torch_pickle({"first": torch.ones(2), **{f"value {n}": n for n in range(256)}, **weights})
    last = list(pickle_tensors._LONG.first.__self__.finditer(pickled))[-1]
    odd = pickled[: last.start(4)] + b"\xff\xff\0\0" + pickled[last.end(4) :]
    looked = []
    form = pickle_tensors._LONG
    counted = form._replace(following=lambda *args: looked.append(1) or form.following(*args))
    monkeypatch.setattr(pickle_tensors, "_LONG", counted)
    assert_alike(odd)
    assert count - 1 <= len(looked) < 2 * count


def test_the_memo_is_the_same_afterwards(pickled: bytes) -> None:
    numbers = [arg for opcode, arg, _ in pickletools.genops(pickled) if opcode.name.endswith("BINPUT")]
    fetched = b"".join(b"j" + struct.pack("<I", n) for n in numbers)
    everything = pickled[:-1] + b"(" + fetched + b"t\x86."
    assert len(outcome(everything)) == OUTCOME
    assert_alike(everything)


def test_values_of_the_memo_are_changed_or_replaced_afterwards(in_a_row: tuple[bytes, int]) -> None:
    """They are made when the first of them is fetched, and are the same from then on."""
    data, _ = in_a_row
    numbers = [arg for opcode, arg, _ in pickletools.genops(data) if opcode.name == "LONG_BINPUT"]
    fetches, puts = ([form + struct.pack("<I", n) for n in numbers] for form in (b"j", b"r"))
    hooks = []
    for i, fetch in enumerate(fetches):
        other = fetches[i - 2]
        changed = data[:-1] + b"(" + fetch + b"K\x01K\x02s" + fetch + other + b"t\x86."
        assert_alike(changed)
        hooks.append(outcome(changed)[0])
        assert_alike(data[:-1] + b"(K\x07" + puts[i] + other + fetch + b"t\x86.")
        assert_alike(data[:-1] + b"(" + other + b"K\x07" + puts[i] + fetch + other + b"t\x86.")
    assert sum("hooks" in str(said) for said in hooks) == 11


@pytest.mark.parametrize("most", [1, 2, 5])
def test_tensors_in_more_rows_than_one(
    most: int, pickled: bytes, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that one row has named are fetched in another."""
    assert_alike(pickled)
    steps = reads.steps
    monkeypatch.setattr(pickle_tensors, "MAX_RUN", most)
    assert_alike(pickled)
    assert reads.steps - steps > steps
    for seed in range(MUTATIONS // 9):
        assert_alike(mutated(pickled, seed))


def test_more_tensors_than_one_row_takes(reads: Reads) -> None:
    state = {number: moments() for number in range(pickle_tensors.MAX_RUN)}
    assert_alike(torch_pickle({"first": torch.ones(2), **{f"value {n}": n for n in range(256)}, "state": state}))
    assert reads.steps >= 3
    assert reads.count >= 3 * pickle_tensors.MAX_RUN - 1


@pytest.mark.parametrize("length", [1, MIN_RUN - 1, MIN_RUN])
def test_rows_that_are_short_are_left_to_the_machine(
    length: int, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done for a row would take three times as long as one tensor by itself."""
    monkeypatch.setattr(pickle_tensors, "MIN_RUN", MIN_RUN)
    tensors = {f"w{n}": torch.ones(2) if n % (length + 1) else n for n in range(5 * length + 5)}
    assert_alike(torch_pickle({"first": torch.ones(2), **{f"value {n}": n for n in range(256)}, **tensors}))
    assert (reads.count, reads.steps) == ((5 * length, 5) if length == MIN_RUN else (0, 0))


@pytest.mark.parametrize(("layers", "times"), [(1, 0), (3, 0), (4, 1)])
def test_versions_of_few_layers_are_left_to_the_machine(
    layers: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one they took four times as long as opcode by opcode, and 300,000 of them all the time there is."""
    looked, in_one_step = [], inert_pickle.read_versions
    monkeypatch.setattr(inert_pickle, "read_versions", lambda *args: looked.append(1) or in_one_step(*args))
    versions = {f"module {n}": {f"layer.{m}": {"version": 1} for m in range(layers)} for n in range(9)}
    assert_alike(torch_pickle({**{f"value {n}": n for n in range(256)}, "one": {"version": 1}, **versions}))
    assert len(looked) == 9 * times


@pytest.mark.parametrize("before", [rb"tr....R(?P<put>r....)", rb"K\x01s(?P<put>)X"])
def test_a_long_text_behind_a_row_is_not_looked_through(in_a_row: tuple[bytes, int], before: bytes) -> None:
    """A name in a row has at most 255 bytes; that 60 MB might be one took a third of all the time there is."""
    pickled, _ = in_a_row
    last = list(re.finditer(before, pickled, re.DOTALL))[-1]
    long = pickled[: last.end("put")] + b"X\xff\0\0\0" + b"r" * (60 * 2**20)
    began = time.process_time()
    with pytest.raises(PickleDefectError):
        read_pickle(long)
    assert time.process_time() - began < 0.2


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
    calls = list(pickle_tensors._LONG.first.__self__.finditer(pickled))
    assert len(calls) > 10
    call = calls[3]
    fetched = [call.start(1) + 1, call.start(1) + 3, call.start(2), call.start(5) + 1, call.start(13)]
    for at in fetched:
        for value in range(0, 256, 3):
            assert_alike(pickled[:at] + bytes([value]) + pickled[at + 1 :])
    for group in (4, 7, 10, 12, 14, 15, 16):
        for number in (0, 5, 255, 256, 300, 2**31, 2**32 - 1):
            put = struct.pack("<I", number)
            assert_alike(pickled[: call.start(group)] + put + pickled[call.end(group) :])
