"""Makes the one-line facts that rank zero logs visible to the tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def info_lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Captures Lightning's log, which propagates to the root logger only if that had a handler first."""
    lightning_log = logging.getLogger("lightning.pytorch")
    propagated, lightning_log.propagate = lightning_log.propagate, True
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        yield caplog
    lightning_log.propagate = propagated
