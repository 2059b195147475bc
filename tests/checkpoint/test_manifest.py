"""Manifests: what was saved is what is there, to the last bit; a manifest is whole or absent, and not believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from builders import enstack_folder
from killing import run_child

from enstack_lightning.checkpoint import Options, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.facts import ManifestFacts
from enstack_lightning.checkpoint.location import LocalLocation, RemoteLocation, locate
from enstack_lightning.checkpoint.manifest import (
    BLOCK_BYTES,
    FOLDER_MANIFEST,
    MAX_DEPTH,
    MAX_DIFFERENCES,
    compare_manifest,
    manifest_path,
    write_manifest,
)
from enstack_lightning.checkpoint.manifest_file import MAX_FILES, MAX_MANIFEST_BYTES
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three files, one of them in a folder of its own, one empty."""
    folder = tmp_path / "checkpoint ü"
    (folder / "state").mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes(range(256)) * 50)
    (folder / "state" / "rank 0.pt").write_bytes(b"state")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def compared(path: Path, digests: bool = True) -> ManifestFacts:
    facts = compare_manifest(LocalLocation(path), digests)
    assert facts is not None
    assert facts.compared == ("digests" if digests else "sizes") or facts.defect
    return facts


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_path(path)
    content = json.loads(manifest.read_text())
    edit(content)
    manifest.write_text(json.dumps(content))


def test_a_file_system_that_gives_less_than_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, blocks, offset: preadv(fd, [blocks[0][: 2**20]], offset))
    large = tmp_path / "c.ckpt"
    large.write_bytes(os.urandom(BLOCK_BYTES + 2**21))
    written = json.loads(write_manifest(large).read_text())
    assert written["files"][0]["blake3"] == blake3(large.read_bytes()).hexdigest()


def test_a_manifest_lists_every_file_with_its_size_and_digest(folder: Path) -> None:
    path = write_manifest(folder, format="enstack", global_step=12, epoch=3)
    assert path == manifest_path(folder) == folder / FOLDER_MANIFEST
    content = json.loads(path.read_text())
    assert (content["version"], content["format"], content["global_step"], content["epoch"]) == (1, "enstack", 12, 3)
    assert content["tool"].startswith("enstack-lightning")
    assert time.strptime(content["created"], "%Y-%m-%dT%H:%M:%SZ")
    assert {f["name"]: (f["size"], f["blake3"]) for f in content["files"]} == {
        name: (len(data := (folder / name).read_bytes()), blake3(data).hexdigest())
        for name in ("empty.txt", "model.bin", "state/rank 0.pt")
    }
    for digests in (False, True):
        facts = compared(folder, digests)
        assert (facts.defect, facts.differences, facts.files, facts.global_step) == ("", (), 3, 12)


def test_a_file_has_its_manifest_beside_it_and_may_be_renamed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "12:30 step=7.ckpt"
    path.write_bytes(b"x" * 1000)
    assert write_manifest(path) == tmp_path / "12:30 step=7.ckpt.manifest.json"
    assert compared(path).differences == ()
    new = tmp_path / "last.ckpt"
    manifest_path(path).rename(manifest_path(new))
    path.rename(new)
    assert compared(new).differences == ()
    new.write_bytes(b"y" * 1000)
    assert compared(new, digests=False).differences == ()
    ((where, message),) = compared(new).differences
    assert where == "last.ckpt"
    assert "bytes have changed" in message


