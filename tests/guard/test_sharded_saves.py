"""Two processes that shard save one folder: it is whole or as it was before, and none waits for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy

from enstack_lightning.checkpoint import Options, Report, verify_checkpoint
from enstack_lightning.checkpoint.manifest import digest_files, manifest_path
from enstack_lightning.guard.saving import atomic
from enstack_lightning.guard.saving.atomic import staging
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO
from enstack_lightning.guard.saving.sharded import ShardedSaves

SCRIPT = Path(__file__).with_name("sharded_saves.py")
UNTOUCHED = "The checkpoint that stood there before is untouched."


def what_came_of(tmp_path: Path, *cases: str) -> dict[str, list[str]]:
    """What each rank that lives said of its second save, and the first is good; hanging fails."""
    answers = tmp_path / "answers"
    answers.mkdir()
    call = [sys.executable, str(SCRIPT), str(tmp_path), str(answers), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120, env=environment)
    of_ranks = {path.name: path.read_text().split("\n") for path in answers.iterdir()}
    assert all(first == "saved" for first, _ in of_ranks.values()), done.stderr
    said = {case: [second for name, (_, second) in sorted(of_ranks.items()) if name[:-2] == case] for case in cases}
    assert all(said.values()), done.stderr
    return said


def report_of(folder: Path) -> Report:
    return verify_checkpoint(folder / "c.ckpt", Options(deep=True, digests=True))


def is_whole(folder: Path) -> bool:
    report = report_of(folder)
    assert report.facts.manifest is None or report.facts.manifest.compared == "digests"
    return report.verdict == "pass" and report.facts.manifest is not None


def test_what_goes_wrong_on_one_rank_is_said_by_all_and_changes_nothing(tmp_path: Path) -> None:
    cases = ("spoiled", "nothing", "full 1", "full 0", "one file", "flip", "other disk", "kill 1")
    with staging(tmp_path / "nothing" / "c.ckpt"):
        (left,) = (tmp_path / "nothing").iterdir()
    left.mkdir()  # as a killed save leaves it
    said = what_came_of(tmp_path, *cases)
    assert said["nothing"] == ["saved", "saved"]
    assert is_whole(tmp_path / "nothing")

    for case, reason in {
        "full 1": "rank 1: File too large (errno 27)",
        "full 0": "rank 0: File too large (errno 27)",
        "one file": "File too large (errno 27)",
        "flip": "rank 1: __1_0.distcp read back from the disk differs from what was written",
    }.items():
        number = None if case == "flip" else 27
        path = tmp_path / case / "c.ckpt"
        expected = f"CheckpointSaveError {number}: CheckpointGuard: {path} was not saved: {reason}. {UNTOUCHED}"
        assert said[case][0].startswith(expected)
        assert said[case][1] == said[case][0]
        assert is_whole(tmp_path / case)

    assert "c.ckpt stays as it is, for it is the last checkpoint that verified" in said["spoiled"][0]
    assert said["spoiled"][1] == "saved"
    assert is_whole(tmp_path / "spoiled")
    assert (tmp_path / "spoiled" / "c.ckpt.unverified").is_dir()

    assert "not every rank sees" in said["other disk"][0]
    assert report_of(tmp_path / "other disk").verdict == "pass"
    assert report_of(tmp_path / "other disk").facts.manifest is None

    (of_the_living,) = said["kill 1"]
    assert of_the_living.startswith("CheckpointSaveError None: ")
    assert f"was not saved: another rank has ended or does not answer. {UNTOUCHED}" in of_the_living
    assert is_whole(tmp_path / "kill 1")
    left = sorted(path.name for case in cases for path in (tmp_path / case).iterdir())
    assert left == ["c.ckpt"] * len(cases) + ["c.ckpt.unverified"]


def test_rank_zero_killed_while_it_writes(tmp_path: Path) -> None:
    (of_the_living,) = what_came_of(tmp_path, "kill 0")["kill 0"]
    assert of_the_living.startswith("CheckpointSaveError None: ")
    assert is_whole(tmp_path / "kill 0")
    assert len(atomic.remove_leftovers(tmp_path / "kill 0")) == 1
    assert [path.name for path in (tmp_path / "kill 0").iterdir()] == ["c.ckpt"]


def guarded(**options: Any) -> GuardedCheckpointIO:
    return GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None, **options)


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, ["", "__0_0.distcp", "__1_0.distcp", "meta.pt"]), (1, ["__1_0.distcp"])]
)
def test_each_rank_brings_its_files_to_the_disk_and_the_first_one_all(
    rank: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp", "meta.pt"):
        (tmp_path / name).write_bytes(name.encode())
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.path.relpath(Path(f"/proc/self/fd/{fd}").readlink(), tmp_path).removeprefix("."))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    entries = ShardedSaves(SimpleNamespace(global_rank=rank, world_size=2), guarded())._on_disk(tmp_path)
    assert sorted(set(synced)) == expected
    assert [entry.name for entry in entries] == (["__0_0.distcp", "meta.pt"] if rank == 0 else ["__1_0.distcp"])


def test_a_file_that_shows_late_is_in_the_manifest(tmp_path: Path) -> None:
    staged, target = tmp_path / "staged", tmp_path / "c.ckpt"
    staged.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (staged / name).write_bytes(name.encode())
    early = list(digest_files(staged, lambda name: name.startswith("__0")))
    ShardedSaves(SimpleNamespace(), guarded())._commit({}, staged, target, early)
    listed = json.loads(manifest_path(target).read_text())["files"]
    assert [file["name"] for file in listed] == ["__0_0.distcp", "__1_0.distcp"]


def test_storage_options_are_the_strategys_own_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        ShardedSaves(FSDPStrategy(), guarded())({}, tmp_path / "c.ckpt", storage_options={})


def test_a_folder_that_is_half_removed_does_not_stand_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.ckpt"
    path.mkdir()
    (path / "__0_0.distcp").touch()
    seen: list[list[str]] = []
    unlink = os.unlink

    def looked(name: str | Path) -> None:
        seen.append([p.name for p in tmp_path.iterdir() if not p.name.startswith(".")])
        unlink(name)

    monkeypatch.setattr(os, "unlink", looked)
    GuardedCheckpointIO(TorchCheckpointIO(), lambda path: None).remove_checkpoint(path)
    assert seen == [[]]
    assert list(tmp_path.iterdir()) == []
