"""Every published way past a checkpoint scanner, tried here: each ends in a finding and runs nothing.

The numbers are those of advisories and papers; a class without one was found by reading the loaders. What a scanner
missed in each case stands in the docstring of its test.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import enstack_folder
from genuine import GENUINE

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, verify_checkpoint

INFERENCE = Options(purpose="inference")


def codes(report: Report) -> set[str]:
    return {f.code for f in report.of(Severity.ERROR)}


def words(report: Report) -> str:
    return " ".join(f.message for f in report.of(Severity.ERROR))


def refused(path: Path, *expected: str) -> Report:
    """The checkpoint fails, by a rule and not by breaking the verifier, whatever it is wanted for."""
    for options in (Options(), INFERENCE, Options(deep=True)):
        report = verify_checkpoint(path, options)
        assert report.verdict is Verdict.FAIL, report.findings
        assert "CK100" not in codes(report), report.findings
        if expected:
            assert codes(report) & set(expected), report.findings
    return report


def with_pickle(path: Path, data: bytes) -> Path:
    """A torch file around any pickle, without torch."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return path


def call(module: str, name: str, argument: str = "touch canary") -> bytes:
    """A pickle that calls `module.name(argument)`."""
    named = f"c{module}\n{name}\n".encode()
    return b"\x80\x02" + named + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every pickle here would make a file called canary in the working directory; none may."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "canary").exists()


GADGETS = [
    "os.system",
    "posix.system",
    "nt.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.print",
    "builtins.__import__",
    "subprocess.Popen",
    "runpy._run_code",
    "pty.spawn",
    "importlib.import_module",
    "pkgutil.resolve_name",
    "pip.main",
    "uuid._popen",
    "imaplib.IMAP4_stream",
    "_pyrepl.pager.pipe_pager",
    "marshal.loads",
    "types.FunctionType",
    "ctypes.CDLL",
    "pydoc.pipepager",
    "code.InteractiveInterpreter",
    "timeit.timeit",
    "profile.run",
    "cProfile.run",
    "bdb.Bdb",
    "trace.Trace",
    "idlelib.run.Executive",
    "asyncio.unix_events",
    "torch.utils._config_module.load_config",
    "torch.jit.unsupported_tensor_ops.execWrapper",
    "torch.load",
    "torch.hub.load",
    "torch.distributed.rpc.internal._internal_rpc_pickler",
    "torch._dynamo.guards.GuardBuilder.get",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.getlincoef",
    "lib2to3.pgen2.grammar.Grammar",
    "functools.partial",
    "operator.methodcaller",
    "webbrowser.open",
    "requests.get",
    "aiohttp.client.ClientSession",
    "dill._dill._load_type",
    "cloudpickle.cloudpickle._make_function",
    "joblib.load",
    "transformers.AutoModel.from_pretrained",
]


@pytest.mark.parametrize("name", GADGETS)
def test_01_a_name_on_no_deny_list(name: str, tmp_path: Path) -> None:
    """CVE-2025-1716, CVE-2026-56315, CVE-2026-22608 and some sixty advisories more: a name the list did not have."""
    module, _, attribute = name.rpartition(".")
    report = refused(with_pickle(tmp_path / "c.ckpt", call(module, attribute)), "CK701")
    assert name in words(report)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "serialization.os.system"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("torch.Size", "__class__"),
    ],
)
def test_02_an_attribute_of_an_allowed_name(module: str, name: str, tmp_path: Path) -> None:
    """CVE-2025-10157: a submodule, or a dotted name, that a match by prefix let pass."""
    stacked = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93)R."
    refused(with_pickle(tmp_path / "c.ckpt", stacked), "CK701", "CK105")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".txt", ".safetensors", ".npy", ".jpg", ""])
def test_03_a_suffix_that_says_something_else(suffix: str, tmp_path: Path) -> None:
    """CVE-2025-1889, CVE-2025-10155: a file was skipped, or read by the wrong reader, because of its name."""
    report = refused(with_pickle(tmp_path / f"c{suffix}", call("os", "system")))
    assert codes(report) & {"CK701", "CK102"}, report.findings


def test_03_a_bare_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").write_bytes(call("os", "system"))
    refused(tmp_path / "c.ckpt", "CK102", "CK105", "CK701")


