"""What changed since the save: a real classifier's checkpoint against the run that wants to resume it."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import TinyModule, enstack_folder, every_epoch, every_step, functions, quiet_trainer, write_jsonl
from genuine import huggingface_trainer

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, judge, report_on, verify_checkpoint
from enstack_lightning.checkpoint.facts import (
    Facts,
    Format,
    OptimizerFacts,
    ParamGroupFacts,
    ProgressFacts,
    RunFacts,
    SchedulerFacts,
)
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


# Of facts, for what takes no run to tell


def saved(epochs: int = 2, batches: int | None = 0, optimizers: Any = (), **entries: Any) -> Facts:
    progress = ProgressFacts(
        global_step=10,
        epochs_completed=epochs,
        epochs_begun=epochs + bool(batches),
        batches_in_epoch=batches,
    )
    return Facts(
        "c.ckpt", Format.LIGHTNING, fields={"loops": "dict"}, progress=progress, optimizers=optimizers, **entries
    )


def resumed(before: Facts, **entries: Any) -> Facts:
    """What a live run says that was restored from a checkpoint."""
    return dataclasses.replace(before, live=True, saved=before, **entries)


def outcomes(facts: Facts, code: str, config: dict[str, Any] | None = None) -> list[str]:
    return [f"{f.severity}: {f.message}" for f in judge(facts, Options(run_config=config)) if f.code == code]


def model(**before: Any) -> Facts:
    return saved(hyper_parameters=before)


NAMED = model(model_name_or_path="there/base", pretrained=True, num_labels=2, hidden_size=8, num_attention_heads=2)
MODELS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "elsewhere": ({"model_name_or_path": "here/base"}, "CK901", "info: ", "info: "),
    "another one": ({"model_name_or_path": "there/large"}, "CK901", "error: ", "warning: "),
    "another one, of which nothing is read": (
        {"model_name_or_path": "x", "pretrained": False},
        "CK901",
        "warn",
        "warn",
    ),
    "from its configuration": ({"pretrained": False}, "CK901", "warning: ", "warning: "),
    "another size": ({"hidden_size": 16, "pretrained": None}, "CK901", "", ""),
    "other heads": ({"num_attention_heads": 4, "pretrained": False}, "CK901", "error: ", "error: "),
    "other labels": ({"num_labels": 3}, "CK902", "error: ", "warning: "),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_told_of_a_configuration_and_of_a_live_run(name: str) -> None:
    change, code, configured, live = MODELS[name]
    now = {**NAMED.hyper_parameters, **change}
    for said_of_it, expected in (
        (outcomes(NAMED, code, {"model": now}), configured),
        (outcomes(resumed(NAMED, hyper_parameters=now), code), live),
    ):
        assert [line for line in said_of_it if line.startswith(expected)], said_of_it
        assert not [line for line in said_of_it if "model_name_or_path" in line] or "pretrained" not in change


def test_another_size_is_told_where_it_does_not_come_with_the_model() -> None:
    before, now = model(hidden_size=8), {"hidden_size": 16}
    assert outcomes(before, "CK901", {"model": now})[0].startswith("error: hidden_size was 8 and is 16: the weights")
    assert outcomes(resumed(before, hyper_parameters=now), "CK901")[0].startswith(
        "warning: hidden_size was 8 and is 16"
    )
    unchanged = ["pass: the run builds the network that was saved"]
    assert outcomes(NAMED, "CK901", {"model": {"hidden_size": 16, "pretrained": True}}) == unchanged
    of_class = {"model": {"class_path": "a.Net", "init_args": {"hidden_size": 8}}}
    assert outcomes(before, "CK901", of_class) == unchanged


def test_another_class_of_model_is_told_by_its_name() -> None:
    before = model(_class_path="a.Net")
    assert outcomes(before, "CK901", {"model": {"_class_path": "a.b.Other"}}) == [
        "error: the model is a a.b.Other, and the checkpoint is of a a.Net"
    ]
    assert outcomes(before, "CK901", {"model": {"_class_path": "a.b.Net"}}) == []


@pytest.mark.parametrize(
    ("old", "accumulation", "new", "hint"),
    [
        (8, 2, 4, "accumulate_grad_batches 4 "),
        (8, 1, 3, "The schedule's"),
        (4, 1, 8, "The schedule's"),
        (4, 3, 12, "1 "),
    ],
)
def test_the_accumulation_that_keeps_the_batch_of_a_step(old: int, accumulation: int, new: int, hint: str) -> None:
    run = RunFacts(accumulate_grad_batches=accumulation)
    facts = saved(data_hyper_parameters={"batch_size": old}, run=run)
    (found,) = [f for f in judge(facts, Options(run_config={"data": {"batch_size": new}})) if f.code == "CK903"]
    assert hint in found.hint


LENGTHS: dict[str, tuple[Facts, dict[str, int], list[str]]] = {
    "none left": (saved(), {"max_epochs": 2}, ["error: max_epochs is 2"]),
    "one left": (saved(), {"max_epochs": 3}, ["pass: max_epochs 3: 1 to train"]),
    "no end": (saved(), {"max_epochs": -1, "max_steps": -1}, []),
    "nothing at all": (saved(), {"max_epochs": 0, "max_steps": 0}, ["error: max_epochs is 0", "error: max_steps is 0"]),
    "as many steps": (saved(), {"max_steps": 10}, ["error: max_steps is 10"]),
    "a step": (saved(), {"max_steps": 11}, ["pass: max_steps 11: 1 to take"]),
    "of weights": (saved(model_only=True), {"max_epochs": 0}, []),
    "of no known steps": (
        dataclasses.replace(saved(), progress=ProgressFacts(epochs_completed=2)),
        {"max_steps": 9},
        [],
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_what_is_left_of_a_run_of_another_length(name: str) -> None:
    facts, length, expected = LENGTHS[name]
    said_of_it = outcomes(facts, "CK906", {"trainer": length})
    assert [line[: len(e)] for line, e in zip(said_of_it, expected, strict=True)] == expected


def test_the_end_of_the_last_epoch_is_left_only_where_the_guard_recorded_the_moment() -> None:
    whole = dataclasses.replace(saved(1, 5), run=RunFacts(batches_per_epoch=5))
    assert outcomes(whole, "CK906", {"trainer": {"max_epochs": 2}})[0].startswith("error: max_epochs is 2")
    recorded = dataclasses.replace(whole, moment="batch_end")
    assert outcomes(recorded, "CK906", {"trainer": {"max_epochs": 2}}) == [
        "pass: max_epochs 2: the end of the last epoch is left to do"
    ]


def test_tokens_of_another_vocabulary_are_told_where_they_were_trained_here() -> None:
    data = {"tokenizer": "there/bpe", "vocab_size": 300}
    before = saved(data_hyper_parameters=data)
    for tokenizer, configured, live in (("here/bpe", "info: ", "info: "), ("there/word", "error: ", "warning: ")):
        now = {**data, "tokenizer": tokenizer, "vocab_size": 400}
        assert [line[: len(configured)] for line in outcomes(before, "CK908", {"data": now})] == [configured]
        assert outcomes(resumed(before, data_hyper_parameters=now), "CK908")[0].startswith(live)
    pretrained = dataclasses.replace(
        saved(data_hyper_parameters={"vocab_size": 300}), hyper_parameters={"pretrained": True}
    )
    assert outcomes(pretrained, "CK908", {"data": {"vocab_size": 400}}) == ["pass: data as saved"]


@pytest.mark.parametrize(
    ("old", "new", "scaler", "expected"),
    [
        ("16-mixed", "32-true", True, "warning: .* scaler's state is dropped"),
        ("16-mixed", "32-true", False, "info: "),
        ("bf16-mixed", "32-true", True, "info: "),
        ("bf16-mixed", "16-mixed", False, "warning: .* begins anew"),
        ("16-mixed", "bf16-mixed", False, "info: "),
        ("32-true", "16-true", False, "warning: .* change their type"),
    ],
)
def test_what_another_precision_does(old: str, new: str, scaler: bool, expected: str) -> None:
    facts = saved(run=RunFacts(precision=old))
    if scaler:
        facts = dataclasses.replace(facts, fields={"loops": "dict", "MixedPrecision": "dict"})
    (said_of_it,) = outcomes(facts, "CK909", {"trainer": {"precision": new}})
    assert re.match(expected, said_of_it)


# Of two runs


def of_run(before: dict[str, Any], now: dict[str, Any], **entries: Any) -> Facts:
    return resumed(saved(run=RunFacts(**before), **entries), run=RunFacts(**now))


ROWS: dict[str, tuple[Facts, str]] = {
    "the same": (of_run({"dataset_rows": 9}, {"dataset_rows": 9}), "pass: 9 rows"),
    "fewer": (of_run({"dataset_rows": 9}, {"dataset_rows": 8}), "warning: the training data shrank from 9 to 8 rows$"),
    "more": (of_run({"dataset_rows": 9}, {"dataset_rows": 10}), "warning: the training data grew from 9 to 10 rows$"),
    "not known now": (of_run({"dataset_rows": 9}, {}), "$"),
    "of another kind of digest": (of_run({"dataset_fingerprint": "a:1"}, {"dataset_fingerprint": "b:1"}), "$"),
    "of another digest": (
        of_run({"dataset_fingerprint": "a:1"}, {"dataset_fingerprint": "a:2"}),
        "warning: the training data changed: its fingerprint was 1 and is 2",
    ),
    "of no digest now": (
        of_run({"dataset_fingerprint": "a:1", "dataset_rows": 9}, {"dataset_rows": 9}),
        "pass: 9 rows",
    ),
    "an epoch as long": (
        of_run({"dataset_rows": 9, "batches_per_epoch": 5}, {"dataset_rows": 8, "batches_per_epoch": 5}),
        "warning: .* to 8 rows$",
    ),
    "an epoch of no known length": (
        of_run({"dataset_rows": 9, "batches_per_epoch": 5}, {"dataset_rows": 8}),
        "warning: .* to 8 rows$",
    ),
    "an epoch that was of no known length": (
        of_run({"dataset_rows": 9}, {"dataset_rows": 8, "batches_per_epoch": 5}),
        "warning: .* to 8 rows$",
    ),
    "a shorter epoch": (
        of_run({"dataset_rows": 9, "batches_per_epoch": 5}, {"dataset_rows": 8, "batches_per_epoch": 4}),
        "warning: .* to 8 rows: an epoch had 5 batches and has 4$",
    ),
    "a shorter epoch, inside it": (
        of_run({"dataset_rows": 9, "batches_per_epoch": 5}, {"dataset_rows": 8, "batches_per_epoch": 4}, batches=3),
        "warning: .* to 8 rows: an epoch had 5 batches and has 4, of which 3 count as done$",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_other_rows_are_told_with_what_they_do_to_the_epoch(name: str) -> None:
    facts, expected = ROWS[name]
    assert re.match(expected, " ".join(outcomes(facts, "CK910"))), outcomes(facts, "CK910")


@pytest.mark.parametrize(
    ("old", "new", "expected"), [(1, 1, ["pass: seed 1, as saved"]), (1, None, []), (None, 1, []), (1, 2, ["info: "])]
)
def test_seeds_are_compared_where_both_are_known(old: int | None, new: int | None, expected: list[str]) -> None:
    said_of_it = outcomes(of_run({"seed": old}, {"seed": new}), "CK914")
    assert [line[: len(e)] for line, e in zip(said_of_it, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("2.6.0", "2.6.0+cpu", "info: "),
        ("2.6.1", "2.6.0", "info: "),
        ("2.6.0", "2.5.9", "warning: "),
        ("2.6", "3.0", "info"),
    ],
)
def test_a_version_is_older_by_its_first_two_numbers(old: str, new: str, expected: str) -> None:
    (said_of_it,) = outcomes(resumed(saved(versions={"torch": old}), versions={"torch": new}), "CK915")
    assert said_of_it.startswith(expected)


def test_parameters_in_another_order_matter_where_the_optimizer_keeps_moments() -> None:
    for keeps, severity in ((True, "error: "), (False, "info: ")):
        group = ParamGroupFacts((0, 1), 1e-2, None, None, keeps)
        optimizers = (OptimizerFacts((group,), {}, 0),)
        digests = [{"parameter_digests": ((text,),)} for text in ("a" * 8 + "b" * 8, "b" * 8 + "a" * 8)]
        (said_of_it,) = outcomes(of_run(*digests, optimizers=optimizers), "CK913")
        assert said_of_it.startswith(f"{severity}optimizer 0: 2 of 2 parameters stand in another order")


def test_a_schedule_that_is_to_step_otherwise_is_told() -> None:
    schedulers = (SchedulerFacts(7, (), (), (), None, kind="StepLR"),)

    def stepping(interval: str, every: int) -> dict[str, Any]:
        return {"scheduler_intervals": (interval,), "scheduler_frequencies": (every,), "scheduler_kinds": ("StepLR",)}

    for now, expected in (
        (stepping("step", 1), "pass: 1 scheduler, as saved"),
        (
            stepping("step", 3),
            "warning: scheduler 0 stepped every step and is to step every 3 steps: it runs at another",
        ),
        (stepping("epoch", 1), "warning: .* step and is to step every epoch: its position 7 counts steps"),
        ({}, "pass: "),
    ):
        (said_of_it,) = outcomes(of_run(stepping("step", 1), now, schedulers=schedulers), "CK912")
        assert re.match(expected, said_of_it)
