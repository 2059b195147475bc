"""A resumed run gets the rows of the run that never stopped, from every kind of loader, or says why it does not."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import edited
from exact_runs import BATCH_SIZE, BATCHES, ROWS, Counting, Recorded, Rows, differences, train
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.checkpoint import Verdict, verify_checkpoint
from enstack_lightning.guard.restart.lost_by_loaders import order_comes_back
from enstack_lightning.guard.training_data import training_data

pytestmark = pytest.mark.filterwarnings("ignore")
INSIDE, LAST, NEXT = "batch-3", f"batch-{BATCHES}", f"batch-{BATCHES + 2}"


class Given(Recorded):
    """A module whose loaders are made by functions of its own."""

    def __init__(self, loader: Callable[[], Any], validation: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.loader, self.validation = loader, validation

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return super().val_dataloader() if self.validation is None else self.validation()


def whole_run(folder: Path, loader: Any, names: tuple[str, ...], validation: Any = None, **trainer: Any) -> Any:
    module = {"loader": loader, "validation": validation}
    return train(folder, module, {"max_epochs": 2, **trainer}, saves=names, kind=Given)


def resumed(
    folder: Path, path: Path, loader: Any, validation: Any = None, saves: tuple[str, ...] = (), **trainer: Any
) -> tuple[Any, str]:
    """What a run that goes on from a checkpoint records, and what it says of loaders before its first batch."""
    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("exact  "):
                said.append(record.getMessage().removeprefix("exact").strip().removeprefix("not promised: "))

    logger, heard = logging.getLogger("lightning.pytorch"), Heard()
    logger.addHandler(heard)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        module = {"loader": loader, "validation": validation}
        run = train(folder, module, {"max_epochs": 2, **trainer}, path, saves=saves, seed=99, kind=Given)
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
    (line,) = said
    reasons = [reason for reason in line.split("; ") if not reason.startswith("self.events")]  # the record itself
    return run, "; ".join(reasons) or "bit for bit"


def stateful(**options: Any) -> Callable[[], Any]:
    """A StatefulDataLoader over rows with noise; options that are functions are called for each loader."""
    return lambda: _loader(StatefulDataLoader, options)


def plain(**options: Any) -> Callable[[], Any]:
    return lambda: _loader(DataLoader, options)


def _loader(kind: Any, options: dict[str, Any]) -> Any:
    made = {name: option() if callable(option) else option for name, option in options.items()}
    size = {} if "batch_sampler" in made else {"batch_size": BATCH_SIZE}
    return kind(made.pop("dataset", None) or Rows(True), **size, **made)


# Iterable data sets


class Stream(IterableDataset):
    """Gives rows one after the other, those of a worker its share, and keeps no position."""

    noise = False

    def order(self) -> list[int]:
        return list(range(ROWS))

    def __iter__(self) -> Iterator[Any]:
        worker, rows = get_worker_info(), Rows(self.noise)
        order = self.order()
        for row in order if worker is None else order[worker.id :: worker.num_workers]:
            yield rows[row]


class Noisy(Stream):
    noise = True


class Shuffled(Stream):
    def order(self) -> list[int]:
        return torch.randperm(ROWS).tolist()


class CountingShort(Counting):
    """Ends inside a batch."""

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(False)
        while self.at < ROWS - 2:
            self.at += 1
            yield rows[self.at - 1]
        self.at = 0


class CountingAnew(Counting):
    """Begins anew when an iterator is asked for its first row."""

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(False)
        self.at = self.at if self.at < ROWS else 0
        while self.at < ROWS:
            self.at += 1
            yield rows[self.at - 1]


class Waiting(Counting):
    """Goes to a position that was loaded when an iterator is asked for its first row."""

    begin = 0

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(False)
        self.at, self.begin = self.begin, 0
        for row in range(self.at, ROWS):
            self.at += 1
            yield rows[row]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


class AtOnce(Waiting):
    """Goes to a position that was loaded when an iterator is made."""

    def __iter__(self) -> Iterator[Any]:
        self.at, self.begin = self.begin, 0
        return map(self._give, range(self.at, ROWS))

    def _give(self, row: int) -> Any:
        self.at += 1
        return Rows(False)[row]


def test_workers_of_an_iterable_data_set_without_a_state_go_on(tmp_path: Path) -> None:
    """It must not be given a state: torchdata passes over batches only where there is none."""
    loader = stateful(dataset=Noisy, num_workers=2)
    whole = whole_run(tmp_path, loader, (INSIDE,))
    again, said = resumed(tmp_path / "1", tmp_path / f"{INSIDE}.ckpt", loader, saves=("batch-5",))
    assert (differences(whole, again), said) == ([], "bit for bit")
    again, said = resumed(tmp_path / "2", tmp_path / "1" / "batch-5.ckpt", loader)
    assert (differences(whole, again), said) == ([], "bit for bit")


@pytest.mark.parametrize("limit", [1.0, BATCHES - 1])
def test_an_iterable_data_set_without_a_state_resumed_at_every_batch(limit: float, tmp_path: Path) -> None:
    loader = stateful(dataset=Stream)
    whole = whole_run(tmp_path, loader, ("batch-1",), limit_train_batches=limit)
    path = tmp_path / "batch-1.ckpt"
    for number in range(2, BATCHES + 2):
        again, said = resumed(
            tmp_path / str(number), path, loader, saves=(f"batch-{number}",), limit_train_batches=limit
        )
        assert (differences(whole, again), said) == ([], "bit for bit"), number
        path = tmp_path / str(number) / f"batch-{number}.ckpt"


def test_a_random_state_that_was_given_to_an_iterable_data_set_is_no_position(tmp_path: Path) -> None:
    """Checkpoints of before hold one, and torchdata would begin the epoch anew."""
    loader = stateful(dataset=Stream, num_workers=1)
    whole = whole_run(tmp_path, loader, (INSIDE,))

    def as_before(checkpoint: dict[str, Any]) -> None:
        (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        for worker in state["_snapshot"]["_worker_snapshots"].values():
            worker["dataset_state"] = {"python": []}

    path = edited(tmp_path / f"{INSIDE}.ckpt", tmp_path / "before.ckpt", as_before)
    again, said = resumed(tmp_path / "again", path, loader)
    assert (differences(whole, again), said) == ([], "bit for bit")


def test_a_worker_that_has_come_to_the_end_gives_no_more(tmp_path: Path) -> None:
    """Its data set is at its beginning again when the last batch is fetched ahead."""
    loader = stateful(dataset=CountingShort, num_workers=1)
    name = f"batch-{BATCHES - 1}"
    whole = whole_run(tmp_path, loader, (name,))
    again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
    assert (differences(whole, again), said) == ([], "bit for bit")


def test_an_order_drawn_while_iterating_is_said(tmp_path: Path) -> None:
    loader = stateful(dataset=Shuffled)
    whole = whole_run(tmp_path, loader, (INSIDE, "epoch-1"))
    again, said = resumed(tmp_path / "1", tmp_path / f"{INSIDE}.ckpt", loader)
    assert differences(whole, again) != []
    assert said.startswith("Shuffled has no state, and drew random numbers while the batches that are done were passed")
    again, said = resumed(tmp_path / "2", tmp_path / "epoch-1.ckpt", loader)
    assert (differences(whole, again), said) == ([], "bit for bit")


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("dataset", [Counting, CountingAnew, Waiting, AtOnce])
def test_the_batch_fetched_ahead_is_not_left_out_of_the_next_epoch(dataset: Any, kind: Any, tmp_path: Path) -> None:
    def loader() -> Any:
        return kind(dataset(), batch_size=BATCH_SIZE)

    names = (*((INSIDE, NEXT) if kind is StatefulDataLoader else ()), LAST, "validation-1", "epoch-1")
    whole = whole_run(tmp_path, loader, names)
    for name in names:
        again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
        assert (differences(whole, again), said) == ([], "bit for bit"), name


# Samplers in a loader with a state


class ByEpoch(Sampler[int]):
    epoch = 0

    def __len__(self) -> int:
        return ROWS

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class RowByRow(ByEpoch):
    """Draws a row when it is asked for it, so that all of its order is as random as the state that is put back."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            yield random.randrange(ROWS)


