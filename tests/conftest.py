"""Shapes and dtypes in signatures are checked in every test run."""

import ast
import functools
import os
import shutil
from pathlib import Path

# two test processes share two cores, and threads of the BLAS that wait for each other take a core each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import filelock
import hypothesis
import jaxtyping._import_hook as shapes
import pytest


class OuterFunctions(shapes.JaxtypingTransformer):
    """Functions inside of functions are left as they are: each call of the outer one would wrap them anew."""

    def visit_FunctionDef(self, node):  # noqa: N802
        body, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = body
        return node


shapes.JaxtypingTransformer = OuterFunctions
shapes.install_import_hook(["samething", "samething_demo"], "beartype.beartype")

# how long an example takes says nothing on a machine that does other things too
hypothesis.settings.register_profile("samething", deadline=None)
hypothesis.settings.load_profile("samething")


HEAVY = {
    "torch",
    "timm",
    "tiny",
    "line",
    "onnx",
    "safetensors",
    "ray",
    "pymilvus",
    "playwright",
    "transformers",
    "optuna",
    "samething_demo",
}


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="only the files that need neither torch nor the whole line: what make test-quick runs",
    )
    parser.addoption(
        "--data-root",
        default=os.environ.get("SAMETHING_DATA_ROOT"),
        help="folder of real public data sets, to compare with their published numbers",
    )


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """The whole line, made once by the README's commands; look, but leave it as it is.

    The folder holds my-images, some-image.jpg, things.parquet, features, run, model and index, and what
    each command printed, as NUMBER.out. Parallel test processes share it.
    """
    from line import make_line

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    folder = shared / "line with space é"
    with filelock.FileLock(shared / "line.lock"):
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_line(folder)
            (folder / "whole").touch()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """What ``make_tiny`` makes, and its model ``full``; forms of it may be written beside."""
    from samething.export import export
    from tiny import make_tiny

    folder = make_tiny(tmp_path_factory.mktemp("tiny é"))
    export(folder / "run", output=folder / "full", weights=folder / "w.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_vectors(tiny):
    """The photographs by the model ``full``."""
    from samething.embedder import Embedder
    from scenes import photographs

    return Embedder.load(tiny / "full").embed(photographs())


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread, so that sums are always of one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def line_copy(line, tmp_path):
    """A copy of the line that a test may change; the index still remembers the model beside it."""
    return shutil.copytree(line, tmp_path / "copy with space ü")


@functools.cache
def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    fixtures = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {name.split(".")[0] for name in names} | ({"line"} if fixtures & {"line", "line_copy"} else set())


def pytest_ignore_collect(collection_path, config):
    """With ``--quick`` files that need torch are not even imported, so that it runs where torch is not."""
    if config.getoption("--quick") and collection_path.suffix == ".py":
        return True if _imports(collection_path) & HEAVY else None
    return None


def pytest_collection_modifyitems(config, items):
    """With ``--quick`` no test or example is run that needs packages of the extras train or demo.

    One process makes the line at the very beginning, and no other waits for it.
    """
    if config.getoption("--quick"):
        items[:] = [
            item for item in items if not item.get_closest_marker("heavy") and not _imports(item.path) & HEAVY
        ]
    with_line = [item for item in items if "line" in getattr(item, "fixturenames", ())]
    others = [item for item in items if "line" not in getattr(item, "fixturenames", ())]
    items[:] = with_line[:1] + others + with_line[1:]
