"""What befalls files: bits flip, disks fill up, downloads fail. No damage that verification covers is passed."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import enstack_folder, flip_bit, truncate
from safetensors.torch import save_file

from enstack_lightning.checkpoint import Report, Severity, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile


def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "c.ckpt"))


def codes(report: Report) -> set[str]:
    return {f.code for f in report.of(Severity.ERROR)}


def unread_ranges(path: Path) -> list[range]:
    """Byte ranges that a quick verification leaves unread on purpose: tensors' bytes and the padding of headers."""
    with LocalSource(path) as source:
        file = TorchFile(source)
        headers = [
            range(r.header_offset + 30 + len(r.name.encode()), file.records[n].offset) for n, r in file.records.items()
        ]
        return headers + [
            range(file.records[name].offset, file.records[name].offset + r.size)
            for name, r in file.records.items()
            if name != "data.pkl" and name not in step_records(path)
        ]


def step_records(path: Path) -> list[str]:
    """The records of the optimizer's step counts, the only tensors that are read."""
    optimizer = torch_file_content(path)["optimizer_states"][0]
    return [f"data/{state['step'].storage.key}" for state in optimizer["state"].values()]


def torch_file_content(path: Path) -> Any:
    with LocalSource(path) as source:
        file = TorchFile(source)
        return file.read_pickle().value


def test_a_file_cut_off_anywhere_fails(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    whole = path.read_bytes()
    for size in [*range(0, 300), *range(300, len(whole), 37), *range(len(whole) - 300, len(whole))]:
        path.write_bytes(whole[:size])
        report = verify_checkpoint(path)
        assert report.verdict is Verdict.FAIL, size
        assert codes(report) & {"CK102", "CK103", "CK104", "CK105"}, (size, report.findings)


def test_a_flipped_bit_in_what_is_read_fails(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    unread = unread_ranges(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    missed = []
    offsets = [n for n in range(len(whole)) if not any(n in r for r in unread)]
    assert len(offsets) > 5_000
    for offset in draw.sample(offsets, 1_500):
        bit = draw.randrange(8)
        path.write_bytes(whole)
        flip_bit(path, offset, bit)
        if verify_checkpoint(path).verdict is not Verdict.FAIL and torch_reads_another_thing(path, whole):
            missed.append((offset, bit))
    assert not missed, missed


def torch_reads_another_thing(path: Path, whole: bytes) -> bool:
    """Whether torch, loading the damaged file, gets other values: what no verification may pass."""
    before = torch.load(io.BytesIO(whole), weights_only=True)
    try:
        after = torch.load(path, weights_only=True)
    except Exception:
        return True
    return repr(before) != repr(after)


def test_a_flipped_bit_in_a_step_count_of_the_optimizer_fails(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    with LocalSource(path) as source:
        file = TorchFile(source)
        record = file.records[step_records(path)[0]]
        offset = file.records[step_records(path)[0]].offset
    flip_bit(path, offset + 2)
    report = verify_checkpoint(path)
    assert codes(report) >= {"CK105"}
    assert any("CRC-32" in f.message and record.name.partition("/")[2] in f.message for f in report.findings)


@pytest.mark.faults_long
def test_every_bit_of_what_is_read(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    unread = unread_ranges(path)
    whole = path.read_bytes()
    missed = []
    for offset in range(len(whole)):
        if any(offset in r for r in unread):
            continue
        for bit in range(8):
            path.write_bytes(whole)
            flip_bit(path, offset, bit)
            if verify_checkpoint(path).verdict is not Verdict.FAIL and torch_reads_another_thing(path, whole):
                missed.append((offset, bit))
    assert not missed, (len(missed), missed[:20])


def test_zeroed_ends_and_beginnings_fail(trained: Path, tmp_path: Path) -> None:
    """A machine that crashes leaves pages of zeros where data had not reached the disk."""
    path = copied(trained, tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-4096] + bytes(4096), bytes(4096) + whole[4096:], bytes(len(whole))):
        path.write_bytes(damaged)
        assert verify_checkpoint(path).verdict is Verdict.FAIL


@pytest.mark.parametrize("extra", [b"\0", b"junk after the end", b"PK\x05\x06" + bytes(18)])
def test_bytes_after_the_end_fail(extra: bytes, trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    path.write_bytes(path.read_bytes() + extra)
    assert verify_checkpoint(path).verdict is Verdict.FAIL


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"x" * 1000))


def ordinary_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())


IMPOSTORS = {
    "LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "HTML": (lambda p: p.write_text("<!DOCTYPE html><html>404</html>"), "an HTML page"),
    "text": (lambda p: p.write_text("Killed\n"), "a text file"),
    "gzip": (gzipped, "a gzip archive"),
    "tar": (tarred, "a tar archive"),
    "zip": (ordinary_zip, "an ordinary zip archive (it holds folder/readme.txt)"),
    "zeros": (lambda p: p.write_bytes(bytes(10_000)), "filled with zeros"),
    "noise": (lambda p: p.write_bytes(random.Random(0).randbytes(10_000)), "no known format"),
    "safetensors": (lambda p: save_file({"w": torch.zeros(3)}, p), "a safetensors file"),
    "torch before 1.6": (
        lambda p: torch.save({"a": 1}, p, _use_new_zipfile_serialization=False),
        "a dict without a tensor in it",
    ),
    "a list": (lambda p: torch.save([1, 2], p), "a list without a tensor in it"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_is_no_checkpoint_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    write, words = IMPOSTORS[kind]
    path = tmp_path / "c.ckpt"
    write(path)
    report = verify_checkpoint(path)
    assert "CK102" in codes(report), report.findings
    assert words in " ".join(f.message for f in report.findings)


def test_a_fifo_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.ckpt")
    assert codes(verify_checkpoint(tmp_path / "c.ckpt")) == {"CK102"}
    os.mkfifo(enstack_folder(tmp_path / "e") / "pytorch_model.bin")
    assert verify_checkpoint(tmp_path / "e").verdict is Verdict.FAIL


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert codes(verify_checkpoint(tmp_path)) == {"CK102"}


def test_a_disk_that_fills_up_during_a_save_leaves_a_file_that_fails(tmp_path: Path) -> None:
    """A real ENOSPC is a file size limit here: torch's writer stops at 64 KiB, as on a full disk."""
    script = (
        "import resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "torch.save({'state_dict': {'w': torch.zeros(100_000)}, 'pytorch-lightning_version': '2.6'}, sys.argv[1])\n"
    )
    path = tmp_path / "full.ckpt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=False)
    assert done.returncode != 0
    assert 0 < path.stat().st_size <= 65536
    assert codes(verify_checkpoint(path)) & {"CK104", "CK105"}


def test_a_safetensors_file_cut_off_anywhere_fails(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    path = folder / "model.safetensors"
    for size in range(path.stat().st_size - 1, -1, -1):
        truncate(path, size)
        assert verify_checkpoint(folder).verdict is Verdict.FAIL, size
