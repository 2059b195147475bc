"""The folder of `torch.distributed.checkpoint`, and Lightning's form of it with `meta.pt` beside the shards.

`.metadata` says what is stored where, `*.distcp` hold it, each piece a file of `torch.save` of its own. `.metadata` is
written last, under the name `.metadata.tmp`, and then renamed. (`torch/distributed/checkpoint/filesystem.py`;
`lightning/pytorch/strategies/model_parallel.py`, `save_checkpoint`.)

Without `--deep` the pieces that are no tensors and the scalar ones are read, and the headers of the other tensors up to
a number; their values are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    Format,
    GlobalFacts,
    Oddity,
    OddityKind,
    ProgressFacts,
    TensorFacts,
)
from enstack_lightning.checkpoint.inert_pickle import (
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Unpickled,
    read_pickle,
)
from enstack_lightning.checkpoint.location import Location, leads_out
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.content import is_unfinished
from enstack_lightning.checkpoint.readers.lightning import VERSION_KEY, lightning_facts
from enstack_lightning.checkpoint.readers.shard_metadata import (
    MetadataDefectError,
    Piece,
    ShardedTensor,
    ShardMetadata,
    nested,
    shard_metadata,
)
from enstack_lightning.checkpoint.readers.shard_pieces import Naming, PieceReader
from enstack_lightning.checkpoint.readers.shard_state import ShardState, shard_state
from enstack_lightning.checkpoint.readers.states import (
    field_types,
    named_moments,
    optimizers_of,
    schedulers_of,
    tensors_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import defect_of, read_archive
from enstack_lightning.checkpoint.safetensors_file import shown
from enstack_lightning.checkpoint.source import ContainerDefectError, Source

METADATA_FILE = ".metadata"
LIGHTNING_FILE = "meta.pt"
DATA_SUFFIX = ".distcp"
MAX_METADATA_BYTES = 64 * 2**20
MAX_DEFECTS = 20


def is_sharded_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it holds a sharded checkpoint, or what is left of one."""
    return any(n.endswith((METADATA_FILE, f"{METADATA_FILE}.tmp", DATA_SUFFIX)) for n in names)


def read_sharded(location: Location, deep: DeepRead | None = None, within: str = "") -> Facts:
    """Facts of a sharded folder; what cannot be read becomes a defect.

    Args:
        within: the folder's name in findings, where it is itself a part of a checkpoint.
    """
    names = location.names()
    folder = _Folder(location)
    metadata = _read_metadata(folder, names)
    files = _check_files(folder, names, metadata)
    reader = PieceReader(deep)
    for file, pieces in files.items():
        with folder.source(file) as source:
            if source is not None:
                reader.read_small(source, pieces)
    tree = _tree(folder, metadata, reader.values)
    state = shard_state(tree)
    namings = _namings(state)
    for file, pieces in files.items():
        with folder.source(file) as source:
            if source is not None:
                not_read = reader.read_tensors(source, pieces, namings)
                folder.count(file, not_read, reader.without_checksum(pieces))
    facts = _facts(folder, names, tree, state, reader, deep)
    facts = dataclasses.replace(
        facts,
        format=Format.SHARDED,
        files=(*folder.files.values(), *facts.files),
        defects=(*folder.defects, *reader.defects, *facts.defects),
        oddities=(*folder.oddities, *reader.oddities, *facts.oddities),
        globals=(*folder.globals, *reader.globals.values(), *facts.globals),
        tensors=_with_files(facts.tensors, state, files),
        leftovers=tuple(filter(is_unfinished, names)),
        values=None if deep is None else (*(facts.values or ()), *reader.whole_values(namings)),
    )
    return _named_within(facts, within) if within else facts


@dataclass
class _Folder:
    """The folder, and what is met in it."""

    location: Location
    files: dict[str, FileFacts] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    globals: list[GlobalFacts] = field(default_factory=list)

    def add(self, kind: DefectKind, where: str, message: str) -> None:
        self.note(Defect(kind, where, message))

    def note(self, defect: Defect) -> None:
        if len(self.defects) < MAX_DEFECTS:
            self.defects.append(defect)
        elif len(self.defects) == MAX_DEFECTS:
            self.defects.append(Defect(defect.kind, METADATA_FILE, "further defects of the shards are not listed"))

    @contextmanager
    def source(self, file: str) -> Iterator[Source | None]:
        """The bytes of a file; None, and a defect, where it cannot be read."""
        try:
            source = self.location.child(file).open()
        except ContainerDefectError as e:
            self.note(defect_of(e, file))
            yield None
            return
        except OSError as e:
            self.note(Defect.unreadable(file, e))
            yield None
            return
        with source:
            yield source
            if source.has_changed():
                self.note(Defect.changed(file))

    def count(self, file: str, not_read: int, without_checksum: int) -> None:
        counted = dataclasses.replace(self.files[file], not_read=not_read, without_checksum=without_checksum)
        self.files[file] = counted


# .metadata