def test_without_a_manifest_there_is_nothing_to_compare(folder: Path) -> None:
    assert compare_manifest(LocalLocation(folder), True) is None
    assert compare_manifest(LocalLocation(folder / "none.ckpt"), True) is None


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 5]
)
def test_files_of_any_size_are_digested_whole(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    data = os.urandom(size)
    path.write_bytes(data)
    counts: list[int] = []
    entry = json.loads(write_manifest(path, counts.append).read_text())["files"][0]
    assert (entry["size"], entry["blake3"]) == (size, blake3(data).hexdigest())
    assert sum(counts) == size
    if size:
        flipped = bytearray(data)
        flipped[-1] ^= 1
        path.write_bytes(flipped)
        assert compared(path).differences


def test_what_is_gone_added_or_of_another_size_is_a_difference(folder: Path) -> None:
    write_manifest(folder)
    (folder / "model.bin").write_bytes(b"short")
    (folder / "empty.txt").unlink()
    (folder / "state" / "extra.pt").write_bytes(b"")
    for digests in (False, True):
        assert dict(compared(folder, digests).differences) == {
            "model.bin": "it has 5 bytes; the manifest says 12,800",
            "empty.txt": "it is missing",
            "state/extra.pt": "the manifest does not list it",
        }


def test_many_differences_are_told_in_few(folder: Path) -> None:
    write_manifest(folder)
    for i in range(1_000):
        (folder / f"{i}.tmp").touch()
    differences = compared(folder, digests=False).differences
    assert len(differences) == MAX_DIFFERENCES + 1
    assert "980 further differences" in differences[-1][1]


def test_a_file_that_becomes_shorter_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    path.write_bytes(bytes(8 * BLOCK_BYTES))
    write_manifest(path)
    facts = compare_manifest(LocalLocation(path), True, lambda count: os.truncate(path, BLOCK_BYTES))
    assert facts is not None
    ((_, message),) = facts.differences
    assert "it became shorter while it was read" in message


def test_links_are_not_followed_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    write_manifest(folder)
    moved = (folder / "model.bin").rename(tmp_path / "outside.bin")
    (folder / "model.bin").symlink_to(moved)
    assert dict(compared(folder).differences)["model.bin"].endswith("leads out of the checkpoint's folder")
    with pytest.raises(CheckpointError, match=r"model\.bin.*leads out"):
        write_manifest(folder)
    (folder / "model.bin").unlink()
    moved.rename(folder / "model.bin")
    (folder / "state").rename(folder / "other")
    (folder / "state").symlink_to("other")
    behind = [message for name, message in compared(folder).differences if name.startswith("state/")]
    assert behind == ["it lies behind state, which is a link to a folder and not followed"]
    (folder / "state").unlink()
    (folder / "other").rename(tmp_path / "state")
    (folder / "state").symlink_to(tmp_path / "state")
    assert any("link to a folder" in message for _, message in compared(folder).differences)
    with pytest.raises(CheckpointError, match="link to a folder"):
        write_manifest(folder)


def test_a_manifest_that_is_a_link_is_replaced_and_its_target_left(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious.txt"
    target.write_text("precious")
    manifest_path(folder).symlink_to(target)
    assert "leads out" in compared(folder).defect
    write_manifest(folder)
    assert target.read_text() == "precious"
    assert not manifest_path(folder).is_symlink()
    assert compared(folder).differences == ()


def test_what_is_no_regular_file_gets_no_manifest(folder: Path) -> None:
    write_manifest(folder)
    os.mkfifo(folder / "pipe")
    assert ("pipe", "the manifest does not list it") in compared(folder).differences
    with pytest.raises(CheckpointError, match="not a regular file"):
        write_manifest(folder)
    (folder / "pipe").unlink()
    (folder / "model.bin").unlink()
    os.mkfifo(folder / "model.bin")
    assert "not a regular file" in dict(compared(folder).differences)["model.bin"]
    manifest_path(folder).unlink()
    os.mkfifo(manifest_path(folder))
    assert "not a regular file" in compared(folder).defect


def test_nothing_gets_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        write_manifest(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="URL"):
        write_manifest("memory://checkpoint.ckpt")


UNUSABLE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda m: m.update(version=2),
    "no version": lambda m: m.pop("version"),
    "no files": lambda m: m.update(files=[]),
    "files that are no list": lambda m: m.update(files={}),
    "a file that is no object": lambda m: m["files"].append("a"),
    "a file twice": lambda m: m["files"].append(m["files"][0]),
    "no name": lambda m: m["files"][0].pop("name"),
    "an empty name": lambda m: m["files"][0].update(name=""),
    "an absolute name": lambda m: m["files"][0].update(name="/etc/passwd"),
    "a name that leads out": lambda m: m["files"][0].update(name="../outside.bin"),
    "a name that leads out from within": lambda m: m["files"][0].update(name="state/../../outside.bin"),
    "a name that leads out elsewhere": lambda m: m["files"][0].update(name="..\\outside.bin"),
    "a name with NUL": lambda m: m["files"][0].update(name="a\0b"),
    "the manifest itself": lambda m: m["files"][0].update(name=FOLDER_MANIFEST),
    "a size that is text": lambda m: m["files"][0].update(size="1"),
    "a size that is true": lambda m: m["files"][0].update(size=True),
    "a negative size": lambda m: m["files"][0].update(size=-1),
    "a short digest": lambda m: m["files"][0].update(blake3="ab"),
    "no digest": lambda m: m["files"][0].pop("blake3"),
    "a step that is text": lambda m: m.update(global_step="12"),
    "a format that is a number": lambda m: m.update(format=1),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_manifest_that_says_what_none_can_say_is_unusable(kind: str, folder: Path) -> None:
    write_manifest(folder)
    edit_manifest(folder, UNUSABLE[kind])
    for digests in (False, True):
        facts = compared(folder, digests)
        assert facts.defect
        assert facts.differences == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"version":1,"version":1}',
        b'{"version":NaN}',
        b'{"version":' + b"9" * 10_000 + b"}",
    ],
    ids=lambda c: repr(c[:12]),
)
def test_a_manifest_that_is_no_manifest_is_unusable(content: bytes, folder: Path) -> None:
    manifest_path(folder).write_bytes(content)
    assert compared(folder).defect


