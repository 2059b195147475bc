"""Campaigns of flipped bits, over checkpoints of every format: what becomes of each flip, on all cores.

A flip is found, or harmless for a reason that is listed here, or lies where the format has no checksum and the report
says so. Whether it changes what would be loaded is asked of the library that loads it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from builders import enstack_folder, flip_bit, loop_counters
from genuine import GENUINE, OneWeight, Tokens, roberta
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from enstack_lightning.checkpoint import Options, Report, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile

UNREAD = "training_args.bin"
"""Of a Trainer's checkpoint the one file that no resume reads."""

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
        elif path.name != UNREAD:
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
    state = {"step": torch.tensor(3.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square()}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    checkpoint = {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"weight": weight},
        "loops": loop_counters(3),
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


def safetensors_file(size: int) -> Callable[[Path], Path]:
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


def _huggingface_trainer(folder: Path, model: Callable[[], torch.nn.Module] = roberta) -> Path:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model(), arguments, train_dataset=Tokens()).train()
    return folder / "checkpoint-2"


def _huggingface_trainer_of_one_weight(folder: Path) -> Path:
    return _huggingface_trainer(folder, OneWeight)


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
    "safetensors": Kind(safetensors_file(2), safetensors_file(5_000), load_file, DEEP_INFERENCE),
    "huggingface model": Kind(_huggingface_model, _huggingface_sharded, load_folder, DEEP_INFERENCE),
    "huggingface trainer": Kind(_huggingface_trainer_of_one_weight, _huggingface_trainer, load_folder),
    "sharded": Kind(_sharded, _sharded_large, load_sharded, DEEP_INFERENCE),
}


# The flips


class Flip(NamedTuple):
    """One bit of one file of a checkpoint, the file by its name within it; empty when the checkpoint is the file."""

    file: str
    offset: int
    bit: int

    def of(self, checkpoint: Path) -> Path:
        return checkpoint / self.file if self.file else checkpoint


def files_of(checkpoint: Path) -> dict[str, Path]:
    """The checkpoint's own files by their names within it, without its manifest."""
    if checkpoint.is_file():
        return {"": checkpoint}
    manifest = manifest_path(checkpoint)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != manifest)
    return {p.relative_to(checkpoint).as_posix(): p for p in files}


def every_bit(checkpoint: Path) -> list[Flip]:
    """Every bit of every file that a resume reads."""
    return [
        Flip(name, offset, bit)
        for name, file in files_of(checkpoint).items()
        if name != UNREAD
        for offset in range(file.stat().st_size)
        for bit in range(8)
    ]


def random_bits(checkpoint: Path, count: int) -> list[Flip]:
    draw = random.Random(0)
    sizes = {name: file.stat().st_size for name, file in files_of(checkpoint).items()}
    names = draw.choices(list(sizes), list(sizes.values()), k=count)
    return [Flip(name, draw.randrange(sizes[name]), draw.randrange(8)) for name in names]


@contextlib.contextmanager
def flipped(checkpoint: Path, flip: Flip) -> Iterator[None]:
    flip_bit(flip.of(checkpoint), flip.offset, flip.bit)
    try:
        yield
    finally:
        flip_bit(flip.of(checkpoint), flip.offset, flip.bit)


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


