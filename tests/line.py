"""The program and the documents' examples, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from scenes import write_things

ROOT = Path(__file__).parent.parent
PROGRAM = "from samething.cli import main; main()"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "src"),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "PYTHONWARNINGS": "",
}


ALL_COMMANDS = """
import contextlib, json, sys
from samething.cli import main
for number, command in enumerate(json.loads(sys.argv[1])):
    with open(f"{number}.out", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        try:
            main(command)
        except SystemExit as done:
            if done.code:
                sys.exit(f"{command} ended with {done.code}")
"""


def samething(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    return run_python("-c", PROGRAM, *arguments, cwd=cwd)


def run_python(
    *arguments: object, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python on this checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=timeout_s, env=ENVIRONMENT,
    )  # fmt: skip


TUTORIAL = ROOT / "docs" / "tutorial.md"
README = ROOT / "README.md"


def blocks(language: str, page: Path = TUTORIAL) -> list[str]:
    """The fenced blocks of a language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands_of(page: Path = TUTORIAL) -> list[list[str]]:
    """Every line of a page that runs the program, without its name and its comment."""
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("samething ")]


def make_line(folder: Path) -> None:
    """Run the tutorial's commands on a few images of one's own, word for word."""
    write_things(folder / "my-images", num_things=12)
    shutil.copy(folder / "my-images" / "thing 03 é" / "view 1.jpg", folder / "some-image.jpg")
    commands = commands_of()
    assert [command[0] for command in commands] == [
        "catalog", "features", "train", "evaluate", "export", "index", "find",
    ]  # fmt: skip
    # one process for all of them: most of a command's time is the import of torch
    done = run_python("-c", ALL_COMMANDS, json.dumps(commands), cwd=folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
