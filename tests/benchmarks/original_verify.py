"""What EnStack's own verification script did, written from its description: the five checks on a loaded training state.

It is the other side of a benchmark: load `training_state.pth` on the CPU, look at files, fields, metadata, and at the
step of the optimizer's first parameter.

    python tests/benchmarks/original_verify.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 20


def check_files(folder: Path) -> list[str]:
    errors = [] if folder.is_dir() else [f"{folder} is no directory"]
    weights = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    for path in (folder / "training_state.pth", folder / "config.json", next((w for w in weights if w.exists()), None)):
        if path is None or not path.exists():
            errors.append(f"required file missing: {path or 'model weights'}")
        elif path.stat().st_size == 0:
            errors.append(f"file is empty: {path.name}")
    return errors


def check_state(state: dict[str, Any]) -> list[str]:
    errors = [f"{name} is missing" for name in ("epoch", "step", "optimizer_state_dict") if name not in state]
    if state["epoch"] < 0 or state["step"] < 0:
        errors.append("epoch or step is negative")
    if not all(0 <= state[name] <= 1 for name in ("best_val_f1", "best_val_acc")):
        errors.append("a metric is out of range")
    return errors


def check_optimizer(state: dict[str, Any]) -> list[str]:
    batches, epoch, step = state["total_batches"], state["epoch"], state["step"]
    expected = epoch * batches if step == 0 else (epoch - 1) * batches + step
    first = next(iter(state["optimizer_state_dict"]["state"].values()))
    actual = int(first["step"])
    if abs(actual - expected) > max(TOLERANCE, batches // 10):
        return [f"optimizer steps ({actual}) differ from expected ({expected})"]
    return []


def main() -> int:
    folder = Path(sys.argv[1])
    errors = check_files(folder)
    if not errors:
        state = torch.load(folder / "training_state.pth", map_location="cpu")
        errors = check_state(state) + check_optimizer(state)
    print("\n".join(errors) or "VERIFICATION PASSED")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