class Backwards(ByEpoch):
    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS - 1, -1, -1))


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": False},
        {"sampler": lambda: DistributedSampler(range(ROWS), 1, 0)},
        {"sampler": ByEpoch},
        {"sampler": Backwards},
        {"sampler": RowByRow},
        {"batch_sampler": lambda: BatchSampler(SequentialSampler(range(ROWS)), BATCH_SIZE, False)},
    ],
    ids=["shuffle", "in order", "distributed", "by epoch", "backwards", "row by row", "batches in order"],
)
def test_an_order_that_a_loader_with_a_state_gives_again(options: dict[str, Any], tmp_path: Path) -> None:
    loader, names = stateful(**options), (NEXT, LAST, "epoch-1")
    whole = whole_run(tmp_path, loader, names)
    for name in names:
        again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
        assert (differences(whole, again), said) == ([], "bit for bit"), name


class Python(ByEpoch):
    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(ROWS), ROWS))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": lambda: WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)}, "WeightedRandomSampler"),
        ({"sampler": lambda: SubsetRandomSampler(range(ROWS))}, "SubsetRandomSampler"),
        ({"batch_sampler": lambda: BatchSampler(RandomSampler(range(ROWS)), 4, False)}, "BatchSampler"),
        ({"sampler": Python}, "Python"),
    ],
    ids=["weighted", "subset", "batches", "a user's own"],
)
def test_an_order_that_a_loader_with_a_state_draws_anew_is_said(
    options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    whole = whole_run(tmp_path, stateful(**options), (INSIDE, "epoch-1"))
    again, said = resumed(tmp_path / "again", tmp_path / f"{INSIDE}.ckpt", stateful(**options))
    assert differences(whole, again) != []
    assert said.startswith(f"the order of {name} is drawn anew")
    assert said.endswith("a plain DataLoader keeps it")
    again, said = resumed(tmp_path / "again", tmp_path / "epoch-1.ckpt", stateful(**options))
    assert (differences(whole, again), said) == ([], "bit for bit")


def test_asking_a_sampler_twice_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = stateful(sampler=lambda: SubsetRandomSampler(range(ROWS), generator))()
    before = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert not order_comes_back(loader, 0, 3)
    after = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True))


