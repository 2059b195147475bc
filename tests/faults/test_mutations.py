"""Checkpoints changed where their structure is: whatever they say, verification ends soon, small, and in findings."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mutations
import pytest
import torch
from builders import enstack_folder
from mutations import CAMPAIGNS, MOST_MEGABYTES, describe, run
from safetensors.torch import save

from enstack_lightning.checkpoint import Options, Severity, verify_checkpoint

LONG = {
    "pickles": 120_000,
    "pickles in files": 20_000,
    "zip directories": 30_000,
    "legacy files": 10_000,
    "safetensors headers": 30_000,
    "sharded metadata": 5_000,
    "JSON of folders": 10_000,
}
SHORT = {name: 1_000 if name == "pickles" else 120 for name in CAMPAIGNS}


def pickles(trained: Path, folder: Path) -> dict[str, bytes]:
    state = {"python": random.getstate()[1][:50], "cpu": torch.arange(4), "text": "ü", "set": {1, 2}, "bytes": b"ab"}
    state |= {"sparse": torch.eye(2).to_sparse(), "parameter": torch.nn.Parameter(torch.ones(2)), "path": Path("a")}
    found = {"lightning": zipfile.ZipFile(trained / "step=7.ckpt").read("archive/data.pkl")}
    for protocol in (2, 4, 5):
        file = io.BytesIO()
        torch.save(state, file, pickle_protocol=protocol)
        found[f"state {protocol}"] = zipfile.ZipFile(file).read("archive/data.pkl")
    return {
        **found,
        "metadata": sharded(trained, folder)[".metadata"],
        "plain": pickle.dumps({"a": [1, (2.5, None)]}, 4),
    }


def lightning(trained: Path, folder: Path) -> dict[str, bytes]:
    return {"c.ckpt": (trained / "step=7.ckpt").read_bytes()}


def legacy(trained: Path, folder: Path) -> dict[str, bytes]:
    file = io.BytesIO()
    model = torch.nn.BatchNorm1d(3)
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    return {"c.pt": file.getvalue()}


def safetensors(trained: Path, folder: Path) -> dict[str, bytes]:
    tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(3, dtype=torch.bfloat16), "empty": torch.ones(0, 4)}
    return {"model.safetensors": save(tensors, {"format": "pt"})}


def sharded(trained: Path, folder: Path) -> dict[str, bytes]:
    import torch.distributed.checkpoint as dcp

    place = folder / "sharded"
    dcp.save({"model": {"w": torch.ones(3, 2)}, "epoch": 3}, checkpoint_id=place, no_dist=True)
    return {file.name: file.read_bytes() for file in place.iterdir()}


def huggingface(trained: Path, folder: Path) -> dict[str, bytes]:
    shards = {
        "model-00001-of-00002.safetensors": {"weight": torch.ones(2, 4)},
        "model-00002-of-00002.safetensors": {"bias": torch.ones(2)},
    }
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    trainer = {
        "global_step": 20,
        "epoch": 1.0,
        "max_steps": 40,
        "num_train_epochs": 2,
        "train_batch_size": 4,
        "log_history": [{"step": 20}],
    }
    state = enstack_folder(folder / "state") / "training_state.pth"
    optimizer, scheduler = io.BytesIO(), io.BytesIO()
    torch.save(torch.load(state)["optimizer_state_dict"], optimizer)
    torch.save(torch.load(state)["scheduler_state_dict"], scheduler)
    return {
        **{name: save(tensors, {"format": "pt"}) for name, tensors in shards.items()},
        "model.safetensors.index.json": json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}).encode(),
        "config.json": json.dumps({"model_type": "roberta", "hidden_size": 4, "num_labels": 2}).encode(),
        "trainer_state.json": json.dumps(trainer).encode(),
        "optimizer.pt": optimizer.getvalue(),
        "scheduler.pt": scheduler.getvalue(),
    }


ORIGINALS: dict[str, Callable[[Path, Path], dict[str, bytes]]] = {
    "pickles": pickles,
    "pickles in files": lightning,
    "zip directories": lightning,
    "legacy files": legacy,
    "safetensors headers": safetensors,
    "sharded metadata": sharded,
    "JSON of folders": huggingface,
}


def test_every_campaign_has_files_and_a_length() -> None:
    assert set(ORIGINALS) == set(CAMPAIGNS) == set(LONG)
    assert sum(LONG.values()) >= 200_000


@pytest.mark.parametrize("campaign", sorted(set(CAMPAIGNS) - {"pickles"}))
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_files_are_good_before_they_are_changed(campaign: str, trained: Path, tmp_path: Path) -> None:
    path = mutations.write(tmp_path / "checkpoint", ORIGINALS[campaign](trained, tmp_path))
    report = verify_checkpoint(path, Options(purpose="inference"))
    assert not report.of(Severity.ERROR)


@pytest.mark.parametrize("campaign", CAMPAIGNS)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_some_mutations_of_each_kind_are_borne(campaign: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    files = ORIGINALS[campaign](trained, tmp_path)
    outcome = run(campaign, files, range(SHORT[campaign]), str(tmp_path / "work"))
    print(describe(campaign, [outcome]))
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.megabytes < MOST_MEGABYTES
    assert len(outcome.endings) > 1, "the mutations change nothing, or everything"


@pytest.mark.faults_long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("campaign", CAMPAIGNS)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_many_mutations_of_each_kind_are_borne(
    campaign: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, count, cores = ORIGINALS[campaign](trained, tmp_path), LONG[campaign], os.cpu_count() or 1
    jobs = []
    # Processes that never imported torch: their memory is the verification's.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for core in range(cores):
            (tmp_path / str(core)).mkdir()
            seeds = range(10_000_000 + count * core // cores, 10_000_000 + count * (core + 1) // cores)
            jobs.append(pool.submit(run, campaign, files, seeds, str(tmp_path / str(core))))
        outcomes = [job.result() for job in jobs]
    with capsys.disabled():
        print("\n" + describe(campaign, outcomes))
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    assert not failures, "\n".join(failures)
    assert max(outcome.megabytes for outcome in outcomes) < MOST_MEGABYTES
    assert sum(outcome.runs for outcome in outcomes) == count


def test_the_canary_sings_when_a_pickle_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its silence would mean nothing."""
    (tmp_path / f"{mutations.CANARY}.py").write_text(f"def run(*a): open({str(tmp_path / 'called')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    pickle.loads(b"\x80\x02" + mutations.HOSTILE[0] + b".")
    assert (tmp_path / "called").exists()
    monkeypatch.delitem(__import__("sys").modules, mutations.CANARY)
