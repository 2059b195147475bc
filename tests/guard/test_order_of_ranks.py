"""Two processes with plain loaders, of which one alone gives other batches after a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_runs import ROWS, Recorded, Rows, train
from killing import Tell
from rank_processes import run_ranks
from torch.utils.data import DataLoader, Sampler

pytestmark = pytest.mark.filterwarnings("ignore")


class ByItself(Sampler[int]):
    """Has a generator that nobody else can see."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(3).permutation
        self.made = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.made += 1
        return iter(self.draw(ROWS).tolist())


class Apart(Recorded):
    """Each rank has its own loader; that of one rank may have a sampler whose order cannot be had again."""

    def __init__(self, odd_rank: int | None) -> None:
        super().__init__()
        self.odd_rank = odd_rank

    def train_dataloader(self) -> DataLoader[Any]:
        if self.trainer.global_rank == self.odd_rank:
            return DataLoader(Rows(False), batch_size=4, sampler=ByItself())
        return DataLoader(Rows(False), batch_size=4, shuffle=True)


class Tells(logging.Handler):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("exact "):
            self.tell(record.getMessage())


@pytest.mark.parametrize("odd_rank", [None, 1])
def test_what_one_rank_has_lost_is_promised_by_none(odd_rank: int | None, tmp_path: Path) -> None:
    two = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "use_distributed_sampler": False}

    def work(tell: Tell) -> None:
        train(tmp_path, {"odd_rank": odd_rank}, two, saves=("batch-9", "epoch-1"), kind=Apart)
        logger = logging.getLogger("lightning.pytorch")
        logger.setLevel(logging.INFO)
        logger.addHandler(Tells(tell))
        for name in ("batch-9", "epoch-1"):
            train(tmp_path / "a", {"odd_rank": odd_rank}, two, tmp_path / f"{name}.ckpt", kind=Apart)

    first, _ = run_ranks(work)
    inside, at_the_end = [line for line in first.said if line.startswith("exact ")]
    assert inside.endswith("bit for bit") == at_the_end.endswith("bit for bit") == (odd_rank is None)
    if odd_rank is not None:
        assert "since the loader gives other batches than before" in inside
        assert at_the_end.endswith("not promised: another process has lost something of its loaders")
