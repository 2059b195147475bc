"""Which guarantees of an exact continuation a resume does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from enstack_lightning.checkpoint import Report, Severity
from enstack_lightning.checkpoint.wording import many
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.lost_by_loaders import lost_by_loaders
from enstack_lightning.guard.restart.lost_by_others import lost_by_others, other_settings
from enstack_lightning.guard.restart.module_state import lost_by_module
from enstack_lightning.guard.restart.plain_order import drawn_anew
from enstack_lightning.guard.restart.stock_callbacks import lost_by_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from enstack_lightning.guard.restart.loops import ExactRestart

_LOST = {
    "CK903": "batches have another size; a TrainingSampler gives each row that is left of the epoch once",
    "CK904": "a step takes the gradients of another number of batches",
    "CK905": "another number of processes; a TrainingSampler gives each row that is left of the epoch once",
    "CK909": "another precision rounds otherwise",
    "CK910": "the data is other data",
    "CK911": "the optimizers are others",
    "CK912": "the schedulers are others",
    "CK913": "the parameters are others",
    "CK915": "another version of torch or Lightning may compute otherwise",
    "CK916": "a state was dropped",
    "CK917": "other layers are frozen as it starts than at the save, unless a hook of the run sets that",
}
"""By the rule that found it."""
_NO_POSITION = "loader's position is not in the checkpoint"


def lost_guarantees(report: Report, restart: ExactRestart | None, trainer: Trainer, parts: Parts) -> list[str]:
    """Why the resumed run need not equal the one that never stopped, in short sentences; empty where it will.

    Args:
        report: on the live Trainer.
        restart: how its loops are started again; None where nothing is known of the moment that was saved.
        trainer: the Trainer, with everything restored.
        parts: of its module.
    """
    changed = {f.code for f in report.findings if f.severity is not Severity.PASS}
    lost = [said for code, said in _LOST.items() if code in changed]
    if restart is not None and restart.is_of_another_version:
        lost.append("another version of the guard has saved it")
    elif restart is None or not restart.mine.get("random_state"):
        lost.append("the checkpoint holds no random state of this process, which draws other numbers")
    elif restart.point in ("in_step", "elsewhere"):
        lost.append("it was saved at no moment that a run can go on at: what was left of that step or epoch is lost")
    elif restart.point == "batch_end_failed":
        lost.append(
            "it was saved at no moment that a run can go on at exactly: what was left of that batch's hooks is lost"
        )
    elif restart.point == "epoch_start":
        lost.append("it was saved in on_train_epoch_start, and hooks of that epoch's start are called again")
    if restart is not None and restart.resume.get("told_to_stop"):
        lost.append("the run had been told to stop (trainer.should_stop), and trains on")
    if restart is not None and restart.leaves_out_fetched:
        lost.append("a batch that the loader had given ahead is in no checkpoint, and is left out")
    if report.resume is not None and report.resume.batches_repeated:
        count = many(report.resume.batches_repeated, "batch is", "batches are")
        why = "loader gives other batches than before" if restart and restart.has_order else _NO_POSITION
        lost.append(f"{count} trained twice, since the {why}")
    if restart is not None and restart.order_kept and (said := drawn_anew(trainer)):
        lost.append(said)
    lost += lost_by_loaders(trainer, restart) + rounded_weights(report, parts.parameters)
    if restart is not None:
        lost += lost_by_module(trainer, parts, restart.resume.get("module"))
        lost += lost_by_others(trainer, parts, restart.resume.get("others"))
        lost += other_settings(trainer, restart.resume.get("settings"))
    return lost + lost_by_callbacks(trainer) + of_device(trainer.strategy.root_device)


def rounded_weights(report: Report, named: Mapping[str, torch.Tensor]) -> list[str]:
    """Whether weights were saved in another dtype than the run trains, as by a tool that makes checkpoints smaller."""
    dtypes = {dtype: str(dtype).removeprefix("torch.") for dtype in {p.dtype for p in named.values()}}
    for tensor in report.facts.saved.tensors if report.facts.saved is not None else ():
        parameter = named.get(tensor.name)
        if parameter is not None and tensor.dtype != (trained := dtypes[parameter.dtype]):
            return [f"weights were saved as {tensor.dtype} and are trained as {trained}, such as {tensor.name}"]
    return []


def of_device(device: torch.device) -> list[str]:
    """What a kind of device leaves open, by torch's settings at this moment."""
    if device.type == "cpu":
        return []
    if not torch.are_deterministic_algorithms_enabled():
        return [f"on {device.type} some operations differ from run to run: Trainer(deterministic=True) forbids them"]
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return [f"on {device.type} operations without a deterministic form are only warned of"]
    return []
