"""`VulnerabilityClassifier`: fine-tunes a code encoder to say which weakness a C function has.

Batches of token ids come in; losses, figures and predictions go out. The network itself is built by `network`,
learning rates come from `schedules`, figures from `metrics`; this module is the order in which Lightning calls them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enstack_lightning.errors import ModelError
from enstack_lightning.model.metrics import confusion_table, evaluation_metrics, training_metrics
from enstack_lightning.model.network import (
    default_label_names,
    pretrained_network,
    quiet_transformers,
    untrained_network,
)
from enstack_lightning.model.schedules import Schedule, warmup_schedule, warmup_steps


class _Inputs(TypedDict):
    input_ids: Tensor
    attention_mask: Tensor
    idx: Tensor


class Batch(_Inputs, total=False):
    """`input_ids` and `attention_mask` [B, T], `idx` and, where the rows are labelled, `labels` [B]; all int64."""

    labels: Tensor


class Prediction(TypedDict):
    """One batch's predictions, on the CPU: `idx` and `predicted` [B] int64, `probabilities` [B, num_labels] float32."""

    idx: Tensor
    predicted: Tensor
    probabilities: Tensor


class VulnerabilityClassifier(LightningModule):
    """Sequence classifier on a RoBERTa-shaped encoder (CodeBERT, GraphCodeBERT, UniXcoder).

    The network is built in `configure_model`, so constructing the module is cheap.

    Args:
        model_name_or_path: Name of a model on the Hugging Face hub, or a local folder with config.json and weights.
        pretrained: Start from the weights of `model_name_or_path`. If false, a network of the sizes below starts from
            random weights and nothing is read or downloaded.
        num_labels: Number of classes, 2 or more.
        label_names: One name a class, in the order of the labels. The default is the five CWE names for five labels,
            else LABEL_0, LABEL_1, and so on.
        learning_rate: Peak learning rate of AdamW, reached at the end of the warm-up.
        weight_decay: Decoupled weight decay; biases and normalisation weights are left out of it.
        warmup_fraction: Share of the optimizer steps in which the learning rate rises from 0, in [0, 1).
        schedule: How the learning rate falls to 0 after the warm-up, linear or cosine.
        dropout: Probability of the hidden, attention and classifier dropout, in [0, 1).
        label_smoothing: Share of each target spread evenly over all classes, in [0, 1).
        class_weights: Weight of each class in the loss, a list of positive numbers; or balanced, for weights inverse
            to the class sizes of the training rows, from the data module's `train_label_counts()`.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, more time.
        compile: Compile the network with torch.compile; the keys of the state dict stay the same.
        vocab_size: Tokens in the vocabulary. This and the sizes below are used if `pretrained` is false.
        hidden_size: Width of the encoder, a multiple of `num_attention_heads`.
        num_hidden_layers: Layers of the encoder.
        num_attention_heads: Attention heads in each layer.
        intermediate_size: Width of the feed-forward layers.
        max_position_embeddings: Longest sequence plus 2 (RoBERTa counts positions from 2).

    Attributes:
        model: The Hugging Face network, None before `configure_model`.
        class_weight: Weight of each class in the loss [num_labels] float32, part of the state dict.
        confusion_matrix: Rows are true classes, columns predicted ones [num_labels, num_labels] int64, of the last
            validation or test; None before the first.

    Raises:
        ModelError: An option is outside its range.

    Example:
        >>> classifier = VulnerabilityClassifier(pretrained=False, vocab_size=100, hidden_size=16)
        >>> classifier.configure_model()
        >>> tokens = torch.tensor([[0, 17, 42, 2]])
        >>> classifier(tokens, torch.ones_like(tokens)).shape
        torch.Size([1, 5])
    """

    class_weight: Tensor

    def __init__(
        self,
        model_name_or_path: str = "microsoft/codebert-base",
        pretrained: bool = True,
        num_labels: int = 5,
        label_names: list[str] | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
        schedule: Schedule = "linear",
        dropout: float = 0.1,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        intermediate_size: int = 512,
        max_position_embeddings: int = 514,
    ) -> None:
        super().__init__()
        _require(num_labels >= 2, "num_labels", num_labels, "2 or more")
        _require(learning_rate > 0, "learning_rate", learning_rate, "a number above 0")
        _require(weight_decay >= 0, "weight_decay", weight_decay, "0 or more")
        _require(0 <= warmup_fraction < 1, "warmup_fraction", warmup_fraction, "in [0, 1)")
        _require(schedule in get_args(Schedule), "schedule", schedule, " or ".join(get_args(Schedule)))
        _require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        _require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "in [0, 1)")
        _check_label_names(label_names, num_labels)
        _check_class_weights(class_weights, num_labels)
        if not pretrained:
            for name, size in (
                ("vocab_size", vocab_size),
                ("hidden_size", hidden_size),
                ("num_hidden_layers", num_hidden_layers),
                ("num_attention_heads", num_attention_heads),
                ("intermediate_size", intermediate_size),
            ):
                _require(size >= 1, name, size, "1 or more")
            wanted = f"a multiple of num_attention_heads, {num_attention_heads}"
            _require(hidden_size % num_attention_heads == 0, "hidden_size", hidden_size, wanted)
            _require(max_position_embeddings >= 3, "max_position_embeddings", max_position_embeddings, "3 or more")
        self.save_hyperparameters()

        self.label_names = label_names or default_label_names(num_labels)
        self.model: PreTrainedModel | None = None
        self.confusion_matrix: Tensor | None = None
        # Always there, so that a checkpoint loads with or without `class_weights` in the run's config.
        explicit = class_weights if isinstance(class_weights, list) else [1.0] * num_labels
        self.register_buffer("class_weight", torch.tensor(explicit, dtype=torch.float32))

        self.train_metrics = training_metrics(num_labels)
        self.val_metrics = evaluation_metrics(num_labels, "val")
        self.test_metrics = evaluation_metrics(num_labels, "test")
        self.val_confusion = MulticlassConfusionMatrix(num_labels, validate_args=False)
        self.test_confusion = MulticlassConfusionMatrix(num_labels, validate_args=False)

    # -- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Sets balanced class weights from the training rows; a checkpoint that is resumed overwrites them."""
        if stage == TrainerFn.FITTING and self.hparams["class_weights"] == "balanced":
            self.class_weight.copy_(self._balanced_class_weight())

    def configure_model(self) -> None:
        """Builds the network once; a second call changes nothing.

        Raises:
            ModelError: The pretrained model cannot be loaded.
        """
        if self.model is not None:
            return
        options = self.hparams
        if options["pretrained"]:
            network = pretrained_network(options["model_name_or_path"], self.label_names, options["dropout"])
        else:
            network = untrained_network(
                self.label_names,
                options["dropout"],
                vocab_size=options["vocab_size"],
                hidden_size=options["hidden_size"],
                num_hidden_layers=options["num_hidden_layers"],
                num_attention_heads=options["num_attention_heads"],
                intermediate_size=options["intermediate_size"],
                max_position_embeddings=options["max_position_embeddings"],
            )
        # `from_pretrained` returns a network in evaluation mode, and Lightning trains in the mode it finds:
        # without this line the run would have no dropout.
        network.train(self.training)
        if options["gradient_checkpointing"]:
            # The second name is that of transformers before 5.23, deprecated since.
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            network.config.use_cache = False  # an encoder has no cache, but transformers would warn of it
        if options["compile"]:
            network.compile()
        self.model = network

    @property
    def network(self) -> PreTrainedModel:
        """The built network.

        Raises:
            ModelError: `configure_model` has not run yet.
        """
        if self.model is None:
            raise ModelError("The network is not built yet: call configure_model() first, or let a Trainer do it.")
        return self.model

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with named parameters in two groups, and a schedule that steps with the optimizer.

        Raises:
            ModelError: The length of the run is not known.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ModelError(
                f"The {self.hparams['schedule']} schedule needs the length of the run, and max_epochs="
                f"{self.trainer.max_epochs} with max_steps={self.trainer.max_steps} leaves it open: "
                "set the Trainer's max_steps or max_epochs."
            )
        optimizer = AdamW(
            parameter_groups(self.network, self.hparams["weight_decay"]), lr=self.hparams["learning_rate"]
        )
        warmup = warmup_steps(int(total_steps), self.hparams["warmup_fraction"])
        scheduler = warmup_schedule(optimizer, int(total_steps), warmup, self.hparams["schedule"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- steps ---------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, num_labels] of token ids and attention mask [B, T], in the precision the network computes in.

        Raises:
            ModelError: The sequences are longer than the encoder has positions.
        """
        config = self.network.config
        longest = config.max_position_embeddings - config.pad_token_id - 1
        if input_ids.shape[1] > longest:
            raise ModelError(
                f"The batch holds sequences of {input_ids.shape[1]:,} tokens and the encoder has positions for "
                f"{longest:,}: lower the data module's max_length."
            )
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"], batch["attention_mask"])
        loss = self.loss(logits, batch["labels"])
        self.train_metrics.update(logits.detach().argmax(dim=1), batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(logits))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val", self.val_metrics, self.val_confusion)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test", self.test_metrics, self.test_confusion)

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        probabilities = self(batch["input_ids"], batch["attention_mask"]).float().softmax(dim=1)
        return {
            "idx": batch["idx"].cpu(),
            "predicted": probabilities.argmax(dim=1).cpu(),
            "probabilities": probabilities.cpu(),
        }

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with label smoothing and class weights, in float32 whatever the precision of the run.

        As `torch.nn.functional.cross_entropy` with `weight`, a mean over the rows' weights; 0 instead of NaN where
        all rows of the batch belong to classes of weight 0.

        Args:
            logits: [B, num_labels], any floating dtype.
            labels: [B] int64.
        """
        weight = self.class_weight.float()
        with torch.autocast(logits.device.type, enabled=False):
            total = F.cross_entropy(
                logits.float(),
                labels,
                weight=weight,
                label_smoothing=self.hparams["label_smoothing"],
                reduction="sum",
            )
            weight_of_rows = weight[labels].sum()
            return total / torch.where(weight_of_rows > 0, weight_of_rows, 1.0)

    def _evaluation_step(
        self, batch: Batch, stage: str, metrics: MetricCollection, confusion: MulticlassConfusionMatrix
    ) -> None:
        logits = self(batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"]
        probabilities = logits.float().softmax(dim=1)
        metrics.update(probabilities, labels)
        confusion.update(probabilities, labels)
        loss = self.loss(logits, labels)
        self.log(f"{stage}/loss", loss, prog_bar=True, on_epoch=True, batch_size=len(logits), sync_dist=True)

    # -- epochs --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        self.train_metrics.reset()

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics.compute(), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()
        self.val_confusion.reset()

    def on_validation_epoch_end(self) -> None:
        self._evaluation_epoch_end(self.val_metrics, self.val_confusion)

    def on_test_epoch_start(self) -> None:
        self.test_metrics.reset()
        self.test_confusion.reset()

    def on_test_epoch_end(self) -> None:
        self._evaluation_epoch_end(self.test_metrics, self.test_confusion)

    def _evaluation_epoch_end(self, metrics: MetricCollection, confusion: MulticlassConfusionMatrix) -> None:
        self.log_dict(metrics.compute(), sync_dist=True)
        self.confusion_matrix = confusion.compute().cpu()
        if self.trainer.state.fn == TrainerFn.FITTING:
            return
        table = confusion_table(self.confusion_matrix, self.label_names)
        self.print(f"Confusion matrix:\n{table}")
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                indented = table.replace("\n", "\n    ")  # four spaces keep the columns in TensorBoard's Markdown
                tag = f"{metrics.prefix}confusion_matrix"
                logger.experiment.add_text(tag, f"    {indented}", self.global_step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network's config as plain data, so that config.json can be written without building anything."""
        checkpoint["hf_config"] = json.loads(self.network.config.to_json_string(use_diff=False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says so where the checkpoint's class weights, which are about to be loaded, differ from the config's.

        A folder of a network alone has none: those of the config stay.
        """
        if "from_folder" in checkpoint:
            checkpoint["state_dict"].setdefault("class_weight", self.class_weight)
        stored = checkpoint.get("state_dict", {}).get("class_weight")
        if self._is_fitting and stored is not None and not torch.equal(stored.cpu(), self.class_weight.cpu()):
            rank_zero_info(f"The class weights of the checkpoint are kept: {_figures(stored)}.")

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Writes the Hugging Face layout: config.json, model.safetensors and the tokenizer's files.

        Args:
            folder: Folder to write into; made where it is missing.
            tokenizer: Tokenizer to save beside the weights; the default is that of the attached data module, if any.

        Returns:
            The folder, which `AutoModelForSequenceClassification.from_pretrained` opens.
        """
        folder = Path(folder)
        with quiet_transformers():
            self.network.save_pretrained(folder)
        tokenizer = tokenizer or self._attached_tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    # -- the attached data module --------------------------------------------------------------------------------

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _attached_tokenizer(self) -> PreTrainedTokenizerBase | None:
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "tokenizer", None)

    def _balanced_class_weight(self) -> Tensor:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "train_label_counts"):
            raise ModelError(
                "class_weights is 'balanced' and the run has no data module with train_label_counts(): "
                f"name the weights, {len(self.label_names)} numbers, or give the Trainer such a data module."
            )
        counts = [int(count) for count in datamodule.train_label_counts()]
        if len(counts) != len(self.label_names) or sum(counts) == 0:
            raise ModelError(
                f"class_weights is 'balanced' and the training rows of each label are {counts}: "
                f"wanted are {len(self.label_names)} counts with at least one row."
            )
        empty = [name for name, count in zip(self.label_names, counts, strict=True) if count == 0]
        weights = balanced_class_weights(counts)
        rank_zero_info(f"Balanced class weights: {_figures(weights)}.")
        if empty:
            rank_zero_info(f"No training rows for {', '.join(empty)}: weight 0 in the loss.")
        return weights


def balanced_class_weights(counts: Sequence[int]) -> Tensor:
    """Weights `rows / (classes * rows of the class)` [C] float32, 0 for a class without rows.

    The formula of scikit-learn's `compute_class_weight("balanced")`.

    Example:
        >>> balanced_class_weights([30, 10, 0])
        tensor([0.4444, 1.3333, 0.0000])
    """
    rows = sum(counts)
    return torch.tensor([rows / (len(counts) * count) if count else 0.0 for count in counts])


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of (name, parameter): with weight decay, and the biases and normalisation weights without."""
    no_decay_ids = {
        id(parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm)
    }
    trained = [(f"model.{name}", p) for name, p in network.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in trained if id(p) not in no_decay_ids], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trained if id(p) in no_decay_ids], "weight_decay": 0.0},
    ]


def _figures(weights: Tensor) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights.tolist())


def _require(condition: bool, name: str, given: object, wanted: str) -> None:
    if not condition:
        raise ModelError(f"The option {name} is {given!r}, and it must be {wanted}.")


def _check_label_names(label_names: list[str] | None, num_labels: int) -> None:
    if label_names is None:
        return
    if len(label_names) != num_labels:
        raise ModelError(
            f"The option label_names holds {len(label_names)} names ({', '.join(label_names)}), "
            f"and it must hold one for each of the {num_labels} labels."
        )
    if len(set(label_names)) != num_labels:
        raise ModelError(f"The option label_names is {label_names!r}, and each name must be there once.")


def _check_class_weights(class_weights: list[float] | str | None, num_labels: int) -> None:
    if class_weights is None or class_weights == "balanced":
        return
    if isinstance(class_weights, str):
        raise ModelError(
            f"The option class_weights is {class_weights!r}, and it must be 'balanced', a list of {num_labels} "
            "positive numbers, or null."
        )
    if len(class_weights) != num_labels:
        raise ModelError(
            f"The option class_weights holds {len(class_weights)} numbers, "
            f"and it must hold one for each of the {num_labels} labels."
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in class_weights):
        raise ModelError(f"The option class_weights is {class_weights!r}, and each weight must be a number above 0.")
