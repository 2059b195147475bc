"""Data files, or a generated sample, to batches of tokenised C functions.

The names are imported on first use, so that `import enstack_lightning.data` loads neither torch nor datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "VulnerabilityDataModule": "enstack_lightning.data.datamodule",
    "tokenizer_from_json": "enstack_lightning.data.tokenization",
}

__all__ = ["VulnerabilityDataModule", "tokenizer_from_json"]

if TYPE_CHECKING:
    from enstack_lightning.data.datamodule import VulnerabilityDataModule
    from enstack_lightning.data.tokenization import tokenizer_from_json


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
