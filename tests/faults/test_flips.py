"""Flipped bits, cut files and blocks of zeros, in checkpoints of every format.

Where a format carries checksums, reading every byte finds each flip that changes what would be loaded. Where it carries
none, the report says so ("not checkable without a manifest"), and with a manifest every flip is found.

The long form (`make faults`) flips every single bit of a small checkpoint a format, and 10,000 random ones of a larger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import random
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from builders import enstack_folder, flip_bit
from genuine import GENUINE, ROWS, Tokens, roberta
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from enstack_lightning.checkpoint import Options, Report, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path, write_manifest
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile

DEEP = Options(deep=True)
DEEP_INFERENCE = Options(deep=True, purpose="inference")


# What would be loaded, by the library that loads it


def canonical(value: object) -> object:
    """A value in a form that compares bit by bit."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().cpu()
        content = data.int_repr() if data.is_quantized else data
        raw = content.view(torch.uint8) if content.ndim else content.reshape(1).view(torch.uint8)
        return str(data.dtype), tuple(data.shape), data.requires_grad, raw.numpy().tobytes()
    if isinstance(value, dict):
        return type(value).__name__, [(canonical(k), canonical(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [canonical(v) for v in value]
    if isinstance(value, float):
        return struct.pack("d", value)
    return type(value).__name__, repr(value)


def load_torch(path: Path) -> object:
    return torch.load(path, weights_only=True)


def load_folder(folder: Path) -> object:
    """Everything that loading an EnStack or Hugging Face folder reads."""
    loaded: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            loaded[path.name] = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            loaded[path.name] = load_file(path)
        elif path.name.startswith("rng_state"):
            with transformers.trainer.safe_globals():
                loaded[path.name] = load_torch(path)
        elif path.name != "training_args.bin":  # which no resume reads
            loaded[path.name] = load_torch(path)
    return loaded


def load_sharded(folder: Path) -> object:
    target = folder.parent / "joined.pt"
    dcp_to_torch_save(folder, target)
    return torch.load(target, weights_only=False)


# The checkpoints


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format: a small checkpoint, a larger one, how it is loaded, what it is fit for."""

    small: Callable[[Path], Path]
    large: Callable[[Path], Path]
    load: Callable[[Path], object]
    options: Options = DEEP


def _minimal_lightning(folder: Path) -> Path:
    """Of the entries that a Trainer writes, those that a resume needs, with one weight."""
    return _lightning(folder, width=1)


def _lightning(folder: Path, width: int = 64) -> Path:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, 4 * width, generator=generator)
    counter = dict.fromkeys(("ready", "started", "processed", "completed"), 3)
    progress = {"total": counter, "current": counter}
    ones = dict.fromkeys(counter, 1)
    state = {"step": torch.tensor(3.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square()}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    loop = {
        "epoch_progress": {"total": ones, "current": ones},
        "epoch_loop.batch_progress": {**progress, "is_last_batch": True},
        "epoch_loop.scheduler_progress": {"total": counter, "current": counter},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": progress}},
    }
    checkpoint = {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"weight": weight},
        "loops": {"fit_loop": loop},
        "callbacks": {},
        "optimizer_states": [{"state": {0: state}, "param_groups": [group]}],
        "lr_schedulers": [],
    }
    torch.save(checkpoint, folder / "c.ckpt")
    return folder / "c.ckpt"


def _enstack(folder: Path) -> Path:
    return enstack_folder(folder / "c", batches=2)


def _enstack_bin(folder: Path) -> Path:
    return enstack_folder(folder / "c", batches=2, weights="pytorch_model.bin")


def _tensors(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, 3, generator=generator) for name in ("a.weight", "b.weight")}


def _torch(size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(_tensors(size), folder / "c.pt")
        return folder / "c.pt"

    return write


def _legacy(size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(_tensors(size), folder / "c.pt", _use_new_zipfile_serialization=False)
        return folder / "c.pt"

    return write


def _safetensors(size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(_tensors(size), folder / "c.safetensors")
        return folder / "c.safetensors"

    return write


def _huggingface_model(folder: Path) -> Path:
    (folder / "m").mkdir()
    save_file(_tensors(2), folder / "m" / "model.safetensors", metadata={"format": "pt"})
    (folder / "m" / "config.json").write_text('{"model_type": "custom"}')
    return folder / "m"


def _huggingface_sharded(folder: Path) -> Path:
    roberta().save_pretrained(folder / "m", max_shard_size="10KB")
    return folder / "m"


def _huggingface_trainer(folder: Path) -> Path:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = torch.utils.data.Subset(Tokens(), range(ROWS))
    transformers.Trainer(roberta(), arguments, train_dataset=data).train()
    return folder / "checkpoint-2"


def _sharded(folder: Path) -> Path:
    return GENUINE["sharded, model alone"].write(folder)


def _sharded_large(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save(_tensors(2_000), checkpoint_id=folder / "sharded", no_dist=True)
    return folder / "sharded"


KINDS = {
    "lightning": Kind(_minimal_lightning, _lightning, load_torch),
    "enstack": Kind(_enstack, _enstack_bin, load_folder),
    "torch": Kind(_torch(2), _torch(5_000), load_torch, DEEP_INFERENCE),
    "legacy torch": Kind(_legacy(2), _legacy(5_000), load_torch, DEEP_INFERENCE),
    "safetensors": Kind(_safetensors(2), _safetensors(5_000), load_file, DEEP_INFERENCE),
    "huggingface model": Kind(_huggingface_model, _huggingface_sharded, load_folder, DEEP_INFERENCE),
    "huggingface trainer": Kind(_huggingface_trainer, _huggingface_trainer, load_folder),
    "sharded": Kind(_sharded, _sharded_large, load_sharded, DEEP_INFERENCE),
}


# The flips


def files_of(path: Path) -> list[Path]:
    """The checkpoint's own files, without its manifest."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [f for f in files if f != manifest_path(path)]


def every_bit(path: Path) -> Iterator[tuple[Path, int, int]]:
    for file in files_of(path):
        for offset in range(file.stat().st_size):
            for bit in range(8):
                yield file, offset, bit


def random_bits(path: Path, count: int) -> Iterator[tuple[Path, int, int]]:
    draw = random.Random(0)
    files = files_of(path)
    sizes = [f.stat().st_size for f in files]
    for file in draw.choices(files, sizes, k=count):
        yield file, draw.randrange(file.stat().st_size), draw.randrange(8)


@contextlib.contextmanager
def flipped(file: Path, offset: int, bit: int) -> Iterator[None]:
    flip_bit(file, offset, bit)
    try:
        yield
    finally:
        flip_bit(file, offset, bit)


def loads_the_same(kind: Kind, path: Path, before: object) -> bool:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return canonical(kind.load(path)) == before
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        return False


def without_checksum(report: Report) -> set[str]:
    return {f.name for f in report.facts.files if f.without_checksum}


def campaign(name: str, path: Path, flips: Iterator[tuple[Path, int, int]]) -> Counter[str]:
    """Flips each bit in turn and says what became of it; a flip that is missed fails the test."""
    kind = KINDS[name]
    healthy = verify_checkpoint(path, kind.options)
    assert healthy.verdict is Verdict.PASS, healthy.findings
    open_files = without_checksum(healthy)
    before = canonical(kind.load(path))
    harmless = {file: harmless_fields(file) for file in files_of(path)}
    outcomes: Counter[str] = Counter()
    missed = []
    for file, offset, bit in flips:
        with flipped(file, offset, bit):
            report = verify_checkpoint(path, kind.options)
            assert not any(f.code == "CK100" for f in report.findings), (file, offset, bit, report.findings)
            if report.verdict is Verdict.FAIL:
                outcomes["found"] += 1
            elif (relative(file, path)) in open_files:
                outcomes[f"not checkable without a manifest: {relative(file, path)}"] += 1
            elif not loads_the_same(kind, path, before):
                missed.append((file.name, offset, bit))
            else:
                reason = next((why for span, why in harmless[file] if offset in span), None)
                assert reason is not None, f"{file.name}, byte {offset}, bit {bit}: harmless for no listed reason"
                outcomes[f"harmless: {reason}"] += 1
    assert not missed, (len(missed), missed[:20])
    return outcomes


def relative(file: Path, path: Path) -> str:
    return file.name if path.is_file() else file.relative_to(path).as_posix()


def archives_in(file: Path) -> list[tuple[int, int]]:
    """Where torch files begin in a file, and their sizes: several of them in one of a sharded checkpoint."""
    if file.suffix == ".distcp":
        with (file.parent / ".metadata").open("rb") as metadata:
            entries = pickle.load(metadata).storage_data.values()
        return [(e.offset, e.length) for e in entries if e.relative_path == file.name]
    return [(0, file.stat().st_size)] if file.read_bytes()[:4] == b"PK\x03\x04" else []


def harmless_fields(file: Path) -> list[tuple[range, str]]:
    """The byte ranges of a file that nobody acts on, each with the reason."""
    fields = [(range(file.stat().st_size), "no resume reads training_args.bin")] * (file.name == "training_args.bin")
    for begin, size in archives_in(file):
        fields += [(range(begin + f.start, begin + f.stop), why) for f, why in harmless_in_archive(file, begin, size)]
    return fields


def harmless_in_archive(file: Path, begin: int, size: int) -> list[tuple[range, str]]:
    fields = []
    with LocalSource(file) as whole:
        source = whole.part(begin, size)
        data = source.read_at(0, size)
        archive = TorchFile(source)
        for name, record in archive.records.items():
            start, payload = record.header_offset, archive.payload_offset(name)
            name_end = start + 30 + len(record.name.encode())
            fields += [
                (range(start + 4, start + 6), "the version needed to extract a record, which torch does not read"),
                (range(start + 10, start + 14), "a record's time and date"),
                (range(start + 14, start + 26), "a record's CRC and sizes at its head; torch writes them behind it"),
                (range(name_end, payload), "padding before a record's bytes"),
            ]
    at = struct.unpack_from("<Q", data, data.rindex(b"PK\x06\x06") + 48)[0]
    while data[at : at + 4] == b"PK\x01\x02":
        name_length, extra, comment = struct.unpack_from("<3H", data, at + 28)
        fields += [
            (range(at + 4, at + 8), "the versions that made and need a record, which torch does not read"),
            (range(at + 12, at + 16), "a record's time and date"),
            (range(at + 36, at + 42), "a record's attributes as a file, which is never unpacked"),
        ]
        at += 46 + name_length + extra + comment
    fields.append((range(at + 12, at + 16), "the versions in the archive's zip64 end, which torch does not read"))
    return fields


def show(name: str, outcomes: Counter[str]) -> None:
    print(f"\n{name}: {sum(outcomes.values()):,} flips")
    for what, count in sorted(outcomes.items(), key=lambda item: -item[1]):
        print(f"  {count:9,}  {what}")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_flips(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    outcomes = campaign(name, path, random_bits(path, 250))
    assert outcomes["found"], outcomes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_flips_with_a_manifest(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    write_manifest(path)
    for file, offset, bit in random_bits(path, 100):
        with flipped(file, offset, bit):
            assert verify_checkpoint(path, KINDS[name].options).verdict is Verdict.FAIL, (file.name, offset, bit)


@pytest.mark.faults_long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_bit_of_a_small_checkpoint(name: str, tmp_path: Path) -> None:
    path = KINDS[name].small(tmp_path)
    show(f"{name}, every bit", campaign(name, path, every_bit(path)))


@pytest.mark.faults_long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_random_bits_of_a_larger_checkpoint(name: str, tmp_path: Path) -> None:
    path = KINDS[name].large(tmp_path)
    show(f"{name}, random bits", campaign(name, path, random_bits(path, 10_000)))


@pytest.mark.faults_long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_flip_is_found_with_a_manifest(name: str, tmp_path: Path) -> None:
    path = KINDS[name].large(tmp_path)
    write_manifest(path)
    missed = []
    for file, offset, bit in random_bits(path, 10_000):
        with flipped(file, offset, bit):
            if verify_checkpoint(path, KINDS[name].options).verdict is not Verdict.FAIL:
                missed.append((file.name, offset, bit))
    assert not missed, (len(missed), missed[:20])


# Cut files and blocks of zeros


def record_borders(file: Path) -> set[int]:
    """Where the parts of a file begin and end."""
    borders = {0, file.stat().st_size}
    for begin, size in archives_in(file):
        with LocalSource(file) as whole:
            source = whole.part(begin, size)
            archive, data = TorchFile(source), source.read_at(0, size)
            for name, record in archive.records.items():
                payload = archive.payload_offset(name)
                borders |= {begin + n for n in (record.header_offset, payload, payload + record.size)}
        borders |= {begin + data.rindex(magic) for magic in (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")}
    return borders


def lengths(file: Path, count: int) -> set[int]:
    size = file.stat().st_size
    draw = random.Random(1)
    near = {border + by for border in record_borders(file) for by in (-1, 0, 1)}
    return {n for n in near | {draw.randrange(size) for _ in range(count)} if 0 <= n < size}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_cut_is_found_without_reading_every_byte(name: str, tmp_path: Path) -> None:
    """At every record's border and around it, and at 500 random lengths of each file that loading reads."""
    path = KINDS[name].small(tmp_path)
    quick = dataclasses.replace(KINDS[name].options, deep=False)
    for file in files_of(path):
        if file.name == "training_args.bin":
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
    for file in files_of(path):
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
    path = _safetensors(100)(tmp_path)
    report = verify_checkpoint(path, DEEP_INFERENCE)
    said = [f.message for f in report.findings if f.code == "CK108"]
    assert said
    assert "not checkable without a manifest" in said[0]
    write_manifest(path)
    report = verify_checkpoint(path, DEEP_INFERENCE)
    assert not [f for f in report.findings if f.code == "CK108"]
