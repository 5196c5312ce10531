"""The documents say what the code does: generated pages, links, docstrings."""

import ast
import re

import pytest

from line import ROOT, commands_of, run_python
from samething.cli import COMMANDS, build_app, named_command

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_command_reference_is_what_the_program_prints():
    """In a process of its own: shape checks and the terminal's width leave traces in help pages."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import generate; print(generate.page(), end='')"
    done = run_python("-c", code, ROOT / "docs")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "mailto:")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_make_targets_named_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"{page.name}: make {target}"
    for name in re.findall(r"`((?:tests|docs|recipes|benchmarks|src)/[\w/.]+\.(?:py|md))`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_ones_that_the_program_takes(page):
    """Options that were renamed or dropped stayed in pages which no test runs."""
    for command in commands_of(page):
        build_app(command=named_command(command)).parse_args(command, exit_on_error=False, print_error=False)


def public(tree: ast.Module):
    """Every public class and function of a module with its dotted name; those inside functions are not."""
    waiting = [(node.name, node) for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    while waiting:
        name, node = waiting.pop()
        if node.name.startswith("_"):
            continue
        yield name, node
        if isinstance(node, ast.ClassDef):
            waiting += [
                (f"{name}.{inner.name}", inner)
                for inner in node.body
                if isinstance(inner, ast.ClassDef | ast.FunctionDef)
            ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "src"))
)
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), path
    lacking = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert not lacking


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_explained(name):
    app = build_app(command=name)
    for word in name.split():
        app = app[word]
    shown = [argument for argument in app.assemble_argument_collection(parse_docstring=True) if argument.show]
    assert shown
    assert not [argument.name for argument in shown if not argument.parameter.help]
