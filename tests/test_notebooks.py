"""The notebooks of docs run from their first cell to their last, and show what they are stored with."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebooks
WHY = "not installed: pip install -e .[notebooks]"
nbformat = pytest.importorskip("nbformat", reason=f"nbformat is {WHY}")
nbclient = pytest.importorskip("nbclient", reason=f"nbclient is {WHY}")
pytest.importorskip("ipykernel", reason=f"ipykernel is {WHY}")

DOCS = Path(__file__).parent.parent / "docs"
SIMULATED = DOCS / "what_sp_buys.ipynb"
MEASURED = DOCS / "calibrate_and_verify.ipynb"
MOST_BYTES = 600_000
"""Of a notebook with its outputs."""


def read(path):
    return nbformat.read(path, as_version=4)


def executed(path):
    """A copy of a notebook, run in its folder; a cell that fails ends the test with its traceback."""
    notebook = read(path)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def words(notebook):
    """What the cells say: text, and the text of HTML."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            shown = data.get("text/html", data.get("text/plain", ""))
            texts += re.sub(r"<style.*?</style>|<[^>]*>", " ", shown, flags=re.DOTALL).split()
    return texts


@pytest.mark.parametrize("path", [SIMULATED, MEASURED], ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    """Every cell ran, in order, and said nothing on stderr; outputs are small."""
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len(outputs) >= 4
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.slow
def test_what_a_notebook_simulates_is_what_it_shows():
    """Texts and tables are those of the stored outputs, and pictures are there."""
    found, stored = executed(SIMULATED), read(SIMULATED)
    assert words(found) == words(stored)
    kinds = [[*output.get("data", {})] for cell in found.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in kind for kind in kinds) == 5
    assert sum("text/html" in kind for kind in kinds) == 3


@pytest.mark.slow
def test_what_a_notebook_measures_runs():
    """Calibration and verification of this machine: bytes and collectives are as simulated, as its cells assert."""
    said = " ".join(words(executed(MEASURED)))
    assert "saved_activation_bytes" in said
    assert "TP2+SP" in said
