"""Reading every byte: damage is found wherever it is, and values that are not finite where torch says they are."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from builders import flip_bit

from enstack_lightning.checkpoint import deep as deep_module
from enstack_lightning.checkpoint.deep import DeepRead, DeepResult, Named, NamedTensor, Span, read_deeply
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts, ValueFacts
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.checkpoint.readers.states import named_weights
from enstack_lightning.checkpoint.readers.torch_archive import TorchArchive, read_archive
from enstack_lightning.checkpoint.source import LocalSource, RemoteSource
from enstack_lightning.checkpoint.tensor_values import CHUNK_BYTES
from enstack_lightning.checkpoint.torch_file import TorchFile

INF, NAN = math.inf, math.nan


def deep_facts(path: Path, moments: dict[str, str] | None = None) -> Facts:
    """What reading every byte of a torch file that holds a dict of weights gives."""
    with read_archive(locate(path), path.name, deep=DeepRead()) as archive:
        archive.scan(lambda: named_weights(archive.value))
        return archive.complete(Facts(str(path)))


def values_of(path: Path) -> dict[str, ValueFacts]:
    facts = deep_facts(path)
    assert facts.defects == ()
    assert facts.values is not None
    return {v.name: v for v in facts.values}


def saved(folder: Path, state: dict[str, object], **options: object) -> Path:
    path = folder / "t.pt"
    torch.save(state, path, **options)  # type: ignore[arg-type]
    return path


# Values


FLOATS = {
    torch.float64: ("nan", "inf", "-inf"),
    torch.float32: ("nan", "inf", "-inf"),
    torch.float16: ("nan", "inf", "-inf"),
    torch.bfloat16: ("nan", "inf", "-inf"),
    torch.complex128: ("nan", "inf", "-inf"),
    torch.complex64: ("nan", "inf", "-inf"),
    torch.complex32: ("nan", "inf", "-inf"),
    torch.float8_e5m2: ("nan", "inf", "-inf"),
    torch.float8_e4m3fn: ("nan",),
    torch.float8_e4m3fnuz: ("nan",),
    torch.float8_e5m2fnuz: ("nan",),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_found_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for text in FLOATS[dtype]:
        values = torch.linspace(-3, 3, 3 * 5).reshape(3, 5)
        values[1, 2] = float(text)
        values[2, 4] = NAN
        found = values_of(saved(tmp_path, {"w": values.to(dtype), "fine": torch.ones(7).to(dtype)}))
        expected = ValueFacts("w", "weight", "t.pt:data/0", 2, (1, 2), text)
        assert found == {"w": expected}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e8m0fnu], ids=str)
def test_every_pattern_of_bits_is_judged_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """All 8 and 16 bit numbers, and the borders of the wider ones."""
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    edges = {4: (0x7F800000, 0x7F7FFFFF), 8: (0x7FF0000000000000, 0x7FEFFFFFFFFFFFFF)}
    near = [e + d for e in edges.get(size, ()) for d in (-1, 0, 1)]
    patterns = range(2 ** (8 * size)) if size < 4 else [*near, *(n | 1 << (8 * size - 1) for n in near), 0, 1]
    data = b"".join(p.to_bytes(size, "little") for p in patterns)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    odd = ~torch.isfinite(tensor.to(torch.complex128 if dtype.is_complex else torch.float64))
    (found,) = values_of(saved(tmp_path, {"w": tensor})).values()
    assert (found.nonfinite, found.first_nonfinite) == (int(odd.sum()), (int(odd.nonzero()[0]),))
    finite = tensor[~odd] if dtype.itemsize > 1 else tensor.view(torch.uint8)[~odd].view(dtype)
    assert values_of(saved(tmp_path, {"w": finite})) == {}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool], ids=str)
def test_a_tensor_of_zeros_is_found_and_a_negative_zero_is_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    zeros = torch.zeros(4).to(dtype)
    state = {"zero": zeros, "one": torch.tensor([0.0, 0, 1, 0]).to(dtype), "empty": zeros[:0]}
    if dtype in (torch.float64, torch.float32, torch.bfloat16):
        state["negative"] = -torch.zeros(3, dtype=dtype)
    found = values_of(saved(tmp_path, state))
    assert {n for n, v in found.items() if v.all_zero} == (
        {"zero", "negative"} & state.keys() if dtype in FLOATS else set()
    )


def random_view(base: torch.Tensor, choose: random.Random) -> torch.Tensor:
    view = base
    for _ in range(choose.randrange(5)):
        axis = choose.randrange(view.ndim)
        match choose.randrange(6):
            case 0:
                view = view.transpose(axis, choose.randrange(view.ndim))
            case 1:
                view = view.narrow(axis, begin := choose.randrange(view.shape[axis]), view.shape[axis] - begin)
            case 2:
                view = view[(slice(None),) * axis + (slice(choose.randrange(2), None, choose.randrange(1, 4)),)]
            case 3:
                view = view.unsqueeze(axis).expand(*view.shape[:axis], choose.randrange(1, 4), *view.shape[axis:])
            case 4:
                view = view.flatten() if view.is_contiguous() else view.select(axis, 0) if view.ndim > 1 else view
            case 5 if view.shape[axis] > 3:
                view = view.unfold(axis, 3, choose.randrange(1, 3))  # values overlap
        if not view.numel():
            return base
    return view


@pytest.mark.parametrize("seed", range(60))
def test_positions_in_views_are_those_of_torch(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice((torch.float32, torch.bfloat16, torch.float64, torch.complex64))
    shape = [choose.randrange(1, 9) for _ in range(choose.randrange(1, 5))]
    base = torch.zeros(shape, dtype=dtype) if choose.random() < 0.4 else torch.randn(shape, dtype=dtype)
    flat = base.view(-1)
    for _ in range(choose.randrange(3)):
        flat[choose.randrange(len(flat))] = choose.choice((NAN, INF, -INF, 1.0))
    views = {f"v{i}": random_view(base, choose) for i in range(6)}
    found = values_of(saved(tmp_path, dict(views)))
    for name, view in views.items():
        odd = ~torch.isfinite(view)
        value = found.get(name)
        assert (value.nonfinite if value else 0) == int(odd.sum()), (name, view.shape, view.stride())
        assert (value is not None and value.all_zero) == (not view.any())
        if value and value.nonfinite:
            assert value.first_nonfinite == tuple(odd.nonzero()[0].tolist())
            number = view[value.first_nonfinite]
            parts = [number.real.item(), number.imag.item()] if number.is_complex() else [number.item()]
            assert value.first_value in [str(p) for p in parts]


@pytest.mark.parametrize("order", ["in order", "transposed", "every third", "second half"])
def test_positions_in_tensors_of_several_chunks_are_right(order: str, tmp_path: Path) -> None:
    base = torch.ones(3, CHUNK_BYTES // 4 + 5)
    base[1, 100_000] = NAN
    base[1, 200_000] = NAN
    base[2, 3] = INF
    views = {"in order": base, "transposed": base.t(), "every third": base[:, ::3], "second half": base[1:]}
    view = views[order]
    odd = ~torch.isfinite(view)
    (value,) = values_of(saved(tmp_path, {"w": view})).values()
    assert (value.nonfinite, value.first_nonfinite) == (int(odd.sum()), tuple(odd.nonzero()[0].tolist()))


def test_tensors_within_one_storage_are_told_apart(tmp_path: Path) -> None:
    """As the flat parameters of FSDP, or an optimizer that keeps all moments in one buffer."""
    flat = torch.ones(3 * CHUNK_BYTES // 4)
    parts = dict(zip("abcdef", flat.split(len(flat) // 6), strict=True))
    parts["b"].zero_()
    parts["e"][7] = NAN
    found = values_of(saved(tmp_path, dict(parts)))
    assert {n: (v.nonfinite, v.first_nonfinite, v.all_zero) for n, v in found.items()} == {
        "b": (0, None, True),
        "e": (1, (7,), False),
    }


def test_big_endian_numbers_are_understood(tmp_path: Path) -> None:
    values = torch.tensor([1.0, NAN, -INF, 2.5], dtype=torch.float64)
    data = b"".join(bytes(values.view(torch.uint8)[i : i + 8].tolist())[::-1] for i in range(0, 32, 8))
    (tmp_path / "b").write_bytes(data)
    result = read_spans(tmp_path / "b", [Span("b", 0, 32, None, (tensor("w", "float64", (4,)),), ">")])
    assert result.values == (ValueFacts("w", "weight", "b", 2, (1,), "nan"),)


def test_scores_and_other_tensors_may_be_infinite(tmp_path: Path) -> None:
    path = saved(tmp_path, {"best": {"score": torch.tensor(INF)}, "w": torch.ones(3)})
    assert deep_facts(path).values == ()


def test_a_sparse_weight_is_judged_by_its_values(tmp_path: Path) -> None:
    weight = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, NAN]), (3,))
    (value,) = values_of(saved(tmp_path, {"w": weight})).values()
    assert (value.name, value.nonfinite) == ("w", 1)


# Hostile shapes


def tensor(
    name: str, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, offset: int = 0
) -> NamedTensor:
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return NamedTensor(name, "weight", dtype, shape, dense if stride is None else stride, offset)


def read_spans(path: Path, spans: Iterable[Span]) -> DeepResult:
    with LocalSource(path) as source:
        return read_deeply(source, list(spans), DeepRead())


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2**40, 2**22), (0, 0)),
        ((2**62,) * 60, (0,) * 60),
        ((1_000_000, 2_000_000), (1, 0)),
        ((1_000_000, 1_000_000), (1, 1)),
        ((2**62, 3), (2**62, 1)),
        ((3, -5), (1, 1)),
        ((3, 5), (-5, 1)),
        ((3,), (1, 1)),
    ],
)
def test_work_is_bounded_by_the_bytes_and_not_by_the_shape(
    shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    values = torch.ones(2_000_000)
    values[5] = NAN
    (tmp_path / "b").write_bytes(values.numpy().tobytes())
    spans = [Span("b", 0, 8_000_000, None, tuple(tensor(f"w{i}", "float32", shape, stride) for i in range(50)))]
    result = read_spans(tmp_path / "b", spans)  # within the time that a test may take
    found = {v.name for v in result.values} | {d.message for d in result.defects}
    misfits = (2**62 in shape[:1] and 0 not in stride) or min(*shape, *stride, 0) < 0 or len(shape) != len(stride)
    assert bool(found) is not (misfits or not any(stride))


def test_many_tensors_over_one_storage_do_not_multiply_the_reading(tmp_path: Path) -> None:
    values = torch.ones(4_000_000)
    values[3_999_990] = NAN
    (tmp_path / "b").write_bytes(values.numpy().tobytes())
    tensors = tuple(tensor(f"w{i}", "float32", (1_999_000,), (2,), i) for i in range(1_000))
    read = 0
    with LocalSource(tmp_path / "b") as source:
        original = source.read_at

        def counted(offset: int, count: int, what: str = "") -> bytes:
            nonlocal read
            read += count
            return original(offset, count, what)

        source.read_at = counted  # type: ignore[method-assign]
        result = read_deeply(source, [Span("b", 0, 16_000_000, None, tensors)], DeepRead())
    assert read <= 2 * 16_000_000 + deep_module.MIN_BUDGET_BYTES
    # Odd ones among the tensors do hold the value, for some there was no more reading: none of them passes.
    named = {v.name for v in result.values} | {
        f"w{i}" for i in range(1_000) if any(f" w{i} " in d.message for d in result.defects)
    }
    assert {f"w{i}" for i in range(0, 1_000) if i + 2 * 1_998_999 >= 3_999_990 and i % 2 == 0} <= named


# Damage


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path: Path) -> None:
    """Found: a defect or an oddity, or torch loads the same values all the same."""
    state = {"a": torch.randn(3), "b": torch.arange(4), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    path = saved(tmp_path, dict(state))
    size, missed = path.stat().st_size, []
    for offset in range(size):
        for bit in range(8):
            flip_bit(path, offset, bit)
            facts = deep_facts(path)
            if not facts.defects and not facts.oddities:
                missed.append((offset, bit))
            flip_bit(path, offset, bit)
    for offset, bit in missed:
        flip_bit(path, offset, bit)
        loaded = torch.load(path, weights_only=True)
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        flip_bit(path, offset, bit)
    # What is left says when, by what and for which system a record was written, in both of its headers.
    assert len(missed) < size * 8 * 0.1


def test_a_block_of_zeros_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.randn(100_000), "v": torch.randn(50_000)})
    data = bytearray(path.read_bytes())
    data[300_032 : 300_032 + 4096] = bytes(4096)
    path.write_bytes(data)
    (defect,) = deep_facts(path).defects
    assert (defect.kind, defect.where) == (DefectKind.DAMAGED, "t.pt:data/0")
    assert "have changed" in defect.message


@pytest.mark.parametrize("with_isal", [True, False])
def test_checksums_of_large_spans_are_joined_from_their_parts(
    with_isal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_isal:
        monkeypatch.setitem(__import__("sys").modules, "isal", None)
    monkeypatch.setattr(deep_module, "SEGMENT_BYTES", CHUNK_BYTES)
    data = random.Random(0).randbytes(9 * CHUNK_BYTES + 12_345)
    (tmp_path / "b").write_bytes(data)
    parts = [(0, 3), (3, 5 * CHUNK_BYTES + 1), (5 * CHUNK_BYTES + 4, 0), (5 * CHUNK_BYTES + 4, 4 * CHUNK_BYTES)]
    spans = [Span(f"b:{o}", o, n, zlib.crc32(data[o : o + n]), ()) for o, n in parts]
    counted: list[int] = []
    with LocalSource(tmp_path / "b") as source:
        result = read_deeply(source, spans, DeepRead(counted.append))
        assert (result.defects, result.verified_bytes) == ((), sum(n for _, n in parts))
        assert sum(counted) == sum(n for _, n in parts)
        wrong = [Span(s.where, s.offset, s.size, s.crc32 ^ 1, ()) for s in spans if s.crc32 is not None]
        assert [d.where for d in read_deeply(source, wrong, DeepRead()).defects] == [s.where for s in spans]


def test_a_file_that_is_cut_off_while_it_is_read_is_a_defect(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(bytes(20 * CHUNK_BYTES))
    with LocalSource(path) as source:
        cut = lambda _: path.open("r+b").truncate(3 * CHUNK_BYTES)  # noqa: E731
        spans = [Span("b:1", 0, 10 * CHUNK_BYTES, None, ()), Span("b:2", 10 * CHUNK_BYTES, 10 * CHUNK_BYTES, None, ())]
        result = read_deeply(source, spans, DeepRead(cut))
    kinds = {d.kind for d in result.defects}
    assert kinds == {DefectKind.TRUNCATED, DefectKind.DAMAGED}
    assert result.defects[-1] == Defect(DefectKind.DAMAGED, "b", "it changed while it was read; verify it again")


def test_an_error_in_one_thread_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(64 * CHUNK_BYTES))
    seen: list[int] = []

    def fails(count: int) -> None:
        seen.append(count)
        raise KeyboardInterrupt

    with LocalSource(tmp_path / "b") as source, pytest.raises(KeyboardInterrupt):
        read_deeply(source, [Span("b", 0, 64 * CHUNK_BYTES, None, ())], DeepRead(fails))
    assert len(seen) <= 32


# Where from


def test_a_part_of_a_file_is_read_like_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.tensor([1.0, NAN])})
    inner = path.read_bytes()
    (tmp_path / "whole").write_bytes(b"before" + inner + b"behind")
    with LocalSource(tmp_path / "whole") as source, TorchArchive("whole:w", DeepRead(), "weights_only") as archive:
        archive.read(source.part(6, len(inner)))
        archive.scan(lambda: named_weights(archive.value))
        facts = archive.complete(Facts("whole"))
    assert facts.defects == ()
    assert facts.values == (ValueFacts("w", "weight", "whole:w:data/0", 1, (1,), "nan"),)


def test_a_remote_file_is_read_in_few_requests(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    state = {f"w{i}": torch.randn(300) for i in range(300)} | {"large": torch.randn(6_000_000)}
    state["w7"][3] = NAN
    filesystem = MemoryFileSystem()
    filesystem.pipe("/t.pt", saved(tmp_path, dict(state)).read_bytes())
    requests = 0
    original = filesystem.cat_file

    def counted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        nonlocal requests
        requests += 1
        return bytes(original(path, start, end))

    filesystem.cat_file = counted
    source = RemoteSource(filesystem, "/t.pt")
    file = TorchFile(source)
    weights = named_weights(file.read_pickle().value)
    quick, requests = requests, 0
    result = read_deeply(source, file.spans(Named(n, "weight", t) for n, t in weights.items()), DeepRead())
    assert (result.defects, [v.name for v in result.values]) == ((), ["w7"])
    assert quick <= 6
    assert requests <= 6
