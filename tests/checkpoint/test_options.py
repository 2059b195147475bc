"""What a caller asks for is taken as it is meant, or refused before anything is judged by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enstack_lightning.checkpoint import Options, Verdict, quick_verify_checkpoint, verify_checkpoint


def test_lists_and_single_texts_are_taken_as_they_are_meant(trained: Path) -> None:
    given: Any = {"select": ["ck4", "CK501"], "ignore": "CK403", "allow_globals": ["mine.Thing"]}
    options = Options(**given)
    assert (options.select, options.ignore) == (("CK4", "CK501"), ("CK403",))
    assert options.allow_globals == frozenset({"mine.Thing"})
    report = verify_checkpoint(trained / "step=7.ckpt", options)
    assert report.verdict is Verdict.PASS
    assert {f.code[:3] for f in report.findings} == {"CK4", "CK5"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"purpose": "training"}, "purpose is 'training' and must be 'resume' or 'inference'"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"select": ("CK4", "optimizer")}, "select holds 'OPTIMIZER'"),
        ({"ignore": ("CK9999",)}, "ignore holds 'CK9999', and no rule's code is or begins so"),
    ],
)
def test_what_would_judge_nothing_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**given)


@pytest.mark.parametrize("path", [None, 5, b"run.ckpt"])
def test_what_is_no_path_is_the_callers_mistake_and_no_bad_checkpoint(path: Any) -> None:
    with pytest.raises(TypeError):
        quick_verify_checkpoint(path)


def test_an_empty_path_is_not_the_current_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(ValueError, match="CK101 path: it is empty; is a variable of the script unset"):
        quick_verify_checkpoint("")