def _read_metadata(folder: _Folder, names: Collection[str]) -> ShardMetadata | None:
    """What `.metadata` describes; None, and a defect, where it is not there or cannot be believed."""
    if METADATA_FILE not in names:
        folder.add(*_why_no_metadata(names))
        for name in names:
            if name.endswith((METADATA_FILE, f"{METADATA_FILE}.tmp")):
                _unpickled(folder, name)  # for the names in it
        return None
    content = _unpickled(folder, METADATA_FILE)
    if content is None:
        return None
    try:
        metadata = shard_metadata(content.value)
    except MetadataDefectError as e:
        folder.add(DefectKind.DAMAGED, METADATA_FILE, f"it is no metadata of torch.distributed.checkpoint: {e}")
        return None
    for message in metadata.defects:
        folder.add(DefectKind.DAMAGED, METADATA_FILE, message)
    return metadata


def _why_no_metadata(names: Collection[str]) -> tuple[DefectKind, str, str]:
    own = [name for name in names if name.endswith(METADATA_FILE)]
    if own:
        message = (
            f"each process has kept metadata of its own ({own[0]}, …), as use_collectives=False makes them do, a form "
            "that is not verified"
        )
        return DefectKind.UNRECOGNISED, own[0], message
    shards = sum(1 for name in names if name.endswith(DATA_SUFFIX))
    begun = ", .metadata.tmp was not yet renamed" if f"{METADATA_FILE}.tmp" in names else ""
    message = f"it is missing beside {shards:,} data file(s){begun}: it is written last, so the save was interrupted"
    return DefectKind.MISSING, METADATA_FILE, message


def _unpickled(folder: _Folder, name: str) -> Unpickled | None:
    defect, size = folder.location.child(name).check_file(name, folder.location)
    if defect is None and size > MAX_METADATA_BYTES:
        defect = Defect(DefectKind.DAMAGED, name, f"it has {size:,} bytes; the limit is {MAX_METADATA_BYTES:,}")
    if size:
        folder.files[name] = FileFacts(name, size, without_checksum=size, read_whole=True)
    if defect is not None:
        folder.note(defect)
        return None
    with folder.source(name) as source:
        if source is None:
            return None
        try:
            content = read_pickle(source.read_at(0, source.size))
        except (ContainerDefectError, PickleDefectError) as e:
            folder.globals += [GlobalFacts(g.module, g.name, name, "pickle") for g in getattr(e, "globals", ())]
            folder.add(DefectKind.DAMAGED, name, f"it cannot be read: {e}")
            return None
        except OSError as e:
            folder.note(Defect.unreadable(name, e))
            return None
    folder.globals += [GlobalFacts(g.module, g.name, name, "pickle") for g in content.globals]
    return content


# The data files


def _check_files(folder: _Folder, names: Collection[str], metadata: ShardMetadata | None) -> dict[str, list[Piece]]:
    """The pieces of each data file that is there and as long as its pieces together, in their order."""
    files: dict[str, list[Piece]] = {}
    for piece in metadata.pieces if metadata else ():
        files.setdefault(piece.file, []).append(piece)
    for name in names:
        if name.endswith(DATA_SUFFIX) and name not in files:
            _note_unnamed(folder, name, metadata is not None)
    return {file: pieces for file, pieces in sorted(files.items()) if _is_whole(folder, file, pieces)}


def _note_unnamed(folder: _Folder, name: str, described: bool) -> None:
    defect, size = folder.location.child(name).check_file(name, folder.location)
    if size:
        folder.files[name] = FileFacts(name, size)
    if described:
        message = ".metadata stores nothing in this file, so nothing reads it: it is left from another save"
        folder.oddities.append(Oddity(OddityKind.STRAY_FILE, name, message))
    elif defect is not None:
        folder.note(defect)


def _is_whole(folder: _Folder, file: str, pieces: list[Piece]) -> bool:
    if leads_out(file):
        folder.add(DefectKind.DAMAGED, METADATA_FILE, f"it names the file {shown(file)}, which leads out of the folder")
        return False
    defect, size = folder.location.child(file).check_file(file, folder.location)
    if size:
        folder.files[file] = FileFacts(file, size)
    if defect is not None:
        folder.note(defect)
        return False
    pieces.sort(key=lambda piece: (piece.offset, piece.length))
    end = 0
    for piece in pieces:
        if piece.offset != end:
            message = f"{shown(piece.name)} begins at byte {piece.offset:,}; the entry before it ends at {end:,}"
            folder.add(DefectKind.DAMAGED, file, message)
            return False
        end = piece.offset + piece.length
    if end != size:
        kind = DefectKind.TRUNCATED if size < end else DefectKind.DAMAGED
        folder.add(kind, file, f"it has {size:,} bytes and its {len(pieces):,} entries fill {end:,}")
        return False
    return True


# The state


