"""A live Trainer or a loaded checkpoint dict becomes facts, so that the same rules judge it as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from enstack_lightning.checkpoint.facts import Facts, Format, OptimizerFacts, RunFacts, SchedulerFacts
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.lightning import (
    lightning_content,
    lightning_facts,
    progress_facts,
    with_defects,
)
from enstack_lightning.checkpoint.readers.shapes import misshapen
from enstack_lightning.checkpoint.readers.states import optimizer_of, plain, schedule_options, scheduler_of
from enstack_lightning.checkpoint.rules.drift_of_run import DIGITS
from enstack_lightning.guard.flavor import inherits, is_a, lightning_version
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.stock_callbacks import epochs_to_train
from enstack_lightning.guard.training_data import TrainingData, training_data

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


MAX_RECORDED_GROUPS = 200
"""Of an optimizer with more param groups than this the options are not recorded."""


@dataclass(frozen=True)
class Configured:
    """What the optimizers and schedulers of a run were made with, taken before a checkpoint is restored into them.

    Attributes:
        optimizers: the options of each optimizer's param groups.
        schedulers: what no step of a scheduler changes, one a scheduler.
        learning_rates: of every param group of every optimizer.
    """

    optimizers: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    schedulers: tuple[Mapping[str, Any], ...] = ()
    learning_rates: tuple[float, ...] = ()


def configured(trainer: Trainer) -> Configured:
    """What a Trainer's optimizers and schedulers are made with (at `on_fit_start`)."""
    return Configured(
        tuple(_group_options(optimizer) for optimizer in trainer.optimizers),
        tuple(schedule_options(_scheduler_state(c.scheduler)) for c in trainer.lr_scheduler_configs),
        learning_rates(trainer),
    )


def _group_options(optimizer: torch.optim.Optimizer) -> tuple[Mapping[str, Any], ...]:
    if len(optimizer.param_groups) > MAX_RECORDED_GROUPS:
        return ()
    return tuple(
        {
            name: plain(value if (number := _scalar(value)) is None else number)
            for name, value in group.items()
            if name not in ("params", "param_names") and not (isinstance(value, torch.Tensor) and value.numel() != 1)
        }
        for group in optimizer.param_groups
    )


def loaded_facts(checkpoint: Mapping[str, Any], path: str) -> Facts:
    """Facts of the dict that a Trainer has just loaded from `path`."""
    return lightning_facts(checkpoint, path, _scalar)


def loaded_as_judged(
    checkpoint: Mapping[str, Any], path: str, judged: Facts | None, as_it_stands: bool = False
) -> tuple[Facts, bool]:
    """Facts of the dict that was loaded, and whether it holds what was judged in the file.

    Its defects are looked for where it does not: hooks of a module may have changed it on the way.

    Args:
        as_it_stands: nobody can have changed it. Then weights and the states of optimizers, which take the longest, are
            not read again where all else is as judged: these states are judged once more when they are restored.
    """
    if judged is None:
        return loaded_facts(checkpoint, path), False
    for known in (judged, None) if as_it_stands else (None,):
        loaded = lightning_content(checkpoint, path, _scalar, known)
        if _same_content(judged, loaded):
            return loaded, True
    return with_defects(loaded, checkpoint), False


def _same_content(judged: Facts, loaded: Facts) -> bool:
    names = ("progress", "optimizers", "schedulers", "tensors", "run", "hyper_parameters", "callbacks", "model_only")
    same_entries = judged.fields.keys() == loaded.fields.keys()
    return same_entries and all(getattr(judged, name) == getattr(loaded, name) for name in names)


def trainer_facts(
    trainer: Trainer,
    path: str,
    loaded: Facts,
    run: RunFacts | None = None,
    parts: Parts | None = None,
) -> Facts:
    """Facts of a Trainer whose loops, optimizers and schedulers are restored (from `on_train_start` on).

    Args:
        loaded: the facts of the checkpoint it was restored from, with which the rules compare these.
        run: what `run_of` says, where it is known already.
        parts: of its module, likewise.
    """
    parts = parts or Parts(trainer.lightning_module)
    run = run or run_of(trainer, parts=parts)
    names = {} if _flattens(trainer) else _names(parts.parameters)
    progress = progress_facts(
        {"epoch": trainer.current_epoch, "global_step": trainer.global_step, "loops": {"fit_loop": _counters(trainer)}}
    )
    module = trainer.lightning_module
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return Facts(
        path,
        Format.LIGHTNING,
        fields=loaded.fields,
        progress=dataclasses.replace(progress, batches_per_epoch=run.batches_per_epoch),
        defects=misshapen({"optimizer_states": states}, "optimizer_states", "lr_schedulers"),
        optimizers=tuple(_optimizer(o, state, names) for o, state in zip(trainer.optimizers, states, strict=True)),
        schedulers=tuple(_scheduler(trainer, c.scheduler) for c in trainer.lr_scheduler_configs),
        run=run,
        hyper_parameters=_hyper_parameters(module),
        data_hyper_parameters=_hyper_parameters(getattr(trainer, "datamodule", None)),
        versions=versions(),
        callbacks=tuple(callback.state_key for callback in trainer.callbacks),  # type: ignore[attr-defined]
        data_module=_stateful(getattr(trainer, "datamodule", None)),
        loader_position=loaded.loader_position,
        moment=loaded.moment,
        part_gradients=loaded.part_gradients,
        live=True,
        saved=loaded,
    )


