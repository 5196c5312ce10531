"""Write docs/commands.md from the program's own help; ``tests/test_docs.py`` fails when the two differ."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from pathlib import Path

import rich.console

from samething.cli import COMMANDS, build_app, named_command
from samething.configuration import fields_of

TARGET = Path(__file__).parent / "commands.md"


def help_text(*arguments: str) -> str:
    """What the program prints for ``--help``, at a width of 100 columns and without colours."""
    buffer = io.StringIO()
    console = rich.console.Console(file=buffer, width=100, force_terminal=False, color_system=None)
    with contextlib.suppress(SystemExit):
        build_app(command=named_command(arguments))([*arguments, "--help"], console=console)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines())


def fields_text(name: str) -> str:
    """A table of the fields that a command's function and its ``--config`` take, if it has some."""
    module, _, function = COMMANDS[name].function.partition(":")
    kinds = getattr(getattr(importlib.import_module(module), function), "config_kinds", ())
    if not kinds:
        return ""
    rows = [
        f"| `{field}` | {toml(default)} | {' '.join(sentence.split())} |"
        for field, default, sentence in fields_of(*kinds)
    ]
    title = "Fields of the file behind `--config`, and of Python:"
    return "\n".join([title, "", "| field | default | |", "| --- | --- | --- |", *rows, ""])


def toml(value: object) -> str:
    """A value as in a TOML file; nothing for None, which TOML does not have."""
    if value is None:
        return ""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, default=str)}`"


def page() -> str:
    """The whole page."""
    parts = ["# Commands\n", "Written by `docs/generate.py` from `samething COMMAND --help`.\n"]
    parts.append(f"```text\n{help_text()}\n```\n")
    for name in COMMANDS:
        parts.append(f"## samething {name}\n\n```text\n{help_text(*name.split())}\n```\n")
        parts += [text for text in (fields_text(name),) if text]
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ.pop("COLUMNS", None)
    TARGET.write_text(page(), encoding="utf-8")
