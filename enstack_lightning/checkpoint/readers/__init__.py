"""One module a format; `read_facts` picks the one that fits what stands at a path."""

from __future__ import annotations

from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.enstack_dir import is_enstack_folder, read_enstack_folder
from enstack_lightning.checkpoint.readers.lightning import read_lightning

__all__ = ["is_enstack_folder", "read_facts"]


def read_facts(location: Location) -> Facts:
    """Facts of the checkpoint at `location`, whatever its format.

    Never raises for what a file holds: what cannot be read or recognised is a defect in the facts.
    """
    try:
        if not location.is_folder():
            return read_lightning(location)
        if is_enstack_folder(location):
            return read_enstack_folder(location)
        defect = Defect(DefectKind.UNRECOGNISED, str(location), "the folder holds none of the files of a checkpoint")
    except PermissionError as e:
        defect = Defect(DefectKind.UNREADABLE, str(location), f"it cannot be read: {e.strerror}")
    return Facts(str(location), defects=(defect,))
