"""`enstack` itself: every command is listed, wrong calls end with 2, and help needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from enstack_lightning import __version__
from enstack_lightning.cli.main import COMMANDS, main


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert {"fit", "validate", "test", "predict", "verify", "export"} <= set(COMMANDS)
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", printed, re.MULTILINE)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"enstack {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["frobnicate"]])
def test_a_wrong_call_ends_with_2(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_an_unknown_command_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    main(["resume"])
    assert capsys.readouterr().err == f"enstack: 'resume' is no command; there are {', '.join(COMMANDS)}\n"


def test_help_and_wrong_calls_import_no_torch() -> None:
    script = (
        "import sys; from enstack_lightning.cli.main import main\n"
        "main(['--help']); main(['x']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