def test_04_a_wrong_checksum_hides_no_code(tmp_path: Path) -> None:
    """CVE-2025-10156: the scanner stopped at the CRC, and torch, which compares none, loaded the file."""
    path = with_pickle(tmp_path / "c.ckpt", call("os", "system"))
    path.write_bytes(path.read_bytes().replace(b"touch", b"TOUCH"))
    report = refused(path, "CK105")
    assert "os.system" in words(report)


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000, 0x20])
def test_05_flags_that_make_another_reader_stop(flag: int, tmp_path: Path) -> None:
    """CVE-2025-1945: a record marked as encrypted was skipped."""
    path = with_pickle(tmp_path / "c.ckpt", call("os", "system"))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= flag & 0xFF
    data[at + 9] |= flag >> 8
    path.write_bytes(data)
    refused(path, "CK105")


def test_06_another_name_in_the_local_header(tmp_path: Path) -> None:
    """CVE-2025-1944: the two names of a record differ, and the scanner stopped with an exception."""
    path = with_pickle(tmp_path / "c.ckpt", call("os", "system"))
    path.write_bytes(path.read_bytes().replace(b"archive/data.pkl", b"archive/data.pkz", 1))
    refused(path, "CK105")


@pytest.mark.parametrize("second", ["archive/data.pkl", "archive/DATA.PKL", "ARCHIVE/data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_07_two_records_of_one_name(second: str, tmp_path: Path) -> None:
    """torch looks names up without regard to case, by binary search; zipfile takes the last one."""
    path = tmp_path / "c.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/version", "3\n")
        file.writestr(second, call("os", "system"))
    refused(path, "CK105")


def test_08_a_member_that_cannot_be_read(tmp_path: Path) -> None:
    """Scanners log an unreadable member and end with 0."""
    path = with_pickle(tmp_path / "c.ckpt", call("os", "system"))
    data = bytearray(path.read_bytes())
    data[0:4] = b"PK\x03\x05"
    path.write_bytes(data)
    refused(path)


def polyglots() -> dict[str, Callable[[bytes], bytes]]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return {
        "a pickle before the archive": lambda data: call("os", "system") + data,
        "bytes after the archive": lambda data: data + b"\0" * 64,
        "a second archive after the first": lambda data: data + data,
        "a tar archive around it": lambda data: buffer.getvalue() + data,
        "an archive in the comment of another": lambda data: data[:-2] + struct.pack("<H", len(data)) + data,
    }


@pytest.mark.parametrize("kind", polyglots())
def test_09_two_files_in_one(kind: str, tmp_path: Path) -> None:
    """A file that is a zip archive to one reader and something else to another."""
    path = with_pickle(tmp_path / "c.ckpt", call("os", "system"))
    path.write_bytes(polyglots()[kind](path.read_bytes()))
    refused(path)


NAME_TRICKS = {
    "names from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94NN(h\x00h\x01\x93\x8c\x0ctouch canary\x85R.",
    "names from a tuple's call": b"\x80\x04c_codecs\nencode\n\x8c\x02os\x8c\x06latin1\x86R\x8c\x06system\x93)R.",
    "a name that is no text": b"\x80\x04K\x01\x8c\x06system\x93)R.",
    "a memo that is overwritten": b"\x80\x04\x8c\x01aq\x00\x8c\x02osq\x00cos\nsystem\n\x8c\x01x\x85R.",
}


@pytest.mark.parametrize("trick", NAME_TRICKS)
def test_10_names_that_a_backward_search_does_not_find(trick: str, tmp_path: Path) -> None:
    """GHSA-9gvj-pp9x-gcfr: the last two strings before STACK_GLOBAL were taken for the name."""
    refused(with_pickle(tmp_path / "c.ckpt", NAME_TRICKS[trick]), "CK701", "CK105")


def test_11_a_pickle_that_breaks_after_it_ran(tmp_path: Path) -> None:
    """nullifAI: code runs before the parse error at which scanners gave up."""
    report = refused(with_pickle(tmp_path / "c.ckpt", call("os", "system")[:-1] + b"\xff\xff"), "CK105")
    assert "os.system" in words(report), report.findings


HIDDEN_CALLS = {
    "INST": b"\x80\x02(X\x0c\x00\x00\x00touch canaryios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x0c\x00\x00\x00touch canaryo.",
    "REDUCE and POP": b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R0N.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\nX\x05\x00\x00\x00touch\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\nX\x05\x00\x00\x00touch\x85}\x92.",
    "EXT1": b"\x80\x02\x82\x01)R.",
    "BUILD": b"\x80\x02ccode\nInteractiveInterpreter\n)\x81}X\x04\x00\x00\x00evilcos\nsystem\nsb.",
    "PERSID": b"\x80\x02Pos.system\n.",
    "a call in a key": b"\x80\x02}cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85RK\x01s.",
    "a call that is thrown away with its mark": b"\x80\x02N(cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R1.",
}


