"""The symbolic pickle machine, against pickles that Python and torch write and against those of an attacker."""

from __future__ import annotations

import argparse
import collections
import enum
import inspect
import io
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enstack_lightning.checkpoint import pickle_tree
from enstack_lightning.checkpoint.facts import OddityKind
from enstack_lightning.checkpoint.inert_pickle import (
    DTYPE_BYTES,
    MAX_DEPTH,
    MAX_OPCODES,
    Call,
    Global,
    Loop,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Unpickled,
    read_pickle,
    read_pickle_at,
)
from enstack_lightning.checkpoint.pickle_rebuild import TENSOR_ATTRIBUTES

PROTOCOLS = (2, 3, 4, 5)


def torch_pickle(value: object, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return zipfile.ZipFile(file).read("archive/data.pkl")


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(kind: str = "FloatStorage", key: str = "0", numel: bytes = b"K\x06", location: str = "cpu") -> bytes:
    return b"(" + text("storage") + named(f"torch.{kind}") + text(key) + text(location) + numel + b"tQ"


def tensor(shape: bytes = b"K\x02K\x03\x86", stride: bytes = b"K\x03K\x01\x86", offset: bytes = b"K\x00") -> bytes:
    header = storage() + offset + shape + stride + b"\x89" + named("collections.OrderedDict") + b")R"
    return named("torch._utils._rebuild_tensor_v2") + b"(" + header + b"tR"


def called(name: str, *args: bytes) -> bytes:
    return named(name) + b"(" + b"".join(args) + b"tR"


def defect(pickled: bytes) -> PickleDefectError:
    with pytest.raises(PickleDefectError) as caught:
        read_pickle(pickled)
    return caught.value


# What Python writes

plain_keys = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.booleans(),
    st.none(),
    st.binary(max_size=4),
)
tuple_keys = st.recursive(plain_keys, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
plain_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**2000), 2**2000),
        st.floats(allow_nan=False),
        st.text(st.characters(codec=None)),
        st.binary(max_size=300),
        st.complex_numbers(allow_nan=False),
        st.sets(plain_keys, max_size=4),
        st.frozensets(plain_keys, max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(tuple_keys, inner, max_size=6),
        st.dictionaries(plain_keys, inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(plain_values, st.sampled_from(PROTOCOLS))
def test_plain_values_come_out_as_they_went_in(value: object, protocol: int) -> None:
    read = read_pickle(pickle.dumps(value, protocol)).value
    assert read == pickle.loads(pickle.dumps(value, protocol))
    pure = pickle._dumps(value, protocol)  # type: ignore[attr-defined]  # the pickler written in Python
    assert read_pickle(pure).value == read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_text_and_bytes_stand_outside_of_the_frames(protocol: int) -> None:
    value = {
        "a": "x" * 100_000,
        "b": b"y" * 100_000,
        "c": "ü" * 70_000,
        "d": bytearray(b"z" * 70_000),
        "e": [1] * 3_000,
    }
    assert read_pickle(pickle.dumps(value, protocol)).value == value


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_become_calls_with_their_state(protocol: int) -> None:
    value = {
        "namespace": argparse.Namespace(lr=0.1, names=["a"]),
        "path": Path("a") / "b",
        "defaultdict": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1, 2]),
        "enum": Colour.RED,
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "counter": collections.Counter("aab"),
        "metric": np.float64(0.75),
    }
    read = read_pickle(pickle.dumps(value, protocol)).value
    assert read["namespace"].state == {"lr": 0.1, "names": ["a"]}
    assert read["path"].args == ("a", "b")
    assert read["defaultdict"].entries == {"a": [1]}
    assert read["deque"].items == [1, 2]
    assert read["enum"].args == (1,)
    assert read["counter"] == {"a": 2, "b": 1}
    assert read["metric"] == 0.75
    held = [inner for part in (read["array"].args, read["array"].state or ()) for inner in part]
    assert np.arange(6, dtype=np.int16).tobytes() in held


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_globals_are_those_that_python_would_look_up(protocol: int) -> None:
    looked_up: set[tuple[str, str]] = set()

    class Spy(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            looked_up.add((module, name))
            return super().find_class(module, name)

    value = [
        argparse.Namespace(a=Path("x")),
        np.zeros(2),
        {1},
        frozenset({2}),
        b"bytes",
        b"",
        1j,
        os.system,
        print,
        map,
    ]
    pickled = pickle.dumps(value, protocol)
    Spy(io.BytesIO(pickled)).load()
    renamed = {_renamed(*g) for g in looked_up} if protocol < 3 else looked_up
    assert {(g.module, g.name) for g in read_pickle(pickled).globals} == renamed


def _renamed(module: str, name: str) -> tuple[str, str]:
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))


def test_python_2s_names_of_what_torch_allows_are_those_that_torch_puts_for_them() -> None:
    from torch._utils import IMPORT_MAPPING, NAME_MAPPING
    from torch._weights_only_unpickler import _get_allowed_globals

    for module, name in [*NAME_MAPPING, ("__builtin__", "set"), ("copy_reg", "x"), ("os", "system")]:
        ours = read_pickle(b"\x80\x02" + f"c{module}\n{name}\n.".encode()).value
        theirs = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if ".".join(theirs) in _get_allowed_globals() or str(ours) in _get_allowed_globals():
            assert (ours.module, ours.name) == theirs
    assert read_pickle(b"\x80\x03c__builtin__\nset\n.").value == Global("__builtin__", "set")


