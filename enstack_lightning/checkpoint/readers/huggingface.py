"""The folders of transformers: a model, or a checkpoint of its Trainer.

The files and their order: `transformers/trainer.py` (`_save_checkpoint`); `trainer_state.json` comes last. Counters:
`transformers/trainer_callback.py` (`TrainerState`); how a resume reckons with them: `Trainer._init_training_state` and
`Trainer.set_initial_training_values`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    Format,
    Loader,
    RunFacts,
)
from enstack_lightning.checkpoint.inert_pickle import Call
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.content import is_unfinished
from enstack_lightning.checkpoint.readers.json_file import read_json_object
from enstack_lightning.checkpoint.readers.shapes import misshapen
from enstack_lightning.checkpoint.readers.sharded import read_sharded
from enstack_lightning.checkpoint.readers.states import (
    at,
    field_types,
    named_moments,
    optimizer_of,
    plain,
    scheduler_of,
    whole,
)
from enstack_lightning.checkpoint.readers.torch_archive import read_archive
from enstack_lightning.checkpoint.readers.trainer_state import (
    best_metric,
    misshapen_counters,
    streams_ended,
    trainer_progress,
    trainer_run,
    update_steps,
)
from enstack_lightning.checkpoint.readers.weights import CONFIG_FILE, add_config, add_weights, is_weights_name

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
SCALER_FILE = "scaler.pt"
ARGUMENTS_FILE = "training_args.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
JSON_FILES = (ADAPTER_CONFIG_FILE, "generation_config.json")
MAX_STATE_BYTES = 64 * 2**20

_RNG = re.compile(r"rng_state(_\d+)?\.pth")
_CHECKPOINT = re.compile(r"(tmp-)?checkpoint-\d+")
_FSDP_MODEL = re.compile(r"pytorch_model_fsdp_\d+")
_FSDP_OPTIMIZER = re.compile(r"optimizer_\d+")
_FSDP_WHOLE_MODEL = "pytorch_model_fsdp.bin"
_FSDP_WHOLE_OPTIMIZER = "optimizer.bin"
_FSDP_RANK = re.compile(r"(pytorch_model_fsdp|optimizer)(_\d+)?_rank\d+\.bin")
_DEEPSPEED = re.compile(r"global_step\d+")

_BY_METRIC = frozenset(("num_bad_epochs", "patience"))
"""What `ReduceLROnPlateau` and transformers' `GreedyLR` keep."""

_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "mixed_precision",
    "dataloader_drop_last",
    "ignore_data_skip",
    "metric_for_best_model",
    "save_only_model",
)
"""The training arguments that say what a resume needs; among the others are tokens and paths."""


def is_huggingface_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it holds a model or a checkpoint of transformers."""
    return any(
        name in (STATE_FILE, CONFIG_FILE, ADAPTER_CONFIG_FILE) or _is_state_name(name) or is_weights_name(name)
        for name in names
    )


def is_trainer_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names in it is a checkpoint of the Trainer, whole or damaged."""
    return STATE_FILE in names or any(map(_is_state_name, names))


def _is_state_name(name: str) -> bool:
    """Whether only a training run writes a file or folder of this name."""
    return (
        name in (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE, _FSDP_WHOLE_OPTIMIZER, _FSDP_WHOLE_MODEL)
        or any(p.fullmatch(name) for p in (_RNG, _FSDP_MODEL, _FSDP_OPTIMIZER, _FSDP_RANK, _DEEPSPEED))
    )  # fmt: skip


def read_huggingface(location: Location, deep: DeepRead | None = None) -> Facts:
    """Facts of a folder of transformers; what cannot be read becomes a defect."""
    names = location.names()
    facts = Facts(str(location), Format.HUGGINGFACE, leftovers=_leftovers(location, names))
    facts = _add_model(facts, location, names, deep)
    saved_by_trainer = ARGUMENTS_FILE in names and _CHECKPOINT.fullmatch(location.name)
    if STATE_FILE not in names and not any(map(_is_state_name, names)) and not saved_by_trainer:
        facts, _ = _add_arguments(facts, location, names, deep)
        return dataclasses.replace(facts, model_only=True)
    return _add_training(facts, location, names, deep)


def _leftovers(location: Location, names: Iterable[str]) -> tuple[str, ...]:
    staged = [location.name] if location.name.startswith("tmp-checkpoint-") else []
    return (*staged, *filter(is_unfinished, names))


# The model


