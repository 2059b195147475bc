"""`--ckpt_path FOLDER`: a run goes on from an EnStack folder as if it had not stopped, or is told why it cannot."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, truncate
from lightning.pytorch.callbacks import ModelCheckpoint

from enstack_lightning.checkpoint import verify_checkpoint
from enstack_lightning.checkpoint.ledger_file import Batch, read_records
from enstack_lightning.cli.enstack_folder import convert_to_resume
from enstack_lightning.cli.export import REST
from enstack_lightning.cli.main import main

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STATE = "training_state.pth"
EPOCHS = 3
BATCHES = 6
SAID = "lightning.pytorch.utilities.rank_zero"


@pytest.fixture(scope="module")
def options(data: Path, cache: Path) -> list[str]:
    """What every run is told; the network comes from the folder that it resumes from."""
    call = ["--data", str(data), "--data.cache_dir", str(cache), "--data.max_length", "64"]
    call += ["--data.train_batch_size", "16", "--trainer.accelerator", "cpu"]
    return [*call, "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that never stopped, with a checkpoint of each epoch's end and one inside the second."""
    run = tmp_path_factory.mktemp("whole") / "run"
    call = [*options, "--model.pretrained", "false", "--model.max_position_embeddings", "66"]
    call += ["--data.vocab_size", "300", "--model.learning_rate", "0.001"]
    call += [part for name, value in SIZES.items() for part in (f"--model.{name}", str(value))]
    call += ["--last_checkpoint.filename", "{epoch}", "--last_checkpoint.save_top_k", "-1"]
    inside = {"filename": "{step}", "every_n_train_steps": "8", "save_top_k": "-1"}
    call += ["--trainer.callbacks+=ModelCheckpoint"]
    call += [part for name, value in inside.items() for part in (f"--trainer.callbacks.{name}", value)]
    call += ["--trainer.callbacks.dirpath", str(run)]
    assert main(["fit", *call, "--trainer.default_root_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def exported(whole: Path) -> Path:
    """The end of the first epoch as a folder."""
    folder = whole.parent / "exported"
    assert main(["export", str(whole / "checkpoints" / "epoch=0.ckpt"), str(folder), "--layout", "enstack"]) == 0
    return folder


@pytest.fixture
def foreign(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes of the exported folder one as EnStack writes it, with its training state edited."""

    def make(edit: Callable[[dict[str, Any]], object] = lambda state: None) -> Path:
        folder = Path(shutil.copytree(exported, tmp_path / "enstack"))

        def as_enstack(state: dict[str, Any]) -> None:
            del state[REST]
            for group in state["optimizer_state_dict"]["param_groups"]:
                del group["param_names"]
            edit(state)

        edited(exported / STATE, folder / STATE, as_enstack)
        return folder

    return make


def in_one_group(state: dict[str, Any], names: list[str], order: list[str]) -> None:
    """The optimizer as `AdamW(network.parameters())` holds it: one param group, in the order of the network."""
    optimizer = state["optimizer_state_dict"]
    of = dict(zip(names, optimizer["state"].values(), strict=True))
    group = {**optimizer["param_groups"][0], "params": list(range(len(order)))}
    state["optimizer_state_dict"] = {"state": {i: of[n] for i, n in enumerate(order)}, "param_groups": [group]}
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        del state["scheduler_state_dict"][name][1:]


def resumed(options: list[str], folder: Path, run: Path, *more: str) -> int:
    return main(["fit", *options, "--trainer.default_root_dir", str(run), "--ckpt_path", str(folder), *more])


def end_of(run: Path) -> dict[str, Any]:
    name = "epoch=2.ckpt" if (run / "checkpoints" / "epoch=2.ckpt").exists() else "last_checkpoint.ckpt"
    found: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The weights and moments that are not the same bit for bit."""
    found = [name for name in a["state_dict"] if not torch.equal(a["state_dict"][name], b["state_dict"][name])]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    assert states[0].keys() == states[1].keys()
    return found + [
        f"{number} {name}"
        for number, values in states[0].items()
        for name, value in values.items()
        if not torch.equal(value, states[1][number][name])
    ]


def rows_from(run: Path, epoch: int) -> list[tuple[int, ...]]:
    """The rows of every batch of an epoch and after, in the order of training."""
    (path,) = (run / "ledger").glob("*")
    batches = [record for record in read_records(path) if isinstance(record, Batch)]
    return [tuple(batch.rows() or ()) for batch in batches if batch.epoch >= epoch]


def test_an_exported_folder_goes_on_bit_for_bit(
    options: list[str], whole: Path, exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, SAID):
        assert resumed(options, exported, tmp_path / "run") == 0
    assert f"resume from folder   {exported}: it holds all of the run" in caplog.text
    assert f"global step      {BATCHES} of {EPOCHS * BATCHES} = (1 epoch x {BATCHES} steps)" in caplog.text
    ended, expected = end_of(tmp_path / "run"), end_of(whole)
    assert ended["global_step"] == expected["global_step"] == EPOCHS * BATCHES
    assert differences(expected, ended) == []
    assert ended["lr_schedulers"] == expected["lr_schedulers"]
    assert rows_from(tmp_path / "run", 1) == rows_from(whole, 1)
    assert not list((tmp_path / "run").glob(".*.ckpt"))
    assert str(exported) in (tmp_path / "run" / "logs" / "config.yaml").read_text()


def test_a_folder_exported_inside_an_epoch_goes_on_bit_for_bit(options: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    assert main(["export", str(whole / "step=8.ckpt"), str(folder), "--layout", "enstack"]) == 0
    assert resumed(options, folder, tmp_path / "run") == 0
    assert differences(end_of(whole), end_of(tmp_path / "run")) == []
    assert rows_from(tmp_path / "run", 1) == rows_from(whole, 1)[2:]


def test_a_folder_of_enstack_goes_on_with_the_same_rows_and_learning_rates(
    options: list[str],
    whole: Path,
    foreign: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = foreign(lambda state: state.update(best_val_f1=0.9))
    config = json.loads((folder / "config.json").read_text())
    named = config | {"id2label": dict(enumerate("abcde"))}
    (folder / "config.json").write_text(json.dumps(named))
    with caplog.at_level(logging.INFO, SAID):
        assert resumed(options, folder, tmp_path / "run") == 0
    assert (
        "random state and what it was trained on are not in it: the order of rows is that of the seed and the epoch"
        in caplog.text
    )
    assert "continues with epoch 1, batch 0 of 6" in caplog.text
    assert "verdict          PASS" in caplog.text
    ended, expected = end_of(tmp_path / "run"), end_of(whole)
    assert ended["hyper_parameters"]["label_names"] == list("abcde")
    assert rows_from(tmp_path / "run", 1) == rows_from(whole, 1)
    assert (ended["epoch"], ended["global_step"]) == (expected["epoch"], expected["global_step"])
    assert ended["lr_schedulers"] == expected["lr_schedulers"]
    assert "best_model.ckpt is written when val/f1 is above 0.9000" in caplog.text
    assert not (tmp_path / "run" / "checkpoints" / "best_model.ckpt").exists()
    worst = max(
        float((ended["state_dict"][name] - tensor).abs().max()) for name, tensor in expected["state_dict"].items()
    )
    assert 0 < worst < 0.01  # dropout, and nothing else: twelve steps of at most 0.001


def converted(folder: Path, run: Path) -> dict[str, Any]:
    return convert_to_resume(folder, verify_checkpoint(folder), 1, ModelCheckpoint(run, monitor="val/f1")).checkpoint


@pytest.mark.parametrize("of_transformers", [4, 5])
def test_moments_of_a_single_param_group_find_their_parameters(
    of_transformers: int, whole: Path, foreign: Callable[..., Path], tmp_path: Path
) -> None:
    expected = torch.load(whole / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    names = [name for group in expected["optimizer_states"][0]["param_groups"] for name in group["param_names"]]
    order = [name for name in expected["state_dict"] if name in names]
    if of_transformers == 4:
        place = order.index("model.roberta.embeddings.position_embeddings.weight")
        order.insert(1, order.pop(place))
        assert "token_type" in order[2]
    actual = converted(foreign(lambda state: in_one_group(state, names, order)), tmp_path)
    assert differences(expected, {**actual, "state_dict": {**expected["state_dict"], **actual["state_dict"]}}) == []
    assert [g["param_names"] for g in actual["optimizer_states"][0]["param_groups"]] == [
        g["param_names"] for g in expected["optimizer_states"][0]["param_groups"]
    ]
    assert [g["weight_decay"] for g in actual["optimizer_states"][0]["param_groups"]] == [0.01, 0.01]
    assert actual["lr_schedulers"] == expected["lr_schedulers"]


def test_a_scheduler_without_state_is_set_to_the_step_of_the_optimizer(
    whole: Path, foreign: Callable[..., Path], tmp_path: Path
) -> None:
    expected = torch.load(whole / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    folder = foreign(lambda state: state.pop("scheduler_state_dict"))
    assert converted(folder, tmp_path)["lr_schedulers"] == expected["lr_schedulers"]


def _counted_twice(state: dict[str, Any]) -> None:
    for moments in state["optimizer_state_dict"]["state"].values():
        moments["step"] = torch.tensor(3.0)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "inside an epoch": (lambda s: s.update(epoch=2, step=2), "it stands inside epoch 2, after 2 of 6 batches"),
    "no length of an epoch": (lambda s: s.pop("total_batches"), "how many epochs of how many batches"),
    "another schedule": (
        lambda s: s.update(scheduler_state_dict={"T_max": 18, "eta_min": 0.0, "base_lrs": [0.001], "last_epoch": 6}),
        "the scheduler is no LambdaLR",
    ),
    "another optimizer": (
        lambda s: s["optimizer_state_dict"]["param_groups"][0].update(correct_bias=True),
        "the optimizer is no torch.optim.AdamW (it has correct_bias)",
    ),
    "other groups": (
        lambda s: s["optimizer_state_dict"]["param_groups"][1]["params"].append(
            s["optimizer_state_dict"]["param_groups"][0]["params"].pop()
        ),
        "the 25 parameters of the optimizer (2 groups) are not those of the network",
    ),
    "accumulation": (_counted_twice, "did 3 steps, and 1 epochs of 6 batches with accumulate_grad_batches 1 give 6; "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_in_a_sentence(
    case: str,
    options: list[str],
    foreign: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, said = REFUSED[case]
    folder = foreign(edit)
    assert resumed(options, folder, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"checkpoint {folder} cannot be resumed from: " in error
    assert said in error
    assert f"--model.model_name_or_path {folder}" in error
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_an_exported_folder_that_was_changed_is_refused(
    options: list[str], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "changed"))
    edited(exported / STATE, folder / STATE, lambda state: state.update(epoch=2))
    assert resumed(options, folder, tmp_path / "run") == 1
    assert "stands at epoch 2, step 0, and its entry enstack_lightning at epoch 1, step 0" in capsys.readouterr().err
    truncate(folder / "model.safetensors", 3_000)
    assert resumed(options, folder, tmp_path / "run") == 1
    assert "must not be used: CK104" in capsys.readouterr().err


def test_a_model_is_no_checkpoint_to_resume_from(
    options: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(whole / "checkpoints" / "epoch=0.ckpt"), str(tmp_path / "hf")]) == 0
    assert resumed(options, tmp_path / "hf", tmp_path / "run") == 1
    assert "CK205" in capsys.readouterr().err


def test_folders_are_evaluated_as_the_checkpoint_they_were_exported_from(
    options: list[str], whole: Path, exported: Path, foreign: Callable[..., Path], tmp_path: Path
) -> None:
    path = whole / "checkpoints" / "epoch=0.ckpt"
    assert main(["export", str(path), str(tmp_path / "hf")]) == 0
    predictions = []
    for number, source in enumerate((path, exported, foreign(), tmp_path / "hf")):
        output = tmp_path / f"{number}.jsonl"
        call = [*options[:-4], "--trainer.default_root_dir", str(tmp_path / "run"), "--output", str(output)]
        assert main(["predict", *call, "--ckpt_path", str(source)]) == 0
        predictions.append(output.read_text())
    assert len(predictions[0].splitlines()) == 24
    assert set(predictions) == {predictions[0]}
