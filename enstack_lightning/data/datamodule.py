"""`VulnerabilityDataModule`: data files, or the offline sample, to batches for training, evaluation and prediction.

`prepare_data` makes everything that takes time (the sample, checked rows, the tokenizer, tokenised rows) in a
content-addressed cache on disk; `setup` opens it. The module's state in a checkpoint says which tokenizer and which
data the weights have seen, so that a resume with others is refused or warned about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning.data.cache import cache_folder
from enstack_lightning.data.loaders import PaddingCollator, TrainingSampler, evaluation_loader, training_loader
from enstack_lightning.data.rows import Rows, open_rows
from enstack_lightning.data.sample import write_sample
from enstack_lightning.data.splits import Split, has_split, split_file
from enstack_lightning.data.tokenization import (
    load_tokenizer,
    tokenize_rows,
    tokenizer_digest,
    tokenizer_from_json,
    tokenizer_json,
    train_tokenizer,
)
from enstack_lightning.data.validation import Columns, check_label_names
from enstack_lightning.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerFast

_SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    TrainerFn.FITTING.value: ("train", "validation"),
    TrainerFn.VALIDATING.value: ("validation",),
    TrainerFn.TESTING.value: ("test",),
    TrainerFn.PREDICTING.value: ("predict",),
}


class VulnerabilityDataModule(LightningDataModule):
    """C functions with one weakness class each, tokenised and batched.

    A batch is a dict of int64 tensors: `input_ids` and `attention_mask` [B, T], `idx` [B], `labels` [B] unless
    the rows to predict have none, and in training `row` [B], the position in the split. T is the longest row of the
    batch, rounded up to a multiple of 8.

    Args:
        path: Folder with the splits: `train`, `validation` (or `val`, `valid`) and `test`, each as `.jsonl`, `.json`,
            `.csv` or `.parquet`. None uses a generated sample of 2,500 C functions, which needs no network.
        train_file: File of the training split, relative to `path`, instead of the one found there.
        validation_file: File of the validation split, relative to `path`, instead of the one found there.
        test_file: File of the test split, relative to `path`, instead of the one found there.
        predict_file: File to predict, relative to `path` or else to the working directory; its rows may lack the
            label. None predicts the test split.
        tokenizer: Hub id or local folder of a pretrained tokenizer. None trains a byte-level BPE tokenizer on the
            training split.
        vocab_size: Vocabulary entries of a tokenizer trained here.
        func_column: Column that holds the code.
        target_column: Column that holds the label.
        idx_column: Column that holds the number of a row; rows are numbered from 0 where it is absent.
        label_names: Label by name, for files that give labels as names.
        num_labels: Number of classes; labels are 0 to `num_labels - 1`.
        max_length: Longer code is cut to this many tokens, special tokens included.
        train_batch_size: Functions in a training batch, on each device.
        eval_batch_size: Functions in a batch of validation, test and prediction, on each device.
        length_bucketing: Whether training puts functions of like length into one batch, to pad less.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        num_proc: Processes that tokenise; None uses one.
        cache_dir: Folder for what can be made again. None uses `$ENSTACK_CACHE`, or `~/.cache/enstack_lightning`.
        seed: Seed of the generated sample. The order of training follows the run's global seed instead.
        pin_memory: Whether batches are put into page-locked memory, which speeds their way to a GPU.

    Raises:
        DataError: If `label_names`, `num_labels`, `max_length` or a batch size cannot be right.

    Example:
        >>> VulnerabilityDataModule(train_batch_size=8).hparams["train_batch_size"]
        8
    """

    def __init__(
        self,
        path: str | None = None,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        func_column: str = "func",
        target_column: str = "target",
        idx_column: str = "idx",
        label_names: dict[str, int] | None = None,
        num_labels: int = 5,
        max_length: int = 512,
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        length_bucketing: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # a logger takes no label_names that are not those of the model
        limits = {"num_labels": 2, "max_length": 3, "train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0}
        for name, smallest in limits.items():
            if self.hparams[name] < smallest:
                raise DataError(f"{name}={self.hparams[name]} is too small; it is at least {smallest}.")
        check_label_names(label_names, num_labels)
        self._columns = Columns(func_column, target_column, idx_column, label_names, num_labels)
        self._given: dict[Split, str | None] = {
            "train": train_file,
            "validation": validation_file,
            "test": test_file,
            "predict": predict_file,
        }
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._rows: dict[Split, Rows] = {}
        self._tokenized: dict[Split, Dataset] = {}
        self._restored: dict[str, Any] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; on first use it is loaded, taken from the checkpoint that was loaded, or trained."""
        if self._tokenizer is None:
            name, max_length = self.hparams["tokenizer"], self.hparams["max_length"]
            if name is not None:
                self._tokenizer = load_tokenizer(name, max_length)
            elif text := self._restored.get("tokenizer_json"):
                self._tokenizer = tokenizer_from_json(text, max_length)
            else:
                rows = self._open_rows("train")
                self._tokenizer = train_tokenizer(rows, self.hparams["vocab_size"], max_length, self._cache)
        return self._tokenizer

    @property
    def num_rows(self) -> dict[str, int]:
        """Number of rows of every split opened so far."""
        return {split: rows.num_rows for split, rows in self._rows.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of code and labels, by split opened so far; equal on every machine and in every file format."""
        return {split: rows.fingerprint for split, rows in self._rows.items()}

    def train_label_counts(self) -> list[int]:
        """Rows of each label in the training split, `num_labels` numbers."""
        counts = self._open_rows("train").label_counts
        assert counts is not None
        return list(counts)

    def prepare_data(self) -> None:
        """Reads, checks and tokenises what the stage needs into the cache; Lightning calls it on one process."""
        stage = self.trainer.state.fn.value if self.trainer is not None and self.trainer.state.fn else None
        for split in self._splits(stage):
            num_rows = len(self._tokenize(split))
            rank_zero_info(f"{split:<10} {num_rows:>9,} rows  {self._file(split)}")

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits of a stage from the cache.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None opens every split that there is.

        Raises:
            DataError: If a split is missing or wrong, or the tokenizer is not the one of a loaded checkpoint.
        """
        for split in self._splits(stage):
            self._tokenized[split] = self._tokenize(split)
        if self._restored:
            self._compare_with_checkpoint()

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of the training split, shuffled anew every epoch; its state is in every Lightning checkpoint."""
        rows = self._tokenized_split("train")
        lengths = rows["length"][:] if self.hparams["length_bucketing"] else len(rows)
        sampler = TrainingSampler(lengths, self.hparams["train_batch_size"], torch.initial_seed())
        if self.trainer is not None:
            sampler = self._sampler_of_trainer(self.trainer, lengths)
        visible = rows.select_columns([name for name in rows.column_names if name != "length"])
        return training_loader(
            visible, sampler, self._collator(), self.hparams["num_workers"], self.hparams["pin_memory"]
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the validation split, in order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the test split, in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches to predict, in order; without `labels` if the file has none."""
        return self._evaluation_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer and data a run has used, in strings and numbers only.

        Returns:
            `tokenizer_sha256`; `tokenizer_json`, the tokenizer itself if it was trained here, else None;
            `fingerprints` and `num_rows` by split. Empty before the tokenizer is there.
        """
        if self._tokenizer is None:
            return {}
        return {
            "tokenizer_sha256": tokenizer_digest(self._tokenizer),
            "tokenizer_json": tokenizer_json(self._tokenizer) if self.hparams["tokenizer"] is None else None,
            "fingerprints": self.fingerprints,
            "num_rows": self.num_rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's tokenizer, or compares it and the data with this module's.

        Before `setup`, a tokenizer that was trained for the checkpoint is used here too, so that other data, even
        without a training split, can be predicted.

        Raises:
            DataError: If the tokenizer is another one, whose token ids mean other tokens to the weights.
        """
        self._restored = state_dict
        if self._tokenizer is not None and state_dict:
            self._compare_with_checkpoint()

    def _compare_with_checkpoint(self) -> None:
        expected, actual = self._restored["tokenizer_sha256"], tokenizer_digest(self.tokenizer)
        if expected != actual:
            raise DataError(
                f"The checkpoint was trained with another tokenizer (SHA-256 {expected[:12]}, here {actual[:12]}), so "
                "its weights would read other tokens; use the tokenizer, or the training data, of that run."
            )
        before, now = self._restored["fingerprints"].get("train"), self.fingerprints.get("train")
        if before and now and before != now and not self._is_guarded:
            rank_zero_warn(
                f"The training data changed since the checkpoint: {self._restored['num_rows']['train']:,} rows "
                f"(fingerprint {before[:12]}) then, {self.num_rows['train']:,} rows (fingerprint {now[:12]}) now."
            )
        self._restored = {}

    @property
    def _is_guarded(self) -> bool:
        """Whether a `CheckpointGuard` compares the fingerprints, and says more than this module can."""
        return any(type(c).__name__ == "CheckpointGuard" for c in getattr(self.trainer, "callbacks", ()))

    @property
    def _cache(self) -> Path:
        return cache_folder(self.hparams["cache_dir"])

    @property
    def _folder(self) -> Path | None:
        path = self.hparams["path"]
        if path is not None:
            return Path(path).expanduser()
        return None if any(self._given.values()) else write_sample(self._cache, self.hparams["seed"])

    def _file(self, split: Split) -> Path:
        return split_file(split, self._folder, self._given)

    def _open_rows(self, split: Split) -> Rows:
        if split not in self._rows:
            self._rows[split] = open_rows(self._file(split), self._columns, split != "predict", self._cache)
        return self._rows[split]

    def _tokenize(self, split: Split) -> Dataset:
        rows, tokenizer = self._open_rows(split), self.tokenizer
        return tokenize_rows(rows, tokenizer, self.hparams["max_length"], self.hparams["num_proc"], self._cache)

    def _splits(self, stage: str | None) -> tuple[Split, ...]:
        if stage is not None:
            return _SPLITS_OF_STAGE[stage]
        folder = self._folder or Path()
        return tuple(split for split in self._given if has_split(split, folder, self._given)) or ("train",)

    def _tokenized_split(self, split: Split) -> Dataset:
        if split not in self._tokenized:
            raise DataError(f"The {split} split is not open; call setup() first.")
        return self._tokenized[split]

    def _sampler_of_trainer(self, trainer: Trainer, lengths: Sequence[int] | int) -> TrainingSampler:
        batch_size = self.hparams["train_batch_size"]
        seed = trainer.strategy.broadcast(torch.initial_seed())
        sampler = TrainingSampler(lengths, batch_size, seed, trainer.world_size, trainer.global_rank)
        sampler.set_epoch(trainer.current_epoch)
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            sampler.max_batches = limit
        elif limit is not None and limit < 1.0:
            sampler.max_batches = int(-(-len(sampler) // batch_size) * limit)
        return sampler

    def _collator(self) -> PaddingCollator:
        pad_token_id = self.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)
        return PaddingCollator(pad_token_id, self.hparams["max_length"])

    def _evaluation_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        return evaluation_loader(
            self._tokenized_split(split),
            self.hparams["eval_batch_size"],
            self._collator(),
            self.hparams["num_workers"],
            self.hparams["pin_memory"],
        )
