"""torch's zip archive: what torch.save writes is read, and whatever two readers could see differently is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, flip_bit, train_lightning
from torch.utils.serialization import config as save_config

from enstack_lightning.checkpoint import Options, Severity, Verdict, verify_checkpoint, zip_archive
from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import DefectKind, Facts, OddityKind
from enstack_lightning.checkpoint.inert_pickle import StorageDescriptor, TensorDescriptor
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.checkpoint.readers.torch_archive import MAX_DEFECTS, read_archive
from enstack_lightning.checkpoint.source import ContainerDefectError, LocalSource
from enstack_lightning.checkpoint.torch_file import MAX_SCALAR_BYTES, TorchFile
from enstack_lightning.checkpoint.zip_archive import MAX_RECORDS, ZipArchive

STATE = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(10),
    "empty": torch.zeros(0, 3),
    "view": torch.arange(100.0)[::3],
    "step": torch.tensor(7.0),
}


def facts_of(path: Path, deep: bool = False) -> Facts:
    with read_archive(locate(path), path.name, deep=DeepRead() if deep else None) as archive:
        return archive.complete(Facts(str(path)))


def messages(facts: Facts) -> str:
    return " | ".join(f"{d.kind} {d.where} {d.message}" for d in facts.defects)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "t.pt"
    torch.save(STATE, path)
    return path


# What torch.save writes


@pytest.fixture
def options() -> Iterator[object]:
    kept = save_config.save.compute_crc32, save_config.save.storage_alignment
    yield save_config.save
    save_config.save.compute_crc32, save_config.save.storage_alignment = kept


@pytest.mark.parametrize("name", ["t.pt", "with spaces and ä ß 漢.ckpt", "a.b.c", "step=7-loss=0.1.ckpt"])
@pytest.mark.parametrize("deep", [False, True])
def test_files_of_torch_are_read_without_complaint(name: str, deep: bool, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / name)
    facts = facts_of(tmp_path / name, deep)
    assert (facts.defects, facts.oddities) == ((), ())
    (file,) = facts.files
    assert (file.size, file.without_checksum) == ((tmp_path / name).stat().st_size, 0)
    assert (file.not_read == 0) is deep


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "t.pt", pickle_protocol=protocol)
    facts = facts_of(tmp_path / "t.pt", deep=True)
    assert not facts.defects
    refused = [(o.kind, o.where) for o in facts.oddities]
    assert refused == ([(OddityKind.REFUSED_OPCODE, "t.pt:data.pkl")] if protocol > 3 else [])
    with pytest.raises(pickle.UnpicklingError) if refused else nullcontext():
        torch.load(tmp_path / "t.pt", weights_only=True)


def test_files_saved_to_a_stream_are_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(STATE, stream)
    (tmp_path / "t.pt").write_bytes(stream.getvalue())
    assert facts_of(tmp_path / "t.pt").defects == ()


def test_a_file_without_checksums_says_so(options: object, tmp_path: Path) -> None:
    options.compute_crc32 = False  # type: ignore[attr-defined]
    torch.save(STATE, tmp_path / "t.pt")
    facts = facts_of(tmp_path / "t.pt", deep=True)
    with LocalSource(tmp_path / "t.pt") as source:
        size = sum(r.size for r in TorchFile(source).records.values())
    assert (facts.defects, facts.oddities, facts.files[0].without_checksum) == ((), (), size)


def test_storages_that_were_skipped_when_saving_have_no_checksum(tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save(STATE, tmp_path / "t.pt")
    facts = facts_of(tmp_path / "t.pt", deep=True)
    storages = 12 * 4 + 10 * 8 + 100 * 4 + 4
    assert (facts.defects, facts.oddities, facts.files[0].without_checksum) == ((), (), storages)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_storages_may_be_aligned_otherwise(alignment: int, options: object, tmp_path: Path) -> None:
    options.storage_alignment = alignment  # type: ignore[attr-defined]
    torch.save(STATE, tmp_path / "t.pt")
    assert (facts_of(tmp_path / "t.pt").defects, facts_of(tmp_path / "t.pt").oddities) == ((), ())


def test_numbers_of_a_machine_with_the_other_byte_order_are_swapped(tmp_path: Path) -> None:
    state = {"step": torch.tensor(struct.unpack("<f", struct.pack(">f", 12.5))[0])}
    torch.save(state, tmp_path / "l.pt")
    rewrite(tmp_path / "l.pt", tmp_path / "t.pt", {"byteorder": b"big"})
    with LocalSource(tmp_path / "t.pt") as source:
        file = TorchFile(source)
        assert file.read_scalar(file.read_pickle().tensors[0]) == 12.5
    assert torch.load(tmp_path / "t.pt", weights_only=True)["step"].item() == 12.5


SCALARS = [
    torch.tensor(value, dtype=getattr(torch, name))
    for name, value in {
        **dict.fromkeys(("float64", "float32", "float16", "bfloat16"), -1.5),
        **dict.fromkeys(("int64", "int32", "int16", "int8"), -3),
        **dict.fromkeys(("uint64", "uint32", "uint16", "uint8"), 200),
        "bool": True,
    }.items()
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda s: str(s.dtype))
def test_scalars_of_every_dtype_are_read(scalar: torch.Tensor, tmp_path: Path) -> None:
    others = torch.stack([torch.zeros_like(scalar), scalar])
    torch.save([scalar, scalar.reshape(1), others[1], others], tmp_path / "t.pt")
    with LocalSource(tmp_path / "t.pt") as source:
        file = TorchFile(source)
        values = [file.read_scalar(t) for t in file.read_pickle().value]
    assert values == [float(scalar)] * 3 + [None]


def test_archives_of_more_than_65535_records_are_read_and_quickly(tmp_path: Path) -> None:
    torch.save([torch.tensor(0.0) for _ in range(66_000)], tmp_path / "t.pt")
    began = time.process_time()
    with LocalSource(tmp_path / "t.pt") as source:
        file = TorchFile(source)
        assert len(file.records) > 66_000
        assert (file.defects, file.oddities) == ([], [])
        assert time.process_time() - began < 3


def test_records_beyond_four_gigabytes_are_read(tmp_path: Path) -> None:
    """Wide sizes and offsets in directory, headers and descriptors, as torch's own writer makes them."""
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(2**32 + 8, dtype=torch.uint8), "b": torch.ones(3)}, tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size > 2**32
    facts = facts_of(tmp_path / "t.pt")
    assert (facts.defects, facts.oddities) == ((), ())
    with LocalSource(tmp_path / "t.pt") as source:
        file = TorchFile(source)
        at = {n: r.offset for n, r in file.records.items()}
        assert at["data/1"] > 2**32
    # torch computes the same place from the header that it finds there.
    reader = torch._C.PyTorchFileReader(str(tmp_path / "t.pt"))
    assert {n: reader.get_record_offset(n) for n in at} == at


