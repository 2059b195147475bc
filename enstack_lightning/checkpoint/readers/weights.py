"""The weights of a folder: one file or shards with an index, in safetensors or in torch's own format.

Names and the order in which they are looked for: `transformers/modeling_utils.py`; the rules for an index:
`huggingface_hub/serialization/_torch.py`, which are stricter than what transformers itself checks before it joins a
shard's name to the folder's path.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    Oddity,
    OddityKind,
    TensorFacts,
    ValueFacts,
)
from enstack_lightning.checkpoint.inert_pickle import DTYPE_BYTES, TensorDescriptor
from enstack_lightning.checkpoint.location import Location, leads_out
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.json_file import read_json_object
from enstack_lightning.checkpoint.readers.safetensors import read_safetensors
from enstack_lightning.checkpoint.readers.states import named_weights, plain, tensors_of
from enstack_lightning.checkpoint.readers.torch_archive import read_archive
from enstack_lightning.checkpoint.safetensors_file import shown

CONFIG_FILE = "config.json"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 10 * 2**20
MAX_SHARDS = 10_000
MAX_DEFECTS = 20
MAX_UNNAMED = 1_000
"""Tensors of shards that their index does not name; with more, the rest is not read."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")

_DCP_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def add_config(facts: Facts, folder: Location) -> Facts:
    """The facts with the folder's `config.json` added."""
    config, size, defect = read_json_object(folder, CONFIG_FILE, MAX_CONFIG_BYTES)
    if size:
        facts = dataclasses.replace(
            facts, files=(*facts.files, FileFacts(CONFIG_FILE, size, without_checksum=size, read_whole=True))
        )
    if config is None:
        return dataclasses.replace(facts, defects=(*facts.defects, *([defect] if defect else [])))
    version = config.get("transformers_version")
    versions = {**facts.versions, "transformers": str(version)} if isinstance(version, str) else facts.versions
    return dataclasses.replace(facts, model_config=plain(config), versions=versions)


def is_weights_name(name: str) -> bool:
    """Whether a file of this name holds weights or says where they lie, by the names of transformers and PEFT."""
    return name in (*SINGLE_FILES, *ADAPTER_FILES, *INDEX_FILES) or bool(_SHARD.fullmatch(name))


def add_weights(
    facts: Facts, folder: Location, deep: DeepRead | None = None, singles: tuple[str, ...] = SINGLE_FILES
) -> Facts:
    """The facts with the folder's weights added; what cannot be read or believed becomes a defect.

    Args:
        singles: the names of files that hold all weights.

    Where weights are there in both formats, both are read, and `Facts.tensors` is what transformers would load: the
    safetensors form, one file before shards.
    """
    names = folder.names()
    read = [_read_single(folder, name, deep) for name in (*singles, *ADAPTER_FILES) if name in names]
    read += [_read_shards(folder, name, deep) for name in INDEX_FILES if name in names]
    read.sort(key=lambda weights: weights.rank)
    mapped = {name for weights in read for name in weights.names}
    found = _Found(strays=_strays(names, mapped, bool(read)))
    for weights in read:
        found.add(weights)
    if not read and not found.strays.defects:
        message = f"neither {SINGLE_FILES[0]} nor {SINGLE_FILES[1]} is there, nor an index of shards of either"
        found.strays.defects.append(Defect(DefectKind.MISSING, SINGLE_FILES[0], message))
    return found.complete(facts, deep)


@dataclass
class _Weights:
    """What one file of weights, or one index with its shards, gives.

    Attributes:
        rank: 0 for what transformers prefers.
        names: the files that hold it, readable or not.
        data_sizes: the bytes of its tensors; for torch files also with tensors that share a storage counted once.
    """

    name: str
    rank: int
    names: set[str] = field(default_factory=set)
    data_sizes: Counter[str] = field(default_factory=Counter)
    files: list[FileFacts] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    globals: list[Any] = field(default_factory=list)
    values: list[ValueFacts] = field(default_factory=list)
    tensors: list[TensorFacts] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        return self.name in ADAPTER_FILES

    def defect(self, kind: DefectKind, where: str, message: str) -> None:
        self.note(Defect(kind, where, message))

    def note(self, defect: Defect) -> None:
        if len(self.defects) < MAX_DEFECTS:
            self.defects.append(defect)
        elif len(self.defects) == MAX_DEFECTS:
            self.defects.append(Defect(defect.kind, self.name, "further defects of these weights are not listed"))


@dataclass
class _Found:
    strays: _Weights
    read: list[_Weights] = field(default_factory=list)

    def add(self, weights: _Weights) -> None:
        loaded = next((w for w in self.read if w.tensors), None)
        if loaded is not None and weights.tensors and not weights.is_adapter:
            weights.oddities += _conflict(loaded, weights)
        self.read.append(weights)

    def complete(self, facts: Facts, deep: DeepRead | None) -> Facts:
        every = [*self.read, self.strays]
        values = [value for weights in every for value in weights.values]
        return dataclasses.replace(
            facts,
            files=(*facts.files, *(file for weights in every for file in weights.files)),
            defects=(*facts.defects, *(defect for weights in every for defect in weights.defects)),
            oddities=(*facts.oddities, *(oddity for weights in every for oddity in weights.oddities)),
            globals=(*facts.globals, *(name for weights in every for name in weights.globals)),
            tensors=facts.tensors or next((tuple(w.tensors) for w in self.read if w.tensors), ()),
            values=facts.values if deep is None else (*(facts.values or ()), *values),
        )


