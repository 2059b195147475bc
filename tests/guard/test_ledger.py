"""The sample ledger: what it holds after restarts of every kind is what the weights were trained with."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BATCH_SIZE, ROWS, TinyModule, every_epoch, every_step, flip_bit, quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from enstack_lightning import CheckpointGuard, SampleLedger
from enstack_lightning.checkpoint.ledger import LedgerReport, read_ledger
from enstack_lightning.checkpoint.ledger_file import (
    _EPOCH_END,
    MAGIC,
    MAX_JSON_BYTES,
    MAX_ROW,
    STEPPED,
    Batch,
    Encoder,
    EpochEnd,
    Header,
    LedgerDefectError,
    Loader,
    Tail,
    pack_rows,
    read_records,
    unpack_rows,
)
from enstack_lightning.errors import CheckpointNotFoundError
from enstack_lightning.guard.ledger import _LedgerFile, _Rows

HEADER = Header("0123456789abcdef", 1, "2026-01-31T12:00:00Z", 0, 1)
LOADER = Loader(rows=8, batches=2, planned_rows=8, sampler="RandomSampler")


def fit(folder: Path, *callbacks: Callback, module: LightningModule | None = None, **options: Any) -> LightningModule:
    """A run with guard and ledger, and any more callbacks; `ckpt_path` is one of the options."""
    module = module or TinyModule()
    path = options.pop("ckpt_path", None)
    quiet_trainer(folder, CheckpointGuard(), SampleLedger(rows=1), *callbacks, **options).fit(module, ckpt_path=path)
    return module


def rows_of(report: LedgerReport, start: int = 1, rank: int = 0) -> list[list[int] | None]:
    """The rows of each batch in the file of a start."""
    records = read_records(report.folder / f"start-{start:04}-rank-{rank}.ledger")
    return [record.rows() for record in records if isinstance(record, Batch)]


def assert_exact(report: LedgerReport, epochs: int) -> None:
    assert report.verdict == "pass", (report.problems, report.epochs)
    assert [epoch.state for epoch in report.epochs] == ["complete"] * epochs
    assert {(epoch.rows, epoch.uses, epoch.notes) for epoch in report.epochs} == {(ROWS, ROWS, ())}


# The file


def some_file(path: Path) -> list[Any]:
    """A file of five batches, and its records."""
    encoder = Encoder()
    parts = [encoder.begin(HEADER), encoder.loader(LOADER)]
    batches = [(0, 0, 0, 0), (0, 1, 1, STEPPED), (1, 0, 2, STEPPED), (3, 7, 100, 0), (3, 8, 101, STEPPED)]
    for number, (epoch, batch, step, flags) in enumerate(batches):
        rows = [number, 1_000 * number, 7, MAX_ROW] if number != 3 else None
        parts.append(encoder.batch(epoch, batch, step, flags, rows, 4))
    path.write_bytes(b"".join([*parts, encoder.epoch_end(3)]))
    return list(read_records(path))


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    header, loader, *batches, end = some_file(tmp_path / "a.ledger")
    assert (header, loader, end) == (HEADER, LOADER, EpochEnd(3))
    assert [(b.epoch, b.batch, b.global_step, b.stepped, b.num_rows) for b in batches] == [
        (0, 0, 0, False, 4),
        (0, 1, 1, True, 4),
        (1, 0, 2, True, 4),
        (3, 7, 100, False, 4),
        (3, 8, 101, True, 4),
    ]
    assert [b.rows() for b in batches] == [sorted([n, 1_000 * n, 7, MAX_ROW]) if n != 3 else None for n in range(5)]


def test_rows_come_back_whatever_they_are() -> None:
    chance = random.Random(3)
    for _ in range(2_000):
        top = 2 ** chance.randint(0, 63) - 1
        rows = [chance.randint(0, top) for _ in range(chance.randint(1, 40))]
        assert unpack_rows(pack_rows(rows), len(rows)) == sorted(rows)


def test_a_row_costs_less_than_two_bytes() -> None:
    chance = random.Random(3)
    encoder = Encoder()
    encoder.batch(0, 0, 1, STEPPED, [0], 1)
    sizes = [len(encoder.batch(0, n, n + 1, STEPPED, chance.sample(range(20_000), 16), 16)) for n in range(1, 1_000)]
    assert sum(sizes) / len(sizes) / 16 < 2.2
    assert max(sizes) < 48


def test_a_start_inside_a_file_and_a_description_without_end_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    for damage, what in (
        (lambda e: e.begin(HEADER).removeprefix(MAGIC), "no start stands at its beginning, and only there"),
        (lambda e: e._record(_EPOCH_END, b"\x01\x02"), "a record is longer than what it says"),
        (lambda e: e.loader(replace(LOADER, sampler="x" * MAX_JSON_BYTES)), "a description has 65,"),
    ):
        encoder = Encoder()
        path.write_bytes(encoder.begin(HEADER) + damage(encoder))
        _, tail = read_records(path)
        assert isinstance(tail, Tail)
        assert tail.damage.startswith(what)


def test_a_torn_file_holds_all_records_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    whole = some_file(path)
    content = path.read_bytes()
    begun = len(Encoder().begin(HEADER))
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < begun:
            with pytest.raises(LedgerDefectError, match="is empty"):
                list(read_records(path))
            continue
        records = list(read_records(path))
        assert [r for r in records if not isinstance(r, Tail)] == whole[: len(records) - isinstance(records[-1], Tail)]
        assert not isinstance(records[-1], Tail) or not records[-1].damage
    path.write_bytes(content + bytes(5_000))  # the machine went down: the length was on the disk, the bytes were not
    assert list(read_records(path)) == [*whole, Tail(len(content), "")]


def test_no_flipped_bit_shows_other_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    whole = some_file(path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content)
        flip_bit(path, at, at % 8)
        try:
            *records, tail = read_records(path)
        except LedgerDefectError:
            continue
        assert isinstance(tail, Tail)
        assert records == whole[: len(records)]


@pytest.mark.parametrize(
    "junk",
    [b"\x84" + b"\xff" * 12, b"\x84\xff\xff\xff\x7f", b"H\x02{}", b"\x84\x05" + b"\xff\xff\xff\xff\x0f", b"Z\x00"],
)
def test_hostile_ends_are_damage_and_cost_nothing(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    whole = some_file(path)
    path.write_bytes(path.read_bytes() + junk + bytes(range(1, 100)))
    *records, tail = read_records(path)
    assert records == whole
    assert isinstance(tail, Tail)
    assert tail.damage


# Runs that are not interrupted


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_it_holds_the_rows_of_every_batch(accumulated: int, tmp_path: Path) -> None:
    module = fit(tmp_path, every_epoch(tmp_path), accumulate_grad_batches=accumulated)
    assert isinstance(module, TinyModule)
    report = read_ledger(tmp_path)
    assert_exact(report, epochs=3)
    assert rows_of(report) == [sorted(rows) for rows in module.rows]
    assert report.starts[0].num_rolled_back == 0


class Plain(TinyModule):
    """Takes its batches from a plain DataLoader with the given options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loader_options = {"batch_size": BATCH_SIZE, "shuffle": True, **options}

    def train_dataloader(self) -> Any:
        rows = TensorDataset(torch.ones(ROWS, 4), torch.arange(ROWS))
        return DataLoader(rows, **self.loader_options)


