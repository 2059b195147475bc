"""Whether what was read back is what was saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from enstack_lightning.checkpoint.mappings import is_mapping


def first_difference(saved: object, loaded: object, where: str = "checkpoint") -> str:
    """Where two trees of dicts, sequences and tensors first differ; empty where they are equal. NaN equals NaN."""
    if isinstance(saved, torch.Tensor):
        same = isinstance(loaded, torch.Tensor) and saved.shape == loaded.shape and saved.dtype == loaded.dtype
        return "" if same and _equal(saved, loaded) else where  # type: ignore[arg-type]
    if is_mapping(saved):
        if not is_mapping(loaded) or saved.keys() != loaded.keys():
            return where
        pairs = [(f"{where}[{key!r}]", value, loaded[key]) for key, value in saved.items()]
    elif isinstance(saved, Sequence) and not isinstance(saved, str | bytes):
        if not isinstance(loaded, Sequence) or len(saved) != len(loaded):
            return where
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(saved, loaded, strict=True))]
    elif isinstance(saved, float) and saved != saved:
        return "" if isinstance(loaded, float) and loaded != loaded else where
    elif isinstance(saved, int | float | str | bytes | bool | None):
        return "" if saved == loaded else where
    else:
        return "" if type(saved) is type(loaded) else where  # objects without an equality of their own
    return next(filter(None, (first_difference(a, b, place) for place, a, b in pairs)), "")


def _equal(saved: torch.Tensor, loaded: torch.Tensor) -> bool:
    a, b = (t.detach().cpu().resolve_conj().resolve_neg() for t in (saved, loaded))
    if a.layout is not torch.strided or a.is_quantized:
        return bool((a.to_dense() == b.to_dense()).all()) if a.layout is not torch.strided else torch.equal(a, b)
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
