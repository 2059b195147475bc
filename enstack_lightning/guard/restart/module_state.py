"""What a LightningModule holds beside its state_dict: modes of its layers, plain attributes, and what its hooks do.

Modes are put back. Of attributes a checkpoint keeps nothing that the module does not save itself, and Lightning calls
no hook twice: here stands what is compared at a resume, so that the resume report can say what the run has lost.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from enstack_lightning.guard.flavor import inherits, is_a, lightning_base
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.held_values import (
    checksum,
    differences,
    few,
    is_users,
    names_of_layers,
    taken_down,
    tensors_of,
)
from enstack_lightning.guard.restart.lost_by_others import names_of_lightning, users_callbacks
from enstack_lightning.guard.restart.stock_callbacks import begins_epoch_anew, found_by_searches

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_OURS = ("lightning.", "pytorch_lightning.", "enstack_lightning.")


def capture_module_state(trainer: Trainer, parts: Parts, point: str) -> dict[str, Any]:
    """What the module holds at a save, as names, numbers and checksums.

    Args:
        trainer: the Trainer whose checkpoint is made.
        parts: of its module.
        point: the moment of the save.

    Returns:
        `evaluating`: the names of layers in evaluation mode, None where a step or hook has failed; `hook`: the module's
        hook that the save came before, or None; its attributes as `taken_down` has them; and `buffers`, checksums of
        those that are not persistent.
    """
    module = trainer.lightning_module
    known = point not in ("in_step", "batch_end_failed", "elsewhere")
    return {
        "evaluating": _evaluating(trainer, parts, point) if known else None,
        "hook": _hook_to_come(module) if known and point != "epoch_start" else None,
        **taken_down(_held_by(module, parts), tensors_of(parts)),
        "buffers": dict(_buffers(parts)),
    }


# Layers in training or evaluation


def _evaluating(trainer: Trainer, parts: Parts, point: str) -> list[str]:
    """Validation puts all layers into evaluation, and keeps what it goes back to."""
    modes: dict[str, bool] = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if point == "validation_end" else {}
    return [name for name, layer in parts.layers if not modes.get(name, layer.training)]


def restore_modes(parts: Parts, saved: Mapping[str, Any] | None) -> None:
    """Puts layers into training or evaluation as they were: what sets it at an epoch's start is not called again."""
    evaluating = (saved or {}).get("evaluating")
    if evaluating is None:
        return
    for name, layer in parts.layers:
        layer.training = name not in evaluating


# Before the weights are loaded


def convert_before_loading(trainer: Trainer) -> None:
    """Makes a module double that is going to be: loaded before, weights would be rounded to what it is now."""
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    if is_a(plugin, "DoublePrecision") and not strategy.restore_checkpoint_after_setup:
        plugin.convert_module(trainer.lightning_module)


def skip_sanity_check(trainer: Trainer) -> Callable[[], None]:
    """Lets no validation come before a resumed run: it came once, before the first batch of all.

    Returns:
        Gives the Trainer its setting back.
    """
    steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0

    def give_back() -> None:
        trainer.num_sanity_val_steps = steps

    return give_back


# Attributes


def _held_by(module: LightningModule, parts: Parts) -> dict[str, Any]:
    """What the module's own code has set, and what layers of the user's classes hold, by name."""
    theirs = names_of_lightning(lightning_base(module, "LightningModule"))
    held = {n: value for n, value in vars(module).items() if n not in theirs and not f"{n}".startswith("_hparams")}
    users = set(filter(is_users, {type(layer) for _, layer in parts.layers}))
    for path, layer in parts.layers:
        if path and type(layer) in users and "_defaults" not in vars(layer):  # a metric's is kept with the epoch
            held |= {f"{path}.{n}": value for n, value in vars(layer).items() if n not in names_of_layers()}
    return held


def _buffers(parts: Parts) -> Iterator[tuple[str, int]]:
    """Checksums of those that no state_dict has."""
    for prefix, layer in parts.layers:
        for name in layer._non_persistent_buffers_set:
            if (found := checksum(layer._buffers.get(name))) is not None:
                yield f"{prefix}.{name}" if prefix else f"{name}", found


def attributes_lost(trainer: Trainer, parts: Parts, saved: Mapping[str, Any]) -> str | None:
    """How the module's attributes differ from those that it had at the save; None where they do not."""
    module, searched = trainer.lightning_module, found_by_searches(trainer)
    found = [said for name, said in _differences(module, parts, saved) if name not in searched]
    return f"{few(found)}, which no checkpoint keeps" if found else None


