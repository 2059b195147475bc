"""What the training loader of a live Trainer gives: rows, batch size, and a fingerprint that costs next to nothing.

A dataset of a class that is not known here is asked for its length and never indexed: reading a row may download,
decode or count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset, TensorDataset

from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.readers.lightning import OF_DATA_MODULE

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

SAMPLED_ROWS = 64
SAMPLED_VALUES = 1_024
"""Values of a tensor's row, and indices of a subset, that go into a fingerprint."""


@dataclass(frozen=True)
class TrainingData:
    """The training data of a run; None where a loader or dataset does not tell.

    Attributes:
        batch_size: rows in a batch of this process.
        fingerprint: `KIND:DIGEST`.
    """

    rows: int | None = None
    batch_size: int | None = None
    fingerprint: str | None = None


def training_data(trainer: Trainer) -> TrainingData:
    """The training data of a Trainer whose training loader is made; of several loaders nothing is told."""
    combined = trainer.fit_loop._combined_loader
    loaders = list(combined.flattened) if combined is not None else []
    if len(loaders) != 1:
        return TrainingData()
    dataset = getattr(loaders[0], "dataset", None)
    of_module = _of_data_module(getattr(trainer, "datamodule", None))
    return TrainingData(length_of(dataset), _batch_size(loaders[0]), of_module or _fingerprint(dataset))


def _batch_size(loader: object) -> int | None:
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def length_of(dataset: Any) -> int | None:
    """How many rows a data set says it has; None where it does not say."""
    try:
        return len(dataset)
    except Exception:  # a dataset without a length may raise anything, and the run can do without
        return None


def _of_data_module(module: object) -> str | None:
    prints = getattr(module, "fingerprints", None)
    digest = prints.get("train") if is_mapping(prints) else None
    return f"{OF_DATA_MODULE}:{digest}" if isinstance(digest, str) else None


def _fingerprint(dataset: object) -> str | None:
    if type(dataset) is TensorDataset:
        return f"tensors:{_digest(part for tensor in dataset.tensors for part in _samples(tensor))}"
    if type(dataset) is Subset:
        inner, indices = _fingerprint(dataset.dataset), dataset.indices
        if not isinstance(indices, list | tuple | range):
            return None
        chosen = [int(indices[i]) for i in _spread(len(indices), SAMPLED_VALUES)]
        if inner is None:  # the rows themselves are not looked at
            return f"subset:{_digest((str(len(indices)).encode(), repr(chosen).encode()))}"
        return f"subset of {inner.partition(':')[0]}:{_digest((inner.encode(), repr(chosen).encode()))}"
    own = getattr(dataset, "_fingerprint", None)
    if type(dataset).__module__.partition(".")[0] == "datasets" and isinstance(own, str):
        return f"datasets:{own}"
    return None


def _samples(tensor: torch.Tensor) -> Iterable[bytes]:
    """Type, shape and some rows of a tensor, as bytes."""
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel() or not tensor.dim():
        return
    rows = tensor.detach()[torch.tensor(_spread(len(tensor), SAMPLED_ROWS), device=tensor.device)]
    values = rows.reshape(len(rows), -1)[:, :SAMPLED_VALUES].contiguous().cpu()
    yield values.view(torch.uint8).numpy().tobytes()


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
