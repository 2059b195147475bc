"""The guard by environment, by YAML and in `pytorch_lightning`; and that its state in a checkpoint binds nobody."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from builders import TinyModule, edited, every_epoch, every_step, quiet_trainer, truncate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import Options
from enstack_lightning.guard.everywhere import callbacks
from enstack_lightning.guard.saving.retention import Retention

GROUPS = ["lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"]


def guards_of(trainer: Trainer) -> list[CheckpointGuard]:
    return [c for c in trainer.callbacks if isinstance(c, CheckpointGuard)]  # type: ignore[attr-defined]


def fitted(folder: Path, *given: Callback, module: LightningModule | None = None, **options: Any) -> Trainer:
    trainer = quiet_trainer(folder, *given, max_epochs=1, **options)
    trainer.fit(module or TinyModule())
    return trainer


# By environment


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("off", ["", "0", "False", " off "])
def test_it_is_installed_and_off(group: str, off: str) -> None:
    """In a new process, as it happens at every Trainer of an environment that has the package."""
    code = (
        "import sys; from importlib.metadata import entry_points;"
        f"(factory,) = [e for e in entry_points(group={group!r}) if e.name == 'enstack_guard'];"
        "assert factory.load()() == [];"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'lightning', 'numpy', 'jsonargparse')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ENSTACK_GUARD": off},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_off_adds_nothing_to_a_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ENSTACK_GUARD", raising=False)
    assert quiet_trainer(tmp_path).callbacks == []  # type: ignore[attr-defined]


def test_one_puts_a_guard_into_every_trainer(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_GUARD", "1")
    trainer = fitted(tmp_path, every_step(tmp_path))
    assert len(guards_of(trainer)) == 1
    assert (tmp_path / "step=5.ckpt.manifest.json").is_file()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TinyModule(), ckpt_path=tmp_path / "step=5.ckpt")
    (guard,) = guards_of(trainer)
    assert guard.report is not None
    assert guard.report.path == str(tmp_path / "step=5.ckpt")
    truncate(tmp_path / "step=4.ckpt", 900)
    with pytest.raises(CheckpointGuardError, match=r"step=4\.ckpt must not be used: CK104"):
        quiet_trainer(tmp_path).fit(TinyModule(), ckpt_path=tmp_path / "step=4.ckpt")
    with pytest.raises(CheckpointGuardError, match=r"step=4\.ckpt must not be used: CK104"):
        quiet_trainer(tmp_path).test(BoringModel(), ckpt_path=tmp_path / "step=4.ckpt")


def test_its_settings_are_those_of_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_GUARD", "strict=true fallback=previous  lr_bounds='[1e-9, 0.5]' deep=false")
    (guard,) = guards_of(fitted(tmp_path))
    assert (guard.strict, guard.fallback) == (True, "previous")


def test_strict_by_environment_stops_at_warnings(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: c["callbacks"].clear())
    edited(path, path, lambda c: [s.update(step=torch.tensor(6.0)) for s in c["optimizer_states"][0]["state"].values()])
    monkeypatch.setenv("ENSTACK_GUARD", "strict=true")
    with pytest.raises(CheckpointGuardError, match=r"strict is set: .*CK401"):
        quiet_trainer(tmp_path).fit(TinyModule(), ckpt_path=path)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("maybe", "maybe has no value|no setting maybe"),
        ("srtict=true", "CheckpointGuard has no setting srtict"),
        ("strict=perhaps", "strict.*bool.*perhaps"),
        ("strict", "strict has no value"),
        ("fallback=never", "fallback.*never"),
        ("step_tolerance=-1", "step_tolerance is -1 and must be 0 or more"),
        ("strict='true", "No closing quotation"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(said: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_GUARD", said)
    with pytest.raises(CheckpointGuardError, match=f"ENSTACK_GUARD=.*({why}).*Write 1 .* there are .*fallback.*strict"):
        Trainer(logger=False)


class WithItsOwn(TinyModule):
    def configure_callbacks(self) -> list[Callback]:
        return [CheckpointGuard(step_tolerance=4)]


def test_a_guard_of_the_user_stays_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_GUARD", "strict=true")
    own = CheckpointGuard()
    trainer = fitted(tmp_path, own, every_step(tmp_path))
    assert guards_of(trainer) == [own]
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert [key for key in saved["callbacks"] if "Guard" in key] == ["CheckpointGuard"]
    (of_model,) = guards_of(fitted(tmp_path, module=WithItsOwn()))
    assert not of_model.strict


def test_every_flavor_of_lightning_finds_it() -> None:
    for group in GROUPS:
        assert [e.load() for e in entry_points(group=group) if e.name == "enstack_guard"] == [callbacks]


class Copies(Callback):
    """Copies the Trainer's callbacks while it runs, as sweeps and launchers do."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.copies = copy.deepcopy(trainer.callbacks)  # type: ignore[attr-defined]


def test_the_list_of_callbacks_stays_and_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_GUARD", "step_tolerance=3")
    trainer = quiet_trainer(tmp_path, Copies(), every_step(tmp_path), max_epochs=1)
    before = list(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.fit(TinyModule())
    assert before == trainer.callbacks  # type: ignore[attr-defined]
    (guard,) = [c for c in copy.deepcopy(trainer.callbacks) if isinstance(c, CheckpointGuard)]  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(guard))
    trainer = fitted(tmp_path / "again", again, every_step(tmp_path / "again"))
    assert (tmp_path / "again" / "step=5.ckpt.manifest.json").is_file()


