"""A folder as what a Trainer loads: an EnStack checkpoint to resume from, a folder of weights to evaluate.

A folder that has passed verification becomes the dict of a Lightning checkpoint, which the Trainer and the guard then
treat as any other. What `enstack export` wrote holds all of the run and is put together again; what EnStack itself
wrote lacks random state and the run's settings, and what that means is said.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from enstack_lightning.checkpoint import Format, Report
from enstack_lightning.cli.export import REST, WEIGHTS_PREFIX, stands_at
from enstack_lightning.cli.folder_loops import loops_at_epoch_end
from enstack_lightning.cli.folder_optimizer import fitted
from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.errors import CheckpointError
from enstack_lightning.guard.live import loaded_facts
from enstack_lightning.guard.restart.resume_state import STATE_VERSION
from enstack_lightning.model.network import default_label_names, quiet_transformers

_STATE = "training_state.pth"
_SCORES = {"val/f1": "best_val_f1", "val/accuracy": "best_val_acc"}
_OF_THE_RUN = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "hidden_act": "gelu"}
"""What a network made from sizes alone has in its config."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass
class Converted:
    """A folder in the form of a Lightning checkpoint.

    Attributes:
        checkpoint: the dict.
        tokenizer: where the tokenizer of its network is, as far as the folder tells; None where it has none or where
            the checkpoint holds it.
        said: what a person should know of it.
    """

    checkpoint: dict[str, Any]
    tokenizer: str | None = None
    said: list[str] = field(default_factory=list)


def convert_to_resume(
    folder: Path, report: Report, accumulate_grad_batches: int, best_model: ModelCheckpoint
) -> Converted:
    """A verified EnStack folder as the checkpoint that a Trainer resumes from.

    Args:
        folder: the folder.
        report: the report on it.
        accumulate_grad_batches: that of the run that resumes.
        best_model: the run's callback that keeps the best checkpoint; its score is set to the folder's.

    Raises:
        CheckpointError: it is no EnStack folder, or a resume from it would lose something unsaid.
    """
    if report.facts.format is not Format.ENSTACK:
        raise CheckpointError(
            f"checkpoint {folder} is a folder of the form {report.facts.format!s}; resume from a Lightning .ckpt file "
            f"or an EnStack folder, or start from its weights with --model.model_name_or_path {folder}"
        )
    state = _read(folder / _STATE)
    if REST in state:
        converted = _exported(folder, report, state)
    else:
        converted = _of_enstack(folder, report, state, accumulate_grad_batches)
    converted.said += _best_score(converted.checkpoint, state, best_model)
    return converted


def convert_to_evaluate(folder: Path, report: Report) -> Converted:
    """A verified EnStack or Hugging Face folder as a checkpoint of weights.

    Raises:
        CheckpointError: it is a folder of another form.
    """
    if report.facts.format not in (Format.ENSTACK, Format.HUGGINGFACE):
        raise CheckpointError(
            f"checkpoint {folder} is a folder of the form {report.facts.format!s}; name a .ckpt file or a folder with "
            "config.json and weights"
        )
    rest = _read(folder / _STATE).get(REST) if report.facts.format is Format.ENSTACK else None
    converted = _network(folder)
    if isinstance(rest, Mapping):
        converted.checkpoint["state_dict"].update(rest["state_dict"])
        kept = ("hyper_parameters", "datamodule_hyper_parameters", VulnerabilityDataModule.__qualname__)
        converted.checkpoint.update({name: rest[name] for name in kept if name in rest})
        converted.tokenizer = None if _holds_tokenizer(rest) else converted.tokenizer
    return converted


# What `enstack export` wrote