def test_the_memo_is_that_of_python_whatever_the_order_of_its_numbers() -> None:
    for seed in range(300):
        pickled = numbered_anyhow(random.Random(seed))
        assert read_pickle(pickled).value == pickle.loads(pickled)


def numbered_anyhow(draw: random.Random) -> bytes:
    """Integers that are put in the memo out of turn, with gaps, over each other, and fetched again."""
    pickled, known = b"\x80\x04(", set[int]()
    for value in range(draw.randrange(1, 60)):
        number = draw.choice((len(known), draw.randrange(20), draw.randrange(300)))
        memoize = draw.random() < 0.3
        number = len(known) if memoize else number
        put = b"q" + bytes([number]) if number < 256 and draw.random() < 0.7 else b"r" + struct.pack("<I", number)
        pickled += b"K" + bytes([value]) + (b"\x94" if memoize else put)
        known.add(number)
        fetched = draw.choice(sorted(known))
        pickled += b"h" + bytes([fetched]) if fetched < 256 else b"j" + struct.pack("<I", fetched)
    return pickled + b"t."


# What torch writes


def descriptor_of(value: torch.Tensor) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.stride()), value.storage_offset()


def header_of(value: TensorDescriptor) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    return value.dtype, value.shape, value.stride, value.offset


BASE = torch.arange(24.0).reshape(4, 6)
STRIDED = {
    "plain": BASE,
    "view": BASE[1:, ::2],
    "transposed": BASE.t(),
    "expanded": torch.ones(1).expand(5),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "bool": torch.ones(3, dtype=torch.bool),
    "complex": torch.ones(3, dtype=torch.complex64),
    "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
    "float8": torch.ones(4).to(torch.float8_e4m3fn),
    "uint16": torch.ones(4, dtype=torch.uint16),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "buffer": torch.nn.Buffer(torch.ones(2)),
    "quantized": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    "quantized by channel": torch.quantize_per_channel(
        torch.ones(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.quint8
    ),
    "on meta": torch.empty(2, 3, device="meta"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_become_descriptors(protocol: int) -> None:
    read = read_pickle(torch_pickle(STRIDED, protocol)).value
    assert {name: header_of(t) for name, t in read.items()} == {n: descriptor_of(t) for n, t in STRIDED.items()}
    assert read["on meta"].storage is None
    assert read["plain"].storage == read["view"].storage == StorageDescriptor("0", "float32", 24, "cpu")


class Tagged(torch.Tensor):
    """A class of the user's own."""


def test_tensors_with_attributes_and_of_other_classes_become_descriptors() -> None:
    attributed = torch.ones(3)
    attributed.note = "a"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.sharded = True  # type: ignore[attr-defined]
    read = read_pickle(torch_pickle({"a": attributed, "b": torch.ones(4).as_subclass(Tagged), "c": parameter}))
    assert {name: t.shape for name, t in read.value.items()} == {"a": (3,), "b": (4,), "c": (2,)}
    assert Tagged.__name__ in {g.name for g in read.globals}


SPARSE = {
    "sparse_coo": torch.eye(3).to_sparse(),
    "sparse_csr": torch.eye(3).to_sparse_csr(),
    "sparse_csc": torch.eye(3).to_sparse_csc(),
    "sparse_bsr": torch.eye(4).to_sparse_bsr((2, 2)),
    "sparse_bsc": torch.eye(4).to_sparse_bsc((2, 2)),
}


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_told_with_their_parts(layout: str) -> None:
    read = read_pickle(torch_pickle({"t": SPARSE[layout]}))
    value = read.value["t"]
    assert (value.layout, value.shape, value.dtype) == (layout, tuple(SPARSE[layout].shape), "float32")
    assert value.parts[-1].dtype == "float32"
    assert set(value.parts) <= set(read.tensors)
    ((kind, said),) = read.oddities
    assert kind is OddityKind.SPARSE_TENSOR
    assert layout in said


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_of_nested_tensors_all_parts_are_found() -> None:
    read = read_pickle(torch_pickle(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])))
    assert isinstance(read.value, Call)
    assert [t.shape for t in read.tensors] == [(5,), (2, 1), (2, 1), (2,)]


def test_other_values_of_torch() -> None:
    value = {
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        "layout": torch.strided,
        "storage": torch.ones(3).untyped_storage(),
        "typed": torch.ones(3).storage(),
        "module state": torch.nn.BatchNorm1d(2).state_dict(),
    }
    read = read_pickle(torch_pickle(value)).value
    assert read["size"] == (1, 2)
    assert read["device"].args == ("cuda", 1)
    assert read["dtype"] == Global("torch", "float16")
    assert read["layout"].args == ("torch.strided",)
    assert (read["storage"].numel, read["storage"].dtype) == (12, "uint8")
    assert (read["typed"].numel, read["typed"].dtype) == (3, "float32")
    assert list(read["module state"]) == list(value["module state"])  # type: ignore[call-overload]


def test_every_dtype_of_torch_has_its_size() -> None:
    dtypes = {str(d).removeprefix("torch."): d.itemsize for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert dtypes == DTYPE_BYTES


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_states_are_read(protocol: int) -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    read = read_pickle(torch_pickle(state, protocol)).value
    assert read["python"] == state["python"]
    assert read["cpu"].shape == (5056,)


def test_metadata_of_a_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.ones(2, 3), "epoch": 3}, checkpoint_id=tmp_path, no_dist=True)
    read = read_pickle((tmp_path / ".metadata").read_bytes())
    assert read.value.function.name == "Metadata"
    (key, *_) = read.value.state["storage_data"]
    assert key.function.name == "MetadataIndex"
    assert not read.storages


