"""One module a format; `read_facts` picks the one that fits what stands at a path, by content and never by name alone.

A name still matters in three ways: torch and transformers choose their own reader by the suffix `.safetensors`, some
names say that a file is unfinished, and some that it is a part of a folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts, FileFacts, Format, Oddity, OddityKind
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.content import (
    Content,
    ContentKind,
    content_of,
    content_of_folder,
    is_unfinished,
)
from enstack_lightning.checkpoint.readers.enstack_dir import is_enstack_folder, read_enstack_folder
from enstack_lightning.checkpoint.readers.huggingface import is_huggingface_folder, is_trainer_folder, read_huggingface
from enstack_lightning.checkpoint.readers.lightning import is_lightning, read_lightning
from enstack_lightning.checkpoint.readers.plain import read_plain_torch, read_safetensors_file
from enstack_lightning.checkpoint.readers.sharded import is_sharded_folder, read_sharded
from enstack_lightning.checkpoint.readers.torch_archive import TorchArchive, defect_of
from enstack_lightning.checkpoint.readers.weights import is_weights_name
from enstack_lightning.checkpoint.source import ContainerDefectError, Source

__all__ = ["is_checkpoint_folder", "is_unfinished", "read_facts"]

_TORCH_SUFFIXES = frozenset((".ckpt", ".pt", ".pth", ".bin"))
_FOREIGN_SUFFIXES = frozenset(
    (".zip", ".gz", ".tar", ".tgz", ".xz", ".7z", ".h5", ".keras", ".onnx", ".gguf", ".npz", ".npy", ".json", ".txt")
)
_OF_TRAINER = re.compile(r"checkpoint-\d+")
_PARTS = {
    "training_state.pth": "the training state of an EnStack folder",
    "optimizer.pt": "the optimizer of a Trainer's checkpoint folder",
    "scheduler.pt": "the schedule of a Trainer's checkpoint folder",
    "scaler.pt": "the gradient scaler of a Trainer's checkpoint folder",
    "training_args.bin": "the arguments of a Trainer's checkpoint folder",
    "meta.pt": "the counters of a sharded checkpoint folder",
    ".metadata": "the directory of a sharded checkpoint folder",
}


def read_facts(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of the checkpoint at `location`, whatever its format.

    Never raises for what a file holds: what cannot be read or recognised is a defect in the facts.

    Args:
        deep: asks for every byte to be read; without it headers, pickles and scalars are.
    """
    try:
        return _read_folder(location, deep) if location.is_folder() else _read_file(location, deep)
    except OSError as e:
        return _failed(location, Defect.unreadable(_where(location), e))


def is_checkpoint_folder(location: Location) -> bool:
    """Whether a folder is one checkpoint, whole or damaged, and not a folder of them or of something else.

    The Trainer leaves the last model beside its checkpoints, and people do so beside Lightning's; a `config.json` alone
    may be that of a whole project. Such folders are folders of checkpoints.
    """
    try:
        names = location.names()
        if is_sharded_folder(names) or is_enstack_folder(names):
            return True
        if not is_huggingface_folder(names) or any(map(_OF_TRAINER.fullmatch, names)):
            return False
        if is_trainer_folder(names):
            return True
        if any(name.endswith(".ckpt") for name in names):
            return False
        return any(map(is_weights_name, names)) or not _has_folders(location, names)
    except OSError:
        return False


def _has_folders(location: Location, names: Iterable[str]) -> bool:
    return any(location.child(name).is_folder() for name in names if not name.startswith("."))


def _read_folder(location: Location, deep: DeepRead | None) -> Facts:
    names = location.names()
    if is_sharded_folder(names):
        return _beside_others(read_sharded(location, deep), names)
    if is_enstack_folder(names):
        return _beside_others(read_enstack_folder(location, deep), names)
    if is_huggingface_folder(names):
        return _beside_others(read_huggingface(location, deep), names)
    return _failed(location, Defect(DefectKind.UNRECOGNISED, _where(location), content_of_folder(names)))


