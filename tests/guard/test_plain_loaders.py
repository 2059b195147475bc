"""A run with a plain `DataLoader` goes on inside an epoch with the batches that are left of it, or says why not."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact_runs import BATCH_SIZE, BATCHES, ROWS, Recorded, Rows, differences, train
from lightning.pytorch import Callback, Trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.guard import CheckpointGuard
from enstack_lightning.guard.restart.plain_order import KnownOrder, forget_order, know_order

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("batch-3", f"batch-{BATCHES + 2}")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Python(Sampler[int]):
    """Shuffles with NumPy, as many samplers of users do."""

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(ROWS).tolist())


class ByItself(Python):
    """Has a generator that nobody else can see."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(3).permutation

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(ROWS).tolist())


class AtOnce(Sampler[list[int]]):
    """Draws when its iterator is made, and not when that is asked for the first batch."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(ROWS).reshape(BATCHES, BATCH_SIZE).tolist())


class ByEpoch(AtOnce):
    """Shuffles by a number that its user sets."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        by = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(ROWS, generator=by).reshape(BATCHES, BATCH_SIZE).tolist())


ORDERS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "shuffle": lambda rows: {"shuffle": True},
    "shuffle, of a generator": lambda rows: {"shuffle": True, "generator": generator()},
    "in order": lambda rows: {"shuffle": False},
    "with replacement, of a generator": lambda rows: {
        "sampler": RandomSampler(rows, replacement=True, num_samples=ROWS, generator=generator())
    },
    "more than all": lambda rows: {"sampler": RandomSampler(rows, num_samples=ROWS + 8, generator=generator())},
    "a subset": lambda rows: {"sampler": SubsetRandomSampler(range(4, ROWS))},
    "weighted": lambda rows: {"sampler": WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)},
    "distributed": lambda rows: {"sampler": DistributedSampler(rows, num_replicas=1, rank=0, seed=3)},
    "batches": lambda rows: {"batch_sampler": BatchSampler(RandomSampler(rows), 5, drop_last=True)},
    "batches in order": lambda rows: {"batch_sampler": BatchSampler(SequentialSampler(rows), 5, drop_last=False)},
    "batches, of a generator": lambda rows: {
        "batch_sampler": BatchSampler(RandomSampler(rows, generator=generator()), 5, drop_last=True)
    },
    "batches, drawn at once": lambda rows: {"batch_sampler": AtOnce()},
    "batches by an epoch that nobody sets": lambda rows: {"batch_sampler": ByEpoch()},
    "a user's own": lambda rows: {"sampler": Python()},
    "2 workers": lambda rows: {"shuffle": True, "num_workers": 2},
    "2 lasting workers, of a generator": lambda rows: {
        "shuffle": True,
        "num_workers": 2,
        "persistent_workers": True,
        "generator": generator(),
    },
    "by itself": lambda rows: {"sampler": ByItself()},
}


