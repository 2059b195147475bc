"""Checkpoints of older Lightnings, written by those versions themselves (`lightning_versions/make.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, edited, every_step, quiet_trainer
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning.checkpoint import Facts, Format, Options, Report, Severity, Verdict, verify_checkpoint

FOLDER = Path(__file__).parent / "lightning_versions"
WITH_CLASSES = ("1.0.8", "1.2.10", "1.4.9")
"""These key the state of callbacks by class, which no default load of today's torch allows."""
BEFORE_LOOPS = (*WITH_CLASSES, "1.5.10")
WITH_LOOPS = ("1.6.5", "1.9.5", "2.0.9")


def report_on(version: str, moment: str, **options: Any) -> Report:
    return verify_checkpoint(FOLDER / f"{version}-{moment}.ckpt", Options(**options))


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity in (Severity.ERROR, Severity.WARNING)}


def position(report: Report) -> tuple[Any, ...]:
    assert report.resume is not None
    return report.resume.next_epoch, report.resume.next_batch, report.resume.global_step


@pytest.mark.parametrize("version", [*BEFORE_LOOPS, *WITH_LOOPS])
@pytest.mark.parametrize("moment", ["mid-epoch", "epoch-end", "after-fit", "weights"])
def test_every_version_is_read(version: str, moment: str) -> None:
    facts = report_on(version, moment).facts
    assert facts.format is Format.LIGHTNING
    assert facts.versions["lightning"] == version
    assert {t.name: t.shape for t in facts.tensors} == {"layer.weight": (2, 2), "layer.bias": (2,)}
    assert facts.hyper_parameters == {"lr": 0.01}
    assert facts.model_only is (moment == "weights")
    if moment != "weights":
        (optimizer,), (scheduler,) = facts.optimizers or (), facts.schedulers or ()
        assert optimizer.moments[0] == {"exp_avg": (2, 2), "exp_avg_sq": (2, 2)}
        assert optimizer.groups[0].options["betas"] == [0.9, 0.999]
        assert set(optimizer.steps.values()) == {6.0 if moment == "mid-epoch" else 8.0}
        assert scheduler.kind == "StepLR"
        assert list(facts.metrics) == ([] if version == "1.0.8" else ["best val_loss"])


@pytest.mark.parametrize("version", [*BEFORE_LOOPS, *WITH_LOOPS])
@pytest.mark.parametrize("moment", ["mid-epoch", "epoch-end", "after-fit"])
def test_a_healthy_file_of_any_version_has_no_fault_of_its_own(version: str, moment: str) -> None:
    inside = {"CK305"} if moment == "mid-epoch" and version in WITH_LOOPS else set()
    begins_again = {"CK302"} if version in BEFORE_LOOPS else set()
    unsafe = {"CK701"} if version in WITH_CLASSES else set()
    assert codes(report_on(version, moment)) == inside | begins_again | unsafe
    if unsafe:
        vouched = report_on(
            version, moment, allow_globals=frozenset({"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"})
        )
        assert vouched.verdict is not Verdict.FAIL


@pytest.mark.parametrize("version", [*BEFORE_LOOPS, *WITH_LOOPS])
def test_weights_of_any_version_serve_inference_alone(version: str) -> None:
    assert codes(report_on(version, "weights")) == {"CK205"}
    assert report_on(version, "weights", purpose="inference").verdict is Verdict.PASS


# Single entries, as versions and settings differ


def edited_facts(source: Path, tmp_path: Path, edit: Any) -> Facts:
    return verify_checkpoint(edited(source, tmp_path / "edited.ckpt", edit)).facts


@pytest.mark.parametrize("entry", ["MixedPrecision", "NativeMixedPrecisionPlugin", "native_amp_scaling_state"])
def test_a_gradient_scaler_proves_half_precision(entry: str, tmp_path: Path) -> None:
    state = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    facts = edited_facts(FOLDER / "1.9.5-epoch-end.ckpt", tmp_path, lambda c: c.update({entry: state}))
    assert facts.run.precision == "16-mixed"
    assert report_on("1.9.5", "epoch-end").facts.run.precision is None


