"""What every reader of a torch file does alike: open it, read its pickle, check its tensors' storages, note defects.

It hides whether the file is a zip archive or in the format of torch before 1.6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

from enstack_lightning.checkpoint.deep import DeepRead, Named, Role, Span, read_deeply
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    GlobalFacts,
    Loader,
    Oddity,
    OddityKind,
    ValueFacts,
)
from enstack_lightning.checkpoint.inert_pickle import Global, TensorDescriptor, Unpickled
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.content import BEGINNING_BYTES, TAIL_BYTES, ContentKind, content_of
from enstack_lightning.checkpoint.source import ContainerDefectError, Source
from enstack_lightning.checkpoint.torch_file import TorchFile

MAX_DEFECTS = 20
Tensors = Callable[[], Mapping[str, TensorDescriptor]]
"""Gives tensors by name: to name them all takes as long as some rules do, and only few readings need it."""


class TorchContainer(Protocol):
    """What the zip archive and the older format have in common.

    Attributes:
        defects: those that stop no reader.
        without_checksum: bytes of tensor data that no checksum covers.
    """

    defects: list[ContainerDefectError]
    oddities: list[Oddity]
    without_checksum: int

    def read_pickle(self) -> Unpickled: ...
    def read_scalar(self, tensor: TensorDescriptor) -> float | None: ...
    def check_storages(self, tensors: Iterable[TensorDescriptor]) -> Iterator[ContainerDefectError]: ...
    def spans(self, named: Iterable[Named] = ()) -> list[Span]: ...


class TorchArchive:
    """A torch file read as far as it can be; use it as a context manager.

    Attributes:
        value: the symbolic content of its pickle; None when that cannot be believed.
        defects: met on the way; readers add their own.
        values: noteworthy values of tensors; None when their bytes were not read.
    """

    def __init__(self, name: str, deep: DeepRead | None, loader: Loader) -> None:
        self.name = name
        self.value: Any = None
        self.globals: tuple[GlobalFacts, ...] = ()
        self.files: tuple[FileFacts, ...] = ()
        self.defects: list[Defect] = []
        self.oddities: list[Oddity] = []
        self.values: tuple[ValueFacts, ...] | None = None
        self._deep = deep
        self._loader = loader
        self._open = ExitStack()
        self._source: Source | None = None
        self._file: TorchContainer | None = None
        self._scanned = self._lacks_values = False
        self._noted: set[Defect] = set()

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def open(self, location: Location, folder: Location | None) -> None:
        """Opens and reads the file at `location`, which must lie in `folder` if one is given."""
        defect, size = location.check_file(self.name, folder)
        if defect is not None:
            self.defects.append(defect)
            return
        self.files = (FileFacts(self.name, size),)
        try:
            source = self._open.enter_context(location.open())
        except ContainerDefectError as e:
            self._note(e)
        except OSError as e:
            self.defects.append(Defect.unreadable(self.name, e))
        else:
            self.read(source)

    def read(self, source: Source) -> None:
        """Reads the file that `source` gives, which stays the caller's to close."""
        self._source = source
        self.files = (FileFacts(self.name, source.size),)
        try:
            self._file = _container(source)
            content = self._file.read_pickle()
            self.value = content.value
            self.oddities += [Oddity(kind, f"{self.name}:data.pkl", message) for kind, message in content.oddities]
            self.globals = self._globals_of(content.globals)
            self._note_opcodes(content.refused_opcodes)
            self._add(defect_of(e, self.name) for e in self._file.check_storages(content.tensors))
            self._lacks_values = any(map(_lacks_values, content.tensors))
        except ContainerDefectError as e:
            self.globals = self._globals_of(globals_seen(e))
            self._note(e)
        except OSError as e:
            self.defects.append(Defect.unreadable(self.name, e))

    def read_scalar(self, tensor: object) -> float | None:
        """The value of a scalar tensor; a damaged one becomes a defect."""
        if self._file is None or not isinstance(tensor, TensorDescriptor):
            return None
        try:
            return self._file.read_scalar(tensor)
        except ContainerDefectError as e:
            self._note(e)
        except OSError as e:
            self.defects.append(Defect.unreadable(self.name, e))
        return None

    def scan(self, weights: Tensors = dict, moments: Tensors = dict) -> None:
        """Reads every byte, if that was asked for: each record against its checksum, these tensors for their values.

        Without `deep` it only counts the bytes that were not read.
        """
        self._scanned = True
        named: list[Named] = []
        if self._deep is not None or self._lacks_values:
            named += [Named(name, "weight", tensor) for name, tensor in weights().items()]
            named += [Named(name, "optimizer", tensor) for name, tensor in moments().items()]
            self._check_values(named, "weight", "weights")
            self._check_values(named, "optimizer", "tensors of optimizers")
        if self._file is None or self._source is None:
            return
        not_read = self._file.not_read if isinstance(self._file, TorchFile) else 0
        if self._deep is not None:
            spans = [
                Span(f"{self.name}:{s.where}", s.offset, s.size, s.crc32, s.tensors, s.byteorder)
                for s in self._file.spans(named)
            ]
            result = read_deeply(self._source, spans, self._deep)
            self._add(result.defects)
            self.values, not_read = result.values, 0
        without = self._file.without_checksum
        self.files = tuple(dataclasses.replace(f, without_checksum=without, not_read=not_read) for f in self.files)

    def complete(self, facts: Facts) -> Facts:
        """The facts with this file, its defects, oddities, globals and values added."""
        if not self._scanned:
            self.scan()
        if self._file is not None:
            self._add(defect_of(e, self.name) for e in self._file.defects)
            self.oddities += [
                dataclasses.replace(o, where=f"{self.name}:{o.where}" if o.where else self.name)
                for o in self._file.oddities
            ]
        if self._source is not None and self._source.has_changed():
            self._add([Defect.changed(self.name)])
        values = facts.values if self.values is None else (*(facts.values or ()), *self.values)
        return dataclasses.replace(
            facts,
            files=(*facts.files, *self.files),
            defects=(*facts.defects, *_limited(self.defects)),
            oddities=(*facts.oddities, *self.oddities[:MAX_DEFECTS]),
            globals=(*facts.globals, *self.globals),
            values=values,
        )

    def _check_values(self, tensors: Iterable[Named], of: Role, what: str) -> None:
        empty = [name for name, role, tensor in tensors if role == of and _lacks_values(tensor)]
        if empty:
            message = f"{len(empty):,} of its {what} have no values in it, as on the meta device: {empty[0]:.80}"
            self._add([Defect(DefectKind.DAMAGED, f"{self.name}:data.pkl", message)])

    def _note_opcodes(self, refused: tuple[int, ...]) -> None:
        """Notes opcodes that the pickle's loader does not know; only a full unpickler knows them all."""
        if refused and self._loader in ("weights_only", "transformers"):
            shown = ", ".join(f"0x{opcode:02x}" for opcode in refused)
            message = f"it has opcodes that torch.load(weights_only=True) does not know ({shown})"
            self.oddities.append(Oddity(OddityKind.REFUSED_OPCODE, f"{self.name}:data.pkl", message))

    def _globals_of(self, symbols: Iterable[Global]) -> tuple[GlobalFacts, ...]:
        where = f"{self.name}:data.pkl"
        return tuple(GlobalFacts(g.module, g.name, where, self._loader) for g in symbols)

    def _note(self, error: ContainerDefectError) -> None:
        self._add([defect_of(error, self.name)])

    def _add(self, defects: Iterable[Defect]) -> None:
        """Adds what is not there yet: a record may be read twice, and its damage is one."""
        for defect in defects:
            if defect not in self._noted:
                self._noted.add(defect)
                self.defects.append(defect)


