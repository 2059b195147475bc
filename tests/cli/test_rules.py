"""`enstack rules`: the table and the explanations come from the rules themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from enstack_lightning.checkpoint import RULES
from enstack_lightning.cli.main import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["rules", *arguments]) == 0
    return capsys.readouterr().out


def test_every_rule_is_a_line_with_its_severity_and_what_it_compares(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines] == sorted(RULES)
    for line in lines:
        code, severity, name, compares = line.split(maxsplit=3)
        rule = RULES[code]
        assert (severity, name, compares) == (rule.severity, rule.name, rule.compares or rule.summary)


def test_one_rule_is_explained_whatever_the_case_of_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    explained = printed(capsys, "ck401")
    assert explained.startswith("CK401  optimizer-step-mismatch\n\nThe steps that the optimizer itself counted")
    assert RULES["CK401"].explanation in explained
    assert f"\ncompares  {RULES['CK401'].compares}\n" in explained


def test_the_beginning_of_a_code_explains_the_family(capsys: pytest.CaptureFixture[str]) -> None:
    explained = printed(capsys, "CK7", "CK801")
    wanted = {code for code in RULES if code.startswith(("CK7", "CK801"))}
    assert {line[:5] for line in explained.splitlines() if line[:5] in RULES} == wanted


def test_the_table_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--format", "markdown").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == sorted(RULES)
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}


def test_an_unknown_code_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "CK999"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "enstack rules: there is no rule CK999; `enstack rules` lists them\n")


def test_the_rules_print_where_only_ascii_does() -> None:
    command = [sys.executable, "-m", "enstack_lightning", "rules", "CK"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
