"""Lightning's own callbacks go on as in a run that never stopped, or the resume report says what they lose."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, quiet_trainer
from exact_runs import BATCHES, Recorded, Rows, differences, train
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")
Made = Callable[[], Callback]


class OneRate(Recorded):
    """Without a scheduler, as searches for a learning rate want it, and with a backbone to unfreeze."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr = 1e-2
        self.backbone = self.network[:2]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def inside(epoch: int, batch: int = 2) -> str:
    return f"batch-{epoch * BATCHES + batch}"


CASES: dict[str, tuple[type[Recorded], Made, dict[str, Any], tuple[str, ...]]] = {
    "gradient accumulation scheduler": (
        Recorded,
        lambda: GradientAccumulationScheduler({0: 1, 1: 2, 2: 3}),
        {},
        (inside(1, 1), inside(1), inside(2), "epoch-1"),
    ),
    "averaged weights": (
        Recorded,
        WeightAveraging,
        {"val_check_interval": 3},
        (inside(0), "validation-1", inside(1), "epoch-1"),
    ),
    "exponential average": (
        Recorded,
        lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=2, update_starting_at_epoch=1),
        {"accumulate_grad_batches": 2},
        (inside(0, 1), inside(1), "epoch-1", "epoch-2"),
    ),
    "exponential average of parameters alone": (
        Recorded,
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
        {},
        (inside(1), "validation-2"),
    ),
    "stochastic average, its last pass": (
        Recorded,
        lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=3),
        {},
        (inside(2), "epoch-3", inside(3, 1), inside(3), inside(3, BATCHES)),
    ),
    "linear stochastic average, accumulated": (
        OneRate,
        lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=3, annealing_strategy="linear"),
        {"accumulate_grad_batches": 2},
        (inside(2, 1), inside(3), inside(3, 5)),
    ),
    "unfrozen backbone": (
        OneRate,
        lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3),
        {},
        (inside(0), "epoch-1", inside(1), "epoch-2"),
    ),
    "search for a learning rate": (
        OneRate,
        lambda: LearningRateFinder(num_training_steps=30, early_stop_threshold=None),
        {},
        (inside(0), "epoch-1", inside(1)),
    ),
    "search for a batch size": (
        OneRate,
        lambda: BatchSizeFinder(steps_per_trial=1, max_trials=3, init_val=2),
        {},
        ("batch-6", "epoch-1"),
    ),
    "timer without a limit": (Recorded, Timer, {}, (inside(1),)),
    "lambda": (Recorded, lambda: LambdaCallback(on_train_batch_start=lambda *_: torch.rand(1)), {}, (inside(1),)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_callback_goes_on(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, callback, trainer, names = CASES[case]
    whole = train(tmp_path, {}, trainer, callbacks=(callback(),), saves=names, kind=kind)
    for name in names:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(tmp_path / "again", {}, trainer, tmp_path / f"{name}.ckpt", (callback(),), seed=9, kind=kind)
        assert differences(whole, again) == [], name
        assert exactness(caplog) == "bit for bit", name


def exactness(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("exact  ")]
    return line.removeprefix("exact").strip()


def test_resumed_twice_inside_the_last_pass_of_a_stochastic_average(tmp_path: Path) -> None:
    _, callback, trainer, _ = CASES["stochastic average, its last pass"]
    whole = train(tmp_path, {}, trainer, callbacks=(callback(),), saves=(inside(2),))
    path = tmp_path / f"{inside(2)}.ckpt"
    for name in (inside(3), inside(3, 4)):
        train(tmp_path / name, {}, trainer, path, (callback(),), (name,), seed=9)
        path = tmp_path / name / f"{name}.ckpt"
    assert differences(whole, train(tmp_path / "last", {}, trainer, path, (callback(),), seed=9)) == []


class Milestones(LearningRateFinder):
    """Searches when epochs begin, as Lightning's documentation shows it, and not at the start."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=5, early_stop_threshold=None, update_attr=False)
        self.searched: list[int] = []

    def on_fit_start(self, *_: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.searched.append(trainer.current_epoch)


def test_a_search_of_ones_own_at_an_epochs_start_is_made(tmp_path: Path) -> None:
    train(tmp_path, {}, {}, callbacks=(Milestones(),), saves=("epoch-1",), kind=OneRate)
    again = Milestones()
    train(tmp_path / "again", {}, {}, tmp_path / "epoch-1.ckpt", (again,), kind=OneRate)
    assert again.searched == [1, 2]


def test_a_search_changes_the_same_with_the_guard(tmp_path: Path) -> None:
    for case in ("search for a learning rate", "search for a batch size"):
        kind, callback, trainer, _ = CASES[case]
        whole = train(tmp_path, {}, trainer, callbacks=(callback(),), kind=kind)
        alone = train(tmp_path, {}, trainer, callbacks=(callback(),), kind=kind, guard=None)
        assert differences(alone, whole) == []


class LowersRates(Callback):
    """By a count of its own that it does not save, beside a record that steers nothing."""

    def __init__(self) -> None:
        self.batches, self.began, self.losses = 0, 0.0, [0.0]
        self.average: dict[str, Tensor] = {}
        self.noise = torch.Generator().manual_seed(1)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.limit = trainer.max_epochs

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        self.began = time.time()
        self.losses.append(self.began)
        self.average = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        trainer.optimizers[0].param_groups[0]["lr"] *= 1 - float(torch.rand(1, generator=self.noise)) / self.batches


class KeepsWhatIsFound(Callback):
    """The classes that validation finds, and how far the run is on a bar of another package."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.bar = tqdm(file=StringIO())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.bar.update()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.found.append(pl_module.network(batch[0]).argmax(1))


class SavesItself(LowersRates):
    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "average": self.average, "noise": self.noise.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.average = state_dict["batches"], state_dict["average"]
        self.noise.set_state(state_dict["noise"])


def test_what_a_callback_of_the_users_counts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind, said in (
        (
            LowersRates,
            "not promised: LowersRates.batches was 8 and is 0, LowersRates.average had 6 entries and has 0, which no "
            "state_dict of LowersRates keeps",
        ),
        (SavesItself, "bit for bit"),
        (KeepsWhatIsFound, "bit for bit"),
    ):
        folder = tmp_path / kind.__name__
        whole = train(folder, {}, {}, callbacks=(kind(),), saves=(inside(1, 1),), kind=OneRate)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(folder / "again", {}, {}, folder / f"{inside(1, 1)}.ckpt", (kind(),), seed=9, kind=OneRate)
        assert exactness(caplog) == said
        assert (differences(whole, again) == []) is (said == "bit for bit")


class SlowWeights(torch.optim.AdamW):
    """As of Lookahead, without a state of its own."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.slow, self.steps = [p.detach().clone() for p in self.param_groups[0]["params"]], 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(p.detach(), 0.5)
        return loss


class Slow(OneRate):
    def configure_optimizers(self) -> Any:
        optimizer = SlowWeights(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Noisier(LightningDataModule):
    """Without a state for the noise that it lowers."""

    def __init__(self, noise: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.noise, self.pool = noise, [1, 2]

    def setup(self, stage: str) -> None:
        self.rows = Rows(False)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.rows.features, torch.arange(len(self.rows))), batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.noise *= 0.5
        return batch


def test_what_an_optimizer_of_the_users_holds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, {}, {}, saves=(inside(1, 1),), kind=Slow)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, {}, tmp_path / f"{inside(1, 1)}.ckpt", kind=Slow)
    assert exactness(caplog) == (
        "not promised: SlowWeights.steps was 8 and is 0, SlowWeights.slow held other values, which no state_dict of "
        "SlowWeights keeps"
    )


def test_what_a_data_module_holds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, path = TinyModule(), tmp_path / "run.ckpt"
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1)
    trainer.fit(module, datamodule=Noisier())
    trainer.save_checkpoint(path)
    with caplog.at_level(logging.INFO):
        again = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2)
        again.fit(TinyModule(), datamodule=Noisier(), ckpt_path=path)
    said = exactness(caplog)
    assert said.startswith("not promised: Noisier.noise was ")
    assert said.endswith(" and is 1.0, which no state_dict of Noisier keeps")


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: ModelPruning("l1_unstructured", amount=0.3), "ModelPruning saves no masks"),
        (lambda: Timer(timedelta(hours=1)), "Timer ends the run by the clock"),
    ],
    ids=["pruning", "timer"],
)
def test_what_a_callback_loses_is_said(
    callback: Made, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, {}, {}, callbacks=(callback(),), saves=(inside(1),))
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {}, {}, tmp_path / f"{inside(1)}.ckpt", (callback(),))
    assert exactness(caplog).startswith("not promised: ")
    assert said in exactness(caplog)