def _add_model(facts: Facts, folder: Location, names: Collection[str], deep: DeepRead | None) -> Facts:
    # A checkpoint of an adapter has no config.json: its base model stands elsewhere.
    if CONFIG_FILE in names or ADAPTER_CONFIG_FILE not in names:
        facts = add_config(facts, folder)
    for name in JSON_FILES:
        if name in names:
            facts, _ = _add_json(facts, folder, name)
    sharded = [name for name in names if _FSDP_MODEL.fullmatch(name)]
    if sharded:
        return _add_sharded(facts, folder, sharded, deep)
    if _FSDP_WHOLE_MODEL in names and not any(map(is_weights_name, names)):
        return add_weights(facts, folder, deep, (_FSDP_WHOLE_MODEL,))
    if any(_DEEPSPEED.fullmatch(name) for name in names) and not any(map(is_weights_name, names)):
        return facts  # its shards are named with the training state
    return add_weights(facts, folder, deep)


def _add_json(facts: Facts, folder: Location, name: str) -> tuple[Facts, dict[str, Any]]:
    value, size, defect = read_json_object(folder, name, MAX_STATE_BYTES)
    files = (*facts.files, FileFacts(name, size, without_checksum=size, read_whole=True)) if size else facts.files
    defects = facts.defects if defect is None else (*facts.defects, defect)
    return dataclasses.replace(facts, files=files, defects=defects), value or {}


def _add_sharded(facts: Facts, folder: Location, names: Iterable[str], deep: DeepRead | None) -> Facts:
    """The facts with those of sharded folders within the checkpoint's folder added."""
    for name in names:
        if folder.child(name).leads_out_of(folder):
            message = "it is a link that leads out of the checkpoint's folder"
            facts = _with_defect(facts, DefectKind.DAMAGED, name, message)
            continue
        part = read_sharded(folder.child(name), deep, within=name)
        facts = dataclasses.replace(
            facts,
            files=(*facts.files, *part.files),
            defects=(*facts.defects, *part.defects),
            oddities=(*facts.oddities, *part.oddities),
            globals=(*facts.globals, *part.globals),
            leftovers=(*facts.leftovers, *part.leftovers),
            tensors=(*facts.tensors, *part.tensors),
            values=facts.values if part.values is None else (*(facts.values or ()), *part.values),
            optimizers=facts.optimizers if not part.optimizers else (*(facts.optimizers or ()), *part.optimizers),
        )
    return facts


# The training run


def _add_training(facts: Facts, folder: Location, names: Collection[str], deep: DeepRead | None) -> Facts:
    facts, state = _add_state(facts, folder, names)
    facts, arguments = _add_arguments(facts, folder, names, deep)
    facts, optimizer = _add_optimizer(facts, folder, names, deep)
    facts, scheduler = _add_scheduler(facts, folder, names, deep)
    if SCALER_FILE in names:
        facts, _ = _add_torch(facts, folder, SCALER_FILE, deep)
    for name in filter(_RNG.fullmatch, names):
        facts, _ = _add_torch(facts, folder, name, deep, "transformers")
    entries = {name: value for name, value in ((OPTIMIZER_FILE, optimizer), (SCHEDULER_FILE, scheduler)) if value}
    steps = update_steps(state, arguments)
    wrong = (*misshapen(entries, OPTIMIZER_FILE, SCHEDULER_FILE), *misshapen_counters(state, STATE_FILE))
    return dataclasses.replace(
        facts,
        defects=(*facts.defects, *wrong, *_not_read(names)),
        fields=field_types(state),
        progress=trainer_progress(state, steps),
        run=_run(trainer_run(state, arguments, steps), scheduler),
        metrics=best_metric(state, arguments),
        hyper_parameters=plain(arguments),
        model_only=_is_without_state(names),
        loader_position=bool(state) and arguments.get("ignore_data_skip") is not True and not streams_ended(state),
    )


def _run(run: RunFacts, scheduler: object) -> RunFacts:
    """The run; its schedule steps with the optimizer, but for those that the Trainer steps after an evaluation."""
    if is_mapping(scheduler) and _BY_METRIC.isdisjoint(scheduler):
        return dataclasses.replace(run, scheduler_intervals=("step",), scheduler_frequencies=(1,))
    return run


def _is_without_state(names: Collection[str]) -> bool:
    """Whether the Trainer saved a model and its counters only, as `save_only_model` asks for."""
    return STATE_FILE in names and not any(map(_is_state_name, names))


