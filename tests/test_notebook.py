"""The notebook runs from its first cell to its last, and what is stored with it is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shortened_examples import needs_data

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
for library in ("accelerate", "ipykernel", "transformers"):
    pytest.importorskip(library, reason=f"{library} is not installed")

NOTEBOOK = Path(__file__).parents[1] / "docs/notebooks/from-trainer-to-answers.ipynb"
SECONDS = 900  # of a cell: a deadline for one that hangs


def run(notebook: Any, folder: Path) -> Any:
    """The notebook with its outputs. Raises CellExecutionError, which names the cell and its error."""
    where = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's settings
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # otherwise jupyter_core warns
    return nbformat.read(NOTEBOOK, as_version=4)


@needs_data
@pytest.mark.recipe
def test_every_cell_of_the_notebook_runs(notebook: Any, tmp_path: Path) -> None:
    done = run(notebook, tmp_path)
    pages = ["".join(out.data.get("text/html", "")) for out in outputs(done) if "data" in out]
    assert sum("<caption>Proponents</caption>" in page for page in pages) == 2
    assert sum("background:rgba(0, 150, 80" in page for page in pages) == 2
    texts = "".join(out.get("text", "") for out in outputs(done))
    assert "places of the garbled paragraphs among 480" in texts
    assert (tmp_path / "runs/notebook/index/manifest.json").is_file()


def test_a_cell_that_fails_is_noticed(notebook: Any, tmp_path: Path) -> None:
    notebook.cells = [nbformat.v4.new_code_cell("raise RuntimeError('a cell that fails')")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="a cell that fails"):
        run(notebook, tmp_path)


def test_what_is_stored_is_small_and_of_no_machine(notebook: Any) -> None:
    assert NOTEBOOK.stat().st_size < 150_000
    assert {out.output_type for out in outputs(notebook)} <= {"display_data", "execute_result", "stream"}
    assert not [out for out in outputs(notebook) if out.get("name") == "stderr"]
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


def outputs(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]
