"""No false alarm: genuine checkpoints of every kind pass, quickly and deeply, but for warnings that are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from genuine import GENUINE

from enstack_lightning.checkpoint import Options, Severity, Verdict, verify_checkpoint


@pytest.mark.parametrize("name", GENUINE)
@pytest.mark.filterwarnings("ignore")
def test_a_genuine_checkpoint_passes(name: str, tmp_path: Path) -> None:
    case = GENUINE[name]
    path = case.write(tmp_path)
    for deep in (False, True):
        report = verify_checkpoint(path, Options(purpose=case.purpose, deep=deep))
        assert report.verdict is not Verdict.FAIL, report.of(Severity.ERROR)
        assert {f.code for f in report.of(Severity.WARNING)} <= set(case.warnings), report.of(Severity.WARNING)


def test_there_are_sixty_of_them() -> None:
    assert len(GENUINE) >= 60
