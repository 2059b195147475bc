from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import functions, write_jsonl

from enstack_lightning import VulnerabilityDataModule


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 functions to train on and 10 for each of the other splits."""
    folder = tmp_path_factory.mktemp("data")
    rows = functions(60)
    for split, start, stop in (("train", 0, 40), ("validation", 40, 50), ("test", 50, 60)):
        write_jsonl(folder / f"{split}.jsonl", rows[start:stop])
    return folder


@pytest.fixture
def module(cache: Path) -> Callable[..., VulnerabilityDataModule]:
    def make(path: Path | None, **options: Any) -> VulnerabilityDataModule:
        small = {"vocab_size": 300, "max_length": 64, "train_batch_size": 4, "cache_dir": str(cache)}
        return VulnerabilityDataModule(str(path) if path else None, **{**small, **options})

    return make
