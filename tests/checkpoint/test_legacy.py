"""Files of torch before 1.6: read as torch reads them, their end known to the byte, nothing believed of their sizes."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from enstack_lightning.checkpoint.deep import DeepRead, Named, read_deeply
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.legacy_file import MAGIC_NUMBER, LegacyFile, is_legacy_file, is_legacy_tar
from enstack_lightning.checkpoint.location import LocalLocation
from enstack_lightning.checkpoint.manifest import compare_manifest, write_manifest
from enstack_lightning.checkpoint.source import ContainerDefectError, LocalSource, Source


class Bytes(Source):
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_at(self, offset: int, count: int, what: str = "the file") -> bytes:
        if offset + count > self.size:
            raise ContainerDefectError("truncated", f"{what} ends early")
        return self.data[offset : offset + count]


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False, **options)
    return file.getvalue()


def opened(data: bytes) -> LegacyFile:
    return LegacyFile(Bytes(data))


def refusal(data: bytes) -> ContainerDefectError | None:
    try:
        opened(data)
    except ContainerDefectError as e:
        return e
    return None


def faults(data: bytes) -> list[ContainerDefectError]:
    """All that is wrong with a file: what keeps it from being read, what is noted, what its tensors meet."""
    try:
        file = opened(data)
    except ContainerDefectError as e:
        return [e]
    return [*file.defects, *file.check_storages(file.read_pickle().tensors)]


def values(file: LegacyFile, data: bytes, tensor: TensorDescriptor) -> torch.Tensor:
    (span,) = (s for s in file.spans([Named("t", "weight", tensor)]) if s.tensors)
    dtype = getattr(torch, tensor.dtype)
    flat = torch.frombuffer(bytearray(data[span.offset : span.offset + span.size]), dtype=dtype)
    return flat.as_strided(tensor.shape, tensor.stride, span.tensors[0].offset)


class _Storage:
    """Stands for a storage in a pickle made by hand."""

    def __init__(self, *pid: object) -> None:
        self.pid = ("storage", torch.FloatStorage, *pid)


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, _Storage) else None


def by_hand(
    value: object,
    keys: object,
    storages: bytes,
    magic: int = MAGIC_NUMBER,
    version: object = 1001,
    machine: object = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
) -> bytes:
    file = io.BytesIO()
    for part in (magic, version, machine):
        pickle.dump(part, file, protocol=2)
    _Pickler(file, protocol=2).dump(value)
    pickle.dump(keys, file, protocol=2)
    return file.getvalue() + storages


def numbers(*floats: float, count: int | None = None) -> bytes:
    return struct.pack("<q", len(floats) if count is None else count) + struct.pack(f"<{len(floats)}f", *floats)


WHOLE = _Tensor(_Storage("k", "cpu", 3, None), 0, (3,), (1,))


def test_every_dtype_is_read_as_torch_reads_it() -> None:
    names = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128".split()  # noqa: SIM905
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    data = saved(tensors)
    file = opened(data)
    loaded, read = torch.load(io.BytesIO(data), weights_only=True), file.read_pickle().value
    assert faults(data) == []
    for name in names:
        assert (read[name].dtype, read[name].shape) == (name, (2, 3))
        ours = values(file, data, read[name])
        assert torch.equal(ours.view(torch.uint8), loaded[name].view(torch.uint8))
    assert (file.without_checksum, file.oddities) == (len(data), [])


def test_a_training_state_is_read_as_torch_reads_it() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    data = saved({"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    file = opened(data)
    content = file.read_pickle()
    assert faults(data) == []
    assert content.value["epoch"] == 3
    assert file.read_scalar(content.value["optimizer"]["state"][0]["step"]) == 1.0
    assert file.read_scalar(content.value["model"]["weight"]) is None
    assert {str(g) for g in content.globals} == {
        "collections.OrderedDict",
        "torch.FloatStorage",
        "torch._utils._rebuild_tensor_v2",
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(values(file, data, content.value["model"][name]), tensor)


def test_tensors_that_share_a_storage_have_one() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    data = saved([base, base[1:], base.T, base[:, 1], torch.empty(0), torch.tensor(5.0)])
    file = opened(data)
    read = file.read_pickle().value
    assert faults(data) == []
    assert len({t.storage.key for t in read[:4]}) == 1
    for ours, theirs in zip(read[:4], torch.load(io.BytesIO(data)), strict=False):
        assert torch.equal(values(file, data, ours), theirs)
    assert file.read_scalar(read[5]) == 5.0


@pytest.mark.parametrize("dtype", ["float8_e5m2", "uint16"])
def test_what_torch_writes_and_cannot_load_is_found(dtype: str) -> None:
    tensor = torch.ones(3).to(getattr(torch, dtype))
    for value in (tensor, tensor.untyped_storage()):
        data = saved([value])
        with pytest.raises(AttributeError, match="no attribute 'dtype'"):
            torch.load(io.BytesIO(data), weights_only=True)
        (found,) = faults(data)
        assert "UntypedStorage" in str(found)


def test_views_of_old_files_are_read_as_torch_reads_them() -> None:
    view = _Tensor(_Storage("root", "cpu", 6, ("view", 2, 3)), 1, (2,), (1,))
    data = by_hand([view], ["root"], numbers(0, 1, 2, 3, 4, 5))
    file = opened(data)
    (tensor,) = file.read_pickle().tensors
    assert faults(data) == []
    assert torch.load(io.BytesIO(data), weights_only=True)[0].tolist() == [3, 4]
    assert values(file, data, tensor).tolist() == [3, 4]
    scalar = by_hand([_Tensor(_Storage("root", "cpu", 3, ("view", 1, 2)), 1, (), ())], ["root"], numbers(7, 8, 9))
    assert opened(scalar).read_scalar(opened(scalar).read_pickle().tensors[0]) == 9.0


@pytest.mark.parametrize("view", [("v", 4, 3), ("v", 0, 7), ("v", 6, 1)])
def test_a_view_beyond_its_storage_is_found(view: tuple[str, int, int]) -> None:
    data = by_hand([_Tensor(_Storage("root", "cpu", 6, view), 0, (1,), (1,))], ["root"], numbers(0, 1, 2, 3, 4, 5))
    assert any("reaches beyond" in str(e) for e in faults(data))


def test_a_tensor_beyond_its_view_is_found() -> None:
    data = by_hand([_Tensor(_Storage("r", "cpu", 6, ("v", 2, 3)), 2, (2,), (1,))], ["r"], numbers(0, 1, 2, 3, 4, 5))
    assert any("reaches beyond" in str(e) for e in faults(data))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int) -> None:
    data = saved({"w": torch.ones(3)}, pickle_protocol=protocol)
    assert is_legacy_file(data[:64])
    assert faults(data) == []
    assert opened(data).read_pickle().value["w"].shape == (3,)


def test_values_are_little_endian_whatever_machine_saved_them() -> None:
    """As torch writes and reads them; the entry says only what machine it was."""
    machine = {"protocol_version": 1001, "little_endian": False, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    data = by_hand([_Tensor(_Storage("k", "cpu", 1, None), 0, (), ())], ["k"], numbers(2.5), machine=machine)
    file = opened(data)
    assert torch.load(io.BytesIO(data))[0].item() == file.read_scalar(file.read_pickle().tensors[0]) == 2.5


def test_pickles_longer_than_the_first_look_are_read() -> None:
    data = saved({f"layers.{i}.weight": torch.zeros(1) for i in range(5_000)})
    file = opened(data)
    assert faults(data) == []
    assert len(file.read_pickle().tensors) == 5_000


def test_a_file_cut_off_anywhere_or_too_long_is_found() -> None:
    data = saved({"a": torch.arange(3.0), "b": torch.tensor(1), "c": "text"})
    for size in range(len(data)):
        found = faults(data[:size])
        assert found, size
        assert found[0].kind == ("unrecognised" if size < 15 else "truncated"), size
    (found,) = faults(data + b"\0")
    assert found.kind == "damaged"
    assert "1 bytes follow" in str(found)


def test_what_can_be_read_of_a_cut_off_file_is_read() -> None:
    data = saved({"epoch": 3, "w": torch.zeros(100)})
    file = opened(data[:-10])
    assert file.read_pickle().value["epoch"] == 3
    assert [e.kind for e in file.defects] == ["truncated"]
    assert file.spans() == []
    with pytest.raises(ContainerDefectError):
        file.read_scalar(TensorDescriptor(file.read_pickle().tensors[0].storage, "float32", (1,), (1,), 99))


def test_every_flipped_bit_is_found_or_left_to_the_manifest_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    data = saved({"a": torch.tensor([1.0]), "e": 1})
    path.write_bytes(data)
    write_manifest(path)
    location, before = LocalLocation(path), repr(opened(data).read_pickle())
    found = unseen = harmless = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        if faults(bytes(flipped)):
            found += 1
            continue
        file = opened(bytes(flipped))
        assert file.without_checksum == len(data)  # which the report says
        path.write_bytes(flipped)
        manifest = compare_manifest(location, digests=True)
        assert manifest is not None
        assert len(manifest.differences) == 1, bit
        same_pickle = repr(file.read_pickle()) == before
        in_values = bit >= 8 * (len(data) - 4)
        harmless += same_pickle and not in_values
        unseen += in_values or not same_pickle
    assert found > unseen
    assert found > harmless
    assert unseen >= 32  # the bits of the one value


DAMAGED = {
    "another magic number": by_hand([WHOLE], ["k"], numbers(1, 2, 3), magic=MAGIC_NUMBER + 1),
    "another version": by_hand([WHOLE], ["k"], numbers(1, 2, 3), version=1002),
    "a version that is text": by_hand([WHOLE], ["k"], numbers(1, 2, 3), version="x" * 5_000),
    "no facts on the machine": by_hand([WHOLE], ["k"], numbers(1, 2, 3), machine=[]),
    "keys that are no list": by_hand([WHOLE], {"k": 1}, numbers(1, 2, 3)),
    "keys that are no text": by_hand([WHOLE], [1], numbers(1, 2, 3)),
    "a key twice": by_hand([WHOLE], ["k", "k"], numbers(1, 2, 3) * 2),
    "a key that nothing uses": by_hand([WHOLE], ["k", "l"], numbers(1, 2, 3) + numbers(1)),
    "a storage without a key": by_hand([WHOLE], [], b""),
    "fewer elements than described": by_hand([WHOLE], ["k"], numbers(1, 2)),
    "more elements than described": by_hand([WHOLE], ["k"], numbers(1, 2, 3, 4)),
    "another count before the elements": by_hand([WHOLE], ["k"], numbers(1, 2, 3, count=4)),
    "a negative count": by_hand([WHOLE], ["k"], numbers(1, 2, 3, count=-3)),
    "a tensor beyond its storage": by_hand(
        [_Tensor(_Storage("k", "cpu", 3, None), 1, (3,), (1,))], ["k"], numbers(1, 2, 3)
    ),
    "a tensor of a huge shape": by_hand(
        [_Tensor(_Storage("k", "cpu", 3, None), 0, (2**40, 2**40), (1, 1))], ["k"], numbers(1, 2, 3)
    ),
    "two sizes for one storage": by_hand(
        [WHOLE, _Tensor(_Storage("k", "cpu", 2, None), 0, (2,), (1,))], ["k"], numbers(1, 2, 3)
    ),
    "a view that is no view": by_hand(
        [_Tensor(_Storage("k", "cpu", 3, ("v", -1, 2)), 0, (1,), (1,))], ["k"], numbers(1, 2, 3)
    ),
}


def test_a_file_made_by_hand_as_torch_makes_it_is_sound() -> None:
    data = by_hand([WHOLE], ["k"], numbers(1, 2, 3))
    assert faults(data) == []
    assert torch.load(io.BytesIO(data))[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_contradicts_itself_is_found(kind: str) -> None:
    found = faults(DAMAGED[kind])
    assert found
    assert all(len(str(e)) < 300 and str(e).isprintable() for e in found)


def test_nothing_is_allocated_for_a_size_that_is_only_claimed() -> None:
    """torch asks for 4 TiB here, also with map_location="meta"."""
    huge = _Tensor(_Storage("k", "cpu", 2**40, None), 0, (2**40,), (1,))
    data = by_hand([huge], ["k"], numbers(1, 2, 3, count=2**40))
    tracemalloc.start()
    found = faults(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [e.kind for e in found] == ["truncated"]
    assert peak < 2**20


def test_pickles_that_do_not_end_are_left(tmp_path: Path) -> None:
    path = tmp_path / "endless.pt"
    path.write_bytes(by_hand(0, [], b"")[:60] + b"K\x01" * 100)
    with path.open("r+b") as file:
        file.truncate(10 * 2**30)  # a hole: takes no room on the disk
    with LocalSource(path) as source, pytest.raises(ContainerDefectError):
        LegacyFile(source)


def test_a_tar_of_the_first_torch_is_named() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name))
    assert is_legacy_tar(file.getvalue()[:512])
    defect = refusal(file.getvalue())
    assert defect is not None
    assert defect.kind == "unrecognised"
    assert "CVE-2025-32434" in str(defect)
    assert not is_legacy_tar(saved({})[:512])


def test_values_that_are_not_finite_are_found_where_torch_has_them() -> None:
    base = torch.zeros(4, 5)
    base[2, 3] = float("nan")
    data = saved({"w": base[1:].T})
    file = opened(data)
    named = [Named("w", "weight", file.read_pickle().value["w"])]
    result = read_deeply(Bytes(data), file.spans(named), DeepRead())
    assert result.defects == ()
    assert result.verified_bytes == 0
    (value,) = result.values
    assert (value.name, value.nonfinite, value.first_nonfinite) == ("w", 1, (3, 1))