def _tree(folder: _Folder, metadata: ShardMetadata | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict as it was before it was sharded, a descriptor in place of each tensor."""
    if metadata is None:
        return {}
    entries = [(tensor.path, _descriptor(tensor)) for tensor in metadata.tensors]
    entries += [(p.path, values[p.name]) for p in metadata.pieces if p.tensor is None and p.name in values]
    try:
        return nested(entries)
    except MetadataDefectError as e:
        folder.add(DefectKind.DAMAGED, METADATA_FILE, str(e))
        return {}


def _descriptor(tensor: ShardedTensor) -> TensorDescriptor:
    """A whole tensor; its storage's key is the name under which its chunks are stored."""
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.append(step)
        step *= n
    storage = StorageDescriptor(tensor.name, tensor.dtype, step, "cpu")
    return TensorDescriptor(storage, tensor.dtype, tensor.shape, tuple(reversed(strides)), 0)


def _stored_name(tensor: TensorDescriptor) -> str:
    return tensor.storage.key if tensor.storage is not None else ""


def _namings(state: ShardState) -> dict[str, Naming]:
    weights = {_stored_name(t): Naming(name, "weight") for name, t in state.weights.items()}
    moments = {_stored_name(t): Naming(name, "optimizer") for name, t in named_moments(state.optimizers).items()}
    return {**weights, **moments}


def _facts(
    folder: _Folder,
    names: Collection[str],
    tree: Mapping[str, Any],
    state: ShardState,
    reader: PieceReader,
    deep: DeepRead | None,
) -> Facts:
    """The facts of the state dict, and of Lightning's file beside it."""

    def read_scalar(tensor: Any) -> float | None:
        return reader.values.get(_stored_name(tensor)) if isinstance(tensor, TensorDescriptor) else None

    path = str(folder.location)
    if LIGHTNING_FILE not in names:
        if "state_dict" in tree and any(key.startswith("optimizer_") for key in tree):
            message = "it is missing: Lightning writes it after the shards, so the save was interrupted"
            folder.add(DefectKind.MISSING, LIGHTNING_FILE, message)
        return _plain_facts(path, tree, state, read_scalar)
    with read_archive(folder.location.child(LIGHTNING_FILE), LIGHTNING_FILE, folder.location, deep) as archive:
        archive.scan()
        rest = archive.value if is_mapping(archive.value) else {}
        if archive.value is not None and not is_mapping(archive.value):
            message = f"it holds a {type(archive.value).__name__} where a dict is needed"
            archive.defects.append(Defect(DefectKind.UNRECOGNISED, LIGHTNING_FILE, message))
        if VERSION_KEY not in rest:
            return archive.complete(_plain_facts(path, {**rest, **tree}, state, read_scalar))
        whole_state = {**rest, "state_dict": state.weights}
        if state.optimizers or "lr_schedulers" in rest:
            whole_state["optimizer_states"] = state.optimizers

        def read_any(tensor: Any) -> float | None:
            return read_scalar(tensor) if _stored_name(tensor) in reader.values else archive.read_scalar(tensor)

        return archive.complete(lightning_facts(whole_state, path, read_any))


def _plain_facts(path: str, tree: Mapping[str, Any], state: ShardState, read_scalar: Any) -> Facts:
    """The facts of a state dict of the user's own layout; `epoch` and `global_step` are believed by their names."""
    optimizers = optimizers_of(state.optimizers, read_scalar) if state.optimizers else None
    return Facts(
        path,
        fields=field_types(tree),
        tensors=tensors_of(state.weights),
        progress=ProgressFacts(epoch=whole(tree.get("epoch")), recorded_global_step=whole(tree.get("global_step"))),
        optimizers=optimizers,
        schedulers=schedulers_of(state.schedulers, optimizers) if state.schedulers else None,
        model_only=bool(state.weights) and optimizers is None and all(_is_model(v) for v in tree.values()),
    )


def _is_model(value: object) -> bool:
    return isinstance(value, TensorDescriptor) or (
        is_mapping(value) and all(isinstance(v, TensorDescriptor) for v in value.values())
    )


def _with_files(
    tensors: tuple[TensorFacts, ...], state: ShardState, files: Mapping[str, list[Piece]]
) -> tuple[TensorFacts, ...]:
    """The tensors, each with the data files that hold its chunks."""
    held: dict[str, dict[str, None]] = {}
    for file, pieces in files.items():
        for piece in pieces:
            held.setdefault(piece.name, {})[file] = None
    stored = {name: _stored_name(tensor) for name, tensor in state.weights.items()}
    return tuple(
        dataclasses.replace(t, where=", ".join(held[stored[t.name]])) if stored.get(t.name) in held else t
        for t in tensors
    )


def _named_within(facts: Facts, within: str) -> Facts:
    """The facts with every file named as it is from the folder above."""
    return dataclasses.replace(
        facts,
        files=tuple(dataclasses.replace(f, name=f"{within}/{f.name}") for f in facts.files),
        defects=tuple(dataclasses.replace(d, where=f"{within}/{d.where}") for d in facts.defects),
        oddities=tuple(dataclasses.replace(o, where=f"{within}/{o.where}") for o in facts.oddities),
        globals=tuple(dataclasses.replace(g, where=f"{within}/{g.where}") for g in facts.globals),
        tensors=tuple(dataclasses.replace(t, where=f"{within}/{t.where}") for t in facts.tensors),
        values=facts.values and tuple(dataclasses.replace(v, where=f"{within}/{v.where}") for v in facts.values),
        leftovers=tuple(f"{within}/{name}" for name in facts.leftovers),
    )
