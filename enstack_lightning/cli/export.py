"""`enstack export`: a Lightning checkpoint of this classifier becomes an EnStack or a Hugging Face folder.

The checkpoint is verified before it is read, and the folder appears in one step, whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint import Facts, Options, Report, failure_of, verify_checkpoint
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.checkpoint.resume import plan_resume
from enstack_lightning.cli.output import say
from enstack_lightning.errors import CheckpointError, DataError

LAYOUTS = ("enstack", "huggingface")
REST = "enstack_lightning"
"""Entry of `training_state.pth` with what EnStack has no place for: with it a resume from the folder is exact."""
WEIGHTS_PREFIX = "model."


def main(argv: Sequence[str]) -> int:
    """Runs `enstack export CKPT FOLDER --layout enstack|huggingface`."""
    arguments = _parser().parse_args(argv[1:])
    written = export_checkpoint(Path(arguments.checkpoint), Path(arguments.folder), arguments.layout)
    say(printable(f"{arguments.layout} folder written to {arguments.folder}: {', '.join(written)}"))
    return 0


def export_checkpoint(path: Path, folder: Path, layout: str) -> list[str]:
    """Writes `config.json`, `model.safetensors` and the tokenizer, and for EnStack `training_state.pth` too.

    Args:
        path: a `.ckpt` that this package's classifier was saved in.
        folder: folder to make; an empty one may stand there.
        layout: `enstack` or `huggingface`.

    Returns:
        The names of the files written.

    Raises:
        CheckpointError: The checkpoint has errors, is not of this classifier, or the folder cannot be made.
    """
    report = verify_checkpoint(path, Options(purpose="resume" if layout == "enstack" else "inference"))
    if not report.accepted(strict=False):
        raise failure_of(report)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already and is not empty; name a new folder")

    import torch
    from safetensors import SafetensorError

    from enstack_lightning.data.cache import atomic_folder

    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True) if path.is_file() else {}
    if "hf_config" not in checkpoint:
        raise CheckpointError(f"checkpoint {path} has no entry hf_config: it was not saved by VulnerabilityClassifier")
    try:
        with atomic_folder(folder) as unfinished:
            _write_network(checkpoint, unfinished)
            _write_tokenizer(checkpoint, unfinished)
            if layout == "enstack":
                torch.save(_training_state(checkpoint, report), unfinished / "training_state.pth")
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be written: {e.strerror or e}") from e
    except (SafetensorError, RuntimeError) as e:  # what safetensors and torch say where a disk is full
        raise CheckpointError(f"{folder} cannot be written: {e}") from e
    return sorted(p.name for p in folder.iterdir())


def _write_network(checkpoint: Mapping[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        name.removeprefix(WEIGHTS_PREFIX): tensor.contiguous().clone()
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(checkpoint["hf_config"], indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_tokenizer(checkpoint: Mapping[str, Any], folder: Path) -> None:
    from enstack_lightning.data.tokenization import load_tokenizer, tokenizer_from_json

    options = checkpoint.get("datamodule_hyper_parameters") or {}
    max_length = options.get("max_length", 512)
    text = (checkpoint.get("VulnerabilityDataModule") or {}).get("tokenizer_json")
    try:
        if text:
            tokenizer_from_json(text, max_length).save_pretrained(folder)
        elif options.get("tokenizer"):
            load_tokenizer(options["tokenizer"], max_length).save_pretrained(folder)
        else:
            print("enstack export: the checkpoint names no tokenizer, so none is written", file=sys.stderr)
    except DataError as e:
        print(f"enstack export: no tokenizer is written. {e}", file=sys.stderr)


def _training_state(checkpoint: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """EnStack's training state; EnStack reads entries by name, and leaves the last one alone."""
    facts = report.facts
    epoch, step = stands_at(facts)
    state = {
        "epoch": epoch,
        "step": step,
        "total_batches": facts.batches_per_epoch,
        "optimizer_state_dict": checkpoint["optimizer_states"][0],
        "scheduler_state_dict": checkpoint["lr_schedulers"][0] if checkpoint["lr_schedulers"] else None,
        "best_val_f1": _best(facts, "val/f1"),
        "best_val_acc": _best(facts, "val/accuracy"),
        REST: _rest(checkpoint),
    }
    return {name: value for name, value in state.items() if value is not None}


def stands_at(facts: Facts) -> tuple[int, int]:
    """Where a Lightning checkpoint stands, as EnStack counts it.

    Returns:
        The epoch, from 1, and the batches done in it, 0 when it is complete.
    """
    plan = plan_resume(facts)
    completed = facts.progress.epochs_completed or 0
    if plan is not None and plan.kind == "mid-epoch":
        return completed + 1, facts.progress.batches_in_epoch or 0
    return completed, 0


def _rest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without what has a place of its own in the folder."""
    elsewhere = ("state_dict", "optimizer_states", "lr_schedulers", "hf_config")
    rest = {name: value for name, value in checkpoint.items() if name not in elsewhere}
    weights = checkpoint["state_dict"].items()
    rest["state_dict"] = {name: tensor.clone() for name, tensor in weights if not name.startswith(WEIGHTS_PREFIX)}
    return rest


def _best(facts: Facts, metric: str) -> float | None:
    return facts.metrics.get(f"best {metric}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack export",
        description="Writes a verified Lightning checkpoint as a folder for EnStack or for transformers.",
        epilog="Exit status: 0 written, 1 the checkpoint or the folder cannot be used, 2 wrong call.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="Lightning .ckpt file")
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    parser.add_argument("--layout", choices=LAYOUTS, default="huggingface", help="form of the folder")
    return parser
