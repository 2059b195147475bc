"""The guard in a process that imports `pytorch_lightning`, and only then `lightning.pytorch` too.

Called with a folder and a checkpoint that a `lightning.pytorch` Trainer saved; says what happened as one JSON object.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard, CheckpointGuardError, RecoveryCheckpoint

folder, of_lightning = Path(sys.argv[1]), sys.argv[2]
said: dict[str, Any] = {"alone": "lightning.pytorch" not in sys.modules}


def tiny(base: Any) -> Any:
    """The module of builders.py as one of this flavor, with rows in order."""

    class Tiny(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.dropout = torch.nn.Dropout(0.3)

        def training_step(self, batch: list[torch.Tensor]) -> Any:
            return self.dropout(self.layer(batch[0])).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step, 100) / 101)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def train_dataloader(self) -> Any:
            rows = TensorDataset(torch.ones(20, 4), torch.arange(20))
            return StatefulDataLoader(rows, batch_size=4)

    return Tiny()


def fit(flavor: Any, callbacks: Any, ckpt_path: Any = None, **options: Any) -> list[str]:
    """The warnings of a run."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flavor.Trainer(callbacks=callbacks, default_root_dir=folder, **{"max_epochs": 3, **quiet, **options}).fit(
            tiny(flavor.LightningModule), ckpt_path=ckpt_path
        )
    return [str(w.message) for w in caught if "CheckpointGuard" in str(w.message)]


def resumed(flavor: Any, path: Any, **options: Any) -> list[object]:
    guard = CheckpointGuard(**options)
    warned = fit(
        flavor, guard, path, enable_checkpointing=False, max_epochs=4
    )  # one callback alone is looked at by its class
    assert guard.report is not None
    return [str(guard.report.verdict), guard.report.facts.live, isinstance(guard, flavor.Callback), *warned]


saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
said["saved"] = fit(pl, [CheckpointGuard(), saves, RecoveryCheckpoint(str(folder), every_n_train_steps=4)])
said["manifest"] = (folder / "step=7.ckpt.manifest.json").is_file()
said["keys"] = [key for key in torch.load(folder / "step=7.ckpt", weights_only=True)["callbacks"] if "Guard" in key]
said["resumed"] = resumed(pl, folder / "step=7.ckpt")
said["resumed what lightning.pytorch saved"] = resumed(pl, of_lightning)

last = ModelCheckpoint(folder / "async", filename="{step}", every_n_train_steps=5)
said["async"] = fit(pl, [CheckpointGuard(verify_after_save=True), last], plugins=[AsyncCheckpointIO()])
said["async files"] = sorted(p.name for p in (folder / "async").iterdir())

bad = folder / "step=9.ckpt"
bad.write_bytes(bad.read_bytes()[:5000])
try:
    resumed(pl, bad)
except CheckpointGuardError as e:
    said["refused"] = str(e)
said["fell back"] = resumed(pl, bad, fallback="previous")[3:]
said["still alone"] = "lightning.pytorch" not in sys.modules

import lightning.pytorch as other  # noqa: E402

said["both"] = [resumed(flavor, folder / "step=7.ckpt") for flavor in (other, pl)]
print(json.dumps(said))