def test_the_run_that_the_guard_recorded_is_read(trained: Path) -> None:
    run = verify_checkpoint(trained / "step=7.ckpt").facts.run
    assert (run.world_size, run.precision, run.batches_per_epoch) == (1, "32-true", 5)


def test_steps_of_manual_optimization_count_in_any_layout(tmp_path: Path) -> None:
    def swap(checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        counter = loop["epoch_loop.batch_loop.optimizer_loop.optim_progress"]["optimizer"]["step"]
        loop["epoch_loop.batch_loop.manual_loop.optim_step_progress"]["total"] = {"completed": 16, "ready": 16}
        counter["total"] = {"completed": 0, "ready": 0}

    facts = edited_facts(FOLDER / "1.6.5-epoch-end.ckpt", tmp_path, swap)
    assert facts.progress.optimizer_steps == 16


class Averaged(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


def test_the_weights_in_training_are_read_beside_the_averaged_ones(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, Averaged(), every_step(tmp_path), max_epochs=1)
    trainer.fit(TinyModule())

    def poison(checkpoint: dict[str, Any]) -> None:
        checkpoint["current_model_state"]["layer.bias"][1] = float("nan")

    path = edited(tmp_path / "step=3.ckpt", tmp_path / "nan.ckpt", poison)
    assert codes(verify_checkpoint(tmp_path / "step=3.ckpt", Options(deep=True))) == set()
    (value,) = verify_checkpoint(path, Options(deep=True)).facts.values or ()
    assert (value.name, value.first_nonfinite) == ("current_model_state.layer.bias", (1,))


def test_moments_that_are_not_finite_are_named(trained: Path, tmp_path: Path) -> None:
    def poison(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][1, 2] = float("inf")

    path = edited(trained / "step=7.ckpt", tmp_path / "inf.ckpt", poison)
    assert not verify_checkpoint(path).facts.values
    (value,) = verify_checkpoint(path, Options(deep=True)).facts.values or ()
    assert value.name == "optimizer 0, parameter 0, exp_avg"
    assert (value.role, value.first_nonfinite, value.first_value) == ("optimizer", (1, 2), "inf")


def test_hyper_parameters_are_read_whatever_held_them(tmp_path: Path) -> None:
    held = AttributeDict(lr=0.5, layers=[1, 2])
    facts = edited_facts(FOLDER / "1.9.5-epoch-end.ckpt", tmp_path, lambda c: c.update(hyper_parameters=held))
    assert facts.hyper_parameters == {"lr": 0.5, "layers": [1, 2]}


def test_a_version_that_is_no_version_is_read_as_todays(tmp_path: Path) -> None:
    for version in ("dev", None, 5, "99999999999999999999.1"):
        facts = edited_facts(
            FOLDER / "2.0.9-mid-epoch.ckpt", tmp_path, lambda c, v=version: c.update({"pytorch-lightning_version": v})
        )
        assert facts.format is Format.LIGHTNING
        assert facts.progress.global_step == 6


# What today's Lightning makes of them


class FirstBatch(Callback):
    """Where training went on: epoch, batch, and optimizer steps done."""

    def __init__(self) -> None:
        self.position: tuple[int, int, int] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.position = self.position or (trainer.current_epoch, batch_idx, trainer.global_step)


class Continued(TinyModule):
    """The module that the old files are of."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(16.0).reshape(8, 2)), batch_size=2)


@pytest.mark.parametrize("version", ["1.5.10", *WITH_LOOPS])
@pytest.mark.parametrize("moment", ["mid-epoch", "epoch-end"])
def test_the_plan_is_what_todays_lightning_does(version: str, moment: str, tmp_path: Path) -> None:
    first = FirstBatch()
    quiet_trainer(tmp_path, first, max_epochs=4).fit(Continued(), ckpt_path=FOLDER / f"{version}-{moment}.ckpt")
    assert first.position == position(report_on(version, moment))
