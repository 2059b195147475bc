"""CK2xx: the training state has what a resume needs, each entry of the right type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

_ANOTHER = "Use another checkpoint of this run."

_DICT = ("dict", "OrderedDict")
_LIGHTNING = {
    "epoch": ("int",),
    "global_step": ("int",),
    "state_dict": _DICT,
    "loops": ("dict",),
    "optimizer_states": ("list",),
    "lr_schedulers": ("list",),
}
_IN_SHARDS = ("state_dict", "optimizer_states")  # of a sharded checkpoint, where meta.pt holds the rest
_ENSTACK = {"epoch": ("int",), "step": ("int",), "optimizer_state_dict": _DICT}
_TRAINER = {"global_step": ("int",), "epoch": ("float", "int")}

_WANTED: dict[Format, tuple[str, ...]] = {
    Format.ENSTACK: ("total_batches", "best_val_f1", "best_val_acc", "scheduler_state_dict"),
    Format.HUGGINGFACE: ("max_steps", "num_train_epochs"),
}
_LOOPS_SINCE = (1, 6)  # Lightning 1.6 began to save `loops`; newer ones migrate older files
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})")
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")


def _needed(facts: Facts, options: Options) -> Mapping[str, tuple[str, ...]]:
    """The entries that the format and purpose demand, with the types that each may have."""
    if facts.format is Format.LIGHTNING:
        if options.purpose == "inference":
            return {"state_dict": _DICT}
        return _without_loops(_LIGHTNING) if _before_loops(facts) else _LIGHTNING
    if options.purpose == "inference":
        return {}
    if facts.format is Format.SHARDED and "pytorch-lightning_version" in facts.fields:
        return {name: types for name, types in _LIGHTNING.items() if name not in _IN_SHARDS or name in facts.fields}
    if facts.format is Format.ENSTACK:
        return _ENSTACK
    return _TRAINER if facts.format is Format.HUGGINGFACE else {}


def _without_loops(needed: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    return {name: types for name, types in needed.items() if name != "loops"}


def _before_loops(facts: Facts) -> bool:
    version = _VERSION.match(facts.versions.get("lightning", ""))
    return version is not None and (int(version[1]), int(version[2])) < _LOOPS_SINCE


@rule(
    "CK201",
    "required-field",
    compares="the state's entries and their types with what the format and purpose need",
    source="lightning: checkpoint_connector.py, dump_checkpoint; transformers: trainer_callback.py, TrainerState",
)
def required_field(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry without which training cannot be resumed is missing or of the wrong type.

    A Lightning checkpoint needs `epoch`, `global_step`, `state_dict`, `loops` (since Lightning 1.6),
    `optimizer_states` and `lr_schedulers`; a sharded one keeps all but the weights and the optimizers in `meta.pt`.
    An EnStack `training_state.pth` needs `epoch`, `step` and `optimizer_state_dict`; the `trainer_state.json` of the
    Hugging Face Trainer `global_step` and `epoch`. For inference only the weights are needed. A checkpoint that holds
    nothing but a model is CK205's, a missing file is CK101's.
    """
    if facts.live or not facts.fields or (options.purpose == "resume" and is_model_only(facts)):
        return
    needed = _needed(facts, options)
    wrong = False
    for name, types in needed.items():
        if name not in facts.fields:
            wrong = True
            yield error(f"{name} is missing from the training state", name, _ANOTHER)
        elif facts.fields[name] not in types:
            wrong = True
            kind = facts.fields[name]
            yield error(f"{name} is of type {kind}, and must be {' or '.join(types)}", name, _ANOTHER)
    if needed and not wrong:
        yield passed(f"training state readable, with all {len(needed)} entries that {options.purpose} needs")