def test_a_manifest_larger_than_any_is_not_believed(folder: Path) -> None:
    whole = write_manifest(folder).read_bytes()
    manifest_path(folder).write_bytes(whole + b" " * MAX_MANIFEST_BYTES)
    assert f"bytes; the limit is {MAX_MANIFEST_BYTES:,}" in compared(folder).defect
    manifest_path(folder).write_bytes(whole)
    edit_manifest(folder, lambda m: m.update(files=[m["files"][0] | {"name": str(n)} for n in range(MAX_FILES + 1)]))
    assert f"files; the limit is {MAX_FILES:,}" in compared(folder).defect


def test_a_manifest_of_several_files_is_none_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"content")
    write_manifest(path)
    edit_manifest(path, lambda m: m["files"].append(m["files"][0] | {"name": "b.ckpt"}))
    assert compared(path).defect == "it lists 2 files beside a checkpoint of one"


def test_a_folder_of_more_files_than_any_gets_no_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enstack_lightning.checkpoint.manifest.MAX_FILES", 2)
    with pytest.raises(CheckpointError, match="the folder holds more than 2 files"):
        write_manifest(folder)


def test_files_are_listed_so_many_folders_deep_and_no_deeper(folder: Path) -> None:
    deep = folder.joinpath(*"abcdefghi"[:MAX_DEPTH])
    deep.mkdir(parents=True)
    (deep / "file").touch()
    write_manifest(folder)
    (deep / "i").mkdir()
    with pytest.raises(CheckpointError, match="lies more than 8 folders deep"):
        write_manifest(folder)


def test_what_a_killed_writer_of_a_manifest_left_is_no_difference(folder: Path) -> None:
    write_manifest(folder)
    (folder / f".{FOLDER_MANIFEST}.0a1b2c3d.tmp").write_bytes(b"{")
    assert compared(folder).differences == ()


