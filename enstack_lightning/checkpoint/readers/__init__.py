"""One module a format; `read_facts` picks the one that fits what stands at a path."""

from __future__ import annotations

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.enstack_dir import is_enstack_folder, read_enstack_folder
from enstack_lightning.checkpoint.readers.lightning import read_lightning

__all__ = ["is_checkpoint_folder", "is_enstack_folder", "read_facts"]


def read_facts(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of the checkpoint at `location`, whatever its format.

    Never raises for what a file holds: what cannot be read or recognised is a defect in the facts.

    Args:
        deep: asks for every byte to be read; without it headers, pickles and scalars are.
    """
    try:
        if not location.is_folder():
            return read_lightning(location, deep)
        if is_enstack_folder(location):
            return read_enstack_folder(location, deep)
        defect = Defect(DefectKind.UNRECOGNISED, str(location), "the folder holds none of the files of a checkpoint")
    except PermissionError as e:
        defect = Defect(DefectKind.UNREADABLE, str(location), f"it cannot be read: {e.strerror}")
    return Facts(str(location), defects=(defect,))


def is_checkpoint_folder(location: Location) -> bool:
    """Whether a folder is one checkpoint, whole or damaged, and not a folder of them or of something else."""
    return is_enstack_folder(location)