@rule(
    "CK202",
    "optional-field",
    Severity.WARNING,
    compares="the state's entries with all that EnStack or the Trainer writes",
    source="the original EnStack, check 3; transformers: trainer_callback.py, TrainerState",
)
def optional_field(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry that is always written is missing: training can resume, but not everything can be checked or restored.

    EnStack writes `total_batches`, `best_val_f1`, `best_val_acc` and `scheduler_state_dict`; the Hugging Face Trainer
    writes `max_steps` and `num_train_epochs`.
    """
    if options.purpose == "resume" and facts.fields and not facts.live:
        for name in _WANTED.get(facts.format, ()):
            if name not in facts.fields:
                yield warning(f"{name} is missing from the training state", name)


@rule(
    "CK203",
    "no-weights",
    compares="the number of tensors with 0",
    source="lightning: checkpoint_connector.py, dump_checkpoint",
)
def no_weights(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The checkpoint is readable and holds no weights.

    A module without a parameter has none: worth knowing where the optimizers have no parameter either.
    """
    if facts.defects or not (facts.fields or facts.tensors):
        return
    if facts.tensors:
        yield passed(f"weights: {many(len(facts.tensors), 'tensor')}")
    elif _has_nothing_to_train(facts):
        yield info("no weights, as none of its optimizers has a parameter", hint="Expected of a module without any.")
    elif facts.format is not Format.UNKNOWN and not facts.live:
        yield error("no weights: the checkpoint's state dict has no tensor", hint="Use another checkpoint.")


def _has_nothing_to_train(facts: Facts) -> bool:
    """Whether a whole checkpoint of Lightning says by its optimizers that its module has no parameter.

    `configure_optimizers` returning None leaves one without anything in it, whose steps Lightning counts.
    """
    whole = facts.format is Format.LIGHTNING and facts.fields.get("state_dict") in _DICT and not facts.live
    without = not any(o.parameter_count or o.parameters_with_state for o in facts.optimizers or ())
    explained = bool(facts.optimizers) or (facts.optimizers is not None and facts.progress.optimizer_steps == 0)
    return whole and without and explained


@rule(
    "CK204",
    "misshapen-entry",
    compares="entries of optimizers, schedulers and loops with the form that torch and Lightning give them",
    source="torch.optim.Optimizer.state_dict; lightning: loops/progress.py",
)
def misshapen_entry(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry is not of the form that torch or Lightning writes: a rate that is NaN, a counter that is text.

    Looked at: the optimizers' groups and step counts, the schedulers' positions and rates, and every loop counter.
    """
    if options.purpose == "resume":
        for defect in facts.defects:
            if defect.kind is DefectKind.MISSHAPEN:
                yield error(defect.message, defect.where, "Use another checkpoint of this run.")
        for number, optimizer in enumerate(facts.optimizers or ()):
            if optimizer.unusable_steps:
                parameter, step = optimizer.unusable_steps[0]
                count = len(optimizer.unusable_steps)
                yield error(
                    f"optimizer {number}: {many(count, 'parameter')} with a step that is no count, the first {step:g} "
                    f"of parameter {parameter}",
                    "optimizer",
                    "Use another checkpoint of this run.",
                )


@rule(
    "CK205",
    "model-only",
    compares="what the checkpoint holds with what the purpose needs",
    source="lightning: checkpoint_connector.py, restore_optimizers_and_schedulers",
)
def model_only(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The checkpoint holds a model, and neither optimizer nor schedule of a training run.

    That is how `save_weights_only` (which keeps the counters), `save_pretrained` and safetensors save. It serves
    inference; training cannot be resumed from it, only begun anew with its weights.
    """
    if not is_model_only(facts) or facts.live:
        return
    if options.purpose == "inference":
        yield passed("holds a model and no training state, which inference does not need")
    else:
        yield error(
            "the checkpoint holds weights only, and no optimizer state: training cannot resume from it",
            hint=f"{_lost_state(facts)}Use it for validate, test or predict (--for inference), or begin a new run with "
            "its weights; resume from a checkpoint saved without save_weights_only.",
        )


def _lost_state(facts: Facts) -> str:
    """What a folder lacks that would make it a checkpoint: without it, it is no different from a model."""
    if facts.format is not Format.HUGGINGFACE:
        return ""
    return "An EnStack checkpoint also has training_state.pth, and one of the Trainer trainer_state.json. "


def is_model_only(facts: Facts) -> bool:
    """Whether neither optimizer nor schedule of a training run is in the checkpoint."""
    if facts.model_only:
        return True
    lacking = facts.format is Format.LIGHTNING and {"optimizer_states", "lr_schedulers"}.isdisjoint(facts.fields)
    return lacking and "state_dict" in facts.fields


@rule(
    "CK206",
    "random-state",
    Severity.WARNING,
    compares="rng_state*.pth with one file a process",
    source="transformers: trainer.py, _save_rng_state and _load_rng_state",
)
def random_state(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The Hugging Face Trainer's random state is missing for some process, or for all.

    The Trainer goes on without it: dropout and shuffling then differ from what the uninterrupted run would have drawn.
    Missing altogether it is worth knowing; missing for some of several processes it is a warning, because the save of
    one process was lost, and its other files may be too.
    """
    if facts.format is not Format.HUGGINGFACE or options.purpose != "resume" or not facts.fields:
        return
    if is_model_only(facts):
        return
    names = [match for file in facts.files if (match := _RANDOM_STATE.fullmatch(file.name))]
    ranks = {int(match[1]) for match in names if match[1]}
    if not names:
        yield info(
            "no random state (rng_state.pth): dropout and shuffling after a resume will differ from the run's own",
            hint="Resume with it where an exact continuation matters.",
        )
        return
    if not ranks:
        yield passed("the random state is there")
        return
    world = max(facts.run.world_size or 0, max(ranks) + 1)
    if len(ranks) < world:
        lost = ", ".join(map(str, sorted(set(range(min(world, 10_000))) - ranks)[:10]))
        yield warning(
            f"random state of {len(ranks):,} of {world:,} processes: none for process {lost}",
            "rng_state",
            "A process's save was lost; make sure that the other files are complete.",
        )
    else:
        yield passed(f"the random state of all {world:,} processes is there")
