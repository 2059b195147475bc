"""The random state of Python, NumPy, torch and its accelerator, as plain values that `weights_only=True` can load.

The generators' words are kept as hexadecimal text: as a list of numbers they would be a quarter of what a small
checkpoint's pickle says, and a tensor takes a file descriptor on its way out of a loader's worker.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_random_state() -> dict[str, Any]:
    """The state of every global generator of this process, those of the accelerators as tensors."""
    return {
        **capture_cpu_random_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def capture_cpu_random_state() -> dict[str, Any]:
    """The state of the global generators of Python, NumPy and torch's CPU, as numbers and text."""
    return {
        "python": python_state_as_text(random.getstate()),
        "numpy": as_text(np.random.get_state(legacy=False)),
        "torch": as_text(torch.get_rng_state().numpy()),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets every global generator to what `capture_random_state` returned."""
    restore_cpu_random_state(state)
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def restore_cpu_random_state(state: dict[str, Any]) -> None:
    """Sets the generators to what `capture_cpu_random_state` returned."""
    random.setstate(python_state_from_text(state["python"]))
    np.random.set_state(from_text(state["numpy"]))
    torch.set_rng_state(torch.from_numpy(from_text(state["torch"])))


def python_state_as_text(state: tuple[Any, ...]) -> list[Any]:
    """What `random.Random.getstate` returned, as plain values."""
    version, internal, gauss = state
    return [version, as_text(np.array(internal, dtype=np.uint32)), gauss]


def python_state_from_text(state: list[Any]) -> tuple[Any, ...]:
    """What `python_state_as_text` was given."""
    version, internal, gauss = state
    return version, tuple(from_text(internal).tolist()), gauss


def as_text(value: Any) -> Any:
    """The value with each array in it as its dtype and its bytes."""
    if isinstance(value, dict):
        return {name: as_text(inner) for name, inner in value.items()}
    return [value.dtype.str, value.tobytes().hex()] if isinstance(value, np.ndarray) else value


def from_text(value: Any) -> Any:
    """What `as_text` was given."""
    if isinstance(value, dict):
        return {name: from_text(inner) for name, inner in value.items()}
    return np.array(np.frombuffer(bytes.fromhex(value[1]), dtype=value[0])) if isinstance(value, list) else value
