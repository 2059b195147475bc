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


STRATEGIES = ("ddp", "sharded")


def ranks(answers: Path, *cases: tuple[str, Path, Path | None, str, str]) -> list[list[str]]:
    """What rank 0 and rank 1 say that came of each case; hanging fails."""
    answers.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, str(SCRIPT), str(answers), json.dumps(cases, default=str)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=240, env=environment)
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


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each strategy, with what its ranks saved in an epoch."""
    folder = tmp_path_factory.mktemp("saves")
    said = ranks(folder / "answers", *((name, folder / name, None, "none", "") for name in STRATEGIES))
    assert said == [["step 8 from None judged None"] * 2] * 2
    return folder


def cases_of(strategy: str, saves: Path, folder: Path) -> dict[str, tuple[str, Path, Path, str, str]]:
    def case(name: str, damage: Callable[[Path], None] | None, fallback: str = "none", rank_1: str = "") -> Any:
        path = Path(shutil.copytree(saves / strategy, folder / name)) / "step=8.ckpt"
        if damage:
            damage(path)
        return strategy, folder / f"{name} saves", path, fallback, rank_1

    return {
        "missing": case("missing", missing),
        "cut": case("cut", cut),
        "flipped": case("flipped", flipped),
        "other files": case("other files", None, rank_1="sees nothing"),
        "fallback": case("fallback", cut, fallback="previous"),
        "no last": case("no last", None, rank_1="finds nothing"),
        "good": case("good", None),
        "hook": case("hook", None, rank_1="a hook of its own"),
        "lost on one rank": case("lost on one rank", None, rank_1="loses its optimizer"),
    }


@pytest.fixture(scope="module")
def came_of(saves: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[Path, list[str]]]]:
    """By strategy and case: the checkpoint to load, and what both ranks say; all in one pair of processes."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {strategy: cases_of(strategy, saves, folder / strategy) for strategy in STRATEGIES}
    said = iter(ranks(folder / "answers", *(case for named in cases.values() for case in named.values())))
    return {
        strategy: {name: (case[2], next(said)) for name, case in named.items()} for strategy, named in cases.items()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_act_on_one_verdict(strategy: str, came_of: dict[str, dict[str, tuple[Path, list[str]]]]) -> None:
    found = came_of[strategy]
    for name in ("missing", "cut", "flipped"):
        _, (of_rank_0, of_rank_1) = found[name]
        kind, _, message = of_rank_0.partition(": ")
        assert kind in ("CheckpointGuardError", "CheckpointToLoadNotFoundError")
        assert "must not be used: CK10" in message or "Checkpoint file not found" in message
        assert of_rank_1 == f"CheckpointGuardError: {message}"
    _, other_files = found["other files"]
    assert "is not the same on every rank: rank 1 sees " in other_files[0]
    assert "it is missing; rank 0: " in other_files[0]
    assert other_files[1] == other_files[0]
    path, fallen = found["fallback"]
    older = path.with_name("step=4.ckpt")
    assert fallen == [f"step 16 from {older} judged {older}"] * 2
    assert path.with_name("step=8.ckpt.corrupt").exists()
    for path, said in (found["no last"], found["good"], found["hook"]):
        assert said == [f"step 16 from {path} judged {path}"] * 2
    _, lost = found["lost on one rank"]
    assert "CK402 optimizer 0 has no state" in lost[1]
    assert lost[0].startswith("CheckpointGuardError: another rank refused to resume from ")
