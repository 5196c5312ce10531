"""Runs docs/tutorial.ipynb and writes what its cells print: ``python docs/notebook.py [--check]``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"


def run(notebook: dict[str, Any], folder: Path) -> list[str]:
    """What each code cell prints, run in turn in one namespace and in a folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    exec("".join(cell["source"]), names)
                printed.append(output.getvalue())
    return printed


def written(notebook: dict[str, Any]) -> list[str]:
    """What each code cell printed when the notebook was written."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(text for out in cell["outputs"] for text in out["text"]) for cell in cells]


if __name__ == "__main__":
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as place:
        printed = run(content, Path(place))
    if sys.argv[1:] == ["--check"]:
        if printed != written(content):
            raise SystemExit(f"{NOTEBOOK} holds other outputs:{os.linesep}{printed}")
    else:
        cells = (cell for cell in content["cells"] if cell["cell_type"] == "code")
        for number, (cell, text) in enumerate(zip(cells, printed, strict=True), start=1):
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell.update(execution_count=number, outputs=[stream] if text else [])
        NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
