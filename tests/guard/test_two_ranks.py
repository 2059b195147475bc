"""Two processes: rank 0 judges, both act on its verdict, and none waits for the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import flip_bit, truncate

SCRIPT = Path(__file__).with_name("two_ranks.py")


def ranks(strategy: str, answers: Path, *cases: tuple[Path, Path | None, str, str]) -> list[list[str]]:
    """What rank 0 and rank 1 say that came of each case; hanging fails."""
    answers.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, str(SCRIPT), strategy, str(answers), json.dumps(cases, default=str)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert (answers / "1").exists(), done.stderr
    said = [json.loads((answers / rank).read_text()) for rank in "01"]
    return [list(pair) for pair in zip(*said, strict=True)]


def part(path: Path) -> Path:
    """The file that rank 1 loads from."""
    return path / "__1_0.distcp" if path.is_dir() else path


def missing(path: Path) -> None:
    part(path).unlink()


def cut(path: Path) -> None:
    truncate(part(path), part(path).stat().st_size // 2)


def flipped(path: Path) -> None:
    """In the pickle of a file, and in the directory of a shard."""
    flip_bit(part(path), 1_000 if path.is_file() else part(path).stat().st_size - 60)


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_both_ranks_act_on_one_verdict(strategy: str, tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    assert ranks(strategy, tmp_path / "first", (saves, None, "none", "")) == [["step 8 from None judged None"] * 2]

    def case(name: str, damage: Callable[[Path], None] | None, fallback: str = "none", rank_1: str = "") -> Any:
        path = Path(shutil.copytree(saves, tmp_path / name)) / "step=8.ckpt"
        if damage:
            damage(path)
        return tmp_path / f"{name} saves", path, fallback, rank_1

    cases = [
        case("missing", missing),
        case("cut", cut),
        case("flipped", flipped),
        case("other files", None, rank_1="sees nothing"),
        case("fallback", cut, fallback="previous"),
        case("no last", None, rank_1="finds nothing"),
        case("good", None),
        case("lost on one rank", None, rank_1="loses its optimizer"),
    ]
    *refused, other_files, fallen, no_last, good, lost = ranks(strategy, tmp_path / "second", *cases)
    for of_rank_0, of_rank_1 in refused:
        kind, _, message = of_rank_0.partition(": ")
        assert kind in ("CheckpointGuardError", "CheckpointToLoadNotFoundError")
        assert "must not be used: CK10" in message or "Checkpoint file not found" in message
        assert of_rank_1 == f"CheckpointGuardError: {message}"
    assert "is not the same on every rank: rank 1 sees " in other_files[0]
    assert "it is missing; rank 0: " in other_files[0]
    assert other_files[1] == other_files[0]
    older = tmp_path / "fallback" / "step=4.ckpt"
    assert fallen == [f"step 16 from {older} judged {older}"] * 2
    assert (tmp_path / "fallback" / "step=8.ckpt.corrupt").exists()
    for said, (_, path, *_) in ((no_last, cases[5]), (good, cases[6])):
        assert said == [f"step 16 from {path} judged {path}"] * 2
    assert "CK402 optimizer 0 has no state" in lost[1]
    assert lost[0].startswith("CheckpointGuardError: another rank refused to resume from ")
