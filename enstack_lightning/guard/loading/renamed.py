"""Checkpoints that were set aside are forgotten by the ModelCheckpoint that saved them."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any


def forget_renamed(checkpoint: dict[str, Any], renamed: Collection[str]) -> None:
    """Takes renamed files out of the state of every ModelCheckpoint in a checkpoint that is being loaded.

    Else such a callback would go on to compare every new score with that of a file that is not there any more, and
    might never save a best checkpoint again.

    Args:
        checkpoint: the loaded dict; its `callbacks` are changed.
        renamed: the old paths.
    """
    gone = {os.path.realpath(path) for path in renamed}
    for state in checkpoint["callbacks"].values() if gone else ():  # every path is asked of the file system
        if isinstance(state, dict) and "best_model_path" in state:
            _forget(state, gone)


def _forget(state: dict[str, Any], gone: set[str]) -> None:
    scores = state.get("best_k_models") or {}
    kept = {path: score for path, score in scores.items() if os.path.realpath(path) not in gone}
    if len(kept) < len(scores):
        state["best_k_models"] = kept
        # Looked at only when the list is full, and set anew then.
        worst = state.pop("kth_value", None)
        state.pop("kth_best_model_path", None)
        if os.path.realpath(state["best_model_path"]) in gone:
            more_is_better = worst is None or bool(state["best_model_score"] >= worst)
            best = (max if more_is_better else min)(kept, key=lambda path: float(kept[path]), default="")
            state["best_model_path"], state["best_model_score"] = best, kept.get(best)
    elif os.path.realpath(state["best_model_path"]) in gone:
        state["best_model_path"], state["best_model_score"] = "", None
    if os.path.realpath(state.get("last_model_path") or "") in gone:
        state["last_model_path"] = ""
