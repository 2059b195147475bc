"""The moment before a Trainer loads a checkpoint: rank 0 judges the path, and every rank acts on its decision.

Lightning hands each path that it is about to load, wherever it came from, to `_CheckpointConnector.resume_start`, on
every rank and with every strategy: those that shard do not ask their CheckpointIO.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.checkpoint import Format, Report
from enstack_lightning.checkpoint.location import Location, locate
from enstack_lightning.errors import CheckpointError, CheckpointGuardError
from enstack_lightning.guard.flavor import Callback, inherits, is_a, is_just, rank_zero_warn
from enstack_lightning.guard.ranks import gathered
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

_ENDS = 256 * 2**10
"""Bytes of a file's end that ranks compare: a torch file has its directory there, with every record's checksum."""

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the looks of ranks that do not see the same: a network file system may show a file late."""

Contents = dict[str, str]
"""What a rank sees at a path: for each file its size and the digest of its two ends."""


@dataclass(frozen=True)
class Decision:
    """What rank 0 came to.

    Attributes:
        path: the path to load; None for a fresh start.
        report: the report on it.
        set_aside: the checkpoints that were renamed, old path to new.
    """

    path: str | None
    report: Report | None = None
    set_aside: dict[str, str] = field(default_factory=dict)


Judge = Callable[[str], Decision]


class GuardedResume:
    """Stands in for `resume_start` of a Trainer's checkpoint connector.

    Args:
        trainer: the Trainer.
        judge: called on rank 0 with the path to be loaded; raises to refuse it, or says which to load.
        accept: called on every rank with the decision, before anything is loaded.
    """

    def __init__(self, trainer: Trainer, judge: Judge, accept: Callable[[Decision], None]) -> None:
        self.trainer = trainer
        self.judge = judge
        self.accept = accept

    def __call__(self, checkpoint_path: str | Path | None = None, *args: Any, **kwargs: Any) -> None:
        asked = os.fspath(checkpoint_path) if checkpoint_path else None
        decision = judged_on_rank_zero(self.trainer, asked, self.judge)
        self.accept(decision)
        path = checkpoint_path if decision.path == asked else decision.path
        connector = self.trainer._checkpoint_connector
        type(connector).resume_start(connector, path, *args, **kwargs)


def guard_loading(trainer: Trainer, judge: Judge, accept: Callable[[Decision], None]) -> None:
    """Lets `judge` see each path before the Trainer loads it; a guard that was put there before is replaced."""
    trainer._checkpoint_connector.resume_start = GuardedResume(trainer, judge, accept)  # type: ignore[method-assign]


def stop_guarding_loading(trainer: Trainer) -> None:
    """Gives the Trainer its own `resume_start` back."""
    vars(trainer._checkpoint_connector).pop("resume_start", None)


def is_of_the_tuner(path: str) -> bool:
    """Whether a checkpoint is that which `Tuner` saves before its search, and goes back to after it.

    Example:
        >>> is_of_the_tuner("runs/.lr_find_6f1e.ckpt"), is_of_the_tuner("runs/last.ckpt")
        (True, False)
    """
    return Path(path).name.startswith((".lr_find_", ".scale_batch_size_"))


def safe_globals() -> frozenset[str]:
    """The names that `torch.load(weights_only=True)` allows beside its own, as `module.name`.

    As `_get_user_allowed_globals` in torch/_weights_only_unpickler.py has them.
    """
    return frozenset(
        known[1] if isinstance(known, tuple) else f"{known.__module__}.{known.__qualname__}"
        for known in torch.serialization.get_safe_globals()
    )


def reads_formats_of_its_own(strategy: Strategy) -> bool:
    """Whether a strategy or its CheckpointIO loads what the checkpoint core need not know."""
    return is_a(strategy, "DeepSpeedStrategy") or not is_a(_innermost(strategy), "TorchCheckpointIO")


def check_form(strategy: Strategy, report: Report) -> None:
    """Refuses a good checkpoint of a form that this Trainer cannot load: it would end in an error about something else.

    Raises:
        CheckpointGuardError: the Trainer loads Lightning files only, and this is none.
    """
    files_only = inherits(strategy, "Strategy", "load_checkpoint") and is_just(
        _innermost(strategy), "TorchCheckpointIO"
    )
    if report.facts.format is Format.LIGHTNING or not files_only:
        return
    sharded = report.facts.format is Format.SHARDED
    hint = "Load it with the strategy that saved it" if sharded else "Name the .ckpt file that a Trainer saved"
    raise CheckpointGuardError(
        f"checkpoint {report.path} is of the form {report.facts.format!s}, and {type(strategy).__name__} loads "
        f"Lightning .ckpt files only. {hint}."
    )


