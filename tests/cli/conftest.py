from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from enstack_lightning.data.sample import sample_rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 functions to train on and 24 for each of the other splits."""
    folder = tmp_path_factory.mktemp("data")
    rows = sample_rows(seed=5)
    for split, size in {"train": 96, "validation": 24, "test": 24}.items():
        lines = [json.dumps({"func": r.func, "target": r.target}) for r in islice(rows, size)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
