"""What a Trainer's checkpoint of the classifier holds, and what a resumed run takes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_classifier import CountingDataModule, TokenRows, loader, short_trainer, tiny_classifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from enstack_lightning.model import VulnerabilityClassifier

UNEVEN = [0] * 8 + [1] * 4 + [2] * 2 + [3, 4]


def trained_checkpoint(folder: Path, steps: int = 2, **options: object) -> Path:
    torch.manual_seed(0)
    trainer = short_trainer(folder, max_steps=steps)
    trainer.fit(tiny_classifier(**options), datamodule=CountingDataModule(TokenRows(16, UNEVEN)))
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_checkpoint_is_plain_data_and_names_its_optimizer_state(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, class_weights="balanced", label_names=["a", "b", "c", "d", "e"])
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["class_weights"] == "balanced"
    assert checkpoint["state_dict"]["class_weight"].shape == (5,)
    weights = {name for name in checkpoint["state_dict"] if name != "class_weight"}
    assert all(name.startswith("model.") for name in weights)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {name for group in groups for name in group["param_names"]} == weights
    assert checkpoint["lr_schedulers"][0]["lr_lambdas"] == [None, None]


def test_stored_config_builds_the_network_without_the_module(tmp_path: Path) -> None:
    checkpoint = torch.load(trained_checkpoint(tmp_path), weights_only=True)
    config = RobertaConfig.from_dict(json.loads(json.dumps(checkpoint["hf_config"])))
    assert config.architectures == ["RobertaForSequenceClassification"]
    assert config.id2label[3] == "CWE-476"
    network = RobertaForSequenceClassification(config)
    state = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    del state["class_weight"]
    network.load_state_dict(state)


def test_load_from_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = tiny_classifier()
    trainer = short_trainer(tmp_path, max_steps=2)
    rows = TokenRows(8)
    trainer.fit(classifier, loader(rows))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = VulnerabilityClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    with torch.no_grad():
        inputs = (rows.input_ids, rows.attention_mask)
        assert torch.equal(loaded.eval()(*inputs), classifier.eval()(*inputs))


def test_resume_keeps_the_class_weights_of_the_checkpoint(tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
    path = trained_checkpoint(tmp_path, class_weights="balanced")
    stored = torch.load(path, weights_only=True)["state_dict"]["class_weight"]
    classifier = tiny_classifier(class_weights="balanced")
    changed = CountingDataModule(TokenRows(16, [0] * 12 + [1, 2, 3, 4]))
    short_trainer(tmp_path, max_steps=4).fit(classifier, datamodule=changed, ckpt_path=path)
    assert torch.equal(classifier.class_weight, stored)
    assert "The class weights of the checkpoint are kept: 0.4, 0.8, 1.6, 3.2, 3.2." in info_lines.text


def test_resume_with_equal_weights_says_nothing(tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
    path = trained_checkpoint(tmp_path, class_weights="balanced")
    data = CountingDataModule(TokenRows(16, UNEVEN))
    short_trainer(tmp_path, max_steps=4).fit(tiny_classifier(class_weights="balanced"), datamodule=data, ckpt_path=path)
    assert "are kept" not in info_lines.text


class SaveAfterFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    path = tmp_path / "first-epoch.ckpt"
    finished = []
    for ckpt_path, callbacks in ((None, [SaveAfterFirstEpoch(path)]), (path, [])):
        classifier = tiny_classifier(dropout=0.0, class_weights="balanced", learning_rate=1e-3)
        trainer = short_trainer(tmp_path, max_epochs=3, callbacks=callbacks)
        trainer.fit(classifier, datamodule=CountingDataModule(TokenRows(16, UNEVEN)), ckpt_path=ckpt_path)
        finished.append(classifier.state_dict())
    assert torch.load(path, weights_only=True)["global_step"] == 4
    for name, tensor in finished[0].items():
        assert torch.equal(finished[1][name], tensor), name


def test_checkpoint_with_weights_validates_under_a_config_without(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, class_weights="balanced")
    classifier = tiny_classifier()
    short_trainer(tmp_path).validate(classifier, loader(TokenRows(8)), ckpt_path=path, verbose=False)
    assert classifier.class_weight.tolist() == pytest.approx([0.4, 0.8, 1.6, 3.2, 3.2])


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "int": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>")


def test_save_pretrained_takes_the_tokenizer_given_or_attached(tmp_path: Path) -> None:
    classifier = tiny_classifier()
    data = CountingDataModule(TokenRows(8))
    data.tokenizer = word_tokenizer()
    short_trainer(tmp_path, max_steps=1).fit(classifier, datamodule=data)
    attached = classifier.save_pretrained(tmp_path / "attached")
    given = classifier.save_pretrained(tmp_path / "given", tokenizer=word_tokenizer())
    for folder in (attached, given):
        assert AutoTokenizer.from_pretrained(folder)("int")["input_ids"] == [3]
