"""Builds the Hugging Face network: from a hub name, from a local folder, or untrained from sizes.

Whatever goes wrong on the way ends in a `ModelError` of one sentence that says what was tried and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from lightning.pytorch.utilities import rank_zero_info
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.utils import logging as transformers_logging

from enstack_lightning.errors import ModelError

CWE_NAMES = ("CWE-119", "CWE-120", "CWE-469", "CWE-476", "other")

_HUB_TIMEOUT_SECONDS = 10
_WHAT_TO_DO = "name a local folder that holds config.json and weights, or set `pretrained: false`"


def default_label_names(num_labels: int) -> list[str]:
    """The five CWE names for five labels, else `LABEL_0`, `LABEL_1`, …

    Example:
        >>> default_label_names(2)
        ['LABEL_0', 'LABEL_1']
    """
    return list(CWE_NAMES) if num_labels == len(CWE_NAMES) else [f"LABEL_{label}" for label in range(num_labels)]


def untrained_network(
    label_names: Sequence[str],
    dropout: float,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
) -> PreTrainedModel:
    """RoBERTa classifier of the given sizes with random weights (`<pad>` 1, `<s>` 0, `</s>` 2)."""
    config = RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    _describe_task(config, label_names, dropout)
    network: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    config.architectures = [type(network).__name__]
    return network


def pretrained_network(name_or_path: str, label_names: Sequence[str], dropout: float) -> PreTrainedModel:
    """Encoder with pretrained weights, and a head for `label_names`: the stored one where it fits, else a new one.

    Args:
        name_or_path: A local folder in the Hugging Face layout, or the name of a model on the hub.
        label_names: One name a class, in the order of the labels.
        dropout: Probability for the hidden, attention and classifier dropout.

    Raises:
        ModelError: The hub or the folder gives no model, or one whose encoder weights are not all there.
    """
    local_files_only = _locate(name_or_path)
    source = str(Path(name_or_path).expanduser()) if Path(name_or_path).expanduser().is_dir() else name_or_path
    network: PreTrainedModel
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
            stored_names = [config.id2label[label] for label in sorted(config.id2label)]
            _describe_task(config, label_names, dropout)
            network, loading = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=torch.get_default_dtype(),  # the stored dtype could be float16, which does not train
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=local_files_only,
            )
    except Exception as error:  # the loaders raise OSError, ValueError, KeyError, SafetensorError, UnpicklingError, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"No model can be loaded from '{name_or_path}' ({reason}): {_WHAT_TO_DO}.") from error
    network.config.architectures = [type(network).__name__]
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    _report_head(network, name_or_path, set(loading["missing_keys"]), mismatched, stored_names, label_names)
    return network


def _describe_task(config: PreTrainedConfig, label_names: Sequence[str], dropout: float) -> None:
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: label for label, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    config.hidden_dropout_prob = dropout
    config.attention_probs_dropout_prob = dropout
    config.classifier_dropout = dropout


def _locate(name_or_path: str) -> bool:
    """Whether everything is on this machine; asks the hub once where it is not.

    transformers itself would ask an unreachable hub six times a file, for 20 seconds and more.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"The folder '{name_or_path}' is not a model, it has no config.json: {_WHAT_TO_DO}.")
        return True
    if folder.exists() or folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelError(f"There is no model folder at '{name_or_path}': {_WHAT_TO_DO}.")
    try:
        if _is_cached(name_or_path):
            return True
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"The model '{name_or_path}' is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub: "
                f"unset it, {_WHAT_TO_DO}."
            )
        url = huggingface_hub.hf_hub_url(name_or_path, "config.json")
        huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_SECONDS)
    except ModelError:
        raise
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"The hub has no model named '{name_or_path}' that this machine may read: "
            f"check the name and the access token, {_WHAT_TO_DO}."
        ) from None
    except Exception as error:  # the HTTP client's own exceptions; which client it is depends on huggingface_hub
        raise ModelError(
            f"The model '{name_or_path}' is not in the local cache, and the hub at "
            f"{huggingface_hub.constants.ENDPOINT} did not answer ({type(error).__name__}): {_WHAT_TO_DO}."
        ) from None
    return False


def _is_cached(name: str) -> bool:
    def cached(filename: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(name, filename), str)

    return cached("config.json") and (cached("model.safetensors") or cached("pytorch_model.bin"))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the load report and progress bars of transformers; `_report_head` says in one line what matters."""
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _report_head(
    network: PreTrainedModel,
    name_or_path: str,
    missing: set[str],
    mismatched: set[str],
    stored_names: Sequence[str],
    label_names: Sequence[str],
) -> None:
    encoder = sorted(key for key in missing | mismatched if key.startswith(f"{network.base_model_prefix}."))
    if encoder:
        raise ModelError(
            f"The weights in '{name_or_path}' lack {len(encoder):,} of the encoder's tensors or hold them in another "
            f"shape, '{encoder[0]}' first: {_WHAT_TO_DO}."
        )
    if mismatched:
        rank_zero_info(
            f"The classification head in '{name_or_path}' is for {len(stored_names)} labels: "
            f"its output layer starts anew with {len(label_names)}."
        )
    elif missing:
        rank_zero_info(
            f"Loaded the encoder from '{name_or_path}': the classification head for {len(label_names)} labels is new."
        )
    elif list(stored_names) != list(label_names):
        rank_zero_info(
            f"The classification head in '{name_or_path}' was trained for the labels {', '.join(stored_names)} "
            f"and continues as {', '.join(label_names)}."
        )