def test_offsets_of_payloads_are_those_of_torch(plain: Path) -> None:
    reader = torch._C.PyTorchFileReader(str(plain))
    with LocalSource(plain) as source:
        file = TorchFile(source)
        assert {n: r.offset for n, r in file.records.items()} == {n: reader.get_record_offset(n) for n in file.records}


# Archives by other writers


def rewrite(source: Path, target: Path, changes: dict[str, bytes | None] | None = None, **how: object) -> Path:
    """The records of a torch file in an archive that Python's zipfile writes; None leaves a record out."""
    changes = dict(changes or {})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        prefix = names[0].partition("/")[0]
        for name in sorted(names) if how.get("sort") else names:
            data = changes.pop(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(name, data, how.get("method", zipfile.ZIP_STORED))  # type: ignore[arg-type]
        for name, added in changes.items():
            new.writestr(f"{prefix}/{name}", added or b"")
    return target


@pytest.mark.parametrize("sort", [False, True])
def test_a_repacked_file_is_odd_and_no_more(sort: bool, plain: Path, tmp_path: Path) -> None:
    facts = facts_of(rewrite(plain, tmp_path / "r.pt", sort=sort), deep=True)
    assert facts.defects == ()
    assert [o.kind for o in facts.oddities] == [OddityKind.REPACKED]
    assert "records each has no descriptor" in facts.oddities[0].message


@pytest.mark.parametrize("sort", [False, True])
def test_a_replaced_record_shows_in_the_fingerprint(sort: bool, plain: Path, tmp_path: Path) -> None:
    other = struct.pack("<12f", *range(1, 13))
    facts = facts_of(rewrite(plain, tmp_path / "r.pt", {"data/0": other}, sort=sort))
    (defect,) = facts.defects
    assert (defect.kind, defect.where) == (DefectKind.REPLACED, "r.pt:.data/serialization_id")
    assert torch.load(tmp_path / "r.pt", weights_only=True)["a"][0, 0] == 1  # what torch makes of it


def test_a_replaced_record_in_an_otherwise_untouched_file_shows(plain: Path) -> None:
    with LocalSource(plain) as source:
        record = TorchFile(source).records["data/0"]
    data = bytearray(plain.read_bytes())
    data[record.offset : record.offset + 4] = struct.pack("<f", 99)
    new = zlib.crc32(data[record.offset : record.offset + record.size])
    assert data.count(struct.pack("<I", record.crc32)) == 2  # in the descriptor and in the directory
    plain.write_bytes(data.replace(struct.pack("<I", record.crc32), struct.pack("<I", new)))
    facts = facts_of(plain, deep=True)
    assert [d.kind for d in facts.defects] == [DefectKind.REPLACED]


def test_a_checksum_that_was_taken_out_is_told(plain: Path) -> None:
    with LocalSource(plain) as source:
        record = TorchFile(source).records["data/0"]
    data = plain.read_bytes().replace(struct.pack("<I", record.crc32), bytes(4))
    plain.write_bytes(data)
    facts = facts_of(plain, deep=True)
    assert [d.kind for d in facts.defects] == [DefectKind.REPLACED]
    assert facts.files[0].without_checksum == record.size
    assert "1 of its records has no checksum" in facts.oddities[0].message


def test_a_pickle_without_its_checksum_is_damaged(plain: Path) -> None:
    with LocalSource(plain) as source:
        record = TorchFile(source).records["data.pkl"]
    plain.write_bytes(plain.read_bytes().replace(struct.pack("<I", record.crc32), bytes(4)))
    assert "damaged t.pt:data.pkl its bytes have CRC-32" in messages(facts_of(plain))


# Bytes that torch and another reader could see differently


def edit(path: Path, old: bytes, new: bytes, which: int = 0) -> None:
    """Replaces the `which`-th occurrence; the length stays."""
    data, at = bytearray(path.read_bytes()), -1
    assert len(old) == len(new)
    for _ in range(which + 1):
        at = data.index(old, at + 1)
    data[at : at + len(old)] = new
    path.write_bytes(data)


def directory_entry(path: Path, name: str) -> int:
    """Where the directory's entry of a record begins."""
    data, at = path.read_bytes(), -1
    while True:
        at = data.index(b"PK\x01\x02", at + 1)
        length = struct.unpack_from("<H", data, at + 28)[0]
        if data[at + 46 : at + 46 + length].decode().partition("/")[2] == name:
            return at


def poke(path: Path, offset: int, form: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, value)
    path.write_bytes(data)


def local_header(path: Path, name: str) -> int:
    return int(struct.unpack_from("<I", path.read_bytes(), directory_entry(path, name) + 42)[0])


HEADERS: dict[str, Callable[[Path], object]] = {
    "other name in the header": lambda p: poke(p, local_header(p, "data/1") + 30 + 7, "<B", ord("3")),
    "other method in the header": lambda p: poke(p, local_header(p, "data/1") + 8, "<H", 8),
    "other flags in the header": lambda p: poke(p, local_header(p, "data/1") + 6, "<H", 0x0809),
    "encrypted in the directory": lambda p: poke(p, directory_entry(p, "data/1") + 8, "<H", 0x0809),
    "compressed in the directory": lambda p: poke(p, directory_entry(p, "data/1") + 10, "<H", 8),
    "other size in the directory": lambda p: poke(p, directory_entry(p, "data/1") + 24, "<I", 79),
    "both sizes smaller": lambda p: [poke(p, directory_entry(p, "data/1") + o, "<I", 72) for o in (20, 24)],
    "both sizes huge": lambda p: [poke(p, directory_entry(p, "data/1") + o, "<I", 2**31) for o in (20, 24)],
    "zip64 sizes that are not there": lambda p: poke(p, directory_entry(p, "data/1") + 24, "<I", 2**32 - 1),
    "other CRC in the directory": lambda p: poke(p, directory_entry(p, "data/1") + 16, "<I", 1),
    "a CRC for an empty record": lambda p: poke(p, directory_entry(p, "data/2") + 16, "<I", 1),
    "size in the header": lambda p: poke(p, local_header(p, "data/1") + 22, "<I", 4),
    "CRC in the header": lambda p: poke(p, local_header(p, "data/1") + 14, "<I", 4),
    "longer extra field": lambda p: poke(p, local_header(p, "data/1") + 28, "<H", 60_000),
    "header moved by one": lambda p: poke(p, directory_entry(p, "data/1") + 42, "<I", local_header(p, "data/1") + 1),
    "header of another": lambda p: poke(p, directory_entry(p, "data/1") + 42, "<I", local_header(p, "data/0")),
    "said to be a folder": lambda p: poke(p, directory_entry(p, "data/1") + 38, "<I", 0x10),
    "on another disk": lambda p: poke(p, directory_entry(p, "data/1") + 34, "<H", 1),
    "descriptor": lambda p: edit(p, b"PK\x07\x08", b"PK\x07\x09", 3),
    "first signature": lambda p: poke(p, local_header(p, "data/1"), "<B", 0),
    "names in capitals": lambda p: [edit(p, b"data/3", b"DATA/0", 0), edit(p, b"data/3", b"DATA/0", 0)],
    "names that leave the folder": lambda p: [edit(p, b"data/3", b"../../", 0), edit(p, b"data/3", b"../../", 0)],
    "one entry fewer": lambda p: poke(p, p.stat().st_size - 22 + 8, "<H", 3),
    "size of the zip64 directory's end": lambda p: poke(p, p.stat().st_size - 42 - 56 + 4, "<Q", 45),
    "zip64 locator": lambda p: poke(p, p.stat().st_size - 42 + 8, "<Q", 0),
    "parts": lambda p: poke(p, p.stat().st_size - 22 + 4, "<H", 1),
    "comment": lambda p: [poke(p, p.stat().st_size - 2, "<H", 3), p.write_bytes(p.read_bytes() + b"abc")],
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_disagree_are_defects(what: str, plain: Path) -> None:
    HEADERS[what](plain)
    facts = facts_of(plain)
    assert facts.defects, what
    assert verify_checkpoint(plain).verdict is Verdict.FAIL


# What torch writes is read many records at a time, anything else one by one: with the same outcome

SHORTCUTS = ("_columns_of_torch", "_as_torch_lays_out")

MIXED_SIZES = (3, 0, 4, 64, 65, 3_000, 4_096, 4_097, 70_000, 4, 100)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Records that are kept, read along or left out, and more small ones than are read at a time."""
    path = tmp_path / "m.pt"
    torch.save([torch.randint(255, (n,), dtype=torch.uint8) for n in (*MIXED_SIZES, *[4_000] * 40, *MIXED_SIZES)], path)
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Records on both sides of 4 GiB, some of that size: what of them takes more than 32 bits is in zip64 fields."""
    path = tmp_path / "w.pt"
    sizes = (5, 2**32 + 8, 3, 0, 2**32 - 1, 70_000)
    with torch.serialization.skip_data():
        torch.save([torch.empty(n, dtype=torch.uint8) for n in sizes], path)
    return path


def outcome(path: Path, without: tuple[str, ...] = ()) -> object:
    """The records and what is unlike torch, or the refusal; `without` these shortcuts."""
    with pytest.MonkeyPatch.context() as patch, LocalSource(path) as source:
        for shortcut in without:
            patch.setattr(zip_archive, shortcut, lambda *_: None)
        try:
            archive = ZipArchive(source)
        except ContainerDefectError as e:
            return e.kind, str(e), e.record
        return archive.records, archive.unlike_torch


def shortcuts_taken(path: Path) -> list[bool]:
    """Whether the directory was decoded at once, and whether the headers were compared run by run."""
    with LocalSource(path) as source:
        directory = zip_archive._find_directory(source)
        raw = source.read_at(directory.start, directory.end - directory.start)
        columns = zip_archive._read_directory(source, directory)
        layout = zip_archive._as_torch_lays_out(columns, directory.start)
        compared = layout and zip_archive._payloads_between(source, columns, layout)
        return [zip_archive._columns_of_torch(raw, directory.entries) is not None, compared is not None]


def test_what_torch_writes_is_read_many_records_at_a_time(plain: Path, mixed: Path, wide: Path) -> None:
    for path in (plain, mixed, wide):
        assert shortcuts_taken(path) == [True, True]
        assert outcome(path) == outcome(path, SHORTCUTS)
    with LocalSource(wide) as source:
        records = ZipArchive(source).records.values()
    assert {(r.size > 2**32 - 2, r.header_offset > 2**32 - 2) for r in records} == set(product((False, True), repeat=2))


def test_small_payloads_are_kept_as_they_are(mixed: Path) -> None:
    data = mixed.read_bytes()
    with LocalSource(mixed) as source:
        archive = ZipArchive(source)
        assert {len(archive.kept[f"data/{i}"]) for i, n in enumerate(MIXED_SIZES) if n <= 64} == {0, 3, 4, 64}
        assert "version" in archive.kept
        assert all(len(kept) <= 64 for kept in archive.kept.values())
        for name, kept in archive.kept.items():
            record = archive.records[name]
            assert kept == data[record.offset : record.offset + record.size]


def test_kept_payloads_are_not_read_again_and_are_compared_with_their_checksum(mixed: Path) -> None:
    class Counted(LocalSource):
        reads = 0

        def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
            self.reads += 1
            return super().read_at(offset, count, what)

    for damaged in (False, True):
        with Counted(mixed) as source:
            file = TorchFile(source)
            before = source.reads
            with pytest.raises(ContainerDefectError, match="have changed") if damaged else nullcontext():
                assert len(file.read("data/2")) == 4
            assert source.reads == before
        record = file.records["data/2"]
        poke(mixed, record.offset + 3, "<B", mixed.read_bytes()[record.offset + 3] ^ 1)


@pytest.mark.parametrize("name", ["version", "byteorder", ".data/serialization_id", "data/5"])
def test_a_flip_within_a_payload_that_is_read_along_with_headers_is_found(name: str, mixed: Path) -> None:
    with LocalSource(mixed) as source:
        record = TorchFile(source).records[name]
    poke(mixed, record.offset, "<B", mixed.read_bytes()[record.offset] ^ 1)
    assert shortcuts_taken(mixed) == [True, True]
    # Only of a tensor's values nothing is said until they are asked for.
    assert bool(facts_of(mixed).defects) is not name.startswith("data/")
    assert f"damaged m.pt:{name} its bytes have CRC-32" in messages(facts_of(mixed, deep=True))


@pytest.mark.parametrize("archive", ["plain", "wide"])
def test_a_flip_anywhere_in_the_directory_has_the_same_outcome_at_once_and_one_by_one(
    archive: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(archive)
    with LocalSource(path) as source:
        directory = zip_archive._find_directory(source)
    for at in range(directory.start, directory.end):
        for bit in (at % 8, (at + 4) % 8):
            flip_bit(path, at, bit)
            assert outcome(path) == outcome(path, SHORTCUTS), (at - directory.start, bit)
            flip_bit(path, at, bit)


@pytest.mark.parametrize(("archive", "step"), [("mixed", 7), ("wide", 1)])
def test_a_flip_anywhere_beside_payloads_has_the_same_outcome_in_runs_and_one_by_one(
    archive: str, step: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(archive)
    with LocalSource(path) as source:
        records = list(ZipArchive(source).records.values())
        end = zip_archive._find_directory(source).start
    begin, beside = 0, []
    for record in records:
        beside += range(begin, record.offset)
        begin = record.offset + record.size
    beside += range(begin, end)
    for at in beside[::step]:
        flip_bit(path, at, at % 8)
        assert shortcuts_taken(path) == [True, False], at
        assert outcome(path) == outcome(path, SHORTCUTS), at
        flip_bit(path, at, at % 8)


# Where in a directory's entry which field stands, a value that torch does not write there, and what is said of it.
UNUSUAL: dict[str, tuple[int, str, int, str]] = {
    "version made by": (4, "<H", 0x031E, ""),
    "version needed": (6, "<H", 20, ""),
    "time": (12, "<H", 1, ""),
    "date": (14, "<H", 33, ""),
    "internal attributes": (36, "<H", 1, ""),
    "external attributes": (38, "<I", 0x81A40000, ""),
    "flags": (8, "<H", 0x0809, "it has flags 0x0809"),
    "method": (10, "<H", 8, "it is compressed (method 8)"),
    "name one shorter": (28, "<H", 7, "has no entry at byte"),
    "name one longer": (28, "<H", 9, "has no entry at byte"),
    "no name": (28, "<H", 0, "has no entry at byte"),
    "name beyond the directory": (28, "<H", 1_024, "has no entry at byte"),
    "extra field": (30, "<H", 1, "has no entry at byte"),
    "comment": (32, "<H", 1, "a folder, to have a comment"),
    "disk": (34, "<H", 1, "a folder, to have a comment"),
    "folder": (38, "<I", 0x10, "a folder, to have a comment"),
}


@pytest.mark.parametrize("field", UNUSUAL)
def test_an_entry_that_differs_in_one_field_is_read_by_itself(field: str, plain: Path) -> None:
    offset, form, value, message = UNUSUAL[field]
    with LocalSource(plain) as source:
        records = ZipArchive(source).records
    poke(plain, directory_entry(plain, "data/1") + offset, form, value)
    assert outcome(plain) == outcome(plain, SHORTCUTS)
    if message:
        assert message in outcome(plain)[1]  # type: ignore[index]
    else:
        assert shortcuts_taken(plain) == [False, True]
        assert outcome(plain) == (records, {})


# Of which record of the wide archive, where in its entry, a value that torch does not write there, what is said of it.
UNUSUAL_WIDE: dict[str, tuple[str, int, str, int, str]] = {
    "a size in a field that is not there": ("data/0", 24, "<I", 2**32 - 1, "lacks its zip64 sizes"),
    "both sizes in a field that is not there": ("data/0", 20, "<Q", 2**64 - 1, "lacks its zip64 sizes"),
    "an offset in a field that is not there": ("data.pkl", 42, "<I", 2**32 - 1, "lacks its zip64 sizes"),
    "two sizes in a field of an offset": ("data/2", 20, "<Q", 2**64 - 1, "lacks its zip64 sizes"),
    "an offset in a field of two sizes": ("data/1", 42, "<I", 2**32 - 1, "lacks its zip64 sizes"),
    "an offset beside its field": ("data/2", 42, "<I", 0, "its header disagrees with the archive's directory"),
    "sizes beside their field": ("data/1", 20, "<Q", 5 * (2**32 + 1), "lie between its end and the next record"),
    "another size in the field": ("data/1", 46 + 8 + 4, "<Q", 2**32 + 7, "it is compressed"),
    "another kind of field": ("data/2", 46 + 8, "<H", 2, "lacks its zip64 sizes"),
    "a field that ends early": ("data/2", 46 + 8 + 2, "<H", 7, "lacks its zip64 sizes"),
    "a field that says to be longer": ("data/2", 46 + 8 + 2, "<H", 80, ""),
    "a longer name": ("data/2", 28, "<H", 9, "lacks its zip64 sizes"),
    "a longer extra field": ("data/2", 30, "<H", 13, "has no entry at byte"),
    "a shorter extra field": ("data/2", 30, "<H", 11, "lacks its zip64 sizes"),
    "flags": ("data/2", 8, "<H", 0x0809, "it has flags 0x0809"),
}


@pytest.mark.parametrize("field", UNUSUAL_WIDE)
def test_a_wide_entry_that_differs_in_one_field_is_read_by_itself(field: str, wide: Path) -> None:
    name, offset, form, value, message = UNUSUAL_WIDE[field]
    with LocalSource(wide) as source:
        start, end, _ = zip_archive._find_directory(source)
        entry = start + source.read_at(start, end - start).index(f"w/{name}".encode()) - 46
    records = outcome(wide)
    with wide.open("r+b") as file:
        file.seek(entry + offset)
        file.write(struct.pack(form, value))
    assert outcome(wide) == outcome(wide, SHORTCUTS)
    if message:
        assert message in outcome(wide)[1]  # type: ignore[index]
    else:
        assert shortcuts_taken(wide) == [False, True]
        assert outcome(wide) == records


def renamed(path: Path, old: bytes, new: bytes) -> None:
    """Gives a record another name of the same length, in its header and in the directory."""
    data = path.read_bytes()
    assert (data.count(old), len(old)) == (2, len(new))
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"t/data/0", "it is in the archive more than once"),
        (b"t/DATA/0", "it is in the archive more than once"),
        (b"T/data/3", "does not lie in the archive's one folder"),
        (b"u/data/3", "does not lie in the archive's one folder"),
        (b"tdata//3", "does not lie in the archive's one folder"),
        (b"t/data//", "does not lie in the archive's one folder"),
        (b"t/dat/..", "does not lie in the archive's one folder"),
        (b"t/../a/3", "does not lie in the archive's one folder"),
        (b"t/./ta/3", "does not lie in the archive's one folder"),
        (b"t//ata/3", "does not lie in the archive's one folder"),
        (b"t/data\\3", "does not lie in the archive's one folder"),
        (b"t/data\0003", "does not lie in the archive's one folder"),
        (b"t\0t/ta/3", "does not lie in the archive's one folder"),
        (b"t/data/\xff", "is not UTF-8"),
        (b"/data/03", "does not lie in the archive's one folder"),
        (b"data.pkl", "does not lie in the archive's one folder"),
        (b"t/dat/.3", ""),
        (b"t/d..a/3", ""),
        (b"t/Data/9", ""),
        (b"t/dat/\xc3\xa4", ""),
        (b"t/PK\x01\x02/3", ""),
    ],
)
def test_a_name_is_judged_alike_at_once_and_one_by_one(name: bytes, message: str, plain: Path) -> None:
    renamed(plain, b"t/data/3", name)
    assert outcome(plain) == outcome(plain, SHORTCUTS)
    if message:
        assert message in outcome(plain)[1]  # type: ignore[index]
    else:
        assert name.decode().partition("/")[2] in outcome(plain)[0]  # type: ignore[index]


def test_entries_in_another_order_give_the_same_records(plain: Path) -> None:
    with LocalSource(plain) as source:
        start, end, _ = zip_archive._find_directory(source)
    data = plain.read_bytes()
    records = outcome(plain)
    magic = b"PK\x01\x02"
    entries = data[start:end].split(magic)[1:]
    plain.write_bytes(data[:start] + b"".join(magic + entry for entry in reversed(entries)) + data[end:])
    assert shortcuts_taken(plain) == [False, True]
    assert outcome(plain) == records


@pytest.mark.parametrize(
    ("size", "others"),
    [(2**42, ()), (0, (2**62, 2**62 + 10)), (0, (2**63, 2**64 - 1)), (2**64 - 1, (2**63 - 1, 2**63, 2**64 - 1))],
)
def test_places_far_behind_the_end_of_a_small_file_are_refused(
    size: int, others: tuple[int, ...], tmp_path: Path
) -> None:
    """The first record is said to reach up to the second, or that and others are said to lie beyond any file."""
    name, padding = b"a/data.pkl", b"FB" + struct.pack("<H", 20) + b"Z" * 20
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(name), len(padding)) + name + padding
    entries = b""
    offsets = (0, *(others or [len(header) + size + 16]))
    for n, at in enumerate(offsets):
        path = name if n == 0 else b"a/data/%d" % n
        wide = struct.pack("<2H3Q", 1, 24, size, size, at)
        fixed = (b"PK\1\2", 0, 0, 0x0808, 0, 0, 0, 7, 2**32 - 1, 2**32 - 1, len(path), len(wide), 0, 0, 0, 0, 2**32 - 1)
        entries += struct.pack("<4s6H3I5H2I", *fixed) + path + wide
    count = len(offsets)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(entries), len(header), 0)
    (tmp_path / "o.pt").write_bytes(header + entries + end)
    assert outcome(tmp_path / "o.pt") == outcome(tmp_path / "o.pt", SHORTCUTS)
    assert f"begins at byte {offsets[-1]:,}, and the archive's directory at byte 64" in messages(
        facts_of(tmp_path / "o.pt")
    )
    assert verify_checkpoint(tmp_path / "o.pt").verdict is Verdict.FAIL


