"""`enstack ledger` on a real run of `enstack fit`, killed with SIGKILL twice and resumed with `--ckpt_path auto`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import functions, write_jsonl
from killing import run_child
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning import SampleLedger
from enstack_lightning.cli.main import main

ROWS, BATCH_SIZE, EPOCHS = 90, 16, 3
BATCHES = -(-ROWS // BATCH_SIZE)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its 9th batch, and, resumed, in the forward pass of its 4th."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "data").mkdir()
    rows = [{**row, "idx": 7 * (number // 2)} for number, row in enumerate(functions(ROWS + 24, seed=6))]
    write_jsonl(folder / "data" / "train.jsonl", rows[:ROWS])
    write_jsonl(folder / "data" / "validation.jsonl", rows[ROWS:])
    for number, (batches, moment) in enumerate([(9, "step"), (4, "forward"), (None, "step")], start=1):
        record = {"path": str(folder / "record.jsonl"), "kill_at": batches, "moment": moment}
        config = {
            "seed_everything": 3,
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": EPOCHS,
                "default_root_dir": str(folder / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [{"class_path": "enstack_lightning.guard.step_record.StepRecord", "init_args": record}],
            },
            "model": {
                "pretrained": False,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "max_position_embeddings": 66,
            },
            "data": {
                "path": str(folder / "data"),
                "cache_dir": str(folder / "cache"),
                "max_length": 64,
                "vocab_size": 300,
                "train_batch_size": BATCH_SIZE,
                "length_bucketing": True,
            },
            "recovery_checkpoint": {"every_n_train_steps": 2},
        }
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(config))
        call = ["fit", "--config", str(path), "--ckpt_path", "auto"]
        ended = run_child(lambda tell, call=call: tell(f"status {main(call)}"), log=folder / "log.txt")
        assert ended.killed if batches else ended.numbers("status") == [0], (folder / "log.txt").read_text()
    return folder / "run"


def test_a_run_that_was_killed_twice_used_every_row_once(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(killed), "--format", "json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == ""
    assert (report["verdict"], report["problems"]) == ("pass", [])
    found = [(e["epoch"], e["state"], e["batches"], e["rows"], e["uses"], e["faults"]) for e in report["epochs"]]
    assert found == [(epoch, "complete", BATCHES, ROWS, ROWS, []) for epoch in range(EPOCHS)]
    starts = report["starts"]
    assert [start["batches"] - start["rolled_back"] for start in starts] == [8, 2, 8]
    assert [start["trained_again"] for start in starts] == [start["rolled_back"] for start in starts]
    assert [start["first"] and start["first"]["global_step"] for start in starts] == [0, 8, 10]
    assert report["bytes"] < 18_000
    record = [json.loads(line) for line in (killed.parent / "record.jsonl").read_text().splitlines()]
    assert len(record) - sum(start["batches"] for start in starts) in (0, 1)


def test_the_report_says_so_in_lines(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(killed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ledger       {killed / 'ledger'}  ")
    assert lines[2].endswith(("from the beginning: 9 batches, 1 of them rolled back", "from the beginning: 8 batches"))
    assert "from epoch 1, batch 2, step 8: " in lines[3]
    assert "epoch 0      complete     6 batches, 90 rows: each exactly once (start 1)" in lines
    assert "epoch 1      complete     6 batches, 90 rows: each exactly once (starts 1, 2, 3)" in lines
    assert any(line.startswith("rolled back  ") and "of them trained again since: start" in line for line in lines)
    assert lines[-1] == "verdict      PASS  Every row was used exactly once in each of 3 complete epochs."


def test_it_imports_no_torch(killed: Path) -> None:
    call = [sys.executable, "-X", "importtime", "-m", "enstack_lightning", "ledger", str(killed)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "numpy", "datasets"}
    assert "enstack_lightning" in imported


def test_a_full_disk_ends_with_2(killed: Path) -> None:
    call = [sys.executable, "-m", "enstack_lightning", "ledger", str(killed)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "enstack ledger: standard output cannot be written: No space left on device\n"


def test_a_ledger_cut_short_fails(killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(killed / "ledger", tmp_path / "ledger")).parent
    path = run / "ledger" / "start-0001-rank-0.ledger"
    path.write_bytes(path.read_bytes()[:500])
    assert main(["ledger", str(run)]) == 1
    printed = capsys.readouterr().out
    assert "that its checkpoint contains are not recorded" in printed
    assert "ends inside the record at byte" in printed
    assert "FAIL  The ledger is not complete, and cannot show" in printed


class Shuffled(LightningModule):
    """Its plain DataLoader shuffles anew after a restart, which uses rows of the epoch twice and others not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(60, 2), torch.arange(60)), batch_size=4, shuffle=True)


def test_rows_that_were_missed_and_repeated_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trainer(**options: int) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8)
        return Trainer(callbacks=[SampleLedger(rows=1), saves], default_root_dir=tmp_path, **quiet, **options)

    trainer(max_steps=9).fit(Shuffled())
    trainer(max_epochs=3).fit(Shuffled(), ckpt_path=tmp_path / "step=8.ckpt")
    assert main(["ledger", str(tmp_path), "--format", "json"]) == 1
    epoch = json.loads(capsys.readouterr().out)["epochs"][0]
    assert main(["ledger", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = next(line for line in lines if line.startswith("             missing: rows "))
    assert f"rows {', '.join(map(str, epoch['missing'][:20]))}" in missing
    assert any(f"{row['row']} (2 times)" in line for row in epoch["repeated"][:1] for line in lines)
    assert lines[-1] == "verdict      FAIL  Not every row was used as planned in 1 epoch: 0."


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_ledger_is_a_wrong_call(
    made: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path if made else tmp_path / "none"
    assert main(["ledger", str(folder)]) == 2
    said = capsys.readouterr()
    assert ("holds no sample ledger" if made else "is no folder of a run") in said.err
    assert said.out == ""
