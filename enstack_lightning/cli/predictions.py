"""Predictions to JSON Lines: one object a function, in a file that is either whole or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.cli.output import Output, output_to, say
from enstack_lightning.errors import DataError
from enstack_lightning.model.classifier import Prediction


class PredictionWriter(BasePredictionWriter):
    """Writes `{"idx": 7, "predicted": 3, "label": "CWE-476", "probabilities": [...]}` a row.

    Args:
        output: the file; with several processes each writes its own, `NAME.rankN.SUFFIX`.
        label_names: one name a class.
    """

    def __init__(self, output: str, label_names: Sequence[str]) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self.label_names = tuple(label_names)
        self._ends = ExitStack()
        self._to: Output | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self.output = self.output.with_suffix(f".rank{trainer.global_rank}{self.output.suffix}")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._to = self._ends.enter_context(output_to(str(self.output)))
        except OSError as e:
            raise DataError(f"predictions cannot be written to {self.output}: {e.strerror}") from e

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Prediction,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._to is not None
        columns = (prediction["idx"].tolist(), prediction["predicted"].tolist(), prediction["probabilities"].tolist())
        rows = [
            {
                "idx": idx,
                "predicted": predicted,
                "label": self.label_names[predicted],
                "probabilities": [round(p, 6) for p in probabilities],
            }
            for idx, predicted, probabilities in zip(*columns, strict=True)
        ]
        self._to.write("\n".join(map(json.dumps, rows)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends.close()
        say(f"predictions written to {printable(str(self.output))}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ends.__exit__(type(exception), exception, exception.__traceback__)  # what is unfinished goes
