"""CK9xx: what changed between the run that saved and the run that wants to resume, and what that does to the resume.

The run that wants to resume is a live one, or is given by its configuration in LightningCLI's form (`trainer`, `model`,
`data`, the last two perhaps with `class_path` and `init_args`), or as a flat table of transformers' training arguments.
Only what both sides state is compared; a key with no value is not stated. `drift_of_run` has the rules for what only
`CheckpointGuard` records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.resume import ResumePlan, plan_resume
from enstack_lightning.checkpoint.rules.optimizer_steps import scales_losses
from enstack_lightning.checkpoint.rules.overrides import overridden
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.rules.settings import (
    BATCH_SIZES,
    Settings,
    same,
    settings_of_config,
    settings_of_facts,
    shown,
)
from enstack_lightning.checkpoint.wording import many

_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
_SHAPES = frozenset((*_WIDTHS, "num_hidden_layers", "num_attention_heads"))
"""Options of a network that decide the shapes of its weights, or how they are split into heads."""
_LABELS = frozenset(("num_labels", "label_names"))
_SCHEDULE = frozenset(("learning_rate", "lr", "weight_decay", "warmup_fraction", "warmup_steps", "schedule"))
_FILES = ("path", "train_file", "validation_file")
_ANOTHER_RUN = "Resume with the settings that the checkpoint was saved under, or begin a new run from its weights."

# What the rules have in common


Compared = tuple[Settings, Settings]


def _compared(facts: Facts, options: Options) -> Compared | None:
    """The settings saved and the settings wanted; None where there is nothing to compare."""
    if facts.saved is not None:
        by_loader = facts.saved.run.batch_size is not None and facts.run.batch_size is not None
        return settings_of_facts(facts.saved, by_loader), settings_of_facts(facts, by_loader)
    if options.run_config is None or facts.live or not (facts.fields or facts.tensors):
        return None
    return settings_of_facts(facts), settings_of_config(options.run_config)


def _saved(facts: Facts) -> Facts:
    """The checkpoint's facts, also where a run that was restored from it tells its own."""
    return facts.saved or facts


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    for name in names:
        old, new = before.get(name), now.get(name)
        if old is not None and new is not None and not same(old, new):
            yield name, old, new


def _plan(facts: Facts) -> ResumePlan | None:
    return plan_resume(_saved(facts))


def _inside_an_epoch(plan: ResumePlan | None) -> bool:
    return plan is not None and plan.kind == "mid-epoch"


# The rules