def test_rows_left_out_by_design_are_named_as_such(tmp_path: Path) -> None:
    fit(tmp_path / "a", module=Plain(batch_size=6, drop_last=True), max_epochs=1)
    report = read_ledger(tmp_path / "a")
    assert (report.verdict, report.epochs[0].notes) == ("pass", ("2 rows left out by drop_last",))
    assert report.epochs[0].num_missing == 2
    fit(tmp_path / "b", max_epochs=2, limit_train_batches=3)
    report = read_ledger(tmp_path / "b")
    assert report.verdict == "pass"
    assert [epoch.notes for epoch in report.epochs] == [("8 rows left out by limit_train_batches",)] * 2


def test_a_sampler_that_repeats_rows_on_purpose_is_not_blamed(tmp_path: Path) -> None:
    sampler = RandomSampler(range(ROWS), replacement=True, generator=torch.Generator().manual_seed(1))
    fit(tmp_path, module=Plain(shuffle=False, sampler=sampler), max_epochs=1)
    report = read_ledger(tmp_path)
    assert report.verdict == "pass"
    assert report.epochs[0].notes == ("RandomSampler draws with replacement: rows may repeat and be missing",)
    assert report.epochs[0].num_repeated > 0


def test_rows_that_are_ids_with_gaps_are_counted(tmp_path: Path) -> None:
    class Ids(Plain):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(ROWS, 4), torch.arange(ROWS) * 1_000 + 7), batch_size=BATCH_SIZE)

    fit(tmp_path, module=Ids(), max_epochs=2)
    assert_exact(read_ledger(tmp_path), epochs=2)