# Loaders that are made anew by epoch


class Numbered(Given):
    """Notes the epoch that its loaders are made in, and takes rows by it."""

    def _made(self, batch_size: int) -> Any:
        features = torch.full((8, 4), float(self.trainer.current_epoch))
        return DataLoader(TensorDataset(features, torch.zeros(8).long(), torch.arange(8)), batch_size)

    def train_dataloader(self) -> Any:
        return self._made(4)

    def val_dataloader(self) -> Any:
        return self._made(8)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_loaders_made_anew_by_epoch_are_made_in_the_same_epochs(every: int, tmp_path: Path) -> None:
    module, trainer = {"loader": None}, {"reload_dataloaders_every_n_epochs": every, "max_epochs": 5}
    names = ("batch-1", "batch-3", "epoch-1", "validation-2", "epoch-2", "epoch-3")
    whole = train(tmp_path, module, trainer, saves=names, kind=Numbered)
    for name in names:
        again = train(tmp_path / "again", module, trainer, tmp_path / f"{name}.ckpt", seed=99, kind=Numbered)
        assert differences(whole, again) == [], name


class Grows(Numbered):
    """Over more rows in each epoch, as one that labels rows between them."""

    def _made(self, batch_size: int) -> Any:
        rows = 8 + 4 * self.trainer.current_epoch
        return DataLoader(TensorDataset(torch.ones(rows, 4), torch.zeros(rows).long(), torch.arange(rows)), batch_size)


def test_data_that_grows_by_epoch_is_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, names = {"reload_dataloaders_every_n_epochs": 1}, ("batch-2", "batch-3", "epoch-2", "batch-7")
    whole = train(tmp_path, {"loader": None}, trainer, saves=names, kind=Grows)
    for name in names:
        path = tmp_path / f"{name}.ckpt"
        assert verify_checkpoint(path).verdict is Verdict.PASS, name
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = train(tmp_path / "again", {"loader": None}, trainer, path, seed=99, kind=Grows)
        assert differences(whole, again) == [], name
        assert "CK910" not in caplog.text, name


# Data


def test_another_part_of_a_data_set_of_a_class_that_is_not_known_is_other_data() -> None:
    def fingerprint(dataset: Any) -> str | None:
        loop = type("Loop", (), {"_combined_loader": type("C", (), {"flattened": [DataLoader(dataset)]})()})()
        return training_data(type("T", (), {"fit_loop": loop, "datamodule": None})()).fingerprint  # type: ignore[arg-type]

    rows = Rows(False)
    assert fingerprint(rows) is None
    assert fingerprint(Subset(rows, [0, 1, 2])) == fingerprint(Subset(Rows(False), [0, 1, 2])) is not None
    assert fingerprint(Subset(rows, [0, 1, 2])) != fingerprint(Subset(rows, [0, 2, 1]))


