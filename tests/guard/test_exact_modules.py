"""What a LightningModule holds beside its weights goes on after a resume, or the resume report says that it is lost."""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SavesAsEpochsBegin, quiet_trainer
from exact_runs import BATCHES, Recorded, differences, exactness, train
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics import MeanMetric, Metric, RunningMean, RunningSum
from torchmetrics.wrappers import MinMaxMetric

from enstack_lightning.checkpoint import verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")
INSIDE, LAST, NEXT, VALIDATED, DONE = "batch-2", f"batch-{BATCHES}", f"batch-{BATCHES + 2}", "validation-1", "epoch-1"
BOTH = {"max_epochs": 2}


def resumed(
    kind: type[Recorded],
    names: tuple[str, ...],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    trainer: dict[str, Any] | None = None,
    callbacks: Callable[[], tuple[Callback, ...]] = tuple,
) -> dict[str, tuple[list[str], str]]:
    """For each checkpoint how the run that was resumed from it differs, and what the line `exact` said."""
    options = {**BOTH, **(trainer or {})}
    whole = train(folder, {}, options, callbacks=callbacks(), saves=names, kind=kind)
    found = {}
    for name in names:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(folder / "again", {}, options, folder / f"{name}.ckpt", callbacks(), seed=9, kind=kind)
        found[name] = differences(whole, again), exactness(caplog)
    return found


EXACT = ([], "bit for bit")


