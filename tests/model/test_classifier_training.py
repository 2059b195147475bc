"""The classifier under a real Trainer: what it learns, with which weights, in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from sklearn.utils.class_weight import compute_class_weight
from tiny_classifier import CountingDataModule, TokenRows, built_classifier, loader, short_trainer, tiny_classifier
from torch import nn

from enstack_lightning.errors import ModelError


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.logit_dtypes: set[torch.dtype] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        loss = pl_module.loss

        def noted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.logit_dtypes.add(logits.dtype)
            return loss(logits, labels)

        pl_module.loss = noted

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(outputs["loss"].detach())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_overfits_one_batch(tmp_path: Path, gradient_checkpointing: bool) -> None:
    torch.manual_seed(0)
    rows = TokenRows(8)
    classifier = tiny_classifier(
        learning_rate=1e-2, dropout=0.0, warmup_fraction=0.0, gradient_checkpointing=gradient_checkpointing
    )
    trainer = short_trainer(tmp_path, max_steps=120)
    trainer.fit(classifier, loader(rows, batch_size=8))
    assert float(trainer.callback_metrics["train/accuracy"]) == 1.0
    assert float(trainer.callback_metrics["train/loss"]) < 0.1


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        classifier = built_classifier(gradient_checkpointing=enabled, dropout=0.0)
        rows = TokenRows(4)
        classifier.loss(classifier(rows.input_ids, rows.attention_mask), rows.labels).backward()
        gradients.append({name: parameter.grad for name, parameter in classifier.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_loss_is_float32_under_bf16_mixed(tmp_path: Path) -> None:
    seen = Losses()
    trainer = short_trainer(tmp_path, max_steps=2, precision="bf16-mixed", callbacks=[seen])
    trainer.fit(tiny_classifier(), loader(TokenRows(8)))
    assert seen.logit_dtypes == {torch.bfloat16}
    assert {loss.dtype for loss in seen.losses} == {torch.float32}


def test_loss_equals_torch_with_smoothing_and_weights() -> None:
    weights = [0.5, 1.0, 2.0, 4.0, 0.25]
    classifier = tiny_classifier(class_weights=weights, label_smoothing=0.1)
    logits, labels = torch.randn(32, 5), torch.randint(5, (32,))
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(weights), label_smoothing=0.1)
    torch.testing.assert_close(classifier.loss(logits, labels), expected)
    torch.testing.assert_close(tiny_classifier().loss(logits, labels), F.cross_entropy(logits, labels))


def test_batch_of_weightless_classes_has_loss_zero_not_nan() -> None:
    classifier = tiny_classifier()
    classifier.class_weight.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    logits = torch.randn(4, 5, requires_grad=True)
    loss = classifier.loss(logits, torch.full((4,), 2))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_biases_and_normalisation_weights_are_not_decayed(tmp_path: Path) -> None:
    classifier = tiny_classifier(weight_decay=0.02)
    trainer = short_trainer(tmp_path, max_steps=1)
    trainer.fit(classifier, loader(TokenRows(4)))
    decayed, spared = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    names = dict(classifier.named_parameters())
    assert {*decayed["param_names"], *spared["param_names"]} == set(names)
    assert all(name.endswith(".bias") or "LayerNorm" in name for name in spared["param_names"])
    assert not any(name.endswith(".bias") or "LayerNorm" in name for name in decayed["param_names"])
    for group in (decayed, spared):
        assert [id(parameter) for parameter in group["params"]] == [id(names[name]) for name in group["param_names"]]


def test_pretrained_encoder_trains_with_dropout(tmp_path: Path) -> None:
    folder = built_classifier().save_pretrained(tmp_path / "model")
    modes: list[bool] = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            modes.extend(module.training for module in pl_module.modules() if isinstance(module, nn.Dropout))

    classifier = tiny_classifier(pretrained=True, model_name_or_path=str(folder))
    short_trainer(tmp_path, max_steps=1, callbacks=[Modes()]).fit(classifier, loader(TokenRows(4)))
    assert modes
    assert all(modes)


def test_balanced_weights_equal_scikit_learn(tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
    labels = [0] * 6 + [1] * 3 + [3] * 2 + [4]
    classifier = tiny_classifier(class_weights="balanced")
    trainer = short_trainer(tmp_path, max_steps=1)
    trainer.fit(classifier, datamodule=CountingDataModule(TokenRows(12, labels)))
    present = compute_class_weight("balanced", classes=np.array([0, 1, 3, 4]), y=labels) * 4 / 5
    expected = [present[0], present[1], 0.0, present[2], present[3]]
    assert classifier.class_weight.tolist() == pytest.approx(expected)
    assert "No training rows for CWE-469: weight 0 in the loss." in info_lines.text


def test_balanced_weights_without_a_data_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no data module with train_label_counts\(\): name the weights, 5 numbers"):
        short_trainer(tmp_path, max_steps=1).fit(tiny_classifier(class_weights="balanced"), loader(TokenRows(4)))


def test_balanced_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    data = CountingDataModule(TokenRows(4, num_labels=3), num_labels=3)
    with pytest.raises(ModelError, match="wanted are 5 counts"):
        short_trainer(tmp_path, max_steps=1).fit(tiny_classifier(class_weights="balanced"), datamodule=data)


def test_predictions_cover_every_row_on_the_cpu(tmp_path: Path) -> None:
    rows = TokenRows(10)
    unlabelled = [{name: row[name] for name in ("input_ids", "attention_mask", "idx")} for row in rows]
    classifier = built_classifier()
    trainer = short_trainer(tmp_path, precision="bf16-mixed")
    batches = trainer.predict(classifier, torch.utils.data.DataLoader(unlabelled, batch_size=4))
    assert torch.cat([batch["idx"] for batch in batches]).tolist() == list(range(10))
    probabilities = torch.cat([batch["probabilities"] for batch in batches])
    predicted = torch.cat([batch["predicted"] for batch in batches])
    assert (probabilities.dtype, probabilities.shape) == (torch.float32, (10, 5))
    assert (predicted.dtype, predicted.shape) == (torch.int64, (10,))
    assert torch.equal(predicted, probabilities.argmax(dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(10))
    assert probabilities.device.type == "cpu"


def test_too_long_sequences_are_named_before_the_embedding_fails() -> None:
    tokens = torch.ones(1, 33, dtype=torch.int64)
    with pytest.raises(ModelError, match=r"sequences of 33 tokens and the encoder has positions for 32: lower"):
        built_classifier()(tokens, torch.ones_like(tokens))
    assert built_classifier()(tokens[:, :32] * 5, torch.ones(1, 32, dtype=torch.int64)).shape == (1, 5)
