"""Weights are held against the model that config.json names: real models pass, misfits are told, others let be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from enstack_lightning.checkpoint import Finding, Options, Severity, judge
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    Format,
    Oddity,
    OddityKind,
    TensorFacts,
    ValueFacts,
)

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
}
CLASSIFIER = "RobertaForSequenceClassification"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Facts]:
    """Saves a model with transformers and states the facts of its config.json and weights, each model once."""
    made: dict[str, Facts] = {}

    def save(architecture: str = CLASSIFIER, **sizes: Any) -> Facts:
        key = f"{architecture} {sizes}"
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            model_class = getattr(transformers, architecture)
            model = model_class(model_class.config_class(**{**SIZES, "num_labels": 5, **sizes}))
            model.save_pretrained(folder)
            made[key] = facts_of(folder)
        return made[key]

    return save


def facts_of(folder: Path) -> Facts:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [TensorFacts(n, "float32", tuple(file.get_slice(n).get_shape())) for n in file.keys()]  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    return Facts(str(folder), Format.HUGGINGFACE, tensors=tuple(tensors), model_config=config)


def changed(facts: Facts, config: dict[str, Any] | None = None, **shapes: tuple[int, ...] | None) -> Facts:
    """The facts with entries of config.json and shapes of tensors changed; `None` takes a tensor away."""
    at = {name.replace("__", "."): shape for name, shape in shapes.items()}
    assert at.keys() <= {t.name for t in facts.tensors}
    tensors = [
        dataclasses.replace(t, shape=at.get(t.name, t.shape)) for t in facts.tensors if at.get(t.name, ()) is not None
    ]
    return dataclasses.replace(facts, tensors=tuple(tensors), model_config={**facts.model_config, **(config or {})})


def without(facts: Facts, beginning: str) -> Facts:
    return dataclasses.replace(facts, tensors=tuple(t for t in facts.tensors if not t.name.startswith(beginning)))


def renamed(facts: Facts, rename: Callable[[str], str]) -> Facts:
    tensors = tuple(dataclasses.replace(t, name=rename(t.name)) for t in facts.tensors)
    return dataclasses.replace(facts, tensors=tensors)


def findings(facts: Facts, **options: Any) -> list[Finding]:
    return [f for f in judge(facts, Options(select=("CK6",), **options)) if f.code != "CK100"]


def wrong(facts: Facts, **options: Any) -> list[str]:
    return [f"{f.code} {f.message}" for f in findings(facts, **options) if f.severity in ("warning", "error")]


# Genuine models


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        (CLASSIFIER, {}),
        (CLASSIFIER, {"num_labels": 2}),
        (CLASSIFIER, {"num_labels": 1}),
        ("RobertaModel", {}),
        ("RobertaForMaskedLM", {}),
        ("RobertaForTokenClassification", {}),
        ("RobertaForQuestionAnswering", {}),
        ("RobertaForMultipleChoice", {}),
        ("XLMRobertaForSequenceClassification", {}),
        ("CamembertForMaskedLM", {}),
        ("BertModel", {}),
        ("BertForSequenceClassification", {}),
        ("BertForMaskedLM", {"tie_word_embeddings": False}),
        ("BertForPreTraining", {}),
        ("BertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}),
    ],
)
def test_a_model_as_transformers_saves_it_passes(saved: Callable[..., Facts], architecture: str, sizes: Any) -> None:
    found = findings(saved(architecture, **sizes))
    assert {f.severity for f in found} == {Severity.PASS}, found
    assert {f.code for f in found} == {"CK601", "CK602"}


OTHERS: dict[str, dict[str, Any]] = {
    "GPT2ForSequenceClassification": {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20},
    "T5ForConditionalGeneration": {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 20,
    },
    "ViTForImageClassification": {**SIZES, "image_size": 8, "patch_size": 4},
    "DistilBertForSequenceClassification": {"dim": 8, "hidden_dim": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 20},
    "ElectraForSequenceClassification": {**SIZES, "embedding_size": 4},
    "AlbertForSequenceClassification": {**SIZES, "embedding_size": 4},
    "DebertaV2ForSequenceClassification": SIZES,
    "BartForSequenceClassification": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 20,
    },
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_models_that_are_not_known_are_let_be(architecture: str, tmp_path: Path) -> None:
    model_class = getattr(transformers, architecture)
    model_class(model_class.config_class(**OTHERS[architecture], num_labels=3)).save_pretrained(tmp_path)
    assert not wrong(facts_of(tmp_path))


def test_the_number_of_labels_is_judged_for_classifiers_of_every_kind(tmp_path: Path) -> None:
    model_class = transformers.DistilBertForSequenceClassification
    sizes = OTHERS["DistilBertForSequenceClassification"]
    model_class(model_class.config_class(**sizes, num_labels=3)).save_pretrained(tmp_path)
    facts = changed(facts_of(tmp_path), {"id2label": {str(n): str(n) for n in range(5)}})
    assert wrong(facts) == ["CK601 classifier.weight has 3 rows, and config.json names 5 labels (id2label)"]


RENAMED: dict[str, Callable[[str], str]] = {
    "inside a LightningModule": lambda name: f"network.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "in DistributedDataParallel": lambda name: f"module.{name}",
    "as UniXcoder's own code wraps it": lambda name: f"encoder.{name}",
    "with checkpointed activations": lambda name: name.replace(
        "attention.", "_checkpoint_wrapped_module.attention.", 1
    ),
    "with the names of TensorFlow": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
}


@pytest.mark.parametrize("how", RENAMED)
def test_a_model_within_another_is_found(saved: Callable[..., Facts], how: str) -> None:
    facts = dataclasses.replace(renamed(saved(), RENAMED[how]), format=Format.ENSTACK)  # loaded by code of its own
    assert not wrong(facts)
    damaged = dataclasses.replace(
        facts, tensors=tuple(t for t in facts.tensors if ".layer.1.output.dense.w" not in t.name)
    )
    assert "encoder.layer.1.output.dense.weight is not in the checkpoint" in wrong(damaged)[0]


def test_an_adapter_is_let_be(saved: Callable[..., Facts]) -> None:
    def rename(name: str) -> str:
        return f"base_model.model.{name}".replace(
            "layer.0.attention.self.query.", "layer.0.attention.self.query.base_layer."
        )

    assert not findings(renamed(saved(), rename))


@pytest.mark.parametrize("entry", [{"quantization_config": {"bits": 4}}, {"pruned_heads": {"0": [1]}}])
def test_quantized_and_pruned_models_are_let_be(saved: Callable[..., Facts], entry: dict[str, Any]) -> None:
    assert not findings(changed(saved(), entry, roberta__encoder__layer__0__attention__self__query__weight=(4, 8)))


def test_two_encoders_in_one_checkpoint_are_let_be(saved: Callable[..., Facts]) -> None:
    one = saved()
    two = renamed(one, lambda name: f"average.{name}")
    assert not findings(dataclasses.replace(one, tensors=(*one.tensors, *two.tensors)))


# CK601


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 21}, "word_embeddings.weight has shape [20, 8], and config.json says [21, 8] (vocab_size 21)"),
        ({"max_position_embeddings": 514}, "position_embeddings.weight has shape [10, 8]"),
        ({"type_vocab_size": 1}, "token_type_embeddings.weight has shape [2, 8]"),
        ({"intermediate_size": 16}, "says [16, 8] (intermediate_size 16)"),
        ({"hidden_size": 16}, "(hidden_size 16)"),
        ({"num_hidden_layers": 2}, "the weights have 3 layers, and config.json says 2 (num_hidden_layers)"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "classifier.out_proj.weight has shape [5, 8], and config.json says [2, 8]",
        ),
    ],
)
def test_a_config_of_another_model_is_told(saved: Callable[..., Facts], config: dict[str, Any], said: str) -> None:
    found = wrong(changed(saved(), config))
    assert any(f.startswith("CK601") and said in f for f in found), found
    assert len(found) <= 11
    assert wrong(changed(saved(), config), purpose="inference") == found


def test_labels_that_config_leaves_out_are_two(saved: Callable[..., Facts]) -> None:
    facts = saved()
    config = {k: v for k, v in facts.model_config.items() if k not in ("id2label", "label2id", "num_labels")}
    found = wrong(dataclasses.replace(facts, model_config=config))
    assert any("says [2, 8] (num_labels 2)" in f for f in found)


@pytest.mark.parametrize("value", [None, "20", True, 2.5, [20], -1, 2**70])
def test_sizes_that_are_no_sizes_break_nothing(saved: Callable[..., Facts], value: Any) -> None:
    for names in ([*SIZES, "id2label", "num_labels"], ["architectures"], ["model_type"], ["quantization_config"]):
        for odd in (value, [value], [[value]], {"a": value}):
            findings(changed(saved(), dict.fromkeys(names, odd)))


# CK602


def test_a_layer_that_is_missing_is_told(saved: Callable[..., Facts]) -> None:
    found = wrong(without(saved(), "roberta.encoder.layer.2."))
    assert found == ["CK602 roberta.encoder.layer.2 is not in the checkpoint: loading would make it anew, at random"]


@pytest.mark.parametrize(
    ("architecture", "head", "count"),
    [
        (CLASSIFIER, "classifier", 4),
        ("BertForSequenceClassification", "classifier", 2),
        ("RobertaForMaskedLM", "lm_head", 4),
        ("BertForMaskedLM", "cls", 4),
    ],
)
def test_a_head_that_is_missing_is_told(saved: Callable[..., Facts], architecture: str, head: str, count: int) -> None:
    found = wrong(without(saved(architecture), head))
    assert len(found) == count
    assert all(f.startswith(f"CK602 {head}") for f in found)


def test_a_pooler_that_is_missing_is_let_be(saved: Callable[..., Facts]) -> None:
    assert not wrong(without(saved("RobertaModel"), "pooler"))


def test_weights_of_another_model_altogether_are_told(saved: Callable[..., Facts]) -> None:
    tensors = (TensorFacts("weight", "float32", (2, 4)), TensorFacts("bias", "float32", (2,)))
    facts = dataclasses.replace(saved(), tensors=tensors)
    assert wrong(facts) == [f"CK602 none of the 2 weights is of the {CLASSIFIER} that config.json names"]
    nameless = dataclasses.replace(facts, model_config={"model_type": "roberta"})
    assert not findings(nameless)


def test_without_a_config_a_gap_between_layers_is_a_warning(saved: Callable[..., Facts]) -> None:
    whole = dataclasses.replace(renamed(saved(), lambda name: f"network.{name}"), model_config={})
    assert [f.severity for f in findings(whole)] == [Severity.PASS]
    (found,) = findings(without(whole, "network.roberta.encoder.layer.1."))
    assert (found.code, found.severity) == ("CK602", Severity.WARNING)
    only_trained = without(whole, "network.roberta.encoder.layer.0.")
    assert not findings(only_trained), "frozen layers are often left out"


def test_what_a_missing_file_holds_is_not_missed_twice(saved: Callable[..., Facts]) -> None:
    facts = dataclasses.replace(
        without(saved(), "roberta.encoder.layer.2."), defects=(Defect(DefectKind.MISSING, "a.safetensors", "gone"),)
    )
    assert not wrong(facts)


def test_hostile_numbers_of_layers_end_soon(saved: Callable[..., Facts]) -> None:
    name = "roberta.encoder.layer.{}.output.dense.bias"
    more = [TensorFacts(name.format(n), "float32", (8,)) for n in ("9" * 6, "9" * 5000, "٣")]
    facts = dataclasses.replace(saved(), tensors=(*saved().tensors, *more))
    assert len(wrong(changed(facts, {"num_hidden_layers": 10**9}))) < 30


# CK603, CK604, CK605


def values(*found: ValueFacts) -> Facts:
    return Facts("c", Format.TORCH, tensors=(TensorFacts("layer.weight", "float32", (2, 4)),), values=found)


def bad(
    name: str, value: str = "nan", at: tuple[int, ...] = (1, 2), role: Any = "weight", count: int = 3
) -> ValueFacts:
    return ValueFacts(name, role, "c.pt:data/0", count, at, value)


@pytest.mark.parametrize(
    ("found", "severity"),
    [
        (bad("layer.weight"), "error"),
        (bad("layer.weight", "inf"), "error"),
        (bad("layer.bias", "-inf"), "error"),
        (bad("mask"), "error"),
        (bad("optimizer 0, parameter 3, exp_avg", "inf", role="optimizer"), "error"),
        (bad("cls_token", "inf"), "warning"),
        (bad("attn_mask", "-inf"), "info"),
        (bad("layer.attn_bias", "-inf"), "info"),
        (bad("layer.attn_bias", "inf"), "error"),
        (bad("layer.in_proj_bias", "-inf"), "error"),
        (bad("rnn.bias_hh_l0_reverse", "inf"), "error"),
        (bad("layer.parametrizations.weight.original0", "inf"), "error"),
        (bad("best_loss", "inf", ()), "info"),
    ],
)
def test_values_that_are_not_finite(found: ValueFacts, severity: str) -> None:
    (finding,) = findings(values(found))
    assert (finding.code, finding.severity) == ("CK603", severity)
    assert found.first_value in finding.message
    if found.first_nonfinite:
        assert "3 values" in finding.message
        assert "[1, 2]" in finding.message


def test_many_diverged_tensors_are_told_in_few_lines_the_worst_first() -> None:
    infinite = [bad(f"mask{n}", "-inf") for n in range(50)]
    found = findings(values(*infinite, *(bad(f"layer{n}.weight") for n in range(200))))
    assert len(found) == 11
    assert found[0].severity is found[-1].severity is Severity.ERROR
    assert found[-1].message == "240 further tensors hold values that are not finite"


def test_moments_do_not_matter_to_inference() -> None:
    facts = values(bad("optimizer 0, parameter 3, exp_avg", role="optimizer"))
    assert wrong(facts)
    assert not wrong(facts, purpose="inference")


def test_finite_values_pass_only_where_they_were_read() -> None:
    assert [f.message for f in findings(values())] == ["all values are finite"]
    assert not findings(dataclasses.replace(values(), values=None))


def test_weights_of_zeros_are_worth_knowing() -> None:
    zeros = [ValueFacts(f"bias{n}", "weight", "c", all_zero=True) for n in range(12)]
    (found,) = [f for f in findings(values(*zeros, bad("x", role="optimizer", count=0))) if f.code == "CK604"]
    assert found.severity is Severity.INFO
    assert found.message.startswith("12 weights hold nothing but zeros: bias0, bias1")
    assert found.message.endswith("bias9, ...")


@pytest.mark.parametrize("kind", [OddityKind.LOGICAL_SIZE, OddityKind.SPARSE_TENSOR])
def test_tensors_larger_than_their_bytes_and_sparse_ones_are_told(kind: OddityKind) -> None:
    facts = dataclasses.replace(values(), values=None, oddities=(Oddity(kind, "c.pt:data/0", "it is odd"),) * 12)
    assert wrong(facts)[0] == "CK605 c.pt:data/0: it is odd"
    assert wrong(facts)[-1] == "CK605 2 further tensors of this kind"
    assert torch.zeros(1).expand(2**40).numel() == 2**40, "what the rule guards against is really to be had"
