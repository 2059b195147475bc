"""Where a checkpoint stands: a path on disk or a URL that fsspec knows, seen alike by the readers."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint.facts import Defect, DefectKind
from enstack_lightning.checkpoint.source import LocalSource, RemoteSource, Source, object_store
from enstack_lightning.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class Location(ABC):
    """A file, a folder or nothing, at a place that `str()` names as the user did."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the path."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether a folder stands there; a link to a folder is one too.

        Raises:
            PermissionError: the operating system does not say.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Whether anything stands there, be it a link to nothing."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of all that lies in this folder, sorted.

        Raises:
            OSError: the folder cannot be listed.
        """

    @property
    @abstractmethod
    def parent(self) -> Location:
        """The folder that it stands in."""

    @abstractmethod
    def child(self, name: str) -> Location:
        """What stands under `name` in this folder."""

    @abstractmethod
    def check_file(self, name: str, folder: Location | None = None) -> tuple[Defect | None, int]:
        """Whether a regular file with something in it stands there, and its size in bytes.

        Args:
            name: what to call the file in the defect.
            folder: the checkpoint's folder, which a link must not lead out of (but for the `blobs` of the Hugging Face
                cache that the folder is a snapshot in).
        """

    def leads_out_of(self, folder: Location) -> bool:
        """Whether this path in `folder` is a link, or lies behind one, that leads to another place."""
        return False

    @abstractmethod
    def open(self) -> Source:
        """The file's bytes.

        Raises:
            ContainerDefectError: it is no regular file.
            OSError: it cannot be opened.
        """

    @abstractmethod
    def modified(self) -> float:
        """When the file was last written to, in seconds since 1970; 0 where it is not told."""


@dataclass(frozen=True)
class LocalLocation(Location):
    """A path on disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def is_folder(self) -> bool:
        return self.path.is_dir()

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def names(self) -> tuple[str, ...]:
        with os.scandir(self.path) as entries:
            return tuple(sorted(entry.name for entry in entries))

    @property
    def parent(self) -> LocalLocation:
        return LocalLocation(self.path.parent)

    def child(self, name: str) -> LocalLocation:
        return LocalLocation(self.path / name)

    def check_file(self, name: str, folder: Location | None = None) -> tuple[Defect | None, int]:
        path = self.path
        try:
            if folder is not None and self.leads_out_of(folder):
                return Defect(DefectKind.DAMAGED, name, "it is a link that leads out of the checkpoint's folder"), 0
            status = path.stat()
        except FileNotFoundError:
            broken = path.is_symlink()
            message = "it is a link to a file that is not there" if broken else "it is missing"
            return Defect(DefectKind.MISSING, name, message), 0
        except (OSError, RuntimeError) as e:
            loops = isinstance(e, RuntimeError) or e.errno == errno.ELOOP
            reason = "its links go round in a circle" if loops else e.strerror  # type: ignore[union-attr]
            return Defect(DefectKind.UNREADABLE, name, f"it cannot be read: {reason}"), 0
        except ValueError as e:
            return Defect(DefectKind.MISSING, name, f"no file can have this name: {e}"), 0
        if not stat.S_ISREG(status.st_mode):
            what = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            return Defect(DefectKind.UNRECOGNISED, name, f"it is {what}, not a regular file; it was not opened"), 0
        if status.st_size == 0:
            return Defect(DefectKind.EMPTY, name, "it is empty (0 bytes)"), 0
        return None, status.st_size

    def leads_out_of(self, folder: Location) -> bool:
        try:
            return isinstance(folder, LocalLocation) and not _stays_in(self.path, folder.path)
        except (OSError, RuntimeError):  # links that go round in a circle: reading what stands there says so
            return False

    def open(self) -> Source:
        return LocalSource(self.path)

    def modified(self) -> float:
        return self.path.stat().st_mtime


