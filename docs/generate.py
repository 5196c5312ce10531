"""Write docs/commands.md from the program's own help; ``tests/test_docs.py`` fails when the two differ."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import rich.console

from samething.cli import COMMANDS, build_app, named_command

TARGET = Path(__file__).parent / "commands.md"


def help_text(*arguments: str) -> str:
    """What the program prints for ``--help``, at a width of 100 columns and without colours."""
    buffer = io.StringIO()
    console = rich.console.Console(file=buffer, width=100, force_terminal=False, color_system=None)
    with contextlib.suppress(SystemExit):
        build_app(command=named_command(arguments))([*arguments, "--help"], console=console)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines())


def page() -> str:
    """The whole page."""
    parts = ["# Commands\n", "Written by `docs/generate.py` from `samething COMMAND --help`.\n"]
    parts.append(f"```text\n{help_text()}\n```\n")
    parts += [f"## samething {name}\n\n```text\n{help_text(*name.split())}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ.pop("COLUMNS", None)
    TARGET.write_text(page(), encoding="utf-8")