def is_loaded_as_it_stands(trainer: Trainer, guard: Callback) -> bool:
    """Whether no code but that of Lightning and torch has had a checkpoint in its hands before the `guard` has it.

    As far as methods of theirs can tell: what reaches into the Trainer's connectors is not looked for.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    others = [callback for callback in trainer.callbacks if callback is not guard]  # type: ignore[attr-defined]
    return (
        all(_is_lightnings(strategy, "Strategy", name) for name in ("load_checkpoint", "load_model_state_dict"))
        and all(map(_loads_plainly, _checkpoint_ios(strategy)))
        and _is_lightnings(module, "LightningModule", "on_load_checkpoint")
        and all(_is_lightnings(callback, "Callback", "on_load_checkpoint") for callback in others)
    )


def _is_lightnings(thing: Any, base: str, method: str) -> bool:
    """Whether a thing has a method as Lightning's class of the name `base` has it."""
    return inherits(thing, base, method) and method not in getattr(thing, "__dict__", {})


def _loads_plainly(checkpoint_io: Any) -> bool:
    known = isinstance(checkpoint_io, GuardedCheckpointIO) or any(
        is_just(checkpoint_io, name) for name in ("TorchCheckpointIO", "AsyncCheckpointIO")
    )
    return known and "load_checkpoint" not in vars(checkpoint_io)


def _innermost(strategy: Strategy) -> Any:
    return _checkpoint_ios(strategy)[-1]


def _checkpoint_ios(strategy: Strategy) -> list[Any]:
    """A strategy's CheckpointIO and those that it wraps, from outside in."""
    found: list[Any] = [strategy.checkpoint_io]
    while is_a(inner := getattr(found[-1], "checkpoint_io", None), "CheckpointIO"):
        found.append(inner)
    return found


def judged_on_rank_zero(trainer: Trainer, asked: str | None, judge: Judge) -> Decision:
    """Rank 0's decision, the same on every rank, on files that every rank sees alike.

    Whatever goes wrong on rank 0 is raised on every rank, so that none waits for the others.

    Raises:
        CheckpointGuardError: the checkpoint is refused, another rank sees something else at its path, or rank 0 alone
            would start anew.
    """
    if trainer.world_size == 1:
        return judge(asked) if asked is not None else Decision(None)
    _compare_what_was_asked(gathered(asked))
    failure: Exception | None = None
    said: tuple[Decision, Contents] | str = ""
    if trainer.is_global_zero:
        try:
            decision = judge(asked) if asked is not None else Decision(None)
            said = decision, contents(decision.path)
        except Exception as e:
            failure, said = e, str(e) or type(e).__name__
    said = trainer.strategy.broadcast(said)
    if isinstance(said, str):
        raise failure or CheckpointGuardError(said)
    decision, expected = said
    _check_that_all_see(trainer, decision, expected)
    return decision


def _compare_what_was_asked(of_all: list[str | None]) -> None:
    """Each process finds by itself what `last`, `auto` or a job's requeueing mean; rank 0's answer is that of all."""
    mine, *_ = of_all
    others = [f"rank {rank} was given {path}" for rank, path in enumerate(of_all) if path not in (None, mine)]
    if not others:
        return
    more = f" and {len(others) - 3:,} more were given others" if len(others) > 3 else ""
    if mine is None:
        raise CheckpointGuardError(
            f"rank 0 was given no checkpoint and would start anew, but {', '.join(others[:3])}{more}. Name the "
            "checkpoint, or see to it that all processes see the same files"
        )
    rank_zero_warn(
        f"CheckpointGuard: all ranks load {mine}, as rank 0 was given; {', '.join(others[:3])}{more}. See to it that "
        "all processes see the same files"
    )


def contents(path: str | None) -> Contents:
    """What stands at a path, by sizes and ends of files; never raises."""
    if path is None:
        return {}
    try:
        place = locate(path)
        files = {name: place.child(name) for name in place.names()} if place.is_folder() else {place.name: place}
        return {name: _ends(file) for name, file in files.items() if not file.is_folder()}
    except (OSError, CheckpointError) as e:
        return {path: f"unreadable ({e})"}


def _ends(file: Location) -> str:
    defect, size = file.check_file(file.name)
    if defect is not None:
        return defect.message
    try:
        with file.open() as source:
            start = max(0, size - _ENDS)
            ends = bytes(source.read_at(0, min(size, 4096))) + bytes(source.read_at(start, size - start))
    except (OSError, ValueError) as e:
        return f"{size:,} bytes, unreadable ({e})"
    return f"{size:,} bytes with digest {hashlib.blake2b(ends, digest_size=4).hexdigest()}"


def _check_that_all_see(trainer: Trainer, decision: Decision, expected: Contents) -> None:
    for seconds in (*_WAITS, None):
        seen = contents(decision.path)
        if trainer.strategy.reduce_boolean_decision(seen == expected):
            return
        if seconds is not None:
            time.sleep(seconds)
    of_all: list[Contents] = [trainer.strategy.broadcast(seen, src=rank) for rank in range(trainer.world_size)]
    differences = [
        f"rank {rank} sees {name}: {found.get(name, 'it is missing')}; rank 0: {expected.get(name, 'it is missing')}"
        for rank, found in enumerate(of_all)
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    more = f"; and {len(differences) - 3:,} more" if len(differences) > 3 else ""
    raise CheckpointGuardError(
        f"checkpoint {decision.path} is not the same on every rank: {'; '.join(differences[:3])}{more}. "
        "Put it where all processes read the same files, or copy it to every node."
    )