@pytest.mark.parametrize("how", HIDDEN_CALLS)
def test_12_calls_whose_result_is_dropped(how: str, tmp_path: Path) -> None:
    """GHSA-mxhj-88fx-4pcv, GHSA-mhc9-48gj-9gp3: the call vanished from the scanner's tree."""
    refused(with_pickle(tmp_path / "c.ckpt", HIDDEN_CALLS[how]), "CK701", "CK105")


@pytest.mark.parametrize("length", [0, 1, 7, 2**62])
def test_13_a_frame_that_lies(length: int, tmp_path: Path) -> None:
    """The C unpickler and a linear reader disagree on where a frame ends."""
    body = call("os", "system")[2:]
    refused(with_pickle(tmp_path / "c.ckpt", b"\x80\x04\x95" + struct.pack("<Q", length) + body), "CK701", "CK105")


def test_14_no_verdict_depends_on_an_earlier_one(tmp_path: Path) -> None:
    """GHSA-cffv-grgg-g429: one analysis made the next one blind."""
    bad = with_pickle(tmp_path / "bad.ckpt", call("os", "system"))
    good = GENUINE["torch file, a state dict"].write(tmp_path)
    first = [verify_checkpoint(p, INFERENCE).findings for p in (good, bad)]
    again = [verify_checkpoint(p, INFERENCE).findings for p in (bad, good)]
    assert first == again[::-1]


def test_15_a_pickle_within_the_pickle(tmp_path: Path) -> None:
    """CVE-2019-6446 and torch's own `_load_from_bytes`: the inner pickle was not looked at."""
    inner = call("os", "system")
    outer = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    assert "_load_from_bytes" in words(refused(with_pickle(tmp_path / "c.ckpt", outer), "CK701"))


def test_16_an_archive_of_another_kind(tmp_path: Path) -> None:
    """nullifAI: a 7z archive was skipped without a word."""
    (tmp_path / "c.ckpt").write_bytes(b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(500))
    refused(tmp_path / "c.ckpt", "CK102")


def test_17_the_tar_format_of_torch_0_1(tmp_path: Path) -> None:
    """CVE-2025-32434: it ran code under weights_only=True."""
    with tarfile.open(tmp_path / "c.ckpt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = call("os", "system")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert "tar" in words(refused(tmp_path / "c.ckpt", "CK102"))


def storage(numel: int, key: str = "0") -> bytes:
    """A persistent id of a float storage, on the stack."""
    head = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key.encode() + b"X\x03\x00\x00\x00cpu"
    return head + b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"


def tensor(numel: int, shape: int, stride: int = 1, offset: int = 0) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel)
        + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in (offset,))
        + b"(\x8a\x08" + struct.pack("<q", shape) + b"t(\x8a\x08" + struct.pack("<q", stride) + b"t"
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def with_storage(path: Path, pickled: bytes, record: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in (("data.pkl", pickled), ("data/0", record), ("version", b"3\n")):
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return path


def state_dict(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


@pytest.mark.parametrize(
    ("numel", "shape", "stride", "offset"),
    [
        (9, 2, 1, 0),
        (2, 3, 1, 0),
        (2, 2, 5, 0),
        (2, 2, 1, 1),
        (2, 2, -1, 0),
        (-1, 2, 1, 0),
        (2**50, 2, 1, 0),
        (2, -2, 1, 0),
    ],
)
def test_18_a_tensor_that_is_not_its_storage(numel: int, shape: int, stride: int, offset: int, tmp_path: Path) -> None:
    """CVE-2026-24747: memory beside the storage was read, or written."""
    good = with_storage(tmp_path / "good.pt", state_dict(tensor(2, 2)), bytes(8))
    assert verify_checkpoint(good, INFERENCE).verdict is not Verdict.FAIL, verify_checkpoint(good, INFERENCE).findings
    bad = with_storage(tmp_path / "bad.pt", state_dict(tensor(numel, shape, stride, offset)), bytes(8))
    refused(bad, "CK105")


def test_18_an_item_set_on_something_that_is_no_dict(tmp_path: Path) -> None:
    refused(with_pickle(tmp_path / "c.ckpt", b"\x80\x02ctorch\nSize\n)R" + b"K\x00K\x01s."), "CK105")


def test_19_a_sparse_tensor_is_pointed_out(tmp_path: Path) -> None:
    """torch does not check the indices of a sparse tensor that it loads."""
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "c.pt")
    report = verify_checkpoint(tmp_path / "c.pt", INFERENCE)
    assert [f for f in report.findings if "sparse" in f.message and f.severity is not Severity.PASS], report.findings


@pytest.mark.parametrize("name", ["builtins\nbytearray", "torch\nFloatTensor", "collections\nCounter"])
def test_20_nothing_is_allocated_by_an_allowed_name(name: str, tmp_path: Path) -> None:
    """`bytearray(10**12)` is allowed by weights_only=True, and carried out."""
    bomb = b"\x80\x02}X\x01\x00\x00\x00wc" + name.encode() + b"\n\x8a\x08" + struct.pack("<q", 2**40) + b"\x85Rs."
    began = time.process_time()
    verify_checkpoint(with_pickle(tmp_path / "c.pt", bomb), INFERENCE)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02Nr\x00\x00\x00\x40.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
    ],
)
def test_21_sizes_that_are_not_there(bomb: bytes, tmp_path: Path) -> None:
    """CVE-2018-20406: memory was taken for what a length claimed."""
    report = verify_checkpoint(with_pickle(tmp_path / "c.ckpt", bomb))
    assert report.verdict is Verdict.FAIL
    assert "MemoryError" not in words(report)