def test_signatures_without_end_are_refused(plain: Path) -> None:
    """More of them than the directory has entries; as many as are told of, and no name between them."""
    with LocalSource(plain) as source:
        start, end, count = zip_archive._find_directory(source)
    data = plain.read_bytes()
    for directory in (b"PK\x01\x02" * ((end - start) // 4), (b"PK\x01\x02" + bytes(42)) * count):
        tail = bytearray(data[-22:])
        struct.pack_into("<I", tail, 12, len(directory))
        plain.write_bytes(data[:start] + directory + tail)
        assert outcome(plain) == outcome(plain, SHORTCUTS)
        assert "has no entry at byte" in outcome(plain)[1]  # type: ignore[index]


def with_gap(source: Path, target: Path, before: int) -> None:
    """Bytes that belong to no record stand before one of them, and all offsets say so."""
    target.touch()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "a") as new:
        for n, name in enumerate(old.namelist()):
            if n == before:
                new.fp.seek(new.start_dir)  # type: ignore[union-attr, attr-defined]
                new.fp.write(b"PK\x03\x04")  # type: ignore[union-attr]
                new.start_dir += 4  # type: ignore[attr-defined]
            new.writestr(name, old.read(name))


def added(path: Path, name: str, data: bytes = b"x") -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, data)


CONTENTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "bytes behind": (lambda p, o: o.write_bytes(p.read_bytes() + b"abc"), "3 bytes follow the end of the archive"),
    "bytes before": (lambda p, o: o.write_bytes(b"PK\x03\x04" + p.read_bytes()), "damaged"),
    "bytes before the first record": (
        lambda p, o: with_gap(p, o, 0),
        "4 bytes stand before the archive's first record",
    ),
    "bytes between two records": (lambda p, o: with_gap(p, o, 2), "; the record before it ends at byte "),
    "a pickle beyond all bounds": (
        lambda p, o: rewrite(p, o, {"data.pkl": bytes(64 * 2**20 + 1)}),
        "data.pkl it has 67,108,865 bytes; the limit is 64 MiB",
    ),
    "half": (lambda p, o: o.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "it was cut off"),
    "deflated": (lambda p, o: rewrite(p, o, method=zipfile.ZIP_DEFLATED), "compressed (method 8)"),
    "no version": (lambda p, o: rewrite(p, o, {"version": None}), "version it is missing"),
    "version 99": (lambda p, o: rewrite(p, o, {"version": b"99\n"}), "torch reads versions 1 to 10"),
    "version 0": (lambda p, o: rewrite(p, o, {"version": b"0\n"}), "torch reads versions 1 to 10"),
    "version text": (lambda p, o: rewrite(p, o, {"version": b"3.0"}), "torch reads versions 1 to 10"),
    "version long": (lambda p, o: rewrite(p, o, {"version": b"3" * 5_000}), "5,000 bytes; torch writes a few"),
    "byteorder": (lambda p, o: rewrite(p, o, {"byteorder": b"middle"}), "b'middle'; torch reads"),
    "byte order in capitals": (
        lambda p, o: rewrite(p, o, {"byteorder": None, "BYTEORDER": b"big"}),
        "takes it for byteorder",
    ),
    "code in capitals": (lambda p, o: rewrite(p, o, {"Constants.pkl": b"x"}), "takes it for constants.pkl"),
    "alignment": (lambda p, o: rewrite(p, o, {".storage_alignment": b"0"}), "where a number of bytes is needed"),
    "no fingerprint": (lambda p, o: rewrite(p, o, {".data/serialization_id": b"1" * 39}), "40 digits are needed"),
    "no storage": (lambda p, o: rewrite(p, o, {"data/1": None}), "data/1 it is missing"),
    "short storage": (lambda p, o: rewrite(p, o, {"data/1": bytes(79)}), "79 bytes and its tensor needs 80"),
    "long storage": (lambda p, o: rewrite(p, o, {"data/1": bytes(88)}), "88 bytes and its tensor needs 80"),
    "no pickle": (lambda p, o: rewrite(p, o, {"data.pkl": None}), "without data.pkl"),
    "TorchScript": (lambda p, o: rewrite(p, o, {"constants.pkl": b"\x80\x02)."}), "contains code"),
    "twice": (lambda p, o: rewrite(p, o, {"DATA.pkl": b"\x80\x02N."}), "in the archive more than once"),
    "other folder": (lambda p, o: added(rewrite(p, o), "else/x"), "does not lie in the archive's one folder"),
    "top level": (lambda p, o: added(rewrite(p, o), "x"), "does not lie in the archive's one folder"),
    "parent": (lambda p, o: added(rewrite(p, o), "t/../../x"), "does not lie in the archive's one folder"),
    "backslash": (lambda p, o: added(rewrite(p, o), "t/..\\x"), "does not lie in the archive's one folder"),
    "empty archive": (lambda p, o: zipfile.ZipFile(o, "w").close(), "unrecognised"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", CONTENTS)
def test_archives_that_are_not_torchs_are_defects(what: str, plain: Path, tmp_path: Path) -> None:
    make, message = CONTENTS[what]
    make(plain, tmp_path / "o.pt")
    assert message in messages(facts_of(tmp_path / "o.pt"))
    assert verify_checkpoint(tmp_path / "o.pt").verdict is Verdict.FAIL


def test_a_truncated_file_is_found_whatever_its_length(plain: Path, tmp_path: Path) -> None:
    data = plain.read_bytes()
    for size in {*range(0, len(data), 7), *range(len(data) - 200, len(data))}:
        (tmp_path / "o.pt").write_bytes(data[:size])
        assert facts_of(tmp_path / "o.pt").defects, size


def test_records_that_the_pickle_does_not_name_are_odd(plain: Path, tmp_path: Path) -> None:
    hidden = {"extra.bin": b"123", "data/99": bytes(4), "other.pkl": pickle.dumps(print)}
    facts = facts_of(rewrite(plain, tmp_path / "o.pt", dict(hidden)))
    found = {o.where: o.message for o in facts.oddities if o.kind is OddityKind.UNREFERENCED_RECORD}
    assert found.keys() == {f"o.pt:{name}" for name in hidden}
    assert "begins like a pickle" in found["o.pt:other.pkl"]


def test_a_damaged_pickle_is_a_defect_and_its_names_are_told_all_the_same(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    whole, changed, cut = tmp_path / "whole.pt", tmp_path / "changed.pt", tmp_path / "cut.pt"
    torch.save([Runs(), "text that will change"], whole)
    rewrite(whole, cut, {"data.pkl": b"\x80\x02cposix\nsystem\nX\xff\xff\x00\x00"})
    changed.write_bytes(whole.read_bytes())
    edit(changed, b"text that will change", b"text that was changed")
    assert "data.pkl its bytes have CRC-32" in messages(facts_of(changed))
    assert "data.pkl it cannot be read" in messages(facts_of(cut))
    for path in (whole, changed, cut):
        assert [str(g) for g in facts_of(path).globals] == ["posix.system"]


# Tensors and their storages


def described(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, **other: object) -> TensorDescriptor:
    storage = StorageDescriptor("0", "float32", 12, "cpu")
    return TensorDescriptor(other.get("storage", storage), "float32", shape, stride, offset)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (described((3, 4), (4, 1)), ""),
        (described((12,), (1,)), ""),
        (described((0, 99), (99, 1)), ""),
        (described((), ()), ""),
        (described((5, 3), (0, 4)), ""),
        (described((13,), (1,)), "needs 52 bytes of its storage, which has 48"),
        (described((12,), (1,), 1), "needs 52 bytes"),
        (described((3, 4), (5, 1)), "needs 56 bytes"),
        (described((3,), (-1,), 5), "negative dimension or stride"),
        (described((-3,), (1,)), "negative dimension or stride"),
        (described((3,), (1,), -1), "damaged"),
        (described((3,), ()), "1 dimensions and 0 strides"),
        (described((1,) * 65, (1,) * 65), "65 dimensions"),
        (described((2**62,) * 64, (1,) * 64), "needs"),
        (
            described((3,), (1,), storage=StorageDescriptor("0", "float32", 2**50, "cpu")),
            "48 bytes and its tensor needs",
        ),
        (described((3,), (1,), storage=StorageDescriptor("0", "float32", -1, "cpu")), "48 bytes and its tensor needs"),
        (described((3,), (1,), storage=StorageDescriptor("77", "float32", 12, "cpu")), "missing"),
        (described((3,), (1,), storage=StorageDescriptor("../version", "uint8", 2, "cpu")), "missing"),
    ],
)
def test_tensors_lie_within_their_storages(tensor: TensorDescriptor, message: str, plain: Path) -> None:
    with LocalSource(plain) as source:
        file = TorchFile(source)
        found = [f"{e.kind} {e}" for e in file.check_storages([tensor])]
        assert file.oddities == []
        assert len(found) == bool(message)
        assert all(message in said for said in found)


