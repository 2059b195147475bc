"""What changed since the save: a real classifier's checkpoint against the run that wants to resume it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import TinyModule, enstack_folder, every_epoch, every_step, functions, quiet_trainer, write_jsonl
from genuine import huggingface_trainer

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, report_on, verify_checkpoint
from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.rules.drift import settings_of_config
from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.guard import CheckpointGuard
from enstack_lightning.model import VulnerabilityClassifier

MODEL = {
    "pretrained": False,
    "num_labels": 5,
    "label_names": ["a", "b", "c", "d", "e"],
    "learning_rate": 1e-3,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 66,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of checkpoints, one after every step and epoch of two epochs of four batches, and the run's config."""
    folder = tmp_path_factory.mktemp("classifier")
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", functions(16))
    data = {"path": str(folder), "train_batch_size": 4, "max_length": 64, "vocab_size": 300}
    module = VulnerabilityDataModule(**data, cache_dir=str(folder / "cache"))
    callbacks = CheckpointGuard(), every_step(folder), every_epoch(folder)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=4, limit_val_batches=0)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(VulnerabilityClassifier(**MODEL), datamodule=module)
    return folder, {"seed_everything": 1, "trainer": {"max_epochs": 4, "devices": 1}, "model": MODEL, "data": data}


def drift(path: Path, config: dict[str, Any]) -> Report:
    return verify_checkpoint(path, Options(run_config=config))


def said(report: Report, code: str) -> str:
    return " | ".join(f"{f.severity} {f.message}" for f in report.findings if f.code == code)


def test_labels_that_are_no_plain_number_are_not_compared_with_none() -> None:
    facts = Facts("c.ckpt", Format.LIGHTNING, fields={"loops": "dict"}, hyper_parameters={"num_labels": "<int64>"})
    options = Options(run_config={"trainer": {"max_epochs": 2}, "model": {"hidden_size": 16}}, select=("CK902",))
    assert report_on(lambda: facts, "c.ckpt", options).findings == ()


@pytest.mark.parametrize(
    ("saved", "given", "severity"),
    [
        (float("nan"), float("nan"), Severity.PASS),
        ([1, float("nan")], [1, float("nan")], Severity.PASS),
        (float("nan"), 0.5, Severity.INFO),
        (0.5, float("nan"), Severity.INFO),
    ],
)
def test_no_number_is_the_same_as_no_number(saved: object, given: object, severity: Severity) -> None:
    facts = Facts("c.ckpt", Format.LIGHTNING, fields={"loops": "dict"}, hyper_parameters={"threshold": saved})
    options = Options(run_config={"trainer": {}, "model": {"threshold": given}}, select=("CK901",))
    assert [f.severity for f in report_on(lambda: facts, "c.ckpt", options).findings] == [severity]


