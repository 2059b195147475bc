from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only get into each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from builders import functions, train_lightning, write_jsonl
from fsspec.implementations.memory import MemoryFileSystem

collect_ignore = [
    "benchmarks",
    *(f"guard/{name}.py" for name in ("other_flavor", "preempted_ranks", "sharded_saves", "two_ranks")),
]
"""Scripts that are run by hand or by a test."""


@pytest.fixture(autouse=True)
def empty_memory() -> None:
    """What other tests of the process left at `memory://` URLs is gone."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of three epochs with five batches each: `step=1.ckpt` to `step=15.ckpt`, `epoch=0.ckpt`
    to `epoch=2.ckpt`. Copy one before damaging it."""
    return train_lightning(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 functions to train on and 24 for each of the other splits."""
    folder = tmp_path_factory.mktemp("data")
    rows = functions(144, seed=5)
    for split, start, stop in (("train", 0, 96), ("validation", 96, 120), ("test", 120, 144)):
        write_jsonl(folder / f"{split}.jsonl", rows[start:stop])
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
