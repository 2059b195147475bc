"""What a training state needs: odd and healthy runs pass, what they could be mistaken for does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, edited, quiet_trainer
from lightning.pytorch import LightningModule

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Options, Report, Verdict, verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def said(report: Report, code: str) -> str:
    return " | ".join(f"{f.severity} {f.message}" for f in report.findings if f.code == code)


class Counting(LightningModule):
    """A module without any parameter: it looks at the data and trains nothing."""

    def training_step(self, batch: Any) -> None:
        self.log("mean", batch[0].mean())

    def test_step(self, batch: Any) -> None:
        self.log("mean", batch[0].mean())

    def configure_optimizers(self) -> None:
        return None

    train_dataloader = TinyModule.train_dataloader
    test_dataloader = TinyModule.train_dataloader


def fit(module: LightningModule, file: Path, epochs: int = 1, resume: Path | None = None) -> Path:
    trainer = quiet_trainer(file.parent, CheckpointGuard(), max_epochs=epochs)
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(file)
    return file


def test_a_checkpoint_of_a_module_without_parameters_was_refused(tmp_path: Path) -> None:
    path = fit(Counting(), tmp_path / "one.ckpt")
    for purpose in ("resume", "inference"):
        report = verify_checkpoint(path, Options(purpose=purpose))
        assert report.verdict is Verdict.PASS
        assert "info no weights, as none of its optimizers has a parameter" in said(report, "CK203")
    assert fit(Counting(), tmp_path / "two.ckpt", epochs=2, resume=path).exists()
    quiet_trainer(tmp_path, CheckpointGuard()).test(Counting(), ckpt_path=path, verbose=False)


def lose_weights(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"].clear()


def lose_both(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"].clear()
    checkpoint["optimizer_states"].clear()


def lose_weights_of_a_model(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"].clear()
    for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        checkpoint.pop(name, None)


@pytest.mark.parametrize("lose", [lose_weights, lose_both, lose_weights_of_a_model])
@pytest.mark.parametrize("purpose", ["resume", "inference"])
def test_lost_weights_are_an_error(lose: Callable[[dict[str, Any]], None], purpose: Any, tmp_path: Path) -> None:
    path = edited(fit(TinyModule(), tmp_path / "one.ckpt"), tmp_path / "lost.ckpt", lose)
    report = verify_checkpoint(path, Options(purpose=purpose))
    assert "error no weights" in said(report, "CK203")


class OwnRate(torch.optim.Optimizer):
    """Reckons its rate from its count of steps, as optimizers without a rate of their own do."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float | None = None) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure and torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.sub_(parameter.grad, alpha=0.1 / state["step"])
        return loss


class WithoutRate(TinyModule):
    def configure_optimizers(self) -> Any:
        return OwnRate(self.parameters())


def test_an_optimizer_without_a_rate_was_called_misshapen(tmp_path: Path) -> None:
    path = fit(WithoutRate(), tmp_path / "one.ckpt")
    report = verify_checkpoint(path)
    assert report.verdict is Verdict.PASS, report
    assert fit(WithoutRate(), tmp_path / "two.ckpt", epochs=2, resume=path).exists()


def test_torchs_own_optimizers_have_a_rate(tmp_path: Path) -> None:
    def forget(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = None

    report = verify_checkpoint(edited(fit(TinyModule(), tmp_path / "one.ckpt"), tmp_path / "lost.ckpt", forget))
    assert "error optimizer_states[0].param_groups[0].lr is of type NoneType" in said(report, "CK204")
