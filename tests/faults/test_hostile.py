"""Files built to do harm: nothing in them runs, and each ends in a finding, soon and within little memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import enstack_folder

from enstack_lightning.checkpoint import Report, Severity, Verdict, verify_checkpoint


def codes(report: Report) -> set[str]:
    return {f.code for f in report.of(Severity.ERROR)}


def words(report: Report) -> str:
    return " ".join(f.message for f in report.of(Severity.ERROR))


def archive(path: Path, records: Sequence[tuple[str, bytes]], **options: Any) -> Path:
    """A zip like torch's, with any records."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in records:
            file.writestr(zipfile.ZipInfo(name), data, **options)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    return archive(path, [("archive/data.pkl", data), ("archive/version", b"3\n")])


class RunsOnLoad:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["state_dict", "callbacks", "hyper_parameters", "optimizer_states"])
def test_a_pickle_that_would_run_code_is_named_and_does_not_run(where: str, trained: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    checkpoint = torch.load(trained / "step=7.ckpt", weights_only=True)
    checkpoint[where] = RunsOnLoad(os.system, f"touch {marker}")
    path = tmp_path / "c.ckpt"
    torch.save(checkpoint, path)
    report = verify_checkpoint(path)
    assert "CK701" in codes(report)
    assert "posix.system" in words(report)
    assert "can run any command" in words(report)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file would have run its command"


def test_a_harmless_class_of_the_users_own_is_told_apart(trained: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained / "step=7.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"path": tmp_path}
    torch.save(checkpoint, tmp_path / "c.ckpt")
    report = verify_checkpoint(tmp_path / "c.ckpt")
    assert codes(report) == {"CK701"}
    assert "pathlib" in words(report)
    assert "can run any command" not in words(report)


def test_code_in_the_files_of_an_enstack_folder_is_found(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = enstack_folder(
        tmp_path / "c", weights="pytorch_model.bin", extra=RunsOnLoad(eval, f"open({str(marker)!r}, 'w')")
    )
    torch.save({"w": RunsOnLoad(os.system, f"touch {marker}")}, folder / "pytorch_model.bin")
    report = verify_checkpoint(folder)
    assert {"posix.system", "builtins.eval"} <= set(map(str, report.facts.globals))
    assert "CK701" in codes(report)
    assert not marker.exists()


def nested_tuple_as_key() -> bytes:
    """Makes the C unpickler overflow its stack when it hashes the key."""
    return b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."


def doubling_memo() -> bytes:
    """A list of two of the list before, sixty times: little to write, 2**60 items to visit."""
    return (
        b"\x80\x02]q\x00"
        + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
        + b"."
    )


BOMBS = {
    "nested tuple as a key": nested_tuple_as_key(),
    "memo doubling": doubling_memo(),
    "a million marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a string of 4 GiB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 2**63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b".",
    "a frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "an integer of 2 GiB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "a memo index of 2**32": b"\x80\x02Nr\xff\xff\xff\xff.",
    "pop from nothing": b"\x80\x020.",
    "no stop": b"\x80\x02" + b"N" * 1000,
    "a name without an end": b"\x80\x02c" + b"a" * 100_000,
    "an extension code": b"\x80\x02\x82\x01.",
    "a buffer of another process": b"\x80\x05\x97.",
    "an instance by name": b"\x80\x02(ios\nsystem\n.",
    "protocol 0": b"(dp0\n.",
    "two million lists": b"\x80\x02" + b"]" * 3_000_000 + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_bomb_ends_in_a_finding_soon_and_small(bomb: str, tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "c.ckpt", BOMBS[bomb])
    # VmHWM: getrusage's peak would begin with that of the test process, from before the exec.
    script = (
        "import re, sys, time; from enstack_lightning.checkpoint import verify_checkpoint\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); report = verify_checkpoint(sys.argv[1])\n"
        "codes = sorted({f.code for f in report.findings})\n"
        "print(report.verdict, time.process_time(), (peak() - before) // 1024, codes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    verdict, seconds, megabytes, found = done.stdout.split(maxsplit=3)
    assert verdict == "fail"
    assert "CK100" not in found
    assert float(seconds) < 10  # of processor time; two by itself
    assert int(megabytes) < 256


def put_length(path: Path, offset_from_end: int, form: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, len(data) - offset_from_end, value)
    path.write_bytes(data)


@pytest.mark.parametrize(("offset", "form"), [(14, "<H"), (12, "<H"), (10, "<I"), (6, "<I"), (2, "<H")])
def test_a_directory_that_lies_about_its_sizes_fails(offset: int, form: str, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    path.write_bytes((trained / "step=7.ckpt").read_bytes())
    put_length(path, offset, form, 0x7FFF)
    assert codes(verify_checkpoint(path)) & {"CK104", "CK105"}


PICKLE = pickle.dumps({"pytorch-lightning_version": "2.6"}, protocol=2)
ARCHIVES = {
    "the same name twice": [("a/data.pkl", PICKLE), ("a/data.pkl", pickle.dumps({}, 2))],
    "names that differ in case": [("a/data.pkl", PICKLE), ("a/DATA.PKL", pickle.dumps({}, 2))],
    "out of the folder": [("a/data.pkl", PICKLE), ("a/../../etc/passwd", b"x")],
    "two folders": [("a/data.pkl", PICKLE), ("b/data.pkl", PICKLE)],
    "no folder": [("data.pkl", PICKLE)],
    "a backslash": [("a/data.pkl", PICKLE), ("a/..\\x", b"x")],
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_two_readers_would_read_differently_fails(kind: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "c.ckpt", ARCHIVES[kind])
    assert codes(verify_checkpoint(path)) & {"CK102", "CK105"}


def test_a_compressed_record_fails(tmp_path: Path) -> None:
    path = archive(tmp_path / "c.ckpt", [("a/data.pkl", PICKLE)], compress_type=zipfile.ZIP_DEFLATED)
    assert "compressed" in words(verify_checkpoint(path))


def test_a_tensor_larger_than_its_storage_and_a_missing_storage_fail(trained: Path, tmp_path: Path) -> None:
    source = trained / "step=7.ckpt"
    for keep in (lambda name: not name.endswith("/data/0"), lambda name: True):
        path = tmp_path / "c.ckpt"
        with zipfile.ZipFile(source) as old:
            records = [(n, old.read(n)) for n in old.namelist() if keep(n)]
        archive(path, [(n, d[:-8] if n.endswith("/data/0") else d) for n, d in records])
        report = verify_checkpoint(path)
        assert "CK105" in codes(report)
        assert "data/0" in words(report)


def safetensors(header: object, buffer: bytes = b"", raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + buffer


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "a header of 2**60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a name twice": safetensors(None, bytes(4), raw=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}'),
    "a hole": safetensors({"a": tensor(4, 8, [1])}, bytes(8)),
    "an overlap": safetensors({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4)),
    "bytes left over": safetensors({"a": tensor(0, 4, [1])}, bytes(5)),
    "shape and bytes disagree": safetensors({"a": tensor(0, 4, [2])}, bytes(4)),
    "a negative size": safetensors({"a": tensor(0, 4, [-1])}, bytes(4)),
    "a shape that overflows": safetensors({"a": tensor(0, 4, [2**40, 2**40])}, bytes(4)),
    "an unknown dtype": safetensors({"a": tensor(0, 4, [1], "F33")}, bytes(4)),
    "no JSON": safetensors(None, raw=b"{"),
    "a list": safetensors([1]),
    "nested deep": safetensors(None, raw=b'{"a":' * 100_000),
    "a description that is text": safetensors({"a": "x"}),
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_a_safetensors_file_against_the_format_fails(kind: str, tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    (folder / "model.safetensors").write_bytes(BAD_SAFETENSORS[kind])
    report = verify_checkpoint(folder)
    assert report.verdict is Verdict.FAIL
    assert codes(report) & {"CK102", "CK104", "CK105"}
    assert "CK100" not in codes(report)


def test_a_pickle_that_nobody_checked_is_compared_with_its_checksum(trained: Path, tmp_path: Path) -> None:
    """The same length, other content: torch loads it without a word."""
    path = tmp_path / "c.ckpt"
    whole = (trained / "step=7.ckpt").read_bytes()
    path.write_bytes(whole.replace(b"global_step", b"GLOBAL_STEP"))
    assert "CRC-32" in words(verify_checkpoint(path))
    assert zlib.crc32(path.read_bytes()) != zlib.crc32(whole)
    assert "GLOBAL_STEP" in torch.load(path, weights_only=True)