def state_of_guard(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["callbacks"]["CheckpointGuard"]["resume"]  # type: ignore[no-any-return]


# Double precision


def test_double_weights_are_not_rounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = resumed(Recorded, (INSIDE, DONE), tmp_path, caplog, {"precision": "64-true"})
    assert found == {INSIDE: EXACT, DONE: EXACT}


def test_double_weights_are_evaluated_as_they_were_saved(tmp_path: Path) -> None:
    train(tmp_path, {}, {"max_epochs": 1, "precision": "64-true"}, saves=(INSIDE,))
    path, module = tmp_path / f"{INSIDE}.ckpt", Recorded()
    quiet_trainer(tmp_path, CheckpointGuard(), precision="64-true").validate(module, ckpt_path=path)
    for name, tensor in torch.load(path, weights_only=True)["state_dict"].items():
        assert torch.equal(module.state_dict()[name], tensor)


# Saved as an epoch begins


def steps(run: dict[str, Any]) -> list[Any]:
    """Of each batch that was trained the epoch, its number, the step, the rows, the loss and the learning rate."""
    return [event for event in run["events"] if event[0] == "step"]


@pytest.mark.parametrize(
    "data",
    [{"order": order, "num_workers": n} for order, n in (("sampler", 0), ("plain", 0), ("plain", 1), ("shuffle", 1))],
    ids=str,
)
@pytest.mark.parametrize("knows", [True, False], ids=["saved with the guard", "saved without it"])
def test_an_epoch_that_had_begun_when_it_was_saved_is_trained(
    data: dict[str, Any], knows: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "start-1.ckpt"
    whole = train(tmp_path, data, BOTH, callbacks=(SavesAsEpochsBegin(tmp_path),))
    if not knows:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]["CheckpointGuard"]
        torch.save(checkpoint, path)
        manifest_path(path).unlink()
    assert ("CK305" in str(verify_checkpoint(path))) is not knows
    with caplog.at_level(logging.INFO):
        again = train(tmp_path / "again", data, BOTH, path, seed=9)
    exact = exactness(caplog)
    assert "not promised" in exact
    assert [step[:4] for step in steps(again)] == [step[:4] for step in steps(whole) if step[1] == 1]
    if knows:
        lost = "it was saved in on_train_epoch_start, and hooks of that epoch's start are called again"
        assert exact.endswith(f"not promised: {lost}")
        assert steps(again) == [step for step in steps(whole) if step[1] == 1]
        assert again["weights"] == whole["weights"]


# Gradients under manual optimization


class Manual(Recorded):
    """Accumulates the gradients of two batches, over validations and epochs."""

    every = 2

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        self.manual_backward(loss / self.every)
        if (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def on_validation_model_zero_grad(self) -> None:
        """Else Lightning clears what waits."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class StepsFirst(Manual):
    """Steps with what the batch before has left, and gathers anew in the same batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        if self.trainer.fit_loop.epoch_loop.total_batch_idx > 0:
            optimizer.step()
        optimizer.zero_grad()
        loss = Recorded.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        return loss


class TwoOptimizers(Manual):
    """As a GAN whose second part is stepped at every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()
        first.zero_grad()
        loss = Recorded.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        first.step()
        if (batch_idx + 1) % 2 == 0:
            second.step()
            second.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        parts = self.network[0], self.network[1:]
        return [torch.optim.SGD(part.parameters(), lr=1e-2, momentum=0.9) for part in parts]


@pytest.mark.parametrize("kind", [Manual, StepsFirst, TwoOptimizers])
def test_gradients_that_wait_for_a_step_of_the_modules_own_are_kept(
    kind: type[Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = (INSIDE, "batch-3", VALIDATED, LAST, DONE)
    found = resumed(kind, names, tmp_path, caplog)
    assert found == dict.fromkeys(names, EXACT)


class EveryBatch(Manual):
    every = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.optimizers().zero_grad()
        loss = Recorded.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        self.optimizers().step()
        return loss


def test_gradients_that_a_step_has_used_are_not_saved(tmp_path: Path) -> None:
    train(tmp_path, {}, {"max_epochs": 1}, saves=(INSIDE,), kind=EveryBatch)
    train(tmp_path / "two", {}, {"max_epochs": 1}, saves=("batch-1", INSIDE), kind=TwoOptimizers)
    assert state_of_guard(tmp_path / f"{INSIDE}.ckpt")["ranks"][0]["gradients"] == {}
    assert state_of_guard(tmp_path / "two" / f"{INSIDE}.ckpt")["ranks"][0]["gradients"] == {}
    waiting = state_of_guard(tmp_path / "two" / "batch-1.ckpt")["ranks"][0]["gradients"]
    assert {name.rsplit(".", 1)[0] for name in waiting} == {"network.1", "network.3"}


# Hooks that come after the save


class Follows(Recorded):
    """A second network that follows the first, as in self-distillation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.target = torch.nn.Linear(4, 8).requires_grad_(False)

    def follow(self) -> None:
        self.target.weight.data.lerp_(self.network[0].weight.data, 0.1)


class FollowsBatches(Follows):
    def on_train_batch_end(self, *_: Any) -> None:
        self.follow()


class FollowsValidations(Follows):
    def on_validation_end(self) -> None:
        self.follow()


class FollowsEpochs(Follows):
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.follow()


class Idle(Recorded):
    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing."""

    def on_validation_end(self) -> None:
        pass


class SavesAtEpochs(Callback):
    """Not one of Lightning's `Checkpoint` callbacks, which are called after the module."""

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"early-{trainer.current_epoch + 1}.ckpt")


@pytest.mark.parametrize(
    ("kind", "name", "hook"),
    [
        (FollowsBatches, INSIDE, "on_train_batch_end"),
        (FollowsValidations, VALIDATED, "on_validation_end"),
        (FollowsEpochs, "early-1", "on_train_epoch_end"),
    ],
)
def test_a_hook_of_the_module_that_the_save_came_before_is_said(
    kind: type[Recorded], name: str, hook: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, said = resumed(kind, (name,), tmp_path, caplog, callbacks=lambda: (SavesAtEpochs(),))[name]
    assert any("target" in difference for difference in found)
    assert said == f"not promised: {kind.__name__}.{hook} was to come after the save, and is not called for it"


@pytest.mark.parametrize(
    ("kind", "names"),
    [(FollowsBatches, (VALIDATED, DONE)), (FollowsValidations, (INSIDE, DONE)), (FollowsEpochs, (LAST, DONE))],
)
def test_nothing_is_said_of_a_hook_that_the_save_came_after(
    kind: type[Recorded], names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed(kind, names, tmp_path, caplog) == dict.fromkeys(names, EXACT)


def test_nothing_is_said_of_a_hook_that_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (INSIDE, VALIDATED)
    assert resumed(Idle, names, tmp_path, caplog) == dict.fromkeys(names, EXACT)


# What an epoch's start sets


class FrozenStatistics(Recorded):
    def on_train_epoch_start(self) -> None:
        self.network[1].eval()


class FrozenEverywhere(Recorded):
    def on_train_epoch_start(self) -> None:
        for layer in self.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.eval()


class FrozenLater(Recorded):
    """In a hook that a resume inside the epoch has passed, and that is not said to be lost."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.network[1].eval()
            self.network[2].eval()


@pytest.mark.parametrize("kind", [FrozenStatistics, FrozenEverywhere, FrozenLater])
def test_layers_stay_in_evaluation(kind: type[Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (INSIDE, LAST, VALIDATED, DONE, NEXT)
    assert resumed(kind, names, tmp_path, caplog) == dict.fromkeys(names, EXACT)


class DropsLess(Recorded):
    """In a hook that a resume inside the epoch has passed, and once in a run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 0 and batch_idx == 1:
            self.network[2].p = 0.05


class DropsLessWhenValidated(Recorded):
    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.network[2].p /= 2


@pytest.mark.parametrize("kind", [DropsLess, DropsLessWhenValidated])
def test_options_that_training_changed_are_as_they_were(
    kind: type[Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = (INSIDE, LAST, VALIDATED, DONE, NEXT)
    assert resumed(kind, names, tmp_path, caplog) == dict.fromkeys(names, EXACT)


def test_options_that_training_changed_are_as_they_were_after_a_second_resume(tmp_path: Path) -> None:
    whole = train(tmp_path, {}, {"max_epochs": 3}, saves=(INSIDE,), kind=DropsLess)
    for name, start in ((DONE, INSIDE), ("epoch-2", DONE)):
        again = train(tmp_path, {}, {"max_epochs": 3}, tmp_path / f"{start}.ckpt", saves=(name,), kind=DropsLess)
        assert differences(whole, again) == []


def test_an_option_that_is_set_anew_is_not_what_it_was(tmp_path: Path) -> None:
    class DropsMore(DropsLess):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.network[2].p = 0.7

    train(tmp_path, {}, BOTH, saves=(DONE,), kind=DropsLess)
    again = DropsMore()
    quiet_trainer(tmp_path, CheckpointGuard(), **BOTH).fit(again, ckpt_path=tmp_path / f"{DONE}.ckpt")
    assert again.network[2].p == 0.7


class DropsByEpoch(Recorded):
    def on_train_epoch_start(self) -> None:
        self.network[2].p = 0.1 * (self.current_epoch + 1)


class Sets(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.network[2].p = 0.1 * (trainer.current_epoch + 1)


class Keeps(Sets):
    def state_dict(self) -> dict[str, int]:
        return {"kept": 1}


def test_an_epochs_start_that_is_not_called_again_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = resumed(DropsByEpoch, (INSIDE, DONE), tmp_path, caplog)
    assert found[INSIDE][1] == "not promised: DropsByEpoch.on_train_epoch_start is not called again inside an epoch"
    assert found[DONE] == EXACT


def test_a_callback_that_sets_something_at_an_epochs_start_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = resumed(Recorded, (INSIDE, DONE), tmp_path, caplog, callbacks=lambda: (Sets(), Keeps()))
    assert found[INSIDE][1] == "not promised: Sets.on_train_epoch_start is not called again inside an epoch"
    assert found[DONE][1] == "bit for bit"


# The validation before the first batch


class CountsValidations(Recorded):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("validations", torch.zeros(1))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1


class Checked(Callback):
    def __init__(self) -> None:
        self.checks: list[None] = []
        self.setting: list[int] = []

    def on_sanity_check_end(self, *_: Any) -> None:
        self.checks.append(None)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.setting.append(trainer.num_sanity_val_steps)


def test_a_resumed_run_has_no_validation_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Checked] = []

    def callbacks() -> tuple[Callback, ...]:
        seen.append(Checked())
        return (seen[-1],)

    found = resumed(CountsValidations, (INSIDE, VALIDATED, DONE), tmp_path, caplog, callbacks=callbacks)
    assert found == dict.fromkeys((INSIDE, VALIDATED, DONE), EXACT)
    assert [len(checked.checks) for checked in seen] == [1, 0, 0, 0]
    assert {tuple(checked.setting) for checked in seen} == {(2,)}


# Attributes


class Counts(Recorded):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen, self._scale, self.is_warm = 0, 1.0, False
        self.outputs: list[Tensor] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.best = {"loss": float("inf")}
        self.hidden = [MeanMetric()]
        self.constant, self.names, self.nothing = 3, ["a", "b"], float("nan")
        self.register_buffer("total", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.change(loss.detach())
        return loss

    def change(self, loss: Tensor) -> None:
        raise NotImplementedError


class CountsRows(Counts):
    def change(self, loss: Tensor) -> None:
        self.seen += 4


class CountsAll(Counts):
    def change(self, loss: Tensor) -> None:
        self.seen += 4
        self._scale *= 0.5
        self.is_warm = True
        self.outputs.append(loss)


class HoldsRecent(Counts):
    def change(self, loss: Tensor) -> None:
        self.recent.append(float(loss))


class HoldsBest(Counts):
    def change(self, loss: Tensor) -> None:
        self.best["loss"] = min(self.best["loss"], float(loss))


class HidesMetric(Counts):
    def change(self, loss: Tensor) -> None:
        self.hidden[0].update(loss)


class Totals(Counts):
    def change(self, loss: Tensor) -> None:
        self.total += loss


class TotalsInside(Counts):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner = torch.nn.ModuleList([torch.nn.Identity()])
        self.inner[0].register_buffer("total", torch.zeros(2), persistent=False)

    def change(self, loss: Tensor) -> None:
        self.inner[0].total += loss  # type: ignore[operator]


class FillsLarge(Counts):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("bank", torch.zeros(2**21), persistent=False)

    def change(self, loss: Tensor) -> None:
        self.bank += loss


class SetsAnew(Counts):
    def change(self, loss: Tensor) -> None:
        self.last = float(torch.tensor(0.5))


class CarriesState(Counts):
    """As truncated backpropagation through time does it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hiddens: tuple[Tensor, Tensor] | None = None
        self.center, self.classes, self.phase = torch.zeros(2), np.ones(2), "warming"

    def change(self, loss: Tensor) -> None:
        self.hiddens = (loss, loss)
        self.center = 0.9 * self.center + loss
        self.classes[0] += 1
        self.phase = "training"


class Average:
    """Of weights, and no layer of the module."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.network, self.path = network, "/runs/of another day"

    def update(self) -> None:
        for name, p in self.network.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()


class Averages(Counts):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.average, self.teachers = Average(self.network), [torch.nn.Linear(2, 2)]

    def change(self, loss: Tensor) -> None:
        self.average.update()
        torch.nn.init.constant_(self.teachers[0].bias, float(loss))


class Centred(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center, self.calls, self.kept = torch.zeros(2), 0, torch.nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        self.center = 0.9 * self.center + features.detach().mean(0)[:2]
        return features


class CountsInside(Counts):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network.append(Centred())

    def change(self, loss: Tensor) -> None:
        """Its layer does."""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            CarriesState,
            "self.hiddens had 2 entries and is None, self.center held other values, self.classes held other values, "
            "and 1 more",
        ),
        (Averages, "self.average held other values, self.teachers held other values"),
        (CountsInside, "self.network.4.calls was 4 and is 0, self.network.4.center held other values"),
        (CountsRows, "self.seen was 8 and is 0"),
        (
            CountsAll,
            "self.seen was 8 and is 0, self._scale was 0.25 and is 1.0, self.is_warm was True and is False, and 1 more",
        ),
        (HoldsRecent, "self.recent had 2 entries and has 0"),
        (HoldsBest, "self.best held other values"),
        (HidesMetric, "self.hidden held other values"),
        (Totals, "the buffer total held other values"),
        (TotalsInside, "the buffer inner.0.total held other values"),
        (FillsLarge, "the buffer bank held other values"),
        (SetsAnew, "self.last was 0.5 and is not set"),
    ],
)
def test_attributes_that_no_checkpoint_keeps_are_said(
    kind: type[Recorded], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed(kind, (INSIDE,), tmp_path, caplog)[INSIDE][1] == f"not promised: {said}, which no checkpoint keeps"


class KeepsItself(CountsRows):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]


class SetsAtStart(Counts):
    """What it sets when training starts, after the report's other facts are known, is there in both runs."""

    def on_train_start(self) -> None:
        self.batches = self.trainer.num_training_batches

    def change(self, loss: Tensor) -> None:
        """Nothing."""


class HoldsWhatAStepMade(Counts):
    """A tensor with a graph is of no use to the next step; a path and a network's own weights are no state."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers, self.path = [self.network[0], self.network[3].weight], f"runs/{id(self)}"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.made = super().training_step(batch, batch_idx)
        return self.made

    def change(self, loss: Tensor) -> None:
        """Nothing."""


class Unreadable(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("not now")


class HoldsWhatCannotBeLookedAt(HoldsWhatAStepMade):
    """Its file that is mapped has other numbers in each run, and may have more of them than there is memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with tempfile.TemporaryFile() as file:
            self.mapped = np.memmap(file, np.int64, shape=4)
        self.mapped[:] = id(self)
        self.freed, self.lazy = torch.zeros(8), torch.zeros(2, dtype=torch.complex64).conj()
        self.freed.untyped_storage().resize_(0)
        self.unreadable, self.wide = Unreadable(a=1), np.zeros(2, dtype=np.longdouble)
        self.register_buffer("lazy_buffer", self.lazy, persistent=False)


class ResetsAtStart(KeepsItself):
    def on_train_start(self) -> None:
        self.seen = 0


def test_attributes_that_are_there_again_are_not_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in (KeepsItself, SetsAtStart, HoldsWhatAStepMade, HoldsWhatCannotBeLookedAt):
        assert resumed(kind, (INSIDE, DONE), tmp_path / kind.__name__, caplog) == {INSIDE: EXACT, DONE: EXACT}


def test_attributes_that_training_starts_with_are_compared_after_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = resumed(ResetsAtStart, (INSIDE,), tmp_path, caplog)[INSIDE][1]
    assert said == "not promised: self.seen was 8 and is 0, which no checkpoint keeps"


class DrawsItself(Recorded):
    """With generators of its own, as for noise or for mixing rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.noise, self.mixing = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, *others = batch
        features = features + torch.rand(features.shape, generator=self.noise)
        return super().training_step((features, *others), batch_idx) * float(self.mixing.random())


def test_generators_of_the_modules_own_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resumed(DrawsItself, (INSIDE, DONE), tmp_path, caplog) == {INSIDE: EXACT, DONE: EXACT}


# Metrics that hold more than their states


class Mean(Metric):
    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.count, self.scale = 0, scale

    def update(self, value: Tensor) -> None:
        self.total = self.total + value
        self.count += 1

    def compute(self) -> Tensor:
        return self.scale * self.total / self.count

    def reset(self) -> None:
        super().reset()
        self.count = 0


class Measured(Recorded):
    scale = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.running, self.window, self.own = RunningMean(window=3), RunningSum(window=4), Mean(self.scale)
        self.extremes = MinMaxMetric(MeanMetric())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.running(loss.detach())
        self.window.update(loss.detach())
        self.own(loss.detach())
        self.extremes.update(loss.detach())
        self.log("running", self.running, on_step=True, on_epoch=False)
        self.log("own", self.own, on_step=False, on_epoch=True)
        self.log("window", self.window.compute())
        self.log("lowest", self.extremes.compute()["min"])
        return loss


def test_metrics_that_hold_more_than_their_states_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("batch-1", INSIDE, "batch-5", VALIDATED, DONE, NEXT)
    assert resumed(Measured, names, tmp_path, caplog) == dict.fromkeys(names, EXACT)


class Rescaled(Measured):
    scale = 7


def test_how_a_metric_is_configured_is_the_resuming_runs(tmp_path: Path) -> None:
    whole = train(tmp_path, {}, {"max_epochs": 1}, saves=(INSIDE,), kind=Measured)
    again = train(tmp_path / "again", {}, {"max_epochs": 1}, tmp_path / f"{INSIDE}.ckpt", kind=Rescaled)
    first, second = (next(line["own"] for _, line in run["lines"] if "own" in line) for run in (whole, again))
    assert second == pytest.approx(7 * first)