def test_a_batch_that_does_not_say_its_rows_is_only_counted(tmp_path: Path) -> None:
    ledger = SampleLedger()  # looks for batch["idx"], and the batches are tuples
    with pytest.warns(UserWarning, match="only counts batches: a batch has no 'idx'") as warned:
        quiet_trainer(tmp_path, ledger, max_epochs=2).fit(TinyModule())
    assert sum("only counts" in str(w.message) for w in warned) == 1
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    assert [epoch.faults for epoch in report.epochs] == [("the rows of 5 batches were not recorded",)] * 2


def test_a_batch_without_a_loss_was_not_trained(tmp_path: Path) -> None:
    class Skips(TinyModule):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch)

    module = fit(tmp_path, module=Skips(), max_epochs=1)
    assert isinstance(module, TinyModule)
    (epoch,) = read_ledger(tmp_path).epochs
    assert epoch.faults == ("training_step gave no loss for 4 rows", "4 rows not used")
    assert set(epoch.missing) == {*range(ROWS)} - {row for rows in module.rows for row in rows}


def test_a_ledger_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file")
    with pytest.warns(UserWarning, match=r"SampleLedger cannot write .*training goes on without it"):
        fit(tmp_path, max_epochs=1)
    with pytest.raises(CheckpointNotFoundError, match="holds no sample ledger"):
        read_ledger(tmp_path)


def test_a_data_set_whose_length_raises_stops_no_run(tmp_path: Path) -> None:
    class OfNoLength(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            raise RuntimeError("nobody knows")

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            return torch.ones(4), torch.tensor(row)

    class Reads(TinyModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(OfNoLength(), batch_sampler=[[0, 1], [2, 3]])

    quiet_trainer(tmp_path, SampleLedger(rows=1), max_epochs=1).fit(Reads())
    (epoch,) = read_ledger(tmp_path).epochs
    assert (epoch.batches, epoch.rows) == (2, 4)


def test_trying_a_run_out_leaves_no_ledger(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, SampleLedger(rows=1), fast_dev_run=True).fit(TinyModule())
    assert not (tmp_path / "ledger").exists()


def test_rows_on_an_accelerator_are_not_waited_for() -> None:
    class Arrives:
        arrived = False

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            self.arrived = True

    rows = _Rows(None, torch.tensor([[3, 1], [2, 9]]), Arrives())
    assert (rows.here(), rows.count) == (False, 4)
    assert rows.numbers() == [3, 1, 2, 9]


def test_rows_on_an_accelerator_that_failed_do_not_hide_its_error() -> None:
    class Fails:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

    rows = _Rows(None, torch.tensor([3, 1]), Fails())
    assert (rows.numbers(), rows.count) == (None, 2)


def test_a_disk_that_fails_in_the_background_closes_no_file_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = _LedgerFile(tmp_path, HEADER)
    monkeypatch.setattr(os, "fsync", fails)
    file.sync()
    assert file._syncing is not None
    file._syncing.join()
    os.fstat(file._fd)
    with pytest.warns(UserWarning, match=r"cannot write .*Input/output error.*training goes on without it") as warned:
        file.close()
    assert len(warned) == 1
    file.append(b"after that nothing is written")


# Restarts


def test_what_a_kill_rolls_back_is_told_from_what_counts(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_steps=8)
    fit(tmp_path, every_step(tmp_path / "b"), ckpt_path=tmp_path / "step=6.ckpt")
    report = read_ledger(tmp_path)
    assert_exact(report, epochs=3)
    first, second = report.starts
    assert (first.batches, first.num_rolled_back, first.trained_again) == (8, 2, 2)
    assert first.rolled_back is not None
    assert [tuple(position) for position in first.rolled_back] == [(1, 1, 6), (1, 2, 7)]
    assert second.first is not None
    assert (tuple(second.first), second.header.checkpoint) == ((1, 1, 6), str(tmp_path / "step=6.ckpt"))
    assert [epoch.starts for epoch in report.epochs] == [(1,), (1, 2), (2,)]


def test_a_run_is_followed_over_any_number_of_restarts_and_back_to_older_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path / "1"), max_steps=7)
    fit(tmp_path, every_step(tmp_path / "2"), max_steps=9, ckpt_path=tmp_path / "1" / "step=6.ckpt")
    fit(tmp_path, every_step(tmp_path / "3"), max_steps=12, ckpt_path=tmp_path / "1" / "step=3.ckpt")
    fit(tmp_path, ckpt_path=tmp_path / "3" / "step=11.ckpt")
    report = read_ledger(tmp_path)
    assert_exact(report, epochs=3)
    assert [(start.batches, start.kept) for start in report.starts] == [(7, 3), (3, 0), (9, 8), (4, 4)]


