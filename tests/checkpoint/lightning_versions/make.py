"""How the files in this folder were made: `python make.py FOLDER` with one old pytorch-lightning on PYTHONPATH.

`pip install --no-deps --target OLD pytorch-lightning==1.5.10 pydeprecate==0.3.1` (and torchmetrics==0.5.1 for 1.4)
gives such a folder. Two epochs of four batches; saved after the second batch of the second epoch, at an epoch's end,
after `fit`, and with weights alone. Versions before 2.0 know neither today's torch nor today's NumPy, so what they miss
is put back first.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


def put_back_what_old_versions_import() -> None:
    six = types.ModuleType("torch._six")
    six.string_classes = (str, bytes)  # type: ignore[attr-defined]
    six.inf = float("inf")  # type: ignore[attr-defined]
    sys.modules["torch._six"] = six
    for name, value in {"float": float, "int": int, "object": object, "Inf": float("inf")}.items():
        setattr(np, name, value)
    if "_LRScheduler" in vars(torch.optim.lr_scheduler):
        torch.optim.lr_scheduler._LRScheduler = torch.optim.lr_scheduler.LRScheduler  # type: ignore[misc]
    resources = types.ModuleType("pkg_resources")
    resources.DistributionNotFound = importlib.metadata.PackageNotFoundError  # type: ignore[attr-defined]
    resources.VersionConflict = type("VersionConflict", (Exception,), {})  # type: ignore[attr-defined]
    resources.get_distribution = importlib.metadata.distribution  # type: ignore[attr-defined]
    resources.declare_namespace = lambda name: None  # type: ignore[attr-defined]

    def require(*requirements: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    resources.require = require  # type: ignore[attr-defined]
    sys.modules.setdefault("pkg_resources", resources)


def accepted(function: Any, **options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def train_and_save(folder: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    version = pl.__version__

    class Module(pl.LightningModule):
        def __init__(self, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class SaveInsideTheSecondEpoch(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
        ) -> None:
            if trainer.current_epoch == 1 and batch_idx == 1:
                trainer.save_checkpoint(folder / f"{version}-mid-epoch.ckpt")

    torch.manual_seed(0)
    batches = DataLoader(TensorDataset(torch.arange(16.0).reshape(8, 2)), batch_size=2)
    saves, inside = (
        ModelCheckpoint(dirpath=str(folder), filename=f"{version}-epoch-end", monitor="val_loss"),
        SaveInsideTheSecondEpoch(),
    )
    callbacks = {"checkpoint_callback": saves, "callbacks": [inside]} if version < "1.1" else {}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        **accepted(pl.Trainer.__init__, max_epochs=2, **quiet), **(callbacks or {"callbacks": [saves, inside]})
    )
    trainer.fit(Module(), batches, batches)
    trainer.save_checkpoint(folder / f"{version}-after-fit.ckpt")
    trainer.save_checkpoint(folder / f"{version}-weights.ckpt", weights_only=True)


if __name__ == "__main__":
    put_back_what_old_versions_import()
    train_and_save(Path(sys.argv[1]))