def test_a_manifest_cut_off_or_flipped_anywhere_is_unusable_or_shows_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"content")
    whole = write_manifest(path).read_bytes()
    for size in range(len(whole) - 2):  # without its last brace and newline
        manifest_path(path).write_bytes(whole[:size])
        assert compared(path).defect, size
    entry = whole.index(b'"size"')
    for bit in range(8 * entry, 8 * (whole.index(b"}", entry) - 10)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest_path(path).write_bytes(flipped)
        facts = compared(path)
        assert facts.defect or facts.differences or json.loads(flipped)["files"] == json.loads(whole)["files"], bit


def test_a_kill_at_any_moment_leaves_the_old_manifest_or_the_new(folder: Path) -> None:
    (folder / "model.bin").write_bytes(os.urandom(20_000_000))
    script = (
        "import sys\n"
        "from enstack_lightning.checkpoint.manifest import write_manifest\n"
        "print('ready', flush=True)\n"
        "step = 0\n"
        "while True: write_manifest(sys.argv[1], global_step=(step := step + 1))\n"
    )
    write_manifest(folder, global_step=0)
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.005 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        facts = compared(folder)
        assert (facts.defect, facts.differences) == ("", ())
    write_manifest(folder)
    assert compared(folder).differences == ()


def test_a_manifest_that_cannot_be_written_leaves_nothing_behind(folder: Path) -> None:
    manifest_path(folder).mkdir()
    (manifest_path(folder) / "x").touch()
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="gets no manifest"):
        write_manifest(folder)
    assert sorted(folder.iterdir()) == before


def test_a_file_that_grows_while_it_is_read_gets_no_manifest(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(bytes(2 * BLOCK_BYTES))

    def grow(_: int) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        write_manifest(path, grow)
    assert not manifest_path(path).exists()


def test_objects_behind_a_url_are_compared_too(folder: Path) -> None:
    write_manifest(folder, global_step=5)
    location = locate("memory://manifests/checkpoint")
    assert isinstance(location, RemoteLocation)
    location.filesystem.put(str(folder), location.path, recursive=True)
    for digests in (False, True):
        facts = compare_manifest(location, digests)
        assert facts is not None
        assert (facts.path, facts.defect, facts.differences, facts.global_step) == (
            f"memory://manifests/checkpoint/{FOLDER_MANIFEST}",
            "",
            (),
            5,
        )
    location.filesystem.pipe_file(f"{location.path}/model.bin", bytes(12_800))
    location.filesystem.pipe_file(f"{location.path}/new.bin", b"")
    facts = compare_manifest(locate("memory://manifests/checkpoint"), True)
    assert facts is not None
    assert [where for where, _ in facts.differences] == ["model.bin", "new.bin"]
    location.filesystem.rm(location.path, recursive=True)


def test_a_report_says_what_differs(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    write_manifest(folder)
    deep = Options(deep=True)
    for options in (None, deep):
        report = verify_checkpoint(folder, options)
        assert report.verdict is not Verdict.FAIL
        assert "CK803" in {f.code for f in report.findings}
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert verify_checkpoint(folder).verdict is not Verdict.FAIL
    report = verify_checkpoint(folder, deep)
    assert {f.code for f in report.findings if f.severity == "error"} == {"CK801"}
    manifest_path(folder).write_text("{}")
    assert "CK802" in {f.code for f in verify_checkpoint(folder).findings}


def test_a_fork_of_a_process_that_took_digests_takes_digests(tmp_path: Path) -> None:
    """The threads that help with a digest stay in the parent: a child that waits for them waits forever."""
    (tmp_path / "c.pt").write_bytes(os.urandom(2**20))
    written = write_manifest(tmp_path / "c.pt").read_bytes()

    def in_child(tell: Callable[[str], None]) -> None:
        write_manifest(tmp_path / "c.pt")
        tell("written")

    assert run_child(in_child, limit_seconds=20).said == ("written", "done")
    assert json.loads(written)["files"] == json.loads(manifest_path(tmp_path / "c.pt").read_bytes())["files"]
