"""What stands on a disk is asked for all at once where it is not in memory, and read the same in every case."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from enstack_lightning.checkpoint import verify_checkpoint
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.zip_archive import ZipArchive

RECORDS = 24
RECORD_BYTES = 1_000_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.pt"
    torch.save({f"w{i}": torch.rand(RECORD_BYTES // 4) for i in range(RECORDS)}, path)
    return path


def is_in_memory(path: Path, offset: int) -> bool:
    """As mincore(2) says, which brings nothing into memory, as a read that must not wait may do."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        resident = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE + 1))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), resident
        )
        del first
    assert not failed
    return bool(resident[offset // mmap.PAGESIZE] & 1)


def drop_from_memory(path: Path) -> None:
    """Until the kernel has let go of all: pages that another process's writing holds up stay at the first call."""
    until = time.monotonic() + 20
    with path.open("rb") as file:
        while True:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(is_in_memory(path, offset) for offset in range(0, path.stat().st_size, RECORD_BYTES)):
                return
            if time.monotonic() > until:
                pytest.skip("this system keeps files in memory")
            time.sleep(0.05)


class Watched(LocalSource):
    """Notes what it was asked for beforehand and what was read after that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[tuple[int, int]] = []
        self.read: list[tuple[int, int]] = []

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.asked = list(ranges)
        self.read.clear()

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        self.read.append((offset, count))
        return super().read_at(offset, count, what)


def test_ranges_of_a_file_that_is_not_in_memory_are_brought_there_and_nothing_else(large: Path) -> None:
    drop_from_memory(large)
    ranges = [(i * 4 * RECORD_BYTES, 100) for i in (3, 1, 4)]
    with LocalSource(large) as source:
        source.prefetch(ranges)
    until = time.monotonic() + 30
    while not all(is_in_memory(large, offset) for offset, _ in ranges) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(is_in_memory(large, offset) for offset, _ in ranges)
    assert not any(is_in_memory(large, offset + 2 * RECORD_BYTES) for offset, _ in ranges)


def test_nothing_is_asked_for_where_the_first_range_is_in_memory(large: Path) -> None:
    drop_from_memory(large)
    with LocalSource(large) as source:
        source.read_at(0, 1)
        source.prefetch([(0, 1), (20 * RECORD_BYTES, 100)])
        time.sleep(0.2)
    assert not is_in_memory(large, 20 * RECORD_BYTES)


def test_all_that_an_archive_is_checked_by_is_asked_for_beforehand(large: Path) -> None:
    with Watched(large) as source:
        ZipArchive(source)
    assert len(source.read) > RECORDS
    for offset, count in source.read:
        inside = [
            (start, length) for start, length in source.asked if start < offset + count and offset < start + length
        ]
        assert sum(min(offset + count, s + n) - max(offset, s) for s, n in inside) >= count, (offset, count)
    assert sum(length for _, length in source.asked) < RECORDS * RECORD_BYTES / 100


def test_small_records_are_read_with_the_headers_around_them_and_asked_for_beforehand(tmp_path: Path) -> None:
    sizes = [4, 1_000, RECORD_BYTES, 1, 1_024, 1_025] * 4 + [1_000] * 100 + [RECORD_BYTES]
    torch.save([torch.rand(size) for size in sizes], tmp_path / "mixed.pt")
    with Watched(tmp_path / "mixed.pt") as source:
        ZipArchive(source)
    assert len(source.read) < len(sizes) / 4
    assert max(count for _, count in source.read) < 70_000
    asked = sorted(source.asked)
    for offset, count in source.read:
        covered = offset
        for start, length in asked:
            if start <= covered < start + length:
                covered = start + length
        assert covered >= offset + count, (offset, count)


@pytest.mark.parametrize("lacking", ["RWF_NOWAIT", "preadv"])
def test_a_system_that_cannot_tell_reads_the_same(large: Path, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = verify_checkpoint(large)
    drop_from_memory(large)
    monkeypatch.delattr(os, lacking)
    report = verify_checkpoint(large)
    assert (report.verdict, report.findings, report.facts) == (expected.verdict, expected.findings, expected.facts)


def test_an_empty_list_of_ranges_asks_for_nothing(large: Path) -> None:
    with LocalSource(large) as source:
        source.prefetch(())
        assert source.read_at(0, 2) == b"PK"
