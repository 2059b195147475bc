"""Tokenised rows to batches: padding to the longest row, and an order of training that can be picked up anywhere.

The order of an epoch is a pure function of seed, epoch and row lengths, the same on every process; a process takes
its share of each batch. So the position is three numbers, fits in a checkpoint and means the same on all processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

if TYPE_CHECKING:
    from datasets import Dataset

_PAD_TO_MULTIPLE_OF = 8
_BATCHES_PER_BUCKET = 50


class PaddingCollator:
    """Makes a batch of rows, padded to the longest of them, rounded up to a multiple of 8.

    Args:
        pad_token_id: Token id of padding.
        max_length: No batch is longer, in tokens.

    Example:
        >>> PaddingCollator(pad_token_id=1, max_length=512)([{"input_ids": [0, 9, 2], "idx": 7}])["idx"]
        tensor([7])
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids` and `attention_mask` [B, T], `idx` [B], all int64.

        `labels` [B] is there if the rows are labelled, and `row` [B] if they are numbered (`NumberedRows`).
        """
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
        width = max(longest, min(width, self.max_length))
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[number, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            attention_mask[number, :length] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch["idx"] = torch.tensor([row["idx"] for row in rows], dtype=torch.int64)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows], dtype=torch.int64)
        return batch


class NumberedRows:
    """Rows that know their position in the split, as `row`; `idx` is the data's own and may repeat or have gaps.

    Args:
        rows: Tokenised rows.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self._rows[number], "row": number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        rows = self._rows.__getitems__(numbers)
        return [{**row, "row": number} for row, number in zip(rows, numbers, strict=True)]


def epoch_order(lengths: Sequence[int] | int, seed: int, epoch: int, batch_size: int) -> list[int]:
    """The order in which an epoch visits the rows.

    Args:
        lengths: Tokens of every row, to put rows of like length into one batch; or the number of rows, to not.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        batch_size: Rows of a batch, over all processes.

    Returns:
        Every row's number once.

    Example:
        >>> sorted(epoch_order(5, seed=0, epoch=0, batch_size=2))
        [0, 1, 2, 3, 4]
    """
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)
    num_rows = lengths if isinstance(lengths, int) else len(lengths)
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    if isinstance(lengths, int):
        return order
    batches: list[list[int]] = []
    for start in range(0, num_rows, batch_size * _BATCHES_PER_BUCKET):
        bucket = sorted(order[start : start + batch_size * _BATCHES_PER_BUCKET], key=lengths.__getitem__)
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [row for batch in batches if len(batch) < batch_size for row in batch]
    shuffled = torch.randperm(len(full), generator=generator).tolist()
    return [row for number in shuffled for row in full[number]] + rest


class TrainingSampler(DistributedSampler[int]):
    """Visits every row once an epoch, in `epoch_order`, each process its share.

    It is a `DistributedSampler`, so Lightning leaves it in place with any number of processes and tells it the epoch.
    Without Lightning the epoch advances by itself when an iterator ends.

    Args:
        lengths: As in `epoch_order`.
        batch_size: Rows of a batch of one process.
        seed: Seed of the run, equal on all processes.
        num_replicas: Number of processes.
        rank: Number of this process.
        max_batches: Batches after which an epoch ends before its last row; None for all.
    """

    def __init__(
        self,
        lengths: Sequence[int] | int,
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        max_batches: int | None = None,
    ) -> None:
        rows = range(lengths if isinstance(lengths, int) else len(lengths))
        super().__init__(rows, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.max_batches = max_batches
        self.trainer_epoch: int | None = None
        self.batches_left: int | None = None
        """Batches of a part-done epoch that was begun with batches of another size; None for any other epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iterator; Lightning calls it, also before it restores an iterator."""
        self.epoch = self.trainer_epoch = epoch

    @property
    def batch_rows(self) -> int:
        """Rows of a batch over all processes."""
        return self.batch_size * self.num_replicas

    def order_of_this_process(self, drawn: int = 0, batch_rows: int | None = None) -> list[int]:
        """The rows that this process visits in the sampler's epoch; processes repeat some so that all have as many.

        Args:
            drawn: Rows that all processes together have drawn already, in this order.
            batch_rows: Rows of a batch over all processes when the order was begun; None for those of now.
        """
        order = epoch_order(self.lengths, self.seed, self.epoch, batch_rows or self.batch_rows)
        missing = self.total_size - len(order)
        order += (order * (missing // len(order) + 1))[:missing]
        if self.max_batches is not None:
            order = order[: self.max_batches * self.batch_rows]
        left = order[drawn:]
        left += order[: -len(left) % self.num_replicas]
        return left[self.rank :: self.num_replicas]

    def __iter__(self) -> TrainingSamplerIterator:
        return TrainingSamplerIterator(self)


class TrainingSamplerIterator(Iterator[int]):
    """One epoch's walk over the rows; torchdata saves and restores its position.

    Its state names seed, epoch and the rows drawn by all processes together, so it is the same on every process. It
    holds for another number of processes and another batch size as well: the epoch keeps its order, and the rows that
    are left are shared out anew.

    Args:
        sampler: The sampler whose epoch is walked.
    """

    def __init__(self, sampler: TrainingSampler) -> None:
        self._sampler = sampler
        self._begin(sampler.epoch)

    def __next__(self) -> int:
        if self._position == len(self._order):
            self._sampler.epoch = self._epoch + 1
            raise StopIteration
        row = self._order[self._position]
        self._position += 1
        return row

    def state_dict(self) -> dict[str, int]:
        """The position: seed, epoch, rows drawn over all processes, and rows of a batch in the epoch's order."""
        drawn = self._drawn_before + self._position * self._sampler.num_replicas
        return {
            "seed": self._sampler.seed,
            "epoch": self._epoch,
            "rows_drawn": drawn,
            "batch_rows": self._batch_rows,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes to a position, and makes the sampler go on from its seed and epoch.

        A checkpoint made at the end of an epoch holds that epoch's end. Lightning then goes on in the next epoch with
        this same iterator, so the end of an epoch is read as the start of the next one.
        """
        sampler = self._sampler
        sampler.seed = state_dict["seed"]
        epoch, drawn = state_dict["epoch"], state_dict["rows_drawn"]
        sampler.batches_left = None
        if sampler.trainer_epoch is not None and sampler.trainer_epoch > epoch:
            self._begin(sampler.trainer_epoch)
            return
        batch_rows = state_dict.get("batch_rows", sampler.batch_rows)
        self._begin(epoch, drawn, batch_rows)
        if batch_rows != sampler.batch_rows:
            sampler.batches_left = -(-len(self._order) // sampler.batch_size)
        if not self._order:
            self._begin(epoch + 1)

    def _begin(self, epoch: int, drawn: int = 0, batch_rows: int | None = None) -> None:
        """The walk over an epoch's rows after those that all processes have drawn."""
        sampler = self._sampler
        self._epoch = sampler.epoch = epoch
        self._drawn_before, self._position = drawn, 0
        self._batch_rows = sampler.batch_rows if batch_rows is None else batch_rows
        self._order = sampler.order_of_this_process(drawn, self._batch_rows)


def training_loader(
    rows: Dataset, sampler: TrainingSampler, collate: PaddingCollator, num_workers: int, pin_memory: bool
) -> StatefulDataLoader:
    """Makes the loader of training batches, whose `state_dict` is its exact position.

    Args:
        rows: Tokenised rows.
        sampler: The order of training.
        collate: Makes a batch of rows.
        num_workers: Worker processes; 0 loads in this one.
        pin_memory: Whether batches are put into page-locked memory.

    Returns:
        The loader.
    """
    return StatefulDataLoader(
        NumberedRows(rows),
        batch_size=sampler.batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=_own_generator(),
    )


def evaluation_loader(
    rows: Dataset, batch_size: int, collate: PaddingCollator, num_workers: int, pin_memory: bool
) -> DataLoader[dict[str, Any]]:
    """Makes a loader that visits the rows in their order; arguments as in `training_loader`."""
    return DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=False,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=_own_generator(),
    )


def _own_generator() -> torch.Generator:
    """A generator for the base seed that a loader draws for its workers with every iterator.

    Without one it is drawn from torch's global generator, and whether an iterator was made (a resumed run makes them
    at other moments) would change every dropout mask after it.
    """
    return torch.Generator().manual_seed(0)