def _add_state(facts: Facts, folder: Location, names: Collection[str]) -> tuple[Facts, dict[str, Any]]:
    if STATE_FILE in names:
        return _add_json(facts, folder, STATE_FILE)
    message = "it is missing: the Trainer writes it last, so the save of this checkpoint was interrupted"
    return _with_defect(facts, DefectKind.MISSING, STATE_FILE, message), {}


def _add_arguments(
    facts: Facts, folder: Location, names: Collection[str], deep: DeepRead | None
) -> tuple[Facts, dict[str, Any]]:
    """The training arguments that are needed here, from a pickle that no resume reads."""
    if ARGUMENTS_FILE not in names:
        return facts, {}
    facts, value = _add_torch(facts, folder, ARGUMENTS_FILE, deep, "never")
    state = value.state if isinstance(value, Call) else None
    if not is_mapping(state):
        return facts, {}
    arguments = {name: state[name] for name in _ARGUMENTS if _is_plain(state.get(name))}
    processes = state.get("distributed_state")
    count = at(processes.state, ["num_processes"]) if isinstance(processes, Call) else None
    return facts, {**arguments, "num_processes": count} if whole(count) is not None else arguments


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _add_optimizer(
    facts: Facts, folder: Location, names: Collection[str], deep: DeepRead | None
) -> tuple[Facts, object]:
    sharded = [name for name in names if _FSDP_OPTIMIZER.fullmatch(name)]
    if sharded:
        return _add_sharded(facts, folder, sharded, deep), None
    name = next((n for n in (OPTIMIZER_FILE, _FSDP_WHOLE_OPTIMIZER) if n in names), None)
    if name is None:
        return _with_missing(facts, names, OPTIMIZER_FILE), None
    with read_archive(folder.child(name), name, folder, deep) as archive:
        archive.scan(moments=lambda: named_moments(archive.value))
        value = archive.value
        if is_mapping(value):
            optimizers = (*(facts.optimizers or ()), optimizer_of(value, archive.read_scalar))
            facts = dataclasses.replace(facts, optimizers=optimizers)
        facts = archive.complete(facts)
    return _with_misfit(facts, name, value), value


def _add_scheduler(
    facts: Facts, folder: Location, names: Collection[str], deep: DeepRead | None
) -> tuple[Facts, object]:
    if SCHEDULER_FILE not in names:
        return _with_missing(facts, names, SCHEDULER_FILE), None
    facts, value = _add_torch(facts, folder, SCHEDULER_FILE, deep)
    if is_mapping(value):
        groups = facts.optimizers[0].groups if facts.optimizers else ()
        facts = dataclasses.replace(facts, schedulers=(scheduler_of(value, groups),))
    return _with_misfit(facts, SCHEDULER_FILE, value), value


def _add_torch(
    facts: Facts, folder: Location, name: str, deep: DeepRead | None, loader: Loader = "weights_only"
) -> tuple[Facts, Any]:
    with read_archive(folder.child(name), name, folder, deep, loader) as archive:
        archive.scan()
        return archive.complete(facts), archive.value


def _with_missing(facts: Facts, names: Collection[str], name: str) -> Facts:
    """A Trainer that finds the optimizer or the schedule missing leaves both as they are when it resumes."""
    if _is_without_state(names) or any(_DEEPSPEED.fullmatch(n) for n in names):
        return facts
    message = "it is missing, and a resume would silently go on with a fresh optimizer and learning rate schedule"
    return _with_defect(facts, DefectKind.MISSING, name, message)


def _with_misfit(facts: Facts, name: str, value: object) -> Facts:
    if value is None or is_mapping(value):
        return facts
    message = f"it holds a {type(value).__name__} where a dict is needed"
    return _with_defect(facts, DefectKind.UNRECOGNISED, name, message)


def _with_defect(facts: Facts, kind: DefectKind, where: str, message: str) -> Facts:
    return dataclasses.replace(facts, defects=(*facts.defects, Defect(kind, where, message)))


def _not_read(names: Iterable[str]) -> Iterator[Defect]:
    """Parts of a checkpoint in forms that are not read, so that nothing can be said of them."""
    for name in names:
        if _DEEPSPEED.fullmatch(name):
            message = (
                "it holds model and optimizer as DeepSpeed shards them, a form that is not verified; "
                "zero_to_fp32.py, which DeepSpeed puts beside it, turns the weights into a file that is"
            )
            yield Defect(DefectKind.UNRECOGNISED, name, message)
        elif _FSDP_RANK.fullmatch(name):
            message = "it is one process's part as FSDP's LOCAL_STATE_DICT saves it, a form that is not verified"
            yield Defect(DefectKind.UNRECOGNISED, name, message)
