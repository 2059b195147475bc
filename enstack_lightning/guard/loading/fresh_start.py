"""A fresh start that was perhaps meant to be a resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.checkpoint import find_last_good
from enstack_lightning.guard.flavor import checkpoint_dirpaths
from enstack_lightning.guard.saving.atomic import local_path

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def earlier_run(trainer: Trainer) -> str:
    """The sentence that says which checkpoints stand where this run saves, although it starts anew; else empty."""
    if trainer.global_step:
        return ""
    for folder in _folders(trainer):
        if (good := find_last_good(folder)) is not None:
            steps = good.facts.progress.global_step
            at = "" if steps is None else f" (step {steps:,})"
            return (
                f"{folder} holds checkpoints of an earlier run, the newest good one {good.path}{at}. This run starts "
                "anew and saves beside them; to go on from it, give it as ckpt_path"
            )
    return ""


def doubts(trainer: Trainer) -> list[str]:
    """What speaks against starting anew, in sentences: links to checkpoints that are gone.

    `ckpt_path="last"` passes a link over whose target is gone, and Lightning then trains from scratch
    (https://github.com/Lightning-AI/pytorch-lightning/issues/20192). A path that was not to be resumed from looks the
    same from inside a Trainer, so that this cannot be an error.
    """
    said = []
    links = (path for folder in _folders(trainer) for path in sorted(folder.glob("*.ckpt")) if _leads_nowhere(path))
    for link in links:
        good = find_last_good(link.parent)
        instead = f"The newest good checkpoint there is {good.path}." if good else "No good checkpoint stands there."
        said.append(
            f"training starts anew, and {link} is a link to {link.readlink()}, which is gone. If that was to be "
            f'resumed from (ckpt_path="last"), stop and name another. {instead}'
        )
    return said


def _folders(trainer: Trainer) -> list[Path]:
    """The folders on disk that the run saves to."""
    return [folder for dirpath in checkpoint_dirpaths(trainer) if (folder := local_path(dirpath)) is not None]


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