def _conflict(loaded: _Weights, other: _Weights) -> list[Oddity]:
    """What the weights that would not be loaded say differently. Tied weights stand twice in torch files only."""
    headers = {t.name: (t.dtype, t.shape) for t in loaded.tensors}
    others = {t.name: (t.dtype, t.shape) for t in other.tensors}
    differing = [name for name, header in headers.items() if name in others and others[name] != header]
    differing += [name for name in headers if name not in others]
    if not differing:
        return []
    message = (
        f"{len(differing):,} of {len(headers):,} tensors of {loaded.name} are not in it or have another shape or dtype "
        f"there ({shown(differing[0])}); transformers loads {loaded.name} and leaves it unread"
    )
    return [Oddity(OddityKind.STRAY_FILE, other.name, message)]


# One file


def _read_single(folder: Location, name: str, deep: DeepRead | None) -> _Weights:
    weights = _Weights(name, rank=(0 if name.endswith(".safetensors") else 2) + (4 if name in ADAPTER_FILES else 0))
    _read_file(weights, folder, name, deep)
    return weights


def _read_file(weights: _Weights, folder: Location, name: str, deep: DeepRead | None) -> list[TensorFacts] | None:
    """Adds one file and what it holds to `weights`; its tensors, or None when it cannot be read."""
    read = _read_safetensors if name.endswith(".safetensors") else _read_torch
    before = len(weights.defects)
    weights.names.add(name)
    tensors = read(weights, folder, name, deep)
    weights.tensors += tensors
    return tensors if len(weights.defects) == before else None


def _read_safetensors(weights: _Weights, folder: Location, name: str, deep: DeepRead | None) -> list[TensorFacts]:
    location = folder.child(name)
    defect, size = location.check_file(name, folder)
    if defect is not None:
        weights.note(defect)
        return []
    read = read_safetensors(location, name, deep)
    for found in read.defects:
        weights.note(found)
    weights.values += read.values
    weights.data_sizes["tensors"] += read.data_bytes
    weights.files.append(FileFacts(name, size, without_checksum=size))
    return list(read.tensors)


def _read_torch(weights: _Weights, folder: Location, name: str, deep: DeepRead | None) -> list[TensorFacts]:
    with read_archive(folder.child(name), name, folder, deep) as archive:
        archive.scan(lambda: named_weights(archive.value))
        read = archive.complete(Facts(str(folder)))
        value = archive.value
    weights.files += read.files
    weights.oddities += read.oddities
    weights.globals += read.globals
    weights.values += read.values or ()
    for defect in read.defects:
        weights.note(defect)
    if value is not None and not is_mapping(value):
        message = f"it holds a {type(value).__name__} where a dict of tensors is needed"
        weights.defect(DefectKind.UNRECOGNISED, name, message)
    _add_sizes(weights, named_weights(value).values())
    return [dataclasses.replace(tensor, where=name) for tensor in tensors_of(value)]


def _add_sizes(weights: _Weights, tensors: Iterable[TensorDescriptor]) -> None:
    storages = {}
    for tensor in tensors:
        weights.data_sizes["tensors"] += DTYPE_BYTES.get(tensor.dtype, 0) * math.prod(tensor.shape)
        if tensor.storage is not None:
            storages[tensor.storage.key] = DTYPE_BYTES.get(tensor.storage.dtype, 0) * tensor.storage.numel
    weights.data_sizes["storages"] += sum(storages.values())


# Shards with an index


def _read_shards(folder: Location, name: str, deep: DeepRead | None) -> _Weights:
    suffix = ".safetensors" if name == INDEX_FILES[0] else ".bin"
    weights = _Weights(name, rank=1 if suffix == ".safetensors" else 3)
    index, size, defect = read_json_object(folder, name, MAX_INDEX_BYTES, finite=True)
    if size:
        weights.files.append(FileFacts(name, size, without_checksum=size, read_whole=True))
    if defect is not None:
        weights.note(defect)
    if index is None:
        return weights
    weight_map = _weight_map(weights, index, suffix)
    tensors: dict[str, list[TensorFacts]] = {}
    for shard in sorted(set(weight_map.values())):
        found = _read_file(weights, folder, shard, deep)
        if found is not None:
            tensors[shard] = found
        if len(weights.tensors) > len(weight_map) + MAX_UNNAMED:
            message = f"its shards hold far more tensors than the {len(weight_map):,} that it names; not all were read"
            weights.defect(DefectKind.DAMAGED, name, message)
            break
    _compare(weights, weight_map, tensors)
    _compare_size(weights, index, complete=not weights.defects)
    return weights


