"""The global generators go back to where they were, whichever NumPy's is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enstack_lightning.checkpoint.inert_pickle import read_pickle
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile
from enstack_lightning.guard.restart.rng import capture_random_state, restore_random_state


@pytest.fixture
def generators() -> Iterator[None]:
    before = np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(before)


def draws() -> list[Any]:
    """One more normal number is kept for the next call by Python and by NumPy's older generators."""
    return [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.normal(), torch.rand(2).tolist()]


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
@pytest.mark.usefixtures("generators")
def test_random_state_survives_a_checkpoint(kind: str, tmp_path: Path) -> None:
    np.random.set_bit_generator(getattr(np.random, kind)(3))
    draws()
    path = tmp_path / "c.pt"
    torch.save(capture_random_state(), path)
    expected = draws()
    draws()
    restore_random_state(torch.load(path, weights_only=True))
    assert draws() == expected


def test_random_state_is_little_to_read(tmp_path: Path) -> None:
    """Each checkpoint is verified with it; Python's and NumPy's generators alone have 1,248 words."""
    torch.save(capture_random_state(), tmp_path / "c.pt")
    with LocalSource(tmp_path / "c.pt") as source:
        record = TorchFile(source).records["data.pkl"]
        assert read_pickle(source.read_at(record.offset, record.size), max_opcodes=150).value
