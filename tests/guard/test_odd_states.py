"""What stands under the guard's name in a checkpoint need not be what the guard saved: it ends in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited
from exact_runs import train
from lightning.pytorch import Callback

from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE, TRAINER = {"order": "plain"}, {"accumulate_grad_batches": 3, "max_epochs": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(folder, MODULE, TRAINER, saves=("batch-2",))
    return folder / "batch-2.ckpt"


def of_guard(checkpoint: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = checkpoint["callbacks"]["CheckpointGuard"]
    return state


def of_rank(checkpoint: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = of_guard(checkpoint)["resume"]["ranks"][0]
    return state


ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list for the state": lambda c: c["callbacks"].update(CheckpointGuard=[1]),
    "a list for the moment": lambda c: of_guard(c).update(resume=[1]),
    "numbers for ranks": lambda c: of_guard(c)["resume"].update(ranks=[3]),
    "a short random state": lambda c: of_rank(c)["random_state"].update(python=[3, [1, 2], None]),
    "a random state of another type": lambda c: of_rank(c)["random_state"].update(torch=torch.zeros(3)),
    "no random state of NumPy": lambda c: of_rank(c)["random_state"].pop("numpy"),
    "a number for the order": lambda c: of_rank(c).update(order=5),
    "an order of too many batches": lambda c: of_rank(c)["order"].update(drawn=[2**70, 0]),
    "a number for the epoch": lambda c: of_rank(c).update(epoch=5),
    "results without a description": lambda c: of_rank(c)["epoch"].update(results={"loss": {}}),
    "a reduction that is none": lambda c: [
        result["meta"].update(reduce_fx="eval", builtin=True) for result in of_rank(c)["epoch"]["results"].values()
    ],
    "gradients of another shape": lambda c: of_rank(c).update(gradients={"network.0.weight": torch.ones(99)}),
    "a number for the module": lambda c: of_guard(c)["resume"].update(module=5),
    "a number for the module's layers": lambda c: of_guard(c)["resume"]["module"].update(evaluating=5),
    "a number for the module's attributes": lambda c: of_guard(c)["resume"]["module"].update(numbers=5),
    "a number for the workers": lambda c: of_guard(c)["resume"].update(validation_workers=3),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_state_of_the_guard_ends_in_a_sentence(odd: str, saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "odd.ckpt", ODD[odd])
    with pytest.raises(CheckpointGuardError, match=r"state of CheckpointGuard in checkpoint \S+odd.ckpt cannot be"):
        train(tmp_path, MODULE, TRAINER, path)


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for v in inner for tensor in tensors_in(v)]


class Held(Callback):
    """What a guard holds of a checkpoint once training has begun."""

    def __init__(self, guard: CheckpointGuard) -> None:
        self.guard = guard
        self.tensors: list[torch.Tensor] | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.guard._restart is not None
        self.tensors = tensors_in(vars(self.guard._restart))


def test_no_tensor_of_a_checkpoint_is_held_while_training_goes_on(saved: Path, tmp_path: Path) -> None:
    """Of an accumulation window, the gradients of every process are among them."""
    held = Held(guard := CheckpointGuard())
    train(tmp_path, MODULE, TRAINER, saved, (held,), guard=guard)
    assert held.tensors == []


def test_the_state_as_it_was_saved_is_restored(saved: Path, tmp_path: Path) -> None:
    assert train(tmp_path, MODULE, TRAINER, edited(saved, tmp_path / "same.ckpt", lambda c: None))["counters"]


@pytest.mark.parametrize("version", [1, None, 99])
def test_a_state_of_another_version_of_the_guard_is_left_alone(
    version: object,
    saved: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = edited(saved, tmp_path / "other.ckpt", lambda c: of_guard(c).update(version=version, random_state="words"))
    with caplog.at_level("INFO"):
        assert train(tmp_path, MODULE, TRAINER, path)["counters"]
    assert "not promised: another version of the guard has saved it" in caplog.text
    assert f"version {version!r} and this guard reads 2" in str([str(w.message) for w in recwarn])
