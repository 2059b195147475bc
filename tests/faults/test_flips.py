"""Flipped bits, cut files and blocks of zeros, in checkpoints of every format.

Where a format carries checksums, reading every byte finds each flip that changes what would be loaded. Where it carries
none, the report says so ("not checkable without a manifest"), and with a manifest every flip is found.

The long form (`make faults`) flips every single bit of a small checkpoint a format, and 10,000 random ones of a larger.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from flips import (
    DEEP_INFERENCE,
    KINDS,
    UNREAD,
    campaign,
    campaign_on_all_cores,
    every_bit,
    files_of,
    lengths,
    random_bits,
    safetensors_file,
    without_checksum,
)

from enstack_lightning.checkpoint import Verdict, verify_checkpoint
from enstack_lightning.checkpoint.manifest import write_manifest


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_flips(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    outcomes = campaign(name, path, random_bits(path, 250))
    assert not outcomes.missed, outcomes.missed[:20]
    assert outcomes.counts["found"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_flips_with_a_manifest(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    write_manifest(path)
    outcomes = campaign(name, path, random_bits(path, 100))
    assert (outcomes.missed, outcomes.counts) == ([], {"found": 100})


@pytest.mark.faults_long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_bit_of_a_small_checkpoint(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    outcomes = campaign_on_all_cores(name, path, every_bit(path))
    outcomes.show(f"{name}, every bit")
    assert not outcomes.missed, outcomes.missed[:20]


@pytest.mark.faults_long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_random_bits_of_a_larger_checkpoint(name: str, tmp_path: Path) -> None:
    path = KINDS[name].large(tmp_path)
    outcomes = campaign_on_all_cores(name, path, random_bits(path, 10_000))
    outcomes.show(f"{name}, random bits")
    assert not outcomes.missed, outcomes.missed[:20]


@pytest.mark.faults_long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_flip_is_found_with_a_manifest(name: str, tmp_path: Path) -> None:
    path = KINDS[name].large(tmp_path)
    write_manifest(path)
    outcomes = campaign_on_all_cores(name, path, random_bits(path, 10_000))
    outcomes.show(f"{name}, random bits, with a manifest")
    assert (outcomes.missed, outcomes.counts) == ([], {"found": 10_000})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_cut_is_found_without_reading_every_byte(name: str, tmp_path: Path) -> None:
    """At every record's border and around it, and at 500 random lengths of each file that loading reads."""
    path = KINDS[name].small(tmp_path)
    quick = dataclasses.replace(KINDS[name].options, deep=False)
    for file in files_of(path).values():
        if file.name == UNREAD:
            continue
        whole = file.read_bytes()
        needed = len(whole.rstrip()) if file.suffix == ".json" else len(whole)  # the last line's end says nothing
        for length in lengths(file, 500 if len(files_of(path)) == 1 else 60):
            if length >= needed:
                continue
            file.write_bytes(whole[:length])
            report = verify_checkpoint(path, quick)
            assert report.verdict is Verdict.FAIL, (file.name, length, len(whole))
        file.write_bytes(whole)
    assert verify_checkpoint(path, quick).verdict is Verdict.PASS


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_block_of_zeros_over_tensors_is_found(name: str, tmp_path: Path) -> None:
    """As a crash of the machine leaves it, where a page had not reached the disk."""
    path = KINDS[name].large(tmp_path)
    open_files = without_checksum(verify_checkpoint(path, KINDS[name].options))
    if open_files:
        write_manifest(path)
    draw = random.Random(2)
    for file in files_of(path).values():
        if file.stat().st_size < 8_192:
            continue
        whole = file.read_bytes()
        for start in [draw.randrange(len(whole) - 4_096) for _ in range(20)]:
            file.write_bytes(whole[:start] + bytes(4_096) + whole[start + 4_096 :])
            if file.read_bytes() != whole:
                report = verify_checkpoint(path, KINDS[name].options)
                assert report.verdict is Verdict.FAIL, (file.name, start)
        file.write_bytes(whole)


def test_damage_without_a_checksum_is_never_called_verified(tmp_path: Path) -> None:
    path = safetensors_file(100)(tmp_path)
    report = verify_checkpoint(path, DEEP_INFERENCE)
    said = [f.message for f in report.findings if f.code == "CK108"]
    assert said
    assert "not checkable without a manifest" in said[0]
    write_manifest(path)
    report = verify_checkpoint(path, DEEP_INFERENCE)
    assert not [f for f in report.findings if f.code == "CK108"]
