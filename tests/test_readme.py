"""The README says what is so: its commands, snippets, outputs, options and layout."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import flip_in_pickle
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from enstack_lightning import CheckpointGuard, RecoveryCheckpoint, VulnerabilityClassifier, VulnerabilityDataModule
from enstack_lightning.checkpoint import RULES
from enstack_lightning.checkpoint.manifest import write_manifest
from enstack_lightning.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shape(line: str) -> str:
    """The line without its figures, names of files and alignment."""
    line = re.sub(r"\S*\.ckpt", "FILE", line)
    return " ".join(re.sub(r"\b[0-9a-f]{8}\b|\d+(\.\d+)?(e[-+]\d+)?", "N", line).split())


def test_the_two_commands_and_the_others_are_make_targets() -> None:
    commands = [line for block in blocks("console") for line in block.splitlines() if line.startswith("make ")]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_every_command_line_is_one_that_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert {shlex.split(line)[1] for line in lines} >= set(COMMANDS) - {"validate", "demo", "rules"}
    for line in lines:
        _, command, *arguments = shlex.split(line)
        if command in ("fit", "test", "predict"):
            at = arguments.index("--ckpt_path") if "--ckpt_path" in arguments else len(arguments)
            with pytest.raises(SystemExit) as ended:  # without the checkpoint, which is not there
                main([command, *arguments[:at], *arguments[at + 2 :], "--print_config"])
            assert ended.value.code == 0, line


@pytest.fixture
def small_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's, from the tests' own small run."""
    folder = tmp_path / "runs" / "small" / "checkpoints"
    folder.mkdir(parents=True)
    for name, step in {"best_model": 5, "last_checkpoint": 5, "recovery_checkpoint": 7}.items():
        shutil.copy(trained / f"step={step}.ckpt", folder / f"{name}.ckpt")
        write_manifest(folder / f"{name}.ckpt")  # as the guard does
    shutil.copy(trained / "step=7.ckpt", tmp_path / "broken.ckpt")
    flip_in_pickle(tmp_path / "broken.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_reports_shown_are_those_that_are_printed(
    number: int, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = [b for b in blocks("console") if b.startswith("$ enstack verify")][number]
    command, *shown = block.splitlines()
    main(shlex.split(command[2:])[1:])
    printed = capsys.readouterr().out.splitlines()
    assert [shape(line) for line in printed] == [shape(line) for line in shown]


def test_the_rules_shown_are_there() -> None:
    assert set(re.findall(r"CK\d\d\d", README)) <= set(RULES)


def test_the_snippets_run_and_log_what_is_shown(tmp_path: Path) -> None:
    verify, guard = blocks("python")
    script = tmp_path / "snippet.py"
    script.write_text(f"{guard}\n{verify}")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    logged = {shape(line) for line in (done.stdout + done.stderr).splitlines()}
    shown = blocks("text")[0].splitlines()
    assert len(shown) == 10
    assert {shape(line) for line in shown} <= logged
    assert "Verdict.PASS" in done.stdout or "pass" in done.stdout


def test_the_yaml_puts_the_guard_into_any_lightning_cli(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    arguments = ["--config", str(tmp_path / "run.yaml"), "--trainer.logger", "false"]
    cli = LightningCLI(BoringModel, run=False, args=arguments, save_config_callback=None)
    (guard,) = [c for c in cli.trainer.callbacks if isinstance(c, CheckpointGuard)]
    assert guard.strict


def default_of(kind: type, name: str) -> Any:
    return inspect.signature(kind).parameters[name].default


def test_the_options_are_there_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| .+ \|$", README, flags=re.MULTILINE)
    assert len(rows) > 15
    kinds = {
        "CheckpointGuard": CheckpointGuard,
        "RecoveryCheckpoint": RecoveryCheckpoint,
        "model": VulnerabilityClassifier,
        "data": VulnerabilityDataModule,
    }
    checked = 0
    for option, default in rows:
        owner, _, name = option.removeprefix("enstack fit --").partition(".")
        if owner in kinds and name:
            given = re.match(r"`([^`:]+)`", default)
            assert given, option
            assert yaml.safe_load(given[1]) == default_of(kinds[owner], name) or given[1] == str(
                default_of(kinds[owner], name)
            ), option
            checked += 1
        elif option.startswith("enstack"):
            _, command, flag = option.split()
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert flag in capsys.readouterr().out, option
    assert checked > 8


def test_the_layout_is_the_layout() -> None:
    layout = blocks("text")[-1]
    for indent, name in re.findall(r"^( *)(\w+)/ ", layout, flags=re.MULTILINE):
        assert (ROOT / ("enstack_lightning" if indent else "") / name).is_dir(), name
    rooms = set(re.findall(r"^  (\w+)/", layout, flags=re.MULTILINE))
    assert rooms == {p.parent.name for p in (ROOT / "enstack_lightning").glob("*/__init__.py")}