def test_what_a_user_set_on_a_plugin_is_there_after_the_run(tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint = mine = Mock(wraps=plugin.save_checkpoint)  # type: ignore[method-assign]
    for folder in (tmp_path, tmp_path / "again"):
        trainer = quiet_trainer(folder, CheckpointGuard(), every_step(folder), max_epochs=1, plugins=[plugin])
        trainer.fit(TinyModule())
        assert plugin.save_checkpoint is mine
        assert (folder / "step=5.ckpt.manifest.json").is_file()
    assert mine.call_count == 10


def test_a_checkpoint_that_is_not_there_is_also_a_file_not_found(tmp_path: Path) -> None:
    for verb, module in (("fit", TinyModule()), ("validate", BoringModel())):
        with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none\.ckpt") as raised:
            getattr(quiet_trainer(tmp_path, CheckpointGuard()), verb)(module, ckpt_path=tmp_path / "none.ckpt")
        assert isinstance(raised.value, CheckpointGuardError)


# By YAML


def test_a_plain_lightning_cli_takes_it_from_yaml(tmp_path: Path) -> None:
    guard = {"class_path": "enstack_lightning.CheckpointGuard", "init_args": {"fallback": "previous", "strict": True}}
    saves = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
    }
    options = {"logger": False, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"trainer": options | {"callbacks": [guard, saves]}}))
    call = ["fit", "--config", str(config), "--trainer.limit_train_batches", "3"]
    cli = LightningCLI(BoringModel, args=call, save_config_callback=None)
    (guarded,) = guards_of(cli.trainer)
    assert (guarded.strict, guarded.fallback) == (True, "previous")
    assert (tmp_path / "step=3.ckpt.manifest.json").is_file()
    LightningCLI(
        BoringModel,
        args=[*call, "--trainer.max_epochs", "2", "--ckpt_path", str(tmp_path / "step=3.ckpt")],
        save_config_callback=None,
    )
    assert (tmp_path / "step=6.ckpt").is_file()


# Its own state


def test_checkpoints_pass_between_runs_with_and_without_it(trained: Path, tmp_path: Path) -> None:
    assert "CheckpointGuard" in torch.load(trained / "step=7.ckpt", weights_only=True)["callbacks"]
    without = quiet_trainer(tmp_path, every_step(tmp_path))
    without.fit(TinyModule(), ckpt_path=trained / "step=7.ckpt")
    assert without.global_step == 15
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert "CheckpointGuard" not in saved["callbacks"]
    guard = CheckpointGuard(strict=True)
    quiet_trainer(tmp_path / "again", guard).fit(TinyModule(), ckpt_path=tmp_path / "step=8.ckpt")
    assert guard.report is not None


def test_a_checkpoint_of_an_epochs_end_that_was_saved_without_it_costs_no_epoch(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_epoch(tmp_path), max_epochs=1).fit(TinyModule())
    module = TinyModule()
    trainer = quiet_trainer(tmp_path / "again", CheckpointGuard())
    trainer.fit(module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.global_step == 15
    assert len(module.rows) == 10


# In `pytorch_lightning`


class InOrder(TinyModule):
    """The module of other_flavor.py."""

    def train_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(TensorDataset(torch.ones(20, 4), torch.arange(20)), batch_size=4)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What other_flavor.py did, in a process of its own: both flavors share one logger, that of the last imported."""
    folder, here = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("here")
    quiet_trainer(here, CheckpointGuard(), every_step(here), max_epochs=2).fit(InOrder())
    script = Path(__file__).with_name("other_flavor.py")
    run = subprocess.run(
        [sys.executable, str(script), str(folder), str(here / "step=7.ckpt")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout.splitlines()[-1])


def test_it_serves_pytorch_lightning_alone(other: tuple[Path, dict[str, Any]]) -> None:
    folder, said = other
    assert said["alone"]
    assert said["still alone"]
    assert said["saved"] == []
    assert said["manifest"]
    assert said["resumed"] == ["pass", True, True]
    assert said["async"] == []
    assert said["async files"] == ["step=15.ckpt", "step=15.ckpt.manifest.json"]
    assert "step=9.ckpt must not be used: CK104" in said["refused"]
    assert len(said["fell back"]) == 1
    assert f"loading {folder / 'step=15.ckpt'} instead of {folder / 'step=9.ckpt'}" in said["fell back"][0]


def test_each_flavor_resumes_what_the_other_saved(other: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, said = other
    assert said["keys"] == ["CheckpointGuard"]
    assert said["resumed what lightning.pytorch saved"] == ["pass", True, True]
    guard = CheckpointGuard(strict=True)
    quiet_trainer(tmp_path, guard).fit(InOrder(), ckpt_path=folder / "step=7.ckpt")
    assert guard.report is not None


def test_one_process_may_use_both_flavors(other: tuple[Path, dict[str, Any]]) -> None:
    assert other[1]["both"] == [["pass", True, True]] * 2


def test_the_guard_imports_lightning_in_one_place() -> None:
    """Any other import at run time would tie the guard to one flavor."""
    import ast

    import enstack_lightning.guard

    for source in sorted(Path(enstack_lightning.guard.__file__).parent.rglob("*.py")):
        tree = ast.parse(source.read_text())
        for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        excused = {id(inner) for block in for_types for inner in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in excused:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                tied = [n for n in names if n.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")]
                assert not tied, f"{source.name} line {node.lineno}: import it through flavor.py, or for types only"


def test_a_checkpoint_asked_to_go_while_its_save_ends_goes_with_the_next(trained: Path) -> None:
    """Under `AsyncCheckpointIO` the request comes from another thread, at any moment."""
    retention = Retention(Options())
    first, second = str(trained / "step=7.ckpt"), str(trained / "step=9.ckpt")
    retention.announce(first)
    retention.saved(first, retention.level(first)[0])
    assert not retention.may_remove(first)
    retention.settle(first, is_saved=True)
    assert first in retention.saved(second, retention.level(second)[0])
