"""Reading: what a file says is found in the facts, nothing is executed, and torch stays out of it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed
from builders import BATCHES, TinyModule, edited, enstack_folder, quiet_trainer
from genuine import GENUINE, huggingface_trainer
from safetensors.torch import save_file

import enstack_lightning
from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import (
    Options,
    Severity,
    Verdict,
    find_checkpoints,
    find_last_good,
    quick_verify_checkpoint,
    verify_checkpoint,
)
from enstack_lightning.checkpoint.inert_pickle import DTYPE_BYTES
from enstack_lightning.checkpoint.readers import plain
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.errors import CheckpointError, CheckpointNotFoundError

PACKAGE = Path(enstack_lightning.__file__).parent


def test_the_facts_are_those_that_torch_loads(trained: Path) -> None:
    path = trained / "step=7.ckpt"
    facts, loaded = verify_checkpoint(path).facts, torch.load(path, weights_only=True)
    assert {t.name: (f"torch.{t.dtype}", t.shape) for t in facts.tensors} == {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in loaded["state_dict"].items()
    }
    (optimizer,) = facts.optimizers or ()
    states = loaded["optimizer_states"][0]
    assert optimizer.steps == {key: state["step"].item() for key, state in states["state"].items()}
    assert optimizer.groups[0].lr == states["param_groups"][0]["lr"]
    (scheduler,) = facts.schedulers or ()
    assert scheduler.last_lr == tuple(loaded["lr_schedulers"][0]["_last_lr"])
    assert (facts.progress.epoch, facts.progress.global_step) == (loaded["epoch"], loaded["global_step"]) == (1, 7)
    assert facts.batches_per_epoch == BATCHES
    assert facts.versions["torch"] == torch.__version__
    assert facts.loader_position


def test_tensors_of_every_dtype_are_read(tmp_path: Path, trained: Path) -> None:
    dtypes = [d for d in vars(torch).values() if isinstance(d, torch.dtype)]
    cannot_be_filled = re.compile("q|bits|u?int[1-7]$|float4")
    names = {n for d in dtypes if not cannot_be_filled.match(n := str(d).removeprefix("torch."))} & set(DTYPE_BYTES)
    assert len(names) > 18
    tensors = {name: torch.zeros(3, 2).to(getattr(torch, name)) for name in sorted(names - {"float8_e8m0fnu"})}
    path = edited(trained / "step=7.ckpt", tmp_path / "t.ckpt", lambda c: c.update(state_dict=tensors))
    report = verify_checkpoint(path, Options(purpose="inference"))  # the optimizer is that of other weights
    assert report.verdict is Verdict.PASS, report.of(Severity.ERROR)
    assert {t.name: t.dtype for t in report.facts.tensors} == {name: name for name in tensors}


def test_odd_tensors_are_read(tmp_path: Path, trained: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": base[1:, ::2],
        "transposed": base.t(),
        "shared": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "expanded": torch.ones(1).expand(5),
    }
    path = edited(trained / "step=7.ckpt", tmp_path / "t.ckpt", lambda c: c.update(state_dict=tensors))
    report = verify_checkpoint(path, Options(purpose="inference"))  # the optimizer is that of other weights
    assert report.verdict is Verdict.PASS, report.of(Severity.ERROR)
    assert {t.name: t.shape for t in report.facts.tensors} == {n: tuple(t.shape) for n, t in tensors.items()}


HEAVY = {"torch", "lightning", "pytorch_lightning", "transformers", "safetensors", "datasets", "pandas"}
WATCHED = """
import sys
from enstack_lightning.cli.main import main
status = main(sys.argv[2:])
heavy = set(sys.argv[1].split()) & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


