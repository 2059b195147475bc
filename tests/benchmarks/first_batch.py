"""Ends a process at its first training batch, with the time on standard output."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch import Callback


class FirstBatch(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        print(f"first batch at {time.time()}", flush=True)
        os._exit(0)
