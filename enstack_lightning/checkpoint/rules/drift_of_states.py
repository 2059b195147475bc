"""CK916: states in a checkpoint that nothing in the live run takes back."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

_KEEPERS = frozenset(("ModelCheckpoint", "RecoveryCheckpoint", "OnExceptionCheckpoint"))
"""Callbacks whose state says what was saved where: without it training is the same."""
_NO_MATTER = frozenset(("CheckpointGuard",))
"""A run without the guard is not judged by it, and a guard takes any state of its own back."""
_LIGHTNINGS = frozenset(
    (
        *("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states"),
        *("lr_schedulers", "hparams_name", "hparams_type", "hyper_parameters", "datamodule_hparams_name"),
        *("datamodule_hparams_type", "datamodule_hyper_parameters", "current_model_state", "averaging_state"),
        *("MixedPrecision", "FSDPPrecision", "AMPPrecision", "amp_scaling_state", "native_amp_scaling_state"),
    )
)


@rule(
    "CK916",
    "drift-of-states",
    Severity.WARNING,
    compares="the states of callbacks and of the data module with what takes them back in the run",
    source="lightning/pytorch/trainer/call.py, _call_callbacks_load_state_dict",
)
def drift_of_states(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The checkpoint holds the state of a callback or a data module that the live run does not have.

    Lightning gives a state to the callback with the same `state_key`, which may hold the callback's options
    (`ModelCheckpoint` with another `monitor` has another), and to the data module of the same class name. What finds no
    taker is dropped: early stopping begins to count anew, and weights of a checkpoint with averaged ones are trained on
    as if they were those in training. Of callbacks that only keep checkpoints that is worth knowing.
    """
    if facts.saved is None:
        return
    saved, live, kinds = facts.saved.callbacks, frozenset(facts.callbacks), frozenset(map(_kind, facts.callbacks))
    # A run without a ModelCheckpoint does not miss what an earlier one knew.
    no_matter = _NO_MATTER | (_KEEPERS - kinds)
    dropped = [key for key in saved if key not in live and _kind(key) not in no_matter]
    for key in dropped:
        yield _dropped(key, facts)
    yield from _of_data_module(facts)
    if saved and not dropped:
        yield passed(f"the state of {many(len(saved), 'callback')} taken back")


def _dropped(key: str, facts: Facts) -> Outcome:
    kind = _kind(key)
    same = next((other for other in facts.callbacks if _kind(other) == kind), None)
    why = f"with other options ({same[len(kind) :] or 'none'})" if same else "not among the run's callbacks"
    message = f"the state of {key} is dropped: {kind} is {'there ' if same else ''}{why}"
    if kind in _KEEPERS:
        return info(f"{message}; which checkpoint is the best so far is forgotten", "callbacks")
    if facts.saved is not None and "averaging_state" in facts.saved.fields and "Averag" in kind:
        message += "; the checkpoint's weights are averaged ones, and training goes on from them instead of its own"
    hint = "Give the Trainer the same callback with the same options, or begin a new run from the weights."
    return warning(message, "callbacks", hint)


def _of_data_module(facts: Facts) -> Iterator[Outcome]:
    """The run's data module keeps a state and finds none under its name, where another's may be."""
    assert facts.saved is not None
    name = facts.data_module
    if name is None or name in facts.saved.fields:
        return
    others = [f for f, kind in facts.saved.fields.items() if f not in _LIGHTNINGS and kind == "dict"]
    if others:
        yield warning(
            f"the data module {name} finds no state of its own in the checkpoint, which has {', '.join(others[:3])}",
            "data",
            "A data module takes back the state that was saved under the name of its class: keep the name.",
        )


def _kind(state_key: str) -> str:
    return state_key.partition("{")[0]