@rule(
    "CK901",
    "drift-of-model",
    compares="the hyper-parameters of the module, or config.json, with the run's model section",
    source="the run's configuration; torch.nn.Module.load_state_dict",
)
def drift_of_model(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume builds another network than the one whose weights are in the checkpoint.

    Sizes that decide shapes, and another pretrained model, are errors: the weights do not load, or they load and are
    not those of the model that the configuration names. Another number of heads loads without a word. Other options of
    the module (dropout, label smoothing) are worth knowing. LightningCLI lets the checkpoint's hyper-parameters win
    over the configuration; `enstack fit` lets the configuration win. A live run has its own values, and its weights
    have loaded: there only another number of heads is an error, and another size or pretrained model a warning.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    unchanged = True
    pretrained = now.model.get("pretrained", before.model.get("pretrained"))
    untold = _SHAPES if pretrained is True else set()  # the sizes come with the pretrained model
    names = sorted(set(now.model) - _LABELS - _SCHEDULE - set(BATCH_SIZES) - untold - {"_class_path"})
    for name, old, new in _changed(before.model, now.model, names):
        unchanged = False
        if name == "model_name_or_path" and pretrained is False:
            continue  # nothing is read from it
        yield _network_change(name, old, new, facts.live)
    old, new = before.model.get("_class_path"), now.model.get("_class_path")
    if old is not None and new is not None and str(old).rpartition(".")[2] != str(new).rpartition(".")[2]:
        unchanged = False
        yield error(f"the model is a {new}, and the checkpoint is of a {old}", "model.class_path", _ANOTHER_RUN)
    if unchanged and set(names) & set(before.model):
        yield passed("the run builds the network that was saved")


def _network_change(name: str, old: Any, new: Any, live: bool) -> Outcome:
    where = f"model.{name}"
    change = f"{name} was {shown(old)} and is {shown(new)}"
    if name == "model_name_or_path":
        if PurePath(str(old)).name == PurePath(str(new)).name:
            return info(f"{change}: the same model by its name, elsewhere", where)
        say = warning if live else error
        return say(f"{change}: the weights of the checkpoint are not of that model", where, _ANOTHER_RUN)
    if name == "num_attention_heads":
        return error(f"{change}: the weights load and are split into other heads", where, _ANOTHER_RUN)
    if name in _SHAPES and live:
        return warning(f"{change}, and the weights have loaded nevertheless", where, _ANOTHER_RUN)
    if name in _SHAPES:
        return error(f"{change}: the weights have other shapes and do not load", where, _ANOTHER_RUN)
    if name == "pretrained":
        return warning(f"{change}: the network's sizes come from elsewhere now", where, _ANOTHER_RUN)
    if live:
        return info(f"{change}: the run goes on with the new value", where)
    return info(f"{change}: LightningCLI takes the checkpoint's value, enstack fit the configuration's", where)


@rule("CK902", "drift-of-labels", compares="number and names of the labels", source="the run's configuration")
def drift_of_labels(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume has other labels, or the same in another order.

    Another number of labels gives the classifier another shape. The same number under other names, or in another order,
    loads and silently trains every class towards another meaning. Another number is a warning in a live run, whose
    weights have loaded.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    for name, old, new in _changed(before.model, now.model, ("num_labels",)):
        change = f"{name} was {shown(old)} and is {shown(new)}"
        if facts.live:
            yield warning(f"{change}, and the weights have loaded nevertheless", f"model.{name}", _ANOTHER_RUN)
        else:
            yield error(f"{change}: the classifier's weights have another shape", f"model.{name}", _ANOTHER_RUN)
    for section, left, right in (("model", before.model, now.model), ("data", before.data, now.data)):
        for name, old, new in _changed(left, right, ("label_names",)):
            lists = isinstance(old, list | tuple) and isinstance(new, list | tuple)
            order = lists and sorted(map(str, old)) == sorted(map(str, new))
            yield error(
                f"{name} {'are in another order' if order else 'changed'}: {shown(old)} before, {shown(new)} now",
                f"{section}.{name}",
                "Give the labels as they were: the weights know each class by its number.",
            )
    held, wanted = before.model.get("num_labels"), now.model.get("num_labels")
    if held and wanted and same(held, wanted):
        yield passed(f"{wanted} labels, as saved")


@rule(
    "CK903",
    "drift-of-batch-size",
    Severity.WARNING,
    compares="the training batch size with that of the run that saved",
    source="the run's configuration",
)
def drift_of_batch_size(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume takes batches of another size.

    An epoch then has another number of batches: the loop's counters, the steps of a schedule and the position inside an
    epoch count batches of the old size.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    if before.batch_size is None or now.batch_size is None:
        return
    if before.batch_size == now.batch_size:
        yield passed(f"batch size {now.batch_size:,}, as saved")
        return
    plan = _plan(facts)
    message = f"the batch size was {before.batch_size:,} and is {now.batch_size:,}"
    batches = _saved(facts).batches_per_epoch
    if batches and now.batch_size > 0:
        about = math.ceil(batches * before.batch_size / now.batch_size)
        message += f": an epoch of {many(batches, 'batch', 'batches')} has about {about:,} now"
    if _inside_an_epoch(plan) and plan is not None:
        message += f", and {many(plan.step, 'batch', 'batches')} done in this epoch count as being of the new size"
    yield warning(message, "data batch size", _keep_the_batch(before, now, plan))


def _keep_the_batch(before: Settings, now: Settings, plan: ResumePlan | None) -> str:
    start = "Resume at an epoch's end, where no position is lost. " if _inside_an_epoch(plan) else ""
    old, new = before.batch_size or 0, now.batch_size or 0
    accumulation = before.accumulation or 1
    if new and old * accumulation % new == 0 and old * accumulation // new > 0:
        return f"{start}accumulate_grad_batches {old * accumulation // new:,} would keep the steps' batch."
    return f"{start}The schedule's length and warm-up count steps of the old size."


@rule(
    "CK904",
    "drift-of-accumulation",
    Severity.WARNING,
    compares="accumulate_grad_batches with that of the run that saved",
    source="lightning/pytorch/loops/training_epoch_loop.py, _should_accumulate",
)
def drift_of_accumulation(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume accumulates gradients over another number of batches.

    Lightning takes that over without a word: an epoch then has another number of optimizer steps, `global_step` no
    longer says how many batches were trained, and the schedule runs faster or slower. A configuration that says nothing
    means 1.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    if before.accumulation is None or now.accumulation is None:
        return
    if before.accumulation == now.accumulation:
        yield passed(f"gradients of {many(now.accumulation, 'batch', 'batches')} a step, as saved")
        return
    held = many(before.accumulation, "batch", "batches")
    message = f"a step took the gradients of {held} and is to take those of {now.accumulation:,}"
    batches = _saved(facts).batches_per_epoch
    if batches and now.accumulation > 0 and before.accumulation > 0:
        old, new = math.ceil(batches / before.accumulation), math.ceil(batches / now.accumulation)
        message += f": {old:,} optimizer steps an epoch before, {new:,} now"
    yield warning(
        message, "trainer.accumulate_grad_batches", "The schedule counts optimizer steps: check its length and warm-up."
    )


@rule(
    "CK905",
    "drift-of-devices",
    Severity.WARNING,
    compares="devices x num_nodes with the processes of the run that saved",
    source="the run's configuration; CheckpointGuard's state",
)
def drift_of_devices(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume has another number of processes.

    Each process takes its share of the rows, so an epoch has another number of batches a process and every step another
    batch; positions inside an epoch and schedules count the old ones. `auto` is not compared.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    if before.world_size is None or now.world_size is None:
        return
    if before.world_size == now.world_size:
        yield passed(f"{many(now.world_size, 'process', 'processes')}, as saved")
        return
    message = f"{many(before.world_size, 'process', 'processes')} saved and {now.world_size:,} are to resume"
    if before.batch_size and now.batch_size:
        old, new = before.batch_size * before.world_size, now.batch_size * now.world_size
        message += f": a step of all processes takes {new:,} rows instead of {old:,}"
    if _inside_an_epoch(_plan(facts)):
        message += ", and the position inside the epoch is that of other shares"
    yield warning(message, "trainer.devices", "Resume on as many processes, or at an epoch's end with a new schedule.")


@rule(
    "CK906",
    "drift-of-length",
    compares="max_epochs and max_steps with the epochs and steps done",
    source="lightning/pytorch/loops/fit_loop.py, FitLoop.done",
)
def drift_of_length(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume ends where the checkpoint already stands, or before: it would train nothing.

    Lightning says so in one line of its log and ends as if all were well, or raises MisconfigurationException where
    more epochs are done than the run has.
    """
    if (compared := _compared(facts, options)) is None:
        return
    _, now = compared
    plan = _plan(facts)
    if plan is None or plan.kind == "not-resumable":
        return
    done = plan.epochs_done
    ended = facts.progress.epochs_completed
    if facts.moment and ended is not None and now.max_epochs is not None and ended < now.max_epochs == done:
        yield passed(f"max_epochs {now.max_epochs:,}: the end of the last epoch is left to do")
    elif now.max_epochs is not None and 0 <= now.max_epochs <= done:
        yield error(
            f"max_epochs is {now.max_epochs:,}, and {many(done, 'epoch is', 'epochs are')} done: the run would train "
            "nothing",
            "trainer.max_epochs",
            f"Raise max_epochs above {done:,}.",
        )
    elif now.max_epochs is not None and now.max_epochs >= 0:
        yield passed(f"max_epochs {now.max_epochs:,}: {now.max_epochs - done:,} to train")
    steps = plan.global_step
    if now.max_steps is not None and now.max_steps >= 0 and steps is not None:
        if now.max_steps <= steps:
            yield error(
                f"max_steps is {now.max_steps:,}, and {many(steps, 'step is', 'steps are')} taken: the run would train "
                "nothing",
                "trainer.max_steps",
                f"Raise max_steps above {steps:,}.",
            )
        else:
            yield passed(f"max_steps {now.max_steps:,}: {now.max_steps - steps:,} to take")


@rule(
    "CK907",
    "drift-of-schedule",
    Severity.WARNING,
    compares="learning rate, weight decay, warm-up, schedule and length of the run with those saved",
    source="torch/optim/optimizer.py and lr_scheduler.py, load_state_dict",
)
def drift_of_schedule(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume has another learning rate, weight decay or schedule.

    Restoring an optimizer overwrites the groups' learning rate and weight decay, and restoring a scheduler its base
    rates: the new values are ignored without a word. A `LambdaLR` does not keep its function, so that the new run's
    warm-up, shape and length hold from its next step on, and the rate jumps there; all other schedules keep the old.

    In a live run every option that its param groups and schedulers were made with is compared with what they were
    restored to, and with what `CheckpointGuard` recorded of the run that saved. A schedule of another length in a run
    that was made longer on purpose is worth knowing and no warning.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    saved = _saved(facts)
    kept = list(overridden(facts)) if facts.live else list(_given_anew(before, now, saved))
    yield from kept
    longer = list(_other_length(before, now, saved))
    yield from longer
    told = facts.run.optimizer_options if facts.live else set(now.model) & set(before.model) & _SCHEDULE
    if not kept and not longer and told:
        yield passed("learning rate and schedule as saved")


def _given_anew(before: Settings, now: Settings, saved: Facts) -> Iterator[Outcome]:
    for name, old, new in _changed(before.model, now.model, sorted(_SCHEDULE)):
        change = f"{name} was {shown(old)} and is {shown(new)}"
        if name in ("learning_rate", "lr", "weight_decay"):
            effect = "the restored optimizer and schedule keep the old value"
            hint = "Keep the old value, or begin a new run from the checkpoint's weights."
        else:
            effect = _on_the_schedule(saved)
            hint = "Keep the old schedule, or expect another rate from the scheduler's next step on."
        yield warning(f"{change}: {effect}", f"model.{name}", hint)


def _other_length(before: Settings, now: Settings, saved: Facts) -> Iterator[Outcome]:
    for name, old, new in (
        ("max_epochs", before.max_epochs, now.max_epochs),
        ("max_steps", before.max_steps, now.max_steps),
    ):
        if saved.schedulers and (old or 0) > 0 and (new or 0) > 0 and old != new:
            yield info(f"{name} was {old:,} and is {new:,}: {_on_the_schedule(saved)}", f"trainer.{name}")


def _on_the_schedule(facts: Facts) -> str:
    kinds = [s.kind for s in facts.schedulers or ()]
    if None in kinds:
        return "a schedule of a function takes that over: the next rate is the saved one, and the rate jumps after it"
    return f"the restored {kinds[0]} keeps its old course" if kinds else "the checkpoint has no schedule"


@rule(
    "CK908",
    "drift-of-data",
    compares="the data module's hyper-parameters with the run's data section",
    source="the run's configuration",
)
def drift_of_data(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume reads other data, or reads it otherwise.

    Another tokenizer or vocabulary is an error: the same ids mean other tokens to the weights. Other files, or the same
    in another place, are worth knowing, and inside an epoch a warning: the rows left to train are found by their
    position. So are another cut, order or column. The values of the rows are compared when the run begins (CK910). Of a
    live run, whose data module has opened its data, another tokenizer is a warning, and the same rows in another place
    are worth knowing.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    judge: Callable[..., Outcome] = warning if _inside_an_epoch(_plan(facts)) else info
    unchanged = True
    trained_here = before.data.get("tokenizer") is None and before.model.get("pretrained") is not True
    tokens = ("tokenizer", "vocab_size") if trained_here else ("tokenizer",)
    for name, old, new in _changed(before.data, now.data, tokens):
        unchanged = False
        change = f"{name} was {shown(old)} and is {shown(new)}"
        if name == "tokenizer" and PurePath(str(old)).name == PurePath(str(new)).name:
            yield info(f"{change}: the same by its name, elsewhere", f"data.{name}")
        else:
            say = warning if facts.live else error
            yield say(f"{change}: token ids mean other tokens to the weights", f"data.{name}", _ANOTHER_RUN)
    seen = _saved(facts).run.dataset_fingerprint if facts.live else None
    for name, old, new in _changed(before.data, now.data, _FILES):
        unchanged = False
        change = f"{name} was {shown(old)} and is {shown(new)}"
        if seen is not None and seen == facts.run.dataset_fingerprint:
            yield info(f"{change}: the rows are the same", f"data.{name}")
        else:
            yield judge(
                f"{change}: other rows, unless it is a copy",
                f"data.{name}",
                "The rows are compared when the run begins, by the guard and the data module.",
            )
    ordered = ("length_bucketing", "max_length", "func_column", "target_column", "seed")
    for name, old, new in _changed(before.data, now.data, ordered):
        unchanged = False
        yield judge(f"{name} was {shown(old)} and is {shown(new)}: the rows are read otherwise now", f"data.{name}")
    if unchanged and set(now.data) & set(before.data):
        yield passed("data as saved")


@rule(
    "CK909",
    "drift-of-precision",
    Severity.WARNING,
    compares="trainer.precision with that of the run that saved",
    source="lightning/pytorch/plugins/precision",
)
def drift_of_precision(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The run to resume computes in another precision.

    From or to `16-mixed` the gradient scaler's state is dropped, or begins anew, without a word; from or to a `-true`
    precision weights and moments change their type. Between `bf16-mixed` and `32-true` both stay float32: worth
    knowing.
    """
    if (compared := _compared(facts, options)) is None:
        return
    before, now = compared
    if before.precision is None or now.precision is None:
        return
    if before.precision == now.precision:
        yield passed(f"precision {now.precision}, as saved")
        return
    change = f"the precision was {before.precision} and is {now.precision}"
    if before.precision == "16-mixed" and scales_losses(facts):
        yield warning(f"{change}: the gradient scaler's state is dropped", "trainer.precision")
    elif now.precision == "16-mixed":
        yield warning(f"{change}: the gradient scaler begins anew and may skip the first steps", "trainer.precision")
    elif {before.precision, now.precision} <= {"bf16-mixed", "32-true", "16-mixed"}:
        yield info(f"{change}: weights and moments stay float32", "trainer.precision")
    else:
        yield warning(f"{change}: weights and moments change their type", "trainer.precision")
