"""Folders of transformers, written by transformers, and what befalls them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

from enstack_lightning.checkpoint import Severity, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import DefectKind, Facts, OddityKind
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.checkpoint.readers.huggingface import is_huggingface_folder, read_huggingface
from enstack_lightning.checkpoint.readers.trainer_state import update_steps

ROWS, BATCH = 22, 2
BATCHES = ROWS // BATCH
INDEX = "model.safetensors.index.json"

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"num_train_epochs": 2},
    "accumulated": {"num_train_epochs": 3, "gradient_accumulation_steps": 2},
    "half an epoch": {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
    "by steps": {"max_steps": 9, "gradient_accumulation_steps": 3},
    "watched": {
        "max_steps": 8,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    },
    "model only": {"max_steps": 4, "save_only_model": True},
}


def tiny_model() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 20}
    return RobertaForSequenceClassification(
        RobertaConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=5, **sizes)
    )


def tiny_trainer(folder: Path, options: dict[str, Any]) -> Trainer:
    rows = [{"input_ids": torch.randint(3, 60, (8,)), "labels": torch.tensor(i % 5)} for i in range(ROWS)]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 2}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, save_steps=2, **{**quiet, **options}
    )
    return Trainer(model=tiny_model(), args=arguments, train_dataset=rows, eval_dataset=rows[:4])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoints of a run of transformers' Trainer, `checkpoint-2`, `checkpoint-4` and so on."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("trainer")
            tiny_trainer(done[name], RUNS[name]).train()
        return done[name]

    return run


@pytest.fixture
def checkpoint(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint inside the first epoch: 4 updates of 2 batches."""
    return Path(shutil.copytree(runs("accumulated") / "checkpoint-4", tmp_path / "checkpoint-4"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in six shards."""
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="4KB")
    return tmp_path / "model"


def in_torch_format(folder: Path, shards: str = "") -> Path:
    """The same model as `pytorch_model.bin`, or in shards of that size."""
    folder.mkdir()
    model = tiny_model()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    pattern = "pytorch_model{suffix}.bin"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shards)
    for file, names in split.filename_to_tensors.items():
        torch.save({name: state[name].clone() for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path, deep: bool = False) -> Facts:
    return read_huggingface(locate(folder), DeepRead() if deep else None)


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def said(facts: Facts) -> str:
    return "\n".join(f"{d.kind} {d.where}: {d.message}" for d in facts.defects)


# What is read


def test_a_trainers_checkpoint_says_what_transformers_loads(checkpoint: Path) -> None:
    facts = read(checkpoint)
    assert (facts.defects, facts.oddities, facts.model_only) == ((), (), False)
    weights = load_file(checkpoint / "model.safetensors")
    assert {t.name: (f"torch.{t.dtype}", t.shape) for t in facts.tensors} == {
        name: (str(t.dtype), tuple(t.shape)) for name, t in weights.items()
    }
    saved = torch.load(checkpoint / "optimizer.pt")
    (optimizer,) = facts.optimizers or ()
    assert optimizer.steps == {key: state["step"].item() for key, state in saved["state"].items()}
    assert [g.lr for g in optimizer.groups] == [g["lr"] for g in saved["param_groups"]]
    (scheduler,) = facts.schedulers or ()
    assert scheduler.last_epoch == facts.progress.global_step == 4
    assert facts.progress.epoch_fraction == 8 / BATCHES
    assert (facts.run.max_epochs, facts.run.max_steps, facts.run.accumulate_grad_batches) == (3, 18, 2)
    assert (facts.run.world_size, facts.batches_per_epoch) == (1, BATCHES)
    assert facts.model_config["num_hidden_layers"] == 2
    assert {g.loader for g in facts.globals if g.where.startswith("rng_state")} == {"transformers"}
    assert {g.loader for g in facts.globals if g.where.startswith("training_args")} == {"never"}
    assert {f.name for f in facts.files} == {f.name for f in checkpoint.iterdir()}


@pytest.mark.parametrize("name", ["plain", "accumulated", "half an epoch", "by steps"])
def test_progress_is_what_the_trainer_itself_reckons_on_a_resume(runs: Callable[[str], Path], name: str) -> None:
    trainer = tiny_trainer(runs(name), RUNS[name])
    epochs, updates, *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    checkpoints = sorted(runs(name).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    assert len(checkpoints) > 3
    for folder in checkpoints:
        facts = read(folder)
        reckoned = trainer._init_training_state(max_steps, updates, epochs, str(folder), None)
        assert (facts.progress.epochs_completed, facts.progress.batches_in_epoch) == reckoned
        assert facts.run.max_epochs == epochs
        # Before the first log and at an epoch's end no fraction of an epoch tells how many batches its last update has.
        assert facts.batches_per_epoch in (BATCHES, None)
        assert facts.batches_per_epoch == BATCHES or RUNS[name].get("gradient_accumulation_steps", 1) > 1
        assert verify_checkpoint(folder).verdict is Verdict.PASS, verify_checkpoint(folder).findings


@pytest.mark.parametrize(
    ("state", "per_epoch"),
    [
        ({"global_step": 400, "epoch": 8 / 11, "max_steps": 18, "num_train_epochs": 3}, 6),
        ({"global_step": 3, "epoch": 3 / 7}, 7),
        ({"global_step": 10**9, "epoch": 1e-300}, None),
        ({"global_step": 5, "epoch": 0.5, "max_steps": 20, "num_train_epochs": 2**63 - 1}, 20),
        ({"global_step": -1, "epoch": 1, "max_steps": -1, "num_train_epochs": 0}, None),
        ({"global_step": True, "epoch": "1"}, None),
        ({}, None),
    ],
)
def test_counters_that_cannot_be_give_no_length_of_an_epoch(state: dict[str, Any], per_epoch: int | None) -> None:
    assert update_steps(state, {}).per_epoch == per_epoch


def test_a_schedule_that_waits_for_evaluations_is_no_schedule_of_steps(runs: Callable[[str], Path]) -> None:
    folder = runs("watched") / "checkpoint-8"
    facts = read(folder)
    assert facts.run.scheduler_intervals == ()
    best = json.loads((folder / "trainer_state.json").read_text())["best_metric"]
    assert facts.metrics == {"best loss": best}
    assert verify_checkpoint(folder).verdict is Verdict.PASS, verify_checkpoint(folder).findings


def test_a_trainer_that_was_told_to_save_the_model_only_leaves_nothing_to_resume(runs: Callable[[str], Path]) -> None:
    folder = runs("model only") / "checkpoint-4"
    facts = read(folder)
    assert (facts.model_only, facts.defects, facts.progress.global_step) == (True, (), 4)
    assert verify_checkpoint(folder).verdict is Verdict.FAIL


@pytest.mark.parametrize("form", ["one file", "shards", "torch file", "torch shards"])
def test_a_model_is_read_in_every_form(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "model"
    if form.startswith("torch"):
        in_torch_format(folder, "4KB" if form.endswith("shards") else "")
    else:
        tiny_model().save_pretrained(folder, max_shard_size="4KB" if form == "shards" else "1GB")
    facts = read(folder)
    assert is_huggingface_folder([f.name for f in folder.iterdir()])
    assert (facts.defects, facts.oddities, facts.model_only) == ((), (), True)
    expected = {name: tuple(t.shape) for name, t in tiny_model().state_dict().items()}
    assert {t.name: t.shape for t in facts.tensors} == expected
    assert {t.where for t in facts.tensors} == {
        f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")
    }
    without = {f.name for f in facts.files if f.without_checksum}
    assert without == {f.name for f in folder.iterdir() if f.suffix != ".bin"}


def test_tied_weights_do_not_disagree_with_the_size_that_the_index_gives(tmp_path: Path) -> None:
    folder = in_torch_format(tmp_path / "model", "4KB")
    shard = next(folder.glob("pytorch_model-00001*"))
    state = torch.load(shard)
    name, tensor = next(iter(state.items()))
    torch.save({**state, "tied": tensor}, shard)
    edit_json(folder / "pytorch_model.bin.index.json", lambda i: i["weight_map"].update(tied=i["weight_map"][name]))
    assert (read(folder).defects, read(folder).oddities) == ((), ())


def test_an_adapter_needs_no_config_of_its_base_model(tmp_path: Path) -> None:
    save_file({"base.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    facts = read(tmp_path)
    assert (facts.defects, [t.name for t in facts.tensors]) == ((), ["base.lora_A.weight"])


# An index and its shards


def _first(index: dict[str, Any]) -> str:
    return next(iter(index["weight_map"]))


def _name_shard(shard: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update({_first(index): shard})


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no map": (lambda i: i.pop("weight_map"), "no weight_map"),
    "no metadata": (lambda i: i.pop("metadata"), "no entry metadata"),
    "map of another type": (lambda i: i.update(weight_map=[1]), "no weight_map"),
    "number for a shard": (_name_shard(3), "is a JSON int"),
    "parent folder": (_name_shard("../model-00001-of-00006.safetensors"), "leads out"),
    "absolute path": (_name_shard("/etc/model.safetensors"), "leads out"),
    "backslashes": (_name_shard("..\\model.safetensors"), "leads out"),
    "drive": (_name_shard("C:model.safetensors"), "leads out"),
    "other extension": (_name_shard("pytorch_model.bin"), "does not end with .safetensors"),
    "shard of another set": (_name_shard("model-00001-of-00007.safetensors"), "sets of 6 and 7"),
    "wrong shard": (_name_shard("model-00002-of-00006.safetensors"), "and it does not"),
    "tensor not named": (lambda i: i["weight_map"].pop(_first(i)), "does not name"),
    "tensor not there": (
        lambda i: i["weight_map"].update(ghost="model-00002-of-00006.safetensors"),
        "holds ghost, and it does not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_is_wrong_is_refused(sharded: Path, fault: str) -> None:
    edit, message = INDEX_FAULTS[fault]
    edit_json(sharded / INDEX, edit)
    facts = read(sharded)
    assert message in said(facts)
    assert {d.kind for d in facts.defects} <= {DefectKind.DAMAGED, DefectKind.MISSING}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "JSON list"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands twice"),
        ('{"metadata": {"total_size": NaN}}', "NaN is no JSON"),
        ('{"weight_map": ' + "[" * 5_000, "no valid JSON"),
        ('{"a": 1', "no valid JSON"),
        ("\ufeff{}", "no valid JSON"),
        (" " * (10 * 2**20 + 1), "the limit is 10,485,760"),
    ],
    ids=["list", "duplicate", "nan", "deep", "cut", "bom", "large"],
)
def test_an_index_that_is_no_index_is_refused(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    assert message in said(read(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00003-of-00006.safetensors").unlink()
    assert said(read(sharded)) == "missing model-00003-of-00006.safetensors: it is missing"


def test_a_cut_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00006.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    (defect,) = read(sharded).defects
    assert (defect.kind, defect.where) == (DefectKind.TRUNCATED, shard.name)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    name = json.loads((sharded / INDEX).read_text())["weight_map"]
    first, shard = next(iter(name.items()))
    other = sharded / next(s for s in name.values() if s != shard)
    save_file({**load_file(other), first: load_file(sharded / shard)[first]}, other)
    assert f"{first} is held by 2 shards" in said(read(sharded))


def test_shards_without_their_index_are_no_model(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert "missing model.safetensors.index.json: it is missing: 6 shards are there" in said(read(sharded))


def test_a_shard_that_nothing_names_is_odd(sharded: Path) -> None:
    shutil.copy(sharded / "model-00003-of-00006.safetensors", sharded / "model-00007-of-00009.safetensors")
    facts = read(sharded)
    assert facts.defects == ()
    assert [(o.kind, o.where) for o in facts.oddities] == [(OddityKind.STRAY_FILE, "model-00007-of-00009.safetensors")]


def test_another_total_size_is_odd(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda i: i["metadata"].update(total_size=1))
    (oddity,) = read(sharded).oddities
    assert (oddity.kind, "1 bytes (total_size), and the shards hold 22,484" in oddity.message) == (
        OddityKind.TOTAL_SIZE,
        True,
    )


def test_links_are_followed_within_the_folder_and_the_hubs_cache_only(sharded: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    assert read(snapshot).defects == ()
    (sharded / "model-00001-of-00006.safetensors").unlink()
    (sharded / "model-00001-of-00006.safetensors").symlink_to(blobs / "1")
    assert "leads out of the checkpoint's folder" in said(read(sharded))


def test_only_the_blobs_of_a_hubs_cache_are_no_way_out(checkpoint: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    run = tmp_path / "run" / "checkpoint-4"
    run.parent.mkdir()
    blobs.mkdir()
    shutil.move(checkpoint, run)
    shutil.move(run / "model.safetensors", blobs / "0")
    (run / "model.safetensors").symlink_to(blobs / "0")
    assert "model.safetensors: it is a link that leads out of the checkpoint's folder" in said(read(run))


def test_a_shard_behind_a_linked_folder_is_not_read(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.move(sharded / "model-00001-of-00006.safetensors", tmp_path / "elsewhere")
    (sharded / "parts").symlink_to(tmp_path / "elsewhere")
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace("model-00001-of", "parts/model-00001-of"))
    facts = read(sharded)
    assert "a link that leads out of the checkpoint's folder" in said(facts)
    assert not any(t.where.startswith("parts") for t in facts.tensors)


def test_an_index_that_transformers_does_not_look_for_is_no_model(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "old.safetensors.index.json")
    assert "no index of them" in said(read(sharded))


@pytest.mark.timeout(20)
def test_shards_that_hold_what_their_index_does_not_name_are_not_all_read(tmp_path: Path) -> None:
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5_000)})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part-0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    for i in range(1, 400):
        os.link(tmp_path / "part-0.safetensors", tmp_path / f"part-{i}.safetensors")
    index = {"metadata": {}, "weight_map": {f"t{i}": f"part-{i}.safetensors" for i in range(400)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    began = time.process_time()
    facts = read(tmp_path)
    assert time.process_time() - began < 2
    assert "shards hold far more tensors than the 400 that it names" in said(facts)


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_shard_is_not_waited_for(sharded: Path) -> None:
    (sharded / "model-00001-of-00006.safetensors").unlink()
    os.mkfifo(sharded / "model-00001-of-00006.safetensors")
    assert "not a regular file" in said(read(sharded))


def test_weights_in_both_formats_that_differ_are_told(tmp_path: Path) -> None:
    folder = in_torch_format(tmp_path / "model")
    tiny_model().save_pretrained(folder)
    assert read(folder).oddities == ()
    state = torch.load(folder / "pytorch_model.bin")
    torch.save({**state, "classifier.out_proj.bias": torch.zeros(7)}, folder / "pytorch_model.bin")
    (oddity,) = read(folder).oddities
    assert oddity.where == "pytorch_model.bin"
    assert "1 of 41 tensors of model.safetensors" in oddity.message
    assert {t.where for t in read(folder).tensors} == {"model.safetensors"}


# What befalls a checkpoint


def test_an_interrupted_save_is_told(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()
    assert "missing trainer_state.json: it is missing: the Trainer writes it last" in said(read(checkpoint))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    assert "missing trainer_state.json" in said(read(checkpoint))
    staged = checkpoint.rename(checkpoint.with_name("tmp-checkpoint-4"))
    assert read(staged).leftovers == ("tmp-checkpoint-4",)


def test_a_final_model_beside_its_training_arguments_is_a_model(runs: Callable[[str], Path], tmp_path: Path) -> None:
    tiny_trainer(tmp_path, RUNS["plain"]).save_model(str(tmp_path / "final"))
    facts = read(tmp_path / "final")
    assert (facts.defects, facts.model_only) == ((), True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_resume_that_would_silently_start_afresh_is_told(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert f"missing {name}: it is missing, and a resume would silently go on" in said(read(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "text", "list"])
def test_damage_to_any_file_is_found(checkpoint: Path, name: str, damage: str) -> None:
    file = checkpoint / name
    if damage == "list":
        torch.save([1], file)
        if name not in ("optimizer.pt", "scheduler.pt"):
            return
    else:
        data = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": data[:-1], "zeros": bytes(len(data)), "text": b"hello"}[damage])
    assert any(d.where.startswith(name) for d in read(checkpoint).defects)


@pytest.mark.parametrize(
    ("name", "value"),
    [("global_step", "4"), ("global_step", 4.5), ("epoch", "one"), ("max_steps", 2**70), ("num_train_epochs", True)],
)
def test_counters_of_another_type_are_told(checkpoint: Path, name: str, value: object) -> None:
    edit_json(checkpoint / "trainer_state.json", lambda s: s.update({name: value}))
    assert f"misshapen {name}" in said(read(checkpoint))


def test_a_loss_that_was_not_a_number_is_no_damage(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer_state.json", lambda s: s["log_history"].append({"loss": float("nan"), "step": 4}))
    assert read(checkpoint).defects == ()


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"a": 1, "a": 2}', "{" * 9])
def test_a_config_that_is_no_object_is_told(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert any(d.where == "config.json" for d in read(checkpoint).defects)


def test_a_flipped_bit_in_the_optimizer_is_found_deeply(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    data = bytearray(file.read_bytes())
    at = data.find(torch.load(file)["state"][40]["exp_avg"].numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert "optimizer.pt" in said(read(checkpoint, deep=True))


def test_a_weight_that_is_no_number_is_found_deeply(sharded: Path) -> None:
    file = sharded / "model-00006-of-00006.safetensors"
    weights = load_file(file)
    weights["classifier.out_proj.weight"][2, 3] = float("nan")
    save_file(weights, file)
    (value,) = [v for v in read(sharded, deep=True).values or () if v.nonfinite]
    assert (value.name, value.first_nonfinite) == ("classifier.out_proj.weight", (2, 3))
    assert read(sharded).values is None


# Parts in other forms


def test_fsdps_shards_are_read_where_they_lie(checkpoint: Path) -> None:
    model, state = load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.pt")
    dcp.save({"model": model}, checkpoint_id=str(checkpoint / "pytorch_model_fsdp_0"), no_dist=True)
    dcp.save({"optimizer": state}, checkpoint_id=str(checkpoint / "optimizer_0"), no_dist=True)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "optimizer.pt").unlink()
    facts = read(checkpoint)
    assert facts.defects == ()
    assert {t.name: t.shape for t in facts.tensors} == {name: tuple(t.shape) for name, t in model.items()}
    assert {t.where for t in facts.tensors} == {"pytorch_model_fsdp_0/__0_0.distcp"}
    (optimizer,) = facts.optimizers or ()
    assert (set(optimizer.steps.values()), optimizer.parameter_count) == ({4.0}, 41)
    shutil.move(checkpoint / "optimizer_0", checkpoint.parent / "elsewhere")
    (checkpoint / "optimizer_0").symlink_to(checkpoint.parent / "elsewhere")
    assert "optimizer_0: it is a link that leads out of the checkpoint's folder" in said(read(checkpoint))
    (checkpoint / "optimizer_0").unlink()
    (checkpoint / "optimizer_0").symlink_to("optimizer_0")
    assert [f.code for f in verify_checkpoint(checkpoint).of(Severity.ERROR)] == ["CK106"]
    (checkpoint / "optimizer_0").unlink()
    shutil.move(checkpoint.parent / "elsewhere", checkpoint / "optimizer_0")
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    assert "missing optimizer_0/.metadata" in said(read(checkpoint))


def test_deepspeeds_shards_are_not_passed_over(checkpoint: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    (checkpoint / "global_step4").mkdir()
    (checkpoint / "latest").write_text("global_step4")
    (defect,) = read(checkpoint).defects
    assert (defect.kind, defect.where) == (DefectKind.UNRECOGNISED, "global_step4")
    assert "DeepSpeed" in defect.message


def test_parts_that_torch_saves_as_safetensors_are_not_passed_over(tmp_path: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True)
    tiny_model().config.save_pretrained(tmp_path)
    (defect,) = read(tmp_path).defects
    assert (defect.kind, defect.where) == (DefectKind.UNRECOGNISED, "shard-00001-model-00001-of-00001.safetensors")
    assert "HuggingFaceStorageWriter" in defect.message


# Hostile files


class RunsCode:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["training_args.bin", "rng_state.pth", "optimizer.pt", "scheduler.pt", "scaler.pt"])
def test_nothing_that_a_file_says_is_run(checkpoint: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    torch.save({"state": RunsCode(canary)}, checkpoint / name)
    facts = read(checkpoint, deep=True)
    assert not canary.exists()
    (found,) = [g for g in facts.globals if g.name == "system"]
    assert (found.where, re.match("posix|nt|os", found.module)) != ("", None)
    assert found.where.startswith(name)
    assert verify_checkpoint(checkpoint).verdict is Verdict.FAIL
    assert not canary.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert canary.exists()  # the file does what it should, when it is loaded


def test_a_pickle_within_a_pickle_is_named(checkpoint: Path) -> None:
    class Nested:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(1),)

    torch.save({"python": Nested()}, checkpoint / "rng_state.pth")
    facts = read(checkpoint)
    assert "torch.storage._load_from_bytes" in {str(g) for g in facts.globals}
    assert verify_checkpoint(checkpoint).verdict is Verdict.FAIL