def run_of(trainer: Trainer, given: Configured | None = None, parts: Parts | None = None) -> RunFacts:
    """What the run is set to do; known in full once the training loader exists.

    Nothing here makes that loader: `Trainer.estimated_stepping_batches` would, before its position is restored, which
    is then lost (`RunFacts.total_steps` reckons the same).

    Args:
        given: what the optimizers and schedulers were made with.
        parts: of its module, where they are known already.
    """
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return RunFacts(
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        scheduler_intervals=tuple(c.interval for c in trainer.lr_scheduler_configs),
        scheduler_frequencies=tuple(c.frequency for c in trainer.lr_scheduler_configs),
        scheduler_kinds=tuple(type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs),
        scheduler_options=given.schedulers if given else (),
        optimizer_kinds=tuple(type(o).__name__ for o in trainer.optimizers),
        optimizer_options=given.optimizers if given else (),
        **_parameters(trainer, parts or Parts(trainer.lightning_module)),
        **_data(trainer),
        seed=int(seed) if seed.isascii() and seed.isdigit() and len(seed) < 19 else None,
    )


def _data(trainer: Trainer) -> dict[str, Any]:
    """Each rank may have a share of the data as its own dataset: what is recorded and compared is that of rank 0."""
    batches = trainer.num_training_batches
    data = training_data(trainer) if trainer.is_global_zero else TrainingData()
    return {
        "batches_per_epoch": int(batches) if math.isfinite(batches) and batches > 0 else None,
        "batch_size": data.batch_size,
        "dataset_rows": data.rows,
        "dataset_fingerprint": data.fingerprint,
    }


def _data_of_now(trainer: Trainer) -> dict[str, Any]:
    """Of loaders that are made anew by epoch, each over data of its own; the next epoch's are not known at an end."""
    at_an_end = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return _data(trainer) | ({"dataset_rows": None, "dataset_fingerprint": None} if at_an_end else {})


def settings_before_restoring(trainer: Trainer) -> dict[str, Any]:
    """What a Trainer is set to do, as far as that is known while a checkpoint is loaded, in the form of a config."""
    return {
        "trainer": {
            "max_epochs": epochs_to_train(trainer),
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
        }
    }


def run_entries(trainer: Trainer, run: RunFacts, loaded: Facts | None, parts: Parts) -> dict[str, Any]:
    """The run as the guard records it in a checkpoint: only what `torch.load(weights_only=True)` allows.

    What a restored state has overridden is recorded as it holds, and not as it was given, so that the next resume says
    it again. Parameters are those of this moment: a callback may have unfrozen some.
    """
    held = loaded.run if loaded is not None else None
    if held is not None and [len(o) for o in held.optimizer_options] == [len(o) for o in run.optimizer_options]:
        run = dataclasses.replace(run, optimizer_options=held.optimizer_options)
    if held is not None and held.scheduler_kinds == run.scheduler_kinds and held.scheduler_options:
        run = dataclasses.replace(run, scheduler_options=held.scheduler_options)
    if [len(o.param_groups) for o in trainer.optimizers] != [len(o) for o in run.optimizer_options]:
        run = dataclasses.replace(run, optimizer_options=())  # groups that joined later were made by no configuration
    run = dataclasses.replace(run, **_parameters(trainer, parts))
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        run = dataclasses.replace(run, **_data_of_now(trainer))
    return {name: _listed(value) for name, value in vars(run).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(v) for v in value]
    return {name: _listed(v) for name, v in value.items()} if is_mapping(value) else value


def _hyper_parameters(module: Any) -> Mapping[str, Any]:
    hyper_parameters = getattr(module, "hparams", None)
    return plain(hyper_parameters) if is_mapping(hyper_parameters) else {}


def _parameters(trainer: Trainer, parts: Parts) -> dict[str, Any]:
    """Name and shape of every parameter in its place, as a few hexadecimal digits, and how many are trained."""
    names = _names(parts.parameters)
    digests = tuple(
        tuple("".join(_digits(p, names) for p in group["params"]) for group in optimizer.param_groups)
        for optimizer in (() if _flattens(trainer) else trainer.optimizers)
    )
    return {
        "parameter_digests": digests,
        "trainable_parameters": sum(1 for p in parts.parameters.values() if p.requires_grad),
    }


