"""What it takes, beside a file's own bytes, for a file to be there after a power loss: its name on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP)
"""How file systems that synchronise no folders say so (shared folders of virtual machines, for example)."""


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        if os.name == "nt":
            return
        raise
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(fd)
