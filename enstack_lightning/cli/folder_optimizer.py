"""Optimizer and scheduler of an EnStack folder, in the form of the classifier's own AdamW and LambdaLR.

EnStack's optimizer numbers its parameters in the order of its network; the classifier's has two groups, in another
order. Moments are moved by name, which a place in a group gives where exactly one known order fits all shapes. What is
no AdamW, or no schedule of a function, is refused: its numbers would mean something else here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enstack_lightning.errors import CheckpointError
from enstack_lightning.model.classifier import parameter_groups

Shapes = dict[str, tuple[int, ...]]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_HOW_TO_RUN = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_MEANT = ("lr", "initial_lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Fitted:
    """An optimizer's and a scheduler's state that the classifier's take back.

    Attributes:
        optimizer: the state of `torch.optim.AdamW` with the classifier's two groups.
        scheduler: the state of `torch.optim.lr_scheduler.LambdaLR`.
        said: what a person should know of them; empty where all was there.
    """

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    said: list[str]


def fitted(state: Mapping[str, Any], network: nn.Module, steps: int, folder: Path) -> Fitted:
    """Moves the states of a folder's optimizer and scheduler to where the classifier's expect them.

    Args:
        state: content of `training_state.pth`.
        network: the network of the folder's config; its parameters may be on the meta device.
        steps: optimizer steps done, for a scheduler whose state is not there.
        folder: the folder, for messages.

    Raises:
        CheckpointError: the optimizer is no AdamW of this network's parameters, or the scheduler no LambdaLR.
    """
    saved = state["optimizer_state_dict"]
    ours = [[name for name, _ in group["params"]] for group in parameter_groups(network, 0.0)]
    shapes = {f"model.{name}": tuple(p.shape) for name, p in network.named_parameters()}
    _check_is_adamw(saved, folder)
    numbers, group_of = _numbers_by_name(saved, ours, shapes, folder)
    of_ours = [_only_group({group_of[name] for name in names}, saved, folder) for names in ours]
    groups: list[dict[str, Any]] = []
    moments: dict[int, dict[str, Any]] = {}
    for names, saved_group in zip(ours, of_ours, strict=True):
        options = saved["param_groups"][saved_group]
        meant = {"initial_lr": options["lr"], **{name: options[name] for name in _MEANT if name in options}}
        meant["betas"] = tuple(options["betas"])
        adamw = {"amsgrad": bool(options.get("amsgrad")), "maximize": bool(options.get("maximize")), **_OF_TORCH}
        places = list(range(len(moments), len(moments) + len(names)))
        groups.append({**meant, **adamw, "params": places, "param_names": names})
        moments.update(zip(places, (_moments(saved["state"], numbers[name]) for name in names), strict=True))
    optimizer = {"state": {place: values for place, values in moments.items() if values}, "param_groups": groups}
    scheduler, said = _scheduler(state.get("scheduler_state_dict"), groups, of_ours, steps, folder)
    if any(group["weight_decay"] for group in groups[1:]):
        said.append(
            f"weight decay {groups[1]['weight_decay']:g} holds for biases and normalization weights too, as there"
        )
    return Fitted(optimizer, scheduler, said)


_OF_TORCH = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def _check_is_adamw(saved: Mapping[str, Any], folder: Path) -> None:
    known = {*_HOW_TO_RUN, *_MEANT, "params", "param_names"}
    for group in saved["param_groups"]:
        odd = sorted(str(name) for name in group if name not in known)
        lacking = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
        if odd or lacking:
            what = f"it has {odd[0]}" if odd else f"it has no {lacking[0]}"
            raise _refused(folder, f"the optimizer is no torch.optim.AdamW ({what})")
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            raise _refused(folder, "the optimizer is Adam, whose weight decay is another than AdamW's")
    wrong = [n for n, values in saved["state"].items() if not all(name in values for name in ("step", *_MOMENTS))]
    if wrong:
        raise _refused(folder, f"the optimizer has no moments of AdamW for parameter {wrong[0]}")


def _numbers_by_name(
    saved: Mapping[str, Any], ours: Sequence[Sequence[str]], shapes: Shapes, folder: Path
) -> tuple[dict[str, int], dict[str, int]]:
    """The number of every parameter in the folder's optimizer, and the group it is in, by the parameter's name."""
    groups = saved["param_groups"]
    fitting = [named for named in _ways_to_name(groups, ours, shapes) if _fits(named, groups, saved["state"], shapes)]
    if not fitting or any(named != fitting[0] for named in fitting):
        count = sum(len(group["params"]) for group in groups)
        raise _refused(
            folder,
            f"the {count:,} parameters of the optimizer ({len(groups):,} groups) are "
            f"{'not those of the network' if not fitting else 'in more than one order those of the network'}, which "
            f"has {len(shapes):,}",
        )
    pairs = [
        (name, number, index)
        for index, (names, group) in enumerate(zip(fitting[0], groups, strict=True))
        for name, number in zip(names, group["params"], strict=True)
    ]
    return {name: number for name, number, _ in pairs}, {name: index for name, _, index in pairs}


def _ways_to_name(
    groups: Sequence[Mapping[str, Any]], ours: Sequence[Sequence[str]], shapes: Shapes
) -> Iterator[list[list[str]]]:
    """The names that the parameters of the groups can have: those given, else by the orders that there have been."""
    if all("param_names" in group for group in groups):
        yield [
            [f"model.{str(n).removeprefix('module.').removeprefix('model.')}" for n in g["param_names"]] for g in groups
        ]
        return
    decayed = set(ours[0])
    for order in (list(shapes), _order_of_transformers_4(list(shapes))):
        parts = [name for name in order if name in decayed], [name for name in order if name not in decayed]
        yield from ([order], [*parts], [*reversed(parts)])


def _order_of_transformers_4(names: list[str]) -> list[str]:
    """There the embedding of positions came before that of token types."""
    positions = [name for name in names if name.endswith("embeddings.position_embeddings.weight")]
    rest = [name for name in names if name not in positions]
    after = next((i for i, name in enumerate(rest) if name.endswith("embeddings.word_embeddings.weight")), -1) + 1
    return [*rest[:after], *positions, *rest[after:]]


def _fits(
    named: list[list[str]], groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any], shapes: Shapes
) -> bool:
    if [len(names) for names in named] != [len(group["params"]) for group in groups]:
        return False
    if sorted(name for names in named for name in names) != sorted(shapes):
        return False
    pairs = (
        pair for names, group in zip(named, groups, strict=True) for pair in zip(names, group["params"], strict=True)
    )
    return all(
        tuple(state[number][moment].shape) == shapes[name]
        for name, number in pairs
        if number in state
        for moment in _MOMENTS
    )


def _only_group(found: set[int], saved: Mapping[str, Any], folder: Path) -> int:
    """The group whose options all parameters of one of the classifier's groups have."""
    options = [{name: saved["param_groups"][i].get(name) for name in _MEANT} for i in sorted(found)]
    if any(other != options[0] for other in options):
        raise _refused(
            folder, "its param groups are cut otherwise, with options that differ inside the classifier's groups"
        )
    return min(found)