def _differences(module: LightningModule, parts: Parts, saved: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from differences(saved, _held_by(module, parts), "self", tensors_of(parts))
    now = dict(_buffers(parts))
    for name, was in saved.get("buffers", {}).items():
        if now.get(name, was) != was:
            yield name, f"the buffer {name} held other values"


# Hooks


def _hook_to_come(module: LightningModule) -> str | None:
    """The module's own hook, where a callback saves in its hook of that name: callbacks are called first.

    Only the stack tells who saves: the module in its own hook, or one of the callbacks that Lightning calls after it.
    """
    name = module._current_fx_name
    if name is None or not _overrides(module, name) or _does_nothing(getattr(module, name)):
        return None
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        caller = frame.f_code.co_name
        if (
            caller in ("_call_callback_hooks", "_call_lightning_module_hook")
            and frame.f_locals.get("hook_name") == name
        ):
            before = caller == "_call_callback_hooks" and frame.f_locals.get("monitoring_callbacks") is not True
            return name if before else None
    return None


def lost_by_module(trainer: Trainer, parts: Parts, saved: Mapping[str, Any] | None) -> list[str]:
    """Why the module need not go on as it stood at the save, in short sentences.

    Args:
        trainer: the Trainer, with everything restored.
        parts: of its module.
        saved: what `capture_module_state` returned; None or empty where nothing is known.
    """
    if not saved:
        return []
    module = trainer.lightning_module
    lost = []
    if hook := saved.get("hook"):
        lost.append(f"{type(module).__name__}.{hook} was to come after the save, and is not called for it")
    if trainer.fit_loop.restarted_mid_epoch:
        lost += [f"{name}.on_train_epoch_start is not called again inside an epoch" for name in _epoch_starts(trainer)]
    if attributes := attributes_lost(trainer, parts, saved):
        lost.append(attributes)
    return lost


def sets_up_at_start(trainer: Trainer) -> bool:
    """Whether code of the module or of a callback runs when training starts, and may set what is compared."""
    module = trainer.lightning_module
    own = [module] if _overrides(module, "on_train_start") else []
    own += [c for c in users_callbacks(trainer) if _owner(c, "on_train_start").__name__ != "Callback"]
    return not all(_does_nothing(owner.on_train_start) for owner in own)


def _epoch_starts(trainer: Trainer) -> Iterator[str]:
    """Whose hook may have set what holds for the whole epoch, and is kept by none."""
    hook, module = "on_train_epoch_start", trainer.lightning_module
    if _overrides(module, hook) and not _is_restored(module, getattr(module, hook)):
        yield type(module).__name__
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _begins_without_state(callback) and not begins_epoch_anew(trainer, callback):
            yield type(callback).__name__


def _begins_without_state(callback: Any) -> bool:
    """Whether a callback of the user's own begins epochs, and saves nothing of itself."""
    begins = _owner(callback, "on_train_epoch_start")
    own = not begins.__module__.startswith(_OURS) or "on_train_epoch_start" in vars(callback)
    saves = any(_owner(callback, name).__name__ != "Callback" for name in ("state_dict", "on_save_checkpoint"))
    return own and not saves and not is_a(callback, "Checkpoint") and not _does_nothing(callback.on_train_epoch_start)


def _overrides(module: LightningModule, hook: str) -> bool:
    return not inherits(module, "LightningModule", hook)


def _owner(thing: Any, name: str) -> type:
    return next((kind for kind in type(thing).__mro__ if name in vars(kind)), type(thing))


_ON_METRICS = ("reset", "values", "log", "log_dict", "current_epoch", "global_step")
_ON_LAYERS = ("eval", "train", "modules", "children", "isinstance", "torch", "nn")
"""What a hook may name whose effect is put back: states of metrics and logged values; modes of layers."""
_CHANGES = (
    *("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "DELETE", "IMPORT"),
    *("LOAD_DEREF", "LOAD_SUPER", "MAKE_FUNCTION"),  # behind which is code of other functions
)


def _does_nothing(hook: Any) -> bool:
    """Whether a function's code calls nothing and sets nothing."""
    code = getattr(hook, "__code__", None)
    return code is not None and not code.co_names and not code.co_freevars and not _changes(code)


def _is_restored(module: LightningModule, hook: Any) -> bool:
    """Whether a hook's code names nothing but the module's metrics, to reset or log them, or its layers' modes."""
    code = getattr(hook, "__code__", None)
    if code is None or _changes(code):
        return False
    metrics = (name in _ON_METRICS or _is_of_metrics(getattr(module, name, None)) for name in code.co_names)
    return all(metrics) or all(name in _ON_LAYERS or _is_layer(module, name) for name in code.co_names)


def _changes(code: Any) -> bool:
    return any(step.opname.startswith(_CHANGES) for step in dis.get_instructions(code))


def _is_layer(module: LightningModule, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.nn.Module) or isinstance(getattr(torch.nn, name, None), type)


def _is_of_metrics(value: Any) -> bool:
    from torchmetrics import Metric, MetricCollection

    if isinstance(value, torch.nn.ModuleList | torch.nn.ModuleDict) and not isinstance(value, MetricCollection):
        return all(_is_of_metrics(part) for part in value.children())
    return isinstance(value, Metric | MetricCollection)
