"""CK2xx: the training state has what a resume needs, each entry of the right type."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, passed, rule, warning

_NEEDED: dict[Format, dict[str, tuple[str, ...]]] = {
    Format.LIGHTNING: {
        "epoch": ("int",),
        "global_step": ("int",),
        "state_dict": ("dict", "OrderedDict"),
        "loops": ("dict",),
        "optimizer_states": ("list",),
        "lr_schedulers": ("list",),
    },
    Format.ENSTACK: {
        "epoch": ("int",),
        "step": ("int",),
        "optimizer_state_dict": ("dict",),
    },
}
_WANTED: dict[Format, tuple[str, ...]] = {
    Format.LIGHTNING: (),
    Format.ENSTACK: ("total_batches", "best_val_f1", "best_val_acc", "scheduler_state_dict"),
}


@rule("CK201", "required-field")
def required_field(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry without which training cannot be resumed is missing or of the wrong type.

    A Lightning checkpoint needs `epoch`, `global_step`, `state_dict`, `loops`, `optimizer_states` and `lr_schedulers`
    (the last three are left out by `save_weights_only`, whose files serve inference only); an EnStack
    `training_state.pth` needs `epoch`, `step` and `optimizer_state_dict`.
    """
    needed = _NEEDED.get(facts.format, {}) if facts.fields and not facts.live else {}
    if options.purpose == "inference":
        needed = {name: types for name, types in needed.items() if name == "state_dict"}
    missing = [name for name in needed if name not in facts.fields]
    weights_only = {"optimizer_states", "loops"} & {*missing} and "state_dict" in facts.fields
    if facts.format is Format.LIGHTNING and weights_only:
        yield error(
            "the checkpoint holds weights only: optimizer_states or loops are not in it, so training cannot resume",
            hint="Use it for validate, test or predict; resume from a checkpoint saved without save_weights_only.",
        )
    else:
        for name in missing:
            yield error(f"{name} is missing from the training state", name, "Use another checkpoint of this run.")
    for name, types in needed.items():
        if name in facts.fields and facts.fields[name] not in types:
            yield error(
                f"{name} is of type {facts.fields[name]}, and must be {' or '.join(types)}",
                name,
                "Use another checkpoint.",
            )
    if needed and not missing:
        yield passed(f"training state readable, with all {len(needed)} entries that {options.purpose} needs")


@rule("CK202", "optional-field")
def optional_field(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry that EnStack writes is missing: training can resume, but not everything can be checked or restored."""
    if facts.fields:
        for name in _WANTED.get(facts.format, ()):
            if name not in facts.fields:
                yield warning(f"{name} is missing from the training state", name)


@rule("CK203", "no-weights")
def no_weights(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The checkpoint is readable and holds no weights."""
    if facts.defects or not (facts.fields or facts.tensors):
        return
    if facts.tensors:
        yield passed(f"weights: {len(facts.tensors):,} tensors")
    elif facts.format is not Format.UNKNOWN and not facts.live:
        yield error("no weights: the checkpoint's state dict has no tensor", hint="Use another checkpoint.")


@rule("CK204", "misshapen-entry")
def misshapen_entry(facts: Facts, options: Options) -> Iterator[Outcome]:
    """An entry is not of the form that torch or Lightning writes: a rate that is NaN, a counter that is text.

    Looked at: the optimizers' groups and step counts, the schedulers' positions and rates, and every loop counter.
    """
    if options.purpose == "resume":
        for defect in facts.defects:
            if defect.kind is DefectKind.MISSHAPEN:
                yield error(defect.message, defect.where, "Use another checkpoint of this run.")
