"""Two processes of which one sees, is given or does something else: both come to an end, with one clear sentence."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Tell, run_child
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_processes import GRACE_SECONDS, run_ranks
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import verify_checkpoint
from enstack_lightning.guard.loading import decision
from enstack_lightning.guard.loading.decision import Decision


class Module(LightningModule):
    """Rank 1 alone has a bad step or fails in one, where it is told to."""

    def __init__(self, on_rank_1: str = "") -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.on_rank_1 = on_rank_1

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        if self.trainer.global_rank == 1 and self.global_step == 6:
            if self.on_rank_1 == "fails":
                raise ZeroDivisionError("in rank 1's step")
            loss = loss * (float("nan") if self.on_rank_1 == "is not finite" else 1.0)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=2)


def trained(
    folder: Path, path: Path | None = None, strategy: str = "ddp", on_rank_1: str = "", **guard: Any
) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [CheckpointGuard(**guard), save]
    devices = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    trainer = Trainer(
        **devices, **quiet, max_epochs=2, limit_train_batches=8, default_root_dir=folder, callbacks=callbacks
    )
    torch.manual_seed(1)
    trainer.fit(Module(on_rank_1), ckpt_path=path)
    return trainer


def of_both(folder: Path, work: Callable[[int], Trainer]) -> list[str]:
    """What each rank says came of the work; both come to their end."""

    def on_one(tell: Tell) -> None:
        with warnings.catch_warnings(record=True) as warned:
            trainer = work(int(os.environ["RANK"]))
        said = [f"{w.message} " for w in warned if "all ranks" in str(w.message)]
        tell(f"{''.join(said)}step {trainer.global_step} from {trainer.ckpt_path}")

    folder.mkdir(exist_ok=True)
    ranks = run_ranks(on_one, log=folder / "log")
    assert not any(rank.given_up for rank in ranks), ranks
    assert all(rank.lived_on is None or rank.lived_on < GRACE_SECONDS for rank in ranks)
    return [next(line for line in reversed(rank.said) if line != "done") for rank in ranks]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    assert of_both(folder, lambda _: trained(folder)) == ["step 16 from None"] * 2
    return folder


# What they see and are given


def test_a_file_that_one_rank_sees_late_is_waited_for(saves: Path, tmp_path: Path) -> None:
    path = saves / "step=8.ckpt"

    def work(rank: int) -> Trainer:
        contents, began = decision.contents, time.monotonic()
        if rank == 1:
            decision.contents = lambda p: contents(p if time.monotonic() > began + 1 else f"{p}.nowhere")
        return trained(tmp_path, path)

    assert of_both(tmp_path, work) == [f"step 16 from {path}"] * 2


def test_a_fresh_start_of_rank_zero_beside_a_resume_of_another_is_refused(saves: Path, tmp_path: Path) -> None:
    path = saves / "step=8.ckpt"
    of_rank_0, of_rank_1 = of_both(tmp_path, lambda rank: trained(tmp_path, path if rank else None))
    assert of_rank_0.startswith("raised CheckpointGuardError rank 0 was given no checkpoint")
    assert f"rank 1 was given {path}" in of_rank_0
    assert of_rank_1 == of_rank_0


def test_all_load_what_rank_zero_was_given_and_are_told_so(saves: Path, tmp_path: Path) -> None:
    path, other = saves / "step=4.ckpt", saves / "step=8.ckpt"
    of_rank_0, of_rank_1 = of_both(tmp_path, lambda rank: trained(tmp_path, other if rank else path))
    assert f"all ranks load {path}, as rank 0 was given; rank 1 was given {other}" in of_rank_0
    assert of_rank_0.endswith(of_rank_1)
    assert of_rank_1 == f"step 16 from {path}"
    assert of_both(tmp_path, lambda rank: trained(tmp_path, None if rank else path)) == [f"step 16 from {path}"] * 2


# On disks of their own

DISKS = (
    "same/a three/a three/b three/c five/a five/b five/c",
    "same/a three/a three/c three/d five/a five/c five/d five/e five/f",
)
"""What each rank finds in its working folder; `c` is of the same size, and not the same."""


def judge(path: str) -> Decision:
    if path == "no space":
        raise OSError("no space is left")
    if path == "no words":
        raise AssertionError
    if path == "moved":
        return Decision("same", verify_checkpoint("same"), {"moved": "moved.corrupt"})
    return Decision(path)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each rank."""
    folder = tmp_path_factory.mktemp("disks")
    for rank, disk in enumerate(DISKS):
        for name in disk.split():
            path = folder / str(rank) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{rank if path.name == 'c' else 'x'}")
    return folder