def test_pickles_that_stand_one_behind_the_other_are_read_in_turn() -> None:
    file = io.BytesIO()
    value = {"w": torch.ones(2, 3), "n": 1}
    torch.save(value, file, _use_new_zipfile_serialization=False)
    data, at, values = file.getvalue(), 0, []
    for _ in range(5):
        unpickled, at = read_pickle_at(data, at)
        values.append(unpickled.value)
    assert values[:2] == [0x1950A86A20F9469CFC6C, 1001]
    assert values[3]["w"].shape == (2, 3)
    assert values[4] == [values[3]["w"].storage.key]
    assert len(data) == at + 8 + 24


def legacy(pid: bytes) -> Unpickled:
    return read_pickle_at(b"\x80\x02" + pid + b"Q.", 0)[0]


def test_persistent_ids_of_old_files() -> None:
    beginning = b"(" + text("storage") + named("torch.LongStorage") + text("7") + text("cuda:0") + b"K\x0a"
    assert legacy(beginning + b"Nt").value == StorageDescriptor("7", "int64", 10, "cuda:0")
    assert legacy(beginning + b"(" + text("8") + b"K\x02K\x03tt").value.view == ("8", 2, 3)
    module = b"(" + text("module") + named("__main__.Net") + text("net.py") + text("class Net: ...") + b"t"
    assert legacy(module).value == Global("__main__", "Net")
    for bad in (beginning + b"t", beginning + b"(" + text("8") + b"K\x02J\xff\xff\xff\xfftt", module[:-1] + b"Nt"):
        with pytest.raises(PickleDefectError):
            legacy(bad)
    assert "persistent id" in str(defect(b"\x80\x02" + beginning + b"NtQ."))
    assert "persistent id" in str(defect(b"\x80\x02" + module + b"Q."))


def test_text_of_python_2() -> None:
    assert read_pickle(b"\x80\x02U\x03abc.").value == "abc"
    assert read_pickle(b"\x80\x02T\x03\0\0\0abc.").value == "abc"
    assert read_pickle(b"\x80\x02" + named("collections.OrderedDict") + b"(](U\x01aK\x01\x86etR.").value == {"a": 1}
    defect(b"\x80\x02U\x01\xff.")


# Loops, depth, size


def loops(pickled: bytes) -> tuple[object, list[OddityKind]]:
    read = read_pickle(pickled)
    return read.value, [kind for kind, _ in read.oddities]


def test_what_refers_back_to_itself_is_cut_and_told() -> None:
    as_dict: dict[str, object] = {"n": 1}
    as_dict["self"] = as_dict
    value, odd = loops(pickle.dumps(as_dict, 2))
    assert odd == [OddityKind.CYCLE]
    assert value["n"] == 1  # type: ignore[index]
    assert isinstance(value["self"], Loop)  # type: ignore[index]

    through_tuple: list[object] = [1]
    through_tuple.append((2, through_tuple))
    value, odd = loops(pickle.dumps({"a": through_tuple, "b": through_tuple}, 2))
    assert odd == [OddityKind.CYCLE]
    assert repr(value) == "{'a': [1, (2, <loop>)], 'b': [1, (2, <loop>)]}"

    namespace = argparse.Namespace(a=1)
    namespace.itself = [namespace]
    value, odd = loops(pickle.dumps(namespace, 4))
    assert odd == [OddityKind.CYCLE]
    assert value.state["a"] == 1  # type: ignore[attr-defined]

    shared = [1, 2]
    assert loops(pickle.dumps([shared, shared], 2)) == ([[1, 2], [1, 2]], [])


def walked(value: Any, depth: int = 0) -> int:
    """How many values there are, each counted wherever it stands: ends only for a finite tree."""
    assert depth <= MAX_DEPTH
    if isinstance(value, Call):
        value = [value.function, value.args, value.state, value.entries, value.items]
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + sum(walked(v, depth + 1) for v in value) if isinstance(value, list | tuple) else 1


def test_any_web_of_references_becomes_a_finite_tree() -> None:
    draw, cut, whole, refused = random.Random(1), 0, 0, []
    for _ in range(500):
        nodes = [draw.choice([list, dict, argparse.Namespace])() for _ in range(6)]
        for node in nodes:
            for target in draw.sample(nodes, 2) + [tuple(draw.sample(nodes, 2))][draw.randrange(2) :]:
                if isinstance(node, list):
                    node.append(target)
                else:
                    (node if isinstance(node, dict) else vars(node))[f"k{draw.randrange(9)}"] = target
        try:
            value, odd = loops(pickle.dumps(draw.sample(nodes, 3), draw.choice(PROTOCOLS)))
        except PickleDefectError as e:
            refused.append(str(e))
            continue
        walked(value)
        cut += odd == [OddityKind.CYCLE]
        whole += not odd
    assert cut > 200
    assert cut + whole > 250
    assert all("0x30" in r or "0x31" in r for r in refused), "POP or POP_MARK, for a tuple that holds itself"


@pytest.mark.parametrize(
    "deep",
    [
        b"]" * 500 + b"a" * 499,
        b")" + b"\x85" * 500,
        named("a.b") + b")R" * 500,
        named("a.b") + b"N" + b"\x85R" * 0 + b"0",
    ],
)
def test_what_lies_too_deep_is_a_defect(deep: bytes) -> None:
    defect(b"\x80\x02" + deep + b".")