def _moments(state: Mapping[int, Any], number: int) -> dict[str, Any]:
    values = state.get(number)
    if values is None:
        return {}
    names = [name for name in (*_MOMENTS, "max_exp_avg_sq") if name in values]
    step = torch.as_tensor(values["step"], dtype=torch.float32).cpu().reshape(()).clone()
    return {"step": step, **{name: values[name] for name in names}}


def _scheduler(
    saved: Mapping[str, Any] | None,
    groups: Sequence[Mapping[str, Any]],
    of_ours: Sequence[int],
    steps: int,
    folder: Path,
) -> tuple[dict[str, Any], list[str]]:
    said = []
    if saved is None:
        position = steps
        base, last = ([group[name] for group in groups] for name in ("initial_lr", "lr"))
        said.append(f"the scheduler's state is not in it and is set to step {steps:,}")
    elif "lr_lambdas" not in saved:
        raise _refused(folder, "the scheduler is no LambdaLR, as the classifier's warm-up schedules are")
    else:
        position = int(saved["last_epoch"])
        base, last = ([float(saved[name][i]) for i in of_ours] for name in ("base_lrs", "_last_lr"))
    state = {
        "base_lrs": [float(rate) for rate in base],
        "last_epoch": position,
        "_step_count": position + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [float(rate) for rate in last],
        "lr_lambdas": [None] * len(groups),
    }
    return state, said


def _refused(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} cannot be resumed from: {why}. "
        f"Start anew from its weights with --model.model_name_or_path {folder}."
    )