def _exported(folder: Path, report: Report, state: Mapping[str, Any]) -> Converted:
    rest = state[REST]
    if not isinstance(rest, Mapping) or not {"state_dict", "loops", "callbacks"} <= rest.keys():
        raise CheckpointError(f"checkpoint {folder}: the entry {REST} of {_STATE} is not what enstack export writes")
    weights = {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in _weights(folder).items()}
    schedule = state.get("scheduler_state_dict")
    checkpoint = {
        **rest,
        "state_dict": {**rest["state_dict"], **weights},
        "optimizer_states": [state["optimizer_state_dict"]],
        "lr_schedulers": [] if schedule is None else [schedule],
        "hf_config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
    }
    expected = stands_at(loaded_facts(checkpoint, str(folder)))
    actual = report.facts.progress.epoch, report.facts.progress.step
    if actual != expected:
        raise CheckpointError(
            f"checkpoint {folder} stands at epoch {actual[0]}, step {actual[1]}, and its entry {REST} at epoch "
            f"{expected[0]}, step {expected[1]}: {_STATE} was changed after the export. Use another checkpoint."
        )
    said = ["it holds all of the run that was exported, random state too, and goes on exactly"]
    return Converted(checkpoint, None if _holds_tokenizer(rest) else _tokenizer_of(folder), said)


# What EnStack wrote


def _of_enstack(folder: Path, report: Report, state: Mapping[str, Any], accumulation: int) -> Converted:
    epochs, step, batches = (report.facts.progress.epoch, report.facts.progress.step, state.get("total_batches"))
    if step:
        of = f" of {batches:,}" if batches else ""
        raise _refused(
            folder, f"it stands inside epoch {epochs}, after {step:,}{of} batches of an order it does not hold"
        )
    if not epochs or not batches:
        raise _refused(folder, "it does not say how many epochs of how many batches are done (epoch, total_batches)")
    converted = _network(folder)
    with torch.device("meta"):
        network = _network_of(_config(folder))
    in_epoch = math.ceil(batches / accumulation)
    steps, said = _steps(folder, report, state, epochs, batches, accumulation)
    states = fitted(state, network, steps, folder)
    scheduler_steps = states.scheduler["last_epoch"]
    group = states.optimizer["param_groups"][0]
    converted.checkpoint["hyper_parameters"].update(
        learning_rate=float(group["initial_lr"]), weight_decay=float(group["weight_decay"])
    )
    converted.checkpoint.update(
        epoch=epochs - 1,
        global_step=steps,
        loops=loops_at_epoch_end(epochs, batches, steps, in_epoch, scheduler_steps),
        callbacks={"CheckpointGuard": _guard_state(batches, accumulation, states.scheduler)},
        optimizer_states=[states.optimizer],
        lr_schedulers=[states.scheduler],
    )
    if state.get("scaler_state_dict"):
        converted.checkpoint["MixedPrecision"] = state["scaler_state_dict"]
    converted.said += [
        "random state and what it was trained on are not in it: the order of rows is that of the seed and the epoch, "
        "and dropout draws anew",
        *said,
        *states.said,
    ]
    return converted


