"""The safetensors container: what the reference reader accepts is read alike, what it refuses is refused, and more."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import _SIZE, save_file

from enstack_lightning.checkpoint.location import LocalLocation
from enstack_lightning.checkpoint.manifest import compare_manifest, write_manifest
from enstack_lightning.checkpoint.safetensors_file import (
    MAX_TENSORS,
    SafetensorsHeader,
    SafetensorsTensor,
    read_safetensors_header,
    spans,
)
from enstack_lightning.checkpoint.source import ContainerDefectError, LocalSource, Source

SAVED_DTYPES = [str(dtype).removeprefix("torch.") for dtype in _SIZE]


class Bytes(Source):
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        assert 0 <= offset <= offset + count <= self.size
        return self.data[offset : offset + count]


def read(data: bytes) -> SafetensorsHeader:
    return read_safetensors_header(Bytes(data))


def refusal(data: bytes) -> ContainerDefectError | None:
    try:
        read(data)
    except ContainerDefectError as e:
        return e
    return None


def accepted_by_library(data: bytes) -> list[tuple[str, Any]] | None:
    try:
        return deserialize(data)
    except SafetensorError:
        return None


def file(header: object, buffer: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


def entry(begin: object, end: object, shape: object, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    tensors = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([[7]], dtype=torch.int16)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_every_dtype_that_torch_saves_is_read_as_torch_has_it(tmp_path: Path) -> None:
    tensors = {}
    for name in SAVED_DTYPES:
        raw = torch.arange(48, dtype=torch.uint8) % 2
        tensors[name] = raw.view(getattr(torch, name)).reshape(2, -1) if name != "bool" else raw.bool().reshape(2, -1)
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'é\n"\\\U0001f600'})
    with LocalSource(path) as source:
        header = read_safetensors_header(source)
        for t in header.tensors:
            assert source.read_at(t.offset, t.size) == tensors[t.name].view(torch.uint8).numpy().tobytes()
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == {
        name: (name, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    with safe_open(path, "pt") as library:
        assert header.metadata == library.metadata()


def test_dtypes_that_torch_lacks_are_read(tmp_path: Path) -> None:
    header = {
        "a": entry(0, 3, [4], "F6_E2M3"),
        "b": entry(3, 6, [4], "F6_E3M2"),
        "c": entry(6, 9, [2, 3], "F4"),
        "d": entry(9, 11, [4], "F4"),
    }
    data = file(header, bytes(11))
    assert accepted_by_library(data)
    assert [t[:3] for t in read(data).tensors] == [
        ("a", "float6_e2m3fn", (4,)),
        ("b", "float6_e3m2fn", (4,)),
        ("c", "float4_e2m1fn", (2, 3)),
        ("d", "float4_e2m1fn_x2", (2,)),
    ]


ACCEPTED = {
    "no tensors": file({}),
    "no tensors and spaces": file(b"{ }  \n"),
    "a header whose length is no multiple of 8": file({"a": entry(0, 1, [1])}, b"x"),
    "a misaligned tensor": file({"a": entry(0, 1, [1]), "b": entry(1, 5, [1], "F32")}, bytes(5)),
    "tensors of no elements": file({"a": entry(0, 0, [0]), "b": entry(0, 4, [4]), "c": entry(4, 4, [3, 0])}, bytes(4)),
    "a scalar": file({"a": entry(0, 4, [], "F32")}, bytes(4)),
    "an empty product before an overflow": file({"a": entry(0, 0, [0, 2**63, 4])}),
    "names that look like paths": file({"../../x": entry(0, 1, [1]), "/etc/passwd": entry(1, 2, [1])}, bytes(2)),
    "a name of control characters": file({"\0\x1b[31m\n": entry(0, 1, [1]), "": entry(1, 2, [1])}, bytes(2)),
    "escapes in field names": file(b'{"\\u0061":{"dt\\u0079pe":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "a pair of surrogates": file(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1)),
    "fields in another order": file(b'{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[ 1 ]}}', bytes(1)),
    "white space everywhere": file(
        b'{\n "a" :\t{ "dtype" : "U8" ,\r\n"shape" : [ 1 , 1 ] , "data_offsets" : [ 0 , 1 ] } , '
        b'"__metadata__" : { "k" : "v" , "l" : "" } } ',
        bytes(1),
    ),
    "tensors not in the order of their bytes": file({"a": entry(1, 2, [1]), "b": entry(0, 1, [1])}, bytes(2)),
    "empty metadata": file(b'{"__metadata__":{ },"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1)),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_odd_and_valid_is_read(kind: str) -> None:
    data = ACCEPTED[kind]
    library = accepted_by_library(data)
    assert library is not None
    ours = {t.name: (t.shape, data[t.offset : t.offset + t.size]) for t in read(data).tensors}
    assert ours == {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in library}


U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def one(body: bytes, size: int = 1) -> bytes:
    return file(b'{"a":' + body + b"}", bytes(size))


REFUSED_BY_BOTH = {
    "nothing": b"",
    "7 bytes": bytes(7),
    "8 zeros": bytes(8),
    "a header length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "a header length of 100,000,001": struct.pack("<Q", 100_000_001) + b"{}",
    "a header longer than the file": struct.pack("<Q", 3) + b"{}",
    "bytes that are not UTF-8": file(b'{"\xff":' + U8 + b"}", bytes(1)),
    "a lone surrogate": file(b'{"\\ud800":' + U8 + b"}", bytes(1)),
    "an encoded surrogate": file(b'{"\xed\xa0\x80":' + U8 + b"}", bytes(1)),
    "an unknown escape": file(b'{"\\x":' + U8 + b"}", bytes(1)),
    "a control character in a name": file(b'{"\x01":' + U8 + b"}", bytes(1)),
    "a byte order mark": file(b'\xef\xbb\xbf{"a":' + U8 + b"}", bytes(1)),
    "a comment": file(b'{/**/"a":' + U8 + b"}", bytes(1)),
    "a comma at the end": file(b'{"a":' + U8 + b",}", bytes(1)),
    "NUL as padding": file(b'{"a":' + U8 + b"}\0", bytes(1)),
    "text after the end": file(b'{"a":' + U8 + b"}{}", bytes(1)),
    "a list": file(b"[]"),
    "null": file(b"null"),
    "a header cut off": file(b'{"a":'),
    "nested deep": file(b'{"a":' * 100_000),
    "a list nested deep": one(b'{"dtype":"U8","shape":' + b"[" * 100_000),
    "no description": one(b"null"),
    "a description that is text": one(b'"x"'),
    "no dtype": one(b'{"shape":[1],"data_offsets":[0,1]}'),
    "no shape": one(b'{"dtype":"U8","data_offsets":[0,1]}'),
    "no offsets": one(b'{"dtype":"U8","shape":[1]}'),
    "dtype twice": one(b'{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}'),
    "an unknown dtype": one(b'{"dtype":"F33","shape":[1],"data_offsets":[0,1]}'),
    "a dtype in small letters": one(b'{"dtype":"u8","shape":[1],"data_offsets":[0,1]}'),
    "a dtype that is a list": one(b'{"dtype":[],"shape":[1],"data_offsets":[0,1]}'),
    "a shape that is text": one(b'{"dtype":"U8","shape":"1","data_offsets":[0,1]}'),
    "three offsets": one(b'{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}'),
    "one offset": one(b'{"dtype":"U8","shape":[1],"data_offsets":[0]}'),
    **{
        f"the size {n.decode()}": one(b'{"dtype":"U8","shape":[' + n + b'],"data_offsets":[0,1]}')
        for n in (b"1.0", b"1e0", b"-1", b"-0", b"+1", b"01", b"1_0", b"NaN", b"Infinity", b"true", b'"1"', b"", b" ,1")
        if n != b""
    },
    "a size above 64 bits": one(b'{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}'),
    "a size of 5,000 digits": one(b'{"dtype":"U8","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,1]}'),
    "an offset above 64 bits": one(b'{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551616]}'),
    "a product above 64 bits": one(b'{"dtype":"U8","shape":[9223372036854775808,4,0],"data_offsets":[0,0]}', 0),
    "bits above 64 bits": one(b'{"dtype":"F64","shape":[288230376151711744],"data_offsets":[0,0]}', 0),
    "elements that end within a byte": one(b'{"dtype":"F4","shape":[3],"data_offsets":[0,2]}', 2),
    "an end before its begin": file({"a": entry(0, 4, [4]), "b": entry(4, 2, [2])}, bytes(4)),
    "a hole at the beginning": file({"a": entry(1, 2, [1])}, bytes(2)),
    "a hole": file({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, bytes(3)),
    "an overlap": file({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, bytes(3)),
    "two tensors of the same bytes": file({"a": entry(0, 2, [2]), "b": entry(0, 2, [2])}, bytes(2)),
    "an empty tensor within another": file({"a": entry(0, 2, [2]), "b": entry(1, 1, [0])}, bytes(2)),
    "shape and bytes disagree": file({"a": entry(0, 4, [2], "F32")}, bytes(4)),
    "a byte too few": file({"a": entry(0, 4, [4])}, bytes(3)),
    "a byte too many": file({"a": entry(0, 4, [4])}, bytes(5)),
    "bytes and no tensors": file({}, b"x"),
    "metadata that is no text": file({"__metadata__": {"a": 1}}),
    "metadata within metadata": file({"__metadata__": {"a": {}}}),
    "metadata that is a list": file({"__metadata__": []}),
    "metadata twice": file(b'{"__metadata__":{},"__metadata__":{}}'),
}

ACCEPTED_BY_LIBRARY_ONLY = {
    "white space before the brace": file(b' {"a":' + U8 + b"}", bytes(1)),
    "a name twice": file(b'{"a":' + U8 + b',"a":' + U8 + b"}", bytes(1)),
    "a name twice, once escaped": file(b'{"a":' + U8 + b',"\\u0061":' + U8 + b"}", bytes(1)),
    "a metadata key twice": file(b'{"__metadata__":{"k":"1","k":"2"}}'),
    "a field too many": one(b'{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}'),
    "a nested field too many": one(b'{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{"y":[]}}'),
    "a description that is a list": one(b'["U8",[1],[0,1]]'),
    "metadata that is null": file({"__metadata__": None}),
}


@pytest.mark.parametrize("kind", REFUSED_BY_BOTH)
def test_what_the_library_refuses_is_refused(kind: str) -> None:
    data = REFUSED_BY_BOTH[kind]
    assert accepted_by_library(data) is None
    defect = refusal(data)
    assert defect is not None
    assert defect.kind in ("truncated", "damaged", "unrecognised")
    assert str(defect).isprintable()
    assert len(str(defect)) < 400


@pytest.mark.parametrize("kind", ACCEPTED_BY_LIBRARY_ONLY)
def test_what_the_format_forbids_and_the_library_accepts_is_refused(kind: str) -> None:
    data = ACCEPTED_BY_LIBRARY_ONLY[kind]
    assert accepted_by_library(data) is not None
    assert refusal(data) is not None


def test_whatever_random_edits_make_of_a_header_is_judged_as_the_library_does_or_more_strictly(small: Path) -> None:
    seed = int(os.environ.get("ENSTACK_SEED", "0")) or random.SystemRandom().randrange(2**32)
    choose = random.Random(seed)
    whole = file(
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"I16","shape":[1,1],"data_offsets":[8,10]},"c":{"dtype":"U8","shape":[0],"data_offsets":[10,10]}}',
        bytes(10),
    )
    header, buffer = whole[8:-10], whole[-10:]
    pieces = [
        b'"',
        b"\\u0061",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"\n",
        b"0",
        b"1",
        b"8",
        b"-",
        b"e1",
        b".0",
        b"\xff",
    ]
    pieces += [
        b'"a"',
        b'"dtype"',
        b"null",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"99999999999999999999",
        b"\0",
        b'"x":1,',
        b"NaN",
    ]
    read_alike = 0
    for _ in range(4_000):
        edited = bytearray(header)
        for _ in range(choose.randint(1, 2)):
            begin = choose.randrange(len(edited) + 1)
            end = min(len(edited), begin + choose.choice((0, 0, 1, 2, 5)))
            edited[begin:end] = choose.choice(pieces)
        data = file(bytes(edited), buffer)
        library, defect = accepted_by_library(data), refusal(data)
        if library is None:
            assert defect is not None, (seed, data)
        elif defect is None:
            ours = {t.name: (t.shape, data[t.offset : t.offset + t.size]) for t in read(data).tensors}
            assert ours == {n: (tuple(t["shape"]), bytes(t["data"])) for n, t in library}, (seed, data)
            read_alike += 1
    assert read_alike > 20


def test_a_file_of_any_other_length_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for size in range(len(whole)):
        defect = refusal(whole[:size])
        assert defect is not None
        assert defect.kind == "truncated"
    assert refusal(whole + b"\0") is not None


def test_a_flipped_bit_that_the_header_does_not_show_is_shown_by_the_manifest(small: Path) -> None:
    whole = small.read_bytes()
    before, location = read(whole), LocalLocation(small)
    write_manifest(small)
    shown_by_manifest = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        small.write_bytes(flipped)
        if refusal(bytes(flipped)) is None:
            manifest = compare_manifest(location, digests=True)
            assert manifest is not None
            assert len(manifest.differences) == 1, bit
            shown_by_manifest += 1
    in_buffer = 8 * sum(t.size for t in before.tensors)
    assert in_buffer < shown_by_manifest < 8 * len(whole)  # names and metadata may be any text, and values any number


def test_spans_cover_all_tensors_that_have_bytes(small: Path) -> None:
    header = read(file({"a": entry(0, 12, [2, 3], "I16"), "e": entry(12, 12, [0]), "s": entry(12, 13, [])}, bytes(13)))
    first, second = spans(header, "m.safetensors")
    assert (first.where, first.size, first.crc32) == ("m.safetensors", 12, None)
    assert [t.name for t in (*first.tensors, *second.tensors)] == ["a", "s"]
    assert (first.tensors[0].stride, first.tensors[0].offset, first.tensors[0].dtype) == ((3, 1), 0, "int16")
    assert (second.offset, second.tensors[0].role) == (first.offset + 12, "weight")
    assert isinstance(header.tensors[0], SafetensorsTensor)


def _many_tensors(count: int) -> bytes:
    return b"{" + b",".join(
        b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count)
    )


HOSTILE = {
    "1,000,000 tensors": lambda: file(_many_tensors(1_000_000) + b"}", bytes(1_000_000)),
    "metadata of 5,000,000 pairs": lambda: file(b'{"__metadata__":{' + b'"":"",' * 5_000_000 + b'"":""}}'),
    "metadata of 200,000 pairs": lambda: file(
        b'{"__metadata__":{' + b",".join(b'"%d":"%d"' % (i, i) for i in range(200_000)) + b'},"a":0}'
    ),
    "a shape of 45,000,000 numbers": lambda: one(b'{"dtype":"U8","shape":[' + b"1," * 45_000_000 + b"1]}"),
    "a shape of 1,900,000 numbers": lambda: one(
        b'{"dtype":"U8","shape":[' + b"1000000000000000," * 1_900_000 + b'0],"data_offsets":[0,1]}'
    ),
    "nested lists": lambda: one(b"[" * 95_000_000),
    "nested objects": lambda: file(b'{"a":' * 19_000_000),
    "a name of 95 MB": lambda: file(b'{"' + b"\\u0061" * 15_000_000 + b'":' + U8 + b"}", b"x"),
    "a metadata value of 95 MB": lambda: file(b'{"__metadata__":{"a":"' + "\U0001f600".encode() * 24_000_000 + b'"}}'),
    "95 MB of white space": lambda: file(b'{"a":' + U8 + b"}" + b" " * 95_000_000 + b"x", b"x"),
    "escapes without an end": lambda: file(b'{"' + b"\\\\" * 47_000_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_built_to_exhaust_is_refused_in_time_and_space(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[kind]())
    script = (
        "import re, sys, time\n"
        "from pathlib import Path\n"
        "from enstack_lightning.checkpoint.safetensors_file import read_safetensors_header\n"
        "from enstack_lightning.checkpoint.source import ContainerDefectError, LocalSource\n"
        "began = time.process_time()\n"
        "try:\n"
        "    with LocalSource(Path(sys.argv[1])) as source: read_safetensors_header(source)\n"
        "except ContainerDefectError as e: print('refused', e)\n"
        "seconds, status = time.process_time() - began, Path('/proc/self/status').read_text()\n"
        "print(seconds, re.search('VmHWM: *([0-9]+)', status.expandtabs(1))[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    said, figures = done.stdout.splitlines()
    assert said.startswith("refused")
    seconds, peak_kilobytes = map(float, figures.split())
    assert seconds < 2
    assert peak_kilobytes < 256 * 2**10


def test_a_header_of_very_many_tensors_is_read_in_time() -> None:
    data = file(_many_tensors(MAX_TENSORS) + b"}", bytes(MAX_TENSORS))
    assert len(read(data).tensors) == MAX_TENSORS
