"""The notebook: its outputs are there, and they are what its cells print."""

import json

import pytest

from line import ROOT, run_python

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_every_cell_of_the_notebook_shows_what_it_printed_and_compiles():
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        compile("".join(cell["source"]), NOTEBOOK.name, "exec")
        assert "".join(cell["outputs"][0]["text"]).strip()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    """Nobody would notice that a call in it has another name by now."""
    done = run_python(str(ROOT / "docs" / "notebook.py"), "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr
