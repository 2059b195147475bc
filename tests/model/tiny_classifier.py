"""Small classifiers, random token rows and short real Trainers for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from enstack_lightning.model import VulnerabilityClassifier

VOCABULARY = 64


def tiny_classifier(**options: Any) -> VulnerabilityClassifier:
    sizes = {
        "pretrained": False,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 34,
    }
    return VulnerabilityClassifier(**{**sizes, **options})


def built_classifier(**options: Any) -> VulnerabilityClassifier:
    torch.manual_seed(0)
    classifier = tiny_classifier(**options)
    classifier.configure_model()
    return classifier


class TokenRows(Dataset[dict[str, Tensor]]):
    """Random rows of 2 to 12 tokens, padded to 12; labels as given, or random."""

    def __init__(self, rows: int, labels: list[int] | None = None, num_labels: int = 5, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 13, (rows, 1), generator=draw)
        self.attention_mask = (torch.arange(12) < lengths).long()
        tokens = torch.randint(3, VOCABULARY, (rows, 12), generator=draw)
        self.input_ids = torch.where(self.attention_mask.bool(), tokens, 1)
        self.input_ids[:, 0] = 0
        self.labels = torch.randint(num_labels, (rows,), generator=draw) if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[row],
            "attention_mask": self.attention_mask[row],
            "labels": self.labels[row],
            "idx": torch.tensor(row),
        }


def loader(rows: TokenRows, batch_size: int = 4) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(rows, batch_size=batch_size)


class CountingDataModule(LightningDataModule):
    """Training rows with the label counts that balanced class weights ask for."""

    def __init__(self, rows: TokenRows, num_labels: int = 5, batch_size: int = 4) -> None:
        super().__init__()
        self.rows = rows
        self.num_labels = num_labels
        self.batch_size = batch_size

    def train_label_counts(self) -> list[int]:
        return torch.bincount(self.rows.labels, minlength=self.num_labels).tolist()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return loader(self.rows, self.batch_size)


def short_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**quiet, **options})
