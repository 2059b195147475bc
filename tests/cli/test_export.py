"""`enstack export`: what comes out opens where it is meant to, and a bad checkpoint or folder is refused."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from builders import TinyModule, every_epoch, quiet_trainer, truncate
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from enstack_lightning import VulnerabilityClassifier, VulnerabilityDataModule
from enstack_lightning.checkpoint import Verdict, verify_checkpoint
from enstack_lightning.cli.main import main
from enstack_lightning.guard import CheckpointGuard

MODEL = {
    "pretrained": False,
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 66,
}


@pytest.fixture(scope="module")
def saved(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`epoch=0.ckpt` at an epoch's end and `step=8.ckpt` after two batches of six of the next one."""
    folder = tmp_path_factory.mktemp("saved")
    inside = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    guards = CheckpointGuard(), every_epoch(folder), inside
    options = {"vocab_size": 300, "max_length": 64, "train_batch_size": 4, "cache_dir": str(cache)}
    trainer = quiet_trainer(folder, *guards, max_epochs=2, limit_train_batches=6)
    trainer.fit(VulnerabilityClassifier(**MODEL), VulnerabilityDataModule(str(data), **options))
    return folder


def test_the_hugging_face_folder_is_opened_by_transformers(saved: Path, tmp_path: Path) -> None:
    path, folder = saved / "epoch=0.ckpt", tmp_path / "hf"
    assert main(["export", str(path), str(folder), "--layout", "huggingface"]) == 0
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert network.config.id2label == {0: "CWE-119", 1: "CWE-120", 2: "CWE-469", 3: "CWE-476", 4: "other"}
    expected = torch.load(path, weights_only=True)["state_dict"]
    loaded = network.state_dict()
    assert {f"model.{name}" for name in loaded} <= set(expected)
    for name, tensor in loaded.items():
        assert torch.equal(expected[f"model.{name}"], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("int f(char *p) { return *p; }", return_tensors="pt")
    assert batch["input_ids"].shape[1] > 5
    assert network(**batch).logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "epoch", "step", "kind"), [("epoch=0", 1, 0, "end-of-epoch"), ("step=8", 2, 2, "mid-epoch")]
)
def test_the_enstack_folder_verifies_and_stands_where_the_checkpoint_stood(
    name: str, epoch: int, step: int, kind: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "enstack"
    assert main(["export", str(saved / f"{name}.ckpt"), str(folder), "--layout", "enstack"]) == 0
    assert {"config.json", "model.safetensors", "training_state.pth"} <= {p.name for p in folder.iterdir()}
    report = verify_checkpoint(folder)
    assert report.verdict is not Verdict.FAIL, report.findings
    assert report.resume is not None
    assert (report.facts.progress.epoch, report.facts.progress.step, report.resume.kind) == (epoch, step, kind)
    state = torch.load(folder / "training_state.pth", weights_only=True)
    source = torch.load(saved / f"{name}.ckpt", weights_only=True)
    assert state["total_batches"] == 6
    assert state["optimizer_state_dict"]["param_groups"] == source["optimizer_states"][0]["param_groups"]
    assert state["scheduler_state_dict"] == source["lr_schedulers"][0]


def test_a_bad_checkpoint_is_not_exported(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copy(saved / "epoch=0.ckpt", tmp_path / "c.ckpt"))
    truncate(path, path.stat().st_size // 2)
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert "must not be used: CK104" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["export", str(saved / "epoch=0.ckpt"), str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_trainer(tmp_path, every_epoch(tmp_path), max_epochs=1).fit(TinyModule())
    assert main(["export", str(tmp_path / "epoch=0.ckpt"), str(tmp_path / "out")]) == 1
    assert "was not saved by VulnerabilityClassifier" in capsys.readouterr().err


def test_a_full_disk_leaves_no_folder_and_is_said(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole, folder = saved / "epoch=0.ckpt", tmp_path / "whole", tmp_path / "folder"
    assert main(["export", str(path), str(whole), "--layout", "enstack"]) == 0
    model, state = ((whole / name).stat().st_size for name in ("model.safetensors", "training_state.pth"))
    assert model < state
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (model // 2, (model + state) // 2):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            assert main(["export", str(path), str(folder), "--layout", "enstack"]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert capsys.readouterr().err.startswith(f"enstack export: {folder} cannot be written: ")
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]