@pytest.mark.parametrize("sizes", [(2**40, 10), (3, 4, 65), (2**62,) * 64])
def test_a_tensor_that_stands_for_far_more_than_it_holds_is_odd(sizes: tuple[int, ...], plain: Path) -> None:
    with LocalSource(plain) as source:
        file = TorchFile(source)
        assert not list(file.check_storages([described(sizes, (0,) * len(sizes))]))
    assert [o.kind for o in file.oddities] == [OddityKind.LOGICAL_SIZE]


def test_defects_without_end_are_counted(tmp_path: Path) -> None:
    torch.save([torch.ones(1) for _ in range(3_000)], tmp_path / "t.pt")
    rewrite(tmp_path / "t.pt", tmp_path / "o.pt", {f"data/{i}": None for i in range(3_000)})
    facts = facts_of(tmp_path / "o.pt")
    assert len(facts.defects) == MAX_DEFECTS + 1
    assert "2,9" in facts.defects[-1].message


def test_storages_of_scalars_are_read_within_a_bound(tmp_path: Path) -> None:
    storages = [torch.zeros(2**14)[0] for _ in range(MAX_SCALAR_BYTES // 2**16 + 2)]
    torch.save(storages, tmp_path / "t.pt")
    with LocalSource(tmp_path / "t.pt") as source:
        file = TorchFile(source)
        tensors = file.read_pickle().value
        assert [file.read_scalar(tensors[0]) for _ in range(1_000)] == [0.0] * 1_000
        for tensor in tensors[:-2]:
            file.read_scalar(tensor)
        with pytest.raises(ContainerDefectError, match="the storages of scalars take more than"):
            file.read_scalar(tensors[-1])


def test_a_scalar_lies_within_its_storage(plain: Path) -> None:
    with LocalSource(plain) as source:
        file = TorchFile(source)
        assert file.read_scalar(described((), (), 11)) == 11.0
        for offset in (12, -1):
            with pytest.raises(ContainerDefectError, match="shorter than the tensor in it"):
                file.read_scalar(described((), (), offset))


def test_a_damaged_scalar_is_found_without_deep(tmp_path: Path) -> None:
    state = {"state": {0: {"step": torch.tensor(1234.5)}}, "param_groups": [{"params": [0]}]}
    torch.save({"optimizer_states": [state], "pytorch-lightning_version": "2.6"}, tmp_path / "t.ckpt")
    edit(tmp_path / "t.ckpt", struct.pack("<f", 1234.5), struct.pack("<f", 1235.5))
    assert "damaged t.ckpt:data/0 its bytes have CRC-32" in messages(verify_checkpoint(tmp_path / "t.ckpt").facts)


def test_the_same_damage_is_one_defect(tmp_path: Path, plain: Path) -> None:
    with LocalSource(plain) as source:
        offset = TorchFile(source).records["data.pkl"].offset + 20
    poke(plain, offset, "<B", 0)
    report = verify_checkpoint(plain, Options(deep=True))
    assert len([d for d in report.facts.defects if d.where.endswith("data.pkl") and "CRC" in d.message]) <= 2


def test_a_file_that_changes_while_it_is_read_is_a_defect(plain: Path) -> None:
    with read_archive(locate(plain), "t.pt") as archive:
        plain.write_bytes(plain.read_bytes() + b"x")
        facts = archive.complete(Facts("t.pt"))
    assert "it changed while it was read" in messages(facts)


def test_an_archive_of_hostile_size_is_refused_quickly(tmp_path: Path) -> None:
    """The largest directory that is read at all, and one that is too large."""
    for count in (MAX_RECORDS, MAX_RECORDS + 1):
        entries, headers = [], []
        for i in range(count):
            name = b"a/%d" % i
            entries.append(
                struct.pack(
                    "<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, len(b"".join(()))
                )
                + name
            )
            headers.append(struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name)
        offset, fixed = 0, []
        for entry, header in zip(entries, headers, strict=True):
            fixed.append(entry[:42] + struct.pack("<I", offset) + entry[46:])
            offset += len(header)
        body, directory = b"".join(headers), b"".join(fixed)
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, len(directory), offset)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(directory), 1)
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), offset, 0)
        (tmp_path / "o.pt").write_bytes(body + directory + end64 + locator + end)
        began = time.process_time()
        assert facts_of(tmp_path / "o.pt").defects
        assert time.process_time() - began < 3
    with LocalSource(tmp_path / "o.pt") as source, pytest.raises(ContainerDefectError, match="more than 100,000 ent"):
        ZipArchive(source)


