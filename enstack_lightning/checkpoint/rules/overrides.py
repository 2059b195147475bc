"""What the optimizers and schedulers of a live run were given, and lost to the restored state without a word.

Restoring overwrites `param_groups`, `base_lrs`, `T_max` and the like (`torch/optim/optimizer.py` and `lr_scheduler.py`,
`load_state_dict`), so that a value newly given in the configuration has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules.rule import Outcome, info, warning
from enstack_lightning.checkpoint.rules.settings import same, shown

_LENGTHS = frozenset(("T_max", "T_0", "total_steps", "total_iters", "step_size", "total_size", "milestones"))
"""Options of schedulers that tell how long they run."""


def overridden(facts: Facts) -> Iterator[Outcome]:
    """What a live run's optimizers and schedulers were made with, and were restored to something else."""
    saved = facts.saved or facts
    for place, name, given, kept in (*_of_groups(facts, saved), *_of_schedulers(facts, saved)):
        message = f"{name} of {place} is given as {shown(given)} now, and the restored state keeps {shown(kept)}"
        longer = name.rpartition(".")[2] in _LENGTHS and trains_longer(facts)
        yield (info if longer else warning)(
            message,
            place.partition(",")[0],
            "Expected if the schedule follows the run's length: a restored schedule keeps its own."
            if longer
            else "Keep the old value, or set the new one after the restore, in the module's on_train_start, or begin a "
            "new run from the checkpoint's weights.",
        )


def trains_longer(facts: Facts) -> bool:
    """Whether a live run is to end elsewhere than the run that saved: that is done on purpose."""
    before, now = (facts.saved or facts).run, facts.run
    return (before.max_epochs, before.max_steps) != (now.max_epochs, now.max_steps) and before.max_epochs is not None


Override = tuple[str, str, object, object]
"""Whose option it is, its name, what was given and what was restored."""


def _of_groups(facts: Facts, saved: Facts) -> Iterator[Override]:
    restored, given, recorded = facts.optimizers or (), facts.run.optimizer_options, saved.run.optimizer_options
    if saved.run.optimizer_kinds and saved.run.optimizer_kinds != facts.run.optimizer_kinds:
        return  # another class has other options, which CK911 says
    for number, (optimizer, groups) in enumerate(zip(restored, given, strict=False)):
        then = recorded[number] if len(recorded) == len(given) and len(recorded[number]) == len(groups) else None
        named: dict[str, list[tuple[int, object, object]]] = {}
        for index, (group, now) in enumerate(zip(optimizer.groups, groups, strict=False)):
            held = {**group.options, "lr": group.lr, "initial_lr": group.initial_lr, "max_lr": group.max_lr}
            for name in _comparable(now, then is not None):
                if held.get(name) is None or same(now[name], held[name]):
                    continue
                if then is None or (name in then[index] and not same(now[name], then[index][name])):
                    named.setdefault(name, []).append((index, now[name], held[name]))
        for name, (first, *others) in named.items():
            group_of = "" if len(groups) == 1 else f", group {first[0]}"
            more = f" and {len(others):,} more groups" if others else ""
            option = "lr" if name == "initial_lr" else name
            yield f"optimizer {number}{group_of}{more}", option, first[1], first[2]


def _comparable(group: Mapping[str, Any], recorded: bool) -> list[str]:
    """The options of a group that may be compared: a scheduler moves `lr` (and `OneCycleLR` momentum and betas), but
    not `initial_lr`; where nothing was recorded, whatever else may have been set by hand is left alone."""
    base = "initial_lr" if "initial_lr" in group else "lr"
    if recorded:
        return [name for name in group if name == base or name not in ("lr", "initial_lr", "params")]
    return [name for name in ("initial_lr", "weight_decay") if group.get(name) is not None]


def _of_schedulers(facts: Facts, saved: Facts) -> Iterator[Override]:
    restored, given, recorded = facts.schedulers or (), facts.run.scheduler_options, saved.run.scheduler_options
    if saved.run.scheduler_kinds and saved.run.scheduler_kinds != facts.run.scheduler_kinds:
        return
    for number, (scheduler, now) in enumerate(zip(restored, given, strict=False)):
        then = recorded[number] if len(recorded) == len(given) else None
        if then is None and scheduler.kind is None:
            continue  # a class that torch does not have may move any entry
        for name in now:
            if name.rpartition(".")[2] in ("base_lrs", "max_lrs") or name not in scheduler.options:
                continue  # the groups' initial_lr says it
            if same(now[name], scheduler.options[name]):
                continue
            if then is None or (name in then and not same(now[name], then[name])):
                yield f"scheduler {number}", name, now[name], scheduler.options[name]
