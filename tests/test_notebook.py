"""The notebook runs from its first to its last cell and shows what its text says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []) if output["output_type"] == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSTACK_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [printed(cell) for cell in notebook.cells if cell["cell_type"] == "code"]
    assert "the machine dies in step 45" in said[1]
    assert "continues with epoch 1, batch 10 of 30" in said[2]
    assert "verdict     PASS" in said[2]
    assert "verdict     FAIL" in said[3]
    assert "CK105" in said[3]
    assert "must not be used: CK105" in said[4]
    assert "ended at step 60" in said[5]
    assert "equal: True" in said[6]


def test_there_is_a_quickstart() -> None:
    assert [p.name for p in NOTEBOOKS] == ["quickstart.ipynb"]
