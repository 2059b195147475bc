"""The data module in real Trainers: what a checkpoint holds of it, and what another run makes of that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import every_step, functions, quiet_trainer, write_jsonl
from lightning.pytorch import LightningModule
from torch import Tensor

from enstack_lightning import CheckpointGuard, DataError, VulnerabilityDataModule
from enstack_lightning.data.tokenization import tokenizer_digest

Module = Callable[..., VulnerabilityDataModule]


class KeepsRows(LightningModule):
    """Counts tokens with one weight, and keeps the rows it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.rows.append(batch["idx"].tolist())
        loss: Tensor = (self.weight - batch["labels"].float().mean()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(data: VulnerabilityDataModule, folder: Path, ckpt_path: Path | None = None, **options: Any) -> KeepsRows:
    torch.manual_seed(3)
    module = KeepsRows()
    trainer = quiet_trainer(folder, CheckpointGuard(), every_step(folder), max_epochs=2, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("bucketing", [False, True])
@pytest.mark.parametrize(("step", "num_workers"), [(3, 0), (10, 0), (13, 0), (7, 2)])
def test_a_resumed_run_trains_exactly_the_rows_that_were_left(
    bucketing: bool, step: int, num_workers: int, data: Path, module: Module, tmp_path: Path
) -> None:
    options = {"length_bucketing": bucketing, "num_workers": num_workers}
    rows = fit(module(data, **options), tmp_path).rows
    assert len(rows) == 20
    assert sorted(row for batch in rows[:10] for row in batch) == list(range(40))
    torch.manual_seed(77)
    resumed = fit(module(data, **options), tmp_path / "again", tmp_path / f"step={step}.ckpt")
    assert resumed.rows == rows[step:]


def test_a_checkpoint_holds_the_tokenizer_and_the_fingerprints(data: Path, module: Module, tmp_path: Path) -> None:
    used = module(data)
    fit(used, tmp_path)
    state = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["VulnerabilityDataModule"]
    assert state["tokenizer_sha256"] == tokenizer_digest(used.tokenizer)
    assert state["num_rows"] == {"train": 40, "validation": 10}
    assert state["fingerprints"] == used.fingerprints


def test_a_tokenizer_from_a_checkpoint_is_used_and_changed_data_is_said(
    data: Path, module: Module, tmp_path: Path
) -> None:
    used = module(data)
    used.setup("fit")
    write_jsonl(tmp_path / "train.jsonl", functions(20, seed=8))
    write_jsonl(tmp_path / "validation.jsonl", functions(5, seed=9))
    other = module(tmp_path)
    other.load_state_dict(used.state_dict())
    with pytest.warns(UserWarning, match=r"training data changed since the checkpoint: 40 rows .* then, 20 rows"):
        other.setup("fit")
    assert tokenizer_digest(other.tokenizer) == tokenizer_digest(used.tokenizer)


def test_under_the_guard_changed_data_is_said_once(data: Path, module: Module, tmp_path: Path) -> None:
    module(data).tokenizer.save_pretrained(tmp_path / "tokenizer")
    fit(module(data, tokenizer=str(tmp_path / "tokenizer")), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", functions(40, seed=8))
    write_jsonl(other / "validation.jsonl", functions(5, seed=9))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module(other, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "again", tmp_path / "step=10.ckpt")
    (message,) = [str(w.message) for w in said if "training data" in str(w.message)]
    assert message.startswith("CheckpointGuard: CK910 the training data of 40 rows changed: its fingerprint was")


def test_another_tokenizer_than_the_checkpoints_is_refused(data: Path, module: Module, tmp_path: Path) -> None:
    used = module(data)
    used.setup("fit")
    module(data, vocab_size=280).tokenizer.save_pretrained(tmp_path / "other")
    other = module(data, tokenizer=str(tmp_path / "other"))
    other.load_state_dict(used.state_dict())
    with pytest.raises(DataError, match="trained with another tokenizer"):
        other.setup("fit")


def test_rows_to_predict_need_no_label(data: Path, module: Module, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "new.jsonl", [{"func": row["func"], "idx": 5 + n} for n, row in enumerate(functions(3))])
    rows = module(data, predict_file=str(tmp_path / "new.jsonl"))
    rows.setup("predict")
    (batch,) = rows.predict_dataloader()
    assert batch["idx"].tolist() == [5, 6, 7]
    assert "labels" not in batch
    everything = module(data)
    everything.setup("predict")
    assert sum(len(b["idx"]) for b in everything.predict_dataloader()) == 10


def test_the_labels_of_training_are_counted(data: Path, module: Module) -> None:
    assert module(data).train_label_counts() == [8, 8, 8, 8, 8]