def test_a_fresh_start_rolls_back_everything(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=3)
    fit(tmp_path)
    report = read_ledger(tmp_path)
    assert_exact(report, epochs=3)
    assert [(start.batches, start.kept, start.trained_again) for start in report.starts] == [(3, 0, 3), (15, 15, 0)]


def test_a_shuffled_loader_that_cannot_be_resumed_is_caught(tmp_path: Path) -> None:
    def plain(**options: Any) -> Plain:
        module = Plain()
        path = options.pop("ckpt_path", None)
        saves = every_step(tmp_path)
        quiet_trainer(tmp_path, SampleLedger(rows=1), saves, **options).fit(module, ckpt_path=path)
        return module

    before = plain(max_steps=8)
    after = plain(max_epochs=3, ckpt_path=tmp_path / "step=8.ckpt")
    used = [row for rows in [*before.rows[5:8], *after.rows[: len(after.rows) - 5]] for row in rows]
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    good, bad = report.epochs[0], report.epochs[1]
    assert not good.faults
    assert set(bad.missing) == {*range(ROWS)} - set(used)
    assert {row for row, _ in bad.repeated} == {row for row in used if used.count(row) > 1}
    assert bad.num_missing == len(bad.missing) > 0
    assert bad.starts == (1, 2)


def test_a_checkpoint_that_was_saved_without_a_ledger_is_a_problem(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), max_steps=6).fit(TinyModule())
    fit(tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    assert "at step 6, which was saved without a ledger" in report.problems[0]


def test_a_ledger_of_another_folder_is_a_problem(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_steps=6)
    fit(tmp_path / "other", ckpt_path=tmp_path / "step=6.ckpt")
    report = read_ledger(tmp_path / "other")
    assert report.verdict == "fail"
    assert "saved by a start whose files are not here" in report.problems[0]


def test_a_ledger_that_lost_what_a_checkpoint_contains_is_a_problem(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_steps=6)
    fit(tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    path = tmp_path / "ledger" / "start-0001-rank-0.ledger"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    assert "start 1, rank 0: 2 batches that its checkpoint contains are not recorded" in report.problems
    path.write_bytes(content[:-40] + b"\x84" + content[-39:])
    assert any("is damaged at byte" in problem for problem in read_ledger(tmp_path).problems)


def test_damage_to_what_was_rolled_back_does_no_harm(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), max_steps=8)
    fit(tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    path = tmp_path / "ledger" / "start-0001-rank-0.ledger"
    flip_bit(path, path.stat().st_size - 3, 1)
    report = read_ledger(tmp_path)
    assert_exact(report, epochs=3)
    assert "is damaged at byte" in report.starts[0].notes[0]


class SavesEarly(Callback):
    """Saves before the ledger has heard that a batch is done."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"early-{trainer.global_step}.ckpt")


def test_a_batch_that_is_in_the_weights_counts_whenever_the_checkpoint_is_saved(tmp_path: Path) -> None:
    def trainer(*callbacks: Callback, **options: Any) -> Trainer:
        return quiet_trainer(tmp_path, *callbacks, CheckpointGuard(), SampleLedger(rows=1), **options)

    trainer(SavesEarly(), max_steps=7).fit(TinyModule())
    trainer().fit(TinyModule(), ckpt_path=tmp_path / "early-7.ckpt")
    report = read_ledger(tmp_path)
    assert [(start.batches, start.kept) for start in report.starts] == [(7, 7), (8, 8)]
    assert_exact(report, epochs=3)


@pytest.mark.parametrize("guarded", [True, False])
def test_gradients_that_a_restart_loses_are_rows_that_were_not_trained(guarded: bool, tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        callbacks = [CheckpointGuard()] if guarded else []
        return quiet_trainer(
            tmp_path, *callbacks, SampleLedger(rows=1), SavesBatches(), accumulate_grad_batches=2, **options
        )

    trainer(max_epochs=1).fit(TinyModule())
    trainer(max_epochs=2).fit(TinyModule(), ckpt_path=tmp_path / "batch-2.ckpt")
    report = read_ledger(tmp_path)
    assert report.starts[0].kept == 3
    if guarded:
        assert_exact(report, epochs=2)
    else:
        assert report.verdict == "fail"
        assert report.epochs[0].faults == (
            "gradients of 4 rows (batch 2) were lost in a restart between two optimizer steps",
            "4 rows not used",
        )
        assert sorted(report.epochs[0].missing) == rows_of(report)[2]


class SavesBatches(Callback):
    """Saves after every batch, also inside an accumulation window."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"batch-{batch_idx}.ckpt")


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), SampleLedger(rows=1), max_epochs=1)
    module = TinyModule()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)
    report = read_ledger(tmp_path)
    assert [start.kept for start in report.starts] == [5, 10]
    assert_exact(report, epochs=3)


