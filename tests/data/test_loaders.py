"""Batches: padding, and an order of training that goes on from any position as if it had never stopped."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.data.loaders import PaddingCollator, TrainingSampler, epoch_order, training_loader

LENGTHS = [3 + 7 * n % 29 for n in range(22)]
BATCH_SIZE = 4
BATCHES = 6


def test_a_batch_is_padded_to_its_longest_row_and_a_multiple_of_8() -> None:
    collate = PaddingCollator(pad_token_id=9, max_length=20)
    rows = [{"input_ids": list(range(n)), "idx": n, "label": n % 5} for n in (3, 11)]
    batch = collate(rows)
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "attention_mask": ((2, 16), torch.int64),
        "idx": ((2,), torch.int64),
        "labels": ((2,), torch.int64),
    }
    assert batch["input_ids"][0].tolist() == [0, 1, 2] + [9] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 11]
    assert collate([{"input_ids": [0] * 19, "idx": 0}])["input_ids"].shape == (1, 20)
    assert "labels" not in collate([{"input_ids": [0], "idx": 0}])


@pytest.mark.parametrize("lengths", [22, LENGTHS], ids=["shuffled", "bucketed"])
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(lengths: Any) -> None:
    orders = [epoch_order(lengths, seed, epoch, BATCH_SIZE) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(lengths, 1, 1, BATCH_SIZE) == orders[3]


def padding(order: list[int], lengths: list[int]) -> int:
    batches = [[lengths[i] for i in order[n : n + 8]] for n in range(0, len(order), 8)]
    return sum(len(b) * max(b) - sum(b) for b in batches)


def test_length_bucketing_pads_less() -> None:
    lengths = torch.randint(10, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled, bucketed = epoch_order(1000, 0, 0, 8), epoch_order(lengths, 0, 0, 8)
    assert padding(bucketed, lengths) < padding(shuffled, lengths) / 5


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_together_visit_every_row(processes: int) -> None:
    shares = []
    for rank in range(processes):
        sampler = TrainingSampler(LENGTHS, BATCH_SIZE, seed=5, num_replicas=processes, rank=rank)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({len(share) for share in shares}) == 1
    assert {row for share in shares for row in share} == set(range(22))
    assert sum(map(len, shares)) < 22 + processes


def loader(lengths: Any = LENGTHS, num_workers: int = 0) -> StatefulDataLoader:
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in LENGTHS], "idx": list(range(22)), "label": [0] * 22})
    sampler = TrainingSampler(lengths, BATCH_SIZE, seed=5)
    return training_loader(rows, sampler, PaddingCollator(0, 64), num_workers, pin_memory=False)


def epoch_of(it: Any) -> list[list[int]]:
    return [batch["idx"].tolist() for batch in it]


@pytest.mark.parametrize(
    ("num_workers", "position"), [(0, n) for n in range(1, BATCHES + 1)] + [(2, 1), (2, 4), (2, BATCHES)]
)
@pytest.mark.parametrize("lengths", [22, LENGTHS], ids=["shuffled", "bucketed"])
def test_a_loader_goes_on_from_every_position(num_workers: int, position: int, lengths: Any) -> None:
    undisturbed = loader(lengths)
    expected = [epoch_of(undisturbed) for _ in range(3)]

    stopped = loader(lengths, num_workers)
    batches = iter(stopped)
    assert epoch_of(islice(batches, position)) == expected[0][:position]
    state = stopped.state_dict()
    del batches

    resumed = loader(lengths, num_workers)
    resumed.load_state_dict(state)
    rest = [epoch_of(resumed), epoch_of(resumed)]
    if position < BATCHES:
        assert rest == [expected[0][position:], expected[1]]
    else:
        assert next(r for r in rest if r) == expected[1]


def test_a_position_is_numbers_only() -> None:
    stateful = loader()
    next(iter(stateful))
    position = stateful.state_dict()["_sampler_iter_state"]["sampler_iter_state"]
    assert position == {"seed": 5, "epoch": 0, "rows_drawn": 4, "batch_rows": 4}