def _beside_others(facts: Facts, names: Iterable[str]) -> Facts:
    """The facts with what lies in the folder and belongs to a checkpoint of another format, which nobody has judged."""
    whole = [name for name in names if not is_unfinished(name)]
    of_lightning = [name for name in whole if name.endswith(".ckpt")]
    of_enstack = [name for name in whole if is_enstack_folder([name])]
    of_trainer = [name for name in whole if is_trainer_folder([name])]
    weights = [name for name in whole if is_weights_name(name)]
    states = {
        Format.SHARDED: of_lightning + of_enstack + of_trainer,
        Format.ENSTACK: of_lightning + of_trainer,
        Format.HUGGINGFACE: of_lightning,
    }[facts.format]
    found = [(OddityKind.OTHER_CHECKPOINT, states), (OddityKind.STRAY_FILE, weights)]
    oddities = [
        Oddity(kind, "", _not_judged(others, facts.format))
        for kind, others in (found if facts.format is Format.SHARDED else found[:1])
        if others
    ]
    return dataclasses.replace(facts, oddities=(*facts.oddities, *oddities))


def _not_judged(names: Sequence[str], judged: Format) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    verb = "stands" if len(names) == 1 else "stand"
    return f"{', '.join(names[:3])}{more} {verb} in the folder of the {judged} checkpoint that is judged, unread"


def _read_file(location: Location, deep: DeepRead | None) -> Facts:
    name = location.name
    defect, size = location.check_file(name)
    if defect is not None:
        return Facts(str(location), defects=(defect,))
    try:
        with location.open() as source:
            content = content_of(source)
            facts = _read_content(location, source, content, deep)
    except ContainerDefectError as e:
        return Facts(str(location), files=(FileFacts(name, size),), defects=(defect_of(e, name),))
    except OSError as e:
        return _failed(location, Defect.unreadable(_where(location), e))
    if not facts.files:
        facts = dataclasses.replace(facts, files=(FileFacts(name, size),))
    return _judge_name(facts, name, content)


def _read_content(location: Location, source: Source, content: Content, deep: DeepRead | None) -> Facts:
    if content.kind is ContentKind.SAFETENSORS:
        return read_safetensors_file(location, deep)
    if content.kind is ContentKind.OTHER:
        advice = f"; {content.advice}" if content.advice else ""
        message = f"it is {content.what}, no checkpoint{advice}"
        return _failed(location, Defect(DefectKind.UNRECOGNISED, _where(location), message))
    archive = TorchArchive(location.name, deep, "weights_only")
    archive.read(source)
    read = read_lightning if is_lightning(archive.value) else read_plain_torch
    return archive.complete(read(archive, str(location)))


def _judge_name(facts: Facts, name: str, content: Content) -> Facts:
    """The facts with what the file's name says against its content."""
    suffix = PurePosixPath(name).suffix.lower()
    said = []
    if is_unfinished(name):
        said.append(
            f"its name ends with {suffix}, as that of a file does which is still being written or was left when the "
            f"save or the download was interrupted; rename it only if you know that it is whole"
        )
    part = _PARTS.get(name) or ("a shard of a sharded checkpoint folder" if suffix == ".distcp" else None)
    part = "the random state of a Trainer's checkpoint folder" if name.startswith("rng_state") else part
    if part is not None and not facts.tensors:
        said.append(f"it is {part}, a part of a checkpoint; name the folder it lies in")
    routed = {ContentKind.SAFETENSORS: _TORCH_SUFFIXES, ContentKind.OTHER: frozenset[str]()}
    if suffix in routed.get(content.kind, {".safetensors"}):
        said.append(
            f"its name ends with {suffix} and it is {content.what}: torch and transformers choose their reader by that "
            f"suffix; rename it"
        )
    odd = suffix in _FOREIGN_SUFFIXES and content.kind is not ContentKind.OTHER
    message = f"its name ends with {suffix} and it is {content.what}"
    return dataclasses.replace(
        facts,
        defects=(*facts.defects, *(Defect(DefectKind.UNRECOGNISED, name, sentence) for sentence in said)),
        oddities=(*facts.oddities, *([Oddity(OddityKind.WRONG_SUFFIX, name, message)] if odd else [])),
    )


def _where(location: Location) -> str:
    return location.name or str(location)


def _failed(location: Location, defect: Defect) -> Facts:
    return Facts(str(location), Format.UNKNOWN, defects=(defect,))
