"""The house: who may import whom, what an import costs, and that the tree is shown as it is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "samething"

# A module imports only modules above it.
ORDER = [
    "errors", "configuration", "progress", "arrays", "files", "checksums", "sessions", "images", "catalog",
    "pages", "datasets", "metrics", "statistics", "calibration", "retrieval", "rerank", "backbones",
    "features", "losses", "heads", "sampling", "training", "curate", "evaluation", "leaderboard", "bench",
    "study", "embedder", "export", "index", "search", "web", "fit", "demo", "cli",
]  # fmt: skip
# functions that are commands: their parameters are options
COMMANDS = {
    "bench",
    "catalog",
    "curate",
    "features",
    "train",
    "evaluate",
    "export",
    "index",
    "find",
    "serve",
    "datasets",
}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "core", "base", "misc"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or folder directly below the package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = (
                [node.module] if node.module != "samething" else [f"samething.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("samething.")}
    return found


def test_every_module_has_its_place():
    assert {room(path) for path in modules()} == {*ORDER, "__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_upwards(path):
    own = room(path)
    if own == "__init__":
        assert not imported_rooms(path)
        return
    allowed = {*ORDER[: ORDER.index(own) + 1]}
    assert imported_rooms(path) - {"__version__"} <= allowed


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_rooms_without_a_concept_and_no_star_imports(path):
    assert not {part.removesuffix(".py") for part in path.relative_to(SOURCE).parts} & FORBIDDEN_NAMES
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names))


def file_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports for use, anywhere in it; not those for types alone."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in guarded
    }


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_two_files_import_each_other():
    imports = {dotted(path): file_imports(path) for path in modules()}
    both = [
        (one, other)
        for one, others in imports.items()
        for other in others
        if one < other and one in imports.get(other, ())
    ]
    assert not both


def test_files_and_functions_can_be_held_in_the_head():
    """No file over 450 lines, no function over 80 lines or with more than 10 parameters, no file name twice.

    The function behind a command has its options as parameters: at most 15, ``train`` 25.
    """
    long_files, long_functions, wide = [], [], []
    for path in modules():
        text = path.read_text()
        lines = text.count("\n")
        if lines > 450:
            long_files.append((str(path.relative_to(SOURCE)), lines))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(SOURCE)}:{node.name}"
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    long_functions.append((where, length))
                count = len([*node.args.args, *node.args.kwonlyargs])
                options = {"train": 26}.get(node.name, 16) if node.name in COMMANDS else 10
                if count > options:
                    wide.append((where, count))
    assert not long_files
    assert not long_functions
    assert not wide


def test_a_file_name_means_one_thing():
    names: dict[str, list[str]] = {}
    for path in modules():
        if path.name != "__init__.py":
            names.setdefault(path.name, []).append(str(path.relative_to(SOURCE)))
    assert not {name: paths for name, paths in names.items() if len(paths) > 1}


def test_the_document_gives_the_order_that_is_held():
    text = (ROOT / "docs" / "architecture.md").read_text()
    written = re.search(r"in this order: ([\w\s,]+)\.", text)
    assert written and [name.strip() for name in written[1].split(",")] == ORDER


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.parametrize(
    "module", ["samething", "samething.search", "samething.cli", "samething.datasets", "samething.evaluation"]
)
def test_imports_without_torch(module):
    heavy = run_python(
        "import sys, importlib; importlib.import_module(sys.argv[1]);"
        "print(sorted({'torch', 'timm', 'matplotlib', 'faiss', 'jaxtyping'} & set(sys.modules)))",
        module,
    )
    assert heavy.strip() == "[]"


@pytest.mark.heavy
def test_imports_have_no_effects(tmp_path):
    """No logging set-up, no folder made, no environment touched by importing any module."""
    names = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in modules()
    ]
    code = """
import importlib, logging, os, pathlib, sys, torch, timm, matplotlib, faiss, onnxruntime, cyclopts
before = dict(os.environ), list(logging.getLogger().handlers), torch.get_num_threads()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert before == (dict(os.environ), list(logging.getLogger().handlers), torch.get_num_threads())
print(sorted(map(str, pathlib.Path(".").iterdir())))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def shown_paths(tree: str) -> set[str]:
    """Paths of a tree whose lines are indented by two spaces a level; folders end with a slash."""
    paths, parents = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del parents[depth:]
        parents.append(line.strip().split("  ")[0])
        paths.add("".join(parents))
    return paths


def test_the_tree_is_shown_as_it_is():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## What is where")[2]
    tree = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert tree, "docs/architecture.md has no file tree"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    expected = set()
    for path in listed:
        if path.startswith(("src/samething/", "recipes/", "benchmarks/", "docs/")) and (ROOT / path).exists():
            folder, *rest = path.removeprefix("src/samething/").split("/")
            inside_a_folder = path.startswith("src/") and rest
            # a folder of the package is one line
            expected.add(f"src/samething/{folder}/" if inside_a_folder else path)
    covered = {
        path for path in shown_paths(tree[1]) if path.startswith(("src/", "recipes/", "benchmarks/", "docs/"))
    }
    assert covered - {"src/samething/", "recipes/", "benchmarks/", "docs/"} == expected