@pytest.fixture(scope="module")
def of_every_format(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    torch.save(weights, folder / "new.pt")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "w.safetensors")
    distributed.save(weights, checkpoint_id=folder / "sharded", no_dist=True)
    (folder / "trainer").mkdir()
    return {
        "lightning": trained / "step=7.ckpt",
        "enstack": enstack_folder(folder / "enstack"),
        "enstack with .bin": enstack_folder(folder / "bin", weights="pytorch_model.bin"),
        "torch": folder / "new.pt",
        "torch before 1.6": folder / "old.pt",
        "safetensors": folder / "w.safetensors",
        "sharded": folder / "sharded",
        "trainer": huggingface_trainer(folder / "trainer", 3),
        "model": GENUINE["huggingface model, several shards"].write(folder / "trainer"),
        "several": trained,
    }


@pytest.mark.parametrize(
    ("options", "heavy"),
    [
        ("", HEAVY | {"numpy", "yaml", "fsspec", "blake3", "isal"}),
        ("--format json", HEAVY | {"numpy", "yaml", "fsspec", "blake3", "isal"}),
        ("--format html", HEAVY | {"numpy", "yaml", "fsspec"}),
        ("--format sarif", HEAVY | {"numpy", "yaml", "fsspec"}),
        ("--deep", HEAVY),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_verifying_any_format_imports_no_library_that_wrote_it(
    options: str, heavy: set[str], of_every_format: dict[str, Path]
) -> None:
    arguments = ["verify", "--for", "inference", *options.split(), *map(str, of_every_format.values())]
    command = [sys.executable, "-c", WATCHED, " ".join(heavy), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("call", ["quick_verify_checkpoint", "verify_checkpoint", "find_last_good"])
def test_the_functions_import_no_library_that_wrote_it(call: str, trained: Path) -> None:
    script = (
        f"import sys, enstack_lightning as e; assert e.{call}(sys.argv[1])\n"
        "sys.exit(' '.join({*sys.argv[2].split()} & {*sys.modules}))"
    )
    path = trained if call == "find_last_good" else trained / "step=7.ckpt"
    command = [sys.executable, "-c", script, str(path), " ".join(HEAVY | {"numpy", "yaml", "fsspec"})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stderr.strip(), done.stdout) == ("", "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, enstack_lightning; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


ALLOWED_IMPORTS = {
    "checkpoint": {"checkpoint", "errors"},
    "guard": {"guard", "checkpoint", "errors"},
    "model": {"model", "errors"},
    "data": {"data", "errors"},
}
CORE_PACKAGES = {"safetensors", "numpy", "isal", "blake3", "fsspec"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ALLOWED_IMPORTS)
def test_imports_go_in_one_direction(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in imported:
                top, _, rest = name.partition(".")
                if top == "enstack_lightning":
                    assert rest.partition(".")[0] in ALLOWED_IMPORTS[room], f"{file} imports {name}"
                elif room == "checkpoint":
                    assert top in CORE_PACKAGES, f"{file} imports {name}"


# The front door


def test_quick_verification_raises_what_a_script_expects(trained: Path, tmp_path: Path) -> None:
    assert quick_verify_checkpoint(trained / "step=7.ckpt").verdict is Verdict.PASS
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere\.ckpt.*it is missing") as missing:
        quick_verify_checkpoint(tmp_path / "nowhere.ckpt")
    assert isinstance(missing.value, FileNotFoundError)
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"CK103 empty\.ckpt: it is empty \(0 bytes\)") as empty:
        quick_verify_checkpoint(tmp_path / "empty.ckpt")
    assert isinstance(empty.value, ValueError)


def test_the_newest_good_checkpoint_has_the_most_steps_and_is_no_bad_one(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    for step in (3, 9, 11):
        (run / f"s{step}.ckpt").write_bytes((trained / f"step={step}.ckpt").read_bytes())
    (run / "s11.ckpt").write_bytes((run / "s11.ckpt").read_bytes()[:-1])
    (run / "later.ckpt").symlink_to(run / "s9.ckpt")
    (run / ".hidden.ckpt").write_bytes((trained / "step=12.ckpt").read_bytes())
    (run / "readme.txt").write_text("no checkpoint")
    assert [p.name for p in find_checkpoints(tmp_path)] == ["s3.ckpt", "s9.ckpt", "s11.ckpt"]
    best = find_last_good(tmp_path)
    assert best is not None
    assert Path(best.path) == run / "s9.ckpt"


def test_of_two_runs_in_one_folder_the_newest_checkpoint_is_of_the_younger_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps, seed in ((9, 1), (4, 2)):
        torch.manual_seed(seed)
        trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_steps=steps)
        trainer.fit(TinyModule())
        trainer.save_checkpoint(run / f"{steps}.ckpt")
    os.utime(run / "4.ckpt", (0, 0))  # as a copy may leave it
    best = find_last_good(run)
    assert best is not None
    assert Path(best.path).name == "4.ckpt"

    def without_the_guard(checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "Guard" not in k}

    edited(run / "9.ckpt", run / "9.ckpt", without_the_guard)
    (run / "9.ckpt.manifest.json").unlink()
    best = find_last_good(run)
    assert best is not None
    assert Path(best.path).name == "9.ckpt"  # nothing says which is the younger one


def test_enstack_folders_are_found_among_files(trained: Path, tmp_path: Path) -> None:
    enstack_folder(tmp_path / "runs" / "checkpoint-2", epoch=2)
    enstack_folder(tmp_path / "runs" / "checkpoint-3", epoch=3)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    best = find_last_good(tmp_path)
    assert best is not None
    assert Path(best.path).name == "checkpoint-3"


def test_a_folder_without_a_good_checkpoint_has_no_newest(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 and no more")
    assert find_last_good(tmp_path) is None


def test_reports_are_plain_data(trained: Path) -> None:
    from enstack_lightning.checkpoint import to_json

    document = json.loads(to_json([verify_checkpoint(trained / "step=7.ckpt")]))
    assert document["checkpoints"][0]["resume"] == {
        "kind": "mid-epoch",
        "epoch": 1,
        "step": 2,
        "global_step": 7,
        "next_epoch": 1,
        "next_batch": 2,
        "batches_per_epoch": 5,
        "optimizer_steps": 7,
        "learning_rate": pytest.approx(1e-2 * (1 - 7 / 101)),
        "max_epochs": 3,
        "batches_repeated": 0,
        "sentence": "2 of 5 batches into epoch 1 (1 of 3 epochs done); continues with epoch 1, batch 2 of 5; "
        "0 batches trained twice; next LR 9.31e-03",
    }


def test_a_file_that_is_replaced_while_it_is_read_has_changed(trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "last.ckpt"))
    with LocalSource(path) as source:
        assert not source.has_changed()
        Path(shutil.copy(trained / "step=9.ckpt", tmp_path / "new")).rename(path)
        assert source.has_changed()
    with LocalSource(path) as source:
        path.unlink()
        assert source.has_changed()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lazily_negated_scalar_is_read_with_its_sign(zipped: bool, tmp_path: Path) -> None:
    step = torch._neg_view(torch.tensor(-7.0))
    optimizer = {"state": {0: {"step": step}}, "param_groups": [{"params": [0], "lr": 0.1}]}
    torch.save({"optimizer": optimizer}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    (found,) = verify_checkpoint(tmp_path / "c.pt").facts.optimizers or ()
    assert found.steps == {0: 7.0} == {0: step.item()}


def test_a_list_in_many_places_of_a_plain_file_is_looked_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [*range(300), {"last_epoch": 3, "_last_lr": [0.1]}]
    torch.save({"w": torch.ones(2), **{f"x{n}": shared for n in range(300)}}, tmp_path / "c.pt")
    looked_at = []
    near = plain._near
    monkeypatch.setattr(plain, "_near", lambda value: looked_at.extend(near(value)) or near(value))
    facts = verify_checkpoint(tmp_path / "c.pt").facts
    assert [s.last_epoch for s in facts.schedulers or ()] == [3]
    assert len(looked_at) < 10 * 1_000