def read_archive(
    location: Location,
    name: str,
    folder: Location | None = None,
    deep: DeepRead | None = None,
    loader: Loader = "weights_only",
) -> TorchArchive:
    """Opens and reads a torch file.

    Args:
        name: what it is called in findings.
        folder: the checkpoint's folder, which the file must not lead out of.
        deep: asks `TorchArchive.scan` to read every byte.
        loader: how the framework reads its pickle.
    """
    archive = TorchArchive(name, deep, loader)
    archive.open(location, folder)
    return archive


def defect_of(error: ContainerDefectError, name: str) -> Defect:
    """The defect that a container's error describes."""
    where = f"{name}:{error.record}" if error.record else name
    return Defect(DefectKind(error.kind), where, str(error))


def _lacks_values(tensor: TensorDescriptor) -> bool:
    return tensor.storage is None and not tensor.parts


def _container(source: Source) -> TorchContainer:
    if source.size == 0:
        raise ContainerDefectError("empty", "it is empty (0 bytes)")
    beginning, tail = min(source.size, BEGINNING_BYTES), min(source.size, TAIL_BYTES)
    source.prefetch([(0, beginning), (source.size - tail, tail)])
    content = content_of(source)
    if content.kind is ContentKind.TORCH_ZIP:
        return TorchFile(source)
    if content.kind is ContentKind.TORCH_LEGACY:
        from enstack_lightning.checkpoint.legacy_file import LegacyFile

        return LegacyFile(source)
    advice = f"; {content.advice}" if content.advice else ""
    raise ContainerDefectError("unrecognised", f"it is {content.what}, not a file of torch.save{advice}")


def globals_seen(error: ContainerDefectError) -> tuple[Global, ...]:
    """The names that a pickle had named before reading it failed."""
    for e in (error, error.__cause__):
        seen = getattr(e, "globals", ())
        if seen:
            return tuple(seen)
    return ()


def _limited(defects: list[Defect]) -> list[Defect]:
    if len(defects) <= MAX_DEFECTS:
        return defects
    rest = len(defects) - MAX_DEFECTS
    more = Defect(DefectKind.DAMAGED, defects[-1].where, f"{rest:,} further defects of this file are not listed")
    return [*defects[:MAX_DEFECTS], more]