@dataclasses.dataclass
class Outcomes:
    """What became of the flips: how many of each kind, and those that were missed, which no campaign may end with."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    missed: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Outcomes) -> None:
        self.counts.update(other.counts)
        self.missed += other.missed

    def show(self, title: str) -> None:
        print(f"\n{title}: {sum(self.counts.values()):,} flips, {len(self.missed):,} missed")
        for what, count in self.counts.most_common():
            print(f"  {count:9,}  {what}")


def campaign(name: str, checkpoint: Path, flips: list[Flip]) -> Outcomes:
    """Flips each bit in turn and says what became of it."""
    kind = KINDS[name]
    healthy = verify_checkpoint(checkpoint, kind.options)
    assert healthy.verdict is Verdict.PASS, healthy.findings
    compared = healthy.facts.manifest is not None
    uncovered = set() if compared else without_checksum(healthy)
    before = canonical(kind.load(checkpoint)) if not compared else None
    harmless = {name: harmless_fields(file) for name, file in files_of(checkpoint).items()}
    outcomes = Outcomes()
    for flip in flips:
        with flipped(checkpoint, flip):
            report = verify_checkpoint(checkpoint, kind.options)
            if any(f.code == "CK100" for f in report.findings):
                outcomes.missed.append(f"{flip} breaks the verifier: {report.findings}")
            elif report.verdict is Verdict.FAIL:
                outcomes.counts["found"] += 1
            elif (flip.file or checkpoint.name) in uncovered:
                outcomes.counts[f"not checkable without a manifest: {flip.file or checkpoint.name}"] += 1
            elif compared or not loads_the_same(kind, checkpoint, before):
                outcomes.missed.append(f"{flip} changes what is loaded")
            else:
                reason = next((why for span, why in harmless[flip.file] if flip.offset in span), None)
                if reason is None:
                    outcomes.missed.append(f"{flip} is harmless for no listed reason")
                outcomes.counts[f"harmless: {reason}"] += 1
    return outcomes


def campaign_on_all_cores(name: str, checkpoint: Path, flips: list[Flip]) -> Outcomes:
    """The same, each process on a copy of its own."""
    workers = os.cpu_count() or 1
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    outcomes = Outcomes()
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for part in pool.map(
            _campaign_on_a_copy, [name] * workers, [checkpoint] * workers, [flips[i::workers] for i in range(workers)]
        ):
            outcomes.add(part)
    return outcomes


def _campaign_on_a_copy(name: str, checkpoint: Path, flips: list[Flip]) -> Outcomes:
    copy = checkpoint.parent / str(os.getpid()) / checkpoint.name
    warnings.simplefilter("ignore")
    if checkpoint.is_dir():
        shutil.copytree(checkpoint, copy)
    else:
        copy.parent.mkdir()
        shutil.copy(checkpoint, copy)
        if manifest_path(checkpoint).exists():
            shutil.copy(manifest_path(checkpoint), manifest_path(copy))
    return campaign(name, copy, flips)


def archives_in(file: Path) -> list[tuple[int, int]]:
    """Where torch files begin in a file, and their sizes: several of them in one of a sharded checkpoint."""
    if file.suffix == ".distcp":
        with (file.parent / ".metadata").open("rb") as metadata:
            entries = pickle.load(metadata).storage_data.values()
        return [(e.offset, e.length) for e in entries if e.relative_path == file.name]
    return [(0, file.stat().st_size)] if file.read_bytes()[:4] == b"PK\x03\x04" else []


def harmless_fields(file: Path) -> list[tuple[range, str]]:
    """The byte ranges of a file that nobody acts on, each with the reason."""
    fields = [(range(file.stat().st_size), "no resume reads training_args.bin")] * (file.name == UNREAD)
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
            start, payload = record.header_offset, archive.records[name].offset
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


# Cut files


def record_borders(file: Path) -> set[int]:
    """Where the parts of a file begin and end."""
    borders = {0, file.stat().st_size}
    for begin, size in archives_in(file):
        with LocalSource(file) as whole:
            source = whole.part(begin, size)
            archive, data = TorchFile(source), source.read_at(0, size)
            for name, record in archive.records.items():
                payload = archive.records[name].offset
                borders |= {begin + n for n in (record.header_offset, payload, payload + record.size)}
        borders |= {begin + data.rindex(magic) for magic in (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")}
    return borders


def lengths(file: Path, count: int) -> set[int]:
    size = file.stat().st_size
    draw = random.Random(1)
    near = {border + by for border in record_borders(file) for by in (-1, 0, 1)}
    return {n for n in near | {draw.randrange(size) for _ in range(count)} if 0 <= n < size}
