"""The rules on files, state, weights, safety and manifests, on files of the libraries: whole, then damaged."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, enstack_folder, flip_bit
from genuine import huggingface_trainer, roberta
from safetensors.torch import load_file, save_file

from enstack_lightning.checkpoint import Options, Report, Severity, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore")


def verified(path: Path, **options: Any) -> Report:
    return verify_checkpoint(path, Options(**options))


def codes(report: Report, *severities: str) -> set[str]:
    return {f.code for f in report.findings if f.severity in severities}


def said(report: Report, code: str) -> str:
    return " | ".join(f"{f.severity}: {f.message}" for f in report.findings if f.code == code)


# Lightning


def test_a_lightning_checkpoint_passes_every_rule_that_concerns_it(trained: Path) -> None:
    report = verified(trained / "step=7.ckpt", deep=True)
    assert codes(report, "pass") >= {"CK107", "CK201", "CK203", "CK603", "CK701"}, report.findings
    assert not codes(report, "warning", "error")
    assert "not read" in said(verified(trained / "step=7.ckpt"), "CK107")
    assert "not read" not in said(report, "CK107")


def test_values_that_are_not_finite_are_found_where_they_are(trained: Path, tmp_path: Path) -> None:
    def diverge(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layer.weight"][1, 2] = math.nan
        checkpoint["state_dict"]["layer.bias"].zero_()
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][0, 3] = math.inf

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", diverge)
    assert not codes(verified(path), "warning", "error"), "values are not read without --deep"
    report = verified(path, deep=True)
    assert "error: layer.weight holds 1 value that is not finite (nan, the first at [1, 2])" in said(report, "CK603")
    assert "(inf, the first at [0, 3])" in said(report, "CK603")
    assert said(report, "CK604") == "info: 1 weight holds nothing but zeros: layer.bias"


def test_second_moments_that_are_all_zero_after_steps_are_told(trained: Path, tmp_path: Path) -> None:
    def forget(checkpoint: dict[str, Any], parameters: tuple[int, ...] = (0, 1)) -> None:
        for parameter in parameters:
            checkpoint["optimizer_states"][0]["state"][parameter]["exp_avg_sq"].zero_()

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", forget)
    assert "every exp_avg_sq is 0 after 7 steps" in said(verified(path, deep=True), "CK604")
    assert not codes(verified(path, deep=True, purpose="inference"), "warning", "error")
    path = edited(trained / "step=7.ckpt", tmp_path / "one.ckpt", lambda c: forget(c, (1,)))
    assert not codes(verified(path, deep=True), "warning", "error"), "a parameter without a gradient has that too"


def test_a_class_in_a_checkpoint_is_refused_until_it_is_vouched_for(trained: Path, tmp_path: Path) -> None:
    def add(checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = argparse.Namespace(width=3)

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", add)
    report = verified(path)
    assert codes(report, "error") == {"CK701"}
    assert "c.ckpt:data.pkl names argparse.Namespace, which is not among" in said(report, "CK701")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)
    vouched = verified(path, allow_globals=frozenset({"argparse.Namespace"}))
    assert not codes(vouched, "error", "warning")
    assert "which you vouch for" in said(vouched, "CK702")
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.load(path, weights_only=True)


def test_code_is_named_as_code(trained: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, ("exit 1",)

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: c.update(callbacks=Runs()))
    assert f"{os.system.__module__}.system, which is not among" in said(verified(path), "CK701")
    assert "it can run any command" in said(verified(path), "CK701")
    vouched = verified(path, allow_globals=frozenset({f"{os.system.__module__}.system"}))
    assert codes(vouched, "warning") >= {"CK702"}


# Containers


def test_a_record_exchanged_after_the_save_is_told(tmp_path: Path) -> None:
    one, other = (torch.arange(64.0) + n for n in (0, 1))
    path = tmp_path / "c.pt"
    torch.save({"weight": one}, path)
    assert not codes(verified(path, purpose="inference"), "warning", "error")
    old, new = (t.numpy().tobytes() for t in (one, other))
    data = path.read_bytes().replace(old, new)
    path.write_bytes(data.replace(zlib.crc32(old).to_bytes(4, "little"), zlib.crc32(new).to_bytes(4, "little")))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "every CRC-32 is right"
    assert torch.equal(torch.load(path)["weight"], other), "torch loads it"
    report = verified(path, purpose="inference")
    assert codes(report, "error") == {"CK110"}, report.findings


def test_an_archive_packed_anew_is_told(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    with zipfile.ZipFile(trained / "step=7.ckpt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    torch.load(path)
    report = verified(path)
    assert codes(report, "warning", "error") == {"CK111"}, report.findings


def test_a_tensor_far_larger_than_its_bytes_is_told(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(2**40), "indices": torch.eye(3).to_sparse()}, tmp_path / "c.pt")
    report = verified(tmp_path / "c.pt", purpose="inference")
    assert codes(report, "warning") == {"CK605"}, report.findings
    assert len(said(report, "CK605").split(" | ")) == 2


# The Hugging Face Trainer


@pytest.fixture(scope="module")
def of_trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return huggingface_trainer(tmp_path_factory.mktemp("trainer"), 7)


@pytest.fixture
def checkpoint(of_trainer: Path, tmp_path: Path) -> Path:
    """A copy to damage, by hard links, so that only what is written anew takes time."""
    folder = tmp_path / of_trainer.name
    folder.mkdir()
    for file in of_trainer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def test_a_trainers_checkpoint_passes_every_rule_that_concerns_it(of_trainer: Path) -> None:
    report = verified(of_trainer, deep=True)
    passes = {"CK107", "CK201", "CK203", "CK206", "CK601", "CK602", "CK603", "CK701"}
    assert codes(report, "pass") >= passes, report.findings
    assert codes(report, "info") >= {"CK108", "CK703"}
    assert not codes(report, "warning", "error")
    assert "5 labels" in said(report, "CK601")
    assert "training_args.bin is a pickle of" in said(report, "CK703")


TRAINER_FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "labels": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(id2label={"0": "a", "1": "b"})),
        "CK601",
        "error",
        "classifier.out_proj.weight has shape [5, 16], and config.json says [2, 16]",
    ),
    "layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=3)),
        "CK602",
        "error",
        "roberta.encoder.layer.2 is not in the checkpoint",
    ),
    "a lost weight": (
        lambda f: save_file(
            {n: t for n, t in load_file(f / "model.safetensors").items() if n != "classifier.dense.weight"},
            f / "model.safetensors",
        ),
        "CK602",
        "error",
        "classifier.dense.weight is not in the checkpoint",
    ),
    "names under a wrapper": (
        lambda f: save_file(
            {f"module.{n}": t for n, t in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
        ),
        "CK602",
        "warning",
        "the weights' names begin with module.roberta., which RobertaForSequenceClassification does not know",
    ),
    "names of a compiled model": (
        lambda f: save_file(
            {f"_orig_mod.{n}": t for n, t in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
        ),
        "CK602",
        "warning",
        "the weights' names begin with _orig_mod.roberta.",
    ),
    "no step": (
        lambda f: edit_json(f / "trainer_state.json", lambda s: s.pop("global_step")),
        "CK201",
        "error",
        "global_step is missing",
    ),
    "no length": (
        lambda f: edit_json(f / "trainer_state.json", lambda s: s.pop("max_steps")),
        "CK202",
        "warning",
        "max_steps is missing",
    ),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "CK101", "error", "optimizer.pt: it is missing"),
    "no random state": (lambda f: (f / "rng_state.pth").unlink(), "CK206", "info", "no random state"),
    "a lost random state": (
        lambda f: (f / "rng_state.pth").rename(f / "rng_state_1.pth"),
        "CK206",
        "warning",
        "random state of 1 of 2 processes: none for process 0",
    ),
    "a leftover": (lambda f: (f / "model.safetensors.tmp").touch(), "CK109", "warning", "model.safetensors.tmp"),
}


@pytest.mark.parametrize("fault", TRAINER_FAULTS)
def test_what_is_wrong_with_a_trainers_checkpoint_is_told(fault: str, checkpoint: Path) -> None:
    damage, code, severity, words = TRAINER_FAULTS[fault]
    damage(checkpoint)
    report = verified(checkpoint)
    assert code in codes(report, severity), report.findings
    assert words in said(report, code)


def test_inference_does_without_the_optimizer(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()
    assert not codes(verified(checkpoint, purpose="inference"), "error", "warning")


def test_a_saved_model_serves_inference_alone(tmp_path: Path) -> None:
    roberta().save_pretrained(tmp_path)
    assert codes(verified(tmp_path), "error") == {"CK205"}
    report = verified(tmp_path, purpose="inference")
    assert codes(report, "pass") >= {"CK205", "CK601", "CK602"}
    assert not codes(report, "warning", "error")


# torch.distributed.checkpoint


def test_the_metadata_of_shards_is_read_by_a_loader_that_runs_all_it_names(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(torch.nn.Linear(4, 2).state_dict(), checkpoint_id=tmp_path / "c", no_dist=True)
    report = verified(tmp_path / "c", purpose="inference")
    assert "pass: read by pickle.load" in said(report, "CK704")
    assert not codes(report, "warning", "error"), report.findings
    metadata = pickle.loads((tmp_path / "c/.metadata").read_bytes())
    metadata.planner_data = argparse.Namespace(a=1)
    (tmp_path / "c/.metadata").write_bytes(pickle.dumps(metadata))
    report = verified(tmp_path / "c", purpose="inference")
    assert ".metadata names argparse.Namespace, which is no part of torch.distributed.checkpoint" in said(
        report, "CK701"
    )
    assert not said(report, "CK704")


# safetensors, and manifests


def test_damage_in_safetensors_is_called_unverifiable_and_found_with_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(64, 64)}, path)
    report = verified(path, purpose="inference", deep=True)
    assert not codes(report, "warning", "error")
    assert "not checkable without a manifest" in said(report, "CK108")
    write_manifest(path)
    report = verified(path, purpose="inference", deep=True)
    assert "pass" in said(report, "CK803")
    assert not said(report, "CK108")
    flip_bit(path, 5_000)
    assert not codes(verified(path, purpose="inference"), "error"), "sizes agree"
    assert codes(verified(path, purpose="inference", deep=True), "error") == {"CK801"}


def test_a_file_of_another_size_is_told_by_the_manifest_at_once(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    write_manifest(folder)
    assert "pass" in said(verified(folder), "CK803")
    edit_json(folder / "config.json", lambda c: c.update(more=1))
    assert "config.json" in said(verified(folder), "CK801")


def test_a_broken_manifest_is_told(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    write_manifest(folder)
    manifest_path(folder).write_text("{")
    report = verified(folder)
    assert codes(report, "error") == {"CK802"}
    assert Severity.PASS in {f.severity for f in report.findings}
