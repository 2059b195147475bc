"""A fresh start that was perhaps meant to be a resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.checkpoint import find_last_good
from enstack_lightning.guard.flavor import is_model_checkpoint
from enstack_lightning.guard.saving import local_path

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def doubts(trainer: Trainer) -> list[str]:
    """What speaks against starting anew, in sentences: links to checkpoints that are gone.

    `ckpt_path="last"` passes a link over whose target is gone, and Lightning then trains from scratch
    (https://github.com/Lightning-AI/pytorch-lightning/issues/20192). A path that was not to be resumed from looks the
    same from inside a Trainer, so that this cannot be an error.
    """
    dirpaths = [c.dirpath for c in trainer.checkpoint_callbacks if is_model_checkpoint(c) and c.dirpath]
    folders = [folder for dirpath in dict.fromkeys(dirpaths) if (folder := local_path(dirpath)) is not None]
    said = []
    for link in (path for folder in folders for path in sorted(folder.glob("*.ckpt")) if _leads_nowhere(path)):
        good = find_last_good(link.parent)
        instead = f"The newest good checkpoint there is {good.path}." if good else "No good checkpoint stands there."
        said.append(
            f"training starts anew, and {link} is a link to {link.readlink()}, which is gone. If that was to be "
            f'resumed from (ckpt_path="last"), stop and name another. {instead}'
        )
    return said


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
