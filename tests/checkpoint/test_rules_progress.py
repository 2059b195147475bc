"""The counters of every format: wrong ones are told, odd ones pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import SavesAsEpochsBegin, TinyModule, edited, enstack_folder, every_epoch, every_step, quiet_trainer
from genuine import OfUnknownLength, huggingface_trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.checkpoint import Facts, Format, Report, Severity, Verdict, judge, verify_checkpoint
from enstack_lightning.checkpoint.facts import ProgressFacts
from enstack_lightning.guard import CheckpointGuard

LOOP = ("loops", "fit_loop")


def said(report: Report, code: str, severity: str = "") -> str:
    return " | ".join(f.message for f in report.findings if f.code == code and f.severity.startswith(severity))


def counter(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(checkpoint: dict[str, Any]) -> None:
        for key in (*LOOP, *keys[:-1]):
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return edit


IMPOSSIBLE = {
    "more batches done than taken": (
        counter("epoch_loop.batch_progress", "current", "ready", value=1),
        "2 batches of the epoch are done and 1 were taken from the loader",
    ),
    "more batches in the epoch than in the run": (
        counter("epoch_loop.batch_progress", "total", "processed", value=1),
        "2 batches of the epoch are done and 1 in the whole run",
    ),
    "more epochs done than begun": (
        counter("epoch_progress", "current", "started", value=0),
        "1 epochs are complete and 0 had begun",
    ),
}


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_counters_that_no_trainer_writes(fault: str, trained: Path, tmp_path: Path) -> None:
    edit, words = IMPOSSIBLE[fault]
    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert report.verdict is Verdict.FAIL
    assert words in said(report, "CK302", "error")


class Plain(TinyModule):
    """Its loader is torchdata's own, which stands at its end after an epoch's last batch."""

    def __init__(self, shuffle: bool, workers: int) -> None:
        super().__init__()
        self.shuffle, self.workers = shuffle, workers

    def train_dataloader(self) -> StatefulDataLoader:
        rows = super().train_dataloader().dataset
        return StatefulDataLoader(rows, batch_size=4, shuffle=self.shuffle, num_workers=self.workers)


def without_the_moment(checkpoint: dict[str, Any]) -> None:
    """As a guard saved that did not know the moment yet."""
    del checkpoint["callbacks"]["CheckpointGuard"]["resume"]


@pytest.mark.parametrize(("shuffle", "workers"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_a_resume_at_its_last_batch_loses_is_told_before_and_after(
    shuffle: bool, workers: int, tmp_path: Path
) -> None:
    make = lambda: Plain(shuffle, workers)  # noqa: E731
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), every_epoch(tmp_path)).fit(make())
    for name in ("step=4", "epoch=0", "step=6", "step=15"):
        assert verify_checkpoint(tmp_path / f"{name}.ckpt").verdict is Verdict.PASS, name
    assert verify_checkpoint(tmp_path / "step=5.ckpt").verdict is Verdict.PASS, "the guard goes on with its end"
    path = edited(tmp_path / "step=5.ckpt", tmp_path / "c.ckpt", without_the_moment)
    report = verify_checkpoint(path)
    assert "epoch 1 counts as done without being trained" in said(report, "CK305", "warning")
    again = make()
    quiet_trainer(tmp_path, every_epoch(tmp_path / "again")).fit(again, ckpt_path=path)
    assert len(again.rows) == 5, "one epoch of the two that were left"
    report = verify_checkpoint(tmp_path / "again" / "epoch=1.ckpt")
    assert report.verdict is Verdict.WARN
    assert "2 epochs count as complete and 1 had begun: 1 of them was not trained" in said(report, "CK302", "warning")


def test_an_epoch_that_had_begun_is_lost_without_the_guard_and_told(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, SavesAsEpochsBegin(tmp_path), every_epoch(tmp_path)).fit(TinyModule())
    assert "CK305" not in {f.code for f in verify_checkpoint(tmp_path / "start-0.ckpt").of(Severity.WARNING)}
    report = verify_checkpoint(tmp_path / "start-1.ckpt")
    assert "takes that epoch for done" in said(report, "CK305", "warning")
    again = TinyModule()
    quiet_trainer(tmp_path).fit(again, ckpt_path=tmp_path / "start-1.ckpt")
    assert len(again.rows) <= 6, "one epoch of the two that were left, and a batch"


def test_a_loader_that_begins_anew_after_its_end_loses_no_epoch(trained: Path) -> None:
    assert verify_checkpoint(trained / "step=5.ckpt").verdict is Verdict.PASS


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_steps_of_a_healthy_run_are_those_of_its_batches(accumulation: int, interval: str, tmp_path: Path) -> None:
    save = every_step(tmp_path) if interval == "step" else every_epoch(tmp_path)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), save, max_epochs=2, accumulate_grad_batches=accumulation)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        report = verify_checkpoint(path)
        assert report.verdict is Verdict.PASS
        assert said(report, "CK302", "info") == "", path


def test_a_change_of_accumulation_shows_in_the_counters(trained: Path, tmp_path: Path) -> None:
    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"]["CheckpointGuard"]["run"]["accumulate_grad_batches"] = 2

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert "7 optimizer steps, where 1 epoch of 5 batches and 2 more, 2 a step, give 4" in said(report, "CK302", "info")
    assert report.verdict is Verdict.PASS


class SavesInside(TinyModule):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.current_epoch == 1:
            self.trainer.save_checkpoint(self.path)


def test_a_save_between_the_batches_of_one_step_is_worth_knowing(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    quiet_trainer(tmp_path, CheckpointGuard(), accumulate_grad_batches=2).fit(SavesInside(path))
    assert said(verify_checkpoint(path), "CK303", "info") == "", "the guard has saved them"
    report = verify_checkpoint(edited(path, tmp_path / "d.ckpt", without_the_moment))
    assert "the gradients of the last 1 of 2 batches are not in the checkpoint" in said(report, "CK303", "info")
    assert report.verdict is Verdict.PASS


def test_a_plain_loader_says_how_many_batches_are_trained_twice(trained: Path, tmp_path: Path) -> None:
    def edit(checkpoint: dict[str, Any]) -> None:
        counter("state_dict", "combined_loader", value=[])(checkpoint)
        without_the_moment(checkpoint)

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert "up to 2 of them for the second time" in said(report, "CK305", "warning")
    (finding,) = [f for f in report.findings if f.code == "CK305"]
    assert "with shuffle=True or with a sampler that has a state" in finding.hint, "others it cannot restore"
    assert "train with CheckpointGuard" in finding.hint


def test_nobody_who_trains_with_the_guard_is_told_to(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path)).fit(OfUnknownLength())
    report = verify_checkpoint(tmp_path / "step=3.ckpt")
    (finding,) = [f for f in report.findings if f.code == "CK305"]
    assert "without the training loader's position" in finding.message
    assert "CheckpointGuard" not in finding.hint


@pytest.mark.parametrize("value", [float("nan"), "0.7", True])
def test_a_best_metric_that_is_no_number(value: Any, tmp_path: Path) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", best_val_f1=value))
    assert "best_val_f1 is no finite number" in said(report, "CK304", "error")


@pytest.mark.parametrize("value", [0, 1, 0.5, None])
def test_a_best_metric_at_its_bounds_or_not_there_yet(value: Any, tmp_path: Path) -> None:
    assert verify_checkpoint(enstack_folder(tmp_path / "c", best_val_f1=value)).verdict is Verdict.PASS


# transformers


@pytest.fixture(scope="module")
def checkpoint_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return huggingface_trainer(tmp_path_factory.mktemp("transformers"), 9)


def with_state(path: Path, **entries: Any) -> Report:
    file = path / "trainer_state.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(before), **entries}))
        return verify_checkpoint(path)
    finally:
        file.write_text(before)


def test_a_state_of_transformers_agrees_with_itself(checkpoint_of_transformers: Path) -> None:
    report = verify_checkpoint(checkpoint_of_transformers)
    assert report.verdict is Verdict.PASS
    assert "epoch 1.2857 agrees with global_step" in said(report, "CK306", "pass")


STATES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "epoch edited": ({"epoch": 0.4}, "CK306", "warning", "epoch says 0.4000, and global_step 9 lies at"),
    "beyond the run": (
        {"global_step": 20, "epoch": 2.857},
        "CK301",
        "error",
        "global_step is 20, and the run ends at 14",
    ),
    "more epochs than the run": ({"epoch": 2.9}, "CK301", "error", "epoch is 2.9000, and the run has 2"),
    "negative": ({"global_step": -1}, "CK301", "error", "global_step is -1"),
    "of another run": (
        {"global_step": 8, "epoch": 8 / 7},
        "CK401",
        "error",
        "optimizer steps 9, expected 8 (global_step)",
    ),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_wrong_state_of_transformers_is_told(fault: str, checkpoint_of_transformers: Path) -> None:
    entries, code, severity, words = STATES[fault]
    assert words in said(with_state(checkpoint_of_transformers, **entries), code, severity)


@pytest.mark.parametrize(
    ("fraction", "severity"), [(2.0, Severity.WARNING), (2.6, Severity.PASS), (2.95, Severity.WARNING)]
)
def test_the_fraction_of_an_epoch(fraction: float, severity: Severity) -> None:
    progress = ProgressFacts(
        epoch=2,
        epochs_completed=2,
        epochs_begun=3,
        batches_in_epoch=6,
        batches_per_epoch=10,
        epoch_fraction=fraction,
        global_step=26,
    )
    findings = judge(Facts("c", Format.HUGGINGFACE, progress=progress))
    assert [f.severity for f in findings if f.code == "CK306"] == [severity]