@pytest.mark.parametrize("name", ["step=5", "epoch=1"])
def test_the_same_run_has_not_changed(name: str, classifier: tuple[Path, dict[str, Any]]) -> None:
    folder, config = classifier
    report = drift(folder / f"{name}.ckpt", config)
    assert report.verdict is Verdict.PASS, report.of(Severity.WARNING) + report.of(Severity.ERROR)
    judged = {f.code for f in report.findings if f.code.startswith("CK9")}
    assert judged == {f"CK90{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)}  # the config says nothing of the precision
    assert {f.severity for f in report.findings if f.code.startswith("CK9")} == {Severity.PASS}


def test_a_config_that_says_nothing_changes_nothing(classifier: tuple[Path, dict[str, Any]]) -> None:
    for config in ({}, {"trainer": None}, {"trainer": {"precision": None}, "model": {}, "data": {"path": None}}):
        report = drift(classifier[0] / "step=5.ckpt", config)
        assert report.verdict is Verdict.PASS
        assert "CK901" not in {f.code for f in report.findings}


CHANGES: dict[str, tuple[str, Any, str, str, str]] = {
    "hidden size": ("model.hidden_size", 32, "CK901", "error", "hidden_size was 16 and is 32"),
    "heads": ("model.num_attention_heads", 4, "CK901", "error", "split into other heads"),
    "dropout": ("model.dropout", 0.5, "CK901", "info", "dropout was 0.1 and is 0.5"),
    "labels": ("model.num_labels", 2, "CK902", "error", "num_labels was 5 and is 2"),
    "order of labels": ("model.label_names", ["b", "a", "c", "d", "e"], "CK902", "error", "in another order"),
    "names of labels": ("model.label_names", ["a", "b", "c", "d", "f"], "CK902", "error", "label_names changed"),
    "batch size": (
        "data.train_batch_size",
        8,
        "CK903",
        "warning",
        "was 4 and is 8: an epoch of 4 batches has about 2 now, and 1 batch done in this epoch",
    ),
    "accumulation": (
        "trainer.accumulate_grad_batches",
        2,
        "CK904",
        "warning",
        "the gradients of 1 batch and is to take those of 2: 4 optimizer steps an epoch before, 2 now",
    ),
    "devices": ("trainer.devices", 2, "CK905", "warning", "1 process saved and 2 are to resume"),
    "nodes": ("trainer.num_nodes", 3, "CK905", "warning", "1 process saved and 3 are to resume: a step of all"),
    "no epochs left": ("trainer.max_epochs", 1, "CK906", "error", "1 epoch is done: the run would train nothing"),
    "no steps left": ("trainer.max_steps", 5, "CK906", "error", "max_steps is 5, and 5 steps are taken"),
    "learning rate": ("model.learning_rate", "2e-5", "CK907", "warning", "keep the old value"),
    "warm-up": ("model.warmup_fraction", 0.2, "CK907", "warning", "the rate jumps"),
    "longer": ("trainer.max_epochs", 9, "CK907", "info", "max_epochs was 4 and is 9"),
    "other files": ("data.path", "/elsewhere", "CK908", "warning", "other rows, unless it is a copy"),
    "vocabulary": ("data.vocab_size", 400, "CK908", "error", "token ids mean other tokens"),
    "cut": ("data.max_length", 32, "CK908", "warning", "read otherwise"),
    "scaled losses": ("trainer.precision", "16-mixed", "CK909", "warning", "the gradient scaler begins anew"),
    "bfloat16": ("trainer.precision", "bf16", "CK909", "info", "was 32-true and is bf16-mixed: weights and moments"),
    "float64": ("trainer.precision", 64, "CK909", "warning", "change their type"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told_with_its_effect(change: str, classifier: tuple[Path, dict[str, Any]]) -> None:
    place, value, code, severity, words = CHANGES[change]
    folder, before = classifier
    config = copy.deepcopy(before)
    section, _, name = place.partition(".")
    config[section][name] = value
    report = drift(folder / "step=5.ckpt", config)
    assert f"{severity} " in said(report, code)
    assert words in said(report, code), said(report, code)
    assert report.verdict is {"error": Verdict.FAIL, "warning": Verdict.WARN, "info": Verdict.PASS}[severity]


def test_at_an_epochs_end_no_position_is_lost(classifier: tuple[Path, dict[str, Any]]) -> None:
    folder, config = classifier
    moved = {**config, "data": {**config["data"], "path": "/elsewhere", "train_batch_size": 2}}
    report = drift(folder / "epoch=1.ckpt", moved)
    assert "info path was" in said(report, "CK908")
    assert said(report, "CK903") == "warning the batch size was 4 and is 2: an epoch of 4 batches has about 8 now"


def test_yaml_reads_numbers_as_it_does(classifier: tuple[Path, dict[str, Any]]) -> None:
    folder, config = classifier
    written = yaml.safe_load(yaml.safe_dump(config).replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert written["model"]["learning_rate"] == "1e-3"  # text, to YAML 1.1
    assert drift(folder / "step=5.ckpt", written).verdict is Verdict.PASS


def test_a_class_path_is_looked_into(classifier: tuple[Path, dict[str, Any]]) -> None:
    folder, config = classifier
    named = {"class_path": "some.VulnerabilityClassifier", "init_args": {**MODEL, "hidden_size": 32}}
    assert "hidden_size was 16" in said(drift(folder / "step=5.ckpt", {**config, "model": named}), "CK901")
    under_fit = {"fit": {**config, "model": named}}
    assert "hidden_size was 16" in said(drift(folder / "step=5.ckpt", under_fit), "CK901")


def test_what_is_saved_for_inference_is_compared_with_no_run(classifier: tuple[Path, dict[str, Any]]) -> None:
    options = Options(purpose="inference", run_config={"trainer": {"max_epochs": 1}})
    report = verify_checkpoint(classifier[0] / "step=5.ckpt", options)
    assert not [f for f in report.findings if f.code.startswith("CK9")]


def test_a_module_without_hyper_parameters_is_compared_by_its_run(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), accumulate_grad_batches=2)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    report = drift(tmp_path / "c.ckpt", {"trainer": {"max_epochs": 3}})
    message = said(report, "CK904")
    assert "the gradients of 2 batches and is to take those of 1: 3 optimizer steps an epoch before, 5 now" in message
    assert "3 epochs are done: the run would train nothing" in said(report, "CK906")
    assert "CK901" not in {f.code for f in report.findings}


def test_an_enstack_folder_is_compared_as_far_as_it_speaks(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    (folder / "config.json").write_text('{"model_type": "roberta", "hidden_size": 768, "id2label": {"0": "a"}}')
    config = {"trainer": {"max_epochs": 2}, "model": {"hidden_size": 16, "num_labels": 5}}
    report = drift(folder, config)
    assert "hidden_size was 768 and is 16" in said(report, "CK901")
    assert "num_labels was 1 and is 5" in said(report, "CK902")
    assert "max_epochs is 2, and 2 epochs are done" in said(report, "CK906")


def test_a_trainer_of_transformers_is_compared_with_its_arguments(tmp_path: Path) -> None:
    path = huggingface_trainer(tmp_path, 9)
    same = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 5e-5}
    assert drift(path, same).verdict is Verdict.PASS
    report = drift(path, {**same, "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-4})
    assert "the batch size was 4 and is 8" in said(report, "CK903")
    assert "max_epochs is 1, and 1 epoch is done" in said(report, "CK906")
    assert "learning_rate was 5e-05 and is 0.0001" in said(report, "CK907")


@pytest.mark.parametrize(
    ("devices", "nodes", "processes"),
    [
        (2, None, 2),
        ("2", 2, 4),
        ([0, 1, 3], 1, 3),
        ("0,1", None, 2),
        ("auto", None, None),
        (-1, None, None),
        (0, 1, None),
    ],
)
def test_devices_in_every_form(devices: Any, nodes: Any, processes: int | None) -> None:
    assert settings_of_config({"trainer": {"devices": devices, "num_nodes": nodes}}).world_size == processes


NO_SENSE: list[Callable[[dict[str, Any]], Any]] = [
    lambda c: c.update(trainer=[1]),
    lambda c: c.update(model="x", data=3),
    lambda c: c["trainer"].update(max_epochs="many", devices={}, accumulate_grad_batches=[], precision=[3]),
    lambda c: c["data"].update(train_batch_size=0, path=["a"]),
    lambda c: c["model"].update(num_labels="five", label_names=5, learning_rate=float("nan")),
    lambda c: c["model"].update(class_path=3),
    lambda c: c["trainer"].update(accumulate_grad_batches=0, max_epochs=10**400),
]


@pytest.mark.parametrize("edit", NO_SENSE)
def test_a_config_that_makes_no_sense_breaks_nothing(
    edit: Callable[[dict[str, Any]], Any], classifier: tuple[Path, dict[str, Any]]
) -> None:
    folder, before = classifier
    config = copy.deepcopy(before)
    edit(config)
    assert "CK100" not in {f.code for f in drift(folder / "step=5.ckpt", config).findings}
