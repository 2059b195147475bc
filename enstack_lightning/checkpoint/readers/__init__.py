"""One module a format; `read_facts` picks the one that fits what stands at a path."""

from __future__ import annotations

from pathlib import Path

from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts
from enstack_lightning.checkpoint.readers.enstack_dir import is_enstack_folder, read_enstack_folder
from enstack_lightning.checkpoint.readers.lightning import read_lightning

__all__ = ["is_enstack_folder", "read_facts"]


def read_facts(path: Path) -> Facts:
    """Facts of the checkpoint at `path`, whatever its format.

    Never raises for what a file holds: what cannot be read or recognised is a defect in the facts.
    """
    try:
        if not path.is_dir():
            return read_lightning(path)
        if is_enstack_folder(path):
            return read_enstack_folder(path)
        defect = Defect(DefectKind.UNRECOGNISED, str(path), "the folder holds none of the files of a checkpoint")
    except PermissionError as e:
        defect = Defect(DefectKind.UNREADABLE, str(path), f"it cannot be read: {e.strerror}")
    return Facts(str(path), defects=(defect,))
