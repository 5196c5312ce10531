"""Shapes and dtypes in signatures are checked in every test run."""

import os
import shutil

import filelock
import hypothesis
import pytest
from jaxtyping import install_import_hook

install_import_hook("samething", "beartype.beartype")

# how long an example takes says nothing on a machine that does other things too
hypothesis.settings.register_profile("samething", deadline=None)
hypothesis.settings.load_profile("samething")


def pytest_addoption(parser):
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


@pytest.fixture
def line_copy(line, tmp_path):
    """A copy of the line that a test may change; the index still remembers the model beside it."""
    return shutil.copytree(line, tmp_path / "copy with space ü")
