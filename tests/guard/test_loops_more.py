"""Loaders that are made before a checkpoint is loaded, streams, and what stands at an epoch's end, at a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exact_runs import BATCH_SIZE, BATCHES, ROWS, Recorded, Rows, differences, train
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

pytestmark = pytest.mark.filterwarnings("ignore")


class Stream(IterableDataset):
    """Gives rows one after the other and keeps its position."""

    def __init__(self) -> None:
        self.rows = Rows(False)
        self.begin = self.given = 0

    def __iter__(self) -> Iterator[Any]:
        self.given, self.begin = self.begin, 0
        return map(self._give, range(self.given, ROWS))

    def _give(self, row: int) -> Any:
        self.given += 1
        return self.rows[row]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["given"]


class OfAStream(Recorded):
    def train_dataloader(self) -> Any:
        return StatefulDataLoader(Stream(), BATCH_SIZE) if self.order == "stream" else super().train_dataloader()


class AsksInSetup(OfAStream):
    """Makes its training loader before the checkpoint is loaded, to know how many steps there will be."""

    def setup(self, stage: str) -> None:
        self.steps = self.trainer.estimated_stepping_batches


class AsksForASchedule(OfAStream):
    """Makes it before the loops are restored."""

    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator", "plain", "stream"])
@pytest.mark.parametrize("kind", [AsksInSetup, AsksForASchedule])
def test_a_loader_that_is_made_before_the_loops_are_restored_goes_on(
    kind: type[Recorded], order: str, tmp_path: Path
) -> None:
    names = ("batch-2", f"batch-{BATCHES}", f"batch-{BATCHES + 2}", "validation-1", "epoch-1")
    module, trainer = {"order": order}, {"max_epochs": 2}
    whole = train(tmp_path, module, trainer, saves=names, kind=kind)
    for name in names:
        again = train(tmp_path / "again", module, trainer, tmp_path / f"{name}.ckpt", seed=9, kind=kind)
        assert differences(whole, again) == [], name
