"""What `--ckpt_path auto` is, is found by rank 0, and the other ranks go by that whatever they see."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killed_fits import config_of, fit, lines_of
from killing import Tell, run_child
from rank_processes import RANKS, run_ranks

from enstack_lightning.cli import training
from enstack_lightning.cli.main import main
from enstack_lightning.cli.rank_zero import VARIABLE, forget_what_was_told, told_by_rank_zero

AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0"}
AGENT |= {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS)}


def with_agent() -> Any:
    """As in a process of torchrun's, on rank 0 with the store that its agent keeps."""
    from torch.distributed import TCPStore

    os.environ |= AGENT
    here = "127.0.0.1", int(os.environ["MASTER_PORT"])
    return TCPStore(*here, is_master=os.environ["RANK"] == "0", wait_for_workers=False)


def not_asked() -> str:
    raise AssertionError("this rank was asked")


def refused() -> str:
    raise KeyError("no checkpoint")


@pytest.mark.parametrize("answer", ["runs/last.ckpt", None, "raises"])
def test_with_torchrun_the_others_are_told(answer: str | None) -> None:
    def work(tell: Tell) -> None:
        store, first = with_agent(), os.environ["RANK"] == "0"
        of_rank_0 = refused if answer == "raises" else lambda: answer
        try:
            tell(f"told {told_by_rank_zero(of_rank_0 if first else not_asked, (ValueError, KeyError))}")
        finally:
            store.get("heard") if first else store.set("heard", "")  # the store goes with rank 0

    said = [rank.said[0] for rank in run_ranks(work)]
    assert said[0] == (f"told {answer}" if answer != "raises" else "raised KeyError 'no checkpoint'")
    assert said[1].replace('"', "") == said[0]


def test_processes_that_lightning_starts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    def work(tell: Tell) -> None:
        assert told_by_rank_zero(lambda: "runs/last.ckpt", ()) == "runs/last.ckpt"
        os.environ["LOCAL_RANK"] = "1"
        tell(f"told {told_by_rank_zero(not_asked, ())}")
        forget_what_was_told()
        tell(f"found {told_by_rank_zero(lambda: 'another run', ())}")

    assert run_child(work).said[:2] == ("told runs/last.ckpt", "found another run")


def test_where_nobody_can_tell_each_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    ranks = run_ranks(lambda tell: tell(f"told {told_by_rank_zero(lambda: os.environ['RANK'], ())}"))
    assert [rank.said[0] for rank in ranks] == ["told 0", "told 1"]


@pytest.fixture
def config(data: Path, cache: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(data, cache, 1, {"strategy": "ddp", "devices": RANKS})))
    return path


def test_a_rank_that_sees_the_run_ended_goes_on_with_the_others(config: Path, tmp_path: Path) -> None:
    """Else it would end, and rank 0 would wait for it until torch gives up after half an hour."""

    def sees_it_ended(*_: Any) -> Any:
        raise training._FinishedError("nothing left to train")

    def work(tell: Tell) -> None:
        kept = with_agent()  # noqa: F841 - the store lives as long as it is kept
        if os.environ["RANK"] == "1":
            training.newest_in = sees_it_ended
        fit(config, tmp_path, tell)

    ranks = run_ranks(work, log=tmp_path / "log")
    assert [rank.said[-2:] for rank in ranks] == [("status 0", "done")] * RANKS
    assert [len(lines_of(tmp_path, rank)) for rank in range(RANKS)] == [6] * RANKS


def test_a_folder_is_resumed_from_though_rank_zero_takes_its_time_to_copy_it(config: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    run.mkdir()
    call = ["fit", "--config", str(config), "--trainer.default_root_dir", str(run)]
    assert all(rank.done for rank in run_ranks(lambda tell: fit(config, run, tell)))
    (run / "checkpoints" / "best_model.ckpt").unlink()
    export = ["export", str(next(run.rglob("*.ckpt"))), str(folder), "--layout", "enstack"]
    ended = run_child(lambda tell: tell(str(main(export))))
    assert ended.said[0] == "0"

    def work(tell: Tell) -> None:
        save = torch.save

        def save_slowly(*args: Any, **kwargs: Any) -> None:
            time.sleep(1)
            save(*args, **kwargs)

        if os.environ["RANK"] == "0":
            torch.save = save_slowly
        tell(f"status {main([*call, '--ckpt_path', str(folder), '--trainer.max_epochs', '2'])}")

    ranks = run_ranks(work, log=tmp_path / "log")
    assert [rank.said for rank in ranks] == [("status 0", "done")] * RANKS