def test_depth_up_to_the_limit_is_read_and_counts_shared_parts() -> None:
    assert read_pickle(b"\x80\x02)" + b"\x85" * (MAX_DEPTH - 1) + b".")
    half = b"K\x01\x85" + b"\x85" * (MAX_DEPTH // 2) + b"q\x00"
    assert "levels deep" in str(defect(b"\x80\x02" + half + b"h\x00" + b"\x85" * (MAX_DEPTH // 2 + 1) + b"\x86."))


def test_doubling_is_a_defect() -> None:
    doubling = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    pickled = b"\x80\x02(K\x01\x85q\x00" + doubling + b"t."
    assert "each counted wherever" in str(defect(pickled))


A_CALL = b"ca\nb\n(%bt"
HANDS_ON = {
    "collections.Counter": b"}K\x01%bs\x85",
    "collections.OrderedDict": b"](](K\x01%bee\x85",
    "builtins.set": b"](" + A_CALL + b"Re\x85",
    "torch.nn.parameter.Parameter": A_CALL + b"R\x85",
    "torch._utils._rebuild_parameter": A_CALL + b"R\x88N\x87",
    "torch._tensor._rebuild_from_type_v2": b"(ctorch.nn.parameter\nParameter\nca\nb\n" + A_CALL + b"R\x85Nt",
}


@pytest.mark.parametrize("function", HANDS_ON)
def test_what_a_function_hands_on_of_its_arguments_is_walked_once(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called twice with the same arguments, and so on for fifteen levels: 2**15 to a walk that takes them for two."""
    value = b"]K\x01a"
    for level in range(15):
        call, again = (named(function) + args + b"R" for args in (HANDS_ON[function] % value, b"h%c" % level))
        value = b"](" + call[:-1] + b"q%cR" % level + again + b"e"
    walked = []
    inner = pickle_tree._inner
    monkeypatch.setattr(pickle_tree, "_inner", lambda container: walked.append(1) or inner(container))
    read_pickle(b"\x80\x02" + value + b".")
    assert len(walked) < 15 * 8


def test_a_view_before_0_4_has_the_dtype_of_its_storage() -> None:
    """Offsets count elements of both; torch writes a dtype of the tensor's own since 2.0."""
    view = storage()[:-2] + text("0") + b"K\x02K\x04\x87tQ"
    arguments = (view, b"K\x00", b"K\x02\x85", b"K\x01\x85", b"\x89", b"N")
    assert read_pickle_at(b"\x80\x02" + called("torch._utils._rebuild_tensor_v2", *arguments) + b".", 0)
    with pytest.raises(PickleDefectError, match="view"):
        read_pickle_at(
            b"\x80\x02" + called("torch._utils._rebuild_tensor_v3", *arguments, named("torch.int8")) + b".", 0
        )


def test_the_class_of_a_module_before_1_6_is_a_name() -> None:
    module = b"\x80\x02(" + text("module") + b"%b" + text("file") + text("source") + b"tQ."
    assert read_pickle_at(module % named("a.b"), 0)[0].value == Global("a", "b")
    with pytest.raises(PickleDefectError, match="persistent id"):
        read_pickle_at(module % b"]", 0)


@pytest.mark.parametrize("last", [{"a": 1, "b": 2}, [1, (2, 3)], (1, 2), {1, 2}, {(1, 2): 3}, {"a": {"b": 1}}])
def test_every_value_counts(last: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps([0, [1], last], 4)
    inner = list(last.values()) if isinstance(last, dict) else list(last)
    count = 1 + 1 + 2 + 1 + sum(walked(v) for v in inner) + 3 * isinstance(next(iter(last)), tuple)
    monkeypatch.setattr(pickle_tree, "MAX_VALUES", count)
    assert read_pickle(pickled)
    monkeypatch.setattr(pickle_tree, "MAX_VALUES", count - 1)
    assert "each counted wherever" in str(defect(pickled))


# What only an attacker writes: opcode by opcode

KNOWN = """
PROTO FRAME STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET FROZENSET TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
SETITEM SETITEMS ADDITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINSTRING SHORT_BINSTRING BINPUT LONG_BINPUT MEMOIZE BINGET
LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""
REFUSED = sorted({op.name for op in pickletools.opcodes} - set(KNOWN.split()))


@pytest.mark.parametrize("name", REFUSED)
def test_opcodes_that_no_checkpoint_needs_are_refused(name: str) -> None:
    code = next(op.code for op in pickletools.opcodes if op.name == name).encode("latin-1")
    error = defect(b"\x80\x04" + named("os.system") + b"(NNq\x00" + code + b"os\nsystem\n" + bytes(8) + b".")
    assert "none that a checkpoint is written with" in str(error)
    assert Global("os", "system") in error.globals


def test_the_name_in_an_instance_opcode_is_told() -> None:
    assert defect(b"\x80\x02(ios\nsystem\n.").globals == (Global("os", "system"),)


BROKEN = {
    "empty": b"",
    "one byte": b"\x80",
    "protocol 0": b"(dp0\n.",
    "protocol 1": b"\x80\x01N.",
    "protocol 6": b"\x80\x06N.",
    "protocol said twice": b"\x80\x02\x80\x04N.",
    "no protocol": b"N.",
    "nothing on the stack": b"\x80\x02.",
    "two values on the stack": b"\x80\x02NN.",
    "a mark on the stack": b"\x80\x02N(.",
    "a value under a mark": b"\x80\x02](Na.",
    "a pop through a mark": b"\x80\x02N(\x85.",
    "bytes after the stop": b"\x80\x02N.N",
    "a tuple without a mark": b"\x80\x02Nt.",
    "a memo value never set": b"\x80\x02h\x05.",
    "a long memo value never set": b"\x80\x02j\xff\xff\xff\xff.",
    "a memo index far beyond the others": b"\x80\x02Nr\xff\xff\xff\xff.",
    "put with nothing there": b"\x80\x02q\x00.",
    "append to a tuple": b"\x80\x02)Na.",
    "append to a dict": b"\x80\x02}Na.",
    "append to a global": b"\x80\x02" + named("os.environ") + b"Na.",
    "items set on a list": b"\x80\x02]NNs.",
    "items set on a global": b"\x80\x02" + named("os.environ") + b"NNs.",
    "items set on a tensor": b"\x80\x02" + tensor() + b"NNs.",
    "items added to a list": b"\x80\x04](N\x90.",
    "a key without a value": b"\x80\x02}(NNNu.",
    "a key twice": b"\x80\x02}(K\x01NK\x01Nu.",
    "a key twice, apart": b"\x80\x02}K\x01NsK\x01Ns.",
    "one and true as keys": b"\x80\x02}(K\x01N\x88Nu.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a tuple nested ten times as a key": b"\x80\x02})" + b"\x85" * 10 + b"Ns.",
    "a long text as a key": b"\x80\x02}" + text("a" * 10_000) + b"Ns.",
    "integers that collide as keys": b"\x80\x02}("
    + b"".join(b"\x8a\x09" + ((2**61 - 1) * n).to_bytes(9, "little") + b"N" for n in range(40))
    + b"u.",
    "a global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a computed global": b"\x80\x04" + named("a.b") + b")R" + text("system") + b"\x93.",
    "a global called nothing": b"\x80\x04" + text("") + text("system") + b"\x93.",
    "a global with a line break": b"\x80\x04" + text("os\n") + text("system") + b"\x93.",
    "a global with half a surrogate": b"\x80\x04" + text("\ud800") + text("system") + b"\x93.",
    "a global with a space": b"\x80\x04" + text("os system") + text("a") + b"\x93.",
    "a global that is too long": b"\x80\x04" + text("a" * 2_000) + text("b") + b"\x93.",
    "a name that is no UTF-8": b"\x80\x02c\xff\nb\n.",
    "arguments in a list": b"\x80\x02" + named("a.b") + b"]R.",
    "a call of a text": b"\x80\x02" + text("os.system") + b")R.",
    "a call of a list": b"\x80\x02])R.",
    "a call of a tensor": b"\x80\x02" + tensor() + b")R.",
    "an object of a list": b"\x80\x02])\x81.",
    "a call of a dtype": b"\x80\x02" + named("torch.float32") + b")R.",
    "a tensor of a size": b"\x80\x02" + named("torch.FloatTensor") + b"J\xff\xff\xff\x7f\x85R.",
    "a storage of a size": b"\x80\x02" + named("torch.storage.UntypedStorage") + b"J\xff\xff\xff\x7f\x85\x81.",
    "bytes of a size": b"\x80\x02" + named("builtins.bytearray") + b"J\xff\xff\xff\x7f\x85R.",
    "a codec that is not Latin-1": b"\x80\x02" + named("_codecs.encode") + text("a") + text("rot13") + b"\x86R.",
    "bytes that are no Latin-1": b"\x80\x02" + named("_codecs.encode") + text("€") + text("latin1") + b"\x86R.",
    "an OrderedDict by NEWOBJ": b"\x80\x02" + named("collections.OrderedDict") + b"]\x85\x81.",
    "an OrderedDict of a number": b"\x80\x02" + named("collections.OrderedDict") + b"K\x01\x85R.",
    "an OrderedDict of triples": b"\x80\x02" + named("collections.OrderedDict") + b"](NNNtaK\x01\x85R.",
    "a Counter of a text": b"\x80\x02" + named("collections.Counter") + text("aab") + b"\x85R.",
    "a set of a dict": b"\x80\x02" + named("builtins.set") + b"}\x85R.",
    "a device of a list": b"\x80\x02" + named("torch.device") + b"]\x85R.",
    "state for a class": b"\x80\x02" + named("os.environ") + b"}b.",
    "state for a list": b"\x80\x02]}b.",
    "state for a tensor": b"\x80\x02" + tensor() + b"(" + storage(key="1") + b"K\x00))tb.",
    "state for a dict that is no dict": b"\x80\x02}Nb.",
    "state twice": b"\x80\x02" + named("a.b") + b")R}b}b.",
    "a persistent id that is a text": b"\x80\x02" + text("storage") + b"Q.",
    "a persistent id that is short": b"\x80\x02(" + text("storage") + b"tQ.",
    "a storage of another module": b"\x80\x02(" + text("storage") + named("os.FloatStorage") + text("0") * 2 + b"NtQ.",
    "a storage type that is unknown": b"\x80\x02" + storage("EvilStorage") + b".",
    "a storage with fewer than no elements": b"\x80\x02" + storage(numel=b"J\xff\xff\xff\xff") + b".",
    "a storage with 2**62 doubles": b"\x80\x02"
    + storage("DoubleStorage", numel=b"\x8a\x08" + bytes(7) + b"\x40")
    + b".",
    "a storage with true elements": b"\x80\x02" + storage(numel=b"\x88") + b".",
    "a storage of two lengths": b"\x80\x02" + storage() + storage(numel=b"K\x07") + b"\x86.",
    "a storage of two types": b"\x80\x02" + storage() + storage("DoubleStorage") + b"\x86.",
    "a negative stride": b"\x80\x02" + tensor(stride=b"J\xff\xff\xff\xffK\x01\x86") + b".",
    "a negative size": b"\x80\x02" + tensor(shape=b"J\xff\xff\xff\xffK\x01\x86") + b".",
    "a negative offset": b"\x80\x02" + tensor(offset=b"J\xff\xff\xff\xff") + b".",
    "an offset of 2,000 bits": b"\x80\x02" + tensor(offset=b"\x8a\xff" + b"\x7f" * 255) + b".",
    "a size of 2,000 bits": b"\x80\x02" + tensor(shape=b"\x8a\xff" + b"\x7f" * 255 + b"K\x01\x86") + b".",
    "a size that is true": b"\x80\x02" + tensor(shape=b"\x88K\x01\x86") + b".",
    "a size that is a fraction": b"\x80\x02" + tensor(shape=b"G\x3f\xf0\0\0\0\0\0\0K\x01\x86") + b".",
    "more sizes than strides": b"\x80\x02" + tensor(shape=b"K\x01\x85") + b".",
    "a thousand dimensions": b"\x80\x02"
    + tensor(b"(" + b"K\x01" * 1_000 + b"t", b"(" + b"K\x01" * 1_000 + b"t")
    + b".",
    "a frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a frame in a frame": b"\x80\x04\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 2) + b"N.",
    "a frame that ends after the stop": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.N",
    "an opcode across a frame's end": b"\x80\x04\x95" + struct.pack("<Q", 2) + b"J\x01\x02\x03\x04.",
    "a text across a frame's end": b"\x80\x04\x95" + struct.pack("<Q", 4) + b"\x8c\x04abcd.",
    "a name across a frame's end": b"\x80\x04\x95" + struct.pack("<Q", 4) + b"cos\nsystem\n.",
    "a frame in protocol 2": b"\x80\x02\x95" + struct.pack("<Q", 2) + b"N.",
    "a rebuild by itself": b"\x80\x02"
    + named("torch._tensor._rebuild_from_type_v2")
    + b"("
    + named("torch._tensor._rebuild_from_type_v2")
    + named("a.b")
    + b")NtR.",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_no_pickler_writes_is_a_defect(kind: str) -> None:
    assert str(defect(BROKEN[kind]))


def test_whole_pickles_of_the_parts_used_above_are_read() -> None:
    """So that the cases above fail for the reason that their names say."""
    assert header_of(read_pickle(b"\x80\x02" + tensor() + b".").value) == ("float32", (2, 3), (3, 1), 0)
    assert read_pickle(b"\x80\x02" + storage() + storage() + b"\x86.").storages == (
        StorageDescriptor("0", "float32", 6, "cpu"),
    )
    framed = b"\x80\x04\x95" + struct.pack("<Q", 5) + b"J\x01\x02\x03\x04\x95" + struct.pack("<Q", 1) + b"."
    assert read_pickle(framed).value == 0x04030201


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("wrong", [b"N", b"K\x05", b"]", b"}", b"\x8a\xff" + b"\x7f" * 255])
def test_wrong_arguments_for_torchs_functions_are_defects_or_harmless(position: int, wrong: bytes) -> None:
    arguments = [storage(), b"K\x00", b"K\x02\x85", b"K\x01\x85", b"\x89", b"}", named("torch.int8"), b"}"]
    arguments[position] = wrong
    for name in ("", "_v2", "_v3"):
        for count in range(len(arguments) + 1):
            pickled = b"\x80\x02" + named(f"torch._utils._rebuild_tensor{name}") + b"("
            pickled += b"".join(arguments[:count]) + b"tR."
            try:
                read = read_pickle(pickled)
            except PickleDefectError:
                continue
            assert count == {"": 4, "_v2": 6, "_v3": 7}[name] or count == {"": 4, "_v2": 7, "_v3": 8}[name]
            assert isinstance(read.value, TensorDescriptor)


def test_globals_seen_before_a_defect_are_told() -> None:
    error = defect(b"\x80\x02" + named("os.system") + text("id") + b"\x85R" + b"\xff.")
    assert error.globals == (Global("posix", "system"),) or error.globals == (Global("os", "system"),)
    assert defect(b"\x80\x02" + named("os.system") + b".N").globals


def test_a_pickle_cut_short_says_so() -> None:
    whole = torch_pickle({"w": torch.ones(2), "name": "ü" * 100, "number": 1.5})
    for size in range(len(whole)):
        error = defect(whole[:size])
        assert error.cut_short, (size, str(error))


# Nothing runs


class RunsOnLoad:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_is_kept_as_data(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickled = pickle.dumps([RunsOnLoad(os.system, f"touch {marker}"), RunsOnLoad(eval, "1")], protocol)
    read = read_pickle(pickled)
    assert [str(g).partition(".")[2] for g in read.globals] == ["system", "eval"]
    assert read.value[0].args == (f"touch {marker}",)
    assert not marker.exists()


def test_a_pickle_within_a_pickle_is_named_and_its_bytes_kept() -> None:
    inner = io.BytesIO()
    torch.save(torch.ones(2), inner, _use_new_zipfile_serialization=False)
    read = read_pickle(pickle.dumps(torch.ones(2).storage(), 4))
    assert Global("torch.storage", "_load_from_bytes") in read.globals
    assert read.value.args[0][:10] == inner.getvalue()[:10]
    objects = read_pickle(pickle.dumps(np.array([RunsOnLoad(os.system, "id"), None], dtype=object), 4))
    assert "system" in {g.name for g in objects.globals}


# Time and memory

P = 2**61 - 1
MOST = MAX_OPCODES - 10


def pairs_of_one_hash(count: int) -> list[tuple[int, int]]:
    """Found by undoing the last step of CPython's `tuplehash`, Objects/tupleobject.c."""
    prime_1, prime_2, prime_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    undo_2 = pow(prime_2, -1, 2**64)
    found, first = [], 0
    while len(found) < count:
        first += 1
        lane = (prime_5 + first * prime_2) % 2**64
        lane = (lane << 31 | lane >> 33) % 2**64 * prime_1 % 2**64
        second = -lane * undo_2 % 2**64
        if second < 2**60:
            found.append((first, second))
    assert len(set(map(hash, found))) == 1
    return found


def nested_sparse_tensors(levels: int) -> bytes:
    """Each of three times the one before."""
    layout = named("torch.serialization._get_layout") + text("torch.sparse_csr") + b"\x85R"
    value = tensor()
    for level in range(levels):
        value = called(
            "torch._utils._rebuild_sparse_tensor",
            layout,
            b"(%bq%ch%ch%cK\x02K\x02\x86t" % (value, level, level, level),
        )
    return value


PAIRS = pairs_of_one_hash(50_000)
BOMBS = {
    "lists": b"(" + b"]" * MOST + b"t.",
    "lists by the 64 MB": b"]" * (64 * 2**20 - 3) + b".",
    "dicts of one": b"(" + b"}NNs" * (MOST // 4) + b"t.",
    "calls": b"(" + named("a.b") + b"q\x00" + b"h\x00)RNNs" * (MOST // 6) + b"t.",
    "nested tuples": b")" + b"\x85" * MOST + b".",
    "marks": b"(" * MOST + b".",
    "a memo read back": b"(" + b"]q\x01h\x01" * (MOST // 3) + b"t.",
    "integers of 255 bytes": b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 250_000 + b"t.",
    "integers with one hash as keys": b"}("
    + b"".join(b"\x8a\x0c" + (P * i).to_bytes(12, "little") + b"N" for i in range(1, 700_000))
    + b"u.",
    "tuples with one hash as keys": b"}("
    + b"".join(b"\x8a\x08%b\x8a\x08%b\x86N" % tuple(n.to_bytes(8, "little") for n in pair) for pair in PAIRS)
    + b"u.",
    "complex numbers with one hash as keys": named("builtins.complex")
    + b"q\x00}("
    + b"".join(b"h\x00G%bG%b\x86RN" % (struct.pack(">d", -1000003 * n), struct.pack(">d", n)) for n in range(200_000))
    + b"u\x86.",
    "a sparse tensor of sparse tensors as a key": b"}" + nested_sparse_tensors(60) + b"Ns.",
    "floats as keys": b"}(" + b"".join(b"G" + struct.pack(">d", 2.0**61 * i) + b"N" for i in range(700_000)) + b"u.",
    "tuples as keys": b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"\x85N" for i in range(370_000)) + b"u.",
    "a long tuple as a key again and again": b"((" + b"K\x01" * 500_000 + b"tq\x00" + b"}h\x00Ns" * 200_000 + b"t.",
    "equal long texts as keys": text("a" * 8_000)
    + b"q\x00"
    + text("a" * 8_000)
    + b"q\x01\x86\x8f(h\x00"
    + b"h\x01" * 1_400_000
    + b"\x90\x86.",
    "64 MB of text": b"X" + struct.pack("<I", 64 * 2**20 - 8) + b"a" * (64 * 2**20 - 8) + b".",
    "wide text": b"(" + text("a" * 990 + "😀") * 60_000 + b"t.",
    "half surrogates": b"(" + text("\ud800") * MOST + b"t.",
    "pairs copied again and again": b"(]("
    + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(200_000))
    + b"eq\x00"
    + named("collections.OrderedDict")
    + b"q\x01"
    + b"h\x01h\x00\x85R" * 100_000
    + b"t.",
    "bytes copied again and again": b"("
    + named("_codecs.encode")
    + b"q\x00"
    + text("a" * 2**20)
    + text("latin1")
    + b"\x86q\x01"
    + b"h\x00h\x01R" * 400_000
    + b"t.",
    "storages": b"("
    + text("storage")
    + b"q\x00"
    + named("torch.FloatStorage")
    + b"q\x01"
    + b"".join(b"(h\x00h\x01" + text(f"{i:06d}") + text("cpu") + b"K\x01tQ" for i in range(180_000))
    + b"t.",
    "tensors": b"("
    + named("torch._utils._rebuild_tensor")
    + b"q\x00("
    + storage()
    + b"K\x00))tq\x01"
    + b"h\x00h\x01R" * (MOST // 3)
    + b"t.",
    "a list appended to itself": b"]q\x00(" + b"h\x00" * MOST + b"e.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_no_pickle_takes_long_or_much(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(b"\x80\x04" + BOMBS[kind])
    script = (
        "import re, sys, time; from enstack_lightning.checkpoint.inert_pickle import *\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "before = peak(); data = open(sys.argv[1], 'rb').read(); began = time.process_time()\n"
        "try: read_pickle(data)\n"
        "except PickleDefectError as e: assert len(str(e)) < 300\n"
        "print(time.process_time() - began, peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = done.stdout.split()
    assert int(megabytes) < 256
    assert float(seconds) < 4  # two, on a machine that does nothing else


def test_a_checkpoint_of_6000_tensors_is_far_from_the_limits() -> None:
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1, 2), "exp_avg_sq": torch.zeros(1, 2)}
        for i in range(500)
    }
    pickled = torch_pickle(state)
    opcodes = sum(1 for _ in pickletools.genops(pickled))
    assert opcodes * 4 * 5 < MAX_OPCODES
    assert len(read_pickle(pickled).tensors) == 1_500
    assert re.search("more than 1,000 opcodes", str(_with_limit(pickled, 1_000)))


def _with_limit(pickled: bytes, limit: int) -> PickleDefectError:
    with pytest.raises(PickleDefectError) as caught:
        read_pickle(pickled, max_opcodes=limit)
    return caught.value


# What torch would load as something else than it seems, or not at all


def mapping(*entries: bytes) -> bytes:
    return b"}(" + b"".join(entries) + b"u"


def with_last(argument: bytes) -> bytes:
    """A tensor whose call has `argument` after its hooks: its metadata."""
    return tensor()[:-2] + argument + b"tR"


HOOKS = named("collections.OrderedDict") + b")R"
ODD_CALLS = {
    "data of a parameter": (
        called("torch._utils._rebuild_parameter_with_state", tensor(), b"\x89", HOOKS, mapping(text("data"), tensor())),
        "sets its data",
    ),
    "slots of a parameter": (
        called(
            "torch._utils._rebuild_parameter_with_state",
            tensor(),
            b"\x89",
            HOOKS,
            b"N" + mapping(text("grad"), tensor()) + b"\x86",
        ),
        "sets its grad",
    ),
    "data of a tensor": (
        called(
            "torch._tensor._rebuild_from_type_v2",
            named("torch._utils._rebuild_tensor_v2"),
            named("torch.Tensor"),
            tensor()[len(named("torch._utils._rebuild_tensor_v2")) : -1],
            mapping(text("data"), tensor()),
        ),
        "sets its data",
    ),
    "hooks": (tensor()[: -len(HOOKS) - 2] + mapping(b"K\x00", named("builtins.set")) + b"tR", "backward hooks"),
    "hooks set later": (
        b"(" + tensor()[: -len(HOOKS) - 2] + b"}q\x07" + b"tR" + b"h\x07K\x00N" + b"st",
        "backward hooks",
    ),
    "a conjugated float": (with_last(mapping(text("conj"), b"\x88")), "conjugated"),
    "metadata that is no flag": (with_last(mapping(text("other"), tensor())), "metadata"),
    "methods of a state dict": (
        HOOKS + mapping(text("items"), named("builtins.set")) + b"b",
        "hide its own methods",
    ),
    "attributes of a dict": (b"}" + mapping(text("_metadata"), b"}") + b"b", "BUILD on a dict"),
    "a bytearray as a key": (mapping(called("builtins.bytearray"), b"K\x01"), "bytearray is used as a key"),
    "a scheme of quantization": (called("torch.per_tensor_affine"), "is called"),
    "a layout that is none": (called("torch.serialization._get_layout", text("torch.odd")), "layout"),
    "an entry of a device": (called("torch.device", text("cpu")) + b"K\x01K\x01s", "no place for it"),
    "an item of a device": (called("torch.device", text("cpu")) + b"K\x01a", "no place for it"),
    "the state of a device": (called("torch.device", text("cpu")) + b"}b", "no place for it"),
    "a sparse tensor of other dimensions": (
        called(
            "torch._utils._rebuild_sparse_tensor",
            called("torch.serialization._get_layout", text("torch.sparse_coo")),
            tensor() + tensor() + b"K\x09\x85" + b"\x87",
        ),
        "sparse_coo",
    ),
    "a quantized tensor of floats": (
        called(
            "torch._utils._rebuild_qtensor", storage(), b"K\x00", b"K\x06\x85", b"K\x01\x85", b"NNN\x87", b"\x89", HOOKS
        ),
        "quantized tensor",
    ),
    "a storage on no device": (storage(location="meta"), "meta device"),
}


@pytest.mark.parametrize("what", ODD_CALLS)
def test_what_would_load_as_something_else_is_a_defect(what: str) -> None:
    pickled, message = ODD_CALLS[what]
    assert message in str(defect(b"\x80\x02" + pickled + b"."))


def test_attributes_of_ones_own_on_parameters_and_dicts_are_no_defect() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.decays = True  # type: ignore[attr-defined]
    weights = torch.nn.Linear(2, 2).state_dict()
    read = read_pickle(
        torch_pickle({"own": parameter, "weights": weights, "lazy": torch.ones(2, dtype=torch.cfloat).conj()})
    )
    assert len(read.storages) == 4


def test_the_attributes_that_a_state_must_not_set_are_those_of_torch() -> None:
    own = {name for name in dir(torch.Tensor) if hasattr(type(inspect.getattr_static(torch.Tensor, name)), "__set__")}
    assert own <= TENSOR_ATTRIBUTES


def test_a_counter_does_not_change_with_the_dict_that_it_was_made_of() -> None:
    counted = b"}q\x01K\x03K\x01s"
    pickled = b"(" + named("collections.Counter") + counted + b"\x85Rh\x01K\x04K\x01st"
    counter, source = read_pickle(b"\x80\x02" + pickled + b".").value
    assert (counter, source) == ({3: 1}, {3: 1, 4: 1})


def test_opcodes_that_a_safe_load_ends_at_are_told() -> None:
    weights = {"w": torch.ones(2), "text": "a" * 300}
    assert not read_pickle(torch_pickle(weights, protocol=2)).refused_opcodes
    assert read_pickle(torch_pickle(weights, protocol=4)).refused_opcodes == (0x8C, 0x93, 0x94, 0x95)