def _weight_map(weights: _Weights, index: Mapping[str, Any], suffix: str) -> dict[str, str]:
    """Tensor -> shard for every entry of the index that names a plain file of the folder."""
    entries = index.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        weights.defect(DefectKind.DAMAGED, weights.name, "it has no weight_map with the shard of each tensor")
        return {}
    if not isinstance(index.get("metadata"), dict):
        weights.defect(DefectKind.DAMAGED, weights.name, "it has no entry metadata, which transformers needs")
    kept = {}
    refused: dict[str, str] = {}
    for tensor, shard in entries.items():
        reason = _why_refused(shard, suffix)
        if reason:
            refused.setdefault(f"{shard!r:.80}", reason)
        else:
            kept[tensor] = shard
    for shard, reason in refused.items():
        weights.defect(DefectKind.DAMAGED, weights.name, f"it names the shard {shard}, {reason}")
    _compare_counts(weights, set(kept.values()))
    if len(set(kept.values())) > MAX_SHARDS:
        weights.defect(
            DefectKind.DAMAGED,
            weights.name,
            f"it names {len(set(kept.values())):,} shards; the limit is {MAX_SHARDS:,}",
        )
        return {}
    return kept


def _why_refused(shard: object, suffix: str) -> str:
    if not isinstance(shard, str):
        return f"which is a JSON {type(shard).__name__} and no file name"
    if leads_out(shard):
        return "which leads out of the checkpoint's folder"
    if not shard.endswith(suffix):
        return f"which does not end with {suffix} like the files that this index is for"
    return ""


def _compare_counts(weights: _Weights, shards: set[str]) -> None:
    """`-00002-of-00006`: each shard names the same count, and every number up to it is there."""
    matches = [m for m in map(_SHARD.fullmatch, sorted(shards)) if m is not None]
    counts = sorted({int(m["count"]) for m in matches})
    if len(counts) > 1:
        weights.defect(
            DefectKind.DAMAGED,
            weights.name,
            f"its shards are of sets of {' and '.join(f'{c:,}' for c in counts[:5])} files: two saves are mixed",
        )
    elif counts and len(matches) != counts[0]:
        weights.defect(DefectKind.DAMAGED, weights.name, f"it names {len(matches):,} shards of a set of {counts[0]:,}")


def _compare(weights: _Weights, weight_map: Mapping[str, str], tensors: Mapping[str, list[TensorFacts]]) -> None:
    """The index and the headers of its shards say the same: each tensor in its shard, and in no other."""
    holders: dict[str, list[str]] = {}
    for shard, found in tensors.items():
        for name in sorted({t.name for t in found}):
            holders.setdefault(name, []).append(shard)
            if name not in weight_map:
                weights.defect(DefectKind.DAMAGED, shard, f"it holds {shown(name)}, which the index does not name")
    for name, shard in weight_map.items():
        if shard in tensors and shard not in holders.get(name, ()):
            weights.defect(DefectKind.DAMAGED, shard, f"the index says that it holds {shown(name)}, and it does not")
    for name, shards in sorted(holders.items()):
        if len(shards) > 1:
            message = f"{shown(name)} is held by {len(shards):,} shards: {', '.join(shards[:5])}"
            weights.defect(DefectKind.DAMAGED, weights.name, message)


def _compare_size(weights: _Weights, index: Mapping[str, Any], complete: bool) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is None or not complete:
        return
    if isinstance(total, bool) or total not in weights.data_sizes.values():
        actual = weights.data_sizes["tensors"]
        shown = f"{total:,}" if isinstance(total, int | float) else f"{total!r:.40}"
        message = f"it gives the tensors {shown} bytes (total_size), and the shards hold {actual:,}"
        weights.oddities.append(Oddity(OddityKind.TOTAL_SIZE, weights.name, message))


# Files that nothing names


def _strays(names: Collection[str], mapped: Collection[str], has_weights: bool) -> _Weights:
    """Shards that no index names: odd beside other weights, a defect where they are all there is."""
    strays = _Weights("", rank=4)
    shards = [m for m in map(_SHARD.fullmatch, sorted(names)) if m is not None and m.string not in mapped]
    parts = [name for name in sorted(names) if _DCP_SHARD.fullmatch(name)]
    if parts and not has_weights:
        message = (
            f"it is one of {len(parts):,} parts as torch.distributed.checkpoint's HuggingFaceStorageWriter saves them "
            "with save_distributed, a form that is not verified; consolidate_safetensors_files of torch joins them"
        )
        strays.defect(DefectKind.UNRECOGNISED, parts[0], message)
        return strays
    if shards and not has_weights:
        index = f"{shards[0]['stem']}{shards[0]['suffix']}.index.json"
        message = f"it is missing: {len(shards):,} shards are there ({shards[0].string}, …) and no index of them"
        strays.defect(DefectKind.MISSING, index, message)
        return strays
    for shard in shards[:MAX_DEFECTS]:
        message = "no index names this shard, so nothing loads it: it is left from another save"
        strays.oddities.append(Oddity(OddityKind.STRAY_FILE, shard.string, message))
    return strays