def _digits(parameter: torch.Tensor, names: Mapping[int, str]) -> str:
    text = f"{names.get(id(parameter), '')} {tuple(parameter.shape)}"
    return hashlib.blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()


def _names(named: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """The name of each parameter by its id, as it is without `torch.compile`."""
    return {id(parameter): name.replace("_orig_mod.", "") for name, parameter in named.items()}


def _flattens(trainer: Trainer) -> bool:
    """Whether the strategy puts parameters of its own, of other shapes, in the place of the module's."""
    return any(is_a(trainer.strategy, name) for name in ("FSDPStrategy", "DeepSpeedStrategy"))


def _stateful(data_module: Any) -> str | None:
    """The name under which a data module's state lies in a checkpoint; None where it keeps none."""
    kind = "LightningDataModule"
    keeps_one = is_a(data_module, kind) and not inherits(data_module, kind, "load_state_dict")
    return type(data_module).__qualname__ if keeps_one else None


def versions() -> dict[str, str]:
    """The versions that a resume should find again."""
    return {"torch": str(torch.__version__), "lightning": lightning_version()}


def learning_rates(trainer: Trainer) -> tuple[float, ...]:
    """The learning rate of every param group that has one, of every optimizer, as they stand now."""
    rates = (group.get("lr") for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return tuple(float(rate) for rate in rates if rate is not None)  # some optimizers find their own


def most_steps(trainer: Trainer) -> int:
    """The most steps that any parameter of any optimizer has made, of optimizers that count them; else 0."""
    return max((optimizer_of(o.state_dict(), _scalar).most_steps or 0 for o in trainer.optimizers), default=0)


def _counters(trainer: Trainer) -> dict[str, Any]:
    """The loop counters under the keys of a checkpoint; `FitLoop.state_dict()` would also ask the data loader."""
    loop = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    return {
        "epoch_progress": loop.epoch_progress.state_dict(),
        "epoch_loop.batch_progress": epoch_loop.batch_progress.state_dict(),
        "epoch_loop.scheduler_progress": epoch_loop.scheduler_progress.state_dict(),
        "epoch_loop.automatic_optimization.optim_progress": (
            epoch_loop.automatic_optimization.optim_progress.state_dict()
        ),
        "epoch_loop.manual_optimization.optim_step_progress": (
            epoch_loop.manual_optimization.optim_step_progress.state_dict()
        ),
    }


def _optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], known: Mapping[int, str]) -> OptimizerFacts:
    """The facts of an optimizer; of parameters that nothing is known of, neither names nor shapes."""
    facts = optimizer_of(state, _scalar)
    if not known:
        return facts
    names, shapes = {}, {}
    for group, live in zip(facts.groups, optimizer.param_groups, strict=False):
        for key, parameter in _paired(group.params, live["params"]):
            names[key] = known.get(id(parameter)) or f"parameter {key}"
            shapes[key] = tuple(parameter.shape)
    return dataclasses.replace(facts, names=names, shapes=shapes)


def _paired(keys: Sequence[int | str], parameters: Sequence[torch.Tensor]) -> list[tuple[int | str, torch.Tensor]]:
    return list(zip(keys, parameters, strict=True)) if len(keys) == len(parameters) else []


def _scheduler(trainer: Trainer, scheduler: Any) -> SchedulerFacts:
    optimizer = getattr(scheduler, "optimizer", None)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in getattr(optimizer, "param_groups", ())]
    facts = scheduler_of(_scheduler_state(scheduler), optimizer_of({"param_groups": groups}, _scalar).groups)
    alone = [getattr(c.scheduler, "optimizer", None) for c in trainer.lr_scheduler_configs].count(optimizer) == 1
    return dataclasses.replace(facts, scheduled_lr=_scheduled_lr(scheduler)) if alone else facts


def _scheduler_state(scheduler: Any) -> Mapping[str, Any]:
    """Its `state_dict()`; empty where that is no dict, as a scheduler of the user's own may have it."""
    state = scheduler.state_dict()
    return state if is_mapping(state) else {}


def _scheduled_lr(scheduler: Any) -> tuple[float, ...]:
    """What this run's schedule gives at its position, where its function is the run's own; else empty.

    All others have their whole schedule from the checkpoint.
    """
    if not isinstance(scheduler, LambdaLR):
        return ()
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    return tuple(float(base * factor(scheduler.last_epoch)) for base, factor in pairs)


def _scalar(value: object) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value)
    return None