@pytest.fixture(scope="module")
def came(disks: Path) -> dict[str, list[str]]:
    """What came of each path, on rank 0 and on rank 1."""
    paths = ("same", "moved", "three", "five", "no space", "no words")

    def work(tell: Tell) -> None:
        decision._WAITS = ()
        os.chdir(disks / os.environ["RANK"])
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
        trainer.strategy.setup_environment()
        judged: list[str] = []
        for path in paths:
            judged.clear()
            try:
                found = decision.judged_on_rank_zero(trainer, path, lambda asked: judged.append(asked) or judge(asked))
                said = f"{found.path} {found.report and found.report.path} {found.set_aside}"
            except Exception as e:
                said = f"{type(e).__name__} {e}"
            tell(f"{said}, judged here: {judged}")

    ranks = run_ranks(work, log=disks / "log")
    assert all(rank.done for rank in ranks), ranks
    said = zip(*(rank.said[:-1] for rank in ranks), strict=True)
    return {path: list(pair) for path, pair in zip(paths, said, strict=True)}


def test_what_rank_zero_decides_is_known_to_all(came: dict[str, list[str]]) -> None:
    assert came["same"] == ["same None {}, judged here: ['same']", "same None {}, judged here: []"]
    moved = "same same {'moved': 'moved.corrupt'}"
    assert came["moved"] == [f"{moved}, judged here: ['moved']", f"{moved}, judged here: []"]


def test_what_fails_on_rank_zero_is_raised_there_and_said_by_all(came: dict[str, list[str]]) -> None:
    assert came["no space"] == [
        "OSError no space is left, judged here: ['no space']",
        "CheckpointGuardError no space is left, judged here: []",
    ]
    assert came["no words"] == [
        "AssertionError , judged here: ['no words']",
        "CheckpointGuardError AssertionError, judged here: []",
    ]


@pytest.mark.parametrize(("path", "more"), [("three", ""), ("five", "; and 2 more")])
def test_files_that_differ_are_named_and_counted(path: str, more: str, disks: Path, came: dict[str, list[str]]) -> None:
    of_rank_0, of_rank_1 = (decision.contents(str(disks / rank / path)) for rank in "01")
    said = (
        f"CheckpointGuardError checkpoint {path} is not the same on every rank: rank 1 sees b: it is missing; "
        f"rank 0: {of_rank_0['b']}; rank 1 sees c: {of_rank_1['c']}; rank 0: {of_rank_0['c']}; "
        f"rank 1 sees d: {of_rank_1['d']}; rank 0: it is missing{more}. "
        "Put it where all processes read the same files, or copy it to every node."
    )
    assert came[path] == [f"{said}, judged here: ['{path}']", f"{said}, judged here: []"]


# What they do


def test_an_exception_of_one_rank_ends_both(tmp_path: Path) -> None:
    of_rank_0, of_rank_1 = of_both(tmp_path, lambda _: trained(tmp_path, on_rank_1="fails"))
    assert of_rank_1 == "raised ZeroDivisionError in rank 1's step"
    assert of_rank_0.startswith("raised RuntimeError")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=4.ckpt"]


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(tmp_path: Path) -> None:
    said = of_both(tmp_path, lambda _: trained(tmp_path, on_rank_1="is not finite", on_nonfinite="raise"))
    assert all(line.startswith("raised CheckpointGuardError") for line in said), said
    assert "the loss is nan and the gradient norm is not finite for layer.weight, layer.bias in step 7" in said[1]


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_processes_that_lightning_forks(strategy: str, saves: Path, tmp_path: Path) -> None:
    """The weights come back to the first process through a temporary file, of which nothing is left."""
    path = saves / "step=4.ckpt"
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def work(tell: Tell) -> None:
        tempfile.tempdir = str(temporary)
        trainer = trained(tmp_path, path, strategy)
        tell(str(trainer.lightning_module.layer.weight.tolist()))

    ended = run_child(work, log=tmp_path / "log")
    assert ended.done, ended
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=16.ckpt", "step=8.ckpt"]
    expected = torch.load(tmp_path / "step=16.ckpt")["state_dict"]["layer.weight"].tolist()
    assert ended.said[0] == str(expected)
    assert [p for p in temporary.rglob("*") if p.is_file()] == []