def test_22_a_deep_key_that_overflows_the_stack(tmp_path: Path) -> None:
    """1 MB of nested tuple as a dict's key kills the C unpickler and `torch.load(weights_only=True)`."""
    refused(with_pickle(tmp_path / "c.ckpt", b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."), "CK105")


def test_22_deep_values_in_every_entry(tmp_path: Path) -> None:
    """Nested dicts are legal; nothing that walks them may recurse."""
    deep = b"X\x05\x00\x00\x00loops" + b"}X\x01\x00\x00\x00a" * 5_000 + b"}" + b"s" * 5_000
    report = verify_checkpoint(with_pickle(tmp_path / "c.ckpt", b"\x80\x02}" + deep + b"s."))
    assert report.verdict is Verdict.FAIL
    assert "CK100" not in codes(report), report.findings


@pytest.mark.parametrize(
    "field", ["state_dict", "loops", "optimizer_states", "hyper_parameters", "callbacks", "lr_schedulers"]
)
def test_23_shared_values_that_multiply(field: str, tmp_path: Path) -> None:
    """Sixty lists, each twice the one before: 2**60 values to a reader that walks the tree."""
    doubling = b"]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
    name = b"X" + struct.pack("<I", len(field)) + field.encode()
    version = b"X\x19\x00\x00\x00pytorch-lightning_versionX\x03\x00\x00\x002.6s"
    began = time.process_time()
    report = verify_checkpoint(with_pickle(tmp_path / "c.ckpt", b"\x80\x02}" + version + name + doubling + b"s."))
    assert time.process_time() - began < 2
    assert report.verdict is Verdict.FAIL
    assert "CK100" not in codes(report), report.findings


@pytest.mark.parametrize("field", ["state_dict", "loops", "hyper_parameters", "callbacks", "optimizer_states"])
def test_24_a_value_that_contains_itself(field: str, tmp_path: Path) -> None:
    name = b"X" + struct.pack("<I", len(field)) + field.encode()
    version = b"X\x19\x00\x00\x00pytorch-lightning_versionX\x03\x00\x00\x002.6s"
    cycle = b"}q\x01X\x04\x00\x00\x00selfh\x01s"
    report = verify_checkpoint(with_pickle(tmp_path / "c.ckpt", b"\x80\x02}" + version + name + cycle + b"s."))
    assert report.verdict is Verdict.FAIL
    assert "CK100" not in codes(report), report.findings


def test_25_a_tensor_far_larger_than_its_bytes_is_pointed_out(tmp_path: Path) -> None:
    """Stride 0: 400 bytes that become terabytes at the first copy."""
    torch.save({"w": torch.ones(100, 1).expand(100, 2**40)}, tmp_path / "c.pt")
    for options in (INFERENCE, Options(purpose="inference", deep=True)):
        began = time.process_time()
        report = verify_checkpoint(tmp_path / "c.pt", options)
        assert time.process_time() - began < 2
        assert report.of(Severity.WARNING) or report.of(Severity.ERROR), report.findings


def test_26_a_record_that_unpacks_to_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N" * 50_000_000 + b".")
        file.writestr("archive/version", "3\n")
    began = time.process_time()
    assert "compressed" in words(refused(tmp_path / "c.ckpt", "CK105"))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x.safetensors"])
def test_27_an_index_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """GHSA-9mfc-5mqx-wxhr: the index names a file elsewhere, and the library opens it."""
    folder = GENUINE["huggingface model, several shards"].write(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    assert codes(verify_checkpoint(folder, INFERENCE)) & {"CK105", "CK101"}


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def test_27_metadata_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = GENUINE["sharded, model alone"].write(tmp_path)

    def lead_out(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../../etc/passwd"

    edit_metadata(folder, lead_out)
    assert codes(verify_checkpoint(folder, INFERENCE)) & {"CK105", "CK101"}


def test_28_links_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    for put in (
        lambda p: p.symlink_to("/etc/passwd"),
        lambda p: os.mkfifo(p),
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.mkdir(),
    ):
        path = folder / "pytorch_model.bin"
        put(path)
        began = time.process_time()
        assert verify_checkpoint(folder).verdict is Verdict.FAIL
        assert time.process_time() - began < 2
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert verify_checkpoint(Path("/dev/zero")).verdict is Verdict.FAIL


def test_29_a_file_that_changes_while_it_is_read(trained: Path, tmp_path: Path) -> None:
    """A writer at work: whatever is read of it, it is never called good."""
    path = tmp_path / "c.ckpt"
    whole = (trained / "step=7.ckpt").read_bytes()
    path.write_bytes(whole)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with path.open("r+b") as file:
                file.write(whole)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reports = [verify_checkpoint(path, Options(deep=True)) for _ in range(40)]
    finally:
        stop.set()
        writer.join()
    assert any("changed while" in words(r) for r in reports), {words(r) for r in reports}
    assert not any("CK100" in codes(r) for r in reports)


def test_31_the_verdict_names_what_an_unsafe_retry_would_run(tmp_path: Path) -> None:
    """Loaders that try again with weights_only=False: the names must be told even where the first try would refuse."""
    report = refused(with_pickle(tmp_path / "c.ckpt", call("os", "system")), "CK701")
    assert "os.system" in words(report)
    assert any("weights_only" in f.message for f in report.of(Severity.ERROR) if f.code == "CK701")


def test_32_a_torchscript_archive_holds_code(tmp_path: Path) -> None:
    """CVE-2022-45907 and others: torch.load hands it to another loader."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "c.pt"))  # type: ignore[no-untyped-call]
    assert "TorchScript" in words(refused(tmp_path / "c.pt", "CK102"))


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def test_33_code_in_the_metadata_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    """VU#252619: `.metadata` is read by bare pickle.load, and scanners did not look at it."""
    folder = GENUINE["sharded, model alone"].write(tmp_path)
    edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Runs()))
    report = verify_checkpoint(folder, INFERENCE)
    assert "CK701" in codes(report)
    assert "posix.system" in words(report)


def test_33_code_in_an_entry_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    """Entries that are no tensors are loaded with weights_only=False."""
    dcp.save({"w": torch.ones(2), "extra": Runs()}, checkpoint_id=tmp_path / "s", no_dist=True)
    report = verify_checkpoint(tmp_path / "s", INFERENCE)
    assert "posix.system" in words(report), report.findings


def test_33_code_in_meta_pt(tmp_path: Path) -> None:
    """CVE-2026-31221: Lightning reads it with weights_only=False."""
    folder = GENUINE["sharded, model alone"].write(tmp_path)
    torch.save({"pytorch-lightning_version": "2.6.6", "callbacks": Runs()}, folder / "meta.pt")
    assert "posix.system" in words(verify_checkpoint(folder, INFERENCE))


@pytest.mark.parametrize("byteorder", [b"big", b"middle", b"LITTLE", b""])
def test_34_a_byte_order_that_makes_torch_crash(byteorder: bytes, tmp_path: Path) -> None:
    """`big` in a file that is not: torch swaps the bytes of every weight, and crashes with map_location="meta"."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = byteorder if name.endswith("/byteorder") else old.read(name)
            new.writestr(zipfile.ZipInfo(name), data)
    script = "import sys; from enstack_lightning.checkpoint import Options, verify_checkpoint\n" \
        "print(verify_checkpoint(sys.argv[1], Options(purpose='inference')).verdict)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, "b.pt"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fail", done.stdout


def test_a_checksum_is_no_signature(tmp_path: Path) -> None:
    """Whoever edits a file can write its CRC-32 anew: that is found by the names it uses, never by the checksum."""
    data = call("os", "system")
    path = with_pickle(tmp_path / "c.ckpt", data)
    assert struct.pack("<I", zlib.crc32(data)) in path.read_bytes()
    refused(path, "CK701")
