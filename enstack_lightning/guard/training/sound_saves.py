"""A checkpoint whose weights or moments are not finite is no step forward: it is saved under a name that no search
takes for a checkpoint, and the callbacks that keep the best and the last ones are not told of it.

`ModelCheckpoint` notes a path as its best before it saves, and lets the former best go after it; so it is stopped
before both, on every rank and whatever the strategy writes with. What others save is seen by the guard's CheckpointIO.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.search import NONFINITE_SUFFIX
from enstack_lightning.guard.flavor import is_model_checkpoint, rank_zero_warn
from enstack_lightning.guard.ranks import on_any_rank
from enstack_lightning.guard.training.nonfinite import listed, nonfinite_among

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

_MOMENTS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "prev"),
)
"""What torch's optimizers call the averages they keep of a parameter's gradients. Other entries may be infinite."""

_GATED = ("_save_topk_checkpoint", "_save_last_checkpoint", "_save_checkpoint")


class SoundSaves:
    """Keeps checkpoints with weights that are not finite apart, in one Trainer.

    Only trained parameters and the optimizers' moments count, and of these only what was finite when training started:
    buffers hold infinities for good reasons (attention masks, the best metric so far), and so may a frozen parameter.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self._from_the_start: frozenset[str] | None = None
        self._known: tuple[tuple[int, int], list[str]] | None = None
        self._aside = ""
        self._in_bad_run = False
        self._passing = False
        self._passed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"trainer": None}  # a copy of a callback whose saves go through here has another Trainer

    def start(self, trainer: Trainer) -> None:
        """To be called when training starts, with everything restored."""
        self.__init__()  # type: ignore[misc]
        self.trainer = trainer
        for callback in trainer.checkpoint_callbacks:
            if is_model_checkpoint(callback):
                for name in _GATED:
                    if callable(getattr(callback, name, None)):
                        setattr(callback, name, _Gate(self, callback, name))

    def before_step(self) -> None:
        """To be called before an optimizer steps: until the first one does, all is as it was at the start."""
        if self.trainer is not None:
            self._not_from_the_start(())

    def _not_from_the_start(self, bad: Iterable[str]) -> list[str]:
        assert self.trainer is not None
        if self._from_the_start is None:
            self._from_the_start = frozenset(nonfinite_among(_live_tensors(self.trainer)))
        return [name for name in bad if name not in self._from_the_start]

    def stop(self) -> None:
        """To be called at teardown; the callbacks are as they were."""
        for callback in self.trainer.checkpoint_callbacks if self.trainer is not None else ():
            for name in _GATED:
                if isinstance(vars(callback).get(name), _Gate):
                    delattr(callback, name)

    # What ModelCheckpoint saves

    def admits(self, callback: ModelCheckpoint) -> bool:
        """Whether a callback may save now; else it is done for it, aside, for the first of a run of such saves."""
        trainer = self.trainer
        assert trainer is not None
        bad = self._bad_now(trainer)
        if not on_any_rank(trainer, bool(bad)):
            self._in_bad_run = False
            return True
        if not self._in_bad_run:
            self._in_bad_run = True
            path = callback.format_checkpoint_name(callback._monitor_candidates(trainer)) + NONFINITE_SUFFIX
            stays = callback.best_model_path or callback.last_model_path
            rank_zero_warn(
                f"CheckpointGuard: {_said(bad)} not finite at step {trainer.global_step:,}. What was to be saved now "
                f"is saved aside as {path}; "
                + (f"{stays} stays the best or last one. " if stays else "no checkpoint stands yet. ")
                + "Further ones like it are not saved. Resume from the last checkpoint before, with a lower learning "
                "rate or other data."
            )
            trainer.save_checkpoint(path, callback.save_weights_only)
            self._keep_only(trainer, path)
        return False

    @contextlib.contextmanager
    def passing(self, path: str | None) -> Iterator[None]:
        """While a callback saves what was found sound."""
        before, self._passing = self._passing, True
        if path is not None:
            self._passed.add(path)
        try:
            yield
        finally:
            self._passing = before

    def is_passing(self) -> bool:
        """Whether the callback's save under way was admitted."""
        return self._passing

    def _bad_now(self, trainer: Trainer) -> list[str]:
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        key = trainer.global_step, progress.ready
        if self._known is None or self._known[0] != key:
            found = nonfinite_among(_live_tensors(trainer))
            self._known = key, self._not_from_the_start(found)
        return self._known[1]

    def _keep_only(self, trainer: Trainer, path: str) -> None:
        if self._aside and self._aside != path:
            trainer.strategy.remove_checkpoint(self._aside)
        self._aside = path

    # What anyone else saves

    def place_for(self, checkpoint: Mapping[str, Any], path: str | Path) -> str | Path:
        """Where a checkpoint is to be saved that was to stand at `path`."""
        name = os.fspath(path)
        if name in self._passed:
            self._passed.discard(name)
            return path
        if self.trainer is None or name.endswith(NONFINITE_SUFFIX):
            return path
        bad = self._not_from_the_start(nonfinite_among(_saved_tensors(self.trainer, checkpoint)))
        if not bad:
            return path
        rank_zero_warn(
            f"CheckpointGuard: {_said(bad)} not finite in the checkpoint for {name}. It is saved aside as "
            f"{name}{NONFINITE_SUFFIX}, and what stands at {name} is left as it is."
        )
        return name + NONFINITE_SUFFIX


class _Gate:
    """Stands in for one of the methods by which a `ModelCheckpoint` saves."""

    def __init__(self, saves: SoundSaves, callback: ModelCheckpoint, name: str) -> None:
        self.saves = saves
        self.callback = callback
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gate:
        """A copied callback has a gate of its own, and no copy of the Trainer with it."""
        return _Gate(self.saves, memo.get(id(self.callback), self.callback), self.name)

    def __call__(self, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        saves = self.saves
        save = getattr(type(self.callback), self.name).__get__(self.callback)
        if trainer is not saves.trainer:
            return save(trainer, *args, **kwargs)
        if not saves.is_passing() and not saves.admits(self.callback):
            return None
        path = str(args[0]) if self.name == "_save_checkpoint" and args else None
        with saves.passing(path):
            return save(trainer, *args, **kwargs)


def _saved_tensors(trainer: Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint that is being saved, what `_live_tensors` are of the Trainer."""
    weights = checkpoint.get("state_dict")
    found = {k: weights[k] for k in _trained(trainer) if k in weights} if is_mapping(weights) else {}
    for i, state in enumerate(checkpoint.get("optimizer_states") or ()):
        found |= _moments(i, state.get("state") if is_mapping(state) else None)
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def _live_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Trained parameters and moments, by the names that a checkpoint has for them."""
    found: dict[str, Tensor] = _trained(trainer)
    for i, optimizer in enumerate(trainer.optimizers):
        state = getattr(optimizer, "state", None)
        if is_mapping(state):
            order = [p for group in optimizer.param_groups for p in group["params"]]
            found |= _moments(i, {n: state[p] for n, p in enumerate(order) if p in state})
    return found


def _trained(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}


def _moments(optimizer: int, state: object) -> dict[str, Tensor]:
    if not is_mapping(state):
        return {}
    return {
        f"{name} of parameter {key} in optimizer {optimizer}": entry[name]
        for key, entry in state.items()
        if is_mapping(entry)
        for name in _MOMENTS
        if isinstance(entry.get(name), torch.Tensor)
    }


def _said(bad: list[str]) -> str:
    return f"{listed(bad)} {'is' if len(bad) == 1 else 'are'}" if bad else "weights on another rank are"