class Split(LightningDataModule):
    """Splits without a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.part, _ = random_split(Rows(False), [ROWS - 8, 8])


def test_an_unseeded_split_is_said(tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(Split().part, BATCH_SIZE)

    whole_run(tmp_path, loader, ("epoch-1",))
    _, said = resumed(tmp_path / "again", tmp_path / "epoch-1.ckpt", loader)
    assert said == "the data is other data"


# Lasting workers


def test_random_rows_of_lasting_workers_are_said(tmp_path: Path) -> None:
    lasting = {"num_workers": 1, "persistent_workers": True}
    whole = whole_run(tmp_path, plain(shuffle=True, **lasting), ("epoch-1",))
    again, said = resumed(tmp_path / "1", tmp_path / "epoch-1.ckpt", plain(shuffle=True, **lasting))
    assert differences(whole, again) != []
    assert said == "what Rows draws at random in lasting workers is drawn anew, and else all is the same"

    folder, validation = tmp_path / "validation", plain(**lasting)
    whole = whole_run(folder, plain(), (INSIDE,), validation)
    again, said = resumed(folder / "again", folder / f"{INSIDE}.ckpt", plain(), validation, num_sanity_val_steps=0)
    assert differences(whole, again) != []
    assert said == "what Rows draws at random in lasting workers of validation is drawn anew, and else all is the same"


def test_tensors_draw_nothing_in_lasting_workers(tmp_path: Path) -> None:
    def tensors() -> Any:
        rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(rows, (rows.sum(1) > 0).long(), torch.arange(ROWS))

    loader = plain(dataset=tensors, shuffle=True, num_workers=1, persistent_workers=True)
    whole = whole_run(tmp_path, loader, (INSIDE, "epoch-1"), loader)
    for name in (INSIDE, "epoch-1"):
        again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader, loader)
        assert (differences(whole, again), said) == ([], "bit for bit"), name


# Generators and numbers of their own


class ByItself(ByEpoch):
    def __init__(self, own: Any) -> None:
        self.own = own

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        order = list(range(ROWS))
        if isinstance(self.own, torch.Generator):
            return iter(torch.randperm(ROWS, generator=self.own).tolist())
        self.own.shuffle(order)
        return iter(order)


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(4),
    "python": lambda: random.Random(4),
    "numpy": lambda: np.random.default_rng(4),
    "numpy's old": lambda: np.random.RandomState(4),
    "numpy's Mersenne twister": lambda: np.random.Generator(np.random.MT19937(4)),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_sampler_with_a_generator_of_its_own(kind: str, tmp_path: Path) -> None:
    loader = plain(sampler=lambda: ByItself(GENERATORS[kind]()))
    names = (INSIDE, LAST, NEXT, "epoch-1")
    whole = whole_run(tmp_path, loader, names)
    for name in names:
        again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
        assert (differences(whole, again), said) == ([], "bit for bit"), name


class Augmented(Rows):
    """Augments with a generator of its own."""

    def __init__(self) -> None:
        super().__init__(False)
        self.transform = ByItself(np.random.default_rng(2))
        self.own = torch.Generator().manual_seed(2)

    def __getitem__(self, row: int) -> Any:
        features, label, number = super().__getitem__(row)
        return features + self.transform.own.random() + torch.rand(4, generator=self.own), label, number


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [plain, stateful])
def test_a_data_set_with_a_generator_of_its_own(kind: Any, workers: int, tmp_path: Path) -> None:
    loader, names = kind(dataset=Augmented, shuffle=True, num_workers=workers), (INSIDE, LAST, NEXT, "epoch-1")
    whole = whole_run(tmp_path, loader, names)
    for name in names:
        again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
        if "workers of a plain DataLoader" not in said:
            assert (differences(whole, again), said) == ([], "bit for bit"), name


class Rotated(ByEpoch):
    """Begins with another row in every iterator."""

    made = -1

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        self.made += 1
        return iter([(row + self.made) % ROWS for row in range(ROWS)])


class Counted(Rows):
    given, scale = 0, 1.0

    def __getitem__(self, row: int) -> Any:
        self.given += 1
        self.scale = self.scale / 2 if self.given % 7 == 0 else self.scale
        return super().__getitem__(row)


def test_numbers_that_a_sampler_or_a_data_set_counts_are_said(tmp_path: Path) -> None:
    loader = plain(sampler=Rotated, dataset=lambda: Counted(True))
    whole = whole_run(tmp_path, loader, ("epoch-1",))
    again, said = resumed(tmp_path / "again", tmp_path / "epoch-1.ckpt", loader)
    assert differences(whole, again) != []
    assert "Counted.given was 28 and is 0; if rows or their order depend on it they differ" in said
    assert "Counted.scale was 0.0625 and is 1.0" in said
    assert "Rotated.made was " in said


def test_nothing_is_lost_where_nothing_is_left_to_train(tmp_path: Path) -> None:
    loader = plain(sampler=Rotated, num_workers=1, persistent_workers=True)
    name = f"batch-{2 * BATCHES}"
    whole = whole_run(tmp_path, loader, (name,))
    again, said = resumed(tmp_path / "again", tmp_path / f"{name}.ckpt", loader)
    assert (differences(whole, again), said) == ([], "bit for bit")