def _steps(
    folder: Path, report: Report, state: Mapping[str, Any], epochs: int, batches: int, accumulation: int
) -> tuple[int, list[str]]:
    """The optimizer steps done: those of whole epochs, or the optimizer's own count where it is close to them."""
    expected = epochs * math.ceil(batches / accumulation)
    actual = max((optimizer.most_steps or 0 for optimizer in report.facts.optimizers or ()), default=0)
    if actual == expected:
        return actual, []
    if abs(actual - expected) > max(20, batches // 10) or 10 * abs(actual - expected) > expected:
        others = [n for n in range(1, 129) if epochs * math.ceil(batches / n) == actual]
        hint = f"; --trainer.accumulate_grad_batches {others[0]} would give that" if others else ""
        raise _refused(
            folder,
            f"its optimizer did {actual:,} steps, and {epochs:,} epochs of {batches:,} batches with "
            f"accumulate_grad_batches {accumulation:,} give {expected:,}{hint}",
        )
    if state.get("scaler_state_dict") and actual < expected:
        return expected, [f"the gradient scaler skipped {expected - actual:,} of {expected:,} optimizer steps"]
    return actual, [
        f"the optimizer did {actual:,} steps where {expected:,} were due, and {actual:,} is the global step"
    ]


def _guard_state(batches: int, accumulation: int, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a guard would have recorded, as far as it is known: the run, and the moment between two epochs."""
    return {
        "version": STATE_VERSION,
        "run": {
            "batches_per_epoch": batches,
            "accumulate_grad_batches": accumulation,
            "scheduler_intervals": ["step"],
            "scheduler_frequencies": [1],
            "scheduler_kinds": ["LambdaLR"],
            "scheduler_options": [{"base_lrs": scheduler["base_lrs"]}],
            "optimizer_kinds": ["AdamW"],
        },
        "resume": {"point": "between_epochs", "early_stop": False, "validation_workers": [], "ranks": []},
    }


# The network


def _network(folder: Path) -> Converted:
    """The weights, and the options of a classifier that they fit."""
    config, weights = _config(folder), _weights(folder)
    names = [name for _, name in sorted((int(label), name) for label, name in (config.id2label or {}).items())]
    # Hugging Face writes no labels where they are the default, and reads none as two.
    head = next((tensor for name, tensor in weights.items() if name.endswith("out_proj.weight")), None)
    labels = len(names) if head is None else len(head)
    generic = [f"LABEL_{label}" for label in range(labels)], default_label_names(labels)
    named = len(names) == labels and names not in generic
    options: dict[str, Any] = {"num_labels": labels, "dropout": float(getattr(config, "hidden_dropout_prob", 0.1))}
    if named:
        options["label_names"] = [str(name) for name in names]
    if config.model_type == "roberta" and all(getattr(config, n, None) == v for n, v in _OF_THE_RUN.items()):
        options.update(pretrained=False, **{name: getattr(config, name) for name in _SIZES})
    else:
        options.update(pretrained=True, model_name_or_path=str(folder.absolute()))
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in weights.items()},
        "hyper_parameters": options,
        "datamodule_hyper_parameters": {"vocab_size": config.vocab_size},  # from which the network's follows
        "from_folder": str(folder),
    }
    return Converted(checkpoint, _tokenizer_of(folder))


def _config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder.absolute()), local_files_only=True)
    except (ValueError, OSError, KeyError) as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {folder}: transformers makes no network of its config.json ({said})") from e
    return config


def _network_of(config: PreTrainedConfig) -> PreTrainedModel:
    with quiet_transformers():
        network: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    return network


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        weights = load_file(folder / "model.safetensors")
    elif index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        weights = {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}
    elif (folder / "pytorch_model.bin").is_file():
        weights = _read(folder / "pytorch_model.bin")
    else:
        raise CheckpointError(
            f"checkpoint {folder} has its weights in other files than model.safetensors or pytorch_model.bin"
        )
    # A buffer of older versions of transformers, which is counted anew.
    return {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    return content


def _tokenizer_of(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return str(folder.absolute())
    origin = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    return origin or None


def _holds_tokenizer(rest: Mapping[str, Any]) -> bool:
    state = rest.get(VulnerabilityDataModule.__qualname__) or {}
    options = rest.get("datamodule_hyper_parameters") or {}
    return bool(state.get("tokenizer_json") or options.get("tokenizer"))


# The best score


def _best_score(checkpoint: dict[str, Any], state: Mapping[str, Any], best_model: ModelCheckpoint) -> list[str]:
    """Lets the run's own best checkpoint have to beat the folder's score.

    Lightning takes a score only from a checkpoint saved to the same folder, and removes the file that was best when it
    is beaten: the name is that of the file this run will write.
    """
    callbacks = checkpoint["callbacks"]
    before = callbacks.get(best_model.state_key) or {}
    if before.get("dirpath") == best_model.dirpath and before.get("best_k_models"):
        return []
    key = _SCORES.get(best_model.monitor or "")
    score = state.get(key) if key else None
    if score is None:
        return [f"it names no best score of {best_model.monitor}: the first one of this run counts as the best"]
    best = torch.tensor(float(score))
    path = str(Path(best_model.dirpath or ".") / f"{best_model.filename}.ckpt")
    callbacks[best_model.state_key] = {
        "monitor": best_model.monitor,
        "best_model_score": best,
        "best_model_path": path,
        "current_score": None,
        "dirpath": best_model.dirpath,
        "best_k_models": {path: best},
        "kth_best_model_path": path,
        "kth_value": best,
        "last_model_path": "",
    }
    return [f"{Path(path).name} is written when {best_model.monitor} is above {float(score):.4f}, the best so far"]


def _refused(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} cannot be resumed from: {why}. Use a folder of an epoch's end, or start anew from its "
        f"weights with --model.model_name_or_path {folder}."
    )
