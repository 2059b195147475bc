from __future__ import annotations

from pathlib import Path

import pytest
from builders import train_lightning


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of three epochs with five batches each: `step=1.ckpt` to `step=15.ckpt`, `epoch=0.ckpt`
    to `epoch=2.ckpt`. Copy one before damaging it."""
    return train_lightning(tmp_path_factory.mktemp("trained"))
