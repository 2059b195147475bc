"""Networks from local folders, from an unreachable hub and from sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_classifier import built_classifier
from transformers import AutoModelForSequenceClassification, RobertaModel

from enstack_lightning.errors import ModelError
from enstack_lightning.model import CWE_NAMES, VulnerabilityClassifier
from enstack_lightning.model.network import pretrained_network

TOKENS = torch.tensor([[0, 7, 9, 2], [0, 8, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def loaded(folder: Path, **options: object) -> VulnerabilityClassifier:
    classifier = VulnerabilityClassifier(str(folder), **options)  # type: ignore[arg-type]
    classifier.configure_model()
    return classifier


def test_save_pretrained_opens_with_equal_logits(tmp_path: Path) -> None:
    classifier = built_classifier().eval()
    folder = classifier.save_pretrained(tmp_path / "model")
    reopened = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert [reopened.config.id2label[label] for label in range(5)] == list(CWE_NAMES)
    assert reopened.config.label2id["CWE-476"] == 3
    with torch.no_grad():
        ours = classifier(TOKENS, MASK)
        assert torch.equal(ours, reopened(input_ids=TOKENS, attention_mask=MASK).logits)
        assert torch.equal(ours, loaded(folder).eval()(TOKENS, MASK))


def test_folder_with_head_loads_without_a_word(
    tmp_path: Path, info_lines: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = built_classifier().save_pretrained(tmp_path)
    capfd.readouterr()
    loaded(folder)
    assert info_lines.text == ""
    assert "".join(capfd.readouterr()) == ""


def test_encoder_without_head_says_one_line(
    tmp_path: Path, info_lines: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = built_classifier().network.base_model
    RobertaModel(encoder.config).save_pretrained(tmp_path)  # with the pooler, as the published encoders have
    encoder.save_pretrained(tmp_path)
    capfd.readouterr()
    classifier = loaded(tmp_path)
    (record,) = info_lines.records
    assert record.getMessage() == (
        f"Loaded the encoder from '{tmp_path}': the classification head for 5 labels is new."
    )
    assert "LOAD REPORT" not in "".join(capfd.readouterr())
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, classifier.network.base_model.state_dict()[name])


def test_head_for_other_labels_starts_anew(tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
    folder = built_classifier(num_labels=3).save_pretrained(tmp_path)
    classifier = loaded(folder)
    assert classifier.eval()(TOKENS, MASK).shape == (2, 5)
    (record,) = info_lines.records
    assert record.getMessage() == (
        f"The classification head in '{tmp_path}' is for 3 labels: its output layer starts anew with 5."
    )


def test_head_with_other_names_is_said(tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
    folder = built_classifier(num_labels=2, label_names=["safe", "vulnerable"]).save_pretrained(tmp_path)
    loaded(folder, num_labels=2, label_names=["vulnerable", "safe"])
    assert "was trained for the labels safe, vulnerable and continues as vulnerable, safe." in info_lines.text


def test_pretrained_network_trains_with_dropout(tmp_path: Path) -> None:
    folder = built_classifier().save_pretrained(tmp_path)
    classifier = loaded(folder, dropout=0.3)
    assert all(module.training for module in classifier.modules())
    dropouts = {module.p for module in classifier.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.3}
    assert classifier.network.config.attention_probs_dropout_prob == 0.3


def test_stored_half_precision_becomes_float32(tmp_path: Path) -> None:
    built_classifier().network.half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded(tmp_path).parameters()} == {torch.float32}


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model, it has no config.json: name a local folder"):
        loaded(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    built_classifier().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"No model can be loaded from .* set `pretrained: false`\.$"):
        loaded(tmp_path)


@pytest.mark.parametrize("content", [b"nonsense", b"{}", b""])
def test_folder_with_a_broken_config_is_refused(tmp_path: Path, content: bytes) -> None:
    built_classifier().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="No model can be loaded from"):
        loaded(tmp_path)


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    built_classifier().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="No model can be loaded from"):
        loaded(tmp_path)


def test_missing_encoder_weights_do_not_become_random(tmp_path: Path) -> None:
    built_classifier().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 1 of the encoder's tensors .* 'roberta\.encoder\.layer\.1\.output\.dense"
    ):
        loaded(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "runs/2024/model"])
def test_missing_folder_is_not_taken_for_a_hub_name(path: str) -> None:
    with pytest.raises(ModelError, match="There is no model folder at"):
        pretrained_network(path, CWE_NAMES, dropout=0.1)


def hub_error(tmp_path: Path, name: str, **environment: str) -> str:
    code = (
        "from enstack_lightning.errors import ModelError\n"
        "from enstack_lightning.model.network import pretrained_network\n"
        "try:\n"
        f"    pretrained_network({name!r}, ['a', 'b'], dropout=0.1)\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stderr == ""
    return run.stdout


def test_offline_hub_says_what_to_do(tmp_path: Path) -> None:
    assert hub_error(tmp_path, "microsoft/codebert-base", HF_HUB_OFFLINE="1") == (
        "The model 'microsoft/codebert-base' is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub: "
        "unset it, name a local folder that holds config.json and weights, or set `pretrained: false`.\n"
    )


def test_unreachable_hub_says_what_to_do_once(tmp_path: Path) -> None:
    message = hub_error(tmp_path, "microsoft/codebert-base", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.count("\n") == 1
    assert "the hub at http://127.0.0.1:9 did not answer (ConnectError)" in message
    assert message.endswith("or set `pretrained: false`.\n")


def test_impossible_hub_name_is_refused() -> None:
    with pytest.raises(ModelError, match="The hub has no model named 'code bert'"):
        pretrained_network("code bert", CWE_NAMES, dropout=0.1)