class Loaded(Recorded):
    """A module whose loader is made with options of its own.

    Args:
        loader: the name of its order.
        early: whether the loader is made before the loops are restored, as schedules of a given length have it.
    """

    def __init__(self, loader: str, early: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.loader, self.early = loader, early

    def configure_optimizers(self) -> Any:
        if self.early:
            assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def train_dataloader(self) -> DataLoader[Any]:
        rows = Rows(self.noise)
        options = ORDERS[self.loader](rows)
        return DataLoader(rows, **({} if "batch_sampler" in options else {"batch_size": self.batch_size}), **options)


def exactness(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("exact  ")]
    return line.removeprefix("exact").strip()


@pytest.mark.parametrize("loader", [name for name in ORDERS if name != "by itself"])
def test_a_plain_loader_goes_on_inside_an_epoch(loader: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workers = "workers" in loader
    module, trainer = {"loader": loader, "noise": not workers}, {"max_epochs": 2}
    whole = train(tmp_path, module, trainer, saves=NAMES, kind=Loaded)
    for name in NAMES:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(tmp_path / "again", module, trainer, tmp_path / f"{name}.ckpt", seed=9, kind=Loaded)
        assert differences(whole, again) == [], name
        said = exactness(caplog)
        assert ("workers of a plain DataLoader is drawn anew" in said) if workers else said == "bit for bit"


@pytest.mark.parametrize(
    "trainer",
    [
        {"accumulate_grad_batches": 3, "val_check_interval": 2},
        {"limit_train_batches": 5},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=["accumulated", "limited", "reloaded"],
)
def test_resumed_three_times(trainer: dict[str, Any], tmp_path: Path) -> None:
    module, trainer = {"loader": "shuffle", "noise": True}, {**trainer, "max_epochs": 2}
    whole = train(tmp_path / "0", module, trainer, saves=("batch-1",), kind=Loaded)
    path = tmp_path / "0" / "batch-1.ckpt"
    for number, name in enumerate(("batch-2", "batch-4", "batch-8")):
        train(tmp_path / str(number), module, trainer, path, saves=(name,), seed=50 + number, kind=Loaded)
        path = tmp_path / str(number) / f"{name}.ckpt"
    assert differences(whole, train(tmp_path / "last", module, trainer, path, seed=9, kind=Loaded)) == []


@pytest.mark.parametrize("trainer", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=["once", "reloaded"])
def test_a_loader_that_is_made_before_the_loops_are_restored(trainer: dict[str, Any], tmp_path: Path) -> None:
    module = {"loader": "shuffle", "noise": True, "early": True}
    whole = train(tmp_path, module, trainer, saves=NAMES, kind=Loaded)
    for name in NAMES:
        again = train(tmp_path / "a", module, trainer, tmp_path / f"{name}.ckpt", seed=9, kind=Loaded)
        assert differences(whole, again) == []


class SetsEpoch(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.train_dataloader.batch_sampler.set_epoch(trainer.current_epoch)


def test_an_epoch_that_the_user_sets(tmp_path: Path) -> None:
    module = {"loader": "batches by an epoch that nobody sets"}
    whole = train(tmp_path, module, {}, saves=NAMES, kind=Loaded, callbacks=(SetsEpoch(),))
    path = tmp_path / f"{NAMES[1]}.ckpt"
    assert differences(whole, train(tmp_path / "a", module, {}, path, (SetsEpoch(),), seed=9, kind=Loaded)) == []


class Shared(Recorded):
    """Trains with a loader that may have been used before, and validates with the same one if told so."""

    def __init__(self, loader: DataLoader[Any], validates: bool = False) -> None:
        super().__init__()
        self.loader, self.validates = loader, validates

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.loader if self.validates else super().val_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_one_loader_that_trains_and_validates(workers: int, tmp_path: Path) -> None:
    """The validation that is due after a resume inside an epoch must not take what is left of it."""

    def module() -> dict[str, Any]:
        loader = DataLoader(Rows(False), batch_size=4, shuffle=True, num_workers=workers)
        return {"loader": loader, "validates": True}

    inside = {"max_epochs": 2, "val_check_interval": 3}
    whole = train(tmp_path, module(), inside, saves=("batch-3", "validation-1"), kind=Shared)
    for name in ("batch-3", "validation-1"):
        path = tmp_path / f"{name}.ckpt"
        assert differences(whole, train(tmp_path / "a", module(), inside, path, seed=9, kind=Shared)) == []


class Fails(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        raise Stopped


def test_a_resume_that_fails_leaves_nothing_to_the_next_fit(tmp_path: Path) -> None:
    """Else the first epoch of that would be what was left of the other run's."""
    loader = DataLoader(Rows(False), batch_size=4, shuffle=True)
    train(tmp_path, {"loader": loader}, {"max_epochs": 1}, saves=("batch-3",), kind=Shared)
    with pytest.raises(Stopped):
        train(tmp_path / "a", {"loader": loader}, {}, tmp_path / "batch-3.ckpt", (Fails(),), kind=Shared)
    assert sorted(rows_of(train(tmp_path / "b", {"loader": loader}, {"max_epochs": 1}, kind=Shared))) == [*range(ROWS)]


def test_lasting_workers_that_ran_before_the_fit_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They ask the sampler that they were made with, and no other."""

    def loader() -> DataLoader[Any]:
        return DataLoader(Rows(False), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)

    train(tmp_path, {"loader": loader()}, {"max_epochs": 1}, saves=("batch-3",), kind=Shared)
    used = loader()
    next(iter(used))
    with caplog.at_level(logging.INFO):
        train(tmp_path / "a", {"loader": used}, {"max_epochs": 1}, tmp_path / "batch-3.ckpt", kind=Shared)
    assert "the loader gives other batches than before" in exactness(caplog)


class WithoutLength(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        yield from torch.randperm(ROWS).reshape(BATCHES, BATCH_SIZE).tolist()


def test_the_batch_that_is_fetched_ahead_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lightning fetches one ahead of a loader whose length it does not know."""

    def module() -> dict[str, Any]:
        return {"loader": DataLoader(Rows(False), batch_sampler=WithoutLength())}

    whole = train(tmp_path, module(), {"max_epochs": 2}, saves=NAMES, kind=Shared)
    for name in NAMES:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(tmp_path / "a", module(), {"max_epochs": 2}, tmp_path / f"{name}.ckpt", seed=9, kind=Shared)
        assert differences(whole, again) == []
        assert "for the batch that Lightning fetches ahead is drawn anew" in exactness(caplog)


class Two(Loaded):
    """Two loaders, of which the other keeps its position."""

    def train_dataloader(self) -> Any:
        return [super().train_dataloader(), StatefulDataLoader(Rows(False), batch_size=BATCH_SIZE)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


def test_a_plain_loader_beside_one_that_keeps_its_position_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, {"loader": "shuffle"}, {"max_epochs": 1}, saves=("batch-3",), kind=Two)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "a", {"loader": "shuffle"}, {"max_epochs": 1}, tmp_path / "batch-3.ckpt", kind=Two)
    assert "3 batches are trained twice, since the loader's position is not in the checkpoint" in exactness(caplog)


class Halves(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.train_dataloader.batch_sampler.batch_size = BATCH_SIZE // (1 + trainer.current_epoch)


def test_what_a_callback_sets_on_the_batch_sampler_holds(tmp_path: Path) -> None:
    run = train(tmp_path, {"loader": "shuffle"}, {"max_epochs": 2}, callbacks=(Halves(),), kind=Loaded)
    sizes = {(event[1], len(event[4])) for event in run["events"] if event[0] == "step"}
    assert sizes == {(0, BATCH_SIZE), (1, BATCH_SIZE // 2)}


def test_a_copy_of_a_known_loader_has_the_users_sampler() -> None:
    loader = DataLoader(Rows(False), batch_size=4)
    know_order(loader)
    assert type(copy.deepcopy(loader).batch_sampler) is BatchSampler


@pytest.mark.parametrize("order", ["in order", "batches, drawn at once"])
def test_the_guard_changes_no_order(order: str, tmp_path: Path) -> None:
    with_guard, without = (
        train(tmp_path / str(guard), {"loader": order}, {"max_epochs": 2}, kind=Loaded, guard=guard)
        for guard in ("default", None)
    )
    assert differences({**without, "begins": [0, 0]}, {**with_guard, "begins": [0, 0]}) == []


def rows_of(run: dict[str, Any], epoch: int = 0) -> list[int]:
    return [row for event in run["events"] if event[0] == "step" and event[1] == epoch for row in event[4]]


def test_an_order_that_is_not_the_same_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such a sampler's generator can be neither saved nor set: its second order is not its first."""
    train(tmp_path, {"loader": "by itself"}, {"max_epochs": 2}, saves=(NAMES[1],), kind=Loaded)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "again", {"loader": "by itself"}, {}, tmp_path / f"{NAMES[1]}.ckpt", kind=Loaded)
    assert "2 batches are trained twice, since the loader gives other batches than before" in exactness(caplog)


def test_batches_of_another_size_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, {"loader": "shuffle"}, {"max_epochs": 1}, saves=("batch-3",), kind=Loaded)
    with caplog.at_level(logging.INFO):
        train(
            tmp_path, {"loader": "shuffle", "batch_size": 2}, {"max_epochs": 1}, tmp_path / "batch-3.ckpt", kind=Loaded
        )
    assert "the loader gives other batches than before" in exactness(caplog)


def test_lightnings_warning_is_silenced_where_it_is_not_so_and_nowhere_else(tmp_path: Path) -> None:
    def said(guard: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            filters = list(warnings.filters)
            train(tmp_path / "a", {"loader": "shuffle"}, {"max_epochs": 1}, path, kind=Loaded, guard=guard)
            assert warnings.filters == filters
        return [str(w.message) for w in caught if "dataloader is not resumable" in str(w.message)]

    train(tmp_path, {"loader": "shuffle"}, {"max_epochs": 1}, saves=("batch-3",), kind=Loaded)
    path = tmp_path / "batch-3.ckpt"
    assert said("default") == []
    assert said(None)


class Stopped(Exception):
    pass


class Stops(Loaded):
    """Ends in the middle of a batch, once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.ckpt_path is None and self.global_step == 3:
            raise Stopped
        return super().training_step(batch, batch_idx)


def test_after_an_exception_inside_a_step_each_row_is_trained_once(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    saves = OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(Stopped):
        train(tmp_path, {"loader": "shuffle"}, {}, callbacks=(saves,), kind=Stops)
    again = train(tmp_path / "a", {"loader": "shuffle"}, {}, tmp_path / "stopped.ckpt", seed=9, kind=Stops)
    assert len(rows_of(again)) == ROWS - 3 * BATCH_SIZE
    assert len(set(rows_of(again))) == ROWS - 3 * BATCH_SIZE
    assert sorted(rows_of(again, 1)) == list(range(ROWS))


def test_a_loader_is_its_users_again_after_the_fit(tmp_path: Path) -> None:
    loader = DataLoader(Rows(False), batch_size=4, shuffle=True)
    own = loader.batch_sampler
    run = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[CheckpointGuard()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    run.fit(Recorded(), train_dataloaders=loader)
    assert loader.batch_sampler is own


def test_the_same_batches_come_and_nothing_else_is_drawn() -> None:
    def drawn(known: bool) -> tuple[list[Any], torch.Tensor]:
        torch.manual_seed(0)
        loader = DataLoader(Rows(False), batch_size=4, shuffle=True)
        if known:
            know_order(loader)
            assert isinstance(loader.batch_sampler, KnownOrder)
        rows = [batch[2].tolist() for _ in range(2) for batch in loader]
        forget_order(loader)
        return rows, torch.get_rng_state()

    (plain, state), (known, state_known) = drawn(False), drawn(True)
    assert known == plain
    assert torch.equal(state, state_known)
