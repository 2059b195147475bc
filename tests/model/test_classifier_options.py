"""Options outside their range are refused before anything is built."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from tiny_classifier import built_classifier, tiny_classifier

from enstack_lightning.errors import ModelError
from enstack_lightning.model import CWE_NAMES, VulnerabilityClassifier


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_labels": 1}, "The option num_labels is 1, and it must be 2 or more."),
        ({"learning_rate": 0.0}, "The option learning_rate is 0.0, and it must be a number above 0."),
        ({"learning_rate": float("nan")}, "The option learning_rate is nan, and it must be a number above 0."),
        ({"weight_decay": -0.1}, "The option weight_decay is -0.1, and it must be 0 or more."),
        ({"warmup_fraction": 1.0}, "The option warmup_fraction is 1.0, and it must be in [0, 1)."),
        ({"warmup_fraction": -0.1}, "The option warmup_fraction is -0.1, and it must be in [0, 1)."),
        ({"schedule": "step"}, "The option schedule is 'step', and it must be linear or cosine."),
        ({"dropout": 1.0}, "The option dropout is 1.0, and it must be in [0, 1)."),
        ({"label_smoothing": 2}, "The option label_smoothing is 2, and it must be in [0, 1)."),
        (
            {"label_names": ["a", "b"]},
            "The option label_names holds 2 names (a, b), and it must hold one for each of the 5 labels.",
        ),
        (
            {"num_labels": 2, "label_names": ["a", "a"]},
            "The option label_names is ['a', 'a'], and each name must be there once.",
        ),
        (
            {"class_weights": [1.0]},
            "The option class_weights holds 1 numbers, and it must hold one for each of the 5 labels.",
        ),
        (
            {"num_labels": 2, "class_weights": [1.0, 0.0]},
            "The option class_weights is [1.0, 0.0], and each weight must be a number above 0.",
        ),
        (
            {"class_weights": "even"},
            "The option class_weights is 'even', and it must be 'balanced', a list of 5 positive numbers, or null.",
        ),
        ({"vocab_size": 0}, "The option vocab_size is 0, and it must be 1 or more."),
        (
            {"hidden_size": 10, "num_attention_heads": 4},
            "The option hidden_size is 10, and it must be a multiple of num_attention_heads, 4.",
        ),
    ],
)
def test_one_sentence_names_the_value_and_what_is_wanted(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError) as raised:
        tiny_classifier(**options)
    assert str(raised.value) == sentence


def test_every_option_is_explained() -> None:
    documentation = inspect.getdoc(VulnerabilityClassifier) or ""
    for name in inspect.signature(VulnerabilityClassifier.__init__).parameters:
        assert name == "self" or f"    {name}: " in documentation


def test_constructing_builds_no_network() -> None:
    classifier = VulnerabilityClassifier()
    assert classifier.model is None
    assert list(classifier.parameters()) == []
    with pytest.raises(ModelError, match=r"call configure_model\(\) first"):
        _ = classifier.network


def test_label_names_default_to_the_weaknesses() -> None:
    assert VulnerabilityClassifier().label_names == list(CWE_NAMES)
    assert VulnerabilityClassifier(num_labels=3).label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_configure_model_twice_keeps_the_network() -> None:
    classifier = built_classifier()
    network = classifier.network
    classifier.configure_model()
    assert classifier.network is network


def test_compiling_keeps_the_state_dict_keys() -> None:
    plain, compiled = built_classifier(), built_classifier(compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert compiled.network._compiled_call_impl is not None


@pytest.mark.parametrize("enabled", [False, True])
def test_gradient_checkpointing_reaches_the_encoder(enabled: bool) -> None:
    layers = built_classifier(gradient_checkpointing=enabled).network.base_model.encoder.layer
    assert [layer.gradient_checkpointing for layer in layers] == [enabled] * 2