@pytest.mark.parametrize("where", ["state_dict", "optimizer_states"])
def test_tensors_without_values_are_a_defect(where: str, tmp_path: Path) -> None:
    def lost(state: dict[str, Any]) -> None:
        held = state["state_dict"] if where == "state_dict" else state["optimizer_states"][0]["state"][0]
        held["layer.bias" if where == "state_dict" else "exp_avg"] = torch.empty(2, device="meta")

    checkpoint = edited(next(train_lightning(tmp_path / "run").glob("*.ckpt")), tmp_path / "c.ckpt", lost)
    report = verify_checkpoint(checkpoint, Options(purpose="inference"))
    assert "have no values in it" in str(report.of(Severity.ERROR))


NAN = torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": NAN}, "a.b": torch.ones(2)},
        {"a.b": torch.ones(2), "a": {"b": NAN}},
        {0: NAN, "0": torch.ones(2)},
        {"0": torch.ones(2), 0: NAN},
        {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": {"j": NAN}}}}}}}}}, "w": torch.ones(2)},
    ],
)
def test_a_nan_is_found_under_any_name(state: dict[Any, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "t.pt")
    report = verify_checkpoint(tmp_path / "t.pt", Options(deep=True, purpose="inference"))
    assert "CK603" in {f.code for f in report.of(Severity.ERROR)}