def test_an_epoch_that_is_trained_twice_is_caught(tmp_path: Path) -> None:
    write(tmp_path, [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (1, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (0, [0, 1, 2, 3])])
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    assert report.epochs[2].faults == ("it was complete before, and was trained again",)


def write(folder: Path, batches: list[tuple[int, list[int]]], header: Header = HEADER, loader: Loader = LOADER) -> None:
    """A file of the given batches; every batch is a step."""
    encoder = Encoder()
    parts = [encoder.begin(header), encoder.loader(loader)]
    places: dict[int, int] = {}
    for step, (epoch, rows) in enumerate(batches, start=1):
        place = places[epoch] = places.get(epoch, -1) + 1
        parts.append(encoder.batch(epoch, place, step, STEPPED, rows, len(rows)))
    (folder / "ledger").mkdir(exist_ok=True)
    (folder / "ledger" / f"start-{header.start:04}-rank-{header.rank}.ledger").write_bytes(b"".join(parts))


def test_an_epoch_that_was_cut_short_names_what_it_left_out(tmp_path: Path) -> None:
    write(tmp_path, [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [0, 1, 2, 0])])
    report = read_ledger(tmp_path)
    assert [(epoch.state, epoch.missing, epoch.repeated) for epoch in report.epochs] == [
        ("cut short", (4, 5, 6, 7), ()),
        ("complete", (), ()),
        ("in progress", (), ((0, 2),)),
    ]
    assert [bool(epoch.faults) for epoch in report.epochs] == [True, False, True]


# Several processes


def test_the_files_of_all_processes_are_one_epoch(tmp_path: Path) -> None:
    loader = replace(LOADER, rows=7, planned_rows=4)
    shares = [[0, 1, 2, 3], [4, 5, 6, 0]]  # eight places for seven rows: one is used twice by design
    for rank, rows in enumerate(shares):
        header = replace(HEADER, rank=rank, world_size=2)
        write(tmp_path, [(0, rows[:2]), (0, rows[2:])], header, loader)
    report = read_ledger(tmp_path)
    assert (report.verdict, report.epochs[0].notes) == ("pass", ("1 row twice, so that all processes have as many",))
    (tmp_path / "ledger" / "start-0001-rank-1.ledger").unlink()
    report = read_ledger(tmp_path)
    assert report.verdict == "fail"
    assert report.problems == ["start 1: of its 2 processes the files of rank 1 are not here"]


def test_two_processes_write_a_file_each(tmp_path: Path) -> None:
    def ranks(**options: Any) -> None:
        path = options.pop("ckpt_path", None)
        trainer = quiet_trainer(
            tmp_path,
            CheckpointGuard(),
            SampleLedger(rows=1),
            every_step(tmp_path),
            strategy="ddp_fork",
            devices=2,
            **options,
        )
        trainer.fit(TwoProcesses(), ckpt_path=path)

    ranks(max_steps=4)
    ranks(ckpt_path=tmp_path / "step=3.ckpt", max_epochs=2)
    report = read_ledger(tmp_path)
    assert [(len(start.processes), start.batches, start.kept) for start in report.starts] == [(2, 4, 3), (2, 3, 3)]
    assert_exact(report, epochs=2)


class TwoProcesses(TinyModule):
    def train_dataloader(self) -> Any:
        rows = TensorDataset(torch.ones(ROWS, 4), torch.arange(ROWS))
        from torchdata.stateful_dataloader import StatefulDataLoader

        from enstack_lightning.data.loaders import TrainingSampler

        order = TrainingSampler(ROWS, BATCH_SIZE, 7, self.trainer.world_size, self.trainer.global_rank)
        order.set_epoch(self.trainer.current_epoch)
        return StatefulDataLoader(rows, batch_size=BATCH_SIZE, sampler=order)
