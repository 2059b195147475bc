"""CK910 to CK915, and CK917: what only `CheckpointGuard` knows of two runs, since no checkpoint of Lightning holds it.

The guard records it with every save and compares it with the live run that was restored from there. Where nothing was
recorded, as much is compared as the checkpoint's own entries give away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from enstack_lightning.checkpoint.facts import Facts, OptimizerFacts
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

DIGITS = 8
"""Hexadecimal digits of a parameter in `RunFacts.parameter_digests`."""

_MAY_CHANGE_ALONE = frozenset(("datasets",))
"""Kinds of fingerprints that also change where the data does not: Hugging Face's, of files and functions."""

_NEW_RUN = "Resume as the run was saved, or begin a new run from the checkpoint's weights."


@rule(
    "CK910",
    "drift-of-dataset",
    Severity.WARNING,
    compares="rows and fingerprint of the training data with those of the run that saved",
    source="CheckpointGuard's state; the data module's own fingerprints; datasets.Dataset._fingerprint",
)
def drift_of_dataset(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run trains on other rows than the run that saved.

    The number of rows is that of the loader's dataset. The fingerprint is the data module's own, where it has the
    attribute `fingerprints`; of a `TensorDataset` it is a digest of some of its rows; of a Hugging Face dataset that
    library's, which may also change where the rows are the same and is then worth knowing. No other dataset is looked
    into.
    """
    if facts.saved is None:
        return
    before, now = facts.saved.run, facts.run
    if before.dataset_rows is not None and now.dataset_rows is not None and before.dataset_rows != now.dataset_rows:
        verb = "shrank" if now.dataset_rows < before.dataset_rows else "grew"
        yield warning(
            f"the training data {verb} from {before.dataset_rows:,} to {now.dataset_rows:,} rows{_effect(facts)}",
            "data",
            "Resume on the same data, or at an epoch's end with a schedule of the new length.",
        )
        return
    old, new = (run.dataset_fingerprint for run in (before, now))
    if old is None or new is None or old.partition(":")[0] != new.partition(":")[0]:
        if before.dataset_rows is not None and now.dataset_rows is not None:
            yield passed(f"{now.dataset_rows:,} rows of training data, as saved")
        return
    if old == new:
        yield passed("training data as saved")
        return
    kind, _, digest = old.partition(":")
    rows = "" if now.dataset_rows is None else f" of {now.dataset_rows:,} rows"
    message = f"the training data{rows} changed: its fingerprint was {digest[:12]} and is {new.partition(':')[2][:12]}"
    if kind in _MAY_CHANGE_ALONE:
        yield info(message, "data", "Expected if the same rows were made or mapped anew.")
    else:
        yield warning(message, "data", "Resume on the same data: what is left of it is found by position.")


def _effect(facts: Facts) -> str:
    """What another number of rows does to the epoch."""
    saved, now = facts.saved, facts.run
    before = saved.batches_per_epoch if saved else None
    if not before or not now.batches_per_epoch or before == now.batches_per_epoch:
        return ""
    plan = plan_resume(saved) if saved else None
    inside = f", of which {plan.step:,} count as done" if plan is not None and plan.kind == "mid-epoch" else ""
    return f": an epoch had {many(before, 'batch', 'batches')} and has {now.batches_per_epoch:,}{inside}"


@rule(
    "CK911",
    "drift-of-optimizers",
    compares="number and classes of the optimizers, and their groups' options, with those saved",
    source="torch/optim/optimizer.py, load_state_dict; lightning/pytorch/strategies/strategy.py",
)
def drift_of_optimizers(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run has other optimizers than the run that saved.

    Lightning restores as many as both have, and says nothing of the others. An optimizer of another class takes over
    the groups of the old one: where these lack an option of its own it raises KeyError at its first step, an error;
    else it goes on with moments that another algorithm made.
    """
    if facts.saved is None or facts.saved.optimizers is None or facts.optimizers is None:
        return
    before, now = facts.saved.optimizers, facts.optimizers
    kept = min(len(before), len(now))
    if len(before) > len(now):
        yield warning(
            f"the checkpoint has {many(len(before), 'optimizer')} and the run {len(now):,}: the state of the last "
            f"{len(before) - kept:,} is dropped",
            "optimizer",
            _NEW_RUN,
        )
    elif before and len(before) < len(now):
        yield warning(
            f"the checkpoint has {many(len(before), 'optimizer')} and the run {len(now):,}: the last "
            f"{len(now) - kept:,} begin anew",
            "optimizer",
            _NEW_RUN,
        )
    wrong = list(_other_classes(facts, kept))
    yield from wrong
    if kept and not wrong and len(before) == len(now):
        yield passed(f"{many(kept, 'optimizer')}, as saved")


def _other_classes(facts: Facts, count: int) -> Iterator[Outcome]:
    assert facts.saved is not None
    kinds, recorded = facts.run.optimizer_kinds, facts.saved.run.optimizer_kinds
    for number in range(count):
        lacking = _lacking(facts, number)
        new = kinds[number] if number < len(kinds) else "optimizer"
        old = recorded[number] if number < len(recorded) else None
        was = f"optimizer {number} was {old} and is {new}" if old else f"optimizer {number} is {new} now"
        if lacking:
            yield error(
                f"{was}: the restored groups have no {', '.join(lacking[:3])}, and its first step would raise KeyError",
                "optimizer",
                _NEW_RUN,
            )
        elif old is not None and old != new:
            yield warning(f"{was}: it goes on with the moments of the other", "optimizer", _NEW_RUN)


def _lacking(facts: Facts, number: int) -> list[str]:
    """The options that the optimizer was made with, and that its restored groups no longer have."""
    given = facts.run.optimizer_options
    held = facts.optimizers[number].groups if facts.optimizers else ()
    if number >= len(given) or not given[number] or not held:
        return []
    there = {"lr", "initial_lr", "max_lr", "params", *held[0].options}
    return [name for name, value in given[number][0].items() if name not in there and value is not None]


@rule(
    "CK912",
    "drift-of-schedulers",
    Severity.WARNING,
    compares="number, classes, interval and frequency of the schedulers with those saved",
    source="torch/optim/lr_scheduler.py, load_state_dict; lightning's checkpoint connector",
)
def drift_of_schedulers(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run has other schedulers than the run that saved, or steps them otherwise.

    Lightning restores as many as both have, and torch copies whatever entries the state has into whatever class: a
    `StepLR` gets the `T_max` of a cosine and goes on from its position. A position that counted steps is read as one of
    epochs, and the other way round.
    """
    if facts.saved is None or facts.saved.schedulers is None or facts.schedulers is None:
        return
    before, now = facts.saved.schedulers, facts.schedulers
    if before and not now and all(scheduler.kind == "SWALR" for scheduler in before):
        return  # the callback of stochastic weight averaging makes it anew when the epoch starts, with its state
    unchanged = len(before) == len(now)
    if not unchanged:
        effect = "the others are dropped" if len(before) > len(now) else "the others begin at step 0"
        yield warning(
            f"the checkpoint has {many(len(before), 'scheduler')} and the run {len(now):,}: {effect}",
            "scheduler",
            _NEW_RUN,
        )
    for number in range(min(len(before), len(now))):
        for message in (_other_schedule(facts, number), _other_interval(facts, number)):
            if message:
                unchanged = False
                yield warning(message, "scheduler", _NEW_RUN)
    if unchanged and now:
        yield passed(f"{many(len(now), 'scheduler')}, as saved")


def _other_schedule(facts: Facts, number: int) -> str | None:
    assert facts.saved is not None
    recorded, kinds = facts.saved.run.scheduler_kinds, facts.run.scheduler_kinds
    state, given = (facts.saved.schedulers or ())[number], facts.run.scheduler_options
    if number >= len(kinds):
        return None
    if number < len(recorded):
        old = recorded[number]
        differs = old != kinds[number]
    else:  # told from the entries of the state, where each side has some that the other lacks
        old = state.kind or "of another class"
        entries = set(given[number]) if number < len(given) else set(state.options)
        differs = bool(entries - set(state.options)) and bool(set(state.options) - entries)
    if not differs:
        return None
    return (
        f"scheduler {number} was {old} and is {kinds[number]}: it has the position of the other, "
        f"{state.last_epoch or 0:,}, and its entries"
    )


def _other_interval(facts: Facts, number: int) -> str | None:
    assert facts.saved is not None
    before, now = facts.saved.run, facts.run
    old, new = (
        list(zip(run.scheduler_intervals, run.scheduler_frequencies, strict=False))[number : number + 1]
        for run in (before, now)
    )
    if not old or not new or old == new:
        return None
    (interval, every), (new_interval, new_every) = old[0], new[0]
    position = (facts.saved.schedulers or ())[number].last_epoch or 0
    counted = f"its position {position:,} counts {interval}s"
    return (
        f"scheduler {number} stepped every {_every(every, interval)} and is to step every "
        f"{_every(new_every, new_interval)}: {counted if interval != new_interval else 'it runs at another pace'}"
    )


def _every(count: int, interval: str) -> str:
    return interval if count == 1 else f"{count:,} {interval}s"


@rule(
    "CK913",
    "drift-of-parameters",
    compares="names, shapes and order of each param group's parameters with those saved",
    source="torch/optim/optimizer.py, load_state_dict: state is restored by position",
)
def drift_of_parameters(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The optimizer of the live run holds other parameters, or the same in another order.

    torch restores moments by position. Another number of parameters in a group is refused by it; the same in another
    order gets each other's moments without a word, an error. Parameters under new names are a warning, since a renamed
    module is the usual cause. Which of them get a gradient is another question, that of CK917.
    """
    if facts.saved is None or not facts.optimizers or not facts.saved.optimizers:
        return
    unchanged = True
    for number, (before, now) in enumerate(zip(facts.saved.optimizers, facts.optimizers, strict=False)):
        for outcome in (*_other_sizes(number, before, now), *_other_names(number, facts, now)):
            unchanged = False
            yield outcome
    if unchanged and facts.saved.run.parameter_digests and facts.run.parameter_digests:
        yield passed("parameters in their places, as saved")


def _other_sizes(number: int, before: OptimizerFacts, now: OptimizerFacts) -> Iterator[Outcome]:
    if len(before.groups) != len(now.groups):
        yield error(
            f"optimizer {number} had {many(len(before.groups), 'param group')} and has {len(now.groups):,}",
            "optimizer",
            "Make the same groups; a callback that adds groups while training must be there on the resume too.",
        )
        return
    for index, (old, new) in enumerate(zip(before.groups, now.groups, strict=True)):
        if len(old.params) != len(new.params):
            fewer = len(old.params) - len(new.params)
            yield error(
                f"optimizer {number}, group {index} had {many(len(old.params), 'parameter')} and has "
                f"{len(new.params):,}: {abs(fewer):,} {'are missing' if fewer > 0 else 'were added'}",
                "optimizer",
                "Give the optimizer frozen parameters as well, as when the run was saved, or add new parameters in a "
                "new run from the checkpoint's weights.",
            )


def _other_names(number: int, facts: Facts, now: OptimizerFacts) -> Iterator[Outcome]:
    assert facts.saved is not None
    recorded, digests = facts.saved.run.parameter_digests, facts.run.parameter_digests
    if number >= len(recorded) or number >= len(digests):
        return
    if recorded[number] == digests[number]:
        return
    if [len(d) for d in recorded[number]] != [len(d) for d in digests[number]]:
        return  # other sizes, which are said
    old, new = (_each("".join(groups)) for groups in (recorded[number], digests[number]))
    moved = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    places = [p for group in now.groups for p in group.params]
    names = [now.names.get(p, f"parameter {p}") for p in places]
    name_of = dict(zip(new, names, strict=False))
    first = moved[0]
    named = names[first] if first < len(names) else f"parameter {first}"
    if sorted(old) == sorted(new):
        say: Callable[..., Outcome] = error if now.keeps_moments else info
        yield say(
            f"optimizer {number}: {len(moved):,} of {len(new):,} parameters stand in another order than saved; "
            f"parameter {first} was {name_of.get(old[first], 'another')} and is {named}, with each other's moments",
            "optimizer",
            "Give the optimizer its parameters in the order of the run that saved.",
        )
        return
    yield warning(
        f"optimizer {number}: {len(moved):,} of {len(new):,} parameters are not those that were saved; parameter "
        f"{first} is {named} and was {name_of.get(old[first], 'one of another name or shape')}",
        "optimizer",
        "Expected if modules were renamed and nothing else; else they have the moments of other parameters.",
    )


def _each(digests: str) -> list[str]:
    return [digests[i : i + DIGITS] for i in range(0, len(digests), DIGITS)]


@rule(
    "CK914",
    "drift-of-seed",
    Severity.INFO,
    compares="the global seed with that of the run that saved",
    source="lightning/fabric/utilities/seed.py: PL_GLOBAL_SEED",
)
def drift_of_seed(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run was given another seed than the run that saved.

    The guard restores the random state of the checkpoint, so that the new seed decides only what was drawn before the
    first batch, such as a random split of the data.
    """
    if facts.saved is None or facts.saved.run.seed is None or facts.run.seed is None:
        return
    old, new = facts.saved.run.seed, facts.run.seed
    if old == new:
        yield passed(f"seed {new}, as saved")
    else:
        yield info(
            f"the seed was {old} and is {new}: the checkpoint's random state is restored, and what was drawn before is "
            "of the new seed",
            "seed",
        )


@rule(
    "CK915",
    "drift-of-versions",
    Severity.WARNING,
    compares="versions of torch and Lightning with those that saved",
    source="CheckpointGuard's state; the entry pytorch-lightning_version",
)
def drift_of_versions(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run has other versions of torch or Lightning than the run that saved.

    Newer ones read older checkpoints, so that is worth knowing (results may differ in the last digits). Older ones than
    those that saved may lack what the checkpoint holds: a warning where the major or minor version is lower.
    """
    if facts.saved is None:
        return
    unchanged = True
    for name in sorted(facts.saved.versions.keys() & facts.versions.keys()):
        old, new = facts.saved.versions[name], facts.versions[name]
        if old == new:
            continue
        unchanged = False
        if _release(new) < _release(old):
            yield warning(
                f"the checkpoint was saved under {name} {old}, and {new} is older",
                name,
                f"Install {name} {old}, or watch whether all of the state is understood.",
            )
        else:
            yield info(f"the checkpoint was saved under {name} {old}, and this is {new}", name)
    if unchanged and facts.versions:
        yield passed(" and ".join(f"{name} {version}" for name, version in sorted(facts.versions.items())))


def _release(version: str) -> list[int]:
    """Major and minor."""
    return [int(n) for n in re.findall(r"\d{1,6}", version.partition("+")[0])[:2]]


@rule(
    "CK917",
    "drift-of-frozen-parameters",
    Severity.WARNING,
    compares="how many parameters get a gradient before the first batch with how many did at the save",
    source="CheckpointGuard's state; torch.Tensor.requires_grad, which no checkpoint holds",
)
def drift_of_frozen_parameters(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The live run begins with more parameters frozen than the run that saved had, or with fewer.

    No checkpoint says which layers are frozen: a resumed run begins with what its module is made with, and its hooks
    change that as they come. One that decides by the epoch or the step sets it right. One that unfroze layers once does
    not run again, and they stay as they are for the rest of the run: a warning. Fewer frozen ones are worth knowing: a
    hook that froze them once does not run again either. CheckpointGuard freezes as it was saved where a callback of
    Lightning's (`BaseFinetuning`) unfreezes.
    """
    if facts.saved is None:
        return
    old, new = facts.saved.run.trainable_parameters, facts.run.trainable_parameters
    if old is None or new is None:
        return
    message = f"{many(old, 'parameter')} got a gradient at the save, and {new:,} {'does' if new == 1 else 'do'} now"
    if new < old:
        yield warning(
            f"{message}, before the first batch: {old - new:,} more are frozen",
            "parameters",
            "Expected if they are frozen on purpose, or if a hook unfreezes them by the epoch or step of the run. One "
            "that has unfrozen them once does not run again: unfreeze them in on_fit_start.",
        )
    elif new > old:
        yield info(
            f"{message}, before the first batch: {new - old:,} fewer are frozen",
            "parameters",
            "Expected if they are trained on purpose, or if a hook freezes them by the epoch or step of the run. One "
            "that has frozen them once does not run again: freeze them in on_fit_start.",
        )
    else:
        yield passed(f"{many(new, 'parameter')} with a gradient, as saved")
