"""Every rule fires on a real checkpoint that is wrong, and keeps quiet on an odd one that is healthy."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, edited, enstack_folder, every_epoch, every_step, quiet_trainer, truncate
from lightning.pytorch.callbacks import ModelCheckpoint

from enstack_lightning.checkpoint import RULES, Options, Report, Severity, Verdict, to_json, to_text, verify_checkpoint

Checkpoint = dict[str, Any]


def codes(report: Report, severity: Severity) -> set[str]:
    return {finding.code for finding in report.of(severity)}


def said(report: Report, code: str) -> str:
    return " | ".join(f"{f.message} -> {f.hint}" for f in report.findings if f.code == code)


# Lightning: one edit, the codes it must give


def set_entry(*keys: Any, value: Any) -> Callable[[Checkpoint], None]:
    def edit(checkpoint: Checkpoint) -> None:
        *outer, last = keys
        for key in outer:
            checkpoint = checkpoint[key]
        if value is ...:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return edit


def scale_steps(by: int) -> Callable[[Checkpoint], None]:
    def edit(checkpoint: Checkpoint) -> None:
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["step"] += by

    return edit


LOOP = ("loops", "fit_loop")
LIGHTNING_FAULTS = {
    "no optimizer states": (set_entry("optimizer_states", value=...), "CK201", "error", "optimizer_states is missing"),
    "no epoch": (set_entry("epoch", value=...), "CK201", "error", "epoch is missing"),
    "epoch of the wrong type": (set_entry("epoch", value="3"), "CK201", "error", "epoch is of type str"),
    "no weights": (set_entry("state_dict", value={}), "CK203", "error", "no weights"),
    "negative epoch": (set_entry("epoch", value=-1), "CK301", "error", "epoch is -1"),
    "global_step edited": (set_entry("global_step", value=9), "CK302", "error", "says 9 and the loop counters say 7"),
    "epoch edited": (set_entry("epoch", value=9), "CK302", "warning", "says 9 and the loop counters say 1 complete"),
    "optimizer ahead": (scale_steps(5), "CK401", "error", "optimizer steps 12, expected 7"),
    "optimizer behind": (scale_steps(-1), "CK401", "warning", "1 fewer than expected"),
    "optimizer fresh": (
        set_entry("optimizer_states", 0, "state", value={}),
        "CK402",
        "error",
        "no state for any of its 2 parameters after 7 steps",
    ),
    "no optimizer": (set_entry("optimizer_states", value=[]), "CK402", "error", "no optimizer state after 7 steps"),
    "groups lost": (set_entry("optimizer_states", 0, "param_groups", value=[]), "CK402", "error", "no param_groups"),
    "one parameter behind": (
        set_entry("optimizer_states", 0, "state", 0, "step", value=torch.tensor(3.0)),
        "CK403",
        "warning",
        "1 of 2 parameters have fewer steps than the others (3 to 7)",
    ),
    "state of a stranger": (
        set_entry("optimizer_states", 0, "state", 9, value={"step": torch.tensor(7.0)}),
        "CK404",
        "error",
        "1 parameters that are in none of its groups",
    ),
    "scheduler behind": (
        set_entry("lr_schedulers", 0, "last_epoch", value=2),
        "CK501",
        "warning",
        "scheduler steps 2, expected 7",
    ),
    "learning rate vanished": (
        set_entry("optimizer_states", 0, "param_groups", 0, "lr", value=1.23e-9),
        "CK502",
        "warning",
        "1.23e-09 of optimizer 0 is below",
    ),
    "learning rate exploded": (
        set_entry("optimizer_states", 0, "param_groups", 0, "lr", value=0.5),
        "CK502",
        "warning",
        "5.00e-01 of optimizer 0 is above 2.00e-02",
    ),
    "scheduler set another rate": (
        set_entry("lr_schedulers", 0, "_last_lr", value=[1e-3]),
        "CK503",
        "warning",
        "its scheduler set 1.000000e-03",
    ),
    "loader position lost": (
        set_entry(*LOOP, "state_dict", "combined_loader", value=[]),
        "CK305",
        "warning",
        "without the training loader's position",
    ),
    "saved inside a step": (
        set_entry(
            *LOOP, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "ready", value=8
        ),
        "CK303",
        "warning",
        "8 optimizer steps had begun and 7 were counted",
    ),
    "of no Lightning": (set_entry("pytorch-lightning_version", value=...), "CK102", "error", "no Lightning checkpoint"),
}


@pytest.mark.parametrize("fault", LIGHTNING_FAULTS)
def test_a_wrong_lightning_checkpoint_is_told(fault: str, trained: Path, tmp_path: Path) -> None:
    edit, code, severity, words = LIGHTNING_FAULTS[fault]
    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "edited.ckpt", edit))
    assert code in codes(report, Severity(severity)), report.findings
    assert words in said(report, code)
    assert report.verdict is (Verdict.FAIL if severity == "error" else Verdict.WARN)


NO_NUMBERS = {"nan": math.nan, "inf": math.inf, "text": "x", "huge": 2**70, "true": True, "list": [1]}
PLACES: dict[str, tuple[Any, ...]] = {
    "rate": ("optimizer_states", 0, "param_groups", 0, "lr"),
    "step": ("optimizer_states", 0, "state", 0, "step"),
    "scheduler position": ("lr_schedulers", 0, "last_epoch"),
    "scheduler rates": ("lr_schedulers", 0, "_last_lr", 0),
    "batches": (*LOOP, "epoch_loop.batch_progress", "current", "processed"),
    "epochs": (*LOOP, "epoch_progress", "current", "completed"),
    "counters": (*LOOP, "epoch_progress", "total"),
    "optimizer": ("optimizer_states", 0),
    "group": ("optimizer_states", 0, "param_groups", 0),
    "scheduler": ("lr_schedulers", 0),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_meant_fails_and_can_be_shown(place: str, kind: str, trained: Path, tmp_path: Path) -> None:
    edit = set_entry(*PLACES[place], value=NO_NUMBERS[kind])
    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert codes(report, Severity.ERROR) >= {"CK204"}, report.findings
    assert "CK100" not in codes(report, Severity.ERROR)
    json.loads(to_json([report]))
    assert to_text(report).isascii()


def test_more_batches_done_than_an_epoch_has(trained: Path, tmp_path: Path) -> None:
    def edit(checkpoint: Checkpoint) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["current"]["processed"] = progress["current"]["ready"] = 9

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "edited.ckpt", edit))
    assert "9 batches of the epoch are done, and an epoch has 5" in said(report, "CK301")


@pytest.mark.parametrize("name", [f"step={n}" for n in range(1, 16)] + [f"epoch={n}" for n in range(3)])
def test_every_checkpoint_of_a_healthy_run_passes_without_a_warning(name: str, trained: Path) -> None:
    report = verify_checkpoint(trained / f"{name}.ckpt")
    assert report.verdict is Verdict.PASS, [f for f in report.findings if f.severity is not Severity.PASS]
    assert report.resume is not None
    step = report.resume.global_step
    assert step is not None
    assert (report.resume.next_epoch, report.resume.next_batch) == (divmod(step, 5) if step < 15 else (3, 0))
    assert report.resume.optimizer_steps == step
    expected = "finished" if step == 15 else "end-of-epoch" if step % 5 == 0 else "mid-epoch"
    assert report.resume.kind == expected


# Odd but healthy


class Odd(TinyModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.kind = optimizer

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        if self.kind == "frozen":
            self.layer.bias.requires_grad_(False)
            return torch.optim.AdamW(self.layer.parameters(), lr=0.1)
        if self.kind == "per epoch":
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
        if self.kind == "no optimizer":
            return None
        if self.kind == "cyclic":
            sgd = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            return [sgd], [{"scheduler": torch.optim.lr_scheduler.CyclicLR(sgd, 0.01, 0.1, 3), "interval": "step"}]
        if self.kind == "one cycle":
            adam = torch.optim.Adam(self.parameters(), lr=0.1)
            cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=self.trainer.estimated_stepping_batches)
            return [adam], [{"scheduler": cycle, "interval": "step"}]
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # gets no gradient


class TwoOptimizers(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


KINDS = ["sgd", "frozen", "per epoch", "one cycle", "cyclic", "no optimizer", "two optimizers", "accumulation"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_but_healthy_run_passes(kind: str, tmp_path: Path) -> None:
    module = TwoOptimizers() if kind == "two optimizers" else Odd(kind) if kind != "accumulation" else TinyModule()
    options = {"accumulate_grad_batches": 2} if kind == "accumulation" else {}
    quiet_trainer(tmp_path, every_epoch(tmp_path), every_step(tmp_path), max_epochs=2, **options).fit(module)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) > 4
    for path in saved:
        report = verify_checkpoint(path)
        assert report.verdict is Verdict.PASS, (path.name, report.of(Severity.ERROR), report.of(Severity.WARNING))


def test_a_run_stopped_inside_an_epoch_is_not_taken_for_one_of_shorter_epochs(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=8)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    report = verify_checkpoint(tmp_path / "c.ckpt")
    assert report.verdict is Verdict.PASS
    assert report.facts.batches_per_epoch is None


def test_weights_only_files_serve_inference_and_not_resume(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)).fit(TinyModule())
    path = tmp_path / "w.ckpt"
    assert codes(verify_checkpoint(path), Severity.ERROR) == {"CK205"}
    assert verify_checkpoint(path, Options(purpose="inference")).verdict is Verdict.PASS


def test_a_tolerance_given_by_the_user_is_used(trained: Path, tmp_path: Path) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "edited.ckpt", scale_steps(3))
    assert verify_checkpoint(path, Options(tolerance=2)).verdict is Verdict.FAIL
    assert "tolerance 3" in said(verify_checkpoint(path, Options(tolerance=3)), "CK401")
    assert "CK401" not in codes(verify_checkpoint(path, Options(tolerance=3)), Severity.ERROR)


# EnStack: the five checks of the original


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def empty(name: str) -> Callable[[Path], None]:
    return lambda folder: truncate(folder / name, 0)


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


ENSTACK_FILE_FAULTS = {
    "state missing": (remove("training_state.pth"), "CK205", "An EnStack checkpoint also has training_state.pth"),
    "config missing": (remove("config.json"), "CK101", "config.json"),
    "weights missing": (remove("model.safetensors"), "CK101", "neither model.safetensors nor pytorch_model.bin"),
    "state empty": (empty("training_state.pth"), "CK103", "training_state.pth: it is empty (0 bytes)"),
    "config empty": (empty("config.json"), "CK103", "config.json"),
    "weights empty": (empty("model.safetensors"), "CK103", "model.safetensors"),
    "config no JSON": (write("config.json", "{"), "CK105", "config.json: it is no valid JSON"),
    "config no object": (write("config.json", "[1]"), "CK105", "a JSON list where an object is needed"),
    "state is text": (write("training_state.pth", "hello"), "CK102", "a text file"),
    "weights cut": (lambda f: truncate(f / "model.safetensors", 100), "CK104", "model.safetensors"),
    "weights lead out": (link_out, "CK105", "a link that leads out of the checkpoint's folder"),
}


@pytest.mark.parametrize("fault", ENSTACK_FILE_FAULTS)
def test_wrong_files_of_an_enstack_folder_are_told(fault: str, tmp_path: Path) -> None:
    damage, code, words = ENSTACK_FILE_FAULTS[fault]
    folder = enstack_folder(tmp_path / "c")
    damage(folder)
    report = verify_checkpoint(folder)
    assert report.verdict is Verdict.FAIL
    assert code in codes(report, Severity.ERROR), report.findings
    assert words in said(report, code)


ENSTACK_STATE_FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no counters": ({"total_batches": ...}, "CK202", "warning", "total_batches is missing"),
    "no optimizer": ({"optimizer_state_dict": ...}, "CK201", "error", "optimizer_state_dict is missing"),
    "no scheduler": ({"scheduler_state_dict": ...}, "CK202", "warning", "scheduler_state_dict is missing"),
    "step beyond the epoch": ({"step": 11}, "CK301", "error", "11 batches of the epoch are done, and an epoch has 10"),
    "negative step": ({"step": -1, "optimizer_steps": 9}, "CK301", "error", "step is -1"),
    "epoch 0": ({"epoch": 0, "optimizer_steps": 0}, "CK301", "error", "epoch is 0 and must be 1 or more"),
    "F1 above 1": ({"best_val_f1": 1.5}, "CK304", "error", "best_val_f1 is 1.5"),
    "optimizer far behind": ({"epoch": 9, "optimizer_steps": 10}, "CK401", "warning", "80 fewer than expected"),
    "optimizer far ahead": ({"optimizer_steps": 99}, "CK401", "warning", "79 more than expected"),
    "accumulation": ({"epoch": 8, "optimizer_steps": 20}, "CK401", "warning", "accumulation over 4 batches"),
}


@pytest.mark.parametrize("fault", ENSTACK_STATE_FAULTS)
def test_a_wrong_state_of_an_enstack_folder_is_told(fault: str, tmp_path: Path) -> None:
    options, code, severity, words = ENSTACK_STATE_FAULTS[fault]
    report = verify_checkpoint(enstack_folder(tmp_path / "c", **options))
    assert code in codes(report, Severity(severity)), report.findings
    assert words in said(report, code)


@pytest.mark.parametrize(
    ("epoch", "step", "optimizer_steps", "kind", "next_epoch", "next_batch"),
    [(2, 0, None, "end-of-epoch", 3, 0), (3, 4, None, "mid-epoch", 3, 4), (2, 0, 12, "end-of-epoch", 3, 0)],
)
def test_a_healthy_enstack_folder_passes_within_the_tolerance(
    epoch: int, step: int, optimizer_steps: int | None, kind: str, next_epoch: int, next_batch: int, tmp_path: Path
) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", epoch, step, optimizer_steps=optimizer_steps))
    assert report.verdict is Verdict.PASS, report.findings
    assert report.resume is not None
    assert (report.resume.kind, report.resume.next_epoch, report.resume.next_batch) == (kind, next_epoch, next_batch)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_both_files_of_weights_are_read(weights: str, tmp_path: Path) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", weights=weights))
    assert {(t.name, t.dtype.lower()[:1], t.shape) for t in report.facts.tensors} == {
        ("weight", "f", (2, 4)),
        ("bias", "f", (2,)),
    }


def test_a_snapshot_of_the_hugging_face_cache_with_its_links_passes(tmp_path: Path) -> None:
    made = enstack_folder(tmp_path / "made")
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in made.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    assert verify_checkpoint(snapshot).verdict is Verdict.PASS


def test_no_permission_is_an_error_of_its_own(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "closed.ckpt"
    shutil.copy(trained / "step=7.ckpt", path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read every file
    try:
        report = verify_checkpoint(path)
    finally:
        os.seteuid(user)
    assert codes(report, Severity.ERROR) == {"CK106"}, report.findings
    assert "Permission denied" in said(report, "CK106")


def test_a_link_that_goes_round_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "round.ckpt"
    path.symlink_to(path)
    assert "CK106" in codes(verify_checkpoint(path), Severity.ERROR)


@pytest.mark.parametrize("name", ["epoch", "step"])
def test_an_enstack_state_without_a_counter_cannot_be_resumed(name: str, tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    edited(folder / "training_state.pth", folder / "training_state.pth", set_entry(name, value=...))
    report = verify_checkpoint(folder)
    assert f"{name} is missing" in said(report, "CK201")
    assert report.resume is None


def test_every_rule_is_documented_and_named() -> None:
    assert len(RULES) >= 19
    for code, rule in RULES.items():
        assert code == rule.code
        assert rule.check.__doc__
        assert rule.name == rule.name.lower().replace(" ", "-")


def test_the_config_of_an_enstack_folder_is_reported(tmp_path: Path) -> None:
    facts = verify_checkpoint(enstack_folder(tmp_path / "c")).facts
    assert facts.versions == {"transformers": "5.0.0"}
    assert facts.model_config["model_type"] == json.loads((tmp_path / "c/config.json").read_text())["model_type"]