@dataclass(frozen=True)
class RemoteLocation(Location):
    """An object or a folder of objects behind an fsspec file system.

    Attributes:
        url: as the user named it, with its protocol.
        filesystem: the `fsspec.AbstractFileSystem` of the URL.
        path: the path within it.
    """

    url: str
    filesystem: Any
    path: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def is_folder(self) -> bool:
        return self._is_folder

    @cached_property
    def _is_folder(self) -> bool:
        with object_store():
            return bool(self.filesystem.isdir(self.path))

    def exists(self) -> bool:
        with object_store():
            return bool(self.filesystem.exists(self.path))

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.entries())

    def entries(self) -> tuple[tuple[str, bool], ...]:
        """The names in this folder, sorted, and whether each is a folder itself."""
        return self._entries

    @cached_property
    def _entries(self) -> tuple[tuple[str, bool], ...]:
        with object_store():
            found = self.filesystem.ls(self.path, detail=True)
        own = self.path.strip("/")  # an object store may list a folder's own marker
        paths = [(str(entry["name"]).strip("/"), entry.get("type") == "directory") for entry in found]
        return tuple(sorted((path.rpartition("/")[2], is_folder) for path, is_folder in paths if path != own))

    @cached_property
    def _info(self) -> dict[str, Any]:
        with object_store():
            return dict(self.filesystem.info(self.path))

    @property
    def parent(self) -> RemoteLocation:
        url, path = (whole.rstrip("/").rpartition("/")[0] for whole in (self.url, self.path))
        return RemoteLocation(f"{url}/" if url.endswith(":/") else url, self.filesystem, path)

    def child(self, name: str) -> RemoteLocation:
        url = self.url if self.url.endswith("://") else f"{self.url.rstrip('/')}/"
        return RemoteLocation(f"{url}{name}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def check_file(self, name: str, folder: Location | None = None) -> tuple[Defect | None, int]:
        try:
            found = self._info
        except FileNotFoundError:
            return Defect(DefectKind.MISSING, name, "it is missing"), 0
        except OSError as e:
            return Defect.unreadable(name, e), 0
        if found.get("type") != "file":
            return Defect(DefectKind.UNRECOGNISED, name, "it is not a file"), 0
        size = int(found.get("size") or 0)
        return (None, size) if size else (Defect(DefectKind.EMPTY, name, "it is empty (0 bytes)"), 0)

    def open(self) -> Source:
        return RemoteSource(self.filesystem, self.path, self._info)

    def modified(self) -> float:
        try:
            with object_store():
                return float(self.filesystem.modified(self.path).timestamp())
        except OSError:
            return 0.0


def is_url(path: str) -> bool:
    """Whether a path names a place that only fsspec can read."""
    protocol, separator, _ = path.partition("://")
    return bool(separator) and protocol not in ("", "file", "local")


def locate(path: str | os.PathLike[str]) -> Location:
    """The place that a path or URL names.

    Raises:
        CheckpointError: the URL's protocol needs a package that is not installed, or is not known.
    """
    text = os.fspath(path)
    if not is_url(text):
        return LocalLocation(Path(text.removeprefix("file://").removeprefix("local://")))
    try:
        from fsspec.core import url_to_fs
    except ImportError as e:
        raise CheckpointError(f"{text} is a URL, and reading it needs the package fsspec: pip install fsspec") from e
    try:
        # Listings that the file system kept from before may be older than the checkpoint.
        filesystem, inner = url_to_fs(text, use_listings_cache=False)
    except ImportError as e:
        raise CheckpointError(f"{text} cannot be opened: {e}".splitlines()[0]) from e
    except Exception as e:  # clients raise classes of their own for a wrong setting
        raise CheckpointError(f"{text} cannot be opened: {type(e).__name__}: {e}".splitlines()[0]) from e
    return RemoteLocation(text, filesystem, inner)


def stands_at(path: str) -> bool:
    """Whether anything stands at a path or URL; no where that cannot be asked."""
    try:
        return locate(path).exists()
    except (CheckpointError, OSError):
        return False


def _stays_in(path: Path, folder: Path) -> bool:
    """Whether a path in `folder` leads to no other place, by a link of its own or of a folder on the way to it."""
    if path.parent == folder and not path.is_symlink():
        return True
    target, home = path.resolve(), folder.resolve()
    in_hubs_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    return in_hubs_cache or target.is_relative_to(home)


def leads_out(name: str) -> bool:
    """Whether a file name from an index or a metadata file is anything but a plain path below its folder."""
    parts: Sequence[str] = name.replace("\\", "/").split("/")
    return not name or "\0" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts)
