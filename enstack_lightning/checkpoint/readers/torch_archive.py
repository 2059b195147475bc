"""What every reader of a torch file does alike: open it, read its pickle, check its tensors' records, note defects."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts, FileFacts, GlobalFacts
from enstack_lightning.checkpoint.inert_pickle import TensorDescriptor
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.source import ContainerDefectError
from enstack_lightning.checkpoint.torch_file import TorchFile

MAX_DEFECTS = 20


class TorchArchive:
    """A torch file read as far as it can be: its symbolic `value`, and the `defects` met on the way."""

    def __init__(self, location: Location, name: str, folder: Location | None) -> None:
        self.name = name
        self._folder = folder
        self.value: Any = None
        self.globals: tuple[GlobalFacts, ...] = ()
        self.files: tuple[FileFacts, ...] = ()
        self.defects: list[Defect] = []
        self._location = location
        self._open = ExitStack()
        self._file: TorchFile | None = None

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self) -> None:
        defect, size = self._location.check_file(self.name, self._folder)
        if defect is not None:
            self.defects.append(defect)
            return
        self.files = (FileFacts(self.name, size),)
        try:
            source = self._open.enter_context(self._location.open())
            what = name_of_content(source.read_at(0, min(64, source.size)))
            if what is not None:
                message = f"it is {what}, not a file of torch.save"
                self.defects.append(Defect(DefectKind.UNRECOGNISED, self.name, message))
                return
            self._file = TorchFile(source)
            content = self._file.read_pickle()
        except ContainerDefectError as e:
            self.defects.append(defect_of(e, self.name))
            return
        except OSError as e:
            self.defects.append(Defect(DefectKind.UNREADABLE, self.name, f"it cannot be read: {e.strerror}"))
            return
        self.value = content.value
        self.globals = tuple(GlobalFacts(g.module, g.name, f"{self.name}:data.pkl") for g in content.globals)
        self._check_storages(content.tensors)

    def read_scalar(self, tensor: object) -> float | None:
        """The value of a scalar tensor; a damaged one becomes a defect."""
        if self._file is None or not isinstance(tensor, TensorDescriptor):
            return None
        try:
            return self._file.read_scalar(tensor)
        except ContainerDefectError as e:
            self.defects.append(defect_of(e, self.name))
            return None

    def complete(self, facts: Facts) -> Facts:
        """The facts with this file, its defects and its globals added."""
        return dataclasses.replace(
            facts,
            files=(*facts.files, *self.files),
            defects=(*facts.defects, *_limited(self.defects)),
            globals=(*facts.globals, *self.globals),
        )

    def _check_storages(self, tensors: tuple[TensorDescriptor, ...]) -> None:
        assert self._file is not None
        for tensor in tensors:
            try:
                self._file.check_storage(tensor)
            except ContainerDefectError as e:
                self.defects.append(defect_of(e, self.name))


def read_archive(location: Location, name: str, folder: Location | None = None) -> TorchArchive:
    """Opens and reads a torch file, part of `folder` if given; use the result as a context manager."""
    archive = TorchArchive(location, name, folder)
    archive.read()
    return archive


def defect_of(error: ContainerDefectError, name: str) -> Defect:
    """The defect that a container's error describes."""
    where = f"{name}:{error.record}" if error.record else name
    return Defect(DefectKind(error.kind), where, str(error))


_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` to fetch the file itself"),
    (b"<!doctype", "an HTML page, saved in place of the file by a download that failed"),
    (b"<html", "an HTML page, saved in place of the file by a download that failed"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (_LEGACY_MAGIC, "in the format of torch before 1.6; load it once and save it again with torch.save"),
)


def name_of_content(beginning: bytes) -> str | None:
    """What a file is that does not begin like a torch zip archive; None for one that does."""
    if beginning.startswith(b"PK\x03\x04"):
        return None
    for magic, what in _BEGINNINGS:
        if beginning.lower().startswith(magic.lower()):
            return what
    if not any(beginning):
        return "filled with zeros at its beginning, as a crash of the machine leaves it"
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < 2**32:
        return "a safetensors file"
    if all(b in b"\t\n\r" or 32 <= b < 127 for b in beginning):
        return "a text file"
    return "data of no known format"


def _limited(defects: list[Defect]) -> list[Defect]:
    if len(defects) <= MAX_DEFECTS:
        return defects
    rest = len(defects) - MAX_DEFECTS
    more = Defect(DefectKind.DAMAGED, defects[-1].where, f"{rest:,} further defects of this file are not listed")
    return [*defects[:MAX_DEFECTS], more]
